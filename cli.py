"""`tsam "a red cube and a blue sphere"`: what T-SAM changes in a picture, and why, drawn into one PNG."""

import argparse
import importlib
import inspect
import json
import os
import textwrap
from contextlib import contextmanager
from pathlib import Path

from .shapes import ARGUMENTS, MODELS, TUNED


PIPELINES = {"sd": "StableDiffusionTSAMPipeline", "pixart": "PixArtAlphaTSAMPipeline"}
SETTINGS = (
    "schedule",
    "tsam_steps",
    "alpha",
    "gamma",
    "refinement_steps",
    "refinement_iterations",
    "objective",
    "guidance_scale",
)
# At 74, stock Stable Diffusion fails on "a red cube and a blue sphere", as at 30 and 41 of 0 to 109 (the sphere is
# missing); stock PixArt-α at none of 0 to 59.
SEEDS = {"sd": 74, "pixart": 0}
MAX_WORDS = 14  # two lines of maps that can still be read
WORDS_A_LINE = 7
NARROW, WIDE, MARGIN, HEADING, GAP = 10.5, 14.0, 0.35, 0.25, 0.1  # inches
PICTURES = {1: 2.7, 2: 3.4}  # inches of a picture's side beside one or two lines of maps
DPI = 120
NEAREST = 128  # pixels up to which a picture is shown as squares
INK, GREY, HEAT, TABLE = "#222222", "#777777", "inferno", "GnBu"


def draw(pipe, prompt, seed=0, **settings):
    """One prompt without and with T-SAM from one seed: two outputs of the pipeline, `settings` being its arguments."""
    import torch

    def run(name, **changes):
        pipe.set_progress_bar_config(desc=name)
        generator = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
        return pipe(prompt, generator=generator, output_attentions=True, **{**settings, **changes})

    tsam = run("T-SAM")  # first, since it is this one that checks the settings
    return run("stock", alpha=0, refinement_iterations=0), tsam  # alpha=0 only watches


def final_loss(output, objective):
    """The loss at the last guided step before its update, where `figure` shows the maps and S."""
    import torch

    from .attention_processors import alignment_loss

    seen = output.attentions[0]
    content = torch.ones(1, len(seen["tokens"]), dtype=torch.bool)
    return alignment_loss(seen["maps"][-1:], seen["text_attention"][None], content, objective)[0].item()


def figure(prompt, stock, tsam, captions=("", ""), footer=""):
    """Both pictures with each word's cross-attention, and T beside S before and after: a matplotlib `Figure`.

    stock, tsam: what `draw` returns, maps and S being those of the last guided step. captions: a line for each of the
    two pictures. footer: a line under everything.
    """
    from matplotlib.figure import Figure

    seen = [output.attentions[0] for output in (stock, tsam)]
    words = seen[0]["tokens"]
    shown = words[:MAX_WORDS]
    lines = -(-len(shown) // WORDS_A_LINE)
    columns = -(-len(shown) // lines)
    side = PICTURES[lines]
    left = MARGIN + side + 2 * GAP
    cell = min((WIDE - left - MARGIN + GAP) / columns, side / lines - HEADING)  # a map and the gap to the next
    width = max(left + columns * cell - GAP + MARGIN, NARROW)
    label = 0.15 + 0.085 * max(map(len, shown))
    table = (width - 2 * MARGIN) / 3 - label
    title = textwrap.fill(textwrap.shorten(f"“{prompt}”", 200, placeholder=" …”"), int(6.5 * width))
    top = 0.75 + 0.3 * title.count("\n")
    row = side + 2 * HEADING
    height = top + 2 * row + table + label + 1.0
    fig = Figure((width, height), dpi=DPI, facecolor="white")

    def write(x, y, text, size, **kwargs):
        """Text at (x, y) inches from the top left."""
        fig.text(x / width, 1 - y / height, text, size=size, parse_math=False, **{"color": INK, **kwargs})

    def panel(x, y, size):
        """A square without ticks, its top left corner at (x, y) inches from the figure's."""
        axes = fig.add_axes((x / width, 1 - (y + size) / height, size / width, size / height), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return axes

    write(width / 2, 0.2, title, 17, ha="center", va="top", weight="bold")
    maps = [image["maps"][-1].numpy() for image in seen]  # (s, H, W)
    for k, (name, output) in enumerate((("Stock", stock), ("T-SAM, same seed", tsam))):
        picture, y = output.images[0], top + k * row + HEADING
        grey = picture.convert("L")
        look = {"interpolation": "nearest" if max(picture.size) <= NEAREST else "bilinear", "vmin": 0, "vmax": 255}
        write(MARGIN, y - 0.08, name, 13, weight="bold")
        write(left, y - 0.08, captions[k], 11, color=GREY)
        panel(MARGIN, y, side).imshow(picture, **look)
        for i, word in enumerate(shown):
            line, column = divmod(i, columns)
            down = side / 2 + (line - lines / 2) * (cell + HEADING) + HEADING
            axes = panel(left + column * cell, y + down, cell - GAP)
            extent = axes.imshow(grey, cmap="gray", **look).get_extent()
            heat = maps[k][i] / max(1e-12, *(both[i].max() for both in maps))  # a word's maps share one scale
            axes.imshow(heat, HEAT, vmin=0, vmax=1, alpha=0.65, extent=extent, interpolation="bilinear")
            axes.set_title(word, size=11, color=INK, pad=3, parse_math=False)

    tables = (
        ("T: what the text encoder reads", seen[0]["text_attention"]),
        ("S: before (stock)", seen[0]["similarity"][-1]),
        ("S: after (T-SAM)", seen[1]["similarity"][-1]),
    )
    for k, (name, values) in enumerate(tables):
        axes = panel(MARGIN + label + k * (table + label), top + 2 * row + 0.45, table)
        axes.set_title(name, size=13, color=INK, weight="bold", pad=8)
        _fill_table(axes, values.numpy(), shown, table)
    guided = len(seen[0]["steps"])
    notes = [f"the first {MAX_WORDS} of {len(words)} words"] * (len(words) > MAX_WORDS)
    notes += [f"maps and S at guided step {guided} of {guided}, one scale a word", footer]
    write(width / 2, height - 0.15, " · ".join(filter(None, notes)), 9, color=GREY, ha="center", va="bottom")
    return fig


def _fill_table(axes, values, words, side):
    """A lower triangular matrix with its numbers, and the words on its axes; side: the panel's, in inches."""
    import numpy as np

    n = len(words)
    size = min(11, 72 * side / n * 0.3)  # points, so that ".25" fits a cell
    axes.imshow(np.ma.masked_array(values[:n, :n], ~np.tri(n, dtype=bool)), cmap=TABLE, vmin=0, vmax=1)
    axes.set_xticks(range(n), words, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(n), words, parse_math=False)
    axes.tick_params(length=0, labelsize=10 if n <= WORDS_A_LINE else 9, labelcolor=INK)
    for i, j in zip(*np.tril_indices(n)):
        colour = "white" if values[i, j] > 0.55 else INK
        axes.text(j, i, f"{values[i, j]:.2f}".lstrip("0"), size=size, color=colour, ha="center", va="center")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"tsam: {' '.join(str(message).split())}\n")


def arguments():
    parser = Parser(
        "tsam",
        description="Draw a prompt with and without T-SAM, from the same seed, and show what each word looks at.",
        epilog="What is not given was tuned for the shipped model; any other model has the pipeline's own defaults.",
    )
    add = parser.add_argument
    add("prompt", help="what to draw, two words or more")
    add("--pipeline", choices=tuple(PIPELINES), help="Stable Diffusion or PixArt-α (what --model is, or sd)")
    add("--model", help="a folder or Hub id of either (the shipped model of shapes)")
    add("--output", default="tsam.png", help="the PNG to write (tsam.png)")
    add(
        "--seed",
        type=int,
        help="seed of the noise that both pictures start from ({sd}, for pixart {pixart})".format(**SEEDS),
    )
    add("--steps", type=int, default=50, help="denoising steps (50)")
    add("--schedule", choices=("paper", "fast"), help="where the updates are, where not given below")
    add("--tsam-steps", type=int, help="how many of the first steps are guided")
    add("--device", help="where to run, such as cpu or cuda:1 (cuda if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="precision (float32 on the cpu, else float16)")
    add("--alpha", type=float, help="size of an update; too much breaks the picture")
    add("--gamma", type=float, help="more keeps only the strongest bonds between words")
    add("--objective", choices=("l1", "l1_full", "cosine"), help="how S is compared with T")
    add("--refinement-iterations", type=int, help="how many more updates at a few steps")
    add("--guidance-scale", type=float, help="how closely to follow the prompt")
    return parser


def check(args):
    """Refuse what would only fail after the pictures are drawn."""
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output has to end in .png but is {args.output!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {args.output!r}, but there is no folder {str(output.parent)!r}.")
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ValueError(f"--output is {args.output!r}, which cannot be written.")
    if args.tsam_steps == 0 or args.steps == 1 and args.tsam_steps is None:
        raise ValueError(f"Of {args.steps} steps none is guided, so nothing would be shown. Pass --tsam-steps 1.")


@contextmanager
def quiet():
    """No progress bars and no advice while a model is loaded."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers = diffusers_logging, transformers_logging
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        yield
    finally:
        for logger, verbosity, progress_bar in before:
            logger.set_verbosity(verbosity)
            if progress_bar:
                logger.enable_progress_bar()


def kind_of(folder):
    """Which of PIPELINES a saved pipeline is for, by its components."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"--model is {str(folder)!r}, which is no saved pipeline: it has no model_index.json.")
    components = json.loads(index.read_text())
    for kind, denoiser in (("sd", "UNet2DConditionModel"), ("pixart", "PixArtTransformer2DModel")):
        if denoiser in (components.get(name, [None])[-1] for name in ("unet", "transformer")):
            return kind
    raise ValueError(
        f"--model is {str(folder)!r}, a {components.get('_class_name')}. T-SAM is for {', '.join(PIPELINES)}."
    )


def load(model, kind=None, device=None, dtype=None):
    """A T-SAM pipeline from a folder or the Hub, on its device, and which of PIPELINES it is."""
    if not Path(model).is_dir() and (Path(model).is_absolute() or str(model).count("/") != 1):
        raise ValueError(f"--model is {str(model)!r}, which is neither a folder nor a Hub id such as 'owner/name'.")
    with quiet():
        import torch

        pipelines = importlib.import_module(__package__)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, dtype or ("float32" if device.type == "cpu" else "float16"))
    # with its progress bar, and without the code that may lie there: either class leaves it
    folder = model if Path(model).is_dir() else getattr(pipelines, PIPELINES[kind or "sd"]).download(model)
    kind = kind or kind_of(folder)
    with quiet():
        return getattr(pipelines, PIPELINES[kind]).from_pretrained(folder, dtype=dtype).to(device), kind


def run(args):
    """Everything the command does; the lines it prints."""
    check(args)
    pipe, kind = load(args.model or MODELS[args.pipeline or "sd"], args.pipeline, args.device, args.dtype)
    if pipe.get_text_self_attention(args.prompt).content.sum() < 2:
        raise ValueError(f"T-SAM aligns words with each other: {args.prompt!r} needs two or more.")
    shipped = args.model is None or Path(args.model).resolve() == MODELS[kind].resolve()
    seed = SEEDS[kind] if args.seed is None else args.seed
    pipeline_defaults = inspect.signature(pipe.__call__).parameters
    settings = {name: pipeline_defaults[name].default for name in SETTINGS}
    if shipped:
        settings.update(TUNED[kind], **ARGUMENTS[kind])
    settings.update({name: value for name, value in vars(args).items() if name in SETTINGS and value is not None})

    stock, tsam = outputs = draw(pipe, args.prompt, seed, num_inference_steps=args.steps, **settings)
    losses = [final_loss(output, settings["objective"]) for output in outputs]
    captions = [f"loss {loss:.3f}" for loss in losses]
    guided = len(tsam.attentions[0]["steps"])
    lines = [args.output, "loss at guided step {0} of {0}: stock {1:.3f}, T-SAM {2:.3f}".format(guided, *losses)]
    if shipped:
        from .shapes.judge import Judge

        seen = Judge.from_pretrained().read([output.images[0] for output in outputs])
        seen = [", ".join(sorted(map(" ".join, solids))) or "nothing" for solids in seen]
        captions = [f"{caption} · the judge sees: {solids}" for caption, solids in zip(captions, seen)]
        lines.append("the judge sees: stock {}; T-SAM {}".format(*seen))
    settings = [f"{name.replace('_', ' ')} {settings[name]}" for name in SETTINGS if settings[name] is not None]
    footer = " · ".join([f"seed {seed}", f"{args.steps} steps", *settings])
    figure(args.prompt, stock, tsam, captions, footer).savefig(args.output)
    return lines


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        print(*run(args), sep="\n")
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()

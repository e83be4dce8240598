"""`tsam "a red cube and a blue sphere"`: what T-SAM changes in a picture, and why, drawn into one PNG."""

import argparse
import functools
import importlib
import inspect
import io
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from . import FAMILIES
from .shapes import ARGUMENTS, MODELS, TUNED


READ = ("attention_resolution", "attention_layers")  # whose maps are read: one pipeline has the one, one the other
SETTINGS = ("objective", "schedule", "tsam_steps", "refinement_iterations", "alpha", "relative_step", "gamma")
SETTINGS += ("guidance_scale", *READ)
OPTIONAL = ("max_sequence_length", "regions", "region_weight")  # which a note is of only where they are given
OBJECTIVES = ("l1", "l1_full", "cosine", "attainable")  # those of tsam.py, which `--help` has no time to import
# Of 0 to 109, stock Stable Diffusion forgets the sphere of "a red cube and a blue sphere" at 74 only (at 30 and 41 it
# draws something unasked beside); stock PixArt-α forgets nothing at 0 to 59.
SEEDS = {"sd": 74, "pixart": 0, "sink": 0}
INTERRUPTED = 130  # what a shell expects after Ctrl-C


class Drawn(NamedTuple):
    """A picture, and what was seen in its G denoising steps, when they predict the noise: after a guided one's updates.

    losses: G numbers. guided: which steps were. attentions: what `LatentAlignment.attentions` returns, of all steps;
    with regions also these, as `figures.figure` draws them.
    """

    picture: Any
    losses: list
    guided: list
    attentions: dict


def compare(pipe, prompt, seed=0, on_step=None, **settings):
    """One prompt without and with T-SAM, from one seed: a pair of `Drawn`. `settings` are arguments of the pipeline.

    on_step: called as (pipe, "T-SAM" or "stock", step, latents, loss) after every step. None is returned where it sets
    `pipe._interrupt`, which ends the drawing.
    """
    from .attention_processors import mean_maps, record_cross_attention
    from .tsam import LatentAlignment, check_regions, layout_of

    defaults = {name: argument.default for name, argument in inspect.signature(pipe.__call__).parameters.items()}
    given = {**defaults, **settings, "prompt": prompt}
    layers = pipe.cross_attention_layers(*(given[name] for name in READ if name in given))

    def named(method):
        """The arguments of `method` that are given."""
        names = given.keys() & inspect.signature(method).parameters.keys()
        return functools.partial(method, **{name: given[name] for name in names})

    text = named(pipe.get_text_self_attention)()
    if text.content.sum() < 2:
        raise ValueError(f"T-SAM aligns words with each other: {prompt!r} needs two or more.")
    layout = layout_of(check_regions(given["regions"], 1), text, named(pipe.words_of))
    how = {"device": "cpu", "layout": layout, "region_weight": given["region_weight"]}

    def run(name, **changes):
        import torch

        steps, seen = [], LatentAlignment(text, 0, given["gamma"], given["objective"], **how)

        def keep(pipe, i, t, tensors):
            latents = tensors["latents"]
            maps = mean_maps(recorded, *latents.shape[-2:])[-1:].cpu()  # of the half with the prompt
            steps.append(i)
            seen.maps.append(maps)
            seen.losses.append(seen.loss_of(maps))
            if on_step is not None:
                on_step(pipe, name, i, latents, seen.losses[-1].item())
            return {}

        pipe.set_progress_bar_config(desc=name)
        generator = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
        arguments = {**settings, **changes, "generator": generator, "callback_on_step_end": keep}
        with record_cross_attention(layers, seen.num_tokens) as recorded:
            output = pipe(prompt, **arguments)
        guided = output.attentions[0]["steps"] if output.attentions else []
        attentions = seen.attentions(steps)[0]
        if layout is not None:
            words = layout.tokens[0][:, text.content[0]]
            own = [of_phrase.nonzero().flatten().tolist() for of_phrase in words]
            attentions["regions"] = list(zip(layout.regions[0], own))
        return Drawn(output.images[0], seen.losses_per_image()[0].tolist(), guided, attentions)

    tsam = run("T-SAM", output_attentions=True)  # first, since it is this one that checks the settings
    stock = None if pipe.interrupt else run("stock", tsam_steps=0)
    return None if pipe.interrupt else (stock, tsam)


def draw(pipe, prompt, seed=0, **settings):
    """`compare` at the last guided step: both pictures, both losses, how many steps were guided, and the attentions,
    with stock and T-SAM in place of the steps."""
    import torch

    pair = compare(pipe, prompt, seed, **settings)
    guided = pair[1].guided
    pictures, losses = [drawn.picture for drawn in pair], [drawn.losses[guided[-1]] for drawn in pair]
    attentions = {**pair[1].attentions, "steps": ["stock", "T-SAM"]}
    for name in ("maps", "similarity"):
        attentions[name] = torch.stack([drawn.attentions[name][guided[-1]] for drawn in pair])
    if "region_shares" in attentions:
        shares = [drawn.attentions["region_shares"] for drawn in pair]
        attentions["region_shares"] = {
            phrase: torch.stack([share[phrase][guided[-1]] for share in shares]) for phrase in shares[0]
        }
    return pictures, losses, len(guided), attentions


def region(text):
    """("a red cube", (0.0, 0.0, 0.5, 1.0)) of "a red cube=0,0,0.5,1"."""
    phrase, _, numbers = text.rpartition("=")
    try:
        box = tuple(map(float, numbers.split(",")))
    except ValueError:
        box = ()
    if not phrase or len(box) != 4:
        raise argparse.ArgumentTypeError(f'it is {text!r}, but has to be as "a red cube=0,0,0.5,1".')
    return phrase, box


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message, status=2):
        self.exit(status, f"tsam: {' '.join(str(message).split())}\n")


def arguments():
    parser = Parser(
        "tsam",
        description="Draw a prompt with and without T-SAM, from the same seed, and show what each word looks at.",
        epilog="What is not given was tuned for the shipped model; any other model has the pipeline's own defaults.",
    )
    add = parser.add_argument
    names = " or ".join(family.name for family in FAMILIES.values())
    seeds = "{sd}, for pixart {pixart}, with --sink {sink}".format(**SEEDS)
    add("prompt", help="what to draw, two words or more")
    add("--pipeline", choices=tuple(FAMILIES), help=f"{names} (what --model is, or sd)")
    add("--model", help="a folder or Hub id of either (the shipped model of shapes)")
    add("--sink", action="store_true", help="the shipped sd with an attention sink on <bos>, which swaps colours")
    add("--output", default="tsam.png", help="the PNG to write (tsam.png)")
    add("--seed", type=int, help=f"seed of the noise that both pictures start from ({seeds})")
    add("--steps", type=int, default=50, help="denoising steps (50)")
    add("--schedule", choices=("paper", "fast", "light"), help="where the updates are, where not given below")
    add("--tsam-steps", type=int, help="how many of the first steps are guided")
    add("--device", help="where to run, such as cpu or cuda:1 (cuda if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="precision (float32 on the cpu, else float16)")
    add("--alpha", type=float, help="size of an update; too much breaks the picture")
    add("--relative-step", type=float, help="instead of alpha: the first update, as a share of the input")
    add("--gamma", type=float, help="more keeps only the strongest bonds between words")
    add("--objective", choices=OBJECTIVES, help="how S is compared with T")
    where = "where words of the prompt are to be: left, top, right, bottom in fractions of the picture; may be repeated"
    add("--region", type=region, action="append", metavar='"WORDS=X0,Y0,X1,Y1"', help=where)
    add("--region-weight", type=float, help="holds them there harder (10)")
    add("--max-sequence-length", type=int, help="sd: tokens of a long prompt, 300 for instance (77 with truncation)")
    add("--refinement-iterations", type=int, help="how many more updates at a few steps")
    add("--guidance-scale", type=float, help="how closely to follow the prompt")
    add("--attention-resolution", type=int, help="sd: side of the grid whose maps are read (16; 24 for 2.1 at 768)")
    blocks = "pixart: first and last block whose maps are read (10 18)"
    add("--attention-layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help=blocks)
    return parser


def check(args):
    """Refuse at once what would only fail later."""
    if any("\ud800" <= sign <= "\udfff" for sign in args.prompt):
        raise ValueError(f"The prompt is {args.prompt!r}, which is not in UTF-8.")
    output = Path(args.output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output has to end in .png but is {args.output!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {args.output!r}, but there is no folder {str(output.parent)!r}.")
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ValueError(f"--output is {args.output!r}, which cannot be written.")
    if args.sink and (args.model or args.pipeline == "pixart"):
        raise ValueError("--sink is for the Stable Diffusion that ships. Leave --model and --pipeline out.")
    if args.tsam_steps == 0:
        raise ValueError("--tsam-steps is 0, so that nothing would be shown. Pass 1 or more.")


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


def kind_of(index):
    """Which of FAMILIES a saved pipeline is for. index: its model_index.json."""
    try:
        name = json.loads(Path(index).read_text(encoding="utf-8"))["_class_name"]
        name = name if isinstance(name, str) else name[-1]  # with code of its own beside: the code's file and class
    except FileNotFoundError:
        raise ValueError("it is no saved pipeline, since it has no model_index.json.") from None
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f"its model_index.json is not one ({type(error).__name__}: {error}).") from error
    for kind, family in FAMILIES.items():
        if name in (family.stock, family.pipeline):
            return kind
    known = " and ".join(f"{family.name} ({family.stock})" for family in FAMILIES.values())
    raise ValueError(f"it is a {name}. T-SAM is for {known}.")


def load(model, kind=None, device=None, dtype=None):
    """A T-SAM pipeline from a folder or the Hub, on its device, and which of FAMILIES it is: `kind`, where given."""
    model = str(model)
    local = Path(model).is_dir()
    if not local and (Path(model).is_absolute() or model.count("/") != 1):
        raise ValueError(f"--model is {model!r}, which is neither a folder nor a Hub id such as 'owner/name'.")
    with quiet():
        import torch
        from huggingface_hub import hf_hub_download

        package = importlib.import_module(__package__)
        classes = {name: getattr(package, family.pipeline) for name, family in FAMILIES.items()}
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = getattr(torch, dtype or ("float32" if device.type == "cpu" else "float16"))
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the first where torch was built without it
        raise ValueError(f"--device is {str(device)!r}: {error}") from error
    try:
        found = kind_of(Path(model) / "model_index.json" if local else hf_hub_download(model, "model_index.json"))
        if kind not in (None, found):
            raise ValueError(f"it is a {FAMILIES[found].name}, but --pipeline is {kind}. Leave that out.")
        return _load(classes[found], model, FAMILIES[found].denoiser, dtype).to(device), found
    except Exception as error:  # whatever diffusers and transformers raise for files that are not as they should be
        name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"--model is {model!r}, which cannot be loaded: {name}{error}") from error


def _load(cls, model, denoiser, dtype):
    """`cls` from a folder or the Hub. ValueError for what loads but cannot draw. denoiser: its component's name."""
    folder = Path(model if Path(model).is_dir() else cls.download(model))  # with its progress bar
    with quiet():
        pipe = cls.from_pretrained(folder, dtype=dtype)
    if not any((folder / "tokenizer").glob("*")):
        raise ValueError("it has no tokenizer, in whose place transformers makes one that knows no words.")
    found, needed = pipe.components[denoiser].config.in_channels, pipe.vae.config.latent_channels
    if found != needed:
        raise ValueError(f"its {denoiser} takes {found} channels, as for inpainting, where latents have {needed}.")
    return pipe


def settings_of(pipe, kind, tuned=None):
    """The defaults of SETTINGS, for a pipeline or its class: its own, or those of TUNED for a model that ships."""
    parameters = inspect.signature(pipe.__call__).parameters
    settings = {name: parameters[name].default for name in SETTINGS if name in parameters}
    return settings | TUNED[tuned] | ARGUMENTS[kind] if tuned else settings


def judged(pictures):
    """What is in pictures of the models that ship, in words, "2 blue rings, red cube" for one."""
    from collections import Counter

    from .shapes.judge import Judge

    found = [Counter(f"{colour} {solid}" for colour, solid, _ in s) for s in Judge.from_pretrained().solids(pictures)]
    several = [[f"{n} {name}s" if n > 1 else name for name, n in sorted(solids.items())] for solids in found]
    return [", ".join(solids) or "nothing" for solids in several]


def run(args):
    """Everything the command does; the lines it prints."""
    from . import figures  # here, since matplotlib takes its time

    check(args)
    pipe, kind = load(args.model or MODELS[args.pipeline or "sd"], args.pipeline, args.device, args.dtype)
    shipped = args.model is None or Path(args.model).resolve() == MODELS[kind].resolve()
    tuned = "sink" if args.sink else kind if shipped else None
    if args.sink:
        from .shapes.sink import add_sink

        add_sink(pipe)
    seed = SEEDS[tuned or kind] if args.seed is None else args.seed
    settings = settings_of(pipe, kind, tuned)
    given = {name: value for name, value in vars(args).items() if name in SETTINGS and value is not None}
    for name in given.keys() - settings.keys():
        raise ValueError(f"--{name.replace('_', '-')} is not for {FAMILIES[kind].name}. Leave it out.")
    settings.update(given)
    optional = {**vars(args), "regions": dict(args.region) if args.region else None}
    settings.update({name: optional[name] for name in OPTIONAL if optional[name] is not None})
    if "alpha" in given and "relative_step" not in given:
        settings["relative_step"] = None
    pictures, losses, guided, seen = draw(pipe, args.prompt, seed, num_inference_steps=args.steps, **settings)
    captions = [f"loss {loss:.3f}" for loss in losses]
    when = f"at step {guided} of {args.steps}, after its updates"
    lines = [args.output, f"loss {when}: " + "stock {:.3f}, T-SAM {:.3f}".format(*losses)]
    if shipped:
        solids = judged(pictures)
        captions = [f"{caption} · the judge sees: {found}" for caption, found in zip(captions, solids)]
        lines.append("the judge sees: stock {}; T-SAM {}".format(*solids))
    notes = [f"maps and S {when}, one scale a word", f"seed {seed}"]
    named = (*SETTINGS, "max_sequence_length", "region_weight")
    notes += [f"{name.replace('_', ' ')} {settings[name]}" for name in named if settings.get(name) is not None]
    for phrase, (before, after) in seen.get("region_shares", {}).items():
        lines.append(f"attention of {phrase!r} inside its region: stock {before:.0%}, T-SAM {after:.0%}")
    rows = list(zip(("Stock", "T-SAM, same seed"), captions, pictures, seen["maps"]))
    tables = [("T: what the text encoder reads", seen["text_attention"])]
    if settings["objective"] == "attainable":
        from .tsam import attainable_target

        tables.append(("T as S can take it", attainable_target(seen["text_attention"])))
    tables += zip(("S: stock", "S: T-SAM"), seen["similarity"])
    drawn = figures.figure(args.prompt, seen["tokens"], rows, tables, " · ".join(notes), seen.get("regions", ()))
    figures.save(drawn, args.output)
    return lines


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every one can say "PixArt-α"
            stream.reconfigure(errors="backslashreplace")
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        print(*run(args), sep="\n")
    except KeyboardInterrupt:
        parser.error("interrupted", INTERRUPTED)
    except (OSError, RuntimeError, ValueError) as error:  # not those that only a mistake of ours raises
        parser.error(error)


if __name__ == "__main__":
    main()

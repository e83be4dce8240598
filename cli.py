"""`tsam "a red cube and a blue sphere"`: what T-SAM changes in a picture, and why, drawn into one PNG."""

import argparse
import importlib
import io
import json
import os
import re
import runpy
import sys
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from . import FAMILIES
from .shapes import ARGUMENTS, MODELS, TUNED
from .tsam_arguments import (
    OBJECTIVE_NAMES,
    PixArtAlphaSettings,
    Settings,
    StableDiffusionSettings,
    kind_of_field,
    one_of,
)


# What the command takes of T-SAM's settings. The rest is for programs, or has a flag of its own form.
NOT_FLAGS = ("text_self_attention", "output_attentions", "regions")
# Of 0 to 109, stock Stable Diffusion forgets the sphere of "a red cube and a blue sphere" at 74 only (at 30 and 41 it
# draws something unasked beside); stock PixArt-α forgets nothing at 0 to 59.
SEEDS = {"sd": 74, "pixart": 0, "sink": 0}
INTERRUPTED = 130  # what a shell expects after Ctrl-C


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


def objective_of(text):
    """An objective's name as it is, or the function that "my.py:function" names: `Settings` takes either. ValueError
    for what is neither."""
    file, _, name = text.rpartition(":")
    if text in OBJECTIVE_NAMES:
        return text
    if not Path(file).is_file():
        known = one_of(OBJECTIVE_NAMES)
        raise ValueError(f"`objective` is {text!r}, but has to be {known}, or a function in a file, my.py:function.")
    try:
        found = runpy.run_path(file).get(name)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"`objective` is {text!r}, whose file fails: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"`objective` is {text!r}, but that file has no function {name!r}.")
    return found


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message, status=2):
        self.exit(status, f"tsam: {' '.join(str(message).split())}\n")


def flags():
    """The fields of both families' settings that are flags."""
    found = {each.name: each for cls in (StableDiffusionSettings, PixArtAlphaSettings) for each in fields(cls)}
    return [each for name, each in found.items() if name not in NOT_FLAGS]


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
    add("--device", help="where to run, such as cpu or cuda:1 (cuda if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="precision (float32 on the cpu, else float16)")
    add("--guidance-scale", type=float, help="how closely to follow the prompt")
    where = "where words of the prompt are to be: left, top, right, bottom in fractions of the picture; may be repeated"
    add("--region", type=region, action="append", metavar='"WORDS=X0,Y0,X1,Y1"', help=where)
    for each in flags():
        kind, choices, help = kind_of_field(each), each.metadata["choices"], each.metadata["help"].replace("%", "%%")
        if choices:
            how = {"choices": choices}
        elif kind in (int, float):
            how = {"type": kind}
        else:  # integers: two blocks, or any number of steps
            how = {"type": int, "nargs": 2 if kind is tuple else "*"}
        add(f"--{each.name.replace('_', '-')}", help=help, **how)
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
    common = {each.name for each in fields(Settings)}
    Settings(**{name: value for name, value in given_of(args).items() if name in common}).plan(args.steps)


def given_of(args):
    """The settings that were passed."""
    given = {each.name: getattr(args, each.name) for each in flags() if getattr(args, each.name) is not None}
    return given | ({"regions": dict(args.region)} if args.region else {})


def in_flags(message):
    """An error about the pipelines' arguments, in the command's words."""
    own = {each.name: each.name.replace("_", "-") for each in flags()}
    own |= {"num_inference_steps": "steps", "regions": "region"}
    return re.sub(r"`(\w+)`", lambda match: f"--{own[match[1]]}" if match[1] in own else match[0], str(message))


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


def settings_of(pipe, kind, tuned=None, **given):
    """A pipeline's or its class's `Settings`, from what is given, for a model that ships from TUNED where not, and else
    from the preset. ValueError for what is not this pipeline's."""
    known = {each.name for each in fields(pipe.settings)}
    for name in given.keys() - known:
        raise ValueError(f"--{name.replace('_', '-')} is not for {FAMILIES[kind].name}. Leave it out.")
    return pipe.settings(**(TUNED[tuned] if tuned else {}) | given)


def judged(pictures):
    """What is in pictures of the models that ship, in words, "2 blue rings, red cube" for one."""
    from collections import Counter

    from .shapes.judge import Judge

    found = [Counter(f"{colour} {solid}" for colour, solid, _ in s) for s in Judge.from_pretrained().solids(pictures)]
    several = [[f"{n} {name}s" if n > 1 else name for name, n in sorted(solids.items())] for solids in found]
    return [", ".join(solids) or "nothing" for solids in several]


def run(args):
    """Everything the command does; the lines it prints."""
    from . import figures  # here, because matplotlib takes its time
    from .comparing import draw

    check(args)
    pipe, kind = load(args.model or MODELS[args.pipeline or "sd"], args.pipeline, args.device, args.dtype)
    shipped = args.model is None or Path(args.model).resolve() == MODELS[kind].resolve()
    tuned = "sink" if args.sink else kind if shipped else None
    if args.sink:
        from .shapes.sink import add_sink

        add_sink(pipe)
    seed = SEEDS[tuned or kind] if args.seed is None else args.seed
    settings = settings_of(pipe, kind, tuned, **given_of(args))
    usual = ARGUMENTS[kind] if shipped else {}
    scale = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    pictures, losses, guided, seen = draw(
        pipe, args.prompt, seed, settings, num_inference_steps=args.steps, **usual | scale
    )
    captions = [f"loss {loss:.3f}" for loss in losses]
    when = f"at step {guided} of {args.steps}, after its updates"
    lines = [args.output, f"loss {when}: " + "stock {:.3f}, T-SAM {:.3f}".format(*losses)]
    if shipped:
        solids = judged(pictures)
        captions = [f"{caption} · the judge sees: {found}" for caption, found in zip(captions, solids)]
        lines.append("the judge sees: stock {}; T-SAM {}".format(*solids))
    notes = [f"maps and S {when}, one scale a word", f"seed {seed}"]
    shown = {name: value for name, value in settings.given.items() if name not in NOT_FLAGS} | scale
    notes += [f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value is not None]
    for phrase, (before, after) in seen.get("region_shares", {}).items():
        lines.append(f"attention of {phrase!r} inside its region: stock {before:.0%}, T-SAM {after:.0%}")
    rows = list(zip(("Stock", "T-SAM, same seed"), captions, pictures, seen["maps"]))
    tables = [("T: what the text encoder reads", seen["text_attention"])]
    if settings.objective in ("relation", "contrast"):
        tables.append(("R: which words are related", seen["relation"]))
    elif settings.objective == "attainable":
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
        parser.error(in_flags(error))


if __name__ == "__main__":
    main()

"""`tsam "a red cube and a blue sphere"`: what T-SAM changes in a picture, and why, drawn into one PNG."""

import argparse
import importlib
import io
import json
import logging
import re
import runpy
import sys
from contextlib import contextmanager
from dataclasses import fields
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile

from . import FAMILIES
from .shapes import ARGUMENTS, COLOURS, MODELS, SOLIDS, TUNED, WORDS, unknown_words
from .tsam_arguments import (
    OBJECTIVE_NAMES,
    PixArtAlphaSettings,
    StableDiffusionSettings,
    check_integer,
    check_number,
    kind_of_field,
    one_of,
)


SETTINGS = {"sd": StableDiffusionSettings, "pixart": PixArtAlphaSettings}  # as the pipelines', without importing these
# Settings without a flag made from them: they are for programs, or have a flag of another form.
NOT_FLAGS = ("text_self_attention", "output_attentions", "regions")
# Of 0 to 109, stock Stable Diffusion forgets the sphere of "a red cube and a blue sphere" at 74 only (at 30 and 41 it
# draws something unasked beside); stock PixArt-α forgets nothing at 0 to 59.
SEEDS = {"sd": 74, "pixart": 0, "sink": 0}
LAST_SEED = 2**64 - 1  # torch's
MAX_SEEDS = 16  # columns of a sheet
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


def seeds(text):
    """The seeds of "0-7", or of "7"."""
    first, _, last = text.partition("-")
    last = last or first
    found = range(int(first), int(last) + 1) if first.isdecimal() and last.isdecimal() else ()
    if not found or found[-1] > LAST_SEED or found[-1] - found[0] >= MAX_SEEDS:
        how = f"a seed from 0 to {LAST_SEED}, or as 0-7, at most {MAX_SEEDS} of them"
        raise argparse.ArgumentTypeError(f"it is {text!r}, but has to be {how}.")
    return found


def objective_of(text):
    """An objective's name as it is, or the function that "my.py:function" names: `Settings` takes either. ValueError
    for what is neither."""
    if text in OBJECTIVE_NAMES:
        return text
    return function_of(text, "objective", f"{one_of(OBJECTIVE_NAMES)}, or ")


def function_of(text, argument, others=""):
    """The function that an argument names, "my.py:function". others: what else it could be, for the error."""
    file, _, name = text.rpartition(":")
    if not Path(file).is_file():
        raise ValueError(f"`{argument}` is {text!r}, but has to be {others}a function in a file, my.py:function.")
    try:
        found = runpy.run_path(file).get(name)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"`{argument}` is {text!r}, whose file fails: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"`{argument}` is {text!r}, but that file has no function {name!r}.")
    return found


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message, status=2):
        self.exit(status, f"tsam: {' '.join(str(message).split())}\n")


def flags():
    """The fields of both families' settings that are flags."""
    found = {each.name: each for cls in SETTINGS.values() for each in fields(cls)}
    return [each for name, each in found.items() if name not in NOT_FLAGS]


def arguments():
    parser = Parser(
        "tsam",
        description="Draw a prompt with and without T-SAM, from the same seed, and show what each word looks at.",
        epilog="Settings that you leave out were tuned for the models that ship; another model gets the pipeline's"
        f" defaults. The models that ship know only these words: {', '.join(WORDS)}.",
    )
    add = parser.add_argument
    names = " or ".join(family.name for family in FAMILIES.values())
    usual = "{sd}, which was picked; for pixart {pixart}, with --sink {sink}".format(**SEEDS)
    add("prompt", help="what to draw, two words or more")
    add("--pipeline", choices=tuple(FAMILIES), help=f"{names} (what --model is, or sd)")
    add("--model", help="a folder or Hub id of either (the shipped model of shapes)")
    add("--sink", action="store_true", help="the shipped sd with an attention sink on <bos>, which swaps colours")
    add("--output", help="the PNG to write (tsam.png, or where there is one, tsam-2.png and so on)")
    add("--force", action="store_true", help="overwrite it")
    noise = f"seed of the noise that both pictures start from ({usual}); several, as 0-7, make a sheet, a column each"
    add("--seed", "--seeds", type=seeds, help=noise)
    add("--best-of", type=int, help="draw the best of that many seeds, from --seed on, by the loss of their starts")
    add("--steps", type=int, default=50, help="denoising steps (50)")
    add("--device", help="where to run, such as cpu or cuda:1 (cuda if there is one)")
    add("--dtype", choices=("float32", "float16", "bfloat16"), help="precision (float32 on the cpu, else float16)")
    add("--guidance-scale", type=float, help="how closely to follow the prompt")
    where = "where words of the prompt are to be: left, top, right, bottom in fractions of the picture; may be repeated"
    add("--region", type=region, action="append", metavar='"WORDS=X0,Y0,X1,Y1"', help=where)
    for each in flags():
        kind, choices, help = kind_of_field(each), each.metadata["choices"], each.metadata["help"].replace("%", "%%")
        if each.name == "objective":
            how, help = {}, help.replace("a function", "my.py:function, a function")
        elif choices:
            how = {"choices": choices}
        elif kind in (int, float):
            how = {"type": kind}
        else:  # integers: two blocks, or any number of steps
            how = {"type": int, "nargs": 2 if kind is tuple else "*"}
        add(f"--{each.name.replace('_', '-')}", help=help, **how)
    return parser


def check_prompt(prompt, tokens=2):
    """ValueError for a prompt that T-SAM changes nothing of. tokens: as how many the model reads it."""
    if any("\ud800" <= sign <= "\udfff" for sign in prompt):
        raise ValueError(f"The prompt is {prompt!r}, which is not in UTF-8.")
    if len(prompt.split()) < 2 or tokens < 2:
        raise ValueError(f"T-SAM aligns words with each other: {prompt!r} needs two or more, with spaces between.")


def check(args):
    """Refuse at once what would only fail later. What names a file, a function or nothing yet is replaced by it."""
    check_prompt(args.prompt)
    output = Path(args.output or "tsam.png")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output has to end in .png but is {args.output!r}.")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {args.output!r}, but there is no folder {str(output.parent)!r}.")
    if args.output and output.is_file() and not args.force:
        raise ValueError(f"--output is {args.output!r}, which exists. Pass --force to overwrite it.")
    names = (output if k == 1 else Path(f"tsam-{k}.png") for k in count(1))
    output = output if args.output or args.force else next(name for name in names if not name.exists())
    args.output = str(output)
    try:  # by opening, because permissions alone would let root write into /proc
        (output.open("ab") if output.exists() else TemporaryFile(dir=output.parent)).close()
    except OSError as error:
        raise ValueError(f"--output is {args.output!r}, which cannot be written: {error.strerror}.") from error
    if args.sink and (args.model or args.pipeline == "pixart"):
        raise ValueError("--sink is for the Stable Diffusion that ships. Leave --model and --pipeline out.")
    if args.best_of and args.seed and len(args.seed) > 1:
        raise ValueError(f"--best-of starts at one seed, but --seeds names {len(args.seed)}. Pass the first as --seed.")
    if args.best_of and args.seed and args.seed[0] + args.best_of - 1 > LAST_SEED:
        raise ValueError(f"--best-of {args.best_of} goes past the last seed, {LAST_SEED}. Pass a lower --seed.")
    if args.region and len(dict(args.region)) < len(args.region):
        raise ValueError("--region names the same words twice. Pass each once.")
    if args.tsam_steps == 0:
        raise ValueError("--tsam-steps is 0, so that nothing would be shown. Pass 1 or more.")
    for name in ("best_of", "max_sequence_length"):
        if getattr(args, name) is not None:
            check_integer(name, getattr(args, name), 1, "Leave it out, or pass more.")
    if args.guidance_scale is not None:
        check_number("guidance_scale", args.guidance_scale, "7.5 is usual.")
    if args.objective is not None:
        args.objective = objective_of(args.objective)


def given_of(args):
    """The settings that were passed."""
    given = {each.name: getattr(args, each.name) for each in flags() if getattr(args, each.name) is not None}
    return given | ({"regions": dict(args.region)} if args.region else {})


def in_flags(message, args):
    """An error about the pipelines' arguments, in the command's words."""
    own = vars(args).keys() - {"prompt"}
    message = str(message).replace("`num_inference_steps`", "`steps`").replace("`regions", "`region")
    return re.sub(r"`(\w+)([^`]*)`", lambda m: f"--{m[1].replace('_', '-')}{m[2]}" if m[1] in own else m[0], message)


@contextmanager
def quiet():
    """No progress bars of loading, no advice, and of our warnings none that a prompt is cut, which `remarks` says."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    def keep(record):
        return "is left out" not in record.getMessage()

    ours, loggers = logging.getLogger("diffusers.tsam"), (diffusers_logging, transformers_logging)
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    level = ours.level
    try:
        ours.setLevel(logging.WARNING)
        ours.addFilter(keep)
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        yield
    finally:
        ours.setLevel(level)
        ours.removeFilter(keep)
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
    raise ValueError(f"it is a {name}. This draws with {known}.")


@contextmanager
def loading(model):
    """ValueError in place of whatever diffusers and transformers raise for files that are not as they should be."""
    try:
        yield
    except Exception as error:
        name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"--model is {model!r}, which cannot be loaded: {name}{error}") from error


def family_of(model, kind=None):
    """Which of FAMILIES a folder or Hub id is: `kind`, where given."""
    model = str(model)
    local = Path(model).is_dir()
    if not local and (Path(model).is_absolute() or model.count("/") != 1):
        raise ValueError(f"--model is {model!r}, which is neither a folder nor a Hub id such as 'owner/name'.")
    with loading(model):
        index = "model_index.json"
        if not local:
            from huggingface_hub import hf_hub_download
        index = Path(model) / index if local else hf_hub_download(model, index)
        found = kind_of(index)
        if kind not in (None, found):
            raise ValueError(f"it is a {FAMILIES[found].name}, but --pipeline is {kind}. Leave that out.")
    return found


def device_of(name=None):
    """The device that is named, or a GPU if there is one, or the CPU. ValueError where torch cannot use it."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (AssertionError, RuntimeError) as error:  # the first where torch was built without it
        raise ValueError(f"--device is {str(name)!r}: {error}") from error


def load(model, kind=None, device=None, dtype=None):
    """A T-SAM pipeline from a folder or the Hub, on its device, and which of FAMILIES it is: `kind`, where given."""
    model, kind = str(model), family_of(model, kind)
    with quiet():
        import torch

        cls = getattr(importlib.import_module(__package__), FAMILIES[kind].pipeline)
    device = device_of(device)
    dtype = getattr(torch, dtype or ("float32" if device.type == "cpu" else "float16"))
    with loading(model):
        return _load(cls, model, FAMILIES[kind].denoiser, dtype).to(device), kind


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
    """A pipeline's `Settings`, or such a class's, from what is given, for a model that ships from TUNED where not, and
    else from the preset. ValueError for what is not this pipeline's."""
    cls = getattr(pipe, "settings", pipe)
    for name in given.keys() - {each.name for each in fields(cls)}:
        raise ValueError(f"--{name.replace('_', '-')} is not for {FAMILIES[kind].name}. Leave it out.")
    return cls(**(TUNED[tuned] if tuned else {}) | given)


def judged(pictures):
    """What is in pictures of the models that ship, in words, "2 blue rings, red cube" for one."""
    from collections import Counter

    from .shapes.judge import Judge

    found = [Counter(f"{colour} {solid}" for colour, solid, _ in s) for s in Judge.from_pretrained().solids(pictures)]
    several = [[f"{n} {name}s" if n > 1 else name for name, n in sorted(solids.items())] for solids in found]
    return [", ".join(solids) or "nothing" for solids in several]


def tables_of(settings, seen):
    """What `figures.figure` shows below the pictures."""
    tables = [("T: what the text encoder reads", seen["text_attention"])]
    if settings.objective in ("relation", "contrast"):
        tables.append(("R: which words are related", seen["relation"]))
    elif settings.objective == "attainable":
        from .tsam import attainable_target

        tables.append(("T as S can take it", attainable_target(seen["text_attention"])))
    return tables + list(zip(("S: stock", "S: T-SAM"), seen["similarity"]))


def remarks(seen, prompt, shipped, more):
    """Lines on what the model cannot read of a prompt. more: whether it can be told to read more."""
    tokens, cut = seen["uncut"], seen["uncut"][len(seen["tokens"]) :]
    if cut:
        remedy = f"; --max-sequence-length {len(tokens)} reads all" if more else ""
        read = f"the model reads {len(tokens) - len(cut)} of the prompt's {len(tokens)} tokens"
        yield f"{read}, without {' '.join(cut)!r}{remedy}"
    if shipped and (unknown := unknown_words(prompt)):
        knows = f"{len(COLOURS)} colours and {len(SOLIDS)} solids"
        yield f"the model knows {knows}, but not {', '.join(map(repr, unknown))}; --model takes another"


def save_picture(args, seeds, drawn, captions, settings, scale, when):
    """Write the command's PNG: of one seed what each word looks at, of several the pictures alone."""
    from . import figures

    chosen = {each.name: (getattr(settings, each.name), each.default) for each in fields(settings)}
    shown = {name: value for name, (value, default) in chosen.items() if value != default and name not in NOT_FLAGS}
    notes = [f"{name.replace('_', ' ')} {getattr(value, '__name__', value)}" for name, value in (shown | scale).items()]
    names = "Stock", "T-SAM, same seed"
    if len(seeds) > 1:
        rows = zip(names, zip(*captions), zip(*(pictures for pictures, *_ in drawn)))
        columns, footer = [f"seed {seed}" for seed in seeds], " · ".join([f"loss {when}", *notes])
        picture = figures.sheet(args.prompt, columns, [*rows], footer)
    else:
        pictures, _, _, seen = drawn[0]
        rows, notes = [*zip(names, captions[0], pictures, seen["maps"])], [f"seed {seeds[0]}", *notes]
        tables, footer = tables_of(settings, seen), " · ".join([f"maps and S {when}, one scale a word", *notes])
        picture = figures.figure(args.prompt, seen["tokens"], rows, tables, footer, seen.get("regions", ()))
    figures.save(picture, args.output)


def run(args):
    """Everything the command does; the lines it prints."""
    check(args)
    model = args.model or MODELS[args.pipeline or "sd"]
    kind = family_of(model, args.pipeline)
    shipped = Path(model).resolve() == MODELS[kind].resolve()
    tuned = "sink" if args.sink else kind if shipped else None
    settings = settings_of(SETTINGS[kind], kind, tuned, **given_of(args))
    settings.plan(args.steps)
    settings.chosen_after(args.steps)
    if args.region:
        from .tsam_layout import check_regions

        check_regions(settings.regions, 1)
    from .comparing import draw  # here and not above, because this takes its time

    pipe, _ = load(model, kind, args.device, args.dtype)
    if args.sink:
        from .shapes.sink import add_sink

        add_sink(pipe)
    scale = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    call = {"num_inference_steps": args.steps} | (ARGUMENTS[kind] if shipped else {}) | scale
    seeds, ranked = args.seed or [SEEDS[tuned or kind]], []
    with quiet():
        if args.best_of:
            pipe.set_progress_bar_config(leave=False)
            ranked = pipe.rank(args.prompt, range(seeds[0], seeds[0] + args.best_of), **call, **settings.given)
            seeds = ranked[0][:1]
        drawn = [draw(pipe, args.prompt, seed, settings, **call) for seed in seeds]
    when = f"at step {drawn[0][2]} of {args.steps}, after its updates"
    lines, captions = [args.output], []
    if ranked:
        listed = ", ".join(f"seed {seed} {loss:.3f}" for seed, loss in ranked)
        lines.append(f"loss of the starts after step {settings.chosen_after(args.steps)}, best first: {listed}")
    for seed, (pictures, losses, _, seen) in zip(seeds, drawn):
        of = f"seed {seed}: " if len(seeds) > 1 else ""
        captions.append([f"loss {loss:.3f}" for loss in losses])
        lines.append(f"{of}loss {when}: " + "stock {:.3f}, T-SAM {:.3f}".format(*losses))
        if shipped:
            solids = judged(pictures)
            captions[-1] = [f"{loss} · the judge sees: {found}" for loss, found in zip(captions[-1], solids)]
            lines.append(f"{of}the judge sees: " + "stock {}; T-SAM {}".format(*solids))
        for phrase, (before, after) in seen.get("region_shares", {}).items():
            lines.append(f"{of}attention of {phrase!r} inside its region: stock {before:.0%}, T-SAM {after:.0%}")
    save_picture(args, seeds, drawn, captions, settings, scale, when)
    return [*lines, *remarks(seen, args.prompt, shipped, kind == "sd")]


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
        parser.error(in_flags(error, args))


if __name__ == "__main__":
    main()

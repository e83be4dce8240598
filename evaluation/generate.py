"""Draws prompts by methods from the same latents, on one process or many. A seed gives each prompt its own latents.

    accelerate launch -m diffusers_tsam.evaluation generate --model ID --methods stock,tsam,conform --prompts objects \\
        --seeds 64 --output runs/sd15
"""

import functools
import importlib
import importlib.metadata
import inspect
import json
import re
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import torch
from tqdm import tqdm

from .. import FAMILIES
from ..cli import family_of, function_of, objective_of
from ..cli import load as load_pipeline
from ..shapes import ARGUMENTS, JOINT_MODEL, MODELS, SD3_TOKENS, TUNED
from ..shapes.sink import add_sink
from ..tsam_arguments import (
    JointSettings,
    PixArtAlphaSettings,
    StableDiffusionSettings,
    check_integer,
    check_number,
    kind_of_field,
)
from ..tsam_layout import check_regions
from . import prompts as prompt_sets
from .baselines import BASELINES, told
from .prompts import json_of
from .runs import Run, digest, locked, processes, save


OF_A_LOSS = ("sharpness",)
OF_THE_RUN = ("prompt", "generator", "num_images_per_prompt", "num_inference_steps", "guidance_scale")
OF_THE_RUN += ("prompt_embeds", "latents", "output_type", "return_dict", "regions", "timesteps", "sigmas")
OF_A_LINE = ("method", "prompt", "seed", "updates", "loss", "seconds")
STOCK = {"tsam_steps": 0}
KINDS = {
    each.name: kind_of_field(each)
    for settings in (StableDiffusionSettings, PixArtAlphaSettings, JointSettings)
    for each in fields(settings)
}
NUMBERS = {float: "a number", int: "an integer", bool: "1 or 0"}
REPLACED = {  # what a method's argument replaces: the other size of a step, or a peer's schedule
    "alpha": ["relative_step"],
    "relative_step": ["alpha"],
    "preset": ["tsam_steps", "refinement_steps", "refinement_iterations"],
}
LOADED = (".json", ".safetensors", ".bin", ".txt", ".model", ".py")  # files of a component's folder
PACKAGES = ("diffusers", "transformers", "torch")


def value_of(key, text):
    """Parse an argument's value: "none", a word, an integer, a number, or integers with "+"."""
    if not text:
        raise ValueError("There is no value.")
    if text == "none":
        return () if key == "refinement_steps" else None
    kind = KINDS.get(key, int if text.isdecimal() else float)  # stock's: `clip_skip` takes no float
    if kind in (int, float):
        return kind(text)
    return text if kind is str else tuple(map(int, text.split("+")))


def parse_method(text, kind="sd"):
    """A method's arguments of the pipeline, and its `Baseline` or None.

    text: "stock", "tsam" (the paper's settings), "tuned" (the shipped model's), one of BASELINES, or any of these with
    changed arguments: "tsam:alpha=20:objective=attainable", "conform:sharpness=none:refinement_steps=0+10". A colon
    after .py does not split: "tsam:objective=my.py:function".
    """
    name, *changes = re.split(r"(?<!\.py):", text)
    named = {"stock": STOCK, "tsam": {}, "tuned": TUNED[kind]}
    named |= {name: baseline.arguments for name, baseline in BASELINES.items()}
    if name not in named:
        raise ValueError(f"A method is {name!r}, but has to be one of {', '.join(named)}.")
    replaced = {other for change in changes for other in REPLACED.get(change.partition("=")[0], ())}
    arguments = {key: value for key, value in named[name].items() if key not in replaced}
    for change in changes:
        key, _, value = change.partition("=")
        try:
            arguments[key] = value_of(key, value)
        except ValueError as error:
            raise ValueError(
                f"A method is {text!r}, whose {change!r} is no argument and value such as alpha=20."
            ) from error
    return arguments, BASELINES.get(name)


objective = functools.cache(objective_of)  # so that a run's pictures share one, even if its file changes


def kind_of(model):
    """A model's kind in TUNED or FAMILIES, {argument of its calls: annotation}, and its `Settings` class. Loads no
    weights."""
    if model == "sd3":
        from .. import StableDiffusion3TSAMBlocks

        known = {each.name: each.type_hint for each in StableDiffusion3TSAMBlocks().get_workflow("text2image").inputs}
        return model, known, JointSettings
    family = family_of(SHIPPED.get(model, model))
    pipeline = getattr(importlib.import_module("..", __package__), FAMILIES[family].pipeline)
    known = {each.name: each.annotation for each in inspect.signature(pipeline.__call__).parameters.values()}
    return model if model in TUNED else family, known, pipeline.settings


def check_stocks(key, value, annotation):
    """TypeError for a value of stock's argument unless its annotation admits it. A method can give numbers only."""
    kinds = get_args(annotation) or (annotation,)
    number = next((kind for kind in NUMBERS if kind in kinds), None)
    if number is None:
        raise TypeError(f"`{key}` takes no number. Leave it out.")
    if not isinstance(value, (int, number)) and not (value is None and type(None) in kinds):
        raise TypeError(f"`{key}` is {value!r}, but has to be {NUMBERS[number]}.")


def check_methods(methods, known, settings, steps, regions):
    """Refuse arguments that neither the pipeline (`known`) nor the loss has, and values that `settings` refuses.
    regions: whether prompts have any."""
    for name, (arguments, baseline) in methods.items():
        loss = inspect.signature(baseline.loss).parameters if baseline else ()
        for key in arguments:
            if key in OF_THE_RUN:
                raise ValueError(f"The method {name!r} changes {key!r}, which all of a run's methods share.")
            if key not in loss if key in OF_A_LOSS else key not in known:
                raise ValueError(f"The method {name!r} has no argument {key!r}.")
        if baseline and "objective" in arguments:
            raise ValueError(f"The method {name!r} has an objective of its own. Leave `objective` out.")
        own = {each.name: arguments[each.name] for each in fields(settings) if each.name in arguments}
        try:
            for key in arguments.keys() - own.keys() - {*OF_A_LOSS}:
                check_stocks(key, arguments[key], known[key])
            if regions:
                own["regions"] = True
            if "objective" in own:
                own["objective"] = objective(own["objective"])
            settings(**own).plan(steps)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The method {name!r}: {error}") from error


def check_places(prompt):
    """Whether a `Prompt` has regions. ValueError for those that its pictures would be refused for."""
    try:
        checked = check_regions(prompt.regions or None, 1)
    except TypeError as error:
        raise ValueError(f"The prompt {prompt.text!r}: {error}") from error
    for phrase in checked[0] if checked else ():
        if phrase.lower() not in prompt.text.lower():
            raise ValueError(f"The prompt {prompt.text!r} has a region for {phrase!r}, which it does not have.")
    return checked is not None


def check_kept(kept, number):
    """Refuse what `keep` returned unless it is a JSON object for each picture without the names of a line's own."""
    try:
        right = len(kept) == number and not any(own.keys() & OF_A_LINE for own in kept) and json.dumps(kept)
    except (AttributeError, TypeError):
        right = False
    if not right:
        raise ValueError(
            f"`keep` returned {str(kept)[:80]} for {number} pictures. Return a dict for each, as JSON has them, without"
            f" the keys {', '.join(OF_A_LINE)}."
        )


def recorded(function):
    """What tells an objective, or `keep`, from others in a run's settings: a name, or "my.py:function" with a digest of
    its file."""
    if callable(function):
        return getattr(function, "__qualname__", type(function).__name__)
    file = str(function).rpartition(":")[0]
    return f"{function} {digest(Path(file).read_bytes())}" if file else function


def identity(model):
    """Identify a model's files: by a Hub repository's commit, or by names and sizes of a folder's loaded files, which
    are its index and those in its components' folders."""
    folder = Path(SHIPPED.get(model, model))
    if not folder.is_dir():
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "model_index.json")).parent.name
    index = folder / "model_index.json"
    components = [folder / name for name in json_of(index) if (folder / name).is_dir()]
    inside = [path for component in components for path in component.rglob("[!.]*") if path.suffix in LOADED]
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in [index, *inside])
    return digest(repr(files).encode())


class JointPipeline:
    """The shipped small SD3 as modular blocks, called like our pipelines."""

    def __init__(self, device, dtype, guidance_scale):
        from diffusers import ClassifierFreeGuidance

        from .. import StableDiffusion3TSAMBlocks

        blocks, self.dtype = StableDiffusion3TSAMBlocks().get_workflow("text2image"), dtype
        self.pipe = blocks.init_pipeline(str(JOINT_MODEL))
        self.pipe.load_components(dtype=dtype)
        self.pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
        self.pipe.to(device)
        self.scheduler = self.pipe.scheduler
        self.set_progress_bar_config = self.pipe.set_progress_bar_config

    def __call__(self, prompt, guidance_scale=None, **arguments):  # which the guider has
        usual = {"negative_prompt": "", "max_sequence_length": SD3_TOKENS}
        state = self.pipe(prompt=prompt, **usual | arguments)
        return SimpleNamespace(**{name: state.get(name) for name in ("images", "losses", "attentions")})


SHIPPED = {**MODELS, "sink": MODELS["sd"], "sd3": JOINT_MODEL}  # the shipped models' folders


def load(model, device, dtype=None, guidance_scale=None):
    """A pipeline, its kind in TUNED or FAMILIES, its calls' arguments. model: a folder, a Hub id, or one of SHIPPED."""
    if model == "sd3":
        dtype = getattr(torch, dtype or ("float32" if device.type == "cpu" else "float16"))
        scale = ARGUMENTS["sd"]["guidance_scale"] if guidance_scale is None else guidance_scale
        return JointPipeline(device, dtype, scale), model, {} if guidance_scale is None else {"guidance_scale": scale}
    pipe, kind = load_pipeline(str(SHIPPED.get(model, model)), device=device, dtype=dtype)
    if model == "sink":
        add_sink(pipe)
    given = dict(ARGUMENTS[kind]) if model in SHIPPED else {}
    if guidance_scale is not None:
        given["guidance_scale"] = guidance_scale
    return pipe, model if model in TUNED else kind, given


def plan(prompts, methods, seeds, batch):
    """All batches, [(method, (arguments, baseline), jobs)], with jobs (prompt, seed). Methods take turns, so that the
    first pictures can be compared. Batches depend only on this function's arguments, so that neither processes nor
    interruptions change a picture.

    Stock draws the prompts in which a baseline has nothing to bind.
    """
    jobs, rounds = [(prompt, seed) for seed in range(seeds) for prompt in range(len(prompts))], []
    for method, use in enumerate(methods.values()):
        binds = [use[1] is None or use[1].binds(prompt.things) for prompt in prompts]
        for bound, how in ((True, use), (False, (STOCK, None))):
            part = [job for job in jobs if binds[job[0]] == bound]
            rounds += [(k, (method, how, part[k : k + batch])) for k in range(0, len(part), batch)]
    return [batch for _, batch in sorted(rounds, key=lambda entry: entry[0])]


def draw(pipe, prompts, seeds, arguments, baseline=None, **given):
    """A call's output for `Prompt`s, each with its own seed's latents and its own regions."""
    arguments = dict(arguments)
    if any(prompt.regions for prompt in prompts):
        arguments["regions"] = [prompt.regions for prompt in prompts]
    if baseline is not None:
        own = {key: arguments.pop(key) for key in OF_A_LOSS if key in arguments}
        arguments["objective"] = told(baseline.loss, prompts, **own)
    elif "objective" in arguments:
        arguments["objective"] = objective(arguments["objective"])
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]  # the same noise on every device
    return pipe([prompt.text for prompt in prompts], generator=generators, **given | arguments)


def described(pipe, kind, model, methods, given, **others):
    """The settings of a run."""
    return others | {
        "model": model,
        "revision": identity(model),
        "kind": kind,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "scheduler": type(pipe.scheduler).__name__,
        "arguments": given,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "methods": {
            name: {key: recorded(value) if key == "objective" else value for key, value in arguments.items()}
            for name, (arguments, _) in methods.items()
        },
    }


def generate(
    model,
    methods,
    prompts,
    seeds,
    output,
    steps=50,
    guidance_scale=None,
    batch=8,
    dtype=None,
    parser=None,
    format="png",
    keep=None,
):
    """Draw a run's missing pictures; returns the `Run`.

    keep: a function of the pipeline, a batch's `Prompt`s and its output (with attentions) that returns a dict for each
    picture's line; or its file and name, "my.py:function".
    """
    for name, number in (("seeds", seeds), ("steps", steps), ("batch", batch)):
        check_integer(name, number, 1, "Leave it out, or pass more.")
    if guidance_scale is not None:
        check_number("guidance_scale", guidance_scale, "7.5 is usual.")
    keeper = function_of(keep, "keep") if isinstance(keep, str) else keep
    kind, known, settings = kind_of(model)
    methods = {name: parse_method(name, kind) for name in methods}
    wanted = prompt_sets.load(prompts, parser)
    regions = any([check_places(prompt) for prompt in wanted])  # a list, so that all are checked
    if regions and "regions" not in known:
        raise ValueError(f"The prompts {prompts!r} have regions, which {model!r} cannot hold. Choose others.")
    check_methods(methods, known, settings, steps, regions)
    state = processes()
    with state.main_process_first():
        pipe, _, given = load(model, state.device, dtype, guidance_scale)
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None  # its black pictures would count against a method
    given |= {"num_inference_steps": steps} | ({"output_attentions": True} if keep else {})
    if state.is_main_process:
        others = {"prompt_set": prompts, "parser": parser, "format": format, "seeds": seeds, "keep": recorded(keep)}
        settings = described(pipe, kind, model, methods, given, **others)
        with locked(Path(output) / "settings.json"):  # so that two commands' methods are both in it
            Run.create(output, settings, wanted)
    state.wait_for_everyone()
    run = Run(output)
    number = [run.methods.index(name) for name in methods]
    batches = [(number[method], how, jobs) for method, how, jobs in plan(wanted, methods, seeds, batch)]
    done = run.done("drawn") & run.present()
    batches = [(method, how, jobs) for method, how, jobs in batches if not all(done[method][job] for job in jobs)]
    state.wait_for_everyone()  # because all have to read what is done
    with (
        state.split_between_processes(batches) as own,
        run.writer("drawn", state.process_index) as append,
        tqdm(total=sum(len(jobs) for *_, jobs in own), unit="picture", disable=not state.is_main_process) as progress,
    ):
        for method, how, jobs in own:
            started = time.perf_counter()
            own_prompts = [wanted[prompt] for prompt, _ in jobs]
            output = draw(pipe, own_prompts, [seed for _, seed in jobs], *how, **given)
            seconds, rows = (time.perf_counter() - started) / len(jobs), []
            kept = keeper(pipe, own_prompts, output) if keep else [{}] * len(jobs)
            check_kept(kept, len(jobs))
            for job, image, loss, others in zip(jobs, output.images, np.asarray(output.losses, dtype=float), kept):
                if not done[method][job]:  # a batch may be half done
                    save(image, run.picture(method, *job))
                    row = {"method": method, "prompt": job[0], "seed": job[1], "updates": len(loss)}
                    ends = [round(float(x), 4) for x in (loss[[0, -1]] if len(loss) else loss)]
                    rows.append(row | {"loss": ends, "seconds": round(seconds, 3)} | others)
            append(rows)
            progress.update(len(jobs))
    state.wait_for_everyone()
    return run

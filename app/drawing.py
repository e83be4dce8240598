"""What the demo's page may ask for, and how it is drawn: models, limits, steps. No page in sight."""

import argparse
import functools
import inspect
import itertools
import queue
import re
import threading
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from huggingface_hub import hf_hub_download
from PIL import Image

import diffusers_tsam
from diffusers_tsam import FAMILIES, cli
from diffusers_tsam.attention_processors import shadowed
from diffusers_tsam.comparing import compare
from diffusers_tsam.shapes import ARGUMENTS, COLOURS, MODELS, SOLIDS, unknown_words
from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.shapes.scenes import phrase
from diffusers_tsam.shapes.sink import add_sink
from diffusers_tsam.tsam_arguments import Settings
from diffusers_tsam.tsam_layout import check_regions


SETTINGS = ("preset", "objective", "alpha", "relative_step", "gamma")  # of the fields of `Settings`
CHOICES = {each.name: each.metadata["choices"] for each in fields(Settings) if each.name in ("preset", "objective")}
# What a page sends, a link holds and a drawing needs.
FIELDS = ("model", "prompt", "seed", "steps", "seeds", "starts", *SETTINGS)
FIELDS += ("guidance_scale", "negative_prompt", "regions")
ONE_START = {"seeds": 1, "starts": 1}
WHOLE = ("seed", "steps", "seeds", "starts")
LIMITS = {"seed": (0, 2**32 - 1), "steps": (1, 100), "seeds": (1, 4), "starts": (1, 8), "guidance_scale": (1, 30)}
MAX_PROMPT = 300  # characters, of each text
MAX_SIDE = 1024  # pixels of a picture, whose size is always the model's own, one at a time
MAX_LOADED = 2  # models in memory
SHIPPED = {f"{FAMILIES[kind].name} (ships here)": kind for kind in MODELS}
SHIPPED["Stable Diffusion with an attention sink (ships here)"] = "sink"  # `sd` with other weights
STEPS = 25, 50  # of the models that ship, which were measured with 25, and of others
# How far, in multiples of their norm, the first step's updates may move the latents. Of 240 pictures of two solids by
# the three small models, 31 of 47 were right at 0.8 to 1.2, 7 of 15 up to 2, and of those beyond none of 35.
BREAKS = 2  # no relative step comes near
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class Models:
    """What pages may draw with: the models that ship, saved pipelines in `folders`, and, with `hub`, Hub ids.

    What a page calls a model is looked up in a list and never taken for a path. ValueError where it is not there.
    """

    def __init__(self, folders=(), hub=False, device=None):
        self.hub, self.device = hub, cli.device_of(device)
        self.roots = list(dict.fromkeys(Path(folder).expanduser().resolve() for folder in folders))
        names = [root.name for root in self.roots]
        for root in self.roots:
            if not root.is_dir():
                raise ValueError(f"--models is {str(root)!r}, which is no folder.")
            if names.count(root.name) > 1:
                raise ValueError(f"--models has two folders {root.name!r}, and pages see names only. Rename one.")
        self.loaded, self.lock = OrderedDict(), threading.Lock()

    def offered(self):
        """{name: folder}: each root, and the folders in it, that are saved pipelines and no links to elsewhere."""
        found = {name: Path(MODELS.get(kind, MODELS["sd"])) for name, kind in SHIPPED.items()}
        for root in self.roots:
            for index in sorted([*root.glob("model_index.json"), *root.glob("*/model_index.json")]):
                if index.resolve().is_relative_to(root):
                    found[index.parent.relative_to(root.parent).as_posix()] = index.parent.resolve()
        return found

    def source(self, name):
        """A folder or a Hub id."""
        name, offered = str(name), self.offered()
        if name in offered:
            return offered[name]
        if self.hub and HUB_ID.fullmatch(name) and not Path(name).exists():  # which would be loaded instead
            return name
        also = ", or type a Hub id such as owner/name" if self.hub else ""
        raise ValueError(f"There is no model {name[:100]!r} here. Choose one of the list{also}.")

    def defaults(self, name, **given):
        """`Settings` of a model, which need not be loaded, with those that are given; and stock's arguments."""
        source = self.source(name)
        try:
            local = isinstance(source, Path)
            kind = cli.kind_of(source / "model_index.json" if local else hf_hub_download(source, "model_index.json"))
        except (OSError, ValueError) as error:
            raise _unloadable(name, source, error) from error
        pipeline, usual = getattr(diffusers_tsam, FAMILIES[kind].pipeline), SHIPPED.get(name)
        scale = inspect.signature(pipeline.__call__).parameters["guidance_scale"].default
        arguments = {"guidance_scale": scale} | (ARGUMENTS[kind] if usual else {})
        return cli.settings_of(pipeline, kind, usual, **given), arguments

    def load(self, name):
        """A pipeline, and its VAE's `colours_of`."""
        source = self.source(name)
        with self.lock:
            if name not in self.loaded:
                try:
                    pipe, kind = cli.load(source, device=self.device)
                except ValueError as error:
                    raise _unloadable(name, source, error.__cause__ or error) from error
                size = getattr(pipe, FAMILIES[kind].denoiser).config.sample_size
                side = max(size if isinstance(size, (list, tuple)) else [size or 0]) * pipe.vae_scale_factor
                if side > MAX_SIDE:
                    raise ValueError(f"The model {name!r} draws {side} pixels a side, but {MAX_SIDE} is the limit.")
                if SHIPPED.get(name) == "sink":
                    add_sink(pipe)
                self.loaded[name] = pipe, colours_of(pipe.vae)
                while len(self.loaded) > MAX_LOADED:
                    self.loaded.popitem(last=False)
            self.loaded.move_to_end(name)
            return self.loaded[name]


def _unloadable(name, source, error):
    """Says why, and nothing of where this machine keeps its files."""
    return ValueError(f"The model {name!r} cannot be loaded: {error}".replace(str(source), name))


def fields_of(models, model, prompt, seed, **given):
    """The values of FIELDS with a model's defaults, or with the settings that are given."""
    settings, arguments = models.defaults(model, **given)
    values = {"model": model, "prompt": prompt, "seed": seed, "steps": STEPS[model not in SHIPPED]} | ONE_START
    values |= chosen(settings) | {"guidance_scale": arguments["guidance_scale"]}
    return values | {"negative_prompt": "", "regions": ""}


def chosen(settings):
    """The values of SETTINGS."""
    return {name: getattr(settings, name) for name in SETTINGS}


def wrong(models, values):
    """{field: what to do about it} of the values of FIELDS that cannot be drawn."""
    found = {}
    prompt = values["prompt"] if isinstance(values["prompt"], str) else ""
    if not prompt.strip():
        found["prompt"] = "Write what to draw: two words or more, such as “a red cube and a blue sphere”."
    elif len(prompt.split()) < 2:
        found["prompt"] = "T-SAM aligns words with each other. Write two or more."
    elif len(prompt) > MAX_PROMPT:
        found["prompt"] = f"The prompt has {len(prompt)} characters, but at most {MAX_PROMPT} are drawn. Shorten it."
    elif any("\ud800" <= sign <= "\udfff" for sign in prompt):
        found["prompt"] = "The prompt is not in UTF-8. Write it again."
    regions = None
    try:
        regions = regions_of(values["regions"])
    except (argparse.ArgumentTypeError, ValueError) as error:
        found["regions"] = str(error).replace("`", "").replace("it is", "A line is", 1)
    for name in ("negative_prompt", "regions"):
        text = values[name] or ""
        if not isinstance(text, str) or len(text) > MAX_PROMPT or any("\ud800" <= c <= "\udfff" for c in text):
            found[name] = f"Write at most {MAX_PROMPT} characters, in UTF-8, or nothing."
    try:
        models.source(values["model"])
    except ValueError as error:
        found["model"] = str(error)
    for name, (low, high) in LIMITS.items():
        value = values[name]
        within = isinstance(value, (int, float)) and low <= value <= high  # first: no float holds 400 digits
        if not within or (name in WHOLE and value != int(value)):
            kind = "a whole number" if name in WHOLE else "a number"
            found[name] = f"{name.replace('_', ' ').capitalize()} has to be {kind} from {low} to {high}."
    if (values["alpha"] is None) == (values["relative_step"] is None):
        found["alpha"] = "Give either alpha or a relative step, and leave the other one empty."
    if not found.keys() & WHOLE and 1 < values["starts"] < values["seeds"]:
        found["starts"] = f"Choose among {values['seeds']} starts or more for as many seeds, or 1 for no choice."
    if not found.keys() & WHOLE and values["seed"] + max(values["seeds"], values["starts"]) - 1 > LIMITS["seed"][1]:
        found["seed"] = f"The last seed is {LIMITS['seed'][1]}. Begin with a lower one, or draw fewer."
    for name in SETTINGS:
        try:
            Settings(**{name: values[name], "regions": regions})
        except (OverflowError, TypeError, ValueError) as error:
            found[name] = str(error).replace("`", "")
    for name, known in CHOICES.items():
        if values[name] not in known:
            found[name] = f"Choose one of {', '.join(known)}."
    return found


def regions_of(text):
    """`regions` of lines such as "a red cube=0,0,0.5,1", as the command takes them, or None. ValueError or argparse's
    for wrong ones."""
    regions = dict(cli.region(line) for line in str(text or "").splitlines() if line.strip())
    check_regions(regions, 1)
    return regions or None


class Step(NamedTuple):
    """What there is to see while a picture is drawn. name: "T-SAM" or "stock", which is drawn after it."""

    name: str
    seed: int
    step: int
    preview: Image.Image
    loss: float


class Starts(NamedTuple):
    """Starts to choose from, best first. settings: values of FIELDS. ranked: (seed, loss) of each. pictures: of the
    first of them, as `expected` gives them."""

    settings: dict
    ranked: list
    pictures: list


class Result(NamedTuple):
    """A drawing. settings: values of FIELDS that draw it alone. pair: of `comparing.Drawn`, stock first. seen: in
    words, what the judge of the small models sees, or None; said: what came of the prompt, or "". moved: how far the
    first step's updates moved the latents, in multiples of their norm.
    """

    settings: dict
    pair: tuple
    seen: list | None
    said: str
    moved: float


def draw(models, values, stopped):
    """Draw, and hand over what there is to see: `Starts` if there is a choice, again with each further picture; then
    for every seed its `Step`s and its `Result`. Less once `stopped()` is true.

    ValueError, TypeError and others that loading and drawing raise. Ends the drawing when it is closed.
    """
    pipe, colours = models.load(values["model"])
    given = {name: values[name] for name in SETTINGS} | {"regions": regions_of(values["regions"])}
    settings, arguments = models.defaults(values["model"], **given)
    arguments |= {"num_inference_steps": int(values["steps"]), "guidance_scale": values["guidance_scale"]}
    if values["negative_prompt"]:
        arguments["negative_prompt"] = values["negative_prompt"]
    prompt, number, first = values["prompt"], int(values["seeds"]), int(values["seed"])
    values = values | chosen(settings)
    events, moved, closed = queue.SimpleQueue(), [], threading.Event()
    align = pipe.align_latents

    def ended():
        return closed.is_set() or stopped()

    def on_step(seed, pipe, name, step, latents, loss):
        events.put(Step(name, seed, step, preview(latents[0], colours), loss))
        if ended():
            pipe._interrupt = True

    def measured(alignment, latents, *args, **kwargs):
        after = align(alignment, latents, *args, **kwargs)
        moved.append(((after - latents).float().norm() / latents.float().norm()).item())
        return after

    def choose():
        """The seeds of the best starts."""
        seeds = itertools.takewhile(lambda seed: not ended(), range(first, first + int(values["starts"])))
        ranked, pictures = pipe.rank(prompt, seeds, **arguments, **settings.given), []
        for seed, _ in ranked:
            if not ended():
                steps = settings.chosen_after(arguments["num_inference_steps"])
                pictures.append(expected(pipe, prompt, seed, steps, **arguments))
                events.put(Starts(values, ranked, pictures[:]))
        return [seed for seed, _ in ranked[:number]]

    def work():
        try:
            for seed in choose() if values["starts"] > 1 else range(first, first + number):
                if ended():
                    break
                moved.clear()
                with shadowed(pipe, "align_latents", measured):
                    pair = compare(pipe, prompt, seed, settings, functools.partial(on_step, seed), **arguments)
                if pair is None:
                    break
                seen, said = None, ""
                if values["model"] in SHIPPED:
                    pictures = [drawn.picture for drawn in pair]
                    seen, said = cli.judged(pictures), headline(prompt, Judge.from_pretrained().solids(pictures))
                events.put(Result(values | ONE_START | {"seed": seed}, pair, seen, said, moved[0]))
            events.put(None)
        except Exception as error:  # which is raised where the page waits
            events.put(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        closed.set()
        thread.join()


@torch.no_grad()
def expected(pipe, prompt, seed, steps, **arguments):
    """The clean picture that the stock call's prediction in step `steps` means, decoded; the call ends there. Whatever
    the scheduler, its `pred_original_sample` is computed by DDIM's, from what the model was given."""
    scheduler, seen = pipe.scheduler, []
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    ddim.set_timesteps(arguments["num_inference_steps"])
    step = scheduler.step

    @functools.wraps(step)
    def observed(prediction, t, sample, *args, **kwargs):
        seen.append(ddim.step(prediction, int(t), scheduler.scale_model_input(sample, t)).pred_original_sample)
        if len(seen) > (steps - 1) * scheduler.order:
            raise StopIteration
        return step(prediction, t, sample, *args, **kwargs)

    with suppress(StopIteration), shadowed(scheduler, "step", observed):
        pipe(prompt, generator=torch.Generator().manual_seed(seed), tsam_steps=0, output_type="latent", **arguments)
    latents = seen[-1].to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0])[0]


def headline(prompt, solids):
    """What stock and T-SAM made of a prompt, in words. solids: what `Judge.solids` returns for both. What the models do
    not know comes last; of a prompt without coloured solids there is nothing else to say."""
    words = re.findall(r"\w+", prompt.lower())
    asked = Counter(pair for pair in zip(words, words[1:]) if pair[0] in COLOURS and pair[1] in SOLIDS)
    stock, tsam = (came_of(asked, Counter((colour, solid) for colour, solid, _ in seen)) for seen in solids)
    said = f"Stock and T-SAM {stock}." if stock == tsam else f"Stock {stock}; T-SAM {tsam}."
    unknown = unknown_words(prompt)
    names = f"The model knows {len(COLOURS)} colours and {len(SOLIDS)} solids, but not {', '.join(unknown)}."
    return " ".join([said] * bool(asked) + [names] * bool(unknown))


def came_of(asked, seen):
    """As `headline`, of one picture: "forgot the blue sphere", "drew two blue stars, one unasked"."""
    numbers = ("no", "one", "two", "three", "four", "five")
    forgot = [f"the {' '.join(pair)}" for pair in asked if not seen[pair]]
    said = [f"forgot {' and '.join(forgot)}"] if forgot else []
    for pair, number in seen.items():
        if (more := number - asked[pair]) > 0:
            count = lambda n: numbers[n] if n < len(numbers) else str(n)  # noqa: E731
            name = phrase(*pair) if number == 1 else f"{count(number)} {' '.join(pair)}s"
            said.append(f"drew {name}, {count(more) + ' ' if asked[pair] else ''}unasked")
    whole = {1: "drew it", 2: "drew both"}.get(asked.total(), f"drew all {numbers[min(asked.total(), 5)]}")
    return " and ".join(said) or whole


@torch.no_grad()
def colours_of(vae, side=8, samples=32):
    """The linear map of latents, and 1, to colours from 0 to 1 that is nearest to what the VAE decodes of random
    blotches: (C + 1, 3)."""
    random = torch.randn(samples, vae.config.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    latents = F.interpolate(random, size=(side, side), mode="bilinear")
    decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype), return_dict=False)[0]
    pictures = F.adaptive_avg_pool2d(decoded.float().cpu() / 2 + 0.5, side)
    inputs, outputs = (x.movedim(1, -1).flatten(0, 2) for x in (latents, pictures))
    return torch.linalg.lstsq(F.pad(inputs, (0, 1), value=1.0), outputs).solution


def preview(latents, colours):
    """A rough picture of latents (C, h, w), a pixel each, which costs next to nothing."""
    pixels = F.pad(latents.float().cpu().movedim(0, -1), (0, 1), value=1.0) @ colours
    return Image.fromarray((255 * pixels.nan_to_num().clamp(0, 1)).byte().numpy())

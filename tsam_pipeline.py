"""How a stock pipeline is guided: its own denoising loop runs, and `GuidedLoop` answers what it asks for in each step.

Also how a call changes models and schedulers and restores them, and how our pipelines share and save components.
"""

import functools
import inspect
import json
import textwrap
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING, SUPPORTED_TASKS_MAPPINGS
from torch.autograd.graph import saved_tensors_hooks

from .attention_processors import (
    lock_of,
    locked,
    mean_maps,
    record_cross_attention,
    record_self_attention,
    run_to_last_map,
    shadowed,
)
from .tsam import LatentAlignment
from .tsam_arguments import OFF, check_text_self_attention
from .tsam_candidates import choose, generators_of, prompts_of, restore, scouted
from .tsam_layout import check_regions, layout_of


TESTED = "0.42"  # of diffusers


# ----------------------------------------------------------------------------------------------------------------------
# The loop


class StandIn:
    """Looks like `original`, except for the attributes in `own`. Calling it calls `call`."""

    def __init__(self, original, call=None, **own):
        vars(self).update(own, original=original, call=call)

    @property
    def __class__(self):  # for isinstance
        return type(self.original)

    def __getattr__(self, name):
        return getattr(self.original, name)

    def __setattr__(self, name, value):
        setattr(self.original, name, value)

    def __call__(self, *args, **kwargs):
        return self.call(*args, **kwargs)


class GuidedLoop:
    """Guides a stock denoising loop through its calls in each step: the scheduler scales the latents, the
    denoiser predicts, the scheduler steps.

    It moves the latents before the prediction, and the scheduler steps from there. Stock's call runs on a stand-in of
    the pipeline whose scheduler and denoiser are stand-ins, too. The pipeline itself stays as it is.

    given: stock's arguments by name. settings: `Settings`.
    losses: (images, updates) float32 on the CPU, after the call. steps: one per column, counted as in callbacks.
    """

    per_prompt = "num_images_per_prompt"

    def __init__(self, pipe, given, settings):
        self.pipe, self.given, self.settings = pipe, given, settings
        self.num_steps = steps_of_call(given)
        drawn = "strength" not in given or self.num_steps > 0  # a low one may leave no step: then stock draws
        self.plan = settings.plan(self.num_steps) if drawn else OFF
        if self.reads:
            pipe.layers_of(settings)  # refuses a wrong choice at once
        self.conditions = {}  # the denoiser's arguments beside stock's
        self.text, self.layout, self.alignment, self.bar = settings.text_self_attention, None, None, None
        self.encoding, self.encoded = None, False  # by another loop of this call; whether by this one
        self.updates, self.index = None, 0
        self.latents, self.moved = None, False  # this step's latents, and whether they were updated
        self.start = None  # what `prepare_latents` returns, and the generators' states after it
        self.interrupted = False  # during the choice of a start

    # Looked up anew, because a callback may give the pipeline others.
    @property
    def model(self):
        return getattr(self.pipe, self.pipe.denoiser)

    @property
    def scheduler(self):
        return self.pipe.scheduler

    @property
    def guided(self):
        return self.plan.tsam_steps > 0

    @property
    def reads(self):
        """Whether the call needs T."""
        return self.guided

    @property
    def needed(self):
        """Whether the call differs from stock's."""
        return self.guided or self.start is not None

    def run(self, **changes):
        """Make stock's call with the given arguments, but for `changes`."""
        stock = self.pipe.stock_call
        if not self.needed:
            return stock(self.pipe, **self.given | changes)
        with self.prepared():
            output = stock(StandIn(self.pipe, **self.parts()), **self.given | self.callback() | changes)
            self.check_updates()
        return output

    @contextmanager
    def prepared(self):
        """While the context is open, gradients pass through the models and not to their weights."""
        with frozen(self.model) if self.guided else nullcontext(nullcontext) as self.saving:
            yield

    def parts(self):
        """What stock's loop finds in place of the pipeline's own."""
        asked = [name for name in ("scale_model_input", "step") if hasattr(self.scheduler, name)]
        return {
            "scheduler": StandIn(self.scheduler, **{name: getattr(self, name) for name in asked}),
            self.pipe.denoiser: StandIn(self.model, self.predict),
            "encode_prompt": self.encode_prompt,
            "prepare_latents": self.prepare_latents,
            "progress_bar": self.progress_bar,
        }

    def callback(self):
        """Stock's argument that calls the given callback with the pipeline itself."""
        own = self.given.get("callback_on_step_end")
        return {} if own is None else {"callback_on_step_end": lambda pipe, *args: own(self.pipe, *args)}

    def progress_bar(self, *args, **kwargs):
        self.bar = self.pipe.progress_bar(*args, **kwargs)
        return self.bar

    def encode_prompt(self, *args, **kwargs):
        """Stock has checked its arguments and run no denoiser: check ours, and read T while stock encodes."""
        if self.encoded:
            return self.pipe.encode_prompt(*args, **kwargs)
        self.encoded = True
        if self.encoding is not None:
            encoded, self.text, self.layout, self.conditions = self.encoding
            return encoded
        if not self.reads:
            return self.encode(*args, **kwargs)
        prompt, count = self.given["prompt"], prompts_of(self.given)
        regions = check_regions(self.settings.regions, count)
        if regions is not None and not any(self.pipe.components.get(name) for name in ("tokenizer", "tokenizer_2")):
            raise ValueError("`regions` are found by their tokens, but this pipeline has no tokenizer. Give it one.")
        check_text_self_attention(self.text, prompt, count, self.num_tokens, self.pipe.window)
        if self.text is None:
            with record_self_attention(*self.pipe.text_encoders) as recordings:
                encoded = self.encode(*args, **kwargs)
            self.text = self.read(recordings)
        else:
            encoded = self.encode(*args, **kwargs)
        images, device = self.given[self.per_prompt], encoded[0].device
        self.layout = layout_of(regions, self.text, self.words_of, images, device)
        self.encoding = encoded, self.text, self.layout, self.conditions
        return encoded

    def encode(self, *args, **kwargs):
        return self.pipe.encode_prompt(*args, **kwargs)

    def prepare_latents(self, *args, **kwargs):
        if self.start is None:
            return self.pipe.prepare_latents(*args, **kwargs)
        prepared, states = self.start
        restore(self.generators, states)
        self.pipe._interrupt = self.interrupted  # stock sets it to False first
        return prepared

    def read(self, recordings):
        return self.pipe.read_text_self_attention(recordings)

    def words_of(self, phrase):
        return self.pipe.words_of(phrase)

    @property
    def generators(self):
        return generators_of(self.given, self.pipe._execution_device)

    @property
    def num_tokens(self):
        """The tokens of an encoded prompt, counted with padding."""
        embeds = self.given["prompt_embeds"]
        return self.given.get("max_sequence_length", self.pipe.window) if embeds is None else embeds.shape[1]

    def begin(self):
        """Plan the updates, now that the timesteps are known: some pipelines take fewer than the scheduler."""
        number = getattr(self.pipe, "_num_timesteps", len(self.scheduler.timesteps))
        self.updates = [0] * number
        if self.guided:
            images, device = self.given[self.per_prompt], self.latents.device
            self.alignment = LatentAlignment(self.text, self.settings, images, device, self.layout)
            if self.alignment.possible():
                self.updates = updates_per_timestep(self.scheduler, self.num_steps, *self.plan, number)

    def scale_model_input(self, sample, t):
        if self.latents is None:  # a step's first call is for the denoiser
            self.t, self.moved = t, False
            self.halves = 2 if self.pipe.do_classifier_free_guidance else 1
            self.latents = sample.chunk(self.halves)[-1]
        return self.scheduler.scale_model_input(sample, t)

    def predict(self, sample, *args, **kwargs):
        if self.latents is None:
            raise RuntimeError(
                f"The loop of {type(self.pipe).__name__} predicts before the scheduler scales its latents, so that"
                f" T-SAM cannot move them. It was tested with diffusers {TESTED}; pass `tsam_steps=0`."
            )
        if self.pipe.interrupt:  # because some stock loops go on
            return (torch.zeros_like(sample),)
        kwargs |= {name: value[-len(sample) :] for name, value in self.conditions.items()}
        return self.prediction(sample, *args, **kwargs)

    def prediction(self, sample, *args, **kwargs):
        """The denoiser's, from latents that are moved first in guided steps."""
        if self.updates is None:
            self.begin()
        if not self.updates[self.index]:
            return self.model(sample, *args, **kwargs)
        beside = sample[:, self.latents.shape[1] :]  # an inpainting model's mask and picture
        self.latents = self.move(beside, args, kwargs)
        self.moved = True
        sample = scaled(self.scheduler, torch.cat([self.latents] * self.halves), self.t)
        return self.network(sample, beside, *args, **kwargs)

    def network(self, sample, beside, *args, **kwargs):
        """Predict from moved latents, of both halves or the conditional one, and from what is `beside` them."""
        if beside.shape[1]:
            sample = torch.cat([sample, beside], 1)
        return self.model(sample, *args, **kwargs)

    def move(self, beside, args, kwargs):
        """This step's latents after its updates. args, kwargs: the denoiser's. Eq. (15)."""
        layers = self.pipe.layers_of(self.settings)  # anew, because a callback may have changed the denoiser
        latents = self.pipe.align_latents(
            self.alignment,
            self.latents,
            self.t,
            (beside, *args),
            kwargs,
            layers,
            self.updates[self.index],
            self.saving,
            self.network,
        )
        if hasattr(self.bar, "set_postfix") and not getattr(self.bar, "disable", False):
            self.bar.set_postfix(loss=f"{self.alignment.losses[-1].mean().item():.3f}", refresh=False)
        return latents

    def step(self, prediction, t, sample, *args, **kwargs):
        if self.pipe.interrupt:
            return sample, sample
        sample, self.latents = self.latents if self.moved else sample, None
        self.index += 1
        with uncorrected(self.scheduler, self.alignment if self.moved else None):
            return self.stepped(prediction, t, sample, *args, **kwargs)

    def stepped(self, *args, **kwargs):
        return self.scheduler.step(*args, **kwargs)

    @property
    def steps(self):
        made = 0 if self.alignment is None else len(self.alignment.losses)
        return steps_of(self.updates or [])[:made]

    def losses(self, images):
        return torch.empty(images, 0) if self.alignment is None else self.alignment.losses_per_image()

    @property
    def attentions(self):
        """With `output_attentions`, a dict per image: `LatentAlignment.attentions`."""
        if self.alignment is None or not self.settings.output_attentions:
            return None
        return self.alignment.attentions(self.steps)

    def check_updates(self):
        """Raise if stock's loop made fewer updates than planned."""
        planned = None if self.updates is None else sum(self.updates)
        if self.guided and not self.pipe.interrupt and planned != len(self.steps):
            raise RuntimeError(
                f"Of {'all' if planned is None else planned} updates {len(self.steps)} were made, because the loop of"
                f" {type(self.pipe).__name__} is not that of diffusers {TESTED}, with which T-SAM was tested. Pass"
                " `tsam_steps=0`."
            )


def steps_of_call(given):
    """How many denoising steps a call takes: in image to image, those that `strength` leaves."""
    custom = next((given[name] for name in ("timesteps", "sigmas") if given.get(name) is not None), None)
    steps = given["num_inference_steps"] if custom is None else len(custom)
    return min(int(steps * given["strength"]), steps) if "strength" in given else steps


def updates_per_timestep(
    scheduler, num_inference_steps, tsam_steps, refinement_steps, refinement_iterations, number=None
):
    """The number of updates before each entry of the timesteps. The loop takes `number` entries, or all.

    A denoising step may take several entries: second-order schedulers evaluate the model twice, PNDM four times in its
    Runge-Kutta steps or, without these, twice in its first. Only a step's first evaluation is guided, because later
    ones start again from the sample that the scheduler kept.
    """
    number, runge_kutta = number or len(scheduler.timesteps), getattr(scheduler, "prk_timesteps", None)
    if runge_kutta is not None and len(runge_kutta) and number == len(scheduler.timesteps):
        first = len(runge_kutta)
        steps = [i // 4 if i < first else first // 4 + i - first for i in range(number)]
    else:
        warmup = max(number - num_inference_steps * scheduler.order, 0)
        steps = [max(i - warmup, 0) // scheduler.order for i in range(number)]
    return [
        0
        if step >= tsam_steps or (i > 0 and step == steps[i - 1])
        else 1 + refinement_iterations * (step in refinement_steps)
        for i, step in enumerate(steps)
    ]


def steps_of(updates):
    """The step of every update. updates: how many precede each entry of the timesteps."""
    return [step for step, number in enumerate(updates) for _ in range(number)]


def input_scale(scheduler, t):
    """c, the scheduler's factor on the model's input at timestep t; 1 if it does not scale."""
    return scaled(scheduler, torch.ones(()), t)


def scaled(scheduler, sample, t):
    return scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample


def conditional_rows(conditions, batch):
    """A denoiser's arguments for the conditional half alone: the last `batch` rows of every tensor.

    Works with and without classifier-free guidance, in nested dicts, lists and tuples. Leaves cross_attention_kwargs
    as they are.
    """
    if torch.is_tensor(conditions):
        return conditions[-batch:] if conditions.dim() else conditions
    if isinstance(conditions, dict):
        return {
            name: value if name == "cross_attention_kwargs" else conditional_rows(value, batch)
            for name, value in conditions.items()
        }
    if isinstance(conditions, (list, tuple)):
        return type(conditions)(conditional_rows(value, batch) for value in conditions)
    return conditions


# ----------------------------------------------------------------------------------------------------------------------
# What a call does to models and schedulers, and puts back


@contextmanager
def frozen(model):
    """Turn off `requires_grad` of all parameters of `model` while the context is open. Yields a context for forward
    passes: their backward pass finds every weight as the forward pass used it.

    Under gradient checkpointing the flags stay, because its recomputation copies only parameters with the flag; others
    it reads as offloading and layerwise casting have left them when the gradient is taken.
    """
    parameters = dict(model.named_parameters())
    if any(parameter.is_inference() for parameter in parameters.values()):
        raise RuntimeError(
            f"The weights of {type(model).__name__} were made inside `torch.inference_mode()`, so that no gradient"
            " passes through them. Load the pipeline and call `.to(...)` outside of it, or pass `tsam_steps=0`."
        )
    if getattr(model, "is_cache_enabled", False):
        raise RuntimeError(
            f"{type(model).__name__} caches between its steps, and would take a guided pass for one. Call its"
            " `disable_cache()`, or pass `tsam_steps=0`."
        )
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    # Group offloading and layerwise casting replace a weight's data as soon as its layer has run.
    exchanging = any(hasattr(module, "_diffusers_hook") for module in model.modules())
    try:
        if not getattr(model, "is_gradient_checkpointing", False):
            for parameter in parameters.values():
                parameter.requires_grad_(False)
        yield functools.partial(saved_tensors_hooks, _keep, lambda tensor: tensor) if exchanging else nullcontext
    finally:
        for name, parameter in model.named_parameters():  # by name: offloading replaces parameters
            if name in flags:
                parameter.requires_grad_(flags[name])


def _keep(tensor):
    """Let autograd save the data, not the parameter."""
    tensor = tensor.detach()
    if tensor.is_cuda:  # the stream that loaded it must not reuse it while the backward pass reads it
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


@contextmanager
def uncorrected(scheduler, alignment):
    """While the context is open, the scheduler corrects no image that `alignment`, or None, has moved.

    The correctors of UniPC and SA-Solver start from the previous sample, which would undo the move.
    """
    names = ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update")
    name = next((name for name in names if hasattr(scheduler, name)), None)
    if name is None or alignment is None:
        yield
        return
    correct, moved = getattr(scheduler, name), alignment.moved

    def correct_unmoved(*args, this_sample, **kwargs):
        corrected = correct(*args, this_sample=this_sample, **kwargs)
        return this_sample.where(moved.reshape(-1, *[1] * (this_sample.dim() - 1)), corrected)

    with shadowed(scheduler, name, correct_unmoved):
        yield


# ----------------------------------------------------------------------------------------------------------------------
# The pipelines


def call_of(stock, settings_class, deprecated=("callback", "callback_steps")):
    """A pipeline's `__call__`: the stock one's flat signature, a callback if that has none, then the fields of
    `settings_class`.

    deprecated: what stock takes by **kwargs. TypeError for other names, because stock would swallow them.
    """
    theirs = inspect.signature(stock.__call__).parameters
    observers = {} if "callback_on_step_end" in theirs else OBSERVERS
    named = [p for p in theirs.values() if p.kind is not p.VAR_KEYWORD]
    ours = [inspect.Parameter(name, named[-1].kind, default=default) for name, default in observers.items()]
    ours += [named[-1].replace(name=f.name, default=f.default, annotation=f.type) for f in fields(settings_class)]
    signature = inspect.Signature([*named, *ours, *(p for p in theirs.values() if p not in named)])

    def bind(*args, **kwargs):
        """Stock's arguments and the callback by name, defaults included, and the settings."""
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        others = given.pop("kwargs", {})
        unknown = [name for name in others if name not in deprecated]
        if unknown:
            raise TypeError(f"`__call__` got unexpected arguments {', '.join(map(repr, unknown))}.")
        given.pop("self")
        settings = settings_class(**{each.name: given.pop(each.name) for each in fields(settings_class)})
        if isinstance(given["callback_on_step_end"], (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = given["callback_on_step_end"].tensor_inputs
        return given | others, settings

    # Leave inference mode, because autograd cannot use tensors made in it; callers get the same results.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        return self.guided_call(*bind(self, *args, **kwargs))

    lines = [OBSERVERS_HELP] * bool(observers) + settings_class.documentation()
    lines = (textwrap.fill(line, 112, subsequent_indent=" " * 4) for line in lines)
    __call__.__doc__ = CALL_HELP.format(stock.__name__, ours[0].name, textwrap.indent("\n".join(lines), " " * 4))
    __call__.bind, __call__.__signature__ = bind, signature
    return __call__


OBSERVERS = {"callback_on_step_end": None, "callback_on_step_end_tensor_inputs": ["latents"]}
OBSERVERS_HELP = (
    "callback_on_step_end (`Callable`, *optional*): Called after every denoising step as `callback(self, step,"
    " timestep, {'latents': latents})`; the `latents` it returns replace the step's. It may set `self._interrupt`. The"
    " stock call has no such callback. `callback_on_step_end_tensor_inputs` may be [] or ['latents']."
)
CALL_HELP = """Generate like `{0}.__call__`; the arguments before `{1}` are stock's.

Args:
{2}

Returns:
    The stock output with the fields of `TSAMOutput` behind its own, or with `return_dict=False` a tuple of them.

Raises:
    ValueError, TypeError: a wrong argument, before the denoiser runs.
"""


def alone(method):
    """Make a pipeline's method that tokenizes wait for other threads' with the same text encoder: a tokenizer sets its
    padding and truncation before each call, so that calls at once would get each other's."""

    @functools.wraps(method)
    def waiting(self, *args, **kwargs):
        with locked(*self.text_encoders):
            return method(self, *args, **kwargs)

    waiting.alone = True
    return waiting


@dataclass
class TSAMOutput:
    """What T-SAM saw, behind the fields of a stock output.

    losses: (images, updates) float32, each taken before its update; no columns if nothing was guided. steps: each
    column's denoising step, counted as in callbacks. attentions: with `output_attentions`, a dict per image, see
    `LatentAlignment.attentions`. candidate_losses (images, candidates), chosen (images,): with more than one candidate.
    """

    losses: torch.Tensor | None = None
    steps: list[int] | None = None
    attentions: list[dict] | None = None
    candidate_losses: torch.Tensor | None = None
    chosen: torch.Tensor | None = None


class TSAMPipelineMixin:
    """What our pipelines add to stock: the guided call, and how components are shared and saved.

    A subclass names its `denoiser`, `loop` (a `GuidedLoop`), `settings` and `output`, and has `layers_of(settings)`,
    `window` (how many tokens its text encoder takes at once, or None), `read_text_self_attention` and `words_of`.
    """

    loop = GuidedLoop

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in ("encode_prompt", "words_of", "windows_of"):
            method = getattr(cls, name, None)
            if method is not None and not hasattr(method, "alone"):
                setattr(cls, name, alone(method))

    @property
    def text_encoders(self):
        """The encoders that T averages over."""
        return [self.text_encoder]

    @property
    def stock_call(self):
        """Stock's call, as a function of a pipeline or of its stand-in."""
        return super().__call__.__func__

    def align_latents(
        self, alignment, latents, t, args, kwargs, layers, iterations=1, saving=nullcontext, network=None
    ):
        """Move latents (B, C, h, w), or (B, C, F, h, w) of a video, `iterations` times before the noise prediction at
        timestep `t`. Eq. (15).

        args, kwargs: the denoiser's arguments after the latents, for both halves of classifier-free guidance or the
        conditional one alone. layers: read their maps. saving: what `frozen` yields. network: predicts in place of
        the denoiser.
        """
        network = getattr(self, self.denoiser) if network is None else network
        scale = input_scale(self.scheduler, t)
        args, kwargs = conditional_rows((args, kwargs), len(latents))
        kwargs.pop("return_dict", None)
        with saving(), record_cross_attention(layers, alignment.num_tokens, stop=True) as maps:

            def maps_at(model_input):
                run_to_last_map(network, model_input, *args, **kwargs)
                return mean_maps(maps, *latents.shape[-2:], len(layers), latents.shape[2:-2])

            return alignment.update(latents, scale, maps_at, iterations)

    def guided_call(self, given, settings):
        """Guide stock's call. Calls that share a denoiser wait for each other, because drawing changes the pipeline's
        state and guidance the model's: two threads would spoil each other's."""
        model = getattr(self, self.denoiser)
        if model is None:
            raise ValueError(f"This pipeline was made with `{self.denoiser}=None` and cannot draw. Give it one.")
        with lock_of(model):
            loop, losses, chosen = self.loop(self, given, settings), None, None
            if settings.candidates > 1 and loop.num_steps > 0:
                images = prompts_of(given) * given[loop.per_prompt]
                loop.encoding, loop.start, losses, chosen = choose(self, given, settings, images)
                loop.interrupted = self.interrupt
            output = loop.run(return_dict=False)
        fields = (*output, loop.losses(len(output[0])), loop.steps, loop.attentions, losses, chosen)
        return self.output(*fields) if given["return_dict"] else fields

    @torch.inference_mode(False)
    @torch.no_grad()
    def rank(self, prompt, seeds, **arguments):
        """Rank seeds by how well their starts agree with a prompt: [(seed, loss)], best first. Draws no picture; those
        before an interruption are ranked.

        `pipe(prompt, generator=torch.Generator().manual_seed(seed))` draws from such a start. arguments: the call's,
        including `candidate_steps`. Compare losses between seeds of one prompt, not between models.
        """
        losses, encoding = [], None
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            given, settings = type(self).__call__.bind(self, prompt, generator=generator, **arguments)
            with lock_of(getattr(self, self.denoiser)):
                loop = scouted(self, given, settings, [given.get("latents")], encoding=encoding)
            if loop.losses is None:  # interrupted
                break
            encoding = loop.encoding
            losses.append((seed, loop.losses.mean().item()))
        self.maybe_free_model_hooks()  # as stock's call does in the end
        return sorted(losses, key=lambda ranked: (ranked[1] != ranked[1], ranked[1]))  # non-finite losses last

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """The stock method, except that it shares components unchanged and casts only to a given dtype.

        ValueError for a pipeline that another class serves, or that would lose a part.
        """
        refuse(cls, type(pipeline).__name__)
        own, optional = map(set, cls._get_signature_keys(cls))
        has = pipeline.components.keys() | kwargs.keys()
        lost = [name for name in ("controlnet", "adapter") if name in has and name not in own]
        if lost:
            raise ValueError(
                f"{type(pipeline).__name__} has a `{lost[0]}`, for which {cls.__name__} has no place, so that it would"
                " draw without. `diffusers_tsam.StableDiffusionControlNetTSAMPipeline` has one for Stable Diffusion's"
                f" ControlNets; else take the other components by `{cls.__name__}(**components)`."
            )
        missing = sorted(own - {"self"} - has - set(cls._optional_components) - optional)
        if missing:
            raise ValueError(
                f"{type(pipeline).__name__} has no {', '.join(missing)}, which {cls.__name__} needs. Which class serves"
                " which model: docs/compatibility.md."
            )
        if {"dtype", "torch_dtype", "custom_pipeline"} & kwargs.keys():
            return super().from_pipe(pipeline, **kwargs)
        sharing = type(cls.__name__, (cls,), {"to": lambda self, *args, **kwargs: self})  # stock always casts
        shared = super(TSAMPipelineMixin, sharing).from_pipe(pipeline, **kwargs)
        shared.__class__ = cls
        return shared

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """The stock method; this class also loads a folder that names code beside its weights."""
        config = super()._dict_from_json_file(json_file)
        refuse(cls, config.get("_class_name"))
        return config | {"_class_name": cls.__name__} if isinstance(config.get("_class_name"), list) else config

    def to_json_string(self):
        """The stock method, but it names the stock class, so that every class loads the saved folder."""
        stock = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("diffusers."))
        config = json.loads(super().to_json_string()) | {"_class_name": stock.__name__}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


SERVED = {  # start of a pipeline's class name: our class
    "StableDiffusionXL": "StableDiffusionXLTSAMPipeline",
    "StableDiffusion3": "StableDiffusion3TSAMBlocks",
    "Flux": "FluxTSAMBlocks",
}


def refuse(cls, name):
    """ValueError if another of our classes serves the pipeline class `name`."""
    start = next((start for start in SERVED if isinstance(name, str) and name.startswith(start)), None)
    if start and not cls.__name__.startswith(start):
        raise ValueError(
            f"This is a {name}, not for {cls.__name__}: `diffusers_tsam.{SERVED[start]}` is for such models"
            " (docs/compatibility.md)."
        )


def register(cls, stock):
    """Let `from_pipe` of diffusers' AutoPipeline classes treat `cls` as it treats `stock`, but for PAG and ControlNet,
    whose classes it finds by names."""
    name = next((name for name, other in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.items() if other is stock), None)
    for mapping in SUPPORTED_TASKS_MAPPINGS:
        if name in mapping:
            mapping[f"{name}-tsam"] = cls if mapping is AUTO_TEXT2IMAGE_PIPELINES_MAPPING else mapping[name]

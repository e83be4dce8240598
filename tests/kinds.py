"""The pipelines that the same tests run on: where they differ, and how a test calls either."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, ModularPipelineBlocks

import diffusers_tsam
import tiny
from diffusers_tsam import FAMILIES, MODULAR, VARIANTS, LatentAlignment
from diffusers_tsam.tsam_arguments import Settings


PROMPT = "a black car and a white clock"
SHORT = "a red cube"
INPUTS = "callback_on_step_end_tensor_inputs"
OF_T = ("l1", "cosine", "attainable")  # objectives that compare S with T; the others are in test_contrast.py
SCHEDULERS = sorted({DDIMScheduler, *DDIMScheduler().compatibles}, key=lambda scheduler: scheduler.__name__)
SET_BY_CALLS = (
    "guidance_scale guidance_rescale clip_skip cross_attention_kwargs interrupt num_timesteps lora_scale denoising_end"
    " guidance_scale_2 attention_kwargs current_timestep"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    name: str  # in FAMILIES
    build: Callable  # new tiny components
    alpha: float  # that the tiny model's loss falls quickly with
    call: dict  # arguments of every call

    @functools.cached_property
    def components(self):
        """The tiny model that all tests share."""
        with torch.random.fork_rng():
            return self.build()

    family = property(lambda self: (FAMILIES | VARIANTS)[self.name])
    stock = property(lambda self: getattr(diffusers, self.family.stock))
    pipeline = property(lambda self: self.stock)  # whose instances are of this kind
    tsam = property(lambda self: getattr(diffusers_tsam, self.family.pipeline))
    file = property(lambda self: f"{self.family.module}.py")
    denoiser = property(lambda self: self.family.denoiser)
    first = property(lambda self: int(self.components["tokenizer"].bos_token_id is not None))  # token of the prompt's

    @property
    def grid(self):
        """Of maps."""
        return (3, 4, 6) if self.name == "wan" else (8, 8)

    @property
    def fields(self):
        """Of the output."""
        return [field.name for field in dataclasses.fields(self.tsam.output)]

    @property
    def extra(self):
        """The arguments that stock does not have."""
        ours, theirs = (inspect.signature(cls.__call__).parameters for cls in (self.tsam, self.stock))
        return set(ours) - set(theirs)


def named(*kinds):
    return {kind.name: kind for kind in kinds}


SIZE = {"height": 32, "width": 32}
RAW = {"use_resolution_binning": False, "clean_caption": False, **SIZE}
SHALLOW = RAW | {"attention_layers": (1, 2)}  # of 4 blocks, which take a fifth of the time of the default's 20
shallow_pixart = functools.partial(tiny.tiny_pixart_components, blocks=4)
KINDS = named(Kind("sd", tiny.tiny_components, 20.0, SIZE), Kind("pixart", shallow_pixart, 50.0, SHALLOW))
assert KINDS.keys() == FAMILIES.keys()
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MASK = torch.zeros(1, 1, 32, 32).index_fill(3, torch.arange(16), 1.0)  # the left half is filled
# Latents, because stock draws those of a masked image from the first of several generators alone.
FILLED = {"image": IMAGE, "mask_image": MASK, "masked_image_latents": IMAGE[:, :, ::2, ::2].repeat(1, 2, 1, 1)[:, :4]}
FURTHER = named(
    Kind("sd_img2img", tiny.tiny_components, 20.0, {"image": IMAGE, "strength": 1.0}),
    Kind("sd_inpaint", functools.partial(tiny.tiny_components, in_channels=9), 20.0, SIZE | FILLED),
    Kind("sd_controlnet", tiny.tiny_controlnet_components, 20.0, {"image": IMAGE}),
    Kind("sdxl", tiny.tiny_sdxl_components, 10.0, {"height": 64, "width": 64}),
    Kind("pixart_sigma", shallow_pixart, 50.0, SHALLOW),
    Kind("wan", tiny.tiny_wan_components, 50.0, {"height": 64, "width": 96, "num_frames": 9}),
)
assert FURTHER.keys() == VARIANTS.keys()
PIPELINES = KINDS | {f"{name}-pipeline" if name == "sdxl" else name: kind for name, kind in FURTHER.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks(Kind):
    """A family of modular blocks: its `stock` and `tsam` are classes of blocks."""

    classic: str  # the classic pipeline of its components
    denoiser: str = "transformer"

    stock = property(lambda self: getattr(diffusers.modular_pipelines, f"{self.prefix}AutoBlocks"))
    pipeline = property(lambda self: getattr(diffusers, f"{self.prefix}ModularPipeline"))
    tsam = property(lambda self: getattr(diffusers_tsam, MODULAR[self.name].blocks))
    prefix = property(lambda self: self.classic.removesuffix("Pipeline"))
    settings = property(lambda self: self.tsam.loop.settings)


SMALL = SIZE | {"max_sequence_length": 16}
SDXL = Blocks("sdxl", tiny.tiny_sdxl_components, 10.0, {"height": 64, "width": 64}, "StableDiffusionXLPipeline", "unet")
SD3 = Blocks("sd3", tiny.tiny_sd3_components, 30.0, SMALL | {"negative_prompt": ""}, "StableDiffusion3Pipeline")
FLUX = Blocks("flux", tiny.tiny_flux_components, 100.0, SMALL, "FluxPipeline")
IN_PIXELS = {"height": 64, "width": 64, "max_sequence_length": 64, "output_type": "pt"}  # Anima ends with no latents
ANIMA = Blocks("anima", tiny.tiny_anima_components, 50.0, IN_PIXELS, "AnimaPipeline")  # which does not exist
BLOCKS = named(SDXL, SD3, FLUX, ANIMA)
assert BLOCKS.keys() == MODULAR.keys()
ALL = PIPELINES | BLOCKS
every = pytest.mark.parametrize("kind", ALL, indirect=True)  # for a law that all keep
every_pipeline = pytest.mark.parametrize("kind", PIPELINES, indirect=True)


def make(cls, components, workflow="text2image"):
    """A quiet pipeline with its own scheduler; of blocks, of their `workflow`."""
    scheduler = type(components["scheduler"]).from_config(components["scheduler"].config)
    components = {**components, "scheduler": scheduler}
    if issubclass(cls, ModularPipelineBlocks):
        pipe = cls().get_workflow(workflow).init_pipeline()
        pipe.update_components(**components)
    else:
        optional = {"requires_safety_checker": False} if "safety_checker" in components else {}
        pipe = cls(**components, **optional)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kind_of(pipe):
    return next(kind for kind in ALL.values() if isinstance(pipe, kind.pipeline))


def denoiser_of(pipe):
    return getattr(pipe, kind_of(pipe).denoiser)


def layers_of(pipe):
    """The layers whose attention is read."""
    kind = kind_of(pipe)
    if isinstance(kind, Blocks):
        return kind.tsam.loop.layers(None, denoiser_of(pipe), kind.settings())
    return pipe.layers_of(pipe.settings(**{name: value for name, value in kind.call.items() if name in kind.extra}))


def models_of(pipe):
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    denoiser = models.pop(kind_of(pipe).denoiser)
    return [denoiser, *(model for name, model in models.items() if name not in ("safety_checker", "image_encoder"))]


def run(pipe, prompt=PROMPT, seed=0, **kwargs):
    """The output of a short call that ends with latents. Stock is not told what is T-SAM's."""
    kind = kind_of(pipe)
    kwargs = {"num_inference_steps": 4, "output_type": "latent", "refinement_iterations": 2, **kind.call, **kwargs}
    if isinstance(kind, Blocks):
        return run_blocks(kind, pipe, prompt, seed, kwargs)
    if not isinstance(pipe, kind.tsam):
        kwargs = {name: value for name, value in kwargs.items() if name not in kind.extra}
    if "generator" not in kwargs and "latents" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    if kind.name != "wan":
        return pipe(prompt, **kwargs)
    output = pipe(prompt, num_videos_per_prompt=kwargs.pop("num_images_per_prompt", 1), **kwargs)
    return SimpleNamespace(**vars(output), images=output.frames)


def run_blocks(kind, pipe, prompt, seed, kwargs):
    if not isinstance(pipe.blocks, kind.tsam):
        kwargs = {name: value for name, value in kwargs.items() if name in pipe.blocks.input_names}
    kwargs |= {} if prompt is None else {"prompt": prompt}
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    values = pipe(**kwargs).values
    return SimpleNamespace(**values | {"images": values["latents"]})


def generators(number):
    return [torch.Generator().manual_seed(seed) for seed in range(number)]


def use(scheduler, *pipes):
    """Let every pipeline have a scheduler of this class."""
    if getattr(scheduler, "_missing", False) or "dummy" in scheduler.__module__:
        pytest.skip(f"{scheduler.__name__} needs a package that is not installed")
    # DPMSolverSDEScheduler draws its own noise, not the generator's
    kwargs = {"noise_sampler_seed": 0} if scheduler.__name__ == "DPMSolverSDEScheduler" else {}
    for pipe in pipes:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **kwargs)


@torch.no_grad()  # T5 rounds otherwise where it records gradients
def embeddings(pipe, prompt):
    """The arguments that stand for a prompt, in stock."""
    if kind_of(pipe).name == "sd":
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(prompt, "cpu", 1, True)))
    names = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
    return {**dict(zip(names, pipe.encode_prompt(prompt, device="cpu"))), "negative_prompt": None}


def conditions_of(pipe, prompt):
    """What the denoiser is called with for a prompt, beside latents and timestep, both halves of guidance."""
    given = embeddings(pipe, prompt)
    names = {"encoder_hidden_states": "prompt_embeds", "encoder_attention_mask": "prompt_attention_mask"}
    both = {name: (given[f"negative_{own}"], given[own]) for name, own in names.items() if own in given}
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if len(both) > 1 else {}
    return {name: torch.cat(halves) for name, halves in both.items()} | sizes


def alignment_of(text, alpha, gamma, objective="l1", keep_maps=False, region_weight=10.0, relative_step=None, **others):
    """A `LatentAlignment` with these settings."""
    given = {"alpha": alpha} if relative_step is None else {"relative_step": relative_step}
    given |= {"regions": others["layout"].regions} if objective == "layout" else {}
    given |= {"gamma": gamma, "objective": objective, "output_attentions": keep_maps, "region_weight": region_weight}
    return LatentAlignment(text, Settings(**given), **others)


def aligned(pipe, alignment, latents, t, conditions, layers):
    """`align_latents`, given what the denoiser is called with by name, the timestep as each family calls for it."""
    rows = conditions["encoder_hidden_states"].shape[0]
    args, timestep = ((t,), {}) if kind_of(pipe).name == "sd" else ((), {"timestep": torch.as_tensor(t).expand(rows)})
    return pipe.align_latents(alignment, latents, t, args, conditions | timestep, layers)


@contextmanager
def calls_of(module):
    """A list of the (positional, keyword) arguments that `module` is called with while the context is open."""
    calls = []
    with module.register_forward_pre_hook(lambda _, *arguments: calls.append(arguments), with_kwargs=True):
        yield calls


@contextmanager
def refused(pipe, error, message):
    """A call that has to raise before any network runs."""
    with calls_of(denoiser_of(pipe)) as denoised, calls_of(pipe.text_encoder) as encoded:
        with pytest.raises(error, match=message):
            yield
        assert not denoised and not encoded


def state_of(pipe):
    """All that a call must leave as it found it."""
    models = models_of(pipe)
    modules = [(name, module) for model in models for name, module in model.named_modules()]
    return {
        "processors": [id(getattr(module, "processor", None)) for module in models[0].modules()],
        "modules": [(name, module.training) for name, module in modules],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for _, module in modules],
        "parameters": [(each.requires_grad, each.grad) for model in models for each in model.parameters()],
        "implementation": pipe.text_encoder.config._attn_implementation,
        "config": dict(pipe.config),
        "attributes": sorted(set(vars(pipe)) - {f"_{name}" for name in SET_BY_CALLS.split()}),
        "scheduler": sorted(vars(pipe.scheduler).keys() - {"num_inference_steps"}),
    }

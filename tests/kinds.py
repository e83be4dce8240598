"""The two pipelines that the same tests run on: where they differ, and how a test calls either."""

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, StableDiffusionPipeline

from diffusers_tsam import PixArtAlphaTSAMPipeline, StableDiffusionTSAMPipeline
from tiny import tiny_components, tiny_pixart_components


PROMPT = "a black car and a white clock"
SHORT = "a red cube"
SCHEDULERS = sorted({DDIMScheduler, *DDIMScheduler().compatibles}, key=lambda scheduler: scheduler.__name__)


@dataclass(frozen=True, eq=False)
class Kind:
    stock: type
    tsam: type
    file: str
    build: Callable  # new tiny components
    denoiser: str  # their denoiser's name
    call: dict  # arguments of every call
    defaults: dict  # of T-SAM's own arguments
    fields: tuple  # of the output
    attributes: set  # of the pipeline, set in every call
    words: int  # that fit into a prompt
    first: int  # token of a prompt that is its own
    alpha: float  # that the tiny model's loss falls quickly with

    @functools.cached_property
    def components(self):
        """The tiny model that all tests share."""
        with torch.random.fork_rng():
            return self.build()

    @functools.cached_property
    def extra(self):
        """The arguments that stock does not have."""
        ours, theirs = (inspect.signature(cls.__call__).parameters for cls in (self.tsam, self.stock))
        return set(ours) - set(theirs)


DEFAULTS = {"tsam_steps": None, "refinement_steps": None, "objective": "l1", "text_self_attention": None}
DEFAULTS |= {"refinement_iterations": None, "schedule": "paper"}
DEFAULTS |= {"output_attentions": False}
KINDS = {
    "sd": Kind(
        stock=StableDiffusionPipeline,
        tsam=StableDiffusionTSAMPipeline,
        file="pipeline_tsam_sd.py",
        build=tiny_components,
        denoiser="unet",
        call={},
        defaults={**DEFAULTS, "alpha": 10.0, "gamma": 2.0, "attention_resolution": 16},
        fields=("images", "nsfw_content_detected", "losses", "attentions"),
        attributes={
            "_guidance_scale",
            "_guidance_rescale",
            "_clip_skip",
            "_cross_attention_kwargs",
            "_interrupt",
            "_num_timesteps",
            "_lora_scale",
        },
        words=75,
        first=1,
        alpha=20.0,
    ),
    "pixart": Kind(
        stock=PixArtAlphaPipeline,
        tsam=PixArtAlphaTSAMPipeline,
        file="pipeline_tsam_pixart.py",
        build=tiny_pixart_components,
        denoiser="transformer",
        call={"use_resolution_binning": False, "clean_caption": False, "height": 32, "width": 32},
        defaults={**DEFAULTS, "alpha": 15.0, "gamma": 4.0, "attention_layers": (10, 18)},
        fields=("images", "losses", "attentions"),
        attributes={"_guidance_scale", "_interrupt", "_num_timesteps"},
        words=119,
        first=0,
        alpha=500.0,
    ),
}


def make(cls, components):
    """A quiet pipeline with its own scheduler."""
    scheduler = type(components["scheduler"]).from_config(components["scheduler"].config)
    optional = {"requires_safety_checker": False} if "safety_checker" in components else {}
    pipe = cls(**{**components, "scheduler": scheduler}, **optional)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def kind_of(pipe):
    return next(kind for kind in KINDS.values() if isinstance(pipe, kind.stock))


def denoiser_of(pipe):
    return getattr(pipe, kind_of(pipe).denoiser)


def run(pipe, prompt=PROMPT, seed=0, **kwargs):
    """The output of a short call that ends with latents. Stock is not told what is T-SAM's."""
    kind = kind_of(pipe)
    kwargs = {"num_inference_steps": 4, "output_type": "latent", "refinement_iterations": 2, **kind.call, **kwargs}
    if not isinstance(pipe, kind.tsam):
        kwargs = {name: value for name, value in kwargs.items() if name not in kind.extra}
    if "generator" not in kwargs and "latents" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    return pipe(prompt, **kwargs)


def use(scheduler, *pipes):
    """Let every pipeline have a scheduler of this class."""
    if getattr(scheduler, "_missing", False) or "dummy" in scheduler.__module__:
        pytest.skip(f"{scheduler.__name__} needs a package that is not installed")
    # DPMSolverSDEScheduler draws its own noise, not the generator's
    kwargs = {"noise_sampler_seed": 0} if scheduler.__name__ == "DPMSolverSDEScheduler" else {}
    for pipe in pipes:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **kwargs)


def embeddings(pipe, prompt):
    """The arguments that stand for a prompt."""
    if kind_of(pipe) is KINDS["sd"]:
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(prompt, "cpu", 1, True)))
    names = "prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"
    return {**dict(zip(names, pipe.encode_prompt(prompt, device="cpu"))), "negative_prompt": None}


def layers_of(pipe):
    """The cross-attention layers that are read."""
    layers = pipe.cross_attention_layers()
    return layers[0] if kind_of(pipe) is KINDS["sd"] else layers


@torch.no_grad()
def align(pipe, alignment, latents, t):
    """The latents after one update for PROMPT."""
    prompt = embeddings(pipe, PROMPT)
    if kind_of(pipe) is KINDS["sd"]:
        where = pipe.cross_attention_layers()
        return pipe.align_latents(alignment, latents, t, *where, 0, 1, prompt["prompt_embeds"])
    where, mask = pipe.cross_attention_layers(), prompt["prompt_attention_mask"]
    return pipe.align_latents(alignment, latents, t, where, 0, 1, prompt["prompt_embeds"], mask)


@contextmanager
def calls_of(module):
    """A list of the (positional, keyword) arguments that `module` is called with while the context is open."""
    calls = []
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def refused(pipe, error, message):
    """A call that has to raise before any network runs."""
    with calls_of(denoiser_of(pipe)) as denoised, calls_of(pipe.text_encoder) as encoded:
        with pytest.raises(error, match=message):
            yield
        assert not denoised and not encoded


def state_of(pipe):
    """All that a call must leave as it found it."""
    denoiser = denoiser_of(pipe)
    models = [denoiser, pipe.text_encoder, pipe.vae]
    return {
        "processors": {name: id(processor) for name, processor in denoiser.attn_processors.items()},
        "modules": [name for model in models for name, _ in model.named_modules()],
        "implementation": pipe.text_encoder.config._attn_implementation,
        "requires_grad": [parameter.requires_grad for model in models for parameter in model.parameters()],
        "grads": [parameter.grad for model in models for parameter in model.parameters()],
        "training": [module.training for model in models for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks))
            for model in models
            for module in model.modules()
        ],
        "config": dict(pipe.config),
        "attributes": sorted(set(vars(pipe)) - kind_of(pipe).attributes),
    }

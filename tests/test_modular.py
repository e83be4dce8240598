"""T-SAM as modular blocks: SDXL, SD3 and FLUX, against stock blocks and against a second way to guide stock
pipelines."""

import dataclasses
import functools
from collections.abc import Callable

import diffusers
import pytest
import torch
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks

import diffusers_tsam
from kinds import PROMPT, SHORT, generators
from tiny import tiny_flux_components, tiny_sd3_components, tiny_sdxl_components


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """A family of blocks: what builds its tiny components, and its classic pipeline."""

    ours: str
    stock: type
    classic: str
    build: Callable
    denoiser: str
    alpha: float  # that the tiny model's loss falls quickly with
    call: dict  # arguments of every call

    @functools.cached_property
    def components(self):
        with torch.random.fork_rng():
            return self.build()

    tsam = property(lambda self: getattr(diffusers_tsam, self.ours))


SIZE = {"height": 32, "width": 32}
FAMILIES = {
    "sdxl": Blocks(
        "StableDiffusionXLTSAMBlocks",
        StableDiffusionXLAutoBlocks,
        "StableDiffusionXLPipeline",
        tiny_sdxl_components,
        "unet",
        10.0,
        {"height": 64, "width": 64},
    ),
    "sd3": Blocks(
        "StableDiffusion3TSAMBlocks",
        StableDiffusion3AutoBlocks,
        "StableDiffusion3Pipeline",
        tiny_sd3_components,
        "transformer",
        30.0,
        {**SIZE, "negative_prompt": "", "max_sequence_length": 16},
    ),
    "flux": Blocks(
        "FluxTSAMBlocks",
        FluxAutoBlocks,
        "FluxPipeline",
        tiny_flux_components,
        "transformer",
        100.0,
        {**SIZE, "max_sequence_length": 16},
    ),
}


def make(blocks, components, workflow="text2image"):
    """A quiet pipeline of a workflow's blocks, with its own scheduler."""
    pipe = blocks().get_workflow(workflow).init_pipeline()
    scheduler = type(components["scheduler"]).from_config(components["scheduler"].config)
    pipe.update_components(**{**components, "scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def stock(family):
    return make(family.stock, family.components)


@pytest.fixture
def pipe(family):
    return make(family.tsam, family.components)


def run(family, pipe, prompt=PROMPT, **options):
    """The state after a short call that ends with latents. Stock is not told what is T-SAM's."""
    options = {"num_inference_steps": 4, "output_type": "latent", "refinement_iterations": 2, **family.call, **options}
    if not isinstance(pipe.blocks, family.tsam):
        options = {name: value for name, value in options.items() if name in pipe.blocks.input_names}
    if prompt is not None:
        options = {**options, "prompt": prompt}
    count = len(prompt) if isinstance(prompt, list) else 1
    options.setdefault("generator", generators(count * options.get("num_images_per_prompt", 1)))
    return pipe(**options)


def test_off_and_alpha_zero_and_a_single_word_are_bit_identical_to_stock(family, stock, pipe):
    for prompt in (PROMPT, [PROMPT, SHORT]):
        theirs = run(family, stock, prompt).get("latents")
        for options in ({"tsam_steps": 0}, {"alpha": 0}):
            state = run(family, pipe, prompt, **options)
            assert torch.equal(state.get("latents"), theirs)
            assert state.get("losses").shape == (len(theirs), 0 if "tsam_steps" in options else 6)
    assert torch.equal(run(family, pipe, "cube").get("latents"), run(family, stock, "cube").get("latents"))


def test_the_loss_falls_and_the_picture_moves(family, stock, pipe):
    state = run(family, pipe, refinement_iterations=5, alpha=family.alpha)
    losses = state.get("losses")
    assert losses.dtype == torch.float32 and losses[0, 5] < losses[0, 0]
    assert state.get("latents").isfinite().all()
    assert not torch.allclose(state.get("latents"), run(family, stock).get("latents"), atol=0.01)


def test_a_batch_is_its_pictures_alone(family, stock, pipe):
    options = {"alpha": family.alpha, "num_images_per_prompt": 2}
    together = run(family, pipe, [PROMPT, SHORT], **options)
    for index, prompt in enumerate([PROMPT, PROMPT, SHORT, SHORT]):
        alone = run(family, pipe, prompt, alpha=family.alpha, generator=generators(4)[index])
        for name in ("latents", "losses"):
            torch.testing.assert_close(together.get(name)[index], alone.get(name)[0], rtol=1e-3, atol=2e-3)

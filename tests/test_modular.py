"""T-SAM as modular blocks: SDXL, SD3 and FLUX, against stock blocks and against a second way to guide stock
pipelines."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines import FluxAutoBlocks, StableDiffusion3AutoBlocks, StableDiffusionXLAutoBlocks
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import diffusers_tsam
import oracle
from attached import attached
from diffusers_tsam.attention_processors import record_joint_attention
from diffusers_tsam.modular_tsam import CODE
from kinds import KINDS, PROMPT, SCHEDULERS, SHORT, generators, use
from kinds import make as make_classic
from test_loading import NOTHING_INSTALLED, one_thread, run_fresh  # noqa: F401
from tiny import tiny_flux_components, tiny_sd3_components, tiny_sdxl_components, tiny_tokenizer


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


SDXL = FAMILIES["sdxl"]


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


def test_a_batch_is_its_pictures_alone(family, pipe):
    """But for several pictures each of several prompts, where stock SDXL mixes up their pooled embeddings."""
    both, number = ([PROMPT, SHORT], 1 if family.denoiser == "unet" else 2), 2
    for prompts, number in (both, (PROMPT, 2)):
        together = run(family, pipe, prompts, alpha=family.alpha, num_images_per_prompt=number)
        drawn = [prompt for prompt in ([prompts] if prompts is PROMPT else prompts) for _ in range(number)]
        for index, prompt in enumerate(drawn):
            alone = run(family, pipe, prompt, alpha=family.alpha, generator=generators(4)[index])
            for name in ("latents", "losses"):
                torch.testing.assert_close(together.get(name)[index], alone.get(name)[0], rtol=1e-3, atol=2e-3)


def state_of(pipe):
    """All that a call must leave as it found it."""
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    modules = [(key, name, module) for key, model in models.items() for name, module in model.named_modules()]
    return [
        [(key, name, len(module._forward_hooks), len(module._forward_pre_hooks)) for key, name, module in modules],
        [(key, name, id(getattr(module, "processor", None))) for key, name, module in modules],
        [
            (name, value.requires_grad, value.grad)
            for model in models.values()
            for name, value in model.named_parameters()
        ],
        sorted(vars(pipe.scheduler).keys()),
    ]


def test_all_is_as_it_was_after_success_and_after_failure(family, pipe):
    def failing(maps, text):
        raise ZeroDivisionError

    run(family, pipe)  # a scheduler keeps its place
    before = state_of(pipe)
    expected = run(family, pipe).get("latents")
    with pytest.raises(ZeroDivisionError):
        run(family, pipe, objective=failing)
    assert state_of(pipe) == before
    assert torch.equal(run(family, pipe).get("latents"), expected)
    assert state_of(pipe) == before


def test_attentions_are_what_was_aligned(family, pipe):
    state = run(family, pipe, [PROMPT, SHORT], alpha=0, output_attentions=True)
    first, second = state.get("attentions")
    assert (first["tokens"], second["tokens"]) == (PROMPT.split(), SHORT.split())
    assert first["maps"].shape == (2, 7, 8, 8) and first["steps"] == [0, 1]
    (target, _), _ = texts_of(state.get("text_self_attention"), family.tsam.loop.settings().gamma)
    torch.testing.assert_close(first["text_attention"].double(), target, rtol=1e-4, atol=1e-5)
    loss = oracle.loss(target.tolist(), [map.tolist() for map in first["maps"][0]], "l1")
    expected = oracle.loss([row[: i + 1] for i, row in enumerate(target.tolist())], first["maps"][0].tolist(), "l1")
    assert abs(state.get("losses")[0, 0] - expected) < 1e-3 and loss == expected


def test_a_relative_step_moves_the_input_by_its_share(family, pipe):
    """Of FLUX a packed latent, (B, S, C)."""
    call = {"preset": "light", "num_inference_steps": 1}
    with moves_of(family.components[family.denoiser]) as inputs:
        run(family, pipe, **call)
    before, after = inputs[0], inputs[-1][: len(inputs[0])]
    assert abs((after - before).norm() / before.norm() - 0.05) < 1e-4


@contextmanager
def moves_of(model):
    """The inputs of every call of a denoiser."""
    inputs = []

    def hook(module, args, kwargs):
        inputs.append((args[0] if args else kwargs["hidden_states"]).detach())

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


def test_a_guided_pass_ends_at_the_last_map(family, pipe):
    model = family.components[family.denoiser]
    ends = []
    handle = model.register_forward_hook(lambda *_: ends.append(1))
    with moves_of(model) as inputs:
        run(family, pipe, num_inference_steps=2, refinement_iterations=3)
    handle.remove()
    predictions = (
        2 if "flux" in family.classic.lower() else 4
    )  # of two steps, with and without classifier-free guidance
    assert len(inputs) == 4 + predictions and len(ends) == predictions


def test_it_guides_under_inference_mode_and_in_half_precision_with_losses_in_float32(family, stock, pipe):
    expected = run(family, pipe, alpha=family.alpha)
    with torch.inference_mode():
        state = run(family, pipe, alpha=family.alpha)
    assert torch.equal(state.get("latents"), expected.get("latents"))
    components = family.build()
    for model in components.values():
        if isinstance(model, torch.nn.Module):
            model.to(torch.float16)
    half = make(family.tsam, components)
    state = run(family, half, alpha=family.alpha)
    assert state.get("latents").dtype == torch.float16 and state.get("latents").isfinite().all()
    assert state.get("losses").dtype == torch.float32
    torch.testing.assert_close(state.get("losses")[0, 0], expected.get("losses")[0, 0], rtol=0.05, atol=0.05)
    off = run(family, half, tsam_steps=0).get("latents")
    assert torch.equal(off, run(family, make(family.stock, components)).get("latents"))


def test_two_threads_draw_what_each_draws_alone(family):
    pipes = [make(family.tsam, family.components) for _ in range(2)]
    prompts = [PROMPT, SHORT]

    def draw(k):
        return run(family, pipes[k], prompts[k], alpha=family.alpha, generator=generators(2)[k]).get("latents")

    expected = [draw(k) for k in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for ours, alone in zip(pool.map(draw, range(2)), expected):
            torch.testing.assert_close(ours, alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"tsam_steps": 5}, ValueError, "`tsam_steps` is 5, but there are only 4 denoising steps"),
        ({"alpha": -1}, ValueError, "`alpha` is -1, but has to be at least 0"),
        ({"gamma": 0}, ValueError, "`gamma` is 0, but has to be above 0"),
        ({"preset": "quick"}, ValueError, "`preset` is 'quick', but has to be one of 'paper'"),
        ({"objective": "l3"}, ValueError, "`objective` is 'l3', but has to be one of 'l1'"),
        ({"relative_step": 2}, ValueError, "`relative_step` is 2, but has to be between 0 and 1"),
        ({"refinement_steps": [3]}, ValueError, "`refinement_steps` has 3, but only steps 0 to 1 are guided"),
    ],
)
def test_what_cannot_be_is_refused_before_the_denoiser_runs(family, pipe, options, error, message):
    with moves_of(family.components[family.denoiser]) as inputs, pytest.raises(error, match=message):
        run(family, pipe, **options)
    assert not inputs


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("sdxl", {"attention_resolution": 7}, ValueError, "`attention_resolution` is 7, but .* grids of 8, 16"),
        ("sdxl", {"prompt_2": f"{PROMPT} on the table"}, ValueError, "`prompt_2` has other tokens than `prompt`"),
        ("sdxl", {"prompt_2": SHORT}, ValueError, "`prompt_2` has other tokens than `prompt`"),
        (
            "sd3",
            {"attention_layers": (2, 4)},
            ValueError,
            r"is \(2, 4\), but there are 4 blocks, 0 to 3. Pass .*\(1, 2\)",
        ),
        ("flux", {"attention_layers": 3}, TypeError, "`attention_layers` has to be two integers but is 3"),
        (
            "flux",
            {"attention_keys": "image"},
            ValueError,
            "`attention_keys` is 'image', but has to be one of 'text', 'all'",
        ),
    ],
)
def test_what_a_family_does_not_have_is_refused(name, options, error, message):
    family = FAMILIES[name]
    with moves_of(family.components[family.denoiser]) as inputs, pytest.raises(error, match=message):
        run(family, make(family.tsam, family.components), **options)
    assert not inputs


def test_without_its_text_step_a_pipeline_asks_for_t_and_takes_it(family):
    blocks = family.tsam().get_workflow("text2image")
    text_step = blocks.sub_blocks.pop("text_encoder")
    pipe, encoder = blocks.init_pipeline(), text_step.init_pipeline()
    scheduler = copy(family.components["scheduler"])
    pipe.update_components(**{name: family.components[name] for name in (family.denoiser, "vae")}, scheduler=scheduler)
    encoder.update_components(**{n: c for n, c in family.components.items() if "text" in n or "token" in n})
    names = {"prompt", "negative_prompt", "max_sequence_length"} & set(encoder.blocks.input_names)
    found = encoder(
        **{**{name: family.call[name] for name in names - {"prompt"} if name in family.call}, "prompt": PROMPT}
    )
    embeds = {name: value for name, value in found.values.items() if name.endswith("embeds") and value is not None}
    call = {"generator": generators(1), "alpha": family.alpha, **embeds}
    state = run(family, pipe, None, text_self_attention=found.get("text_self_attention"), **call)
    assert torch.equal(
        state.get("latents"), run(family, make(family.tsam, family.components), alpha=family.alpha).get("latents")
    )
    with pytest.raises(ValueError, match="T is not known, since no text step of T-SAM ran"):
        run(family, pipe, None, **call)
    for wrong, error, message in (
        ("T", TypeError, "`text_self_attention` is <class 'str'>. Pass what"),
        (found.get("text_self_attention")._replace(tokens=[]), ValueError, "and 0 lists of tokens, but these prompts"),
    ):
        with moves_of(family.components[family.denoiser]) as inputs, pytest.raises(error, match=message):
            run(family, pipe, None, text_self_attention=wrong, **call)
        assert not inputs
    run(family, pipe, None, tsam_steps=0, **call)


def test_stocks_own_blocks_stay_stocks(family):
    """SD3 and FLUX share block instances among all their pipelines."""
    make(family.tsam, family.components)
    assert "alpha" not in make(family.stock, family.components).blocks.input_names


def test_sdxls_t_is_the_mean_over_both_encoders_as_they_are_published():
    """Whose second tokenizer pads with another token, and whose configs name another <eos> than the tokenizers'."""
    components = SDXL.build()
    tokenizer = components["tokenizer_2"] = tiny_tokenizer()
    tokenizer.pad_token = "!"
    for encoder in (components["text_encoder"], components["text_encoder_2"]):
        encoder.config.eos_token_id = 2
    text = run(SDXL, make(SDXL.tsam, components)).get("text_self_attention")
    assert text.tokens == [PROMPT.split()]
    expected = 0
    for name in ("", "_2"):
        ids = components[f"tokenizer{name}"](PROMPT, padding="max_length", return_tensors="pt").input_ids[0]
        expected = expected + oracle.clip_self_attention(components[f"text_encoder{name}"], ids) / 2
    own = text.content[0]
    torch.testing.assert_close(text.attention[0][own][:, own].double(), expected[own][:, own], rtol=1e-4, atol=1e-5)


def test_a_refiner_has_one_text_encoder():
    components = {**SDXL.build(), "text_encoder": None, "tokenizer": None}
    blocks = SDXL.tsam()
    step = blocks.sub_blocks["text_encoder"].init_pipeline()
    step.update_components(**{name: value for name, value in components.items() if "_2" in name or "text" in name})
    assert step(prompt=SHORT).get("text_self_attention").tokens == [SHORT.split()]


def test_sd3s_t_is_t5s_behind_clips_columns_and_without_t5_clips():
    family = FAMILIES["sd3"]
    with_t5 = run(family, make(family.tsam, family.components)).get("text_self_attention")
    assert with_t5.content[0].nonzero().flatten().tolist() == list(range(77, 77 + 7))
    pipe = make(family.tsam, {**family.components, "text_encoder_3": None, "tokenizer_3": None})
    state = run(family, pipe)
    text = state.get("text_self_attention")
    assert text.content[0].nonzero().flatten().tolist() == list(range(1, 8)) and text.attention.shape == (1, 93, 93)
    assert state.get("losses")[0, 2] < state.get("losses")[0, 0]
    ids = family.components["tokenizer"](PROMPT, padding="max_length", return_tensors="pt").input_ids[0]
    clips = [oracle.clip_self_attention(family.components[f"text_encoder{name}"], ids) for name in ("", "_2")]
    torch.testing.assert_close(text.attention[0, :77, :77].double(), sum(clips) / 2, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Against a second implementation, attached to classic pipelines


UPDATES = [3, 1, 0, 0]


def texts_of(text, gamma):
    """Each prompt's T by the oracle, and where its tokens are."""
    found = []
    for attention, content in zip(text.attention.tolist(), text.content):
        own = content.nonzero().flatten().tolist()
        rows = [row + [0.0] * (len(own) - len(row)) for row in oracle.text_attention(attention, own, gamma)]
        found.append((torch.tensor(rows, dtype=torch.float64), own))
    return found


PLACES = {  # where the second implementation looks; SD3's text is CLIP's 77 columns and T5's 16, FLUX's 16 come first
    "sdxl": lambda model: {
        "layers": [model.down_blocks[2].attentions[0].transformer_blocks[0].attn2]
        + [model.mid_block.attentions[0].transformer_blocks[0].attn2]
        + [layer.transformer_blocks[0].attn2 for layer in model.up_blocks[0].attentions],
        "grid": (8, 8),
    },
    "sd3": lambda model: {
        "layers": [block.attn for block in model.transformer_blocks[1:3]],
        "grid": (8, 8),
        "rows": slice(0, 64),
        "columns": slice(64, None),
        "keys": slice(64, None),
    },
    "flux": lambda model: {
        "layers": [model.transformer_blocks[1].attn, *(block.attn for block in model.single_transformer_blocks[:2])],
        "grid": (8, 8),
        "rows": slice(16, None),
        "columns": slice(0, 16),
        "keys": slice(0, 16),
    },
}


@pytest.mark.parametrize("keys", ["text", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_draw_what_the_same_updates_behind_a_classic_pipelines_back_draw(name, keys):
    family = FAMILIES[name]
    places, options = PLACES[name](family.components[family.denoiser]), {"gamma": 3.0, "alpha": family.alpha}
    if name != "sdxl":
        options |= {"attention_keys": keys, "attention_layers": (1, 2) if name == "sd3" else (1, 3)}
        places |= {"keys": None} if keys == "all" else {}
    elif keys == "all":
        pytest.skip("cross-attention has no other keys")
    prompts = [PROMPT, SHORT]
    pipe = make(family.tsam, family.components)
    state = run(family, pipe, prompts, refinement_steps=[0], **options)
    classic = getattr(diffusers, family.classic)(**{**family.components, "scheduler": copy(pipe.scheduler)})
    classic.set_progress_bar_config(disable=True)
    call = {"guidance_scale": pipe.guider.guidance_scale} if name != "flux" else {}
    call |= {**family.call, "num_inference_steps": 4, "output_type": "latent", "generator": generators(2)}
    model, texts = family.components[family.denoiser], texts_of(state.get("text_self_attention"), 3.0)
    with attached(classic, model, texts=texts, alpha=family.alpha, updates=UPDATES, **places) as losses:
        expected = classic(prompts, **call).images
    ours = state.get("latents")
    if name == "flux":
        expected = classic._unpack_latents(expected, 32, 32, classic.vae_scale_factor)
    torch.testing.assert_close(state.get("losses").double(), torch.stack(losses, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_our_classic_loop_draws_what_the_second_implementation_draws(scheduler):
    kind = KINDS["sd"]
    ours, theirs = (make_classic(cls, kind.components) for cls in (kind.tsam, kind.stock))
    use(getattr(diffusers, scheduler), ours, theirs)
    text = ours.get_text_self_attention([PROMPT, SHORT])
    layers = ours.cross_attention_layers()
    call = {"num_inference_steps": 4, "output_type": "latent"}
    options = {"alpha": 10.0, "gamma": 3.0, "refinement_steps": [0], "refinement_iterations": 2}
    output = ours([PROMPT, SHORT], **call, **options, generator=generators(2))
    with attached(theirs, theirs.unet, layers, texts_of(text, 3.0), 10.0, UPDATES, (16, 16)) as losses:
        expected = theirs([PROMPT, SHORT], **call, generator=generators(2)).images
    torch.testing.assert_close(output.losses.double(), torch.stack(losses, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.images, expected, rtol=2e-3, atol=2e-3)


# ----------------------------------------------------------------------------------------------------------------------
# SDXL: guiders, workflows, adapters


ONE_LAYER = {"fqn": "mid_block.attentions.0.transformer_blocks", "indices": [0]}
GUIDERS = {
    "no guidance": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
    "from the second step on": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.3),
    "APG": lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0),
    "APG mix": lambda: diffusers.AdaptiveProjectedMixGuidance(guidance_scale=4.0),
    "zero star": lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=1),
    "tangential": lambda: diffusers.TangentialClassifierFreeGuidance(guidance_scale=4.0),
    "skipped layer": lambda: diffusers.SkipLayerGuidance(
        skip_layer_config=diffusers.LayerSkipConfig(**ONE_LAYER),
        skip_layer_guidance_start=0,
        skip_layer_guidance_stop=1.0,
    ),
    "auto": lambda: diffusers.AutoGuidance(auto_guidance_config=diffusers.LayerSkipConfig(**ONE_LAYER)),
    "PAG": lambda: diffusers.PerturbedAttentionGuidance(
        perturbed_guidance_config=diffusers.LayerSkipConfig(**ONE_LAYER),
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
    ),
}


def holds(theirs, ours, **options):
    """The guided state: off it is stock's to the bit, guidance acts, and the models are left as they were."""
    expected = run(SDXL, theirs, **options).get("latents")
    before = state_of(ours)[:3]
    assert torch.equal(run(SDXL, ours, tsam_steps=0, **options).get("latents"), expected)
    state = run(SDXL, ours, alpha=10.0, **options)
    assert state.get("losses")[0, 2] < state.get("losses")[0, 0]
    assert state.get("latents").isfinite().all()
    assert not torch.allclose(state.get("latents"), expected, rtol=0.01, atol=0.01)
    assert state_of(ours)[:3] == before
    return state


def pair(components, workflow="text2image", build=None):
    return [make(blocks, components, workflow) for blocks in (SDXL.stock, SDXL.tsam)]


@pytest.mark.parametrize("guider", GUIDERS)
def test_every_guider_goes_with_guidance(guider):
    """Their first call, the conditional one, is what is read: the losses are those of classifier-free guidance."""
    pipes = pair(SDXL.components)
    plain = run(SDXL, pipes[1], alpha=10.0)
    for pipe in pipes:
        pipe.update_components(guider=GUIDERS[guider]())
    state = holds(*pipes, num_inference_steps=2)
    torch.testing.assert_close(state.get("losses")[0, :3], plain.get("losses")[0, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
def test_one_alpha_guides_under_every_scheduler(scheduler):
    if "dummy" in scheduler.__module__:
        pytest.skip(f"{scheduler.__name__} needs a package that is not installed")
    kwargs = {"noise_sampler_seed": 0} if scheduler.__name__ == "DPMSolverSDEScheduler" else {}
    latents = []
    for options in ({"alpha": 0}, {"tsam_steps": 0}, {"alpha": 30.0, "refinement_steps": [0]}):
        pipe = make(SDXL.tsam, SDXL.components)  # a guider keeps its step between calls of stock, which then may fail
        pipe.update_components(scheduler=scheduler.from_config(pipe.scheduler.config, **kwargs))
        state = run(SDXL, pipe, **options)
        latents.append(state.get("latents"))
    assert torch.equal(*latents[:2])
    losses = state.get("losses")[0]
    assert len(losses) == 4 and losses[2] < losses[0] and latents[2].isfinite().all()


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    "name, scheduler, options",
    [
        ("sd3", "FlowMatchHeunDiscreteScheduler", {}),
        ("sd3", "UniPCMultistepScheduler", FLOW),
        ("sd3", "DPMSolverMultistepScheduler", FLOW),
        ("flux", "UniPCMultistepScheduler", FLOW),  # stock FLUX fails with the others
    ],
)
def test_one_alpha_guides_under_schedulers_of_flows(name, scheduler, options):
    family, latents = FAMILIES[name], []
    for call in ({"alpha": 0}, {"tsam_steps": 0}, {"alpha": family.alpha, "refinement_steps": [0]}):
        pipe = make(family.tsam, family.components)
        pipe.update_components(scheduler=getattr(diffusers, scheduler)(**options))
        state = run(family, pipe, **call)
        latents.append(state.get("latents"))
    assert torch.equal(*latents[:2]) and state.get("losses")[0, 2] < state.get("losses")[0, 0]


def test_sd3s_projected_guidance_goes_with_ours():
    """With skipped layers and perturbed attention stock SD3 fails."""
    family = FAMILIES["sd3"]
    stock, pipe = (make(blocks, family.components) for blocks in (family.stock, family.tsam))
    plain = run(family, pipe, alpha=family.alpha)
    for each in (stock, pipe):
        each.update_components(guider=diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0))
    assert torch.equal(run(family, pipe, tsam_steps=0).get("latents"), run(family, stock).get("latents"))
    losses = run(family, pipe, alpha=family.alpha).get("losses")
    torch.testing.assert_close(losses[0, :3], plain.get("losses")[0, :3], rtol=1e-4, atol=1e-4)


PICTURE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
MASK = torch.zeros(1, 1, 64, 64)
MASK[..., 32:] = 1


def test_an_image_is_changed_and_only_the_steps_that_are_left_count():
    state = holds(*pair(SDXL.components, "image2image"), image=PICTURE, strength=0.6, num_inference_steps=10)
    assert state.get("losses").shape == (1, 3 + 2 * 3)  # of six steps left three; each of 0, 1 and 2 refines
    empty = run(SDXL, make(SDXL.tsam, SDXL.components, "image2image"), image=PICTURE, strength=0.5, tsam_steps=0)
    assert empty.get("losses").shape == (1, 0)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_image_is_changed_by_joint_transformers_too(name):
    family = FAMILIES[name]
    stock, pipe = (make(blocks, family.components, "image2image") for blocks in (family.stock, family.tsam))
    options = {"image": PICTURE[..., :32, :32] / 2 + 0.5, "strength": 0.6, "num_inference_steps": 10}
    expected = run(family, stock, **options).get("latents")
    assert torch.equal(run(family, pipe, tsam_steps=0, **options).get("latents"), expected)
    state = run(family, pipe, alpha=family.alpha, **options)
    assert state.get("losses").shape == (1, 3 + 2 * 3) and state.get("losses")[0, 2] < state.get("losses")[0, 0]
    assert not torch.allclose(state.get("latents"), expected, atol=1e-3)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_goes_with_guidance_by_either_kind_of_unet(channels):
    components = SDXL.components if channels == 4 else tiny_sdxl_components(in_channels=9)
    pipes = pair(components, "inpainting")
    state = holds(*pipes, image=PICTURE, mask_image=MASK, strength=0.9)
    if channels == 4:  # outside of the mask the picture's own latents remain
        expected = run(SDXL, pipes[0], image=PICTURE, mask_image=MASK, strength=0.9).get("latents")
        assert torch.equal(state.get("latents")[..., :16], expected[..., :16])


def test_a_controlnet_holds_guided_pictures_too():
    torch.manual_seed(1)
    controlnet = diffusers.ControlNetModel.from_unet(
        SDXL.components["unet"], conditioning_embedding_out_channels=(8, 8)
    ).eval()
    for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.3)
    pipes = pair({**SDXL.components, "controlnet": controlnet}, "controlnet_text2image")
    options = {"control_image": PICTURE / 2 + 0.5}
    state = holds(*pipes, **options)
    other = run(SDXL, pipes[1], alpha=10.0, **options, controlnet_conditioning_scale=0.1)
    assert (state.get("losses") - other.get("losses")).abs().max() > 1e-3  # what is read is under its influence


def lora_of(unet, rank=2):
    state = {}
    for name, module in unet.named_modules():
        if name.endswith(("to_q", "to_k")):
            state[f"unet.{name}.lora_A.weight"] = torch.randn(rank, module.in_features)
            state[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, rank) / 4
    return state


def test_a_lora_acts_at_its_scale_and_unloaded_as_if_it_never_was():
    pytest.importorskip("peft")
    components = SDXL.build()
    pipes = pair(components)
    plain = run(SDXL, pipes[1], alpha=10.0)
    pipes[1].load_lora_weights(lora_of(components["unet"]), adapter_name="one")
    full = holds(*pipes)
    assert (full.get("losses") - plain.get("losses")).abs().max() > 1e-3
    none = run(SDXL, pipes[1], alpha=10.0, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(none.get("losses"), plain.get("losses"), rtol=1e-3, atol=1e-3)
    pipes[1].unload_lora_weights()
    assert torch.equal(run(SDXL, pipes[1], alpha=10.0).get("latents"), plain.get("latents"))


def test_an_ip_adapter_acts_with_guidance_on_as_in_stock_without():
    components = SDXL.build()
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=12)
    components["image_encoder"] = CLIPVisionModelWithProjection(config).eval()
    pipes, weights = pair(components, "ip_adapter_text2image"), {}
    for pipe in pipes:
        pipe.feature_extractor = CLIPImageProcessor(size=16, crop_size=16)
    for place, layer in enumerate(
        layer for name, layer in components["unet"].named_modules() if name.endswith("attn2")
    ):
        for which in ("k", "v"):
            weights[f"{2 * place + 1}.to_{which}_ip.weight"] = torch.randn_like(getattr(layer, f"to_{which}").weight)
    projection = {"proj.weight": torch.randn(4 * 40, 12), "proj.bias": torch.zeros(4 * 40)}
    projection |= {"norm.weight": torch.ones(40), "norm.bias": torch.zeros(40)}
    plain = run(SDXL, make(SDXL.tsam, components), alpha=10.0)
    pipes[1].load_ip_adapter({"image_proj": projection, "ip_adapter": weights}, subfolder="", weight_name="")
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    state = holds(*pipes, ip_adapter_image=Image.fromarray(image))
    assert (state.get("losses") - plain.get("losses")).abs().max() > 1e-3


SWITCHES = {
    "gradient checkpointing": lambda model: model.enable_gradient_checkpointing(),
    "attention backend": lambda model: model.set_attention_backend("native"),
    "compiled": lambda model: (model.compile_repeated_blocks if model._repeated_blocks else model.compile)(
        backend="eager"
    ),
    "group offload": lambda model: model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_only_computes_in_another_way_guides_to_the_same(name, switch):
    family = FAMILIES[name]
    components = family.build()
    expected = run(family, make(family.tsam, components), alpha=family.alpha)
    SWITCHES[switch](components[family.denoiser])
    state = run(family, make(family.tsam, components), alpha=family.alpha)
    for key in ("losses", "latents"):
        torch.testing.assert_close(state.get(key), expected.get(key), rtol=5e-3, atol=5e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Joint attention, one number at a time


@pytest.mark.parametrize("all_keys", [False, True], ids=["text", "all"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_is_read_as_it_is_defined(name, all_keys):
    """Against the weights, one head at a time: SD3's queries and keys are normalised, FLUX has two kinds of block."""
    torch.manual_seed(2)
    components = tiny_sd3_components(qk_norm="rms_norm") if name == "sd3" else tiny_flux_components()
    model = components["transformer"].double()
    for parameter in (value for key, value in model.named_parameters() if "norm_" in key and "linear" not in key):
        torch.nn.init.normal_(parameter, 1.0, 0.2)
    blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
    number, side, width = 5, 6, 24
    given = {"encoder_hidden_states": torch.randn(1, number, width).double()}
    given |= {"pooled_projections": torch.randn(1, width if name == "sd3" else 16).double(), "return_dict": False}
    if name == "sd3":
        given |= {"hidden_states": torch.randn(1, 4, 2 * side, 2 * side).double(), "timestep": torch.tensor([500.0])}
    else:
        grid = torch.stack(torch.meshgrid(torch.zeros(1), *[torch.arange(float(side))] * 2, indexing="ij"), -1)
        given |= {"hidden_states": torch.randn(1, side**2, 16).double(), "timestep": torch.tensor([0.5]).double()}
        given |= {"img_ids": grid.reshape(-1, 3), "txt_ids": torch.zeros(number, 3)}
    inputs = {}

    def keep(attn, args, kwargs):
        inputs[attn] = kwargs

    layers = [block.attn for block in blocks]
    for layer in layers:
        layer.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), record_joint_attention(layers, 3, number, all_keys) as maps:
        model(**given)
    assert sorted(maps) == list(range(len(layers))) and not any(len(layer._forward_pre_hooks) > 1 for layer in layers)
    for index, layer in enumerate(layers):
        expected = joint_by_hand(layer, inputs[layer], number, all_keys)[:, :3]
        assert maps[index].dtype == torch.float32 and maps[index].shape == (1, side**2, 3)
        torch.testing.assert_close(maps[index][0].double(), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def joint_by_hand(attn, given, number, all_keys):
    """(P, number) of the one image: mean over heads of softmax over the text's keys or all."""
    hidden, text = given["hidden_states"][0], given.get("encoder_hidden_states")
    text_first = given.get("image_rotary_emb") is not None  # FLUX

    def normed(x, norm):
        return x if norm is None else x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    def project(which):
        own = oracle.linear(hidden, getattr(attn, f"to_{which}")).unflatten(-1, (attn.heads, -1))
        own = normed(own, getattr(attn, f"norm_{which}"))
        if text is None:
            return own
        added = oracle.linear(text[0], getattr(attn, f"add_{which}_proj")).unflatten(-1, (attn.heads, -1))
        added = normed(added, getattr(attn, f"norm_added_{which}"))
        return torch.cat([added, own] if text_first else [own, added])

    query, key = project("q"), project("k")
    if text_first:
        cosine, sine = given["image_rotary_emb"]

        def turned(x):
            y = x.clone()
            for place, head, pair in product(range(x.shape[0]), range(x.shape[1]), range(x.shape[2] // 2)):
                a, b = x[place, head, 2 * pair], x[place, head, 2 * pair + 1]
                c, s = cosine[place, 2 * pair], sine[place, 2 * pair]
                y[place, head, 2 * pair], y[place, head, 2 * pair + 1] = a * c - b * s, b * c + a * s
            return y

        query, key = turned(query), turned(key)
    total = len(query)
    columns = range(number) if text_first else range(total - number, total)
    rows = range(number, total) if text_first else range(total - number)
    summed = torch.zeros(len(rows), number, dtype=torch.float64)
    for head in range(attn.heads):
        scores = (query[:, head] @ key[:, head].T / query.shape[-1] ** 0.5)[list(rows)]
        weights = scores.exp()
        among = weights if all_keys else weights[:, list(columns)]
        summed += weights[:, list(columns)] / among.sum(-1, keepdim=True)
    return summed / attn.heads


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


LOAD = """
import torch
from diffusers import ModularPipelineBlocks

code, weights, call = {arguments!r}
try:
    ModularPipelineBlocks.from_pretrained(code)
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("ran code that is not trusted")
blocks = ModularPipelineBlocks.from_pretrained(code, trust_remote_code=True)
pipe = blocks.get_workflow("text2image").init_pipeline(weights)
pipe.load_components(dtype=torch.float32)
state = pipe(generator=torch.Generator().manual_seed(0), **call)
torch.save([state.get("latents"), state.get("losses")], "drawn.pt")
"""


def test_blocks_saved_to_a_folder_draw_in_a_fresh_process_with_nothing_installed_the_same(family, tmp_path):
    pipe = make(family.tsam, family.components)
    pipe.save_pretrained(str(tmp_path / "weights"), overwrite_modular_index=True)
    pipe.blocks.save_pretrained(tmp_path / "code")
    assert {path.name for path in (tmp_path / "code").iterdir()} == {*CODE, "modular_config.json"}
    call = {**family.call, "prompt": PROMPT, "num_inference_steps": 2, "output_type": "latent"}
    arguments = str(tmp_path / "code"), str(tmp_path / "weights"), call
    run_fresh(tmp_path, NOTHING_INSTALLED + LOAD.format(arguments=arguments))
    state = pipe(generator=torch.Generator().manual_seed(0), **call)
    for name, drawn in zip(("latents", "losses"), torch.load(tmp_path / "drawn.pt")):
        torch.testing.assert_close(drawn, state.get(name), rtol=1e-4, atol=1e-3)  # another process rounds otherwise


def test_a_folder_that_would_lose_t_sam_says_so_and_with_the_code_it_does_not(family, tmp_path, warnings_seen):
    folder = str(tmp_path / "saved")
    pipe = make(family.tsam, family.components)
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    assert f"has no code of T-SAM: loaded as it is, it draws without. Load it by `{family.ours}()" in warnings_seen.text
    again = diffusers.ModularPipeline.from_pretrained(folder)
    assert type(again) is type(make(family.stock, family.components)) and "alpha" not in again.blocks.input_names
    again = family.tsam().init_pipeline(folder)
    again.load_components(names=[family.denoiser])
    assert "alpha" in again.blocks.input_names and getattr(again, family.denoiser) is not None
    pipe.blocks.save_pretrained(folder)
    again = diffusers.ModularPipeline.from_pretrained(folder, trust_remote_code=True, workflow="text2image")
    assert type(again.blocks).__name__ == family.ours and "alpha" in again.blocks.input_names


def test_a_pipeline_that_the_blocks_did_not_make_says_so_after_its_first_picture(tmp_path, warnings_seen):
    """As those that `ModularPipeline.from_pretrained` makes of a repository's blocks."""
    pipe = diffusers.StableDiffusionXLModularPipeline(blocks=SDXL.tsam().get_workflow("text2image"))
    pipe.update_components(**SDXL.components)
    pipe.set_progress_bar_config(disable=True)
    run(SDXL, pipe, num_inference_steps=1)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert "has no code of T-SAM" in warnings_seen.text

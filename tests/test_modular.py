"""T-SAM as modular blocks: SDXL, SD3 and FLUX, against stock blocks and against a second way to guide stock
pipelines."""

from contextlib import ExitStack
from copy import copy
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, SequentialPipelineBlocks
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import oracle
from attached import attached
from diffusers_tsam.attention_processors import record_joint_attention
from diffusers_tsam.modular_tsam import CODE
from kinds import (
    ANIMA,
    BLOCKS,
    FLUX,
    KINDS,
    PROMPT,
    SCHEDULERS,
    SD3,
    SDXL,
    SHORT,
    calls_of,
    denoiser_of,
    generators,
    make,
    run,
    use,
)
from test_compatibility import VISION, holds, ip_adapter_of, lora_of
from test_loading import NOTHING_INSTALLED, one_thread, run_fresh  # noqa: F401
from tiny import tiny_flux_components, tiny_sd3_components, tiny_sdxl_components, tiny_tokenizer


@pytest.fixture(params=BLOCKS)
def kind(request):
    return BLOCKS[request.param]


def test_a_relative_step_moves_the_input_by_its_share(pipe):
    """Of FLUX a packed latent, (B, S, C)."""
    with calls_of(denoiser_of(pipe)) as calls:
        run(pipe, preset="light", num_inference_steps=1)
    before, after = (args[0] if args else kwargs["hidden_states"] for args, kwargs in (calls[0], calls[-1]))
    assert abs((after[:1] - before).norm() / before.norm() - 0.05) < 1e-4


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"tsam_steps": 5}, ValueError, "`tsam_steps` is 5, but there are only 4 denoising steps"),
        ({"gamma": "x"}, TypeError, "`gamma` has to be a number but is 'x'"),
        ({"preset": "quick"}, ValueError, "`preset` is 'quick', but has to be one of 'paper'"),
        ({"candidates": 0}, ValueError, "`candidates` is 0, but has to be at least 1"),
        ({"candidates": 2, "candidate_steps": 5}, ValueError, "`candidate_steps` is 5, but there are only 4 denoising"),
        ({"candidates": 2, "latents": torch.zeros(3, 4, 32, 32)}, ValueError, "`latents` hold 3 starts, .* 1 to 2"),
    ],
)
def test_what_cannot_be_is_refused_before_the_denoiser_runs(pipe, options, error, message):
    with calls_of(denoiser_of(pipe)) as calls, pytest.raises(error, match=message):
        run(pipe, **options)
    assert not calls


@pytest.mark.parametrize(
    "kind, options, error, message",
    [
        (SDXL, {"attention_resolution": 7}, ValueError, "`attention_resolution` is 7, but .* grids of 8, 16"),
        (SDXL, {"prompt_2": f"{PROMPT} on the table"}, ValueError, "`prompt_2` has other tokens than `prompt`"),
        (SDXL, {"prompt_2": SHORT}, ValueError, "`prompt_2` has other tokens than `prompt`"),
        (
            SD3,
            {"attention_layers": (2, 4)},
            ValueError,
            r"is \(2, 4\), but this transformer has 4 blocks, 0 to 3. .*\(1, 2\)",
        ),
        (ANIMA, {"attention_layers": (2, 4)}, ValueError, r"has 4 blocks, 0 to 3. .*\(1, 2\)"),
        (FLUX, {"attention_layers": 3}, TypeError, "`attention_layers` has to be two integers but is 3"),
        (FLUX, {"attention_keys": "image"}, ValueError, "`attention_keys` is 'image', but has to be one of 'text', "),
    ],
)
def test_what_a_kind_does_not_have_is_refused(kind, options, error, message):
    pipe = make(kind.tsam, kind.components)
    with calls_of(denoiser_of(pipe)) as calls, pytest.raises(error, match=message):
        run(pipe, **options)
    assert not calls


def test_without_its_text_step_a_pipeline_asks_for_t_and_takes_it(kind):
    blocks = kind.tsam().get_workflow("text2image")
    names = {"text_encoder", "denoise.text_conditioning"} & {*blocks.sub_blocks}  # the second is Anima's
    steps = {name: blocks.sub_blocks.pop(name) for name in sorted(names, reverse=True)}
    pipe, encoder = blocks.init_pipeline(), SequentialPipelineBlocks.from_blocks_dict(steps).init_pipeline()
    scheduler = copy(kind.components["scheduler"])
    pipe.update_components(**{name: kind.components[name] for name in (kind.denoiser, "vae")}, scheduler=scheduler)
    encoder.update_components(**{n: c for n, c in kind.components.items() if n in encoder.pretrained_component_names})
    names = {"prompt", "negative_prompt", "max_sequence_length"} & set(encoder.blocks.input_names)
    found = encoder(**{**{name: kind.call[name] for name in names - {"prompt"} if name in kind.call}, "prompt": PROMPT})
    names = {name for name in pipe.blocks.input_names if name is not None and name.endswith("embeds")}
    embeds = {name: found.get(name) for name in names if found.get(name) is not None}
    call = {"generator": generators(1), "alpha": kind.alpha, **embeds}
    state = run(pipe, None, text_self_attention=found.get("text_self_attention"), **call)
    assert torch.equal(state.images, run(make(kind.tsam, kind.components), alpha=kind.alpha).images)
    with pytest.raises(ValueError, match="T is not known, since no text step of T-SAM ran"):
        run(pipe, None, **call)
    for wrong, error, message in (
        ("T", TypeError, "`text_self_attention` is <class 'str'>. Pass what"),
        (found.get("text_self_attention")._replace(tokens=[]), ValueError, "and 0 lists of tokens, but these prompts"),
    ):
        with calls_of(denoiser_of(pipe)) as calls, pytest.raises(error, match=message):
            run(pipe, None, text_self_attention=wrong, **call)
        assert not calls
    run(pipe, None, tsam_steps=0, **call)


def test_stocks_own_blocks_stay_stocks(kind):
    """SD3 and FLUX share block instances among all their pipelines."""
    make(kind.tsam, kind.components)
    assert "alpha" not in make(kind.stock, kind.components).blocks.input_names


def test_sdxls_t_is_the_mean_over_both_encoders_as_they_are_published():
    """Whose second tokenizer pads with another token, and whose configs name another <eos> than the tokenizers'."""
    components = SDXL.build()
    tokenizer = components["tokenizer_2"] = tiny_tokenizer()
    tokenizer.pad_token = "!"
    for encoder in (components["text_encoder"], components["text_encoder_2"]):
        encoder.config.eos_token_id = 2
    text = run(make(SDXL.tsam, components)).text_self_attention
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


@torch.no_grad()
def test_animas_t_is_its_conditioners_among_the_t5_tokens_of_the_prompt():
    """By the weights, one layer after another: what they give to Qwen3's tokens is not in it, nor any padding."""
    blocks, given = ANIMA.components["text_conditioner"].blocks, []
    with ExitStack() as stack:
        for block in blocks:
            given.append(stack.enter_context(calls_of(block.self_attn)))
        state = run(make(ANIMA.tsam, ANIMA.components), [PROMPT, SHORT])
    text, own = state.text_self_attention, state.t5_attention_mask.bool()[:, None, None]
    layers = [
        rotated_scores(block.self_attn, calls[0]).masked_fill(~own, -torch.inf).softmax(-1).mean(1)
        for block, calls in zip(blocks, given)
    ]
    mean, number = torch.stack(layers).mean(0), own.shape[-1]
    torch.testing.assert_close(text.attention[:, :number, :number], ((mean + mean.mT) / 2).tril())
    assert text.tokens == [PROMPT.split(), SHORT.split()] and text.attention.shape[1] == state.prompt_embeds.shape[1]
    assert text.content[1].nonzero().flatten().tolist() == [0, 1, 2]


def rotated_scores(attn, call):
    """q kᵀ/√d of the conditioner's self-attention, of two heads of 8 channels."""
    ((hidden,), given) = call
    cosine, sine = (part[..., None, :] for part in given["position_embeddings"])

    def turned(linear, norm):
        x = norm(linear(hidden).unflatten(-1, (2, 8)))
        one, other = x.chunk(2, -1)
        return x * cosine + torch.cat([-other, one], -1) * sine

    return torch.einsum("bqhc,bkhc->bhqk", turned(attn.q_proj, attn.q_norm), turned(attn.k_proj, attn.k_norm)) / 8**0.5


def test_sd3s_t_is_t5s_behind_clips_columns_and_without_t5_clips():
    kind = SD3
    with_t5 = run(make(kind.tsam, kind.components)).text_self_attention
    assert with_t5.content[0].nonzero().flatten().tolist() == list(range(77, 77 + 7))
    pipe = make(kind.tsam, {**kind.components, "text_encoder_3": None, "tokenizer_3": None})
    state = run(pipe)
    text = state.text_self_attention
    assert text.content[0].nonzero().flatten().tolist() == list(range(1, 8)) and text.attention.shape == (1, 93, 93)
    assert state.losses[0, 2] < state.losses[0, 0]
    ids = kind.components["tokenizer"](PROMPT, padding="max_length", return_tensors="pt").input_ids[0]
    clips = [oracle.clip_self_attention(kind.components[f"text_encoder{name}"], ids) for name in ("", "_2")]
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
    "anima": lambda model: {
        "layers": [block.attn2 for block in model.transformer_blocks[1:3]],
        "grid": (8, 8),
    },
}


@pytest.mark.parametrize("keys", ["text", "all"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_draw_what_the_same_updates_behind_a_classic_pipelines_back_draw(name, keys):
    kind, cross = BLOCKS[name], name in ("sdxl", "anima")
    places, options = PLACES[name](kind.components[kind.denoiser]), {"gamma": 3.0, "alpha": kind.alpha}
    if not cross:
        options |= {"attention_keys": keys, "attention_layers": (1, 2) if name == "sd3" else (1, 3)}
        places |= {"keys": None} if keys == "all" else {}
    elif keys == "all":
        pytest.skip("cross-attention has no other keys")
    prompts = [PROMPT, SHORT]
    pipe = make(kind.tsam, kind.components)
    state = run(pipe, prompts, refinement_steps=[0], generator=generators(2), **options)
    if name == "anima":  # whose stock blocks ask the denoiser twice a step
        classic, call = make(kind.stock, kind.components), {**kind.call, "num_inference_steps": 4}
    else:
        classic = getattr(diffusers, kind.classic)(**{**kind.components, "scheduler": copy(pipe.scheduler)})
        classic.set_progress_bar_config(disable=True)
        call = {"guidance_scale": pipe.guider.guidance_scale} if name != "flux" else {}
        call |= {**kind.call, "num_inference_steps": 4, "output_type": "latent"}
    model, texts = kind.components[kind.denoiser], texts_of(state.text_self_attention, 3.0)
    with attached(classic, model, texts=texts, alpha=kind.alpha, updates=UPDATES, **places) as losses:
        expected = classic(prompt=prompts, generator=generators(2), **call)
    expected, ours = expected.latents if name == "anima" else expected.images, state.images
    if name == "flux":
        expected = classic._unpack_latents(expected, 32, 32, classic.vae_scale_factor)
    torch.testing.assert_close(state.losses.double(), torch.stack(losses, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_our_classic_loop_draws_what_the_second_implementation_draws(scheduler):
    kind = KINDS["sd"]
    ours, theirs = (make(cls, kind.components) for cls in (kind.tsam, kind.stock))
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


def pair(components, workflow="text2image", kind=SDXL):
    """Stock's and T-SAM's."""
    return [make(blocks, components, workflow) for blocks in (kind.stock, kind.tsam)]


def held(stock, pipe, **options):
    return holds(pipe, stock=stock, **{"num_inference_steps": 4, **options})


# With skipped layers and perturbed attention stock SD3 fails.
@pytest.mark.parametrize("kind, guider", [*((SDXL, guider) for guider in GUIDERS), (SD3, "APG"), (ANIMA, "APG")])
def test_every_guider_goes_with_guidance(kind, guider):
    """Their first call, the conditional one, is what is read: the losses are those of classifier-free guidance."""
    pipes = pair(kind.components, kind=kind)
    plain = run(pipes[1], alpha=kind.alpha)
    for pipe in pipes:
        pipe.update_components(guider=GUIDERS[guider]())
    state = held(*pipes, num_inference_steps=2)
    torch.testing.assert_close(state.losses[0, :3], plain.losses[0, :3], rtol=1e-4, atol=1e-4)
    if kind is SDXL:  # of a seed whose first start is better: it meets the guider as new
        chosen = run(pipes[1], seed=3, tsam_steps=0, candidates=2, candidate_steps=3)
        assert chosen.chosen == 0 and torch.equal(chosen.images, run(pipes[1], seed=3, tsam_steps=0).images)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
OF_FLOWS = [
    (SD3, diffusers.FlowMatchHeunDiscreteScheduler, {}),
    (SD3, diffusers.UniPCMultistepScheduler, FLOW),
    (SD3, diffusers.DPMSolverMultistepScheduler, FLOW),
    (FLUX, diffusers.UniPCMultistepScheduler, FLOW),  # stock FLUX and Anima fail with the others
    (ANIMA, diffusers.UniPCMultistepScheduler, FLOW),
]


@pytest.mark.parametrize("kind, scheduler, flow", [*((SDXL, each, None) for each in SCHEDULERS), *OF_FLOWS])
def test_one_alpha_guides_under_every_scheduler(kind, scheduler, flow):
    latents = []
    for options in ({"alpha": 0}, {"tsam_steps": 0}, {"alpha": max(30.0, kind.alpha), "refinement_steps": [0]}):
        pipe = make(kind.tsam, kind.components)  # a guider keeps its step between calls of stock, which then may fail
        if flow is None:
            use(scheduler, pipe)
        else:
            pipe.update_components(scheduler=scheduler(**flow))
        state = run(pipe, **options)
        latents.append(state.images)
    assert torch.equal(*latents[:2]) and latents[2].isfinite().all()
    assert state.losses.shape == (1, 4) and state.losses[0, 2] < state.losses[0, 0]


PICTURE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
MASK = torch.zeros(1, 1, 64, 64)
MASK[..., 32:] = 1


def test_an_image_is_changed_and_only_the_steps_that_are_left_count(kind):
    image = PICTURE if kind is SDXL else PICTURE[..., :32, :32] / 2 + 0.5
    workflow = "img2img" if kind is ANIMA else "image2image"
    pipes, options = pair(kind.components, workflow, kind), {"image": image, "num_inference_steps": 10}
    state = held(*pipes, strength=0.6, **options)
    assert state.losses.shape == (1, 3 + 2 * 3)  # of six steps left three; each of 0, 1 and 2 refines
    assert run(pipes[1], strength=0.5, tsam_steps=0, **options).losses.shape == (1, 0)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_goes_with_guidance_by_either_kind_of_unet(channels):
    components = SDXL.components if channels == 4 else tiny_sdxl_components(in_channels=9)
    pipes = pair(components, "inpainting")
    state = held(*pipes, image=PICTURE, mask_image=MASK, strength=0.9)
    if channels == 4:  # outside of the mask the picture's own latents remain
        expected = run(pipes[0], image=PICTURE, mask_image=MASK, strength=0.9).images
        assert torch.equal(state.images[..., :16], expected[..., :16])


def test_a_controlnet_holds_guided_pictures_too():
    torch.manual_seed(1)
    controlnet = diffusers.ControlNetModel.from_unet(
        SDXL.components["unet"], conditioning_embedding_out_channels=(8, 8)
    ).eval()
    for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(layer.weight, std=0.3)
    pipes = pair({**SDXL.components, "controlnet": controlnet}, "controlnet_text2image")
    options = {"control_image": PICTURE / 2 + 0.5}
    state = held(*pipes, **options)
    other = run(pipes[1], alpha=10.0, **options, controlnet_conditioning_scale=0.1)
    assert (state.losses - other.losses).abs().max() > 1e-3  # what is read is under its influence


def test_a_lora_acts_at_its_scale_and_unloaded_as_if_it_never_was():
    pytest.importorskip("peft")
    components = SDXL.build()
    pipes = pair(components)
    plain = run(pipes[1], alpha=10.0)
    pipes[1].load_lora_weights(lora_of(pipes[1], ["unet"]), adapter_name="one")
    full = held(*pipes)
    assert (full.losses - plain.losses).abs().max() > 1e-3
    none = run(pipes[1], alpha=10.0, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(none.losses, plain.losses, rtol=1e-3, atol=1e-3)
    pipes[1].unload_lora_weights()
    assert torch.equal(run(pipes[1], alpha=10.0).images, plain.images)


def test_an_ip_adapter_acts_with_guidance_on_as_in_stock_without():
    components = SDXL.build()
    components["image_encoder"] = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
    pipes = pair(components, "ip_adapter_text2image")
    for pipe in pipes:
        pipe.feature_extractor = CLIPImageProcessor(size=16, crop_size=16)
    plain = run(make(SDXL.tsam, components), alpha=10.0)
    pipes[1].load_ip_adapter(ip_adapter_of(components["unet"]), subfolder="", weight_name="")
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    state = held(*pipes, ip_adapter_image=Image.fromarray(image))
    assert (state.losses - plain.losses).abs().max() > 1e-3


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
torch.save([state.latents, state.losses], "drawn.pt")
"""


@pytest.mark.slow
def test_blocks_saved_to_a_folder_draw_in_a_fresh_process_with_nothing_installed_the_same(kind, tmp_path):
    pipe = make(kind.tsam, kind.components)
    pipe.save_pretrained(str(tmp_path / "weights"), overwrite_modular_index=True)
    pipe.blocks.save_pretrained(tmp_path / "code")
    assert {path.name for path in (tmp_path / "code").iterdir()} == {*CODE, "modular_config.json"}
    call = {"output_type": "latent", **kind.call, "prompt": PROMPT, "num_inference_steps": 2}
    arguments = str(tmp_path / "code"), str(tmp_path / "weights"), call
    run_fresh(tmp_path, NOTHING_INSTALLED + LOAD.format(arguments=arguments))
    state = pipe(generator=torch.Generator().manual_seed(0), **call)
    for name, drawn in zip(("latents", "losses"), torch.load(tmp_path / "drawn.pt")):
        torch.testing.assert_close(drawn, state.get(name), rtol=1e-4, atol=1e-3)  # another process rounds otherwise


def test_a_folder_that_would_lose_t_sam_says_so_and_with_the_code_it_does_not(kind, tmp_path, warnings_seen):
    folder = str(tmp_path / "saved")
    pipe = make(kind.tsam, kind.components)
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    assert (
        f"has no code of T-SAM: loaded as it is, it draws without. Load it by `{kind.tsam.__name__}()"
        in warnings_seen.text
    )
    again = diffusers.ModularPipeline.from_pretrained(folder)
    assert type(again) is type(make(kind.stock, kind.components)) and "alpha" not in again.blocks.input_names
    again = kind.tsam().init_pipeline(folder)
    again.load_components(names=[kind.denoiser])
    assert "alpha" in again.blocks.input_names and getattr(again, kind.denoiser) is not None
    pipe.blocks.save_pretrained(folder)
    again = diffusers.ModularPipeline.from_pretrained(folder, trust_remote_code=True, workflow="text2image")
    assert type(again.blocks).__name__ == kind.tsam.__name__ and "alpha" in again.blocks.input_names


def test_a_pipeline_that_the_blocks_did_not_make_says_so_after_its_first_picture(tmp_path, warnings_seen):
    """As those that `ModularPipeline.from_pretrained` makes of a repository's blocks."""
    pipe = diffusers.StableDiffusionXLModularPipeline(blocks=SDXL.tsam().get_workflow("text2image"))
    pipe.update_components(**SDXL.components)
    pipe.set_progress_bar_config(disable=True)
    run(pipe, num_inference_steps=1)
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    assert "has no code of T-SAM" in warnings_seen.text


def test_blocks_of_a_diffusers_whose_loops_take_other_steps_are_refused(monkeypatch):
    monkeypatch.setattr(LoopSequentialPipelineBlocks, "loop_step", lambda self, block_state, iteration: None)
    with pytest.raises(RuntimeError, match="found no denoising loop that takes steps as in diffusers 0.42"):
        BLOCKS["sdxl"].tsam()


def test_a_loop_walks_over_the_weights_as_often_whatever_the_number_of_steps(monkeypatch):
    kind, walks = BLOCKS["sd3"], []
    pipe, walk = make(kind.tsam, kind.components), torch.nn.Module.named_parameters
    monkeypatch.setattr(
        torch.nn.Module, "named_parameters", lambda *args, **kwargs: walks.append(1) or walk(*args, **kwargs)
    )
    counts = []
    for steps in (2, 5):
        walks.clear()
        run(pipe, num_inference_steps=steps, tsam_steps=steps, refinement_steps=())
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0

"""T-SAM as modular blocks: SDXL, SD3 and FLUX, against stock blocks and against a second way to guide stock
pipelines."""

import functools
import pickle
from copy import copy, deepcopy

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, SequentialPipelineBlocks
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import oracle
from attached import Seen, attached, attention_maps
from diffusers_tsam.attention_processors import record_joint_attention
from kinds import ALL, BLOCKS, IMAGE, MASK, PROMPT, SCHEDULERS, SHORT, calls_of, denoiser_of, generators, make, run, use
from test_compatibility import VISION, holds, ip_adapter_of, lora_of
from tiny import tiny_flux_components, tiny_sd3_components, tiny_sdxl_components, tiny_tokenizer


SD, (SDXL, SD3, FLUX, ANIMA) = ALL["sd"], BLOCKS.values()


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
    "names, options, error, message",
    [
        (BLOCKS, {"tsam_steps": 5}, ValueError, "`tsam_steps` is 5, but there are only 4 denoising steps"),
        (["sdxl"], {"attention_resolution": 7}, ValueError, "`attention_resolution` is 7, but .* grids of 8, 16"),
        (["sdxl"], {"prompt_2": f"{PROMPT} on the table"}, ValueError, "`prompt_2` has other tokens than `prompt`"),
        (["sdxl"], {"prompt_2": SHORT}, ValueError, "`prompt_2` has other tokens than `prompt`"),
        (["sd3", "anima"], {"attention_layers": (2, 4)}, ValueError, r"is \(2, 4\), .* 4 blocks, 0 to 3. .*\(1, 2\)"),
        (["flux"], {"attention_layers": 3}, TypeError, "`attention_layers` has to be two integers but is 3"),
        (["flux"], {"attention_keys": "image"}, ValueError, "`attention_keys` is 'image', but has to be one of 'text'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_denoiser_runs(names, options, error, message):
    for kind in map(BLOCKS.get, names):
        pipe = make(kind.tsam, kind.components)
        with calls_of(denoiser_of(pipe)) as calls, pytest.raises(error, match=message):
            run(pipe, **options)
        assert not calls


def test_without_a_denoiser_every_call_is_refused(kind, pipe):
    pipe.update_components(**{kind.denoiser: None})
    with pytest.raises(ValueError, match=f"This pipeline has no `{kind.denoiser}` and cannot draw."):
        run(pipe, tsam_steps=0)


def test_without_its_text_step_a_pipeline_asks_for_t_and_takes_it(kind):
    blocks, components = kind.tsam().get_workflow("text2image"), kind.components
    names = [name for name in ("text_encoder", "denoise.text_conditioning") if name in blocks.sub_blocks]  # Anima's two
    steps = SequentialPipelineBlocks.from_blocks_dict({name: blocks.sub_blocks.pop(name) for name in names})
    pipe, encoder = blocks.init_pipeline(), steps.init_pipeline()
    used = {name: components[name] for name in (kind.denoiser, "vae")}
    pipe.update_components(**used, scheduler=copy(components["scheduler"]))
    encoder.update_components(**{n: part for n, part in components.items() if n in encoder.pretrained_component_names})
    given = {name: value for name, value in kind.call.items() if name in encoder.blocks.input_names}
    found = encoder(**given | {"prompt": PROMPT})
    text = found.get("text_self_attention")
    names = [name for name in pipe.blocks.input_names if name is not None and name.endswith("embeds")]
    call = {name: found.get(name) for name in names if found.get(name) is not None} | {"alpha": kind.alpha}
    state = run(pipe, None, text_self_attention=text, **call)
    assert torch.equal(state.images, run(make(kind.tsam, components), alpha=kind.alpha).images)
    for wrong, error, message in (
        (None, ValueError, "T is not known, since no text step of T-SAM ran"),
        ("T", TypeError, "`text_self_attention` is <class 'str'>. Pass what"),
        (text._replace(tokens=[]), ValueError, "and 0 lists of tokens, but these prompts"),
    ):
        with calls_of(denoiser_of(pipe)) as calls, pytest.raises(error, match=message):
            run(pipe, None, text_self_attention=wrong, **call)
        assert not calls
    run(pipe, None, tsam_steps=0, **call)


@pytest.mark.parametrize("kind", [SDXL, ALL["sdxl-pipeline"]], ids=["blocks", "pipeline"])
def test_sdxls_t_is_the_mean_over_both_encoders_as_they_are_published(kind):
    """Whose second tokenizer pads with another token, and whose configs name another <eos> than the tokenizers'."""
    components = kind.build()
    tokenizer = components["tokenizer_2"] = tiny_tokenizer()
    tokenizer.pad_token = "!"
    for encoder in (components["text_encoder"], components["text_encoder_2"]):
        encoder.config.eos_token_id = 2
    pipe = make(kind.tsam, components)
    text = run(pipe).text_self_attention if kind is SDXL else pipe.get_text_self_attention(PROMPT)
    assert text.tokens == [PROMPT.split()]
    expected = 0
    for name in ("", "_2"):
        ids = components[f"tokenizer{name}"](PROMPT, padding="max_length", return_tensors="pt").input_ids[0]
        expected = expected + oracle.clip_self_attention(components[f"text_encoder{name}"], ids) / 2
    own = text.content[0]
    torch.testing.assert_close(text.attention[0][own].double(), expected[own], rtol=1e-4, atol=1e-5)


def test_a_refiner_has_one_text_encoder():
    components = {**SDXL.build(), "text_encoder": None, "tokenizer": None}
    blocks = SDXL.tsam()
    step = blocks.sub_blocks["text_encoder"].init_pipeline()
    step.update_components(**{name: value for name, value in components.items() if "_2" in name or "text" in name})
    assert step(prompt=SHORT).get("text_self_attention").tokens == [SHORT.split()]


@torch.no_grad()
def test_animas_t_is_its_conditioners_among_the_t5_tokens_of_the_prompt():
    """What they give to Qwen3's tokens is not in it, nor any padding."""
    layers = [block.self_attn for block in ANIMA.components["text_conditioner"].blocks]
    with Seen(layers) as seen:
        state = run(make(ANIMA.tsam, ANIMA.components), [PROMPT, SHORT])
    text, own = state.text_self_attention, state.t5_attention_mask.bool()[:, None, None]
    scores = torch.stack([query @ key.mT / query.shape[-1] ** 0.5 for query, key in seen.pairs[: len(layers)]])
    mean, number = scores.masked_fill(~own, -torch.inf).softmax(-1).mean((0, 2)), own.shape[-1]
    torch.testing.assert_close(text.attention[:, :number, :number], ((mean + mean.mT) / 2).tril())
    assert text.tokens == [PROMPT.split(), SHORT.split()] and text.attention.shape[1] == state.prompt_embeds.shape[1]
    assert text.content[1].nonzero().flatten().tolist() == [0, 1, 2]


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


def places_of(kind):
    """Where the second implementation looks. SD3's text is CLIP's 77 columns and T5's 16; FLUX's 16 come first."""
    model = kind.components[kind.denoiser]
    if kind.denoiser == "unet":
        attentions = *model.down_blocks[-1].attentions, *model.mid_block.attentions, *model.up_blocks[0].attentions
        return {"layers": [attention.transformer_blocks[0].attn2 for attention in attentions]}
    blocks = model.transformer_blocks[1:3]
    if kind is ANIMA:
        return {"layers": [block.attn2 for block in blocks]}
    if kind is SD3:
        rows, columns = slice(0, 64), slice(64, None)
    else:
        blocks = model.transformer_blocks[1], *model.single_transformer_blocks[:2]
        rows, columns = slice(16, None), slice(0, 16)
    return {"layers": [block.attn for block in blocks], "rows": rows, "columns": columns}


@pytest.mark.parametrize(
    "kind, scheduler, keys",
    [
        *((SD, name, None) for name in ("DDIM", "EulerDiscrete", "DPMSolverMultistep")),
        *((kind, None, None) for kind in (SDXL, ANIMA)),
        *((kind, None, keys) for kind in (SD3, FLUX) for keys in ("text", "all")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_we_draw_what_the_same_updates_behind_a_stock_pipelines_back_draw(kind, scheduler, keys):
    prompts, options, call = [PROMPT, SHORT], {"gamma": 3.0, "alpha": kind.alpha}, {}
    pipe, places = make(kind.tsam, kind.components), places_of(kind)
    if scheduler:
        use(getattr(diffusers, f"{scheduler}Scheduler"), pipe)
    if keys:
        options |= {"attention_keys": keys, "attention_layers": (1, 2) if kind is SD3 else (1, 3)}
        places["all_keys"] = keys == "all"
    output = run(pipe, prompts, refinement_steps=[0], generator=generators(2), **options)
    text = pipe.get_text_self_attention(prompts) if kind is SD else output.text_self_attention
    if kind in (SD, ANIMA):  # Anima has no classic pipeline; its stock blocks ask the denoiser twice a step
        stock = make(kind.stock, {**kind.components, "scheduler": pipe.scheduler})
    else:
        stock = getattr(diffusers, kind.classic)(**{**kind.components, "scheduler": copy(pipe.scheduler)})
        stock.set_progress_bar_config(disable=True)
        call = {} if kind is FLUX else {"guidance_scale": pipe.guider.guidance_scale}
    call |= {"num_inference_steps": 4, "output_type": "latent", **kind.call}
    own = {"texts": texts_of(text, 3.0), "alpha": kind.alpha, "updates": UPDATES, "grid": kind.grid}
    with attached(stock, kind.components[kind.denoiser], **own, **places) as losses:
        expected = stock(prompt=prompts, generator=generators(2), **call)
    expected = expected.latents if kind is ANIMA else expected.images
    if kind is FLUX:
        expected = stock._unpack_latents(expected, 32, 32, stock.vae_scale_factor)
    torch.testing.assert_close(output.losses.double(), torch.stack(losses, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output.images, expected, rtol=2e-3, atol=2e-3)


# ----------------------------------------------------------------------------------------------------------------------
# SDXL: guiders, workflows, adapters


LAYER = functools.partial(diffusers.LayerSkipConfig, fqn="mid_block.attentions.0.transformer_blocks", indices=[0])
SKIP = {"skip_layer_guidance_start": 0, "skip_layer_guidance_stop": 1.0}
PERTURB = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
GUIDERS = {
    "no guidance": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=1.0),
    "from the second step on": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.3),
    "APG": lambda: diffusers.AdaptiveProjectedGuidance(guidance_scale=4.0),
    "APG mix": lambda: diffusers.AdaptiveProjectedMixGuidance(guidance_scale=4.0),
    "zero star": lambda: diffusers.ClassifierFreeZeroStarGuidance(guidance_scale=4.0, zero_init_steps=1),
    "tangential": lambda: diffusers.TangentialClassifierFreeGuidance(guidance_scale=4.0),
    "skipped layer": lambda: diffusers.SkipLayerGuidance(skip_layer_config=LAYER(), **SKIP),
    "auto": lambda: diffusers.AutoGuidance(auto_guidance_config=LAYER()),
    "PAG": lambda: diffusers.PerturbedAttentionGuidance(perturbed_guidance_config=LAYER(), **PERTURB),
}


def pair(components, workflow="text2image", kind=SDXL):
    """Stock's and T-SAM's."""
    return [make(blocks, components, workflow) for blocks in (kind.stock, kind.tsam)]


def pair_of(kind, workflow, channels=4):
    """Stock's and T-SAM's of a workflow, and the pictures that their calls take."""
    components = kind.components if channels == 4 else tiny_sdxl_components(in_channels=channels)
    given = {"image": IMAGE}
    if workflow == "inpainting":
        given["mask_image"] = MASK
    if workflow == "controlnet_text2image":
        torch.manual_seed(1)
        net = diffusers.ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(8, 8)).eval()
        for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
            torch.nn.init.normal_(layer.weight, std=0.3)
        components, given = components | {"controlnet": net}, {"control_image": IMAGE}
    return pair(components, workflow, kind), given


def held(stock, pipe, **options):
    return holds(pipe, stock=stock, **{"num_inference_steps": 4, **options})


# With skipped layers and perturbed attention stock SD3 fails.
@pytest.mark.parametrize("kind, guider", [*((SDXL, guider) for guider in GUIDERS), (SD3, "APG"), (ANIMA, "APG")])
def test_every_guider_goes_with_guidance(kind, guider):
    """Their first call, the conditional one, is what is read: the losses are those of classifier-free guidance."""
    pipes = pair(kind.components, kind=kind)
    plain = run(pipes[1], alpha=kind.alpha, num_inference_steps=2)
    for pipe in pipes:
        pipe.update_components(guider=GUIDERS[guider]())
    state = held(*pipes, num_inference_steps=2)
    torch.testing.assert_close(state.losses[0, :3], plain.losses[0, :3], rtol=1e-4, atol=1e-4)
    if kind is SDXL:  # of equal starts the first is chosen, and meets the guider as new
        alone, equal = plain.images, plain.images.repeat(2, 1, 1, 1)
        chosen = run(pipes[1], latents=equal, tsam_steps=0, candidates=2, candidate_steps=3)
        assert chosen.chosen == 0
        assert torch.equal(chosen.images, run(pipes[1], latents=alone, tsam_steps=0).images)


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


def test_an_image_is_changed_and_only_the_steps_that_are_left_count(kind):
    pipes, given = pair_of(kind, "img2img" if kind is ANIMA else "image2image")
    state = held(*pipes, strength=0.6, num_inference_steps=10, **given)
    assert state.losses.shape == (1, 3 + 2 * 3)  # of six steps left three; each of 0, 1 and 2 refines
    off = run(pipes[1], strength=0.5, tsam_steps=0, num_inference_steps=10, **given)
    assert off.losses.shape == (1, 0)
    few = {"strength": 0.05, "num_inference_steps": 10, **given}  # none of SDXL's
    assert run(pipes[1], candidates=2, **few).images.shape == run(pipes[0], **few).images.shape


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting_goes_with_guidance_by_either_kind_of_unet(channels):
    pipes, given = pair_of(SDXL, "inpainting", channels)
    state = held(*pipes, strength=0.9, **given)
    if channels == 4:  # outside of the mask the picture's own latents remain
        expected = run(pipes[0], strength=0.9, **given).images
        assert torch.equal(state.images[..., 16:], expected[..., 16:])


def test_a_controlnet_holds_guided_pictures_too():
    pipes, given = pair_of(SDXL, "controlnet_text2image")
    state = held(*pipes, **given)
    other = run(pipes[1], alpha=10.0, **given, controlnet_conditioning_scale=0.1)
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
# Joint attention


@pytest.mark.parametrize("all_keys", [False, True], ids=["text", "all"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_is_read_as_it_is_computed(name, all_keys):
    """SD3's queries and keys are normalised here, FLUX has two kinds of block."""
    torch.manual_seed(2)
    components = tiny_sd3_components(qk_norm="rms_norm") if name == "sd3" else tiny_flux_components()
    model = components["transformer"].double()
    for parameter in (value for key, value in model.named_parameters() if "norm_" in key and "linear" not in key):
        torch.nn.init.normal_(parameter, 1.0, 0.2)
    layers = [block.attn for block in (*model.transformer_blocks, *getattr(model, "single_transformer_blocks", []))]
    number, side, width = 5, 6, 24
    given = {"encoder_hidden_states": torch.randn(1, number, width).double()}
    given |= {"pooled_projections": torch.randn(1, width if name == "sd3" else 16).double(), "return_dict": False}
    rows, columns = slice(0, side**2), slice(side**2, None)
    if name == "sd3":
        given |= {"hidden_states": torch.randn(1, 4, 2 * side, 2 * side).double(), "timestep": torch.tensor([500.0])}
    else:
        grid = torch.stack(torch.meshgrid(torch.zeros(1), *[torch.arange(float(side))] * 2, indexing="ij"), -1)
        given |= {"hidden_states": torch.randn(1, side**2, 16).double(), "timestep": torch.tensor([0.5]).double()}
        given |= {"img_ids": grid.reshape(-1, 3), "txt_ids": torch.zeros(number, 3)}
        rows, columns = slice(number, None), slice(0, number)
    with torch.no_grad(), record_joint_attention(layers, 3, number, all_keys) as maps, Seen(layers) as seen:
        model(**given)
    assert sorted(maps) == list(range(len(layers))) and not any(layer._forward_pre_hooks for layer in layers)
    for (_, found), pair in zip(sorted(maps.items()), seen.pairs, strict=True):
        expected = attention_maps([pair], rows, columns, all_keys)[..., :3]
        assert found.dtype == torch.float32 and found.shape == (1, side**2, 3)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Saving and loading


def test_a_folder_that_would_lose_t_sam_says_so_and_with_the_code_it_does_not(kind, tmp_path, warnings_seen):
    folder = str(tmp_path / "saved")
    pipe = make(kind.tsam, kind.components)
    pipe.save_pretrained(folder, overwrite_modular_index=True)
    said = f"has no code of T-SAM: loaded as it is, it draws without. Load it by `{kind.tsam.__name__}()"
    assert said in warnings_seen.text
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


def test_a_pipeline_can_be_copied_and_pickled(kind):
    pipe = make(kind.tsam, kind.build())  # new, because transformers leaves hooks in a used encoder, which cannot be
    again, copied = pickle.loads(pickle.dumps(pipe)), deepcopy(pipe)
    assert type(again).__name__ == type(pipe).__name__
    images, *others = (run(one, num_inference_steps=2).images for one in (pipe, again, copied))
    assert all(torch.equal(images, other) for other in others)


def test_blocks_of_a_diffusers_whose_loops_take_other_steps_are_refused(monkeypatch):
    monkeypatch.setattr(LoopSequentialPipelineBlocks, "loop_step", lambda self, block_state, iteration: None)
    with pytest.raises(RuntimeError, match="found no denoising loop that takes steps as in diffusers 0.42"):
        BLOCKS["sdxl"].tsam()


def test_a_loop_walks_over_the_weights_as_often_whatever_the_number_of_steps(monkeypatch):
    kind, walks = BLOCKS["sd3"], []
    pipe, walk, counts = make(kind.tsam, kind.components), torch.nn.Module.named_parameters, []
    counted = lambda *args, **kwargs: walks.append(1) or walk(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "named_parameters", counted)
    for steps in (2, 5):
        walks.clear()
        run(pipe, num_inference_steps=steps, tsam_steps=steps, refinement_steps=())
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0

"""What diffusers, peft and torch add to a pipeline acts beside guidance, and without guidance is stock's to the bit."""

import copy
import functools
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from time import sleep

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor2_0
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_tsam.attention_processors import LastMapRecorded, lock_of, record_cross_attention
from diffusers_tsam.comparing import compare
from kinds import (
    BLOCKS,
    KINDS,
    PROMPT,
    SHORT,
    calls_of,
    conditions_of,
    denoiser_of,
    every,
    generators,
    kind_of,
    layers_of,
    make,
    models_of,
    run,
    state_of,
)
from test_loading import custom


SD = KINDS["sd"]
THING = "a red <thing> and a blue sphere"
CPU = torch.device("cpu")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
STEPS = {"num_inference_steps": 2}  # one is guided, with two more updates
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8, "projection_dim": 12}


@pytest.fixture
def pipe(own):
    """What is added to its components stays with it."""
    return own


@pytest.fixture
def of_sd():
    """What only Stable Diffusion has."""
    return make(SD.tsam, SD.build())


@functools.cache
def plainly_guided(kind, **options):
    """What everything else is compared with: the same weights without anything added."""
    return guided(make(kind.tsam, kind.components), **options)


def components_of(pipe):
    """Without a guider, which has a state."""
    return {name: component for name, component in pipe.components.items() if name != "guider"}


def plain(pipe, prompt=PROMPT, stock=None, **options):
    """What stock draws with the same components."""
    return run(stock or make(kind_of(pipe).stock, components_of(pipe)), prompt, **STEPS | options)


def off(pipe, prompt=PROMPT, **options):
    return run(pipe, prompt, **STEPS | {"tsam_steps": 0} | options)


def guided(pipe, prompt=PROMPT, **options):
    return run(pipe, prompt, **STEPS | {"alpha": kind_of(pipe).alpha} | options)


def holds(pipe, without=None, prompt=PROMPT, stock=None, **options):
    """The guided output with a feature that is on: off it is stock's, guidance acts, and it differs from `without`."""
    theirs = plain(pipe, prompt, stock, **options).images
    before = state_of(pipe)
    assert torch.equal(off(pipe, prompt, **options).images, theirs)
    output = guided(pipe, prompt, **options)
    assert output.losses[0, 2] < output.losses[0, 0]
    assert output.images.isfinite().all() and output.images.dtype == theirs.dtype and differ(output.images, theirs)
    assert without is None or differ(output.images, without.images)
    assert state_of(pipe) == before
    return output


def differ(one, other):
    """More than what rounding becomes in a few steps of a random model."""
    return not torch.allclose(one, other, rtol=0.05, atol=0.05)


def same(output, expected):
    torch.testing.assert_close(output.losses, expected.losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.images, expected.images, rtol=5e-3, atol=5e-3)


def lora_of(pipe, models=("unet", "text_encoder"), rank=2):
    """A LoRA of these models, as a file of one holds it."""
    state = {}
    for prefix in models:
        for name, module in getattr(pipe, prefix).named_modules():
            if name.endswith(("to_q", "to_k", "to_v", "q_proj", "k_proj")):
                wide, narrow = module.out_features, module.in_features
                state[f"{prefix}.{name}.lora_A.weight"] = torch.randn(rank, narrow)
                state[f"{prefix}.{name}.lora_B.weight"] = torch.randn(wide, rank) / 16
    return state


class TestLora:
    @pytest.fixture
    def pipe(self, of_sd):
        pytest.importorskip("peft")
        of_sd.load_lora_weights(lora_of(of_sd), adapter_name="one")
        return of_sd

    def test_it_acts_at_the_scale_of_the_call_or_of_the_adapter_and_two_are_weighed(self, pipe):
        one = holds(pipe, plainly_guided(SD))
        half = holds(pipe, one, cross_attention_kwargs={"scale": 0.5})
        same(guided(pipe, cross_attention_kwargs={"scale": 0.0}), plainly_guided(SD))
        pipe.set_adapters("one", 0.5)
        same(guided(pipe), half)
        pipe.load_lora_weights(lora_of(pipe), adapter_name="two")
        pipe.set_adapters(["one", "two"], [1.0, 0.0])
        same(guided(pipe), one)
        pipe.set_adapters(["one", "two"], [0.5, 0.5])
        holds(pipe, one)

    def test_fused_it_guides_to_the_same_and_unloaded_as_if_it_never_was(self, pipe):
        unfused = guided(pipe)
        pipe.fuse_lora()
        same(holds(pipe, plainly_guided(SD)), unfused)
        pipe.unfuse_lora()
        same(guided(pipe), unfused)
        pipe.unload_lora_weights()
        same(guided(pipe), plainly_guided(SD))

    def test_t_is_read_with_the_text_encoders_lora_at_the_calls_scale(self, pipe):
        half = {"cross_attention_kwargs": {"scale": 0.5}}
        texts = {scale: pipe.get_text_self_attention(PROMPT, lora_scale=scale) for scale in (None, 0.5)}
        losses = {scale: guided(pipe, text_self_attention=text, **half).losses for scale, text in texts.items()}
        assert torch.equal(guided(pipe, **half).losses, losses[0.5])
        assert (losses[None] - losses[0.5]).abs().min() > 1e-2
        pipe.fuse_lora(lora_scale=0.5)
        torch.testing.assert_close(pipe.get_text_self_attention(PROMPT).attention, texts[0.5].attention)

    @pytest.mark.parametrize("kind", ["pixart"], indirect=True)
    def test_pixarts_is_pefts_own(self, own):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        own.transformer = peft.get_peft_model(own.transformer, config)
        unfused = holds(own, plainly_guided(KINDS["pixart"]))
        own.transformer.merge_adapter()
        same(holds(own), unfused)

    @pytest.mark.parametrize("change", ["load_lora_weights", "unload_lora_weights", "fuse_lora"])
    def test_a_lora_may_come_and_go_in_a_callback(self, of_sd, change):
        pytest.importorskip("peft")
        weights = [lora_of(of_sd)]
        if change != "load_lora_weights":
            of_sd.load_lora_weights(weights.pop())

        def flags():
            return {name: parameter.requires_grad for name, parameter in of_sd.unet.named_parameters()}

        def callback(pipe, step, t, tensors):
            if step == 1:
                getattr(pipe, change)(*weights)
            return tensors

        before = flags()
        output = guided(of_sd, num_inference_steps=3, tsam_steps=3, refinement_steps=(), callback_on_step_end=callback)
        assert output.images.isfinite().all() and output.losses.shape == (1, 3)
        assert all(asks == before[name] for name, asks in flags().items() if name in before)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion_is_drawn_read_and_aligned(of_sd, vectors, tmp_path):
    without = guided(of_sd, THING)
    torch.save({"<thing>": 0.5 * torch.randn(vectors, 16)}, tmp_path / "thing.bin")
    of_sd.load_textual_inversion(str(tmp_path), weight_name="thing.bin")
    output = holds(of_sd, without, THING, output_attentions=True)
    things = ["<thing>", "<thing>_1", "<thing>_2"][:vectors]
    assert output.attentions[0]["tokens"] == ["a", "red", *things, "and", "a", "blue", "sphere"]
    assert of_sd.get_text_self_attention(THING).tokens == [output.attentions[0]["tokens"]]


def test_the_projections_that_custom_diffusion_trains_are_read(of_sd):
    for layer in [layer for name, layer in of_sd.unet.named_modules() if name.endswith("attn2")]:
        layer.set_processor(CustomDiffusionAttnProcessor2_0(True, True, layer.inner_dim, layer.cross_attention_dim))
        for name in ("to_q", "to_k", "to_v", "to_out"):
            setattr(layer.processor, f"{name}_custom_diffusion", getattr(layer, name))
            setattr(layer, name, copy.deepcopy(getattr(layer, name)))
        for unused in (layer.to_q, layer.to_k):
            torch.nn.init.normal_(unused.weight)
    same(holds(of_sd), plainly_guided(SD))


def ip_adapter_of(unet):
    """An IP-Adapter of four tokens, as a file of one holds it."""
    weights, width = {}, unet.config.cross_attention_dim
    layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
    for place, layer in enumerate(layers):
        weights[f"{2 * place + 1}.to_k_ip.weight"] = torch.randn_like(layer.to_k.weight)
        weights[f"{2 * place + 1}.to_v_ip.weight"] = torch.randn_like(layer.to_v.weight)
    projection = {"proj.weight": torch.randn(4 * width, 12), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": projection, "ip_adapter": weights}


class TestIPAdapter:
    IMAGE, OTHER = np.random.default_rng(0).random((2, 16, 16, 3))
    ALPHA = {"alpha": 10.0}  # with which this adapter's loss falls
    GIVEN = {"ip_adapter_image": IMAGE, **ALPHA}

    @pytest.fixture
    def pipe(self, of_sd):
        of_sd.register_modules(
            image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval(),
            feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
        )
        of_sd.load_ip_adapter(ip_adapter_of(of_sd.unet), subfolder="", weight_name="")
        return of_sd

    def test_an_image_or_its_embeddings_act_at_their_scale_until_it_is_unloaded(self, pipe):
        full = holds(pipe, plainly_guided(SD, **self.ALPHA), **self.GIVEN)
        prepared = pipe.prepare_ip_adapter_image_embeds(self.IMAGE, None, CPU, 1, True)
        assert torch.equal(holds(pipe, ip_adapter_image_embeds=prepared, **self.ALPHA).images, full.images)
        assert differ(guided(pipe, **self.GIVEN | {"ip_adapter_image": self.OTHER}).images, full.images)
        pipe.set_ip_adapter_scale(0.5)
        holds(pipe, full, **self.GIVEN)
        pipe.set_ip_adapter_scale(0.0)
        same(guided(pipe, **self.GIVEN), plainly_guided(SD, **self.ALPHA))
        pipe.unload_ip_adapter()
        assert torch.equal(guided(pipe).images, plainly_guided(SD).images)

    def test_a_mask_is_obeyed(self, pipe):
        mask = torch.zeros(1, 1, 32, 32)
        masks = {"ip_adapter_masks": [mask]}
        same(guided(pipe, cross_attention_kwargs=masks, **self.GIVEN), plainly_guided(SD, **self.ALPHA))
        mask[..., :16] = 1
        holds(pipe, guided(pipe, **self.GIVEN), cross_attention_kwargs=masks, **self.GIVEN)

    def test_each_image_of_a_batch_has_its_prompts_own(self, pipe):
        batch = guided(pipe, [PROMPT, SHORT], generator=generators(2), **self.GIVEN)
        other, alone = (guided(pipe, prompt, seed=1, **self.GIVEN) for prompt in (PROMPT, SHORT))
        far, near = ((batch.images[1] - each.images[0]).abs().max() for each in (other, alone))
        assert near < 0.01 * far  # rounding, which these weights amplify, is far less than another prompt's T


def test_freeu_acts_with_guidance_on_and_off_again(of_sd):
    of_sd.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    holds(of_sd, plainly_guided(SD))
    of_sd.disable_freeu()
    assert torch.equal(guided(of_sd).images, plainly_guided(SD).images)


SWITCHES = {
    "fused projections": lambda pipe: denoiser_of(pipe).fuse_qkv_projections(),
    "gradient checkpointing": lambda pipe: denoiser_of(pipe).enable_gradient_checkpointing(),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing("auto" if pipe.denoiser == "unet" else "max"),
    "plain attention": lambda pipe: denoiser_of(pipe).set_attn_processor(AttnProcessor()),
    "attention backend": lambda pipe: denoiser_of(pipe).set_attention_backend("native"),
    "channels last": lambda pipe: denoiser_of(pipe).to(memory_format=torch.channels_last),
}
OF_BLOCKS = {
    "gradient checkpointing": SWITCHES["gradient checkpointing"],
    "attention backend": SWITCHES["attention backend"],
    "compiled": lambda pipe: getattr(denoiser_of(pipe), COMPILE[kind_of(pipe).name])(backend="eager"),
    "group offload": lambda pipe: denoiser_of(pipe).enable_group_offload(CPU, CPU, "leaf_level"),
}
COMPILE = {"sdxl": "compile_repeated_blocks", "sd3": "compile", "flux": "compile_repeated_blocks", "anima": "compile"}


@pytest.mark.parametrize("kind, switch", [*product(KINDS, SWITCHES), *product(BLOCKS, OF_BLOCKS)], indirect=["kind"])
def test_what_only_computes_in_another_way_guides_to_the_same(kind, pipe, switch):
    (SWITCHES | OF_BLOCKS)[switch](pipe)
    same(holds(pipe), plainly_guided(kind))


@pytest.mark.parametrize(
    "switch, calls",  # to decode two pictures
    [
        (lambda vae: vae.enable_slicing(), 2),
        (lambda vae: (vae.enable_slicing(), vae.enable_tiling()), 2 * 3 * 3),
        (lambda vae: vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32), 1),
    ],
    ids=["slices", "tiles", "casts"],
)
def test_the_vae_slices_and_tiles_what_was_guided(pipe, switch, calls):
    options = {"num_images_per_prompt": 2, "height": 32, "width": 32}
    latents = guided(pipe, **options)
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 16
    switch(pipe.vae)
    options["output_type"] = "pt"
    with calls_of(pipe.vae.decoder) as decoded:
        output = guided(pipe, **options)
    assert len(decoded) == calls and torch.equal(output.losses, latents.losses)
    with torch.no_grad():
        expected = pipe.vae.decode(latents.images / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(output.images, expected.clamp(0, 1))
    assert torch.equal(off(pipe, **options).images, plain(pipe, **options).images)


class TestSafetyChecker:
    @pytest.mark.filterwarnings("ignore:Potential NSFW")
    def test_it_blackens_what_it_flags_as_in_stock_and_losses_stay(self, of_sd):
        config = CLIPConfig(vision_config=VISION, text_config={"num_hidden_layers": 1}, projection_dim=12)
        checker, extractor = StableDiffusionSafetyChecker(config).eval(), CLIPImageProcessor(size=16, crop_size=16)
        checker.special_care_embeds_weights.data.fill_(2)  # above every cosine similarity
        of_sd.register_modules(safety_checker=checker, feature_extractor=extractor)
        options = {"prompt": [PROMPT, SHORT], "output_type": "np"}
        for flagged in (False, True):
            checker.concept_embeds_weights.data.fill_(-2 if flagged else 2)
            output, theirs = guided(of_sd, **options), plain(of_sd, **options)
            assert output.nsfw_content_detected == theirs.nsfw_content_detected == [flagged] * 2
            assert output.images.any() == theirs.images.any() == (not flagged) and output.losses.shape == (2, 3)
            assert guided(of_sd, return_dict=False, **options)[1] == [flagged] * 2


def offload_in_sequence(pipe, device, folder):
    from accelerate import cpu_offload

    if device.type != "cpu":
        return pipe.enable_sequential_cpu_offload(device=device)
    for model in models_of(pipe):  # that method takes no CPU to run on
        cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def offload_groups(offload_type, disk=False, **options):
    def enable(pipe, device, folder):
        given = {"offload_type": offload_type, "num_blocks_per_group": 1, "onload_device": device, **options}
        denoiser_of(pipe).enable_group_offload(**given, offload_to_disk_path=str(folder) if disk else None)
        if not disk:
            pipe.enable_group_offload(exclude_modules=["unet", "transformer"], **given)

    return enable


OFFLOADS = {
    "model": lambda pipe, device, folder: pipe.enable_model_cpu_offload(device=device),
    "sequential": offload_in_sequence,
    "blocks": offload_groups("block_level"),
    "leaves": offload_groups("leaf_level"),
    "blocks on disk": offload_groups("block_level", disk=True),
    "leaves on disk": offload_groups("leaf_level", disk=True),
    "streamed leaves": offload_groups("leaf_level", use_stream=True),
}
WAYS = [(way, "cpu") for way in OFFLOADS if "streamed" not in way]
WAYS += [pytest.param(way, "cuda", marks=ON_GPU) for way in OFFLOADS if "disk" not in way]


def hooks_of(pipe):
    """What offloading has hung into the models, by name."""
    modules = [module for model in models_of(pipe) for module in model.modules()]
    return [{name for name in ("_hf_hook", "_diffusers_hook") if hasattr(module, name)} for module in modules]


class TestOffload:
    @pytest.mark.parametrize("way, device", WAYS)
    def test_guidance_is_the_same_and_the_hooks_stay(self, pipe, way, device, tmp_path):
        pytest.importorskip("accelerate")
        pipe.to(device)
        expected, theirs = guided(pipe), plain(pipe).images
        pipe.to("cpu")
        OFFLOADS[way](pipe, torch.device(device), tmp_path)
        hooks, before = hooks_of(pipe), state_of(pipe)
        for output in (guided(pipe), guided(pipe)):
            same(output, expected)
            if device == "cpu" and "disk" not in way:  # where weights lie otherwise in memory, it rounds otherwise
                assert torch.equal(output.images, expected.images)
        torch.testing.assert_close(off(pipe).images, theirs, rtol=5e-3, atol=5e-3)
        assert any(hooks) and hooks_of(pipe) == hooks and state_of(pipe) == before


class TestLayerwiseCasting:
    def test_it_guides_as_the_rounded_weights_do_with_gradient_checkpointing_too(self, kind, pipe):
        denoiser, rounded = denoiser_of(pipe), make(kind.tsam, kind.build())
        denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        weights = {name: weight.float() for name, weight in denoiser.state_dict().items()}
        denoiser_of(rounded).load_state_dict(weights)
        expected = guided(rounded)
        same(holds(pipe, plainly_guided(kind)), expected)
        assert any(weight.dtype == torch.float8_e4m3fn for weight in denoiser.parameters())
        denoiser.enable_gradient_checkpointing()
        same(guided(pipe), expected)


@pytest.mark.parametrize(
    "kind, compiled",
    [
        ("sd", lambda pipe, counter: setattr(pipe, "unet", torch.compile(pipe.unet, backend=counter))),
        ("sd", lambda pipe, counter: pipe.unet.compile_repeated_blocks(backend=counter)),
        ("pixart", lambda pipe, counter: pipe.transformer.compile(backend=counter)),
    ],
    ids=["model", "blocks", "in place"],
    indirect=["kind"],
)
def test_it_guides_to_the_same_with_one_graph_beside_stocks(kind, pipe, compiled):
    torch.compiler.reset()
    expected, counter = plainly_guided(kind), CompileCounterWithBackend("eager")
    compiled(pipe, counter)
    theirs = plain(pipe).images
    assert counter.frame_count == 1 and torch.equal(off(pipe).images, theirs)
    before = state_of(pipe)
    same(guided(pipe), expected)
    assert counter.frame_count <= 2  # guidance freezes the weights, which graphs know
    with torch.compiler.set_stance("fail_on_recompile"):
        same(guided(pipe), expected)
        plain(pipe)
    assert state_of(pipe) == before


def test_image_to_image_goes_on_from_a_guided_picture(of_sd):
    picture = guided(of_sd, output_type="pt").images
    stock = make(StableDiffusionImg2ImgPipeline, of_sd.components)
    other = StableDiffusionImg2ImgPipeline.from_pipe(of_sd, dtype=torch.float32)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    images = [one(PROMPT, picture, generator=generators(1), **options).images for one in (stock, other)]
    assert torch.equal(*images)
    assert torch.equal(guided(of_sd, output_type="pt").images, picture)


@every
def test_in_half_precision_losses_are_float32s_and_fall_and_the_picture_has_stocks_dtype(pipe):
    first = guided(pipe, num_inference_steps=1, tsam_steps=1, refinement_steps=()).losses[0, 0]
    for dtype in (torch.bfloat16, torch.float16):  # which holds the first's numbers
        output = holds(pipe.to(dtype))
        assert output.images.dtype == dtype
        assert output.losses.dtype == torch.float32 and output.losses.isfinite().all()
        torch.testing.assert_close(output.losses[0, 0], first, rtol=0.05, atol=0.05)


def test_in_float64_alpha_zero_is_bit_identical_to_stock(pipe):
    pipe.to(torch.float64)
    assert torch.equal(guided(pipe, alpha=0.0).images, plain(pipe).images)


class TestClipSkip:
    @pytest.mark.parametrize("layers", [0, 1])
    def test_the_prompt_is_what_an_earlier_layer_says_and_t_is_still_of_all(self, of_sd, layers):
        without, text = plainly_guided(SD), of_sd.get_text_self_attention(PROMPT)
        with torch.no_grad():
            embeds, negative = of_sd.encode_prompt(PROMPT, CPU, 1, True, clip_skip=layers)
        given, before = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}, state_of(of_sd)
        output, again = guided(of_sd, clip_skip=layers), guided(of_sd, None, text_self_attention=text, **given)
        assert output.losses[0, 2] < output.losses[0, 0]
        assert differ(output.images, without.images) == (layers == 1)
        assert torch.equal(output.images, again.images) and torch.equal(output.losses, again.losses)
        assert torch.equal(off(of_sd, clip_skip=layers).images, plain(of_sd, None, **given).images)
        assert state_of(of_sd) == before


def at_once(*calls):
    """What the functions return, called at the same time."""
    start = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(lambda c=call: (start.wait(), c())[1]) for call in calls]]


def second_of(pipe):
    return lambda: guided(pipe, "a red cube and a blue sphere", seed=1).images


def of_another_file(kind, pipe, folder):
    """The custom pipeline, whose class is not the installed one."""
    make(kind.stock, pipe.components).save_pretrained(folder)
    other = DiffusionPipeline.from_pretrained(folder, **custom(kind))
    assert type(other) is not kind.tsam
    other.register_modules(**{kind.denoiser: denoiser_of(pipe), "text_encoder": pipe.text_encoder})
    other.set_progress_bar_config(disable=True)
    options = {"output_type": "latent", "refinement_iterations": 2, "alpha": kind.alpha, **kind.call, **STEPS}
    return lambda: other(SHORT, generator=generators(1), **options).images


def of_stock(kind, pipe, folder):
    """It does not wait. It has a tokenizer of its own, because transformers' keep the padding of a call as a state."""
    stock = make(kind.stock, {**pipe.components, "tokenizer": copy.deepcopy(pipe.tokenizer)})
    return lambda: torch.cat([run(stock, guidance_scale=1.0, **STEPS).images for _ in range(4)])


SECOND = {
    "the same pipeline": lambda kind, pipe, folder: second_of(pipe),
    "the same denoiser": lambda kind, pipe, folder: second_of(make(kind.tsam, components_of(pipe))),
    "the same text encoder": lambda kind, pipe, folder: second_of(
        make(kind.tsam, {**kind.build(), "text_encoder": pipe.text_encoder})
    ),
    "the custom pipeline": of_another_file,
    "stock": of_stock,
}
IN_THREADS = [*product(KINDS, SECOND), *product(BLOCKS, ["the same denoiser"])]


class TestThreads:
    @pytest.mark.parametrize("kind, which", IN_THREADS, indirect=["kind"])
    def test_two_threads_draw_what_each_draws_alone(self, kind, pipe, which, tmp_path):
        second = SECOND[which](kind, pipe, tmp_path)
        # A guided pass has as many rows as a prediction without classifier-free guidance.
        options = {"guidance_scale": 1.0} if which == "stock" else {}
        expected, theirs, before = guided(pipe, **options), second(), state_of(pipe)
        for _ in range(2):
            output, images = at_once(lambda: guided(pipe, **options), second)
            same(output, expected)
            torch.testing.assert_close(images, theirs, rtol=5e-3, atol=5e-3)
        assert state_of(pipe) == before

    def test_t_may_be_read_before_and_while_another_thread_draws(self, pipe):
        expected, text, before = guided(pipe), pipe.get_text_self_attention(SHORT), state_of(pipe)

        def read(number=1):
            return [pipe.get_text_self_attention(SHORT).attention for _ in range(number)]

        check, texts = pipe.check_inputs, []
        pipe.check_inputs = lambda *args, **kwargs: (texts.extend(*at_once(read)), check(*args, **kwargs))
        same(guided(pipe), expected)
        del pipe.check_inputs
        output, others = at_once(lambda: guided(pipe), lambda: read(20))
        same(output, expected)
        assert all(torch.allclose(attention, text.attention, atol=1e-6) for attention in texts + others)
        assert len(texts) == 1 and state_of(pipe) == before

    def test_a_layer_that_another_thread_runs_is_neither_recorded_nor_stopped(self, kind, pipe):
        latents, t = torch.randn(2, 4, 32, 32), torch.ones(2)
        layers, conditions = layers_of(pipe), conditions_of(pipe, PROMPT)

        @torch.no_grad()
        def predict():
            return denoiser_of(pipe)(latents, timestep=t, **conditions).sample

        expected = predict()
        with record_cross_attention(layers, 7, stop=True) as maps:
            (found,) = at_once(predict)
            assert torch.equal(found, expected) and not maps
            with pytest.raises(LastMapRecorded):
                predict()
            assert len(maps) == len(layers)

    def test_two_models_at_once_leave_compilation_on(self, kind):
        pipes = [make(kind.tsam, kind.build()) for _ in range(2)]
        at_once(*(lambda pipe=pipe: guided(pipe, num_inference_steps=4, tsam_steps=4) for pipe in pipes))
        counter = CompileCounterWithBackend("eager")
        torch.compile(lambda x: x + 1, backend=counter)(torch.ones(1))
        assert counter.frame_count == 1

    @pytest.fixture
    def most(self, kind, monkeypatch):
        """How many calls of a tokenizer, whose padding and truncation are its state, ran at once, each time."""
        cls, inside, most = type(kind.components["tokenizer"]), [], []

        def call(tokenizer, *args, stock=cls.__call__, **kwargs):
            inside.append(1)
            sleep(0.01)
            most.append(len(inside))
            inside.pop()
            return stock(tokenizer, *args, **kwargs)

        monkeypatch.setattr(cls, "__call__", call)
        return most

    @pytest.mark.parametrize("kind", ["sdxl", "anima"], indirect=True)
    def test_blocks_tokenize_one_after_another_guided_or_off(self, kind, most):
        pipes = [make(kind.tsam, kind.components) for _ in range(3)]
        at_once(
            *(functools.partial(run, pipe, num_inference_steps=1, tsam_steps=k // 2) for k, pipe in enumerate(pipes))
        )
        assert len(most) >= 2 * len(pipes) and max(most) == 1

    def test_they_tokenize_one_after_another(self, pipe, most):
        whole = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
        methods = [pipe.words_of, pipe.get_text_self_attention, functools.partial(pipe.encode_prompt, **whole)]
        at_once(*(functools.partial(method, PROMPT) for method in methods * 2))
        assert len(most) > 2 * len(methods) and max(most) == 1

    def test_two_comparisons_of_one_model_wait_for_each_other(self, of_sd):
        def draw(seed):
            own = make(SD.tsam, of_sd.components)
            return [drawn.losses for drawn in compare(own, PROMPT, seed, own.settings(alpha=5.0), **STEPS)]

        calls = [functools.partial(draw, seed) for seed in range(2)]
        assert at_once(*calls) == [call() for call in calls]

    def test_a_model_that_was_used_can_be_copied_and_pickled(self, pipe):
        guided(pipe)
        for again in (copy.deepcopy(denoiser_of(pipe)), pickle.loads(pickle.dumps(denoiser_of(pipe)))):
            with lock_of(again):
                assert lock_of(again) is not lock_of(denoiser_of(pipe))
            copy.deepcopy(again), pickle.dumps(again)

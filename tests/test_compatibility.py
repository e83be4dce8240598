"""What diffusers, peft and torch add to a pipeline acts beside guidance, and without guidance is stock's to the bit."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from kinds import (
    BLOCKS,
    KINDS,
    PROMPT,
    SHORT,
    calls_of,
    denoiser_of,
    every,
    generators,
    kind_of,
    make,
    models_of,
    run,
    state_of,
)
from tiny import tiny_pixart_components


SD, PIXART = KINDS["sd"], KINDS["pixart"]
THING = "a red <thing> and a blue sphere"
CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
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


def stock_of(pipe, cls=None):
    """A stock pipeline of the same components, but a guider, which has a state."""
    components = {name: component for name, component in pipe.components.items() if name != "guider"}
    return make(cls or kind_of(pipe).stock, components)


def plain(pipe, prompt=PROMPT, stock=None, **options):
    """What stock draws with the same components."""
    return run(stock or stock_of(pipe), prompt, **{**STEPS, **options})


def off(pipe, prompt=PROMPT, **options):
    return run(pipe, prompt, **{**STEPS, "tsam_steps": 0, **options})


def guided(pipe, prompt=PROMPT, **options):
    return run(pipe, prompt, **{**STEPS, "alpha": kind_of(pipe).alpha, **options})


def holds(pipe, without=None, prompt=PROMPT, stock=None, **options):
    """The guided output with a feature that is on: off it is stock's, guidance acts, and it differs from `without`."""
    theirs = plain(pipe, prompt, stock, **options).images
    before = state_of(pipe)
    assert torch.equal(off(pipe, prompt, **options).images, theirs)
    output = guided(pipe, prompt, **options)
    assert output.losses[0, 2] < output.losses[0, 0]
    assert output.images.isfinite().all() and differ(output.images, theirs)
    assert without is None or differ(output.images, without.images)
    assert state_of(pipe) == before
    return output


def differ(one, other):
    """More than what rounding becomes in a few steps of a random model."""
    return not torch.allclose(one, other, rtol=0.05, atol=0.05)


def same(output, expected):
    torch.testing.assert_close(output.losses, expected.losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.images, expected.images, rtol=5e-3, atol=5e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Adapters


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
        of_sd.plain = guided(of_sd)
        of_sd.load_lora_weights(lora_of(of_sd), adapter_name="one")
        return of_sd

    def test_it_acts_with_guidance_on_as_in_stock_without(self, pipe):
        holds(pipe, pipe.plain)

    def test_its_scale_is_the_calls_or_the_adapters(self, pipe):
        half = holds(pipe, guided(pipe), cross_attention_kwargs={"scale": 0.5})
        same(guided(pipe, cross_attention_kwargs={"scale": 0.0}), pipe.plain)
        pipe.set_adapters("one", 0.5)
        same(holds(pipe), half)

    def test_two_of_them_are_weighed(self, pipe):
        one = guided(pipe)
        pipe.load_lora_weights(lora_of(pipe), adapter_name="two")
        pipe.set_adapters(["one", "two"], [1.0, 0.0])
        same(guided(pipe), one)
        pipe.set_adapters(["one", "two"], [0.5, 0.5])
        holds(pipe, one)

    def test_fused_it_guides_to_the_same_and_unloaded_as_if_it_never_was(self, pipe):
        unfused = guided(pipe)
        pipe.fuse_lora()
        same(holds(pipe, pipe.plain), unfused)
        pipe.unfuse_lora()
        same(guided(pipe), unfused)
        pipe.unload_lora_weights()
        same(guided(pipe), pipe.plain)

    def test_t_is_read_with_the_text_encoders_lora_at_the_calls_scale(self, pipe):
        half = {"cross_attention_kwargs": {"scale": 0.5}}
        texts = {scale: pipe.get_text_self_attention(PROMPT, lora_scale=scale) for scale in (None, 0.5)}
        losses = {scale: guided(pipe, text_self_attention=text, **half).losses for scale, text in texts.items()}
        assert torch.equal(guided(pipe, **half).losses, losses[0.5])
        assert (losses[None] - losses[0.5]).abs().min() > 1e-2
        pipe.fuse_lora(lora_scale=0.5)
        torch.testing.assert_close(pipe.get_text_self_attention(PROMPT).attention, texts[0.5].attention)

    def test_pixarts_is_pefts_own(self):
        peft = pytest.importorskip("peft")
        pipe = make(PIXART.tsam, PIXART.build())
        plain = guided(pipe)
        config = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        pipe.transformer = peft.get_peft_model(pipe.transformer, config)
        unfused = holds(pipe, plain)
        pipe.transformer.merge_adapter()
        same(holds(pipe), unfused)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion_is_drawn_read_and_aligned(of_sd, vectors, tmp_path):
    without = guided(of_sd, THING)
    torch.save({"<thing>": 0.5 * torch.randn(vectors, 16)}, tmp_path / "thing.bin")
    of_sd.load_textual_inversion(str(tmp_path), weight_name="thing.bin")
    output = holds(of_sd, without, THING, output_attentions=True)
    things = ["<thing>", "<thing>_1", "<thing>_2"][:vectors]
    assert output.attentions[0]["tokens"] == ["a", "red", *things, "and", "a", "blue", "sphere"]
    assert of_sd.get_text_self_attention(THING).tokens == [output.attentions[0]["tokens"]]


def ip_adapter_of(unet):
    """An IP-Adapter of four tokens, as a file of one holds it."""
    weights, width = {}, unet.config.cross_attention_dim
    layers = [layer for name, layer in unet.named_modules() if name.endswith("attn2")]
    for place, layer in enumerate(layers):
        for which in ("k", "v"):
            weight = getattr(layer, f"to_{which}").weight
            weights[f"{2 * place + 1}.to_{which}_ip.weight"] = torch.randn_like(weight)
    projection = {"proj.weight": torch.randn(4 * width, 12), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": projection, "ip_adapter": weights}


class TestIPAdapter:
    @pytest.fixture
    def pipe(self, of_sd):
        of_sd.plain = guided(of_sd)
        of_sd.register_modules(
            image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval(),
            feature_extractor=CLIPImageProcessor(size=16, crop_size=16),
        )
        of_sd.load_ip_adapter(ip_adapter_of(of_sd.unet), subfolder="", weight_name="")
        return of_sd

    def image(self, seed=0):
        return np.random.default_rng(seed).random((16, 16, 3))

    def test_it_acts_with_guidance_on_as_in_stock_without(self, pipe):
        output = holds(pipe, pipe.plain, ip_adapter_image=self.image())
        assert differ(guided(pipe, ip_adapter_image=self.image(1)).images, output.images)

    def test_its_scale_is_obeyed(self, pipe):
        full = guided(pipe, ip_adapter_image=self.image())
        pipe.set_ip_adapter_scale(0.5)
        holds(pipe, full, ip_adapter_image=self.image())
        pipe.set_ip_adapter_scale(0.0)
        same(guided(pipe, ip_adapter_image=self.image()), pipe.plain)
        pipe.unload_ip_adapter()
        assert torch.equal(guided(pipe).images, pipe.plain.images)

    def test_a_mask_is_obeyed(self, pipe):
        image, mask = {"ip_adapter_image": self.image()}, torch.zeros(1, 1, 64, 64)
        masks = {"ip_adapter_masks": [mask]}
        same(guided(pipe, cross_attention_kwargs=masks, **image), pipe.plain)
        mask[..., :32] = 1
        holds(pipe, guided(pipe, **image), cross_attention_kwargs=masks, **image)

    def test_prepared_embeddings_are_the_images(self, pipe):
        embeds = pipe.prepare_ip_adapter_image_embeds(self.image(), None, CPU, 1, True)
        expected = guided(pipe, ip_adapter_image=self.image())
        assert torch.equal(holds(pipe, pipe.plain, ip_adapter_image_embeds=embeds).images, expected.images)

    def test_each_image_of_a_batch_has_its_prompts_own(self, pipe):
        batch = guided(pipe, [PROMPT, SHORT], generator=generators(2), ip_adapter_image=self.image())
        alone = guided(pipe, SHORT, seed=1, ip_adapter_image=self.image())
        torch.testing.assert_close(batch.images[1], alone.images[0], rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------------------------
# Switches


def test_freeu_acts_with_guidance_on_and_off_again(of_sd):
    plain = guided(of_sd)
    of_sd.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    holds(of_sd, plain)
    of_sd.disable_freeu()
    assert torch.equal(guided(of_sd).images, plain.images)


SWITCHES = {
    "fused projections": lambda pipe: denoiser_of(pipe).fuse_qkv_projections(),
    "gradient checkpointing": lambda pipe: denoiser_of(pipe).enable_gradient_checkpointing(),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
    "largest attention slicing": lambda pipe: pipe.enable_attention_slicing("max"),
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
COMPILE = {"sdxl": "compile_repeated_blocks", "sd3": "compile", "flux": "compile_repeated_blocks"}


@pytest.mark.parametrize("kind, switch", [*product(KINDS, SWITCHES), *product(BLOCKS, OF_BLOCKS)], indirect=["kind"])
def test_what_only_computes_in_another_way_guides_to_the_same(pipe, switch):
    expected = guided(pipe)
    (SWITCHES | OF_BLOCKS)[switch](pipe)
    same(holds(pipe), expected)


@pytest.mark.parametrize("tiling", [False, True])
def test_the_vae_slices_and_tiles_what_was_guided(pipe, tiling):
    options = {"num_images_per_prompt": 2, "height": 32, "width": 32}
    latents = guided(pipe, **options)
    pipe.vae.enable_slicing()
    if tiling:
        pipe.vae.enable_tiling()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 8, 16
    with calls_of(pipe.vae.decoder) as decoded:
        output = guided(pipe, output_type="pt", **options)
    assert len(decoded) == (2 * 3 * 3 if tiling else 2)
    assert torch.equal(output.losses, latents.losses)
    with torch.no_grad():
        expected = pipe.vae.decode(latents.images / pipe.vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(output.images, expected.clamp(0, 1))
    theirs = plain(pipe, output_type="pt", **options).images
    assert torch.equal(off(pipe, output_type="pt", **options).images, theirs)


class TestSafetyChecker:
    @pytest.fixture
    def pipe(self, of_sd):
        config = CLIPConfig(vision_config=VISION, text_config={"num_hidden_layers": 1}, projection_dim=12)
        checker = StableDiffusionSafetyChecker(config).eval()
        checker.special_care_embeds_weights.data.fill_(2)  # above every cosine similarity
        checker.concept_embeds_weights.data.fill_(2)
        extractor = CLIPImageProcessor(size=16, crop_size=16)
        of_sd.register_modules(safety_checker=checker, feature_extractor=extractor)
        return of_sd

    def test_a_harmless_picture_passes(self, pipe):
        output = guided(pipe, output_type="np")
        assert output.nsfw_content_detected == [False] and output.images.any()

    @pytest.mark.filterwarnings("ignore:Potential NSFW")
    def test_a_flagged_one_is_black_as_in_stock_and_its_losses_stay(self, pipe):
        pipe.safety_checker.concept_embeds_weights.data.fill_(-2)
        options = {"prompt": [PROMPT, SHORT], "output_type": "np"}
        output, theirs = guided(pipe, **options), plain(pipe, **options)
        assert output.nsfw_content_detected == theirs.nsfw_content_detected == [True, True]
        assert not output.images.any() and not theirs.images.any()
        assert output.losses.shape == (2, 3)
        assert guided(pipe, return_dict=False, **options)[1] == [True, True]


# ----------------------------------------------------------------------------------------------------------------------
# Memory: offloading, weights kept in eight bits


def offload_in_sequence(pipe, folder):
    from accelerate import cpu_offload  # `enable_sequential_cpu_offload` itself takes no CPU to run on

    for model in models_of(pipe):
        cpu_offload(model, CPU, offload_buffers=len(model._parameters) > 0)


def offload_groups(offload_type, disk=False):
    def enable(pipe, folder):
        options = {"offload_type": offload_type, "num_blocks_per_group": 1, "onload_device": CPU}
        denoiser_of(pipe).enable_group_offload(**options, offload_to_disk_path=str(folder) if disk else None)
        if not disk:
            pipe.enable_group_offload(exclude_modules=[SD.denoiser, PIXART.denoiser], **options)

    return enable


OFFLOADS = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": offload_in_sequence,
    "blocks": offload_groups("block_level"),
    "leaves": offload_groups("leaf_level"),
    "blocks on disk": offload_groups("block_level", disk=True),
    "leaves on disk": offload_groups("leaf_level", disk=True),
}


def hooks_of(pipe):
    """What offloading has hung into the models, by name."""
    modules = [module for model in models_of(pipe) for module in model.modules()]
    return [{name for name in ("_hf_hook", "_diffusers_hook") if hasattr(module, name)} for module in modules]


class TestOffload:
    @pytest.mark.parametrize("way", OFFLOADS)
    def test_guidance_is_the_same_and_the_hooks_stay(self, pipe, way, tmp_path):
        pytest.importorskip("accelerate")
        expected, theirs = guided(pipe), plain(pipe).images
        OFFLOADS[way](pipe, tmp_path)
        hooks, before = hooks_of(pipe), state_of(pipe)
        for _ in range(2):
            output = guided(pipe)
            same(output, expected)
            if "disk" not in way:  # where weights are read into lies otherwise in memory, and rounds otherwise
                assert torch.equal(output.images, expected.images)
            torch.testing.assert_close(off(pipe).images, theirs, rtol=5e-3, atol=5e-3)
        assert any(hooks) and hooks_of(pipe) == hooks and state_of(pipe) == before

    @pytest.mark.parametrize("device", [CUDA])
    @pytest.mark.parametrize("way", ["model", "sequential", "blocks", "leaves", "streamed leaves"])
    def test_guidance_is_the_same_on_a_real_device(self, pipe, way, device):
        pytest.importorskip("accelerate")
        pipe.to(device)
        expected = guided(pipe)
        pipe.to("cpu")
        if way == "model":
            pipe.enable_model_cpu_offload(device=device)
        elif way == "sequential":
            pipe.enable_sequential_cpu_offload(device=device)
        else:
            options = {"offload_type": "block_level" if way == "blocks" else "leaf_level", "num_blocks_per_group": 1}
            options["use_stream"] = way == "streamed leaves"
            pipe.enable_group_offload(onload_device=torch.device(device), **options)
        for _ in range(2):
            same(guided(pipe), expected)
        assert any(hooks_of(pipe))


class TestLayerwiseCasting:
    def test_it_guides_as_the_rounded_weights_do(self, kind, pipe):
        expected = guided(pipe)
        casting, rounded = denoiser_of(pipe), make(kind.tsam, kind.build())
        casting.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        weights = {name: weight.float() for name, weight in casting.state_dict().items()}
        denoiser_of(rounded).load_state_dict(weights)
        same(holds(pipe, expected), guided(rounded))
        assert any(weight.dtype == torch.float8_e4m3fn for weight in casting.parameters())

    def test_it_goes_with_gradient_checkpointing(self, pipe):
        denoiser_of(pipe).enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        expected = guided(pipe)
        denoiser_of(pipe).enable_gradient_checkpointing()
        same(guided(pipe), expected)

    def test_the_vaes_is_none_of_guidances_business(self, pipe):
        losses = guided(pipe).losses
        pipe.vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert torch.equal(off(pipe, output_type="pt").images, plain(pipe, output_type="pt").images)
        assert torch.equal(guided(pipe, output_type="pt").losses, losses)


# ----------------------------------------------------------------------------------------------------------------------
# Compilation


COMPILED = {
    "model": lambda pipe, counter: setattr(pipe, "unet", torch.compile(pipe.unet, backend=counter)),
    "in place": lambda pipe, counter: denoiser_of(pipe).compile(backend=counter),
    "blocks": lambda pipe, counter: denoiser_of(pipe).compile_repeated_blocks(backend=counter),
}


@pytest.mark.parametrize("kind, way", [("sd", "model"), ("sd", "blocks"), ("pixart", "in place")])
def test_it_guides_to_the_same_with_one_graph_beside_stocks(kind, way):
    torch.compiler.reset()
    kind, options = KINDS[kind], {}
    pipe = make(kind.tsam, kind.build())
    if kind is PIXART:  # fewer blocks compile sooner
        pipe, options = make(kind.tsam, tiny_pixart_components(blocks=2)), {"attention_layers": (0, 1)}
    expected, counter = guided(pipe, **options), CompileCounterWithBackend("eager")
    COMPILED[way](pipe, counter)
    theirs = plain(pipe).images
    assert counter.frame_count == 1 and torch.equal(off(pipe, **options).images, theirs)
    before = state_of(pipe)
    same(guided(pipe, **options), expected)
    assert counter.frame_count <= 2  # guidance freezes the weights, which graphs know
    with torch.compiler.set_stance("fail_on_recompile"):
        same(guided(pipe, **options), expected)
        plain(pipe)
    assert state_of(pipe) == before


# ----------------------------------------------------------------------------------------------------------------------
# Pipelines from pipelines


def test_from_stock_and_back_stock_draws_the_same(kind, pipe):
    stock = stock_of(pipe).to(torch.bfloat16)
    expected = run(stock, **STEPS).images
    there = kind.tsam.from_pipe(stock)
    there.set_progress_bar_config(disable=True)
    assert torch.equal(off(there).images, expected) and differ(guided(there).images, expected)
    back = kind.stock.from_pipe(there, dtype=torch.bfloat16)  # stock alone would make it float32
    back.set_progress_bar_config(disable=True)
    assert torch.equal(run(back, **STEPS).images, expected)


def test_image_to_image_goes_on_from_a_guided_picture(of_sd):
    picture = guided(of_sd, output_type="pt").images
    stock = stock_of(of_sd, StableDiffusionImg2ImgPipeline)
    other = StableDiffusionImg2ImgPipeline.from_pipe(of_sd, dtype=torch.float32)
    options = {"num_inference_steps": 4, "output_type": "pt"}
    images = [one(PROMPT, picture, generator=generators(1), **options).images for one in (stock, other)]
    assert torch.equal(*images)
    assert torch.equal(guided(of_sd, output_type="pt").images, picture)


# ----------------------------------------------------------------------------------------------------------------------
# Precision, threads, clip_skip


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_losses_are_float32s_and_fall_and_the_picture_has_stocks_dtype(pipe, dtype):
    first = guided(pipe).losses[0, 0]
    output = holds(pipe.to(dtype))
    assert output.images.dtype == plain(pipe).images.dtype == dtype
    assert output.losses.dtype == torch.float32 and output.losses.isfinite().all()
    torch.testing.assert_close(output.losses[0, 0], first, rtol=0.05, atol=0.05)


SHARED = [*product(KINDS, ["pipeline", "denoiser", "text_encoder"]), *product(BLOCKS, ["denoiser"])]


@pytest.mark.parametrize("kind, shared", SHARED, indirect=["kind"])
def test_two_threads_draw_what_each_draws_alone(kind, pipe, shared):
    components = {name: pipe.components[name] for name in kind.components}  # not a guider, which has a state
    if shared != "denoiser":
        components = {**kind.build(), "text_encoder": pipe.text_encoder}
    pipes = [pipe, pipe if shared == "pipeline" else make(kind.tsam, components)]
    prompts, start = [PROMPT, "a red cube and a blue sphere"], threading.Barrier(2)

    def draw(k, wait=True):
        if wait:
            start.wait()
        return guided(pipes[k], prompts[k], seed=k, num_inference_steps=4)

    expected = [draw(k, wait=False) for k in range(2)]
    before = state_of(pipe)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(draw, range(2)))
    for output, alone in zip(outputs, expected):
        same(output, alone)
    assert state_of(pipe) == before


class TestClipSkip:
    @pytest.mark.parametrize("layers", [0, 1])
    def test_the_prompt_is_what_an_earlier_layer_says(self, of_sd, layers):
        encoder = of_sd.text_encoder
        inputs = of_sd.tokenizer(PROMPT, padding="max_length", return_tensors="pt")
        with torch.no_grad():
            hidden = encoder(inputs.input_ids, output_hidden_states=True).hidden_states[-(layers + 1)]
            literal = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
            embeds, negative = of_sd.encode_prompt(PROMPT, CPU, 1, True, clip_skip=layers)
            plain, unchanged = of_sd.encode_prompt(PROMPT, CPU, 1, True)
        assert torch.equal(embeds, literal) and torch.equal(embeds, plain) == (layers == 0)
        assert torch.equal(negative, unchanged)  # stock skips in the prompt alone

    def test_it_acts_with_guidance_on_and_t_is_still_of_all_layers(self, of_sd):
        without = guided(of_sd)
        embeds, negative = of_sd.encode_prompt(PROMPT, CPU, 1, True, clip_skip=1)
        text, before = of_sd.get_text_self_attention(PROMPT), state_of(of_sd)
        output = guided(of_sd, clip_skip=1)
        assert output.losses[0, 2] < output.losses[0, 0] and differ(output.images, without.images)
        given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
        again = guided(of_sd, None, text_self_attention=text, **given)
        assert torch.equal(output.images, again.images) and torch.equal(output.losses, again.losses)
        assert torch.equal(off(of_sd, clip_skip=1).images, plain(of_sd, None, **given).images)
        assert state_of(of_sd) == before

"""What a user of `StableDiffusionTSAMPipeline` may rely on."""

import inspect
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback

from diffusers_tsam import StableDiffusionTSAMPipeline, attention_processors
from diffusers_tsam.attention_processors import LatentAlignment, frozen, record_cross_attention


PROMPT = "a black car and a white clock"
SHORT = "a red cube"
SCHEDULERS = sorted({DDIMScheduler, *DDIMScheduler().compatibles}, key=lambda scheduler: scheduler.__name__)
# The published unet/config.json of Stable Diffusion 1.5
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "layers_per_block": 2,
}


def run(pipe, prompt=PROMPT, seed=0, **kwargs):
    """Latents and output of a short call."""
    kwargs = {"num_inference_steps": 4, "output_type": "latent", "refinement_iterations": 2, **kwargs}
    if not isinstance(pipe, StableDiffusionTSAMPipeline):
        kwargs = {
            k: v for k, v in kwargs.items() if k in inspect.signature(StableDiffusionPipeline.__call__).parameters
        }
    if "generator" not in kwargs and "latents" not in kwargs:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    return pipe(prompt, **kwargs)


def use(pipe, scheduler, **kwargs):
    if getattr(scheduler, "_missing", False) or "dummy" in scheduler.__module__:
        pytest.skip(f"{scheduler.__name__} needs a package that is not installed")
    if scheduler.__name__ == "DPMSolverSDEScheduler":
        kwargs["noise_sampler_seed"] = 0  # it draws its own noise, not the generator's
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **kwargs)


def state_of(pipe):
    """All that a call must leave as it found it."""
    return {
        "processors": {k: id(v) for k, v in pipe.unet.attn_processors.items()},
        "modules": [name for name, _ in pipe.unet.named_modules()],
        "implementation": pipe.text_encoder.config._attn_implementation,
        "requires_grad": {n: p.requires_grad for n, p in [*pipe.unet.named_parameters()]},
        "grads": [p.grad for m in (pipe.unet, pipe.text_encoder, pipe.vae) for p in m.parameters()],
        "training": [m.training for m in pipe.unet.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in pipe.unet.modules()],
        "config": dict(pipe.config),
        "attributes": sorted(k for k in vars(pipe) if k not in CALL_ATTRIBUTES),
    }


# what the stock pipeline itself sets in every call
CALL_ATTRIBUTES = {
    "_guidance_scale",
    "_guidance_rescale",
    "_clip_skip",
    "_cross_attention_kwargs",
    "_interrupt",
    "_num_timesteps",
    "_lora_scale",
}


class TestOff:
    @pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
    def test_off_is_bit_identical_to_stock_under_every_scheduler(self, stock, pipe, scheduler):
        use(stock, scheduler)
        pipe.scheduler = scheduler.from_config(stock.scheduler.config)
        assert torch.equal(run(stock).images, run(pipe, tsam_steps=0).images)

    @pytest.mark.parametrize(
        "options",
        [
            {"prompt": [PROMPT, SHORT], "num_images_per_prompt": 2},
            {"negative_prompt": "a dog on the table"},
            {"prompt": [PROMPT, SHORT], "negative_prompt": ["a dog", "red"]},
            {"guidance_scale": 1.0},
            {"guidance_rescale": 0.7},
            {"eta": 0.5},
            {"height": 48, "width": 80},
            {"output_type": "np"},
            {"output_type": "pil"},
            {"timesteps": [900, 600, 10]},
            {"prompt": "a red car " * 60},
            {"prompt": ""},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_off_is_bit_identical_to_stock_with_every_option(self, stock, pipe, options):
        if "timesteps" in options:
            use(stock, EulerDiscreteScheduler)
            pipe.scheduler = EulerDiscreteScheduler.from_config(stock.scheduler.config)
        ours, theirs = run(pipe, tsam_steps=0, **options), run(stock, **options)
        if options.get("output_type") == "pil":
            assert ours.images[0].tobytes() == theirs.images[0].tobytes()
        else:
            assert (torch.as_tensor(ours.images) == torch.as_tensor(theirs.images)).all()

    def test_off_with_embeddings_latents_and_a_list_of_generators_is_bit_identical_to_stock(self, stock, pipe):
        embeds, negative = stock.encode_prompt([PROMPT, SHORT], "cpu", 1, True)
        options = {
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative,
            "latents": torch.randn(2, 4, 32, 32),
            "generator": [torch.Generator().manual_seed(k) for k in range(2)],
            "eta": 1.0,
        }
        theirs = run(stock, None, **options).images
        options["generator"] = [torch.Generator().manual_seed(k) for k in range(2)]
        assert torch.equal(theirs, run(pipe, None, tsam_steps=0, **options).images)

    def test_off_leaves_no_trace(self, pipe):
        before = state_of(pipe)
        output = run(pipe, tsam_steps=0, output_attentions=True)
        assert state_of(pipe) == before
        assert output.losses.shape == (1, 0) and output.attentions is None

    def test_alpha_zero_only_watches(self, stock, pipe):
        output = run(pipe, alpha=0.0)
        assert torch.equal(output.images, run(stock).images)
        assert output.losses.shape == (1, 2 + 2 * 2)

    def test_the_signature_is_stock_and_more(self):
        ours = inspect.signature(StableDiffusionTSAMPipeline.__call__).parameters
        theirs = inspect.signature(StableDiffusionPipeline.__call__).parameters
        assert [p for p in ours if p in theirs] == list(theirs)
        assert all(ours[name].default == theirs[name].default for name in theirs)
        defaults = {"tsam_steps": None, "alpha": 10.0, "gamma": 2.0, "refinement_steps": None}
        defaults |= {"refinement_iterations": 20, "objective": "l1", "output_attentions": False}
        assert {name: ours[name].default for name in defaults} == defaults


class TestGuidance:
    @pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
    def test_guidance_moves_finite_latents_under_every_scheduler(self, stock, pipe, scheduler):
        use(stock, scheduler)
        pipe.scheduler = scheduler.from_config(stock.scheduler.config)
        output = run(pipe, alpha=50.0)
        assert output.images.isfinite().all()
        assert not torch.equal(output.images, run(stock).images)
        assert output.losses.shape == (1, 2 + 2 * 2)  # steps 0 and 1; both (0 and 20 percent of 4 are 0) refine once
        assert output.losses[0, 2] < output.losses[0, 0]

    def test_the_loss_falls_during_refinement(self, pipe):
        losses = run(pipe, refinement_iterations=10, alpha=20.0).losses[0]
        assert losses[10] < 0.97 * losses[0]

    def test_the_default_schedule_is_the_papers_and_scales_with_the_number_of_steps(self, pipe):
        def steps(n):
            return attention_processors.check_tsam_inputs(n, None, 10.0, 2.0, None, 20, "l1")

        assert steps(50) == (25, {0, 10, 20})
        assert steps(20) == (10, {0, 4, 8})
        assert steps(4) == (2, {0, 1})
        assert steps(1) == (0, set())

    @pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
    def test_one_alpha_takes_the_same_step_at_the_models_input_under_every_scheduler(self, pipe, scheduler):
        model_input = torch.randn(1, 4, 32, 32)
        moved = []
        for one in (DDIMScheduler, scheduler):
            use(pipe, one, timestep_spacing="trailing")
            pipe.scheduler.set_timesteps(10)
            t = pipe.scheduler.timesteps[0]
            scale = pipe.scheduler.scale_model_input(torch.ones(()), t)
            text = pipe.get_text_self_attention(PROMPT)
            alignment = LatentAlignment(text, alpha=30.0, gamma=2.0)
            layers, level = pipe.cross_attention_layers()
            embeds = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
            pipe._cross_attention_kwargs = None
            with torch.no_grad():
                latents = pipe.align_latents(alignment, model_input / scale, t, layers, level, 0, 1, embeds)
            moved.append(latents * scale - model_input)
        assert moved[0].abs().max() > 1e-3
        torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-5)

    def test_unipc_does_not_take_the_move_back(self, pipe):
        use(pipe, UniPCMultistepScheduler)
        pipe.scheduler.set_timesteps(4)
        pipe.scheduler.last_sample = torch.zeros(1)
        pipe._cross_attention_kwargs = None
        alignment = LatentAlignment(pipe.get_text_self_attention(PROMPT), 1.0, 2.0)
        layers, level = pipe.cross_attention_layers()
        embeds = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
        t = pipe.scheduler.timesteps[0]
        pipe.align_latents(alignment, torch.randn(1, 4, 32, 32), t, layers, level, 0, 1, embeds.detach())
        assert pipe.scheduler.last_sample is None

    @pytest.mark.parametrize("objective", ["l1", "l1_full", "cosine"])
    def test_every_objective_guides(self, pipe, stock, objective):
        output = run(pipe, objective=objective)
        assert output.losses.isfinite().all() and not torch.equal(output.images, run(stock).images)

    def test_only_the_conditional_half_is_read(self, pipe):
        with_guidance, without = run(pipe, alpha=0.0), run(pipe, alpha=0.0, guidance_scale=1.0)
        torch.testing.assert_close(with_guidance.losses[:, 0], without.losses[:, 0])

    def test_the_negative_prompt_does_not_change_the_first_loss(self, pipe):
        plain, negative = run(pipe), run(pipe, negative_prompt="a green dog")
        assert plain.losses[0, 0] == negative.losses[0, 0]

    def test_a_callback_that_drops_the_unconditional_half_goes_on_guided(self, pipe):
        output = run(pipe, tsam_steps=4, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.25))
        assert output.losses.shape[1] >= 4 and output.images.isfinite().all()

    def test_padding_never_changes_the_loss(self, pipe):
        text = pipe.get_text_self_attention([PROMPT, SHORT])
        maps = torch.rand(2, 77, 16, 16)
        losses = []
        for tokens in (9, 77):
            content, attention = text.content[:, :tokens], text.attention[:, :tokens, :tokens]
            target = attention_processors.normalize_text_attention(attention, content, 2.0)
            losses.append(attention_processors.alignment_loss(maps[:, :tokens], target, content)[0])
        torch.testing.assert_close(losses[0], losses[1])


class TestBatches:
    def test_an_image_in_a_batch_is_the_same_image_alone(self, pipe):
        prompts = [PROMPT, SHORT, "dog", "", "the red car on a green table and a blue sphere and a white cube"]
        generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
        batch = run(pipe, prompts, generator=generators, alpha=20.0)
        for k, prompt in enumerate(prompts):
            alone = run(pipe, prompt, seed=k, alpha=20.0)
            torch.testing.assert_close(batch.images[k], alone.images[0], rtol=1e-3, atol=1e-3)
            if alone.losses.shape[1]:
                torch.testing.assert_close(batch.losses[k], alone.losses[0], rtol=1e-4, atol=1e-4)
            else:
                assert not batch.losses[k].any()

    def test_several_images_a_prompt_are_prompt_major(self, pipe):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        batch = run(pipe, [PROMPT, SHORT], generator=generators, num_images_per_prompt=2, output_attentions=True)
        assert [len(a["tokens"]) for a in batch.attentions] == [7, 7, 3, 3]
        alone = run(pipe, SHORT, seed=3)
        torch.testing.assert_close(batch.images[3], alone.images[0], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("prompt", ["", "dog"])
    def test_a_prompt_with_nothing_to_align_is_plain_generation(self, stock, pipe, prompt):
        output = run(pipe, prompt)
        assert torch.equal(output.images, run(stock, prompt).images)
        assert output.losses.shape == (1, 0)

    @pytest.mark.parametrize("words", [75, 120])
    def test_a_long_prompt_is_truncated_as_stock_does_with_its_warning(self, pipe, words, caplog, capfd):
        text = pipe.get_text_self_attention("a red car " * (words // 3))
        assert text.content.sum() == 75 and len(text.tokens[0]) == 75
        assert run(pipe, "a red car " * (words // 3)).images.isfinite().all()
        warnings_seen = caplog.text + capfd.readouterr().err
        assert ("part of your input was truncated" in warnings_seen) == (words > 75)

    @pytest.mark.parametrize("size", [(48, 80), (128, 64), (8, 8), (2, 64)])
    def test_any_size_is_guided_on_its_own_grid(self, pipe, size):
        height, width = (8 * side for side in size) if max(size) < 20 else size
        height, width = max(height, 8), max(width, 8)
        output = run(pipe, height=height, width=width, output_attentions=True, num_inference_steps=2)
        grid = tuple(-(-side // pipe.vae_scale_factor // 2) for side in (height, width))
        assert output.attentions[0]["maps"].shape[-2:] == grid
        assert output.images.isfinite().all()


class TestTextSelfAttention:
    def test_embeddings_alone_are_refused_and_the_remedy_works(self, pipe):
        embeds, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
        with pytest.raises(ValueError, match="get_text_self_attention"):
            run(pipe, None, **given)
        output = run(pipe, None, text_self_attention=pipe.get_text_self_attention(PROMPT), **given)
        assert torch.equal(output.images, run(pipe).images)

    def test_t_is_of_the_tokens_that_are_encoded(self, pipe):
        text = pipe.get_text_self_attention([PROMPT, SHORT])
        assert text.tokens[1] == ["a", "red", "cube"]
        assert text.content[1].nonzero().flatten().tolist() == [1, 2, 3]
        assert text.attention.dtype == torch.float32
        torch.testing.assert_close(text.attention.sum(-1), torch.ones(2, 77))
        assert not text.attention.triu(1).any()

    @pytest.mark.parametrize("change", ["batch", "tokens", "content", "texts"])
    def test_a_t_of_the_wrong_shape_is_refused(self, pipe, change):
        text = pipe.get_text_self_attention(PROMPT)
        wrong = {
            "batch": text._replace(attention=text.attention.repeat(2, 1, 1)),
            "tokens": text._replace(attention=text.attention[:, :20, :20]),
            "content": text._replace(content=text.content[:, :20]),
            "texts": text._replace(tokens=[]),
        }[change]
        with pytest.raises(ValueError, match="these prompts need"):
            run(pipe, text_self_attention=wrong)

    def test_something_else_than_a_t_is_refused(self, pipe):
        with pytest.raises(TypeError, match="get_text_self_attention"):
            run(pipe, text_self_attention=torch.ones(7, 7))


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_stays_half_and_finite_with_the_loss_in_float32(self, dtype):
        from tiny import tiny_components

        pipe = StableDiffusionTSAMPipeline(**tiny_components(), requires_safety_checker=False).to(dtype)
        pipe.set_progress_bar_config(disable=True)
        output = run(pipe)
        assert output.images.dtype == dtype and output.images.isfinite().all()
        assert output.losses.dtype == torch.float32 and output.losses.isfinite().all()
        torch.testing.assert_close(output.losses[0, 0], self.full_precision_loss(), rtol=0.05, atol=0.05)

    def full_precision_loss(self):
        from tiny import tiny_components

        pipe = StableDiffusionTSAMPipeline(**tiny_components(), requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return run(pipe, num_inference_steps=4).losses[0, 0]

    def test_a_gradient_that_overflows_is_tried_again_with_less(self, monkeypatch):
        from tiny import tiny_components

        monkeypatch.setattr(attention_processors, "FP16_LOSS_SCALE", 2.0**30)
        monkeypatch.setattr(attention_processors, "FP16_LOSS_SCALE_BACKOFF", 2.0**-10)
        pipe = StableDiffusionTSAMPipeline(**tiny_components(), requires_safety_checker=False).to(torch.float16)
        pipe.set_progress_bar_config(disable=True)
        output = run(pipe, alpha=30.0)
        still = run(pipe, alpha=0.0)
        assert output.images.isfinite().all() and not torch.equal(output.images, still.images)

    def test_an_update_that_is_not_finite_is_never_written(self, pipe, stock):
        output = run(pipe, alpha=1e300)
        assert output.images.isfinite().all()


class TestRestoration:
    def test_everything_is_as_found_after_a_call(self, pipe):
        pipe.unet.conv_in.weight.requires_grad_(False)
        pipe.unet.mid_block.train()
        before = state_of(pipe)
        run(pipe)
        assert state_of(pipe) == before
        pipe.unet.conv_in.weight.requires_grad_(True)
        pipe.unet.eval()

    @pytest.mark.parametrize("where", ["unet", "text_encoder", "callback", "interrupt"])
    def test_everything_is_as_found_after_a_failure(self, pipe, where):
        before = state_of(pipe)
        failure = KeyboardInterrupt("stop")

        def fail(*args, **kwargs):
            raise failure

        if where == "interrupt":

            def stop(pipe, i, t, kwargs):
                pipe._interrupt = True
                return kwargs

            output = run(pipe, callback_on_step_end=stop)
            assert output.losses.shape[1] == 3
        elif where == "callback":
            with pytest.raises(KeyboardInterrupt):
                run(pipe, callback_on_step_end=fail)
        else:
            module = pipe.unet.up_blocks[-1] if where == "unet" else pipe.text_encoder
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                run(pipe)
            handle.remove()
        assert state_of(pipe) == before

    def test_a_failure_inside_the_guided_pass_restores_the_processors(self, pipe):
        layers, _ = pipe.cross_attention_layers()
        before = [layer.processor for layer in layers]
        with pytest.raises(RuntimeError), frozen(pipe.unet), record_cross_attention(layers, 7):
            assert all(layer.processor is not old for layer, old in zip(layers, before))
            raise RuntimeError
        assert [layer.processor for layer in layers] == before

    def test_no_parameter_receives_a_gradient_and_callers_may_be_in_any_grad_mode(self, pipe):
        expected = run(pipe).images
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                embeds = pipe.encode_prompt(PROMPT, "cpu", 1, True)
                text = pipe.get_text_self_attention(PROMPT)
                output = run(
                    pipe, None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], text_self_attention=text
                )
            assert torch.equal(output.images, expected)
            assert not output.images.requires_grad
        assert all(p.grad is None for m in (pipe.unet, pipe.text_encoder) for p in m.parameters())


class TestOutput:
    def test_attentions_are_what_was_aligned(self, pipe):
        output = run(pipe, [PROMPT, SHORT], output_attentions=True)
        assert len(output.attentions) == 2
        seen = output.attentions[0]
        assert seen["tokens"] == PROMPT.split()
        assert seen["steps"] == [0, 1]
        assert seen["maps"].shape == (2, 7, 16, 16) and seen["similarity"].shape == (2, 7, 7)
        torch.testing.assert_close(seen["text_attention"].sum(-1), torch.ones(7))
        torch.testing.assert_close(seen["similarity"].sum(-1), torch.ones(2, 7))
        weight = torch.arange(1, 8) / 7
        loss = (weight * (seen["text_attention"] - seen["similarity"][0]).abs().sum(-1)).sum()
        torch.testing.assert_close(output.losses[0, 0], loss)
        assert seen["maps"].device.type == "cpu" and not seen["maps"].requires_grad

    def test_the_tuple_has_the_same_four_things(self, pipe):
        output, as_tuple = run(pipe), run(pipe, return_dict=False)
        assert len(as_tuple) == 4 and torch.equal(as_tuple[0], output.images)
        assert torch.equal(as_tuple[2], output.losses) and as_tuple[1] is None and as_tuple[3] is None

    def test_there_is_one_progress_bar_and_it_shows_the_loss(self, pipe, capfd):
        pipe.set_progress_bar_config(disable=False, mininterval=0)
        run(pipe)
        shown = capfd.readouterr().err
        assert shown.count("100%") >= 1 and "4/4" in shown and "loss=" in shown and "/6" not in shown

    def test_legacy_callbacks_are_called(self, pipe):
        seen = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(pipe, callback=lambda step, t, latents: seen.append(step), callback_steps=1)
        assert seen == [0, 1, 2, 3]


class TestWrongInput:
    @pytest.mark.parametrize(
        "arguments, error, message",
        [
            ({"tsam_steps": -1}, ValueError, "`tsam_steps` is -1"),
            ({"tsam_steps": 5}, ValueError, "only 4 denoising steps"),
            ({"tsam_steps": 1.5}, TypeError, "`tsam_steps` has to be an integer but is 1.5"),
            ({"tsam_steps": True}, TypeError, "integer"),
            ({"tsam_steps": "2"}, TypeError, "integer"),
            ({"alpha": -1.0}, ValueError, "`alpha` is -1.0"),
            ({"alpha": float("nan")}, ValueError, "`alpha` is nan"),
            ({"alpha": float("inf")}, ValueError, "finite"),
            ({"alpha": "10"}, TypeError, "number"),
            ({"gamma": 0.0}, ValueError, "`gamma` is 0.0"),
            ({"gamma": float("inf")}, ValueError, "`gamma` is inf"),
            ({"gamma": None}, TypeError, "number"),
            ({"refinement_iterations": -1}, ValueError, "`refinement_iterations` is -1"),
            ({"refinement_iterations": 2.0}, TypeError, "integer"),
            ({"refinement_steps": (2,)}, ValueError, "only steps 0 to 1 are guided"),
            ({"refinement_steps": (-1,)}, ValueError, "`refinement_steps` is -1"),
            ({"refinement_steps": 0}, TypeError, "sequence"),
            ({"refinement_steps": (0.5,)}, TypeError, "integer"),
            ({"refinement_steps": "01"}, TypeError, "sequence"),
            ({"objective": "l2"}, ValueError, "'l1', 'l1_full', 'cosine'"),
            ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0"),
            ({"attention_resolution": 8}, ValueError, "grids of 16"),
            ({"refinment_steps": ()}, TypeError, "refinment_steps"),
        ],
        ids=str,
    )
    def test_a_wrong_value_is_named_before_any_network_runs(self, pipe, arguments, error, message):
        def ran(*args, **kwargs):
            raise AssertionError("a network ran")

        handles = [m.register_forward_pre_hook(ran) for m in (pipe.unet, pipe.text_encoder)]
        try:
            with pytest.raises(error, match=message):
                run(pipe, **arguments)
        finally:
            for handle in handles:
                handle.remove()

    def test_refinement_of_steps_that_are_off_is_refused(self, pipe):
        with pytest.raises(ValueError, match="`refinement_steps` has 0"):
            run(pipe, tsam_steps=0, refinement_steps=(0,))


@pytest.fixture(scope="module")
def sd15(components):
    """Stable Diffusion 1.5's UNet, without memory or weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15)
    return StableDiffusionTSAMPipeline(**{**components, "unet": unet}, requires_safety_checker=False)


class TestArchitecture:
    @pytest.mark.parametrize("height, width, grid", [(512, 512, (16, 16)), (768, 512, (24, 16)), (520, 512, (17, 16))])
    def test_sd15_records_the_same_five_layers_at_every_size(self, sd15, height, width, grid):
        layers, level = sd15.cross_attention_layers()
        names = {id(module): name for name, module in sd15.unet.named_modules()}
        assert [names[id(layer)].split(".attentions")[0] for layer in layers] == [
            "down_blocks.2",
            "down_blocks.2",
            "up_blocks.1",
            "up_blocks.1",
            "up_blocks.1",
        ]
        latents = torch.empty(1, 4, height // 8, width // 8, device="meta")
        assert tuple(-(-side // 2**level) for side in latents.shape[-2:]) == grid
        with record_cross_attention(layers, 9) as maps, torch.no_grad():
            sd15.unet(latents, 1, encoder_hidden_states=torch.empty(1, 77, 768, device="meta"))
        assert [tuple(m.shape) for m in maps.values()] == [(1, grid[0] * grid[1], 9)] * 5

    def test_another_grid_can_be_asked_for(self, sd15):
        assert [len(sd15.cross_attention_layers(side)[0]) for side in (64, 32, 16, 8)] == [5, 5, 5, 1]

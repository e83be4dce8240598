"""What a user of either pipeline may rely on."""

import inspect
import warnings

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

from diffusers_tsam import attention_processors
from diffusers_tsam.attention_processors import LatentAlignment, frozen, record_cross_attention
from kinds import (
    KINDS,
    PROMPT,
    SCHEDULERS,
    SHORT,
    align,
    calls_of,
    denoiser_of,
    embeddings,
    layers_of,
    make,
    refused,
    run,
    state_of,
    use,
)


INPUTS = "callback_on_step_end_tensor_inputs"


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def rows(calls):
    """How many images each call of a denoiser was for."""
    return [len(args[0]) for args, _ in calls]


class TestOff:
    @pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
    def test_off_is_bit_identical_to_stock_under_every_scheduler(self, stock, pipe, scheduler):
        use(scheduler, stock, pipe)
        assert torch.equal(run(stock).images, run(pipe, tsam_steps=0).images)

    @pytest.mark.parametrize(
        "options",
        [
            {"prompt": [PROMPT, SHORT], "num_images_per_prompt": 2},
            {"negative_prompt": "a dog on the table"},
            {"prompt": [PROMPT, SHORT], "negative_prompt": ["a dog", "red"]},
            {"guidance_scale": 1.0},
            {"eta": 0.5},
            {"height": 48, "width": 80},
            {"num_inference_steps": 1},
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
            use(EulerDiscreteScheduler, stock, pipe)
        ours, theirs = run(pipe, tsam_steps=0, **options), run(stock, **options)
        if options.get("output_type") == "pil":
            assert ours.images[0].tobytes() == theirs.images[0].tobytes()
        else:
            assert (torch.as_tensor(ours.images) == torch.as_tensor(theirs.images)).all()

    def test_off_with_embeddings_latents_and_a_list_of_generators_is_bit_identical_to_stock(self, stock, pipe):
        options = {**embeddings(stock, [PROMPT, SHORT]), "latents": torch.randn(2, 4, 32, 32), "eta": 1.0}
        images = [
            run(one, None, tsam_steps=0, generator=[torch.Generator().manual_seed(k) for k in range(2)], **options)
            for one in (stock, pipe)
        ]
        assert torch.equal(images[0].images, images[1].images)

    def test_off_leaves_no_trace(self, pipe):
        before = state_of(pipe)
        output = run(pipe, tsam_steps=0, output_attentions=True)
        assert state_of(pipe) == before
        assert output.losses.shape == (1, 0) and output.attentions is None

    def test_alpha_zero_only_watches(self, stock, pipe):
        output = run(pipe, alpha=0.0)
        assert torch.equal(output.images, run(stock).images)
        assert output.losses.shape == (1, 2 + 2 * 2)

    def test_the_signature_is_stock_and_more(self, kind):
        ours = inspect.signature(kind.tsam.__call__).parameters
        theirs = inspect.signature(kind.stock.__call__).parameters
        assert [p for p in ours if p in theirs] == list(theirs)
        assert all(ours[name].default == theirs[name].default for name in theirs)
        assert {name: ours[name].default for name in kind.defaults} == kind.defaults
        assert kind.extra - {"callback_on_step_end", INPUTS} == set(kind.defaults)

    @pytest.mark.parametrize(
        "options",
        [
            {"num_images_per_prompt": 2},
            {"prompt": [PROMPT, SHORT], "negative_prompt": ["a dog", "red"]},
            {"guidance_scale": 1.0},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_the_text_encoder_runs_no_more_often_than_in_stock(self, stock, pipe, options):
        counts = []
        for one in (stock, pipe):
            with calls_of(one.text_encoder) as calls:
                run(one, num_inference_steps=2, **options)
            counts.append(len(calls))
        assert counts[0] == counts[1] == (1 if "guidance_scale" in options else 2)


class TestGuidance:
    @pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
    def test_guidance_moves_finite_latents_under_every_scheduler(self, stock, pipe, scheduler):
        use(scheduler, stock, pipe)
        output = run(pipe, alpha=50.0)
        assert output.images.isfinite().all()
        assert not torch.equal(output.images, run(stock).images)
        assert output.losses.shape == (1, 2 + 2 * 2)  # steps 0 and 1; both (0 and 20 percent of 4 are 0) refine once
        assert output.losses[0, 2] < output.losses[0, 0]

    def test_a_guided_pass_ends_at_the_last_map(self, pipe):
        denoiser, last = denoiser_of(pipe), layers_of(pipe)[-1]
        with calls_of(denoiser) as passes, calls_of(last.to_q) as read, calls_of(last.to_out[0]) as attended:
            run(pipe, num_inference_steps=2, refinement_iterations=3)
        assert len(passes) == len(read) == 2 + 4
        assert len(attended) == 2  # only the two noise predictions go on

    @pytest.mark.parametrize("way", ["slicing", "plain", "fused"])
    def test_the_maps_are_the_same_however_attention_is_computed(self, kind, way):
        components = kind.build()
        pipe = make(kind.tsam, components)
        expected = run(pipe, alpha=kind.alpha, num_inference_steps=2).losses
        denoiser = components[kind.denoiser]
        if way == "slicing":
            denoiser.set_attn_processor(SlicedAttnProcessor(1))
        elif way == "plain":
            denoiser.set_attn_processor(AttnProcessor())
        else:
            denoiser.fuse_qkv_projections()
        losses = run(pipe, alpha=kind.alpha, num_inference_steps=2).losses
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)

    def test_gradient_checkpointing_changes_no_number(self, kind):
        components = kind.build()
        pipe = make(kind.tsam, components)
        plain = run(pipe, alpha=kind.alpha)
        components[kind.denoiser].enable_gradient_checkpointing()
        checkpointed = run(pipe, alpha=kind.alpha)
        torch.testing.assert_close(checkpointed.losses, plain.losses, rtol=1e-4, atol=1e-5)
        assert checkpointed.losses[0, 2] < checkpointed.losses[0, 0]

    def test_the_loss_falls_during_refinement(self, kind, pipe):
        losses = run(pipe, refinement_iterations=10, alpha=kind.alpha).losses[0]
        assert losses[10] < 0.97 * losses[0]

    @pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
    def test_one_alpha_takes_the_same_step_at_the_models_input_under_every_scheduler(self, kind, pipe, scheduler):
        model_input = torch.randn(1, 4, 32, 32)
        text = pipe.get_text_self_attention(PROMPT)
        moved = []
        for one in (DDIMScheduler, scheduler):
            pipe.scheduler = one.from_config(pipe.scheduler.config, timestep_spacing="trailing")
            pipe.scheduler.set_timesteps(10)
            t = pipe.scheduler.timesteps[0]
            scale = pipe.scheduler.scale_model_input(torch.ones(()), t)
            latents = align(pipe, LatentAlignment(text, alpha=1.5 * kind.alpha, gamma=2.0), model_input / scale, t)
            moved.append(latents * scale - model_input)
        assert moved[0].abs().max() > 1e-3
        torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-5)

    def test_unipc_does_not_take_the_move_back(self, pipe):
        use(UniPCMultistepScheduler, pipe)
        pipe.scheduler.set_timesteps(4)
        pipe.scheduler.last_sample = torch.zeros(1)
        alignment = LatentAlignment(pipe.get_text_self_attention(PROMPT), 1.0, 2.0)
        align(pipe, alignment, torch.randn(1, 4, 32, 32), pipe.scheduler.timesteps[0])
        assert pipe.scheduler.last_sample is None

    @pytest.mark.parametrize("objective", attention_processors.OBJECTIVES)
    def test_every_objective_guides(self, pipe, stock, objective):
        output = run(pipe, objective=objective)
        assert output.losses.isfinite().all() and not torch.equal(output.images, run(stock).images)

    def test_only_the_conditional_half_is_read(self, pipe):
        with_guidance, without = run(pipe, alpha=0.0), run(pipe, alpha=0.0, guidance_scale=1.0)
        torch.testing.assert_close(with_guidance.losses[:, 0], without.losses[:, 0])

    def test_the_negative_prompt_does_not_change_the_first_loss(self, pipe):
        plain, negative = run(pipe), run(pipe, negative_prompt="a green dog")
        assert plain.losses[0, 0] == negative.losses[0, 0]
        assert not torch.equal(plain.images, negative.images)

    def test_padding_never_changes_the_loss(self, pipe):
        text = pipe.get_text_self_attention([PROMPT, SHORT])
        length = text.content.shape[1]
        maps = torch.rand(2, length, 16, 16)
        losses = []
        for tokens in (9, length):
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
    def test_a_prompt_with_nothing_to_align_is_plain_generation_and_says_so(self, stock, pipe, prompt, warnings_seen):
        output = run(pipe, prompt)
        assert torch.equal(output.images, run(stock, prompt).images)
        assert output.losses.shape == (1, 0)
        assert "no prompt has two" in warnings_seen.text
        warnings_seen.clear()
        run(pipe, [prompt, SHORT])
        run(pipe, prompt, tsam_steps=0)
        assert not warnings_seen.text

    @pytest.mark.parametrize("more", [0, 45])
    def test_a_long_prompt_is_truncated_as_stock_does_with_its_warning(self, kind, pipe, more, caplog, capfd):
        prompt = " ".join(("a red car " * 60).split()[: kind.words + more])
        text = pipe.get_text_self_attention(prompt)
        assert text.content.sum() == kind.words and len(text.tokens[0]) == kind.words
        assert run(pipe, prompt).images.isfinite().all()
        warnings_seen = caplog.text + capfd.readouterr().err
        assert ("part of your input was truncated" in warnings_seen) == (more > 0)

    @pytest.mark.parametrize("size", [(48, 80), (128, 64), (64, 64), (8, 64)])
    def test_any_size_is_guided_on_its_own_grid(self, pipe, size):
        height, width = size
        output = run(pipe, height=height, width=width, output_attentions=True, num_inference_steps=2)
        assert output.images.shape[-2:] == (height // 2, width // 2)  # the tiny VAE halves
        assert output.attentions[0]["maps"].shape[-2:] == (height // 4, width // 4)
        assert output.images.isfinite().all()


class TestTextSelfAttention:
    def test_embeddings_alone_are_refused_and_the_remedy_works(self, pipe):
        with torch.no_grad():
            given = embeddings(pipe, PROMPT)
        with refused(pipe, ValueError, "get_text_self_attention"):
            run(pipe, None, **given)
        output = run(pipe, None, text_self_attention=pipe.get_text_self_attention(PROMPT), **given)
        assert torch.equal(output.images, run(pipe).images)

    def test_a_t_given_with_a_prompt_is_the_one_that_is_aligned(self, pipe):
        text, expected = pipe.get_text_self_attention(PROMPT), run(pipe)
        assert torch.equal(run(pipe, text_self_attention=text).losses, expected.losses)
        even = text._replace(attention=torch.ones_like(text.attention).tril())
        assert run(pipe, text_self_attention=even).losses[0, 0] != expected.losses[0, 0]

    def test_the_tokens_are_the_prompts_own(self, kind, pipe):
        text = pipe.get_text_self_attention([PROMPT, SHORT])
        assert text.tokens == [PROMPT.split(), SHORT.split()]
        assert text.content[1].nonzero().flatten().tolist() == [kind.first + k for k in range(3)]
        assert text.attention.dtype == torch.float32
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
        with refused(pipe, ValueError, "these prompts need"):
            run(pipe, text_self_attention=wrong)

    def test_something_else_than_a_t_is_refused(self, pipe):
        with refused(pipe, TypeError, "get_text_self_attention"):
            run(pipe, text_self_attention=torch.ones(7, 7))


class TestCallbacks:
    def test_it_is_called_after_every_step_with_the_latents(self, pipe):
        seen = []

        def watch(one, step, t, tensors):
            assert one is pipe
            seen.append((step, int(t), *tensors))
            return {}

        output = run(pipe, callback_on_step_end=watch)
        assert seen == [(step, int(t), "latents") for step, t in enumerate(pipe.scheduler.timesteps)]
        assert torch.equal(output.images, run(pipe).images)

    def test_it_may_replace_the_latents(self, pipe):
        def clear(pipe, step, t, tensors):
            return {"latents": torch.zeros_like(tensors["latents"])} if step == 0 else {}

        one, other = (run(pipe, seed=seed, callback_on_step_end=clear) for seed in (0, 1))
        assert torch.equal(one.images, other.images) and one.losses[0, 0] != other.losses[0, 0]

    def test_it_may_replace_the_embeddings(self, pipe):
        names = ["prompt_embeds", "negative_prompt_embeds"]
        with calls_of(denoiser_of(pipe)) as calls:

            def double(pipe, step, t, tensors):
                assert list(tensors) == names
                return {"prompt_embeds": tensors["prompt_embeds"] * 2} if step == 1 else {}

            run(pipe, tsam_steps=3, refinement_steps=(), callback_on_step_end=double, **{INPUTS: names})
        prompt = [kwargs["encoder_hidden_states"][-1] for _, kwargs in calls]  # guided, drawn, ...; the last is drawn
        assert all(torch.equal(embeds, prompt[0]) for embeds in prompt[:4])
        assert all(torch.equal(embeds, 2 * prompt[0]) for embeds in prompt[4:]) and len(prompt) == 7

    @pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: MultiPipelineCallbacks([callback])])
    def test_one_that_drops_the_unconditional_half_goes_on_guided(self, pipe, wrap):
        callback = wrap(SDCFGCutoffCallback(cutoff_step_ratio=0.25))
        with calls_of(denoiser_of(pipe)) as calls:
            output = run(pipe, tsam_steps=4, refinement_steps=(), callback_on_step_end=callback)
        assert rows(calls) == [1, 2, 1, 2, 1, 1, 1, 1]  # before every prediction one for its update
        assert output.losses.shape == (1, 4) and output.images.isfinite().all()

    def test_legacy_callbacks_are_called_as_in_stock(self, stock, pipe):
        for every, expected in ((1, [0, 1, 2, 3]), (2, [0, 2])):
            for one in (stock, pipe):
                seen = []
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run(one, callback=lambda step, t, latents, seen=seen: seen.append(step), callback_steps=every)
                assert seen == expected


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_stays_half_and_finite_with_the_loss_in_float32(self, kind, pipe, dtype):
        output = run(make(kind.tsam, kind.build()).to(dtype))
        assert output.images.dtype == dtype and output.images.isfinite().all()
        assert output.losses.dtype == torch.float32 and output.losses.isfinite().all()
        torch.testing.assert_close(output.losses[0, 0], run(pipe).losses[0, 0], rtol=0.05, atol=0.05)

    def test_a_gradient_that_overflows_is_tried_again_with_less(self, kind, monkeypatch):
        monkeypatch.setattr(attention_processors, "FP16_LOSS_SCALE", 2.0**30)
        monkeypatch.setattr(attention_processors, "FP16_LOSS_SCALE_BACKOFF", 2.0**-10)
        pipe = make(kind.tsam, kind.build()).to(torch.float16)
        output = run(pipe, alpha=1.5 * kind.alpha)
        still = run(pipe, alpha=0.0)
        assert output.images.isfinite().all() and not torch.equal(output.images, still.images)

    def test_an_image_whose_gradient_never_is_finite_stays_and_that_is_said(self, kind, monkeypatch, warnings_seen):
        monkeypatch.setattr(attention_processors, "FP16_LOSS_SCALE", 2.0**30)
        monkeypatch.setattr(attention_processors, "FP16_LOSS_SCALE_BACKOFF", 1.0)
        pipe = make(kind.tsam, kind.build()).to(torch.float16)
        assert torch.equal(run(pipe, alpha=1.5 * kind.alpha).images, run(pipe, alpha=0.0).images)
        assert "Try bfloat16" in warnings_seen.text

    def test_an_update_that_is_not_finite_is_never_written(self, pipe):
        output = run(pipe, alpha=1e300)
        assert output.images.isfinite().all()


class TestRestoration:
    def test_everything_is_as_found_after_a_call(self, pipe):
        parameter, module = next(denoiser_of(pipe).parameters()), layers_of(pipe)[0]
        parameter.requires_grad_(False)
        module.train()
        before = state_of(pipe)
        run(pipe)
        assert state_of(pipe) == before
        parameter.requires_grad_(True)
        module.eval()

    @pytest.mark.parametrize("where", ["denoiser", "text_encoder", "callback"])
    def test_everything_is_as_found_after_a_failure(self, pipe, where):
        before = state_of(pipe)

        def fail(*args, **kwargs):
            raise KeyboardInterrupt

        if where == "callback":
            with pytest.raises(KeyboardInterrupt):
                run(pipe, callback_on_step_end=fail)
        else:
            module = pipe.text_encoder if where == "text_encoder" else layers_of(pipe)[-1].to_out[0]
            handle = module.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                run(pipe)
            handle.remove()
        assert state_of(pipe) == before

    def test_everything_is_as_found_after_an_interrupt_which_stops_the_guidance(self, pipe):
        before = state_of(pipe)

        def stop(pipe, step, t, tensors):
            pipe._interrupt = True
            return tensors

        with calls_of(denoiser_of(pipe)) as calls:
            output = run(pipe, callback_on_step_end=stop)
        assert output.losses.shape[1] == 3 and rows(calls) == [1, 1, 1, 2]
        assert state_of(pipe) == before

    def test_a_failure_inside_the_guided_pass_restores_the_processors(self, pipe):
        layers = layers_of(pipe)
        before = [layer.processor for layer in layers]
        with pytest.raises(RuntimeError), frozen(denoiser_of(pipe)), record_cross_attention(layers, 7):
            assert all(layer.processor is not old for layer, old in zip(layers, before))
            raise RuntimeError
        assert [layer.processor for layer in layers] == before

    def test_no_parameter_receives_a_gradient_and_callers_may_be_in_any_grad_mode(self, pipe):
        short = {"num_inference_steps": 2, "refinement_iterations": 1}
        expected = run(pipe, **short).images
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                text, given = pipe.get_text_self_attention(PROMPT), embeddings(pipe, PROMPT)
                output = run(pipe, None, text_self_attention=text, **given, **short)
                assert torch.equal(run(pipe, **short).images, expected)
            # not of the prompt: where it records gradients, T5 rounds otherwise
            given = {name: value if value is None else value.detach().clone() for name, value in given.items()}
            assert torch.equal(output.images, run(pipe, None, text_self_attention=text, **given, **short).images)
            assert not output.images.requires_grad
        assert all(p.grad is None for m in (denoiser_of(pipe), pipe.text_encoder) for p in m.parameters())


class TestOutput:
    def test_attentions_are_what_was_aligned(self, pipe):
        output = run(pipe, [PROMPT, SHORT], output_attentions=True)
        assert len(output.attentions) == 2
        seen = output.attentions[0]
        assert seen["tokens"] == PROMPT.split()
        assert seen["steps"] == [0, 1]
        side = output.images.shape[-1] // 2
        assert seen["maps"].shape == (2, 7, side, side) and seen["similarity"].shape == (2, 7, 7)
        torch.testing.assert_close(seen["text_attention"].sum(-1), torch.ones(7))
        torch.testing.assert_close(seen["similarity"].sum(-1), torch.ones(2, 7))
        weight = torch.arange(1, 8) / 7
        loss = (weight * (seen["text_attention"] - seen["similarity"][0]).abs().sum(-1)).sum()
        torch.testing.assert_close(output.losses[0, 0], loss)
        assert seen["maps"].device.type == "cpu" and not seen["maps"].requires_grad

    def test_the_tuple_has_the_same_things(self, kind, pipe):
        output, as_tuple = run(pipe), dict(zip(kind.fields, run(pipe, return_dict=False), strict=True))
        for name in ("images", "losses"):
            assert torch.equal(as_tuple.pop(name), output[name])
        assert all(value is getattr(output, name) is None for name, value in as_tuple.items())

    def test_there_is_one_progress_bar_and_it_shows_the_loss(self, pipe, capfd):
        pipe.set_progress_bar_config(disable=False, mininterval=0)
        run(pipe)
        shown = capfd.readouterr().err
        assert shown.count("100%") >= 1 and "4/4" in shown and "loss=" in shown and "/6" not in shown


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
            ({"tsam_steps": 0, "refinement_steps": (0,)}, ValueError, "`refinement_steps` has 0"),
            ({"objective": "l2"}, ValueError, "'l1', 'l1_full', 'cosine'"),
            ({"num_inference_steps": 0}, ValueError, "`num_inference_steps` is 0"),
            ({"refinment_steps": ()}, TypeError, "refinment_steps"),
            ({"height": 60, "width": 64}, ValueError, "divisible by 8"),
            ({"prompt": None}, ValueError, "Provide either `prompt`"),
            ({"prompt": 3}, ValueError, "`prompt` has to be"),
            ({"prompt_embeds": torch.zeros(1, 7, 16)}, ValueError, "Cannot forward both `prompt`"),
            ({"callback_steps": 0}, ValueError, "`callback_steps` has to be a positive integer"),
            ({INPUTS: ["noise_pred"]}, ValueError, "`callback_on_step_end_tensor_inputs` has to be in"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    @pytest.mark.filterwarnings("ignore:`callback_steps`:FutureWarning")
    def test_a_wrong_value_is_named_before_any_network_runs(self, pipe, arguments, error, message):
        with refused(pipe, error, message):
            run(pipe, **arguments)

"""What a user of either pipeline may rely on."""

import copy
import dataclasses
import inspect
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback

from diffusers_tsam import tsam
from kinds import (
    INPUTS,
    PROMPT,
    SCHEDULERS,
    SHORT,
    Blocks,
    calls_of,
    denoiser_of,
    embeddings,
    every,
    every_pipeline,
    generators,
    layers_of,
    make,
    refused,
    run,
    state_of,
    use,
)


ONE = {"num_inference_steps": 1, "tsam_steps": 1, "refinement_steps": ()}
TWO = {"num_inference_steps": 2}  # of which one is guided, with two more updates
only_sd = pytest.mark.parametrize("kind", ["sd"], indirect=True)
TWO_PROMPTS = {"prompt": [PROMPT, SHORT], "negative_prompt": ["a dog", "red"]}
WRONG = {"refinement_steps": 3, "objective": "l3", "alpha": -1.0, "relative_step": "a", "regions": 3}


def rows(calls):
    """How many images each call of a denoiser was for."""
    return [len(args[0]) for args, _ in calls]


class TestOff:
    @pytest.mark.parametrize(
        "options",
        [
            {**TWO_PROMPTS, "num_images_per_prompt": 2, "eta": 0.5, "height": 48, "width": 80, "output_type": "np"},
            {"prompt": "", "num_inference_steps": 1, "refinement_steps": (9,), "objective": print, "preset": "quick"},
            {"prompt": "a red car " * 60, "timesteps": [900, 600, 10], "output_type": "pil", **WRONG},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_off_is_bit_identical_to_stock_with_every_option(self, stock, pipe, options):
        """Ours may then be wrong, because nothing reads them."""
        if "timesteps" in options:
            use(EulerDiscreteScheduler, stock, pipe)
        images = [np.stack(run(one, tsam_steps=0, **options).images) for one in (pipe, stock)]
        assert (images[0] == images[1]).all()

    def test_off_with_embeddings_latents_and_a_list_of_generators_is_bit_identical_to_stock(self, kind, stock, pipe):
        options = {**embeddings(stock, [PROMPT, SHORT]), "latents": torch.randn(2, 4, 32, 32), "eta": 1.0}
        if kind.name == "sd":
            options["guidance_rescale"] = 0.7
        images = [run(one, None, tsam_steps=0, generator=generators(2), **options) for one in (stock, pipe)]
        assert torch.equal(images[0].images, images[1].images)

    @every
    @pytest.mark.parametrize(
        "options", [{"prompt": [PROMPT, SHORT], "num_images_per_prompt": 2}, {"guidance_scale": 1.0}]
    )
    def test_off_is_bit_identical_to_stock_and_alpha_zero_only_watches(self, kind, stock, pipe, options):
        if "guidance_scale" in options and isinstance(kind, Blocks):
            pytest.skip("blocks have guiders")
        theirs = run(stock, **TWO, **options).images
        for ours, updates in (({"tsam_steps": 0}, 0), ({"tsam_steps": 2, "alpha": 0.0}, 2 + 2)):
            output = run(pipe, **TWO, **ours, **options)
            assert torch.equal(output.images, theirs) and output.losses.shape == (len(theirs), updates)

    @every_pipeline
    def test_the_signature_is_stock_and_the_documented_settings(self, kind):
        ours = inspect.signature(kind.tsam.__call__).parameters
        theirs = inspect.signature(kind.stock.__call__).parameters
        assert [p for p in ours if p in theirs] == list(theirs)
        assert all(ours[name].default == theirs[name].default for name in theirs)
        extra = {name: ours[name].default for name in kind.extra - {"callback_on_step_end", INPUTS}}
        assert extra == {each.name: each.default for each in dataclasses.fields(kind.tsam.settings)}
        assert all(f"{name} (`" in kind.tsam.__call__.__doc__ for name in extra)

    def test_the_text_encoder_runs_no_more_often_than_in_stock(self, stock, pipe):
        for options, number in (({"num_images_per_prompt": 2}, 2), (TWO_PROMPTS, 2), ({"guidance_scale": 1.0}, 1)):
            for one in (stock, pipe):
                with calls_of(one.text_encoder) as calls:
                    run(one, **TWO, **options)
                assert len(calls) == number


class TestGuidance:
    @pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
    def test_guidance_moves_finite_latents_and_off_is_bit_identical_to_stock_under_every_scheduler(
        self, stock, pipe, scheduler
    ):
        use(scheduler, stock, pipe)
        output, theirs = run(pipe, alpha=50.0), run(stock).images
        assert output.images.isfinite().all() and not torch.equal(output.images, theirs)
        assert output.losses.shape == (1, 2 + 2 * 2)  # steps 0 and 1; both (0 and 20 percent of 4 are 0) refine once
        assert output.losses[0, 2] < output.losses[0, 0]
        assert torch.equal(run(pipe, tsam_steps=0).images, theirs)

    @every
    def test_a_guided_pass_ends_at_the_last_map(self, stock, pipe):
        denoiser, last = denoiser_of(pipe), layers_of(pipe)[-1]
        with calls_of(denoiser) as predictions:
            run(stock, **TWO)
        with calls_of(denoiser) as passes, calls_of(last.to_q) as read, calls_of(last.to_out[0]) as attended:
            run(pipe, **TWO, refinement_iterations=3)
        assert len(passes) == len(read) == len(predictions) + 4
        assert len(attended) == len(predictions)  # only the noise predictions go on

    @every
    def test_the_loss_falls_during_the_refinement_of_a_single_step_and_the_picture_moves(self, kind, stock, pipe):
        output = run(pipe, num_inference_steps=1, tsam_steps=1, refinement_iterations=10, alpha=kind.alpha)
        assert output.losses[0, 10] < 0.97 * output.losses[0, 0] and output.losses.dtype == torch.float32
        assert output.images.isfinite().all()
        assert not torch.allclose(output.images, run(stock, num_inference_steps=1).images, atol=0.01)

    @pytest.mark.parametrize("objective", tsam.OBJECTIVES)
    def test_every_objective_guides(self, pipe, stock, objective):
        output = run(pipe, objective=objective, **TWO)
        assert output.losses.isfinite().all() and not torch.equal(output.images, run(stock, **TWO).images)

    def test_only_the_conditional_half_is_read(self, pipe):
        plain, alone, negative = run(pipe), run(pipe, guidance_scale=1.0), run(pipe, negative_prompt="a green dog")
        torch.testing.assert_close(plain.losses[:, 0], alone.losses[:, 0])
        assert plain.losses[0, 0] == negative.losses[0, 0] and not torch.equal(plain.images, negative.images)


class TestBatches:
    @every
    def test_an_image_in_a_batch_is_the_same_image_alone(self, pipe):
        prompts = [PROMPT, SHORT, "dog", "", "the red car on a green table and a blue sphere and a white cube"]
        batch = run(pipe, prompts, generator=generators(5), alpha=20.0, **TWO)
        for k, prompt in enumerate(prompts):
            alone = run(pipe, prompt, seed=k, alpha=20.0, **TWO)
            torch.testing.assert_close(batch.images[k], alone.images[0], rtol=1e-3, atol=1e-3)
            if alone.losses.shape[1]:
                torch.testing.assert_close(batch.losses[k], alone.losses[0], rtol=1e-4, atol=1e-4)
            else:
                assert not batch.losses[k].any()

    @every
    def test_several_images_a_prompt_are_prompt_major(self, kind, pipe):
        prompts = [SHORT] if kind.name == "sdxl" else [PROMPT, SHORT]  # whose stock mixes up pooled embeddings
        several = {"generator": generators(2 * len(prompts)), "num_images_per_prompt": 2, "output_attentions": True}
        batch = run(pipe, prompts, **several, **TWO)
        assert [len(a["tokens"]) for a in batch.attentions] == [7, 7, 3, 3][-2 * len(prompts) :]
        alone = run(pipe, SHORT, seed=2 * len(prompts) - 1, **TWO)
        torch.testing.assert_close(batch.images[-1], alone.images[0], rtol=1e-3, atol=1e-3)

    @every
    def test_prompts_with_nothing_to_align_are_plain_generation_and_that_is_said(self, stock, pipe, warnings_seen):
        output = run(pipe, ["", "dog"], **TWO)
        assert torch.equal(output.images, run(stock, ["", "dog"], **TWO).images)
        assert output.losses.shape == (2, 0)
        assert "no prompt has two" in warnings_seen.text
        warnings_seen.clear()
        run(pipe, "dog", **ONE, candidates=3, objective=lambda maps, text: maps.flatten(1).sum(1))
        assert warnings_seen.text.count("T-SAM ") == warnings_seen.text.count("finds all starts alike") == 1
        warnings_seen.clear()
        run(pipe, ["", SHORT], **ONE)
        run(pipe, "dog", **ONE | {"tsam_steps": 0})
        assert not warnings_seen.text

    @pytest.mark.parametrize("more", [0, 45])
    def test_a_long_prompt_is_truncated_as_stock_does_with_its_warning(self, kind, pipe, more, caplog, capfd):
        words = 75 if kind.name == "sd" else 119
        prompt = " ".join(("a red car " * 60).split()[: words + more])
        text = pipe.get_text_self_attention(prompt)
        assert text.content.sum() == words and len(text.tokens[0]) == words
        assert run(pipe, prompt, **TWO).images.isfinite().all()
        warnings_seen = caplog.text + capfd.readouterr().err
        assert ("part of your input was truncated" in warnings_seen) == (more > 0)

    @pytest.mark.parametrize("size", [(48, 80), (128, 64), (64, 64), (8, 64)])
    def test_any_size_is_guided_on_its_own_grid(self, pipe, size):
        height, width = size
        output = run(pipe, height=height, width=width, output_attentions=True, **TWO)
        assert output.images.shape[-2:] == (height // 2, width // 2)  # the tiny VAE halves
        assert output.attentions[0]["maps"].shape[-2:] == (height // 4, width // 4)
        assert output.images.isfinite().all()


class TestTextSelfAttention:
    def test_a_t_given_with_a_prompt_is_the_one_that_is_aligned(self, pipe):
        text, expected = pipe.get_text_self_attention(PROMPT), run(pipe)
        assert torch.equal(run(pipe, text_self_attention=text).losses, expected.losses)
        even = text._replace(attention=torch.ones_like(text.attention).tril())
        assert run(pipe, text_self_attention=even).losses[0, 0] != expected.losses[0, 0]

    def test_embeddings_alone_and_a_t_of_the_wrong_shape_are_refused(self, pipe):
        """The remedy works: test_diffusers_checks.py."""
        given, text = embeddings(pipe, PROMPT), pipe.get_text_self_attention(PROMPT)
        with refused(pipe, ValueError, "get_text_self_attention"):
            run(pipe, None, **given)
        wrong = [{"attention": text.attention.repeat(2, 1, 1)}, {"attention": text.attention[:, :20, :20]}]
        for fields in (*wrong, {"content": text.content[:, :20]}, {"tokens": []}):
            with refused(pipe, ValueError, "these prompts need"):
                run(pipe, text_self_attention=text._replace(**fields))


class TestCallbacks:
    def test_it_is_called_after_every_step_with_the_tensors_that_it_asks_for(self, pipe):
        seen, names = [], pipe._callback_tensor_inputs

        def watch(one, step, t, tensors):
            assert one is pipe and all(map(torch.is_tensor, tensors.values()))
            seen.append((step, int(t), *tensors))
            return {}

        output = run(pipe, callback_on_step_end=watch, **{INPUTS: names})
        assert seen == [(step, int(t), *names) for step, t in enumerate(pipe.scheduler.timesteps)]
        assert torch.equal(output.images, run(pipe).images)

    def test_it_may_replace_the_latents(self, pipe):
        """All that it is handed, unless it asks for more; behind the last step, too."""

        def clear(pipe, step, t, tensors):
            assert [*tensors] == ["latents"]
            return {"latents": torch.zeros_like(tensors["latents"])} if step in cleared else {}

        cleared = [0]
        one, other = (run(pipe, seed=seed, callback_on_step_end=clear) for seed in (0, 1))
        assert torch.equal(one.images, other.images) and one.losses[0, 0] != other.losses[0, 0]
        cleared = [3]
        assert not run(pipe, callback_on_step_end=clear).images.any()

    @only_sd  # stock PixArt-α hands out no embeddings
    def test_it_may_replace_the_embeddings(self, kind, pipe):
        names = ["prompt_embeds", "negative_prompt_embeds"]
        with calls_of(denoiser_of(pipe)) as calls:

            def double(pipe, step, t, tensors):
                assert list(tensors) == names
                return {"prompt_embeds": tensors["prompt_embeds"] * 2} if step == 1 else {}

            run(pipe, tsam_steps=3, refinement_steps=(), callback_on_step_end=double, **{INPUTS: names})
        prompt = [kwargs["encoder_hidden_states"][-1] for _, kwargs in calls]  # guided, drawn, ...; the last is drawn
        assert all(torch.equal(embeds, prompt[0]) for embeds in prompt[:4])
        assert all(torch.equal(embeds, 2 * prompt[0]) for embeds in prompt[4:]) and len(prompt) == 7

    @only_sd
    @pytest.mark.parametrize("wrap", [lambda callback: callback, lambda callback: MultiPipelineCallbacks([callback])])
    def test_one_that_drops_the_unconditional_half_goes_on_guided(self, kind, pipe, wrap):
        callback = wrap(SDCFGCutoffCallback(cutoff_step_ratio=0.25))
        with calls_of(denoiser_of(pipe)) as calls:
            output = run(pipe, tsam_steps=4, refinement_steps=(), callback_on_step_end=callback)
        assert rows(calls) == [1, 2, 1, 2, 1, 1, 1, 1]  # before every prediction one for its update
        assert output.losses.shape == (1, 4) and output.images.isfinite().all()

    def test_legacy_callbacks_are_called_as_in_stock(self, stock, pipe):
        for period, expected in ((1, [0, 1, 2, 3]), (2, [0, 2])):
            for one in (stock, pipe):
                seen = []
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run(one, callback=lambda step, t, latents, seen=seen: seen.append(step), callback_steps=period)
                assert seen == expected


class TestLoop:
    """Stock's own loop runs, on what stands in for its scheduler and denoiser."""

    def test_a_callback_meets_the_pipeline_that_the_user_has_and_may_draw_with_it(self, kind, pipe):
        expected, alone, scheduler = run(pipe), run(pipe, SHORT, seed=1), pipe.scheduler
        inner = []

        def draw(one, step, t, tensors):
            assert isinstance(one.scheduler, DDIMScheduler) and isinstance(denoiser_of(one), torch.nn.Module)
            assert one.components["scheduler"] is scheduler
            assert one.components[kind.denoiser] is kind.components[kind.denoiser]
            if step < 2:
                inner.append(run(one, SHORT, seed=1))
            return tensors

        output = run(pipe, callback_on_step_end=draw)
        for drawn, wanted in ((output, expected), *((drawn, alone) for drawn in inner)):
            assert torch.equal(drawn.images, wanted.images) and torch.equal(drawn.losses, wanted.losses)
        assert len(inner) == 2 and pipe.scheduler is scheduler

    def test_a_progress_bar_of_ones_own_needs_no_more_than_stock_asks_of_it(self, pipe):
        counted, expected = [], run(pipe)
        bar = SimpleNamespace(update=lambda number=1: counted.append(number))
        pipe.progress_bar = lambda total=None: nullcontext(bar)
        assert torch.equal(run(pipe).images, expected.images) and len(counted) == 4

    def test_a_loop_that_predicts_without_scaling_is_refused(self, kind):
        class Unscaled(kind.stock):
            def __call__(self, **given):
                return getattr(self, kind.denoiser)(torch.zeros(1, 4, 32, 32), 1)

        pipe = make(type("Odd", (kind.tsam, Unscaled), {}), kind.components)
        with calls_of(denoiser_of(pipe)) as calls, pytest.raises(RuntimeError, match="predicts before.*`tsam_steps=0`"):
            run(pipe)
        assert not calls

    def test_a_loop_that_makes_no_updates_is_refused(self, kind):
        class Idle(kind.stock):
            _interrupt = False

            def __call__(self, **given):
                return (torch.zeros(1, 3, 8, 8),)

        pipe = make(type("Odd", (kind.tsam, Idle), {}), kind.components)
        with pytest.raises(RuntimeError, match="Of all updates 0 were made.*loop of Odd.*`tsam_steps=0`"):
            run(pipe)

    def test_a_denoiser_that_a_callback_gives_is_guided_from_then_on(self, kind, pipe):
        other, expected = copy.deepcopy(denoiser_of(pipe)), run(pipe)

        def replace(one, step, t, tensors):
            setattr(one, kind.denoiser, other)
            return tensors

        with calls_of(other) as calls:
            output = run(pipe, callback_on_step_end=replace)
        assert torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)
        assert calls and denoiser_of(pipe) is other

    def test_guidance_walks_over_the_weights_four_times_whatever_the_steps(self, stock, pipe, monkeypatch):
        counts, walks, walk = [], [], torch.nn.Module.named_modules  # which every walk over modules or parameters takes
        counted = lambda module, *args, **kwargs: walks.append(module) or walk(module, *args, **kwargs)  # noqa: E731
        monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
        for one, steps in ((stock, 2), (pipe, 2), (pipe, 6)):
            walks.clear()
            run(one, num_inference_steps=steps, tsam_steps=steps, refinement_steps=())
            counts.append(sum(module is denoiser_of(pipe) for module in walks))
        assert counts[1] == counts[2] <= counts[0] + 4


class TestRestoration:
    @every
    def test_everything_is_as_found_after_a_call(self, stock, pipe):
        """Where some modules train and some weights are frozen, too."""
        run(stock, num_inference_steps=1)  # transformers leaves hooks in an encoder at its first call
        denoiser, module = denoiser_of(pipe), layers_of(pipe)[0]
        parameter = next(denoiser.parameters()).requires_grad_(False)
        denoiser.train()
        module.eval()
        before = state_of(pipe)
        assert run(pipe, **TWO).images.isfinite().all() and state_of(pipe) == before
        off = run(pipe, tsam_steps=0, output_attentions=True, **TWO)
        assert state_of(pipe) == before and off.losses.shape == (1, 0) and off.attentions is None
        parameter.requires_grad_(True)
        denoiser.eval()

    @every
    def test_everything_is_as_found_after_a_failure_and_the_next_picture_the_same(self, kind, pipe):
        expected, before, last = run(pipe, **ONE).images, state_of(pipe), layers_of(pipe)[-1]

        def fail(*args, **kwargs):
            raise KeyboardInterrupt

        # In the text encoder, a guided pass, a prediction (which alone comes to the last layer's end), ours and theirs
        places = [(pipe.text_encoder, {}), (last.to_q, {}), (last.to_out[0], {}), (None, {"objective": fail})]
        if not isinstance(kind, Blocks):  # which have no callbacks
            places.append((None, {"callback_on_step_end": fail}))
        for module, given in places:
            handle = module and module.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                run(pipe, **ONE, **given)
            if handle:
                handle.remove()
            assert state_of(pipe) == before
            assert torch.equal(run(pipe, **ONE).images, expected) and state_of(pipe) == before

    def test_everything_is_as_found_after_an_interrupt_which_stops_the_guidance(self, pipe):
        before = state_of(pipe)

        def stop(pipe, step, t, tensors):
            pipe._interrupt = True
            return tensors

        with calls_of(denoiser_of(pipe)) as calls:
            output = run(pipe, callback_on_step_end=stop)
        assert output.losses.shape[1] == 3 and rows(calls) == [1, 1, 1, 2]
        assert state_of(pipe) == before

    @every
    def test_callers_may_be_in_any_grad_mode(self, kind, pipe):
        def own(maps, text):
            return (tsam.similarity_of(maps, text.content) * text.target).sum((1, 2))

        options = {"alpha": kind.alpha, "objective": own, **TWO}
        expected = run(pipe, **options)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                output = run(pipe, **options)
            assert torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)
            assert all(gradient is None for _, gradient in state_of(pipe)["parameters"])

    def test_embeddings_and_t_may_be_of_any_grad_mode(self, pipe):
        short = {"num_inference_steps": 2, "refinement_iterations": 1}
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                text, given = pipe.get_text_self_attention(PROMPT), embeddings(pipe, PROMPT)
                output = run(pipe, None, text_self_attention=text, **given, **short)
            # not of the prompt: where it records gradients, T5 rounds otherwise
            given = {name: value if value is None else value.detach().clone() for name, value in given.items()}
            assert torch.equal(output.images, run(pipe, None, text_self_attention=text, **given, **short).images)
            assert not output.images.requires_grad


class TestOutput:
    @every
    def test_attentions_are_what_was_aligned(self, kind, pipe):
        output = run(pipe, [PROMPT, SHORT], output_attentions=True)
        assert len(output.attentions) == 2
        seen = output.attentions[0]
        assert [seen["tokens"] for seen in output.attentions] == [PROMPT.split(), SHORT.split()]
        assert seen["steps"] == [0, 1]
        assert seen["maps"].shape == (2, 7, *kind.grid) and seen["similarity"].shape == (2, 7, 7)
        torch.testing.assert_close(seen["text_attention"].sum(-1), torch.ones(7))
        torch.testing.assert_close(seen["similarity"].sum(-1), torch.ones(2, 7))
        weight = torch.arange(1, 8) / 7
        loss = (weight * (seen["text_attention"] - seen["similarity"][0]).abs().sum(-1)).sum()
        torch.testing.assert_close(output.losses[0, 0], loss)
        assert seen["maps"].device.type == "cpu" and not seen["maps"].requires_grad

    @pytest.mark.parametrize("scheduler", [DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler])
    def test_every_loss_has_its_step_as_callbacks_count_them(self, pipe, scheduler):
        use(scheduler, pipe)
        updates, after = [], []

        def objective(maps, text):
            updates.append(1)
            return tsam.l1(maps, text)

        def count(one, step, t, tensors):
            after.append(len(updates))
            return tensors

        options = {"tsam_steps": 3, "refinement_steps": (1,), "objective": objective}
        output = run(pipe, num_inference_steps=6, callback_on_step_end=count, **options)
        assert output.steps == [sum(number <= k for number in after) for k in range(len(updates))]
        assert len(output.steps) == output.losses.shape[1] == 3 + 2 and run(pipe, tsam_steps=0).steps == []

    def test_the_tuple_has_the_same_things(self, kind, pipe):
        output, as_tuple = run(pipe), dict(zip(kind.fields, run(pipe, return_dict=False), strict=True))
        for name in ("images", "losses"):
            assert torch.equal(as_tuple.pop(name), output[name])
        assert as_tuple.pop("steps") == output.steps
        assert all(value is getattr(output, name) is None for name, value in as_tuple.items())

    def test_there_is_one_progress_bar_and_it_shows_the_loss(self, pipe, capfd):
        pipe.set_progress_bar_config(disable=False, mininterval=0)
        run(pipe)
        shown = capfd.readouterr().err
        assert shown.count("100%") >= 1 and "4/4" in shown and "loss=" in shown and "/6" not in shown

"""What demanding users do: low-memory flows, adapters in callbacks, threads, odd components, precision contexts."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, SASolverScheduler, UniPCMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_tsam import attention_processors, tsam, tsam_pipeline
from diffusers_tsam.tsam_arguments import Settings
from kinds import KINDS, PROMPT, SHORT, alignment_of, denoiser_of, embeddings, make, refused, run, state_of, use
from test_compatibility import guided, lora_of
from test_loading import custom


SD, PIXART = KINDS["sd"], KINDS["pixart"]
STEPS = {"num_inference_steps": 4}


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings and T, encoded apart


class TestLowMemory:
    AMPERSAND = "a black car & a white clock"

    @pytest.fixture
    def kind(self):
        return PIXART

    def test_embeddings_and_t_are_of_the_same_tokens_by_default(self, pipe):
        pytest.importorskip("bs4"), pytest.importorskip("ftfy")
        text, mask = pipe.get_text_self_attention(self.AMPERSAND), pipe.encode_prompt(self.AMPERSAND)[1]
        assert text.lengths.tolist() == mask.sum(-1).tolist()
        assert "&" in text.tokens[0]

    def test_t_of_other_tokens_than_the_embeddings_is_refused(self, pipe):
        pytest.importorskip("bs4"), pytest.importorskip("ftfy")
        given = embeddings(pipe, self.AMPERSAND)
        cleaned = pipe.get_text_self_attention(self.AMPERSAND, clean_caption=True)
        with refused(pipe, ValueError, r"prompts of \[7\] tokens, but by their mask the embeddings are of \[\d+\]"):
            run(pipe, None, text_self_attention=cleaned, **given)
        with pytest.raises(ValueError, match="`clean_caption`"):
            run(pipe, self.AMPERSAND, text_self_attention=cleaned, num_images_per_prompt=2)
        text = pipe.get_text_self_attention(self.AMPERSAND)
        assert run(pipe, None, text_self_attention=text, num_images_per_prompt=2, **given).losses.shape[0] == 2

    def test_a_token_that_pads_or_ends_inside_the_prompt_is_no_padding(self, pipe):
        for prompt in ("a red <pad> cube", "a red </s> cube and a dog"):
            given = embeddings(pipe, prompt)
            run(pipe, None, text_self_attention=pipe.get_text_self_attention(prompt), **given)


# ----------------------------------------------------------------------------------------------------------------------
# Callbacks that change the model


@pytest.mark.parametrize("change", ["load", "unload", "fuse"])
def test_a_lora_may_come_and_go_in_a_callback(change):
    pytest.importorskip("peft")
    pipe = make(SD.tsam, SD.build())
    weights = lora_of(pipe)
    if change != "load":
        pipe.load_lora_weights(weights, adapter_name="one")
    changes = {
        "load": lambda: pipe.load_lora_weights(weights, adapter_name="one"),
        "unload": pipe.unload_lora_weights,
        "fuse": pipe.fuse_lora,
    }

    def flags():
        return {name: parameter.requires_grad for name, parameter in pipe.unet.named_parameters()}

    def callback(pipe, step, t, tensors):
        if step == 1:
            changes[change]()
        return tensors

    before = flags()
    output = run(pipe, tsam_steps=4, refinement_steps=(), callback_on_step_end=callback)
    assert output.images.isfinite().all() and output.losses.shape == (1, 4)
    assert all(asks == before[name] for name, asks in flags().items() if name in before)


# ----------------------------------------------------------------------------------------------------------------------
# Threads


def at_once(*calls):
    """What the functions return, called at the same time."""
    start = threading.Barrier(len(calls))
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(lambda c=call: (start.wait(), c())[1]) for call in calls]]


class TestThreads:
    def test_a_stock_pipeline_on_the_same_denoiser_spoils_no_picture_of_either(self, kind, own):
        # Of its own: transformers' tokenizers keep the padding of a call as a state.
        stock = make(kind.stock, {**own.components, "tokenizer": copy.deepcopy(own.tokenizer)})
        options = {"guidance_scale": 1.0, "num_inference_steps": 6}
        expected, theirs, before = guided(own, **options), run(stock, **options).images, state_of(own)
        for _ in range(3):
            ours, other = at_once(
                lambda: guided(own, **options), lambda: [run(stock, **options).images for _ in range(4)]
            )
            torch.testing.assert_close(ours.losses, expected.losses, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(ours.images, expected.images, rtol=5e-3, atol=5e-3)
            for images in other:
                torch.testing.assert_close(images, theirs, rtol=5e-3, atol=5e-3)
        assert state_of(own) == before

    def test_a_layer_that_another_thread_runs_is_neither_recorded_nor_stopped(self, pipe):
        layers, latents = pipe.cross_attention_layers(), torch.randn(1, 4, 32, 32)
        with torch.no_grad():
            given = {"encoder_hidden_states": embeddings(pipe, PROMPT)["prompt_embeds"]}
            if pipe.components.get("transformer"):
                given |= {"timestep": torch.tensor([1]), "added_cond_kwargs": {}}
            else:
                given["timestep"] = 1

        @torch.no_grad()
        def predict():
            return denoiser_of(pipe)(latents, **given).sample

        expected = predict()
        with attention_processors.record_cross_attention(layers, 7, stop=True) as maps:
            (found,) = at_once(predict)
            assert torch.equal(found, expected) and not maps
            with pytest.raises(attention_processors.LastMapRecorded):
                predict()
            assert len(maps) == len(layers)

    def test_the_installed_class_and_the_custom_pipeline_queue_for_the_same_lock(self, kind, own, tmp_path):
        make(kind.stock, kind.components).save_pretrained(tmp_path)
        other = DiffusionPipeline.from_pretrained(tmp_path, **custom(kind))
        assert type(other) is not kind.tsam
        other.register_modules(**{kind.denoiser: denoiser_of(own), "text_encoder": own.text_encoder})
        other.set_progress_bar_config(disable=True)
        call = {**STEPS, "output_type": "latent", "alpha": kind.alpha, **kind.call}

        def draw(pipe, seed):
            return pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **call).images

        expected, before = [draw(own, 0), draw(other, 1)], state_of(own)
        for _ in range(3):
            for images, alone in zip(at_once(lambda: draw(own, 0), lambda: draw(other, 1)), expected):
                torch.testing.assert_close(images, alone, rtol=5e-3, atol=5e-3)
        assert state_of(own) == before

    def test_t_may_be_read_while_another_thread_draws(self, kind, own):
        expected, text = guided(own, **STEPS), own.get_text_self_attention(SHORT)
        output, texts = at_once(
            lambda: guided(own, **STEPS), lambda: [own.get_text_self_attention(SHORT) for _ in range(40)]
        )
        torch.testing.assert_close(output.losses, expected.losses, rtol=1e-3, atol=1e-3)
        assert all(torch.allclose(found.attention, text.attention, atol=1e-6) for found in texts)
        assert not own.text_encoder._forward_pre_hooks and not own.text_encoder._forward_hooks

    def test_two_models_at_once_leave_compilation_on(self, kind):
        pipes = [make(kind.tsam, kind.build()) for _ in range(2)]
        at_once(*(lambda pipe=pipe: guided(pipe, num_inference_steps=6, tsam_steps=6) for pipe in pipes))
        counter = CompileCounterWithBackend("eager")
        torch.compile(lambda x: x + 1, backend=counter)(torch.ones(1))
        assert counter.frame_count == 1

    def test_a_model_that_was_used_can_be_copied_and_pickled(self, kind, own):
        guided(own, num_inference_steps=2)
        for again in (copy.deepcopy(denoiser_of(own)), pickle.loads(pickle.dumps(denoiser_of(own)))):
            with attention_processors.lock_of(again):
                assert attention_processors.lock_of(again) is not attention_processors.lock_of(denoiser_of(own))
            copy.deepcopy(again), pickle.dumps(again)


# ----------------------------------------------------------------------------------------------------------------------
# Schedulers that correct


class TestCorrectors:
    @pytest.fixture(params=[UniPCMultistepScheduler, SASolverScheduler], ids=lambda scheduler: scheduler.__name__)
    def scheduler(self, request):
        return request.param

    def test_alpha_zero_is_bit_identical_to_stock(self, stock, pipe, scheduler):
        use(scheduler, stock, pipe)
        assert torch.equal(run(pipe, alpha=0.0, tsam_steps=4).images, run(stock).images)

    def test_an_image_that_is_not_moved_is_the_same_in_a_batch_with_one_that_is(self, kind, stock, pipe, scheduler):
        use(scheduler, stock, pipe)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        batch = run(pipe, [PROMPT, "dog"], generator=generators, alpha=kind.alpha, tsam_steps=3)
        if scheduler is UniPCMultistepScheduler:  # the other draws noise for the batch
            alone = run(pipe, "dog", seed=1)
            torch.testing.assert_close(batch.images[1], alone.images[0], rtol=1e-4, atol=1e-4)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        theirs = run(stock, [PROMPT, "dog"], generator=generators).images
        torch.testing.assert_close(batch.images[1], theirs[1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(batch.images[0], theirs[0], rtol=0.05, atol=0.05)

    def test_a_move_is_not_taken_back(self, scheduler):
        scheduler = scheduler()
        name = next(
            name
            for name in ("multistep_uni_c_bh_update", "stochastic_adams_moulton_update")
            if hasattr(scheduler, name)
        )
        vars(scheduler)[name] = lambda *args, this_sample, **kwargs: torch.zeros_like(this_sample)
        kept, sample = vars(scheduler)[name], torch.ones(2, 4, 8, 8)
        with pytest.raises(KeyboardInterrupt), tsam_pipeline.uncorrected(scheduler, torch.tensor([True, False])):
            corrected = getattr(scheduler, name)(None, this_sample=sample)
            assert (corrected[0] == 1).all() and (corrected[1] == 0).all()
            raise KeyboardInterrupt
        assert vars(scheduler)[name] is kept


def test_few_steps_get_few_updates(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    assert run(pipe, refinement_iterations=None).losses.shape[1] <= 4
    for preset, updates in (("paper", 85), ("fast", 40)):
        steps, refined, iterations = Settings(preset=preset).plan(50)
        assert steps + len(refined) * iterations == updates


# ----------------------------------------------------------------------------------------------------------------------
# Precision contexts


class TestContexts:
    def test_weights_made_in_inference_mode_are_refused_with_the_remedy(self, kind):
        with torch.inference_mode():
            pipe = make(kind.tsam, kind.build())
        with pytest.raises(RuntimeError, match="inference_mode.*outside of it, or pass `tsam_steps=0`"):
            run(pipe)
        assert run(pipe, tsam_steps=0).images.isfinite().all()

    def test_the_equations_leave_autocast(self, pipe):
        seen = []

        def objective(maps, text):
            seen.append((maps, torch.is_autocast_enabled("cpu")))
            return tsam.l1(maps, text)

        with torch.autocast("cpu", torch.bfloat16):
            output = run(pipe, num_inference_steps=1, tsam_steps=1, refinement_steps=(), objective=objective)
            query, key = torch.randn(2, 1, 2, 9, 4)
            probabilities = attention_processors.attention_probabilities(query, key)
        ((maps, autocast),) = seen
        assert maps.dtype == torch.float32 and not autocast
        text = pipe.get_text_self_attention(PROMPT)
        alignment = alignment_of(text, 1.0, run_gamma(pipe))
        torch.testing.assert_close(alignment.loss_of(maps).detach(), output.losses[:, 0], rtol=0.05, atol=0.05)
        literal = (query @ key.mT / 2).softmax(-1)
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities, literal, rtol=1e-5, atol=1e-6)


def run_gamma(pipe):
    return 2.0 if isinstance(pipe, SD.tsam) else 4.0


def test_a_denoiser_that_lets_no_gradient_through_says_so(own):
    denoiser = denoiser_of(own)
    handle = denoiser.register_forward_pre_hook(lambda module, args: (args[0].detach().round(decimals=2), *args[1:]))
    with pytest.raises(RuntimeError, match="Quantised activations let none through: quantise the weights alone"):
        run(own)
    handle.remove()
    assert run(own).images.isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Odd and missing components


class TestComponents:
    def test_a_tokenizer_that_ends_no_prompt_is_refused(self):
        components = SD.build()
        components["tokenizer"].eos_token = None
        pipe = make(SD.tsam, components)
        with pytest.raises(ValueError, match="ends no prompt with <eos>.*`tsam_steps=0`"):
            pipe.get_text_self_attention(PROMPT)

    def test_a_unet_without_a_size_draws_as_stock_and_says_what_guidance_lacks(self):
        components = SD.build()
        pipe = make(SD.tsam, components)
        components["unet"].register_to_config(sample_size=None)
        size = {"height": 64, "width": 64}
        assert torch.equal(run(pipe, tsam_steps=0, **size).images, run(make(SD.stock, components), **size).images)
        with refused(pipe, ValueError, "has no `sample_size`.*register_to_config"):
            run(pipe, **size)
        components["unet"].register_to_config(sample_size=32)
        assert run(pipe, **size).losses.isfinite().all()

    def test_a_prompt_without_a_text_encoder_is_refused_with_the_remedy(self, kind):
        pipe = make(kind.tsam, {**kind.build(), "text_encoder": None})
        with pytest.raises(ValueError, match="no text encoder.*`prompt_embeds`"):
            run(pipe)
        with pytest.raises(ValueError, match="no text encoder"):
            pipe.get_text_self_attention(PROMPT)

    def test_a_pipeline_without_its_denoiser_is_refused(self, kind):
        pipe = make(kind.tsam, {**kind.build(), kind.denoiser: None})
        with pytest.raises(ValueError, match=f"`{kind.denoiser}=None`"):
            pipe(PROMPT)


# ----------------------------------------------------------------------------------------------------------------------
# Objectives, processors and latents of one's own


def left(maps, text):
    """How little the words are attended to in the left half."""
    half = maps.shape[-1] // 2
    return -(maps[..., :half].sum((-1, -2)) * text.content).sum(-1)


def test_an_objective_of_ones_own_moves_a_prompt_of_one_word_alone_as_in_a_batch(own):
    options = {"objective": left, "relative_step": 0.2}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    batch, alone = run(own, ["dog", PROMPT], generator=generators, **options), run(own, "dog", **options)
    assert alone.losses.shape == (1, 6) and not torch.equal(alone.images, run(own, "dog", tsam_steps=0).images)
    torch.testing.assert_close(batch.images[0], alone.images[0], rtol=1e-3, atol=1e-3)


def test_a_processor_of_ones_own_gets_its_arguments_in_guided_passes_too():
    seen = []

    class Strong(AttnProcessor2_0):
        def __call__(self, *args, strength=1.0, **kwargs):
            seen.append(strength)
            return super().__call__(*args, **kwargs)

    pipe = make(SD.tsam, SD.build())
    pipe.unet.set_attn_processor(Strong())
    run(pipe, cross_attention_kwargs={"strength": 0.5}, num_inference_steps=2)
    assert set(seen) == {0.5} and len(seen) > 2 * len(pipe.unet.attn_processors)


def test_as_many_latents_as_prompts_are_asked_for(stock, pipe):
    latents = torch.randn(1, 4, 32, 32)
    with pytest.raises(ValueError, match="`latents` hold 1 images, but 2 are to be aligned"):
        run(pipe, [PROMPT, SHORT], latents=latents)
    for one in (stock, pipe):
        with pytest.raises(RuntimeError):
            run(one, [PROMPT, SHORT], latents=latents, tsam_steps=0)


def test_in_float64_alpha_zero_is_bit_identical_to_stock(kind, own):
    own.to(torch.float64)
    stock = make(kind.stock, own.components)
    assert torch.equal(run(own, alpha=0.0).images, run(stock).images)


def test_a_gradient_that_is_not_finite_is_said_and_its_image_stays(own, stock, warnings_seen):
    def rooted(maps, text):
        return tsam.l1(maps, text) + (0 * maps).flatten(1).norm(dim=1).sqrt()

    output = run(own, objective=rooted)
    assert torch.equal(output.images, run(own, tsam_steps=0).images)
    assert "A gradient was not finite" in warnings_seen.text


def test_after_a_step_without_a_finite_gradient_float16_guides_again():
    text = tsam.TextSelfAttention(torch.rand(1, 3, 3).tril() + 0.1, torch.ones(1, 3, dtype=torch.bool), [["word"] * 3])
    alignment, latents = alignment_of(text, 1.0, 1.0), torch.randn(1, 3, 4, 4).half()
    factor = torch.tensor([torch.inf, 1e-3])  # of the maps of the first update, and of the second

    def maps_at(model_input):
        return (factor[len(alignment.losses)] * model_input.float()).exp()

    stayed = alignment.update(latents, 1.0, maps_at)
    assert torch.equal(stayed, latents) and alignment.lost.item()
    gradient, _, _ = alignment.gradient(stayed, 1.0, maps_at)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_an_objective_that_writes_into_its_maps_leaves_those_that_are_returned(pipe):
    options = {"output_attentions": True, "num_inference_steps": 2, "alpha": 0.0}
    written = run(pipe, objective=lambda maps, text: tsam.l1(maps.mul_(2), text), **options)
    assert torch.equal(written.attentions[0]["maps"], run(pipe, **options).attentions[0]["maps"])


def test_a_unet_that_rounds_odd_sizes_down_is_guided():
    pipe = make(SD.tsam, SD.build())
    for block in pipe.unet.down_blocks:
        for layer in block.downsamplers or []:
            layer.conv.padding, layer.padding = (0, 0), 0
    output = run(pipe, latents=torch.randn(1, 4, 33, 33), height=64, width=64, output_attentions=True)
    assert output.attentions[0]["maps"].shape[-2:] == (16, 16)

"""What a callback, another thread or an interruption may do while T-SAM draws, as in stock."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers.callbacks import PipelineCallback

from kinds import PROMPT, calls_of, denoiser_of, every_pipeline, generators, make, run
from tiny import tiny_controlnet_components


SHORTLY = {"num_inference_steps": 3, "tsam_steps": 3, "refinement_iterations": 0}


def use_parts(pipe, i, t, tensors):
    """What would be taken for the loop's own calls, were the stand-ins there."""
    latents = tensors["latents"]
    if hasattr(pipe.scheduler, "scale_model_input"):  # Wan's counts its steps instead
        pipe.scheduler.scale_model_input(torch.zeros_like(latents), t)
        copy.deepcopy(pipe.scheduler).step(torch.zeros_like(latents), t, latents)
    type(pipe)(**pipe.components).to("cpu")
    for _ in pipe.progress_bar(range(2)):
        pass
    return {}


@pytest.mark.parametrize("kind", ["sd", "pixart", "sd_controlnet", "wan"], indirect=True)
def test_in_a_callback_the_pipelines_parts_are_its_own_and_their_use_changes_no_picture(kind, pipe):
    plain, seen = run(pipe, **SHORTLY), []

    def callback(pipe, i, t, tensors):
        seen.append(type(vars(pipe)[kind.denoiser]))
        return use_parts(pipe, i, t, tensors)

    assert torch.equal(run(pipe, callback_on_step_end=callback, **SHORTLY).images, plain.images)
    assert seen == [type(kind.components[kind.denoiser])] * 3


def test_a_callback_draws_its_own_picture_while_starts_of_the_call_are_chosen(pipe):
    given, drawn = {"candidates": 2, "generator": generators(1)[0]}, []
    alone, plain = run(pipe, "a dog and a cat", **SHORTLY), run(pipe, **SHORTLY, **given)

    def callback(pipe, i, t, tensors):
        if not drawn:
            drawn.append(run(pipe, "a dog and a cat", **SHORTLY).images)
        return {}

    given["generator"] = generators(1)[0]
    assert torch.equal(run(pipe, callback_on_step_end=callback, **SHORTLY, **given).images, plain.images)
    assert torch.equal(drawn[0], alone.images)


class Ends(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipe, i, t, tensors):
        pipe._interrupt = i + 1 == pipe.num_timesteps // 2
        return {"latents": tensors["latents"] * 0}


def test_diffusers_own_kind_of_callback_gets_its_tensors_and_the_number_of_steps(pipe):
    images = run(pipe, callback_on_step_end=Ends(cutoff_step_ratio=1.0), **SHORTLY | {"num_inference_steps": 4}).images
    assert not images.any()


@pytest.mark.parametrize("kind", ["pixart"], indirect=True)
def test_with_one_step_the_callbacks_latents_are_the_pictures(pipe):
    one = {"num_inference_steps": 1, "tsam_steps": 1}
    kept = []
    images = run(pipe, callback_on_step_end=lambda pipe, i, t, tensors: kept.append(tensors["latents"]) or {}, **one)
    assert torch.equal(kept[0], images.images)
    sevens = run(pipe, callback_on_step_end=lambda *_: {"latents": torch.full_like(kept[0], 7.0)}, **one).images
    assert (sevens == 7).all()


def test_another_thread_may_use_the_scheduler_and_the_denoiser_of_a_pipeline_that_draws(pipe):
    plain, model, own = run(pipe, **SHORTLY), denoiser_of(pipe), pipe.scheduler

    def use(*_):
        with ThreadPoolExecutor(1) as other:
            scaled = other.submit(lambda: pipe.scheduler.scale_model_input(torch.zeros(1), own.timesteps[0]))
            assert scaled.result() == 0

    hook = model.register_forward_pre_hook(use)
    try:
        assert torch.equal(run(pipe, **SHORTLY).images, plain.images)
    finally:
        hook.remove()


def test_an_interrupted_choice_runs_no_further_and_an_interrupted_ranking_ranks_what_it_has(kind, pipe):
    with calls_of(denoiser_of(pipe)) as calls:
        hook = denoiser_of(pipe).register_forward_pre_hook(lambda *_: setattr(pipe, "_interrupt", True))
        run(pipe, num_inference_steps=20, tsam_steps=0, candidates=2)
        number = len(calls)
        ranked = pipe.rank(PROMPT, [0, 1], num_inference_steps=20, **kind.call)
        hook.remove()
    assert number == 1 and ranked == []
    freed = []
    pipe.maybe_free_model_hooks = lambda: freed.append(1)
    assert len(pipe.rank(PROMPT, [0, 1], num_inference_steps=2, **kind.call)) == 2 and freed


@pytest.mark.parametrize(
    "kind, wrong", [("sd", {"attention_resolution": 99}), ("pixart", {"attention_layers": (1, 99)})], indirect=["kind"]
)
def test_layers_that_are_not_there_are_refused_before_a_start_runs(pipe, wrong):
    with calls_of(denoiser_of(pipe)) as calls, pytest.raises(ValueError, match=next(iter(wrong))):
        run(pipe, candidates=2, **SHORTLY | {"tsam_steps": 0} | wrong)
    assert not calls


@pytest.mark.parametrize("kind", ["sd"], indirect=True)
@pytest.mark.parametrize("given", [{}, {"prompt": 5}, {"prompt": 5, "max_sequence_length": 300}])
def test_a_wrong_prompt_is_refused_in_stocks_words_whatever_is_chosen(pipe, given):
    with pytest.raises(ValueError, match="prompt"):
        pipe(candidates=2, **given)


@pytest.mark.parametrize("kind", ["sd_img2img"], indirect=True)
def test_with_no_step_left_there_is_nothing_to_choose(pipe, stock):
    given = {"strength": 0.1, "num_inference_steps": 4}
    assert torch.equal(run(pipe, candidates=2, **given).images, run(stock, **given).images)


@every_pipeline
def test_t_is_read_at_the_length_that_prompts_are_encoded_at(pipe):
    encodes, reads = (inspect.signature(x).parameters for x in (pipe.encode_prompt, pipe.get_text_self_attention))
    assert all(encodes[name].default == reads[name].default for name in encodes.keys() & reads.keys())


@pytest.mark.parametrize("kind", ["wan"], indirect=True)
def test_a_cache_between_steps_is_refused(own):
    from diffusers import FirstBlockCacheConfig

    own.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with pytest.raises(RuntimeError, match="caches between its steps.*disable_cache"):
        run(own, **SHORTLY)
    own.transformer.disable_cache()
    run(own, **SHORTLY)


@pytest.mark.parametrize("kind", ["sd_controlnet"], indirect=True)
class TestControlNet:
    def test_one_that_two_models_share_is_trained_on_afterwards(self, kind, own):
        other = make(kind.tsam, tiny_controlnet_components() | {"controlnet": own.controlnet})
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda pipe: run(pipe, **SHORTLY), [own, other]))
        assert all(parameter.requires_grad for parameter in own.controlnet.parameters())

    def test_its_weights_may_be_cast_alone(self, own):
        own.controlnet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert run(own, **SHORTLY).losses.isfinite().all()

    def test_prompts_of_different_numbers_of_windows_are_refused(self, pipe):
        long = "a red cube and a blue sphere, " * 12
        with pytest.raises(ValueError, match="different numbers of windows"):
            run(pipe, [PROMPT, long], max_sequence_length=300, **SHORTLY)
        run(pipe, [long, long], max_sequence_length=300, **SHORTLY)

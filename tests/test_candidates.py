"""The start is chosen: by the right loss, from the right latents, and with nothing else changed."""

import diffusers
import pytest
import torch

from diffusers_tsam import modular_tsam, tsam_candidates
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
    every,
    every_pipeline,
    generators,
    kind_of,
    make,
    run,
    state_of,
    use,
)
from test_modular import pair_of


in_both_fronts = pytest.mark.parametrize("kind", [*KINDS, *BLOCKS], indirect=True)
K = {"candidates": 3, "candidate_steps": 2}
OFF = {"tsam_steps": 0}  # for what the choice alone shows
TWO = {"num_inference_steps": 2}


def starts(pipe, number, images=1):
    """The latents that a call's one generator draws for candidates."""
    shape = run(pipe, tsam_steps=0, num_inference_steps=1).images.shape[1:]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(images, *shape, generator=generator) for _ in range(number)]
    if kind_of(pipe) is FLUX:
        return [diffusers.FluxPipeline._pack_latents(each, images, *shape) for each in drawn]
    return drawn


def of_flows(pipe):
    """Whether its model takes no other schedulers."""
    return pipe.scheduler.__class__.__name__.startswith("FlowMatch")


def watched(pipe, latents, **arguments):
    """The contrast loss before step 2 of pictures that nothing moves: (images,)."""
    given = {"objective": "contrast", "alpha": 0.0, "tsam_steps": 2, "refinement_steps": ()} | arguments
    return run(pipe, latents=latents, **given).losses[:, 1]


@every
@pytest.mark.parametrize("guided", [{"refinement_steps": ()}, {"tsam_steps": 0}], ids=["guided", "off"])
def test_the_start_of_least_loss_is_drawn_and_the_first_is_what_one_alone_would_draw(pipe, guided):
    output, alone = (run(pipe, num_images_per_prompt=4, **TWO, **guided, **given) for given in (K, {}))
    assert output.candidate_losses.shape == (4, 3) and alone.candidate_losses is None and alone.chosen is None
    assert torch.equal(output.chosen, output.candidate_losses.argmin(1))
    assert [torch.equal(*pair) for pair in zip(output.images, alone.images)] == (output.chosen == 0).tolist()
    assert len(output.chosen.unique()) > 1  # or the test would show one half alone


def same_choice(pipe, size, given):
    """given: makes a call's arguments, generators among them, anew."""
    alone, together = (run(pipe, **K | given(), **batch) for batch in ({}, {"candidate_batch": size}))
    torch.testing.assert_close(together.candidate_losses, alone.candidate_losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(together.chosen, alone.chosen) and torch.equal(together.images, alone.images)


@every_pipeline
def test_starts_that_run_at_once_are_those_that_run_one_by_one(kind, pipe):
    same_choice(pipe, 3, lambda: {"prompt": [PROMPT, SHORT], "generator": generators(2)} | TWO)
    with calls_of(denoiser_of(pipe)) as alone:
        run(pipe, tsam_steps=0)
    with calls_of(denoiser_of(pipe)) as together:
        run(pipe, tsam_steps=0, **K, candidate_batch=4)
    each = len(alone) // 4  # calls a step
    choosing = (3 if kind.name in ("sd_img2img", "sd_inpaint") else 1) * (each + 1)
    assert len(together) == len(alone) + choosing


@pytest.mark.parametrize("scheduler", [diffusers.EulerAncestralDiscreteScheduler, diffusers.UniPCMultistepScheduler])
def test_starts_that_run_at_once_have_noise_and_schedulers_of_their_own(pipe, scheduler):
    latents = torch.cat(starts(pipe, 2, 4))
    use(scheduler, pipe)
    given = {"prompt": [PROMPT, SHORT], "num_images_per_prompt": 2, "eta": 0.5, **OFF}
    given |= {"candidate_steps": 3, "num_inference_steps": 3}
    same_choice(pipe, 2, lambda: given | {"generator": torch.Generator().manual_seed(1)})
    same_choice(pipe, 3, lambda: given | {"generator": generators(4), "latents": latents})


@in_both_fronts
def test_losses_and_pictures_are_those_of_the_starts_drawn_one_by_one(kind, pipe):
    for scheduler in (None,) if of_flows(pipe) else (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler):
        if scheduler:
            use(scheduler, pipe)
        output, own = run(pipe, [PROMPT, SHORT], **K, **TWO), starts(pipe, 3, 2)
        expected = torch.stack([watched(pipe, latents, prompt=[PROMPT, SHORT], **TWO) for latents in own], 1)
        torch.testing.assert_close(output.candidate_losses, expected, rtol=1e-4, atol=1e-5)
        drawn = torch.stack([own[k][image] for image, k in enumerate(output.chosen)])
        assert torch.equal(output.images, run(pipe, [PROMPT, SHORT], latents=drawn, **TWO).images)


def choosing(starts, monkeypatch):
    """Let these starts be chosen, one an image."""
    for module in (tsam_candidates, modular_tsam):
        monkeypatch.setattr(module, "least", lambda losses: torch.tensor(starts))


@pytest.mark.parametrize("kind", ["sd", "sdxl"], indirect=True)
@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: s.__name__)
def test_the_chosen_start_meets_every_scheduler_as_new(kind, pipe, scheduler, monkeypatch):
    use(scheduler, pipe)
    options = {"eta": 0.5, "refinement_steps": (), "tsam_steps": 0 if kind is SDXL else 1}
    new = make(kind.tsam, kind.components)  # a guider keeps its step between calls of stock, which then may fail
    use(scheduler, new)
    expected = run(new, **options).images
    choosing([0], monkeypatch)
    assert torch.equal(run(pipe, **options, candidates=2, candidate_steps=3).images, expected)


WORKFLOWS = [
    *((kind, "image2image", 4, {"strength": 0.9}) for kind in (SDXL, SD3, FLUX)),
    (ANIMA, "img2img", 4, {"strength": 0.9}),
    (SDXL, "inpainting", 4, {"strength": 0.9}),
    (SDXL, "inpainting", 9, {"strength": 1.0}),
    (SDXL, "controlnet_text2image", 4, {}),
]


@pytest.mark.parametrize("kind, workflow, channels, options", WORKFLOWS, ids=lambda each: getattr(each, "name", each))
def test_a_picture_made_of_an_image_begins_as_its_candidate_did(kind, workflow, channels, options, monkeypatch):
    """Latents, mask and noise: what the denoiser gets in the steps of the choice."""
    (_, pipe), pictures = pair_of(kind, workflow, channels)
    options = {"tsam_steps": 0, "num_images_per_prompt": 2, "num_inference_steps": 5, **pictures, **options}
    one = run(pipe, **options)
    choosing([2, 1], monkeypatch)
    with calls_of(denoiser_of(pipe)) as calls:
        several = run(pipe, **options, **K)
    inputs = [args[0] if args else kwargs["hidden_states"] for args, kwargs in calls]
    a_step = 1 if kind is FLUX else 2  # calls: guided by none or both halves
    a_start = a_step + 1
    for step in (0, 1):
        own = [inputs[start * a_start + step * a_step] for start in range(3)]
        assert not torch.equal(own[0], own[1]) and not torch.equal(own[1], own[2])
        expected = torch.stack([own[2][0], own[1][1]])  # of other batches, whose rounding differs
        torch.testing.assert_close(inputs[3 * a_start + step * a_step], expected, rtol=1e-4, atol=1e-4)
    choosing([0, 0], monkeypatch)
    first = run(pipe, **options, **K)
    assert torch.equal(first.images, one.images) and not torch.equal(several.images, one.images)


@in_both_fronts
def test_further_starts_are_those_of_a_generator_that_has_drawn_the_ones_before(kind, pipe):
    """With the noise that a scheduler adds in the steps of the choice."""
    if not of_flows(pipe):
        use(diffusers.EulerAncestralDiscreteScheduler, pipe)
    generator = torch.Generator().manual_seed(0)
    torch.randn(starts(pipe, 1)[0].shape, generator=generator)
    given = {"candidate_steps": 3, "num_inference_steps": 3, **OFF}
    expected = run(pipe, generator=generator, candidates=2, **given).candidate_losses
    assert torch.equal(run(pipe, candidates=3, **given).candidate_losses[:, 1:], expected)


@in_both_fronts
def test_an_image_of_a_batch_is_chosen_as_alone(kind, pipe):
    number = 1 if kind is SDXL else 2  # stock's blocks give the second picture the other prompt's pooled embedding
    given = K | TWO
    together = run(pipe, [PROMPT, SHORT], num_images_per_prompt=number, generator=generators(2 * number), **given)
    for image, prompt in enumerate([PROMPT] * number + [SHORT] * number):
        alone = run(pipe, prompt, seed=image, **given)
        torch.testing.assert_close(together.candidate_losses[image], alone.candidate_losses[0], rtol=1e-4, atol=1e-5)
        assert together.chosen[image] == alone.chosen[0]
        torch.testing.assert_close(together.images[image], alone.images[0], rtol=1e-3, atol=1e-3)


@in_both_fronts
def test_latents_may_hold_the_starts_and_what_they_lack_is_drawn(kind, pipe):
    own, given = starts(pipe, 3), K | TWO | OFF
    whole = run(pipe, latents=torch.cat(own), **given)
    assert torch.equal(whole.candidate_losses, run(pipe, **given).candidate_losses)
    part = run(pipe, latents=own[2], generator=torch.Generator().manual_seed(0), **given)
    assert torch.equal(part.candidate_losses, whole.candidate_losses[:, [2, 0, 1]])


WRONG = [
    ({"candidates": 0}, "`candidates` is 0, but has to be at least 1"),
    ({"candidates": 2, "candidate_steps": 5}, "`candidate_steps` is 5, but there are only 4 denoising steps"),
    ({"candidates": 2, "latents": torch.zeros(3, 4, 32, 32)}, "hold 3 starts, but 1 images .* 1 to 2"),
    ({"prompt": [PROMPT] * 2, **K, "latents": torch.zeros(3, 4, 32, 32)}, "2 to 6, a multiple of 2"),
]


@in_both_fronts
@pytest.mark.parametrize("wrong, message", WRONG)
def test_wrong_numbers_are_refused_before_the_denoiser_runs(kind, pipe, wrong, message):
    """Others, and of other types, are in test_tsam.py."""
    with calls_of(pipe.text_encoder) as encoded, calls_of(denoiser_of(pipe)) as denoised:
        with pytest.raises(ValueError, match=message):
            run(pipe, **wrong)
    assert not denoised and (not encoded or kind in BLOCKS.values())


@in_both_fronts
def test_callbacks_and_what_is_left_behind_are_of_the_drawn_picture_alone(kind, pipe, capfd):
    run(pipe, num_inference_steps=1)  # transformers leaves hooks in an encoder at its first call
    seen, before = [], state_of(pipe)
    pipe.set_progress_bar_config(disable=False, mininterval=0)
    output = run(pipe, callback_on_step_end=lambda pipe, step, t, tensors: seen.append(step) or tensors, **K)
    assert seen == ([] if kind in BLOCKS.values() else [0, 1, 2, 3])  # blocks have no callbacks
    assert output.steps == [0, 0, 0, 1, 1, 1]
    pipe.set_progress_bar_config(disable=True)
    assert state_of(pipe) == before
    assert capfd.readouterr().err.count("choosing") >= 3


@in_both_fronts
def test_off_no_gradient_is_taken_and_networks_run_as_often_as_it_says(pipe, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    with torch.inference_mode(), calls_of(pipe.text_encoder) as encoded, calls_of(denoiser_of(pipe)) as denoised:
        run(pipe, tsam_steps=0)
        one = len(encoded), len(denoised)
        assert run(pipe, tsam_steps=0, **K).candidate_losses.isfinite().all()
    a_step = one[1] // 4  # blocks call once for each half of guidance, and for the loss only for one
    assert (len(encoded), len(denoised)) == (2 * one[0], 2 * one[1] + 3 * (a_step + 1))


def test_an_interruption_while_choosing_ends_the_call(pipe):
    handle = denoiser_of(pipe).register_forward_pre_hook(lambda *args: setattr(pipe, "_interrupt", True))
    output = run(pipe, candidates=3, candidate_steps=2)
    handle.remove()
    assert torch.equal(output.images, starts(pipe, 1)[0] * pipe.scheduler.init_noise_sigma)  # the start, not denoised
    assert output.losses.shape == output.candidate_losses.shape == (1, 0)
    assert not torch.equal(run(pipe).images, output.images)


def test_ranked_seeds_are_those_of_the_pictures_they_draw_best_first(pipe):
    ranked = pipe.rank(PROMPT, range(4), candidate_steps=2, num_inference_steps=4, **kind_of(pipe).call)
    losses = [loss for _, loss in ranked]
    assert sorted(seed for seed, _ in ranked) == [0, 1, 2, 3] and losses == sorted(losses) and len(set(losses)) > 1
    for seed, loss in ranked:
        assert loss == pytest.approx(run(pipe, seed=seed, **K, **OFF).candidate_losses[0, 0].item(), rel=1e-4)
    with pytest.raises(ValueError, match="`candidate_steps` is 9, but there are only 4"):
        pipe.rank(PROMPT, [0], candidate_steps=9, num_inference_steps=4, **kind_of(pipe).call)


def test_regions_windows_and_t_of_ones_own_are_chosen_by_too(pipe):
    text = pipe.get_text_self_attention(PROMPT)
    plain = run(pipe, **K)
    assert torch.equal(run(pipe, text_self_attention=text, **K).candidate_losses, plain.candidate_losses)
    held = run(pipe, regions={"black car": (0, 0, 0.5, 1)}, **K)
    assert torch.equal(held.candidate_losses, plain.candidate_losses) and held.losses.isfinite().all()


def test_chosen_starts_are_rows_of_tensors_and_of_tuples_of_them():
    one, two = torch.zeros(2, 3), torch.ones(2, 3)
    first, second = tsam_candidates.chosen_of([(one, one), (two, two)], torch.tensor([1, 0]))
    assert torch.equal(first, torch.tensor([[1.0] * 3, [0.0] * 3])) and torch.equal(first, second)


def test_a_start_whose_loss_is_no_number_is_chosen_only_if_all_are():
    losses = torch.tensor([[torch.nan, 2.0, 1.0], [0.5, torch.nan, 3.0], [torch.nan] * 3])
    assert tsam_candidates.least(losses).tolist() == [2, 0, 0]


@pytest.mark.parametrize("kind", BLOCKS, indirect=True)
def test_blocks_whose_latents_no_step_of_ours_prepared_say_so(kind):
    blocks = kind.tsam().get_workflow("text2image")
    name, step = next(named for named in blocks.sub_blocks.items() if isinstance(named[1], modular_tsam.StartsStep))
    blocks.sub_blocks[name] = type(step).__mro__[2]()
    pipe = blocks.init_pipeline()
    pipe.update_components(**kind.components)
    with calls_of(denoiser_of(pipe)) as calls, pytest.raises(ValueError, match="`candidates` is 3, but no step of T-S"):
        run(pipe, **K)
    assert not calls


def test_with_no_generator_of_its_own_a_call_draws_from_its_devices(monkeypatch):
    first, second = generators(2)
    monkeypatch.setattr(torch.cuda, "default_generators", (first, second))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device, own in {"cpu": torch.default_generator, "cuda:0": first, "cuda": second}.items():
        assert tsam_candidates.generators_of({"generator": None}, device) == [own]

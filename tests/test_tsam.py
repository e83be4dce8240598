"""`tsam.py` alone, without a network: against `oracle.py`, a slow, literal reading of the equations that shares no code
with it, against the authors' released code, and on toys."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler
from safetensors.torch import load_file
from test_contrast import GRID, case_of, check_rows, loss_of, positions, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
from diffusers_tsam import TextSelfAttention, tsam
from diffusers_tsam.tsam import OBJECTIVES
from diffusers_tsam.tsam_arguments import OBJECTIVE_NAMES, Settings
from diffusers_tsam.tsam_pipeline import updates_per_timestep
from kinds import KINDS, OF_T, alignment_of


# ----------------------------------------------------------------------------------------------------------------------
# The equations


@pytest.mark.parametrize(
    "ids, bos, own",
    [
        ([0, 5, 6, 7, 1, 1, 1], 0, [1, 2, 3]),
        ([0, 5, 1, 6, 1, 1, 1], 0, [1]),  # a literal <eos> ends the prompt
        ([0, 5, 0, 6, 1, 0, 7], 0, [1, 3]),  # a literal <bos> is nobody's own
        ([0, 5, 6, 7, 8, 9, 1], 0, [1, 2, 3, 4, 5]),
        ([0, 1, 1, 1, 1, 1, 1], 0, []),
        ([5, 6, 7, 1, 0, 0], None, [0, 1, 2]),
    ],
)
def test_content_ends_at_the_first_eos_and_leaves_bos_out_if_there_is_one(ids, bos, own):
    assert positions(tsam.content_of(torch.tensor([ids]), bos, 1)[0]) == oracle.content(ids, bos, 1) == own


@pytest.mark.parametrize("gamma, sink", [(0.5, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 0.0), (60.0, 0.0), (60.0, 0.99999)])
def test_text_attention_is_that_of_each_prompt_alone_also_under_a_huge_exponent(gamma, sink):
    case = case_of(sink=sink)
    product = tsam.normalize_text_attention(case.attention.float(), case.content, gamma)
    literal, rel = (oracle.text_attention, 1e-5) if gamma < 60 else (oracle.text_attention_in_logs, 2e-5)
    check_rows(product, case.content, [literal(*of_prompt, gamma) for of_prompt in prompts_of(case)], rel)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (2, 2), (4, 7), (16, 12), (1, 5), (5, 1), (1, 1)])
def test_smoothing_reflects_at_every_border(grid):
    maps = torch.rand(2, 3, *grid, dtype=torch.float64)
    expected = [[oracle.smooth(image) for image in images] for images in maps.tolist()]
    torch.testing.assert_close(tsam.smooth(maps.float()), torch.tensor(expected), rtol=1e-5, atol=1e-8)


def test_similarity_is_summed_over_the_tokens_up_to_a_words_own():
    case = case_of()
    expected = [oracle.normalized(oracle.similarity(maps[own].tolist())) for maps, own in zip(case.maps, case.content)]
    check_rows(tsam.similarity_of(case.maps.float(), case.content), case.content, expected)


@pytest.mark.parametrize("strongest", [1.0, 1e-2, 1e-4])
def test_cosine_loss_depends_on_no_scale_of_the_text_attention_beside_the_diagonal(strongest):
    """Tokens that attend to themselves far more than to others: γ = 3 leaves little beside the diagonal."""
    case, own = case_of((7,)), range(1, 8)
    attention = case.attention.tril(-1) * strongest + torch.eye(10, dtype=torch.float64)
    expected = oracle.loss(oracle.text_attention(attention[0].tolist(), own, 3.0), case.maps[0, own].tolist(), "cosine")
    found = loss_of("cosine", case.maps.float(), attention, case.content, 3.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# What the authors' code (https://github.com/t-sam-diffusion/code at 135fffb), run in float64, gave for five random
# inputs: its default loss, and its "attn_like" with absolute differences.
RELEASE = load_file(Path(__file__).parent / "release_loss.safetensors")


@pytest.mark.parametrize("case", range(5))
@pytest.mark.parametrize("objective", ["cosine", "l1"])
def test_loss_and_gradient_are_those_of_the_authors_released_code(objective, case):
    names = "maps", "text_self_attention", "gamma", objective, f"{objective}_gradient"
    maps, attention, gamma, expected, gradient = (RELEASE[f"{case}.{name}"].double() for name in names)
    content = torch.tensor([[False, *[True] * len(maps), False]])  # between <bos> and <eos>
    target = tsam.normalize_text_attention(attention[None], content, gamma.item()).double()
    if objective == "l1":  # the release adds 1e-7 to the sums of T's rows, of which few are so small, after the first
        sums = (attention[1:, 1:].tril() ** gamma).sum(-1)[1:, None]
        target[0, 2:] *= sums / (sums + 1e-7)
    maps.requires_grad_()
    similarity = tsam.similarity_of(F.pad(maps, (0, 0, 0, 0, 1, 1))[None], content)
    loss = {"l1": tsam.l1_loss, "cosine": tsam.cosine_loss}[objective](target, similarity, content)
    (found,) = torch.autograd.grad(loss.sum(), maps)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert (found - gradient).norm() < 1e-6 * gradient.norm()


# ----------------------------------------------------------------------------------------------------------------------
# The update, on toys


class Toy:
    """Two prompts of 4 and 7 words, and maps that are one line of latents of any shape."""

    def __init__(self, *shape, half=False, device="cpu"):
        case = case_of((4, 7))
        self.text = TextSelfAttention(case.attention, case.content, [["word"] * 4, ["word"] * 7])
        self.latents = torch.randn(2, *shape, device=device).to(torch.float16 if half else torch.float32)
        self.weights = torch.randn(math.prod(shape), 8 * math.prod(GRID), device=device) / math.prod(shape) ** 0.5

    def maps_at(self, model_input):
        return (model_input.flatten(1) @ self.weights.to(model_input)).float().unflatten(1, (8, *GRID)).softmax(1)

    def alignment(self, objective="l1", alpha=3.0, **options):
        return alignment_of(self.text, alpha, 2.0, objective, device=self.latents.device, **options)

    def update(self, objective="l1", scale=1.0, iterations=1, **options):
        """The latents, and the alignment."""
        alignment = self.alignment(objective, **options)
        return alignment.update(self.latents, torch.tensor(scale), self.maps_at, iterations), alignment


@pytest.mark.parametrize("shape", [(37,), (2, 3, 4, 5)], ids=["L", "CFHW"])  # CHW is in test_oracle.py
@pytest.mark.parametrize("objective", OF_T)
def test_update_moves_latents_of_any_shape_down_the_gradient_of_any_maps(objective, shape):
    toy, scale, alpha = Toy(*shape), 0.5, 3.0
    moved, alignment = toy.update(objective, scale, 2, alpha=alpha)
    assert moved.shape == toy.latents.shape and alignment.moved.all() and len(alignment.losses) == 2
    for image, latents in enumerate(toy.latents.double()):
        own = positions(toy.text.content[image])
        text = oracle.text_attention(toy.text.attention[image].tolist(), own, 2.0)
        expected = latents
        for iteration in range(2):
            model_input = (scale * expected).requires_grad_()
            maps = (model_input.flatten() @ toy.weights.double()).unflatten(0, (8, *GRID)).softmax(0)
            loss = oracle.loss(text, maps[own], objective)
            (gradient,) = torch.autograd.grad(loss, model_input)
            expected = ((model_input - alpha * gradient) / scale).detach()
            assert alignment.losses[iteration][image].item() == pytest.approx(loss.item(), rel=1e-5)
        assert (moved[image] - expected).norm() < 1e-5 * (latents - expected).norm()


class TestRelativeStep:
    @pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
    def test_the_first_update_moves_every_images_input_by_that_share_of_its_norm(self, share):
        toy = Toy(4, 6, 5)
        toy.latents[1] *= 7
        moved, _ = toy.update(scale=0.5, relative_step=share)
        norms, moves = toy.latents.flatten(1).norm(dim=1), (moved - toy.latents).flatten(1).norm(dim=1)
        torch.testing.assert_close(moves, share * norms, rtol=1e-4, atol=1e-6)

    def test_it_is_an_alpha_for_every_image_which_stays(self):
        toy = Toy(4, 6, 5)
        moved, alignment = toy.update(relative_step=0.01, iterations=3)
        for image, alpha in enumerate(alignment.alpha.flatten().tolist()):
            torch.testing.assert_close(moved[image], toy.update(alpha=alpha, iterations=3)[0][image])

    def test_it_moves_alike_however_steep_the_objective_is(self):
        toy = Toy(4, 6, 5)
        steep, options = lambda *known: 1e3 * tsam.l1(*known), {"relative_step": 0.1, "iterations": 2}
        torch.testing.assert_close(toy.update(steep, **options)[0], toy.update("l1", **options)[0])


@pytest.mark.parametrize("options, updates", [({"iterations": 0}, 0), ({"alpha": 1e300}, 1)])
def test_without_an_iteration_or_by_an_update_that_is_not_finite_nothing_moves(options, updates):
    toy = Toy(4, 6, 5)
    moved, alignment = toy.update(**options)
    assert torch.equal(moved, toy.latents) and not alignment.moved.any() and len(alignment.losses) == updates


class TestObjective:
    def test_it_gets_the_maps_and_what_is_known_of_the_prompts(self):
        toy, objective = Toy(4, 6, 5), mock.Mock(side_effect=tsam.l1)
        toy.latents = toy.latents.repeat_interleave(2, 0)
        moved, alignment = toy.update(objective, num_images_per_prompt=2)
        ((maps, text),) = (call.args for call in objective.call_args_list)
        assert alignment.num_tokens == 8 and maps.shape == (4, 8, *GRID) and maps.requires_grad
        of_each = [0, 0, 1, 1]
        content = toy.text.content[of_each, :8]
        assert torch.equal(text.content, content) and text.tokens == [toy.text.tokens[k] for k in of_each]
        assert torch.equal(text.attention, toy.text.attention[of_each, :8, :8])
        assert torch.equal(text.target, tsam.normalize_text_attention(text.attention, content, 2.0))
        assert torch.equal(text.relation, tsam.relation_of(text.attention, content))
        assert torch.equal(moved, toy.update("l1", num_images_per_prompt=2)[0])

    @pytest.mark.parametrize(
        "wrong, found",
        [
            (lambda maps, text: tsam.l1(maps, text).sum(), r"\(\)"),
            (lambda maps, text: maps, r"\(2, 8, 4, 5\)"),
            (lambda maps, text: tsam.l1(maps, text)[:1], r"\(1,\)"),
            (lambda maps, text: None, "None"),
        ],
        ids=["a number", "the maps", "too few", "nothing"],
    )
    def test_a_wrong_return_value_is_refused_with_what_it_is(self, wrong, found):
        with pytest.raises(ValueError, match=rf"`objective` returned {found}, but .* a loss per image, \(2,\)"):
            Toy(5).update(wrong)

    def test_one_that_does_not_depend_on_the_maps_is_refused(self):
        with pytest.raises(RuntimeError, match="`objective` of yours has to depend on the maps"):
            Toy(5).update(lambda maps, text: torch.ones(len(maps)))


class TestHalfPrecision:
    def test_a_gradient_that_overflows_is_tried_again_with_less(self):
        toy = Toy(4, 6, 5, half=True)
        expected, _ = toy.update()
        with mock.patch.multiple(tsam, FP16_LOSS_SCALE=2.0**30, FP16_LOSS_SCALE_BACKOFF=2.0**-10):
            moved, alignment = toy.update()
        assert moved.dtype == torch.float16 and alignment.moved.all() and alignment.loss_scale.max() < 2.0**30
        torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-2)

    def test_an_image_that_overflows_leaves_the_others_their_scale(self):
        toy, steep = Toy(4, 6, 5, half=True), torch.tensor([1.0, 2.0**12])[:, None, None, None]
        alignment, latents = toy.alignment(), (toy.latents / steep).half()
        alignment.update(latents, torch.ones(()), lambda x: toy.maps_at((x.float() * steep).half()))
        assert alignment.moved[0] and alignment.loss_scale[0] == tsam.FP16_LOSS_SCALE > alignment.loss_scale[1]

    @mock.patch.multiple(tsam, FP16_LOSS_SCALE=2.0**30, FP16_LOSS_SCALE_BACKOFF=1.0)
    def test_an_image_whose_gradient_never_is_finite_stays_and_that_is_said(self, warnings_seen):
        toy = Toy(4, 6, 5, half=True)
        moved, alignment = toy.update()
        assert torch.equal(moved, toy.latents) and not alignment.moved.any()
        assert "Try bfloat16" in warnings_seen.text


# https://docs.pytorch.org/docs/stable/generated/torch.use_deterministic_algorithms.html: what raises or differs on CUDA
NON_DETERMINISTIC = (
    *("reflection_pad", "replication_pad", "avg_pool", "max_pool", "max_unpool", "upsample", "grid_sampler", "put_"),
    *("index_put", "index_add", "index_copy", "scatter", "histc", "bincount", "kthvalue", "median", "nll_loss2d"),
)


class Operations(TorchDispatchMode):
    """Collects the names of the operations that are done to tensors without data."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if torch.is_tensor(x) and x.is_meta]
        if tensors:
            number = "" if tensors[0].is_floating_point() else " of integers"
            self.seen.add(function.overloadpacket.__name__ + number)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_use_nothing_that_is_not_deterministic_on_a_gpu(objective):
    maps = torch.rand(2, 8, *GRID, device="meta", requires_grad=True)  # apart from what is made on the CPU
    matrix, content = torch.empty(2, 8, 8, device="meta"), torch.ones(2, 8, device="meta") > 0
    text = tsam.Syntax(matrix, matrix, content, [], matrix)
    with Operations() as operations:
        OBJECTIVES[objective](maps, text).sum().backward()
    assert "bmm" in operations.seen
    assert not [name for name in operations.seen if name.startswith(NON_DETERMINISTIC)]
    assert "cumsum" not in operations.seen  # of integers it is deterministic


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_on_a_gpu_the_update_is_deterministic_and_torch_agrees(objective, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    toy, found = Toy(4, 64, 64, device="cuda"), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        moved = [toy.update(objective, iterations=3)[0] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(found)
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])


# ----------------------------------------------------------------------------------------------------------------------
# When


SD, PIXART = (KINDS[name].tsam.settings for name in ("sd", "pixart"))


@pytest.mark.parametrize(
    "settings, preset, number, expected",
    [
        (SD, "paper", 50, (25, {0, 10, 20}, 20)),
        (SD, "paper", 20, (10, {0, 4, 8}, 8)),
        (SD, "paper", 4, (2, {0, 1}, 1)),
        (SD, "paper", 1, (1, {0}, 0)),
        (SD, "fast", 50, (10, {0, 4, 8}, 10)),
        (SD, "fast", 25, (5, {0, 2, 4}, 5)),
        (SD, "fast", 4, (1, {0}, 0)),
        (PIXART, "paper", 50, (25, {0, 10, 20}, 10)),
        (PIXART, "paper", 20, (10, {0, 4, 8}, 4)),
        (PIXART, "fast", 50, (10, {0, 4, 8}, 8)),
        (PIXART, "fast", 25, (5, {0, 2, 4}, 4)),
    ],
)
def test_the_presets_scale_with_the_number_of_steps(settings, preset, number, expected):
    assert settings(preset=preset).plan(number) == expected


def test_a_preset_gives_what_is_left_out_and_what_is_given_is_taken_as_it_is():
    paper, fast, light = (SD(preset=preset) for preset in ("paper", "fast", "light"))
    assert (paper.objective, paper.alpha, paper.relative_step, paper.gamma) == ("l1", 10.0, None, 2.0)
    assert fast.objective == light.objective == "contrast" and fast.relative_step == light.relative_step == 0.05
    assert (PIXART().alpha, PIXART().gamma) == (15.0, 4.0)
    assert fast.alpha is None and light.plan(50).refinement_iterations == 0
    steps = {"tsam_steps": 7, "refinement_steps": [6, 0, 6], "refinement_iterations": 3}
    given = Settings(preset="fast", alpha=3.0, objective="l1", **steps)
    assert (given.alpha, given.relative_step, given.objective, given.gamma) == (3.0, None, "l1", 4.0)
    assert given.plan(20) == (7, {0, 6}, 3)
    assert Settings(tsam_steps=4).plan(20) == (4, {0}, 8)  # of 0, 4 and 8, what is guided


NAN, INF, NAMES = math.nan, math.inf, ", ".join(map(repr, OBJECTIVE_NAMES))
NO_INTEGER, NO_NUMBER = "has to be an integer but is", "has to be a number but is"
NONE_OF = "is .*, but has to be one of"
WRONG = [
    ("tsam_steps", [-1], ValueError, "is -1, but .* at least 0. Pass 0 for off, or None"),
    ("tsam_steps", [5], ValueError, "is 5, but there are only 4 denoising steps. Pass 0 to 4"),
    ("tsam_steps", [1.5, True, 1.0, "1", NAN, [1]], TypeError, NO_INTEGER),
    ("candidates", [0, -1], ValueError, "is (0|-1), but has to be at least 1"),
    ("candidates", [1.5, True, "2", None], TypeError, NO_INTEGER),
    *((f"candidate_{name}", [0, -1], ValueError, "has to be at least 1") for name in ("steps", "batch")),
    *((f"candidate_{name}", [1.5, True, "2"], TypeError, NO_INTEGER) for name in ("steps", "batch")),
    ("alpha", [-1, -1e-9], ValueError, "is -1.*, but has to be at least 0.* Pass .* 10.0"),
    ("alpha", [NAN, INF, -INF, 10**400], ValueError, "is .*, but has to be finite"),
    ("alpha", ["10", True, torch.ones(1)], TypeError, NO_NUMBER),
    ("relative_step", [-0.1, 1.1, 1.5], ValueError, "is .*, but has to be between 0 and 1"),
    ("relative_step", [NAN, INF], ValueError, "has to be finite"),
    ("relative_step", ["0.1", True, [0.1]], TypeError, NO_NUMBER),
    ("gamma", [0, 0.0, -2.0], ValueError, "is .*, but has to be above 0.* Pass .* 2.0"),
    ("gamma", [NAN, INF, 10**400], ValueError, "has to be finite"),
    ("gamma", ["2", False], TypeError, NO_NUMBER),
    ("region_weight", [-1], ValueError, "is -1, but has to be at least 0.* 10.0"),
    ("region_weight", [NAN, INF], ValueError, "has to be finite"),
    ("region_weight", ["1", True], TypeError, NO_NUMBER),
    ("refinement_iterations", [-1], ValueError, "is -1, .* Pass 0 for no refinement"),
    ("refinement_iterations", [1.0, True, "1", INF], TypeError, NO_INTEGER),
    ("refinement_steps", [(2,)], ValueError, "has 2, but only steps 0 to 1.* or raise `tsam_steps`"),
    ("refinement_steps", [(-1,)], ValueError, r"is -1, .* pass \(\) for no refinement"),
    ("refinement_steps", [(0.0,), (None,), (True,)], TypeError, NO_INTEGER),
    ("refinement_steps", [0, "0", b"0"], TypeError, r"has to be a sequence but is .* Pass \(0, 10\)"),
    ("preset", ["slow", "", None, 3, ["fast"], ("paper", "fast")], ValueError, f"{NONE_OF} 'paper', 'fast', 'light'"),
    ("objective", ["contrasts", "L1", "", 3, ["l1"], {"l1"}, torch.ones(1)], ValueError, f"{NONE_OF} {NAMES}"),
    ("objective", ["l2"], ValueError, r"is 'l2', but .*, or a function \(maps, text\)"),
    ("objective", ["layout"], ValueError, "is 'layout', but there are no `regions`"),
]


@pytest.mark.parametrize("name, values, error, message", WRONG)
def test_a_wrong_value_is_named_with_its_limit_and_remedy_unless_no_step_is_guided(name, values, error, message):
    for value in values:
        with pytest.raises(error, match=f"^`{name}` .*{message}"):
            Settings(**{name: value}).plan(4)
        if name not in ("tsam_steps", "candidates", "candidate_steps", "candidate_batch"):
            assert Settings(**{name: value}, tsam_steps=0).plan(4) == (0, set(), 0)


def test_alpha_and_a_relative_step_exclude_each_other_unless_no_step_is_guided():
    both = {"alpha": 10.0, "relative_step": 0.1}
    with pytest.raises(ValueError, match="`alpha` is 10.0 and `relative_step` 0.1.* Leave one out"):
        Settings(**both)
    assert Settings(**both, tsam_steps=0).off


def test_off_counts_no_steps_that_are_not_there():
    for settings in (Settings(), Settings(tsam_steps=0)):
        with pytest.raises(ValueError, match="`num_inference_steps` is 0, but .* at least 1. 50 is usual"):
            settings.plan(0)


def test_the_names_of_objectives_are_those_that_there_are():
    assert (*OBJECTIVES, "layout") == OBJECTIVE_NAMES


RUNGE_KUTTA = [4, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]  # three steps of four evaluations, seven of one


@pytest.mark.parametrize(
    "scheduler, steps, guided, expected",
    [
        (DDIMScheduler(), 5, 3, [4, 1, 4, 0, 0]),
        (HeunDiscreteScheduler(), 5, 3, [4, 0, 1, 0, 4, 0, 0, 0, 0]),  # the last step is evaluated once
        (PNDMScheduler(skip_prk_steps=True), 5, 3, [4, 0, 1, 4, 0, 0]),  # the first step is evaluated twice
        (PNDMScheduler(), 10, 5, RUNGE_KUTTA),
    ],
)
def test_only_the_first_evaluation_of_a_step_is_guided(scheduler, steps, guided, expected):
    scheduler.set_timesteps(steps)
    assert updates_per_timestep(scheduler, steps, guided, {0, 2}, 3) == expected


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), HeunDiscreteScheduler(), PNDMScheduler(skip_prk_steps=True)])
def test_the_papers_schedule_takes_85_updates_under_every_scheduler(scheduler):
    scheduler.set_timesteps(50)
    updates = updates_per_timestep(scheduler, 50, *Settings().plan(50))
    assert len(updates) == len(scheduler.timesteps) and sum(updates) == 85
    assert [number for number in updates if number] == [21 if step in (0, 10, 20) else 1 for step in range(25)]

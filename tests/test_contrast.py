"""The objectives "relation" and "contrast" against `oracle.py`; what holds of every objective whatever maps show."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from diffusers_tsam import tsam
from diffusers_tsam.tsam import OBJECTIVES
from kinds import OF_T


OURS = ("relation", "contrast")
GRID = (4, 5)
GAMMA = 2.0
LENGTHS = (7, 1, 2, 4, 0)  # content tokens of the images in a batch
SHARPNESS = {"flat": 0.01, "soft": 1.0, "sharp": 8.0}  # deviation of the maps' logarithms
laws = settings(derandomize=True, deadline=None, max_examples=30, database=None)


DEGENERATE = {  # of maps (1, 6, *GRID)
    "zeros": torch.zeros_like,
    "constant": lambda maps: torch.full_like(maps, 0.3),
    "identical": lambda maps: maps[:, :1].repeat(1, 6, 1, 1),
    "one position": lambda maps: torch.zeros_like(maps).index_fill(3, torch.tensor([2]), 0.5),
    "apart": lambda maps: torch.eye(20)[:6].reshape(maps.shape),
    "zero and constant among others": lambda maps: torch.cat([maps[:, :3], 0 * maps[:, :1], 0 * maps[:, 4:] + 0.3], 1),
    "tiny": lambda maps: maps * 1e-30,
    "huge": lambda maps: maps * 1e12,
}


def positions(mask):
    return mask.nonzero().flatten().tolist()


def attention_of(lengths, tokens, bidirectional=False, sink=0.0):
    """T' (B, N, N), of which a causal encoder's rows sum to one; <bos> takes a share, and `sink` of the rest."""
    attention = torch.rand(len(lengths), tokens, tokens, dtype=torch.float64) ** 2
    attention[..., 0] += 1
    if bidirectional:
        return tsam.symmetrize(attention / attention.sum(-1, keepdim=True))
    attention = (1 - sink) * attention.tril() / attention.tril().sum(-1, keepdim=True)
    attention[..., 0] += sink
    return attention


def case_of(lengths=LENGTHS, grid=GRID, sharpness="soft", **of_attention):
    """Prompts of these numbers of words behind a <bos>, two of padding behind the longest, and their maps, float64."""
    tokens = max(lengths) + 3
    content = torch.tensor([[0 < position <= length for position in range(tokens)] for length in lengths])
    maps = (torch.randn(len(lengths), tokens, *grid, dtype=torch.float64) * SHARPNESS[sharpness]).exp()
    attention = attention_of(lengths, tokens, **of_attention)
    return SimpleNamespace(attention=attention, content=content, maps=maps, lengths=lengths)


@st.composite
def cases(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    lengths, side = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3)), st.integers(1, 6)
    sharpness, bidirectional = draw(st.sampled_from([*SHARPNESS])), draw(st.booleans())
    return case_of(lengths, (draw(side), draw(side)), sharpness, bidirectional=bidirectional)


def loss_of(objective, maps, attention, content, gamma=GAMMA):
    """The product's, (B,)."""
    target, relation = tsam.normalize_text_attention(attention, content, gamma), tsam.relation_of(attention, content)
    return OBJECTIVES[objective](maps, tsam.Syntax(target, attention, content, [], relation))


def loss_and_gradient(objective, maps, attention, content):
    maps = maps.detach().clone().requires_grad_()
    loss = loss_of(objective, maps, attention, content)
    return loss.detach(), torch.autograd.grad(loss.sum(), maps)[0]


def prompts_of(case):
    """Each prompt's T', and the positions of its words, for the oracle."""
    return list(zip(case.attention.tolist(), map(positions, case.content)))


def expected_of(case, objective):
    """The oracle's losses, and each image's R (or T) and maps of its words as lists."""
    of_t, prompts = objective in OF_T, prompts_of(case)
    matrices = [oracle.text_attention(*each, GAMMA) if of_t else oracle.relation(*each) for each in prompts]
    images = [maps[own].tolist() for maps, (_, own) in zip(case.maps, prompts)]
    return [oracle.loss(*both, objective) for both in zip(matrices, images)], matrices, images


def check_rows(product, content, expected, rel=1e-5):
    """Each matrix holds these rows, which end at or before their own token, over its content, and nothing beside."""
    for matrix, own, rows in zip(product.double(), map(positions, content), expected, strict=True):
        literal = torch.zeros_like(matrix)
        for token, row in zip(own, rows, strict=True):
            literal[token, own[: len(row)]] = torch.tensor(row, dtype=literal.dtype)
        torch.testing.assert_close(matrix, literal, rtol=rel, atol=1e-8)


def check_maps(maps, content):
    """Weights, which a lone word does not have, and spreads are the oracle's."""
    weights, words = tsam.weight_of(tsam.smooth(maps), content), content & (content.sum(-1, keepdim=True) > 1)
    for image, *found, own in zip(*(x.flatten(0, 1).tolist() for x in (maps, weights, tsam.spread_of(maps), words))):
        assert found == pytest.approx([oracle.weight(image) * own, oracle.spread(image)], rel=1e-6, abs=1e-7)


@laws
@given(cases())
def test_lifts_relations_weights_and_spreads_are_those_of_each_prompt_and_each_map_alone(case):
    for name in ("lift", "relation"):
        product, literal = getattr(tsam, f"{name}_of")(case.attention, case.content), getattr(oracle, name)
        check_rows(product, case.content, [literal(*of_prompt) for of_prompt in prompts_of(case)])
    check_maps(case.maps, case.content)


@pytest.mark.parametrize("name", DEGENERATE)
def test_weights_and_spreads_are_those_of_each_map_alone_whatever_it_is(name):
    check_maps(DEGENERATE[name](torch.rand(1, 6, *GRID)).double(), torch.ones(1, 6, dtype=torch.bool))


def test_lift_is_as_one_calculates_it_by_hand():
    attention = torch.tensor([[[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.125, 0.375]]])
    lift = tsam.lift_of(attention, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(lift, torch.tensor([[[0.0, 0, 0], [2 / 3, 0, 0], [4 / 3, 1, 0]]]))


def test_a_word_that_attends_to_no_earlier_one_and_one_that_no_later_one_attends_to_are_unrelated():
    case = case_of()
    case.attention[0, 4, 1:4] = 0  # the fourth word has itself alone
    case.attention[0, 3:, 2] = 0  # nobody has the second
    case.attention[0, 6] = 0  # the sixth has nothing at all
    relation = tsam.relation_of(case.attention, case.content)[0]
    assert not relation[[4, 6]].any() and not relation[:, 2].any() and relation[5].max() == relation[7].max() == 1
    for objective in OURS:
        loss, gradient = loss_and_gradient(objective, case.maps, case.attention, case.content)
        assert loss.tolist() == pytest.approx(expected_of(case, objective)[0], rel=1e-5) and gradient.isfinite().all()


@pytest.mark.parametrize("side", [2, 4, 16, 64])
def test_a_map_with_as_much_in_every_row_and_every_column_spreads_1_less_1_over_the_number_of_positions(side):
    """Of a uniform map, less its minimum, nothing is left; a nearly uniform one stands for it."""
    place = torch.arange(side)
    diagonal, chessboard = torch.eye(side), (place + place[:, None]) % 2
    *spreads, hollow = tsam.spread_of(torch.stack([diagonal, chessboard + 0.3, place + place[:, None] > 0])[None])[0]
    assert spreads == pytest.approx([1 - 1 / side**2] * 2, rel=1e-5)
    assert side < 64 or hollow.item() == pytest.approx(1, abs=2e-3)


@laws
@given(cases())
def test_loss_is_that_of_each_image_alone(case):
    for objective in OBJECTIVES:
        (expected, *_), of_t = expected_of(case, objective), objective in OF_T
        for dtype, close in ((torch.float64, 1e-5 if of_t else 1e-6), (torch.float32, 1e-5 if of_t else 1e-4)):
            product = loss_of(objective, case.maps.to(dtype), case.attention, case.content)  # T is of float32
            assert product.tolist() == pytest.approx(expected, rel=close, abs=1e-6 if of_t else close / 100)
            assert product.dtype == dtype or of_t


@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("objective", OURS)
def test_gradient_is_the_slope_of_the_oracles_loss_at_constant_weights(objective, sharpness):
    case = case_of((3,), (3, 4), sharpness)
    _, (gradient,) = loss_and_gradient(objective, case.maps, case.attention, case.content)
    _, (related,), (images,) = expected_of(case, objective)
    weights = [oracle.weight(image) for image in images]
    words, step = torch.tensor(images, dtype=torch.float64), 1e-5
    slopes = torch.zeros_like(words)  # by the logarithms of the maps, so that each position counts
    for k in range(words.numel()):
        losses = []
        for factor in (1 + step, 1 - step):
            moved = words.clone()
            moved.view(-1)[k] *= factor
            losses.append(oracle.contrast(related, moved.tolist(), objective, weights))
        slopes.view(-1)[k] = (losses[0] - losses[1]) / (2 * step)
    assert not gradient[[0, *range(4, len(gradient))]].any()  # <bos> and padding
    assert (gradient[1:4] * words - slopes).norm() < 1e-5 * slopes.norm() and slopes.norm() > 0


@laws
@given(cases(), st.floats(-3, 3))
def test_how_much_attention_a_word_gets_changes_nothing(case, exponent):
    scale = 10 ** (exponent * torch.rand(*case.content.shape, 1, 1, dtype=torch.float64))
    for objective in OBJECTIVES:
        losses = [loss_of(objective, maps, case.attention, case.content) for maps in (case.maps, case.maps * scale)]
        torch.testing.assert_close(*losses)


@laws
@given(cases(), st.randoms())
def test_an_image_has_its_loss_and_gradient_in_any_batch_and_alone_with_any_padding(case, random):
    order = random.sample(range(len(case.lengths)), len(case.lengths))
    other = case.maps.where(case.content[..., None, None], torch.rand_like(case.maps))
    for objective in OBJECTIVES:
        loss, gradient = loss_and_gradient(objective, case.maps, case.attention, case.content)
        assert not gradient[~case.content].any()
        assert torch.equal(loss_of(objective, other, case.attention, case.content), loss)
        for images in (order, order[:1]):
            own = range(max(case.lengths[image] for image in images) + 1)  # without padding behind the longest
            maps, attention, content = (x[images][:, own] for x in (case.maps, case.attention, case.content))
            found = loss_and_gradient(objective, maps, attention[..., own], content)
            torch.testing.assert_close(found, (loss[images], gradient[images][:, own]))


@laws
@given(cases())
def test_one_word_has_no_loss_and_no_gradient(case):
    case.content &= case.content.cumsum(-1) <= 1
    for objective in OBJECTIVES:
        loss, gradient = loss_and_gradient(objective, case.maps, case.attention, case.content)
        assert max(loss.abs().max(), gradient.abs().max()) <= (0 if objective in OURS else 1e-6)


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_finite_whatever_the_maps_are(objective, name):
    maps, content = DEGENERATE[name](torch.rand(1, 6, *GRID)), torch.tensor([[False, True, True, True, True, False]])
    loss, gradient = loss_and_gradient(objective, maps, attention_of((4,), 6), content)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert objective not in OURS or -1e-6 < loss.item() < 1 + 0.5 + 0.25 * 3
    if name == "zeros" and objective in OURS:
        assert loss.item() == 0 and not gradient.any()


def test_identical_maps_share_all_and_maps_that_never_meet_are_all_apart():
    """The first term is 1 of the former and 0 of the latter, the second the reverse."""
    case = case_of((5,), (9, 9))
    apart = torch.zeros_like(case.maps)
    for word in range(1, 6):
        apart[0, word, 4 * (word // 3) + 1, 3 * (word % 3) + 1] = 1  # a smoothed position reaches one further
    for maps, expected in ((apart[:, 1:2].expand_as(apart), 1.0), (apart, tsam.RELATED_WEIGHT)):
        assert loss_of("relation", maps, case.attention, case.content).item() == pytest.approx(expected, abs=1e-6)

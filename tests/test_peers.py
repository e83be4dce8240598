"""The peers' losses beside slow, literal ones, and beside diffusers' own Attend-and-Excite."""

import functools
import math

import pytest
import torch
from peers import PEERS, attend_and_excite_loss, compete, conform_loss, syngen_loss

from diffusers_tsam.tsam import smooth


WORDS = torch.tensor([[[2, 3], [6, 7]], [[2, 3], [5, 8]]])


@pytest.fixture
def scene():
    """Two prompts of nine tokens: <bos>, some of their own, the rest padding."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 10, 5, 4, generator=generator).double().mul(2).softmax(1)
    content = torch.zeros(2, 10, dtype=torch.bool)
    content[0, 1:8] = content[1, 1:9] = True
    return maps, content, WORDS


def competing(maps, content, weight):
    """Literally: at each position weight(A) over the sum of the content tokens', then the 3x3 blur."""
    result = torch.zeros_like(maps)
    for b in range(len(maps)):
        own = content[b].nonzero().flatten().tolist()
        for y in range(maps.shape[2]):
            for x in range(maps.shape[3]):
                total = sum(weight(maps[b, n, y, x]) for n in own)
                for n in own:
                    result[b, n, y, x] = weight(maps[b, n, y, x]) / total
    return smooth(result)


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def sharply(attention):
    return math.exp(100 * attention)


def attend_and_excite(maps, content, words, weight=float):
    maps = competing(maps, content, weight)
    return [max(1 - float(maps[b, noun].max()) for _, noun in words[b].tolist()) for b in range(len(maps))]


def conform(maps, content, words, weight=float):
    maps, result = competing(maps, content, weight), []
    for b in range(len(maps)):
        classes = {token: k for k, pair in enumerate(words[b].tolist()) for token in pair}
        terms = []
        for j, p in ((j, p) for j in classes for p in classes if j != p and classes[j] == classes[p]):
            own = math.exp(cosine(maps[b, j], maps[b, p]) / 0.5)
            others = sum(math.exp(cosine(maps[b, j], maps[b, n]) / 0.5) for n in classes if classes[n] != classes[j])
            terms.append(-math.log(own / (own + others)))
        result.append(sum(terms) / len(terms))
    return result


def syngen(maps, content, words):
    def distance(b, i, j):
        p, q = (maps[b, n].flatten() / maps[b, n].sum() for n in (i, j))
        return float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2

    result = []
    for b in range(len(maps)):
        total = 0
        for modifier, noun in words[b].tolist():
            others = [n for n in content[b].nonzero().flatten().tolist() if n not in (modifier, noun)]
            far = [(distance(b, modifier, u) + distance(b, noun, u)) / 2 for u in others]
            total += distance(b, modifier, noun) - sum(far) / len(far)
        result.append(total)
    return result


LITERAL = {
    "attend_and_excite": attend_and_excite,
    "attend_and_excite_100": functools.partial(attend_and_excite, weight=sharply),
    "conform": conform,
    "conform_100": functools.partial(conform, weight=sharply),
    "syngen": syngen,
}


@pytest.mark.parametrize("name", PEERS)
def test_agrees_with_the_literal_one(name, scene):
    torch.testing.assert_close(PEERS[name](*scene).tolist(), LITERAL[name](*scene), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", PEERS)
def test_images_of_a_batch_are_independent_and_have_gradients(name, scene):
    maps, content, words = scene
    maps.requires_grad_()
    together = PEERS[name](maps, content, words)
    alone = torch.cat([PEERS[name](*(x[b : b + 1] for x in scene)) for b in range(2)])
    torch.testing.assert_close(together, alone)
    (gradient,) = torch.autograd.grad(together[0], maps)
    assert gradient[0].abs().max() > 0 and not gradient[1].any() and gradient.isfinite().all()


def test_attend_and_excite_is_that_of_diffusers(scene):
    module = pytest.importorskip(
        "diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite.pipeline_stable_diffusion_attend_and_excite"
    )
    theirs = module.StableDiffusionAttendAndExcitePipeline
    maps, content, words = scene
    maps, content = maps.float(), torch.ones_like(content)
    content[:, [0, -1]] = False  # theirs lets all but the first and the last token compete
    for b in range(2):
        nouns = words[b, :, 1].tolist()
        highest = theirs._compute_max_attention_per_index(maps[b].permute(1, 2, 0).clone(), nouns)
        expected = theirs._compute_loss(highest)
        torch.testing.assert_close(attend_and_excite_loss(maps, content, words)[b], expected)


@pytest.mark.parametrize("sharpness", (100.0, 10.0, None))
def test_maps_that_compete_share_each_position(scene, sharpness):
    maps, content, _ = scene
    shared = compete(maps, content, sharpness)
    torch.testing.assert_close(shared.sum(1), torch.ones_like(shared[:, 0]))
    assert not shared[~content].any()


def test_shares_without_sharpness_are_parts_of_the_sum(scene):
    maps, content, _ = scene
    own = maps[0, 1:8]
    torch.testing.assert_close(compete(maps, content, None)[0, 1:8], smooth((own / own.sum(0))[None])[0])


def disjoint(groups):
    """Maps of one prompt's words, each group with a corner of its own; all others lie everywhere."""
    maps = torch.full((1, 10, 6, 6), 0.01)
    for k, group in enumerate(groups):
        maps[0, group, 2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = 0.9
    return maps / maps.sum(1, keepdim=True)


@pytest.mark.parametrize("loss", (conform_loss, syngen_loss))
def test_bound_pairs_cost_less_than_swapped_ones(loss):
    content = torch.ones(1, 10, dtype=torch.bool)
    bound, swapped = disjoint([[2, 3], [6, 7]]), disjoint([[2, 7], [6, 3]])
    assert loss(bound, content, WORDS[:1]) < loss(swapped, content, WORDS[:1])


def test_a_neglected_noun_costs_attend_and_excite(scene):
    content = torch.ones(1, 10, dtype=torch.bool)
    assert attend_and_excite_loss(disjoint([[3], [7]]), content, WORDS[:1]) < attend_and_excite_loss(
        disjoint([[3]]), content, WORDS[:1]
    )

"""The baselines' losses beside slow, literal ones, and diffusers' own Attend-and-Excite; which words they get."""

import functools
import math
from itertools import product

import pytest
import torch

from diffusers_tsam.evaluation import baselines
from diffusers_tsam.evaluation.baselines import BASELINES, told
from diffusers_tsam.evaluation.prompts import Prompt, positions_of, structured, things_of_doc, things_of_template
from diffusers_tsam.tsam import Syntax, smooth


# Two prompts: of a red car and a blue one, whose noun is two tokens; of a thing without a modifier and one with two
THINGS = [[[[2], [3]], [[6], [7, 8]]], [[[2]], [[4], [5], [7]]]]
LOSSES = {name: getattr(baselines, f"{name}_loss") for name in BASELINES}
LOSSES |= {f"{name}_100": LOSSES[name] for name in ("attend_and_excite", "conform")}
LOSSES |= {name: functools.partial(LOSSES[name], sharpness=None) for name in ("attend_and_excite", "conform")}


@pytest.fixture
def scene():
    """Two prompts of ten tokens: <bos>, some of their own, the rest padding."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 11, 5, 4, generator=generator).double().mul(2).softmax(1)
    content = torch.zeros(2, 11, dtype=torch.bool)
    content[0, 1:9] = content[1, 1:10] = True
    return maps, content, THINGS


# The literal ones are of one image: maps (N, H, W), content (N,) and its things.
def competing(maps, content, weight):
    """Literally: at each position weight(A) over the sum of the content tokens', then the 3x3 blur."""
    result = torch.zeros_like(maps)
    for y, x in product(*map(range, maps.shape[1:])):
        own = {n: weight(maps[n, y, x]) for n in content.nonzero().flatten().tolist()}
        for n, value in own.items():
            result[n, y, x] = value / sum(own.values())
    return smooth(result[None])[0]


def word_of(maps, tokens):
    return sum(maps[token] for token in tokens) / len(tokens)


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def attend_and_excite(maps, content, things, weight=float):
    maps = competing(maps, content, weight)
    return max(1 - float(word_of(maps, thing[-1]).max()) for thing in things)


def conform(maps, content, things, weight=float):
    maps, terms = competing(maps, content, weight), []
    words = [(k, word_of(maps, word)) for k, thing in enumerate(things) for word in thing]
    for j, (thing, anchor) in enumerate(words):
        near = [math.exp(cosine(anchor, word) / 0.5) for _, word in words]
        others = sum(near[n] for n, (other, _) in enumerate(words) if other != thing)
        for p, (other, _) in enumerate(words):
            if p != j and other == thing:
                terms.append(-math.log(near[p] / (near[p] + others)))
    return sum(terms) / len(terms)


def divided(values):
    return values / values.sum()


def syngen(maps, content, things):
    def distance(p, q):
        return float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2

    total = 0
    for thing in things:
        *modifiers, noun = [divided(word_of(maps, word)) for word in thing]
        others = [divided(maps[n]) for n in content.nonzero().flatten().tolist() if n not in sum(thing, [])]
        for modifier in modifiers:
            far = [(distance(modifier, u) + distance(noun, u)) / 2 for u in others]
            total += distance(modifier, noun) - sum(far) / len(far)
    return total


def focus(maps, content, things):
    def divergence(maps):
        """Jensen-Shannon by entropies: that of the mean less the mean of them."""
        shares = [divided(each**3) for each in maps]
        mean = sum(shares) / len(shares)
        entropies = [-float((p * p.log()).sum()) for p in (mean, *shares)]
        return (entropies[0] - sum(entropies[1:]) / len(shares)) / math.log(len(shares))

    words = [[word_of(smooth(maps[None])[0], word) for word in thing] for thing in things]
    near = [divergence(thing) for thing in words if len(thing) > 1]
    apart = 1 - divergence([sum(thing) / len(thing) for thing in words])
    return (sum(near) / len(near) + apart) / 2


LITERAL = {"attend_and_excite": attend_and_excite, "conform": conform, "syngen": syngen, "focus": focus}
SHARP = {"weight": lambda attention: math.exp(100 * attention)}
LITERAL |= {f"{name}_100": functools.partial(LITERAL[name], **SHARP) for name in ("attend_and_excite", "conform")}


@pytest.mark.parametrize("name", LOSSES)
def test_an_image_has_the_literal_loss_alone_as_in_a_batch_and_a_gradient_of_its_own(name, scene):
    maps, content, things = scene
    maps.requires_grad_()
    together = LOSSES[name](*scene)
    for b, image in enumerate(zip(maps.detach(), content, things)):
        torch.testing.assert_close(LOSSES[name](*(x[b : b + 1] for x in scene))[0], together[b])
        if name != "anywhere":
            literal, tolerance = LITERAL[name](*image), 1e-5 if name == "focus" else 1e-7  # FOCUS adds 1e-10 in logs
            torch.testing.assert_close(together[b].item(), literal, rtol=tolerance, atol=1e-7)
    (gradient,) = torch.autograd.grad(together[0], maps)
    assert gradient[0].abs().max() > 0 and not gradient[1].any() and gradient.isfinite().all()


@pytest.mark.parametrize("name", LITERAL)
@pytest.mark.parametrize("things", ([], [[[2], [3]]], [[[2]], [[3]]]), ids=("nothing", "one thing", "nouns alone"))
def test_what_needs_no_binding_costs_a_finite_loss_with_a_finite_gradient(name, things, scene):
    maps, content, _ = scene
    maps.requires_grad_()
    loss = LOSSES[name](maps, content, [things, THINGS[1]])
    (gradient,) = torch.autograd.grad(loss.sum(), maps)
    assert loss.isfinite().all() and gradient.isfinite().all()
    assert things or (loss[0] == 0 and not gradient[0].any())


def test_attend_and_excite_is_that_of_diffusers(scene):
    folder = "diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite"
    theirs = pytest.importorskip(f"{folder}.pipeline_stable_diffusion_attend_and_excite")
    theirs = theirs.StableDiffusionAttendAndExcitePipeline
    maps, content = scene[0].float(), torch.ones_like(scene[1])
    content[:, [0, -1]] = False  # theirs lets all but the first and the last token compete
    things = [[[[2], [3]], [[6], [7]]], [[[2]], [[8]]]]  # theirs knows no words of two tokens
    for own, image, nouns in zip(LOSSES["attend_and_excite_100"](maps, content, things), maps, ([3, 7], [2, 8])):
        highest = theirs._compute_max_attention_per_index(image.permute(1, 2, 0).clone(), nouns)
        torch.testing.assert_close(own, theirs._compute_loss(highest))


def disjoint(groups):
    """Maps of one prompt's words, each group with a corner of its own; all others lie everywhere."""
    maps = torch.full((1, 10, 6, 6), 0.01)
    for k, group in enumerate(groups):
        maps[0, group, 2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = 0.9
    return maps / maps.sum(1, keepdim=True)


@pytest.mark.parametrize("name", LITERAL)
def test_bound_pairs_cost_less_than_swapped_ones_and_a_neglected_noun_costs_attend_and_excite(name):
    content = torch.ones(1, 10, dtype=torch.bool)
    alike = [[[3], [7]], [[3]]] if name.startswith("attend") else [[[2, 3], [6, 7]], [[2, 7], [6, 3]]]
    better, worse = (LOSSES[name](disjoint(groups), content, [[[[2], [3]], [[6], [7]]]]) for groups in alike)
    assert better < worse


def test_only_pairs_bind_for_syngen_and_nouns_for_the_others():
    assert [name for name, baseline in BASELINES.items() if not baseline.binds([[[2]], [[4]]])] == ["syngen"]
    assert [name for name, baseline in BASELINES.items() if baseline.binds([])] == ["anywhere"]


def words(things, spell):
    return ", ".join(" ".join(map(spell, thing)) for thing in things)


TEMPLATED = {
    "a red cube and an orange sphere": "red cube, orange sphere",
    "a cat with a blue bow": "cat, blue bow",
    "the dog and a cat and a pink T-shirt.": "dog, cat, pink T-shirt",
    "a dog runs and a cat sleeps on a mat": "",
    "surfers": "",
}


@pytest.mark.parametrize("text", TEMPLATED)
def test_a_template_says_its_things(text):
    assert words(things_of_template(text), lambda span: text[slice(*span)]) == TEMPLATED[text]


def test_structured_sets_are_of_different_prompts_that_their_template_fits():
    for name, number in (("objects", 66), ("animals-objects", 144), ("animals", 66)):
        texts = structured(name)
        assert len(set(texts)) == number and texts == structured(name)
        assert all(len(things_of_template(text)) == 2 for text in texts)


@pytest.mark.parametrize(
    "tokens, expected",
    [
        (["a", "black", "back", "pack", "and", "an", "elephant"], [[[1], [2, 3]], [[6]]]),
        (["a", "black", "backpack", "and"], [[[1], [2]]]),  # cut off by the window
        (["", "a", "black", "back", "p", "ack", ",", "and", "an", "eleph", "ant"], [[[2], [3, 4, 5]], [[9, 10]]]),
        (["\N{REPLACEMENT CHARACTER}", "black", "backpack", "and", "an", "elephant"], [[[1], [2]], [[5]]]),
    ],
)
def test_a_word_of_several_tokens_is_one_word(tokens, expected):
    text = "a Black backpack and an elephant"
    assert positions_of(things_of_template(text), text, tokens) == expected


def test_an_objective_finds_each_images_own_words():
    prompts = [Prompt("0", text, things_of_template(text)) for text in ("a cat and a red bow", "a blue bow and a dog")]
    tokens = [["a", "cat", "and", "a", "red", "bow"], ["a", "blue", "bow", "and", "a", "dog"]]
    content = torch.zeros(2, 8, dtype=torch.bool)
    content[:, 1:7] = True
    syntax, maps, seen = Syntax(None, None, content, tokens, None), torch.ones(2, 8, 2, 2), []
    for given in (prompts, None):
        told(lambda maps, content, things: seen.append(things), given)(maps, syntax)
    assert seen[0] == seen[1] == [[[[2]], [[5], [6]]], [[[2], [3]], [[6]]]]


def test_both_pipelines_tokens_are_found_in_the_prompt(pipe):
    text = "a red cube and a purple sphere"  # the tiny tokenizers know neither "purple" nor all of the others
    (tokens,) = pipe.get_text_self_attention(text).tokens
    found = positions_of(things_of_template(text), text, tokens)
    assert words(found, lambda word: "".join(tokens[k].strip() for k in word)) == "red cube, purple sphere"


PARSES = [  # word/part of speech/place of its head/dependency
    ("very red car", "very/ADV/1/advmod red/ADJ/2/amod car/NOUN/2/ROOT and/CCONJ/2/cc a/DET/5/det dog/NOUN/2/conj"),
    ("red white metal boat", "red/ADJ/4/amod and/CCONJ/0/cc white/ADJ/0/conj metal/NOUN/4/compound boat/NOUN/4/ROOT"),
    ("red dog", "the/DET/1/det dog/NOUN/2/nsubj is/AUX/2/ROOT red/ADJ/2/acomp"),
    ("red dog", "a/DET/1/det dog/NOUN/1/ROOT that/PRON/3/nsubj is/AUX/1/relcl red/ADJ/3/acomp"),
    ("", "two/NUM/1/nummod men/NOUN/2/nsubj talk/VERB/2/ROOT"),
]


@pytest.mark.parametrize("expected, parse", PARSES)
def test_a_parse_says_which_modifiers_a_noun_has(expected, parse):
    spacy = pytest.importorskip("spacy")
    texts, pos, heads, deps = map(list, zip(*(word.split("/") for word in parse.split())))
    doc = spacy.tokens.Doc(spacy.blank("en").vocab, texts, pos=pos, heads=[*map(int, heads)], deps=deps)
    assert words(things_of_doc(doc), lambda span: " ".join(texts)[slice(*span)]) == expected

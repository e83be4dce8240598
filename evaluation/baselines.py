"""Methods that are told which words belong together, as objectives over the same maps, for T-SAM's pipelines.

Each loss is written from its paper's equations and is a pure function of the cross-attention maps; so that only the
losses differ, how often and how far the latent moves is the pipelines' to say: `BASELINES` has what the papers say, as
far as their arguments can. What these losses need and T-SAM does not is `things`: for each image a list of things, each
a list of words, its noun last, each word a list of token positions, whose maps' mean is the word's.

Shapes: B images, N tokens, H x W positions; `content` (B, N) bool marks the prompt's own tokens, `maps` (B, N, H, W)
are probabilities, not smoothed, averaged over heads and layers. Losses are (B,), 0 where there is nothing to bind.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..tsam import smooth
from .prompts import positions_of, things_of_template


SHARPNESS = 100.0  # what the maps are multiplied by before the softmax over tokens; Attend-and-Excite's code
TEMPERATURE = 0.5  # CONFORM's
PEAKEDNESS = 3  # the power to which FOCUS raises its distributions
TINY = 1e-12
FOCUS_TINY = 1e-10  # FOCUS's


def compete(maps, content, sharpness=SHARPNESS):
    """Maps in which the prompt's tokens share each position among themselves, zero elsewhere, smoothed. (.., N, H, W).

    The shares are the softmax of `sharpness` x maps, as in Attend-and-Excite's and CONFORM's code, whose 100 suits maps
    of a few percent; None: each token's part of the sum, for models whose maps are near one already, on which that
    softmax has no gradient left.
    """
    own = content[..., None, None]
    if sharpness is None:
        shares = maps * own
        return smooth(shares / shares.sum(-3, keepdim=True).clamp(min=TINY))
    return smooth((sharpness * maps).masked_fill(~own, -torch.inf).softmax(-3))


def of_words(maps, words):
    """Each word's map, the mean of its tokens': maps (N, H, W) -> (words, H x W)."""
    return torch.stack([maps[word].mean(0) for word in words]).flatten(1)


def per_image(loss):
    """A loss of one image's maps (N, H, W), content (N,) and things, as one of a batch: (B,)."""

    @functools.wraps(loss)
    def batched(maps, content, things, **settings):
        each = (loss(*image, **settings) if image[2] else None for image in zip(maps, content, things))
        return torch.stack([0 * own.sum() if value is None else value for own, value in zip(maps, each)])

    return batched


@per_image
def attend_and_excite_loss(maps, content, things, sharpness=SHARPNESS):
    """max_k (1 - max_a A_ka) over the things' nouns k: the one that is least attended to.

    Chefer, Alaluf, Vinker, Wolf, Cohen-Or, "Attend-and-Excite", SIGGRAPH 2023 (arXiv:2301.13826).
    Left out: its thresholds, at which refinement stops early. It uses the nouns only.
    """
    subjects = of_words(compete(maps, content, sharpness), [thing[-1] for thing in things])
    return (1 - subjects.amax(-1)).amax()


@per_image
def conform_loss(maps, content, things, sharpness=SHARPNESS):
    """InfoNCE: a word's map is to be nearer to those of its thing's words than to those of the other things' words.

    Mean over the ordered pairs (j, p) of one thing's words of -log(e_jp / (e_jp + Σ_n e_jn)), e = exp(cosine / 0.5), n
    over the words of the other things. Where no thing has two words: the mean cosine of different things' words, their
    code's `contrastive` loss. Meral, Simsar, Tombari, Yanardag, "CONFORM", CVPR 2024 (arXiv:2312.06059). Left out: the
    previous step's maps, which its code adds as further positives and negatives.
    """
    if len(things) < 2:
        return None
    chosen = F.normalize(of_words(compete(maps, content, sharpness), sum(things, [])), dim=-1)
    cosine = chosen @ chosen.mT
    thing = torch.tensor([k for k, words in enumerate(things) for _ in words], device=maps.device)
    same = thing[:, None] == thing
    first, second = (same & ~torch.eye(len(thing), dtype=torch.bool, device=maps.device)).nonzero().unbind(-1)
    if not len(first):
        return cosine[~same].mean()
    negative = (cosine / TEMPERATURE).masked_fill(same, -torch.inf).logsumexp(-1)[first]
    positive = cosine[first, second] / TEMPERATURE
    return (torch.logaddexp(positive, negative) - positive).mean()


def _distributions(maps):
    """Each map divided by its sum."""
    return maps / maps.sum(-1, keepdim=True).clamp(min=TINY)


def _symmetric_kl(p, q):
    """(KL(p||q) + KL(q||p)) / 2 of distributions in the last dimension."""
    return ((p - q) * (p.clamp(min=TINY).log() - q.clamp(min=TINY).log())).sum(-1) / 2


@per_image
def syngen_loss(maps, content, things):
    """Σ over pairs of a modifier m and its noun n of D(m, n) - mean over the prompt's other tokens u of (D(m, u) +
    D(n, u)) / 2, with D the symmetric Kullback-Leibler divergence of two maps, each divided by its sum.

    Others are those of other things, and those of no thing. Rassin, Hirsch, Glickman, Ravfogel, Goldberg, Chechik,
    "Linguistic Binding in Diffusion Models", NeurIPS 2023 (arXiv:2306.08877): the maps are not smoothed. Its code takes
    the largest divergence of a word's tokens, here it is that of their mean.
    """
    tokens, total = _distributions(maps.flatten(1)), []
    for thing in things:
        *modifiers, noun = _distributions(of_words(maps, thing))
        own = torch.tensor(sum(thing, []), device=maps.device)
        others = tokens[content.index_fill(0, own, False)]
        for modifier in modifiers:
            near = _symmetric_kl(modifier, noun)
            far = [_symmetric_kl(word, others).mean() for word in (modifier, noun) if len(others)]
            total.append(near - sum(far) / 2)
    return sum(total) if total else None


def _jensen_shannon(maps):
    """Of T maps (T, P), cubed and divided by their sums: 0 where they agree, 1 where they are disjoint."""
    p = maps**PEAKEDNESS
    p = p / p.sum(-1, keepdim=True).clamp(min=FOCUS_TINY)
    to_mean = (p * ((p + FOCUS_TINY).log() - (p.mean(0) + FOCUS_TINY).log())).sum(-1)
    return to_mean.mean() / math.log(len(p))


@per_image
def focus_loss(maps, content, things):
    """Half of: the mean over things of the Jensen-Shannon divergence of their words' maps, and 1 minus that of the
    things' own, the means of their words'.

    Bill, Simsar, Hofmann, FOCUS (arXiv:2510.02315): smoothed here with T-SAM's kernel, there with one of σ = 1. Left
    out: its control of a flow's velocity, in whose place stands the update of the latent.
    """
    words = [of_words(smooth(maps), thing) for thing in things]
    near = [_jensen_shannon(own) for own in words if len(own) > 1]
    apart = [1 - _jensen_shannon(torch.stack([own.mean(0) for own in words]))] if len(words) > 1 else []
    return (sum(near) / max(len(near), 1) + sum(apart)) / 2 if near or apart else None


def anywhere_loss(maps, content, things):
    """A control: moves as far as the others, but to where chance says."""
    noise = torch.randn(maps.shape[1:], generator=torch.Generator().manual_seed(0))
    return (maps * noise.to(maps)).sum((1, 2, 3))


class Baseline(NamedTuple):
    """loss: of (maps, content, things). arguments: the pipelines', from its paper and code. needs: what has to be given
    from outside: "nouns" or "pairs" (nouns with modifiers), of which it leaves prompts without to stock, or "nothing".
    """

    loss: Callable
    arguments: dict
    needs: str

    def binds(self, things):
        if self.needs == "pairs":
            return any(len(thing) > 1 for thing in things)
        return self.needs == "nothing" or bool(things)


# Half of the steps, with α = 20, and 20 more updates at steps 0, 10 and 20 of 50: Attend-and-Excite's numbers, which
# CONFORM took over. Both let α fall with the root of a line from 1 to 0.5 over all steps, to 0.87 of itself where
# guidance ends; here it is constant. Attend-and-Excite refines only until its thresholds (0.05, 0.5, 0.8) are reached;
# here it always does 20 times. The pipelines have no argument for either.
ATTEND = {"alpha": 20.0, "preset": "paper"}
BASELINES = {
    "attend_and_excite": Baseline(attend_and_excite_loss, ATTEND, "nouns"),
    "conform": Baseline(conform_loss, ATTEND, "nouns"),
    "syngen": Baseline(syngen_loss, {"alpha": 20.0, "preset": "paper", "refinement_steps": ()}, "pairs"),
    # its λ is of a velocity: no number of its paper is an α, and one update a step is what it has
    "focus": Baseline(focus_loss, {"relative_step": 0.05, "preset": "paper", "refinement_steps": ()}, "nouns"),
    "anywhere": Baseline(anywhere_loss, {"relative_step": 0.05, "preset": "paper"}, "nothing"),
}


def unbound(methods, prompts):
    """Which methods leave prompts to stock, a sentence each."""
    for method in methods:
        name = method.partition(":")[0]
        left = [prompt.text for prompt in prompts if name in BASELINES and not BASELINES[name].binds(prompt.things)]
        if left:
            yield (
                f"{method} has nothing to bind in {len(left)} of {len(prompts)} prompts, which are drawn as by stock,"
                f" the first of them {left[0]!r}."
            )


def told(loss, prompts=None, **settings):
    """The pipelines' `objective` of a loss, which is told the things of `prompts`, a `Prompt` an image; without these
    it finds them by the template in a prompt whose words are one token each."""

    def objective(maps, text):
        things = []
        for image, (tokens, content) in enumerate(zip(text.tokens, text.content)):
            own = content.nonzero().flatten().tolist()
            words = " ".join(tokens)
            spans = (
                (things_of_template(words), words) if prompts is None else (prompts[image].things, prompts[image].text)
            )
            things.append([[[own[k] for k in word] for word in thing] for thing in positions_of(*spans, tokens)])
        return loss(maps, text.content, things, **settings)

    return objective

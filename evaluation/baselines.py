"""Methods that need to be told which words belong together, as objectives over the same maps, for T-SAM's pipelines.

Each loss is written from its paper's equations as a pure function of the cross-attention maps. The pipelines decide how
often and how far the latent moves, so that only losses differ; `BASELINES` has the papers' schedules, as far as the
pipelines' arguments allow. Unlike T-SAM, these losses need `things`: for each image a list of things, each a list of
words, noun last, each word a list of token positions; a word's map is the mean of theirs.

Shapes: B images, N tokens, H x W positions; `content` (B, N) bool marks the prompt's own tokens, `maps` (B, N, H, W)
are probabilities, not smoothed, averaged over heads and layers. Losses are (B,), 0 if there is nothing to bind.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..tsam import smooth
from .prompts import positions_of, things_of_template


SHARPNESS = 100.0  # factor on the maps before the softmax over tokens; from Attend-and-Excite's code
TEMPERATURE = 0.5  # CONFORM's
PEAKEDNESS = 3  # FOCUS's power for its distributions
TINY = 1e-12
FOCUS_TINY = 1e-10  # FOCUS's


def compete(maps, content, sharpness=SHARPNESS):
    """Maps (.., N, H, W) in which the prompt's tokens share each position; zero elsewhere, smoothed.

    The shares are the softmax of `sharpness` x maps, as in Attend-and-Excite's and CONFORM's code; their 100 suits maps
    of a few percent. None: each token's part of the sum, for models with maps near one, because the softmax would have
    no gradient there.
    """
    own = content[..., None, None]
    if sharpness is None:
        shares = maps * own
        return smooth(shares / shares.sum(-3, keepdim=True).clamp(min=TINY))
    return smooth((sharpness * maps).masked_fill(~own, -torch.inf).softmax(-3))


def of_words(maps, words):
    """Each word's map, its tokens' mean: maps (N, H, W) -> (words, H x W)."""
    return torch.stack([maps[word].mean(0) for word in words]).flatten(1)


def per_image(loss):
    """Turn a loss of one image's maps (N, H, W), content (N,) and things into a batch's: (B,)."""

    @functools.wraps(loss)
    def batched(maps, content, things, **settings):
        each = (loss(*image, **settings) if image[2] else None for image in zip(maps, content, things))
        return torch.stack([0 * own.sum() if value is None else value for own, value in zip(maps, each)])

    return batched


@per_image
def attend_and_excite_loss(maps, content, things, sharpness=SHARPNESS):
    """max_k (1 - max_a A_ka) over the things' nouns k: that of the least attended noun.

    Chefer, Alaluf, Vinker, Wolf, Cohen-Or, "Attend-and-Excite", SIGGRAPH 2023 (arXiv:2301.13826).
    Left out: its thresholds, which stop refinement early. It uses only nouns.
    """
    subjects = of_words(compete(maps, content, sharpness), [thing[-1] for thing in things])
    return (1 - subjects.amax(-1)).amax()


@per_image
def conform_loss(maps, content, things, sharpness=SHARPNESS):
    """InfoNCE: pulls a word's map towards those of its thing's words, away from those of other things' words.

    Mean over the ordered pairs (j, p) of one thing's words of -log(e_jp / (e_jp + Σ_n e_jn)), e = exp(cosine / 0.5), n
    over the words of the other things. If no thing has two words: the mean cosine of different things' words, their
    code's `contrastive` loss. Meral, Simsar, Tombari, Yanardag, "CONFORM", CVPR 2024 (arXiv:2312.06059). Left out: the
    previous step's maps, which its code adds as positives and negatives.
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
    """Divide each map by its sum."""
    return maps / maps.sum(-1, keepdim=True).clamp(min=TINY)


def _symmetric_kl(p, q):
    """(KL(p||q) + KL(q||p)) / 2 of distributions in the last dimension."""
    return ((p - q) * (p.clamp(min=TINY).log() - q.clamp(min=TINY).log())).sum(-1) / 2


@per_image
def syngen_loss(maps, content, things):
    """Σ over pairs of a modifier m and its noun n of D(m, n) - mean over the prompt's other tokens u of (D(m, u) +
    D(n, u)) / 2, with D the symmetric Kullback-Leibler divergence of two maps, each divided by its sum.

    Other tokens are those of other things and of no thing. Rassin, Hirsch, Glickman, Ravfogel, Goldberg, Chechik,
    "Linguistic Binding in Diffusion Models", NeurIPS 2023 (arXiv:2306.08877): it does not smooth maps. Its code takes
    the largest divergence of a word's tokens; this takes that of their mean.
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
    """Divergence of T maps (T, P), cubed and divided by their sums: 0 if equal, 1 if disjoint."""
    p = maps**PEAKEDNESS
    p = p / p.sum(-1, keepdim=True).clamp(min=FOCUS_TINY)
    to_mean = (p * ((p + FOCUS_TINY).log() - (p.mean(0) + FOCUS_TINY).log())).sum(-1)
    return to_mean.mean() / math.log(len(p))


@per_image
def focus_loss(maps, content, things):
    """Half the sum of the Jensen-Shannon divergence of a thing's words' maps, mean over things, and of 1 minus that of
    the things' maps, each the mean of its words'.

    Bill, Simsar, Hofmann, FOCUS (arXiv:2510.02315): this smooths with T-SAM's kernel, FOCUS with σ = 1. Left out: its
    control of a flow's velocity; the update of the latent replaces it.
    """
    words = [of_words(smooth(maps), thing) for thing in things]
    near = [_jensen_shannon(own) for own in words if len(own) > 1]
    apart = [1 - _jensen_shannon(torch.stack([own.mean(0) for own in words]))] if len(words) > 1 else []
    return (sum(near) / max(len(near), 1) + sum(apart)) / 2 if near or apart else None


def anywhere_loss(maps, content, things):
    """A control: moves as far as the others, but to random places."""
    noise = torch.randn(maps.shape[1:], generator=torch.Generator().manual_seed(0))
    return (maps * noise.to(maps)).sum((1, 2, 3))


class Baseline(NamedTuple):
    """loss: of (maps, content, things). arguments: the pipelines', from its paper and code. needs: "nouns", "pairs"
    (nouns with modifiers) or "nothing"; stock draws prompts without them.
    """

    loss: Callable
    arguments: dict
    needs: str

    def binds(self, things):
        if self.needs == "pairs":
            return any(len(thing) > 1 for thing in things)
        return self.needs == "nothing" or bool(things)


# Half of the steps, with α = 20, and 20 more updates at steps 0, 10 and 20 of 50: Attend-and-Excite's numbers, also
# CONFORM's. Both let α fall with the root of a line from 1 to 0.5 over all steps, to 0.87 of itself when guidance ends;
# here it is constant. Attend-and-Excite stops refining at its thresholds (0.05, 0.5, 0.8); here it always makes 20
# updates. The reason is that the pipelines have no argument for either.
ATTEND = {"alpha": 20.0, "preset": "paper"}
BASELINES = {
    "attend_and_excite": Baseline(attend_and_excite_loss, ATTEND, "nouns"),
    "conform": Baseline(conform_loss, ATTEND, "nouns"),
    "syngen": Baseline(syngen_loss, {"alpha": 20.0, "preset": "paper", "refinement_steps": ()}, "pairs"),
    # one update a step, as in its paper; its λ scales a velocity, so that the paper has no α
    "focus": Baseline(focus_loss, {"relative_step": 0.05, "preset": "paper", "refinement_steps": ()}, "nouns"),
    "anywhere": Baseline(anywhere_loss, {"relative_step": 0.05, "preset": "paper"}, "nothing"),
}


def unbound(methods, prompts):
    """A sentence for each method that leaves prompts to stock."""
    for method in methods:
        name = method.partition(":")[0]
        left = [prompt.text for prompt in prompts if name in BASELINES and not BASELINES[name].binds(prompt.things)]
        if left:
            yield (
                f"{method} has nothing to bind in {len(left)} of {len(prompts)} prompts, which are drawn as by stock,"
                f" the first of them {left[0]!r}."
            )


def told(loss, prompts=None, **settings):
    """Turn a loss into the pipelines' `objective`. Things come from `prompts`, a `Prompt` per image; without them, from
    the template, if a prompt's words are one token each."""

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

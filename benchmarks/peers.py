"""The losses of three methods that are told which words belong together, to be compared with T-SAM on one engine.

Each is written from its paper's equations, for a batch, and is a pure function of the cross-attention maps; the update
of the latent (how often, how far) is the caller's, so that only the losses differ. What they need and T-SAM does not is
the positions of the words: `words` (B, K, 2), for each of K things the token of its modifier (its colour) and of its
noun. Shapes: B images, N tokens, H x W positions; `content` (B, N) bool marks the prompt's own tokens, `maps`
(B, N, H, W) are probabilities, not smoothed, averaged over heads and layers.
"""

import functools

import torch
import torch.nn.functional as F

from diffusers_tsam.shapes.scenes import words_of_solids
from diffusers_tsam.tsam import smooth


SHARPNESS = 100.0  # what the maps are multiplied by before the softmax over tokens; Attend-and-Excite's code
TEMPERATURE = 0.5  # CONFORM's


def pick(values, positions):
    """Rows of `values` (B, N, ...) at `positions` (B, ...): (B, ..., ...)."""
    batch = torch.arange(len(values), device=values.device)
    return values[batch.view(-1, *[1] * (positions.dim() - 1)), positions]


def compete(maps, content, sharpness=SHARPNESS):
    """Maps in which the prompt's tokens share each position among themselves, zero elsewhere, smoothed. (B, N, H, W).

    The shares are the softmax of `sharpness` x maps, as in Attend-and-Excite's and CONFORM's code, whose 100 suits maps
    of a few percent; None: each token's part of the sum, for models whose maps are near one already, on which that
    softmax has no gradient left.
    """
    own = content[..., None, None]
    if sharpness is None:
        shares = maps * own
        return smooth(shares / shares.sum(1, keepdim=True).clamp(min=1e-12))
    return smooth((sharpness * maps).masked_fill(~own, -torch.inf).softmax(1))


def attend_and_excite_loss(maps, content, words, sharpness=SHARPNESS):
    """max_k (1 - max_a A_ka) over the things' nouns k: the one that is least attended to. (B,).

    Chefer, Alaluf, Vinker, Wolf, Cohen-Or, "Attend-and-Excite", SIGGRAPH 2023 (arXiv:2301.13826).
    Left out: its thresholds, at which refinement stops. It uses the nouns only.
    """
    subjects = pick(compete(maps, content, sharpness), words[..., 1])  # (B, K, H, W)
    return (1 - subjects.flatten(2).amax(-1)).amax(-1)


def conform_loss(maps, content, words, sharpness=SHARPNESS):
    """InfoNCE: a word's map is to be nearer to its partner's than to the maps of the other things' words. (B,).

    Mean over the ordered pairs (j, p) of one thing's words of -log(e_jp / (e_jp + Σ_n e_jn)), e = exp(cosine / 0.5), n
    over the words of the other things.
    Meral, Simsar, Tombari, Yanardag, "CONFORM", CVPR 2024 (arXiv:2312.06059). Left out: the previous step's
    maps, which its code adds as further positives and negatives.
    """
    groups = words.shape[1]
    chosen = F.normalize(pick(compete(maps, content, sharpness), words.flatten(1)).flatten(2), dim=-1)
    logits = chosen @ chosen.mT / TEMPERATURE  # (B, 2K, 2K), the words of a thing beside each other
    thing = torch.arange(groups, device=maps.device).repeat_interleave(2)
    same = thing[:, None] == thing
    negative = logits.masked_fill(same, -torch.inf).logsumexp(-1)  # (B, 2K)
    partner = torch.arange(2 * groups, device=maps.device) ^ 1
    positive = pick(logits.mT, partner.expand(len(maps), -1)).diagonal(dim1=1, dim2=2)
    return (torch.logaddexp(positive, negative) - positive).mean(-1)


def syngen_loss(maps, content, words):
    """Σ over things of D(modifier, noun) - mean over the prompt's other words u of (D(modifier, u) + D(noun, u)) / 2.

    D(p, q) = (KL(p||q) + KL(q||p)) / 2 of two maps, each divided by its sum. (B,).
    Rassin, Hirsch, Glickman, Ravfogel, Goldberg, Chechik, "Linguistic Binding in Diffusion Models", NeurIPS 2023
    (arXiv:2306.08877): the maps are not smoothed. One modifier a noun.
    """
    spread = maps.flatten(2)
    spread = spread / spread.sum(-1, keepdim=True).clamp(min=1e-12)
    log = spread.clamp(min=1e-12).log()
    negentropy, cross = (spread * log).sum(-1), spread @ log.mT  # (B, N), (B, N, N)
    distance = (negentropy[:, :, None] + negentropy[:, None] - cross - cross.mT) / 2
    modifier, noun = words.unbind(-1)
    unrelated = content[:, None].repeat(1, words.shape[1], 1).scatter(-1, words, False)  # (B, K, N)
    near = pick(distance, noun).gather(-1, modifier[..., None]).squeeze(-1)
    far = (pick(distance, modifier) + pick(distance, noun)) / 2
    far = (far * unrelated).sum(-1) / unrelated.sum(-1).clamp(min=1)
    return (near - far).sum(-1)


PEERS = {
    "attend_and_excite": functools.partial(attend_and_excite_loss, sharpness=None),
    "attend_and_excite_100": attend_and_excite_loss,
    "conform": functools.partial(conform_loss, sharpness=None),
    "conform_100": conform_loss,
    "syngen": syngen_loss,
}


def told(loss):
    """The pipelines' `objective` of one of PEERS: it finds the words of a scene's caption by its template."""

    def objective(maps, text):
        words = []
        for tokens, content in zip(text.tokens, text.content):
            positions = content.nonzero().flatten().tolist()
            words.append([[positions[k] for k in pair] for pair in words_of_solids(" ".join(tokens))])
        return loss(maps, text.content, torch.tensor(words, device=maps.device))

    return objective

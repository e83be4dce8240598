"""The contrast objective with one constant changed, such as objective=benchmarks/variants.py:place_1, and what the
evaluation keeps of watched pictures by --keep benchmarks/variants.py:losses."""

import torch

from diffusers_tsam import tsam
from diffusers_tsam.evaluation.baselines import BASELINES, told


STEPS = (1, 5, 10)  # after how many of 25 steps losses are compared: one, a fifth, two fifths
PEERS = {"syngen": {}, "conform": {"sharpness": None}}  # told the words


def variant(related=tsam.RELATED_WEIGHT, place=tsam.PLACE_WEIGHT, exponent=2, relation=None):
    """related, place: λ and μ. exponent: a word's weight's. relation: R of T' (B, N, N) and content (B, N)."""

    def objective(maps, text):
        blurred, content = tsam.smooth(maps), text.content
        r = text.relation if relation is None else relation(text.attention, content)
        weight = tsam.weight_of(blurred, content) ** (exponent / 2)
        loss = tsam.relation_loss(r, tsam.cosine_similarity(blurred.flatten(2)), weight, related)
        return loss + place * (tsam._shares(weight) * tsam.spread_of(blurred)).sum(-1)

    return objective


def shares_of(attention, content):
    """A_ij, zero where j >= i."""
    return tsam.normalize_text_attention(attention, content, 1).tril(-1)


def corrected(attention, content):
    """R by the average-product correction: max(A_ij - a_i. a_.j / a_.., 0)."""
    shares = shares_of(attention, content)
    rows, columns = shares.sum(-1, keepdim=True), shares.sum(-2, keepdim=True)
    expected = rows * columns / rows.sum(-2, keepdim=True).clamp(min=tsam.TINY)
    return tsam._by_largest((shares - expected).clamp(min=0).tril(-1))


def of_pairs(maps, content, things):
    """`contrast` of the words of solids alone, with R told: 1 for a solid and its colour, else 0."""
    content, relation = torch.zeros_like(content), maps.new_zeros(*content.shape, content.shape[1])
    for image, own in enumerate(things):
        for (colour,), (solid,) in own:
            content[image, [colour, solid]], relation[image, solid, colour] = True, 1
    return tsam.contrast(maps, tsam.Syntax(None, None, content, None, relation))


VARIANTS = {"contrast": tsam.contrast}
VARIANTS |= {f"place_{name}": variant(place=weight) for name, weight in (("0", 0), ("half", 0.5), ("1", 1), ("2", 2))}
VARIANTS |= {f"related_{weight}": variant(related=weight) for weight in (0, 1)}
VARIANTS |= {f"exponent_{exponent}": variant(exponent=exponent) for exponent in (0, 1, 4)}
VARIANTS["apc"] = variant(relation=corrected)
VARIANTS["share"] = variant(relation=lambda attention, content: tsam._by_largest(shares_of(attention, content)))
globals().update(VARIANTS, told_pairs=told(of_pairs))  # so that an argument can name one


def losses(pipe, prompts, output):
    """What is kept of a picture that was watched for STEPS[-1] steps: {"starts": {loss: its values at STEPS}}."""
    if output.losses.shape[1] != STEPS[-1]:
        return [{}] * len(prompts)
    kept, many = [], len(STEPS)
    for prompt, seen in zip(prompts, output.attentions):
        maps = seen["maps"][[step - 1 for step in STEPS]]
        t, r = (seen[name].expand(many, -1, -1) for name in ("text_attention", "relation"))
        text = tsam.Syntax(t, t, torch.ones(many, t.shape[1], dtype=torch.bool), [seen["tokens"]] * many, r)
        known = {"relation": tsam.relation, "attainable": tsam.OBJECTIVES["attainable"], **VARIANTS}
        known |= {name: told(BASELINES[name].loss, [prompt] * many, **given) for name, given in PEERS.items()}
        kept.append({"starts": {name: [round(x, 4) for x in own(maps, text).tolist()] for name, own in known.items()}})
    return kept

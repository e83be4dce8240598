"""Layout: holds phrases of the prompt in boxes or masks. Ours, not the paper's.

Shapes: B images, R regions of the image that has most, N tokens, maps of H x W positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence


class Layout(NamedTuple):
    """Phrases of B images' prompts and the places for them.

    phrases: a list of strings per image. regions: a list per image, for each phrase a box (x0, y0, x1, y1) in fractions
    of the picture or a mask (h, w) of 0 to 1. tokens: (B, R, N), 1/number at each of a phrase's tokens, else 0.
    """

    phrases: list
    regions: list
    tokens: torch.Tensor


def layout_of(regions, text, words_of, num_images_per_prompt=1, device=None):
    """The `Layout` of `regions`, from `check_regions`, for the prompts of `text`, a `TextSelfAttention`.

    words_of(phrase): the texts of a phrase's tokens, to find among those of `text`. None without regions.
    ValueError for a phrase that the prompt lacks or has twice.
    """
    if regions is None:
        return None
    tokens = torch.zeros(len(regions), max(map(len, regions)), text.content.shape[1])
    for of_image, content, own, wanted in zip(tokens, text.content, text.tokens, regions):
        positions = content.nonzero().flatten().tolist()
        for of_phrase, phrase in zip(of_image, wanted):
            first, number = _find(phrase, words_of(phrase), own)
            of_phrase[positions[first : first + number]] = 1 / number
    tokens = tokens.to(device).repeat_interleave(num_images_per_prompt, 0)
    regions = [wanted for wanted in regions for _ in range(num_images_per_prompt)]
    return Layout([[*wanted] for wanted in regions], [[*wanted.values()] for wanted in regions], tokens)


def _find(phrase, words, own):
    """The place of a phrase's first token among the prompt's own, and their number."""
    found = [k for k in range(len(own) - len(words) + 1) if words and own[k : k + len(words)] == words]
    if not found:
        raise ValueError(
            f"`regions` has {phrase!r}, but the prompt's tokens are {' '.join(own)!r}. Name words of the prompt, in its"
            " order and number; what the text encoder cuts off is not there."
        )
    if len(found) > 1:
        raise ValueError(
            f"`regions` has {phrase!r}, which the prompt has {len(found)} times. Add a word before or after it that"
            " only one of them has, or reword the prompt."
        )
    return found[0], len(words)


def region_on(region, height, width):
    """The share of each position's area in a box or mask, (H, W), 0 to 1."""
    if torch.is_tensor(region):
        return F.adaptive_avg_pool2d(region[None], (height, width))[0]
    x0, y0, x1, y1 = region
    return _covered(y0, y1, height)[:, None] * _covered(x0, x1, width)


def regions_on(regions, height, width):
    """A list of boxes and masks per image -> (B, R, H, W), zero if an image has fewer."""
    grids = [[region_on(region, height, width) for region in own] for own in regions]
    return pad_sequence([torch.stack(own) if own else torch.empty(0, height, width) for own in grids], True)


def _covered(start, end, side):
    """How much of each of `side` positions lies between two fractions of the side, (side,)."""
    position = torch.arange(side)
    return ((position + 1).clamp(max=end * side) - position.clamp(min=start * side)).clamp(min=0)


def shares_inside(maps, regions, tokens):
    """The share of each phrase's attention inside its region: mean over its tokens of Σ_a A_a R_a / Σ_a A_a.

    maps (B, N, H, W), regions (B, R, H, W), tokens (B, R, N) of a `Layout` -> (B, R), 0 if an image has fewer.
    """
    maps = maps.flatten(2)
    maps = maps / maps.sum(-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return (regions.flatten(2) @ maps.mT * tokens).sum(-1)


def layout_loss(maps, regions, tokens):
    """The share of attention outside, mean over an image's phrases, (B,); 0 without any.

    The idea is from BoxDiff (Xie et al., ICCV 2023) and TokenCompose (Wang et al., CVPR 2024).
    """
    own = tokens.sum(-1) > 0
    outside = (1 - shares_inside(maps, regions, tokens)).where(own, 0)
    return outside.sum(-1) / own.sum(-1).clamp(min=1)


def check_regions(regions, batch_size):
    """Check `regions`: a dict {phrase: box or mask (h, w)} per prompt, or None without any.

    ValueError or TypeError naming the value, the limit and the remedy.
    """
    if regions is None:
        return None
    own = [regions] if isinstance(regions, dict) else regions
    if not isinstance(own, (list, tuple)) or not all(isinstance(wanted, (dict, type(None))) for wanted in own):
        raise TypeError(
            f"`regions` has to be a dict of phrases and where they are to be, or a list of such, one a prompt, but is"
            f' {regions!r}. Pass {{"a red cube": (0, 0, 0.5, 1)}}.'
        )
    if len(own) != batch_size:
        raise ValueError(
            f"`regions` is of {len(own)} prompts, but there are {batch_size}. Pass a list with a dict for each, or None"
            " for one without."
        )
    checked = [{phrase: _region(phrase, region) for phrase, region in (wanted or {}).items()} for wanted in own]
    return checked if any(checked) else None


def _region(phrase, region):
    """Check a region: returns a box as four floats, a mask as a float32 tensor (h, w)."""
    name = f"`regions[{phrase!r}]`"
    if not isinstance(phrase, str) or not phrase.strip():
        raise TypeError(f"`regions` has {phrase!r}, but a phrase has to be words of the prompt. Pass 'a red cube'.")
    try:
        values = torch.as_tensor(region).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} is {region!r}, which is neither a box (x0, y0, x1, y1) nor a mask tensor (h, w)."
        ) from error
    if values.shape == (4,):
        x0, y0, x1, y1 = box = tuple(values.tolist())
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(
                f"{name} is {box}, but a box is (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:"
                " fractions of the picture, from its upper left corner. Divide pixels by width and height."
            )
        return box
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but a box has four numbers and a mask is (h, w).")
    if not (values.amin() >= 0 and values.amax() <= 1):
        raise ValueError(
            f"{name} is a mask of {values.amin():g} to {values.amax():g}, but has to be of 0 to 1. Divide it by its"
            " largest value."
        )
    if not values.any():
        raise ValueError(f"{name} is a mask of zeros, which leaves no place. Leave the phrase out.")
    return values.float()

"""T-SAM: what is compared, and how the latent moves, from T to Eq. (15). Read it with the paper open.

"Eq. (n)" is Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236); "the release" is
the authors' code at https://github.com/t-sam-diffusion/code.

Shapes: B images, N tokens, maps of H x W positions, of a video (B, N, F, H, W) with F frames. `content` (B, N) marks
the prompt's own tokens: not <bos>, nothing from the first <eos> on, no padding. A prompt encoded in K windows of n
tokens has N = K·n; comparisons treat each window as a row of its own, (B·K, n). This module does not read maps from
networks: a function `maps_at(model_input)` returns them. (attention_processors.py has the means of Eq. (2) and (6).)
"""

import functools
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from .tsam_layout import layout_loss, regions_on, shares_inside


logger = logging.get_logger("diffusers.tsam")  # diffusers' child, so that its verbosity holds here

SMOOTHING_SIGMA = 0.5  # App. B.2
RELEASE_ROW_WEIGHT = 0.2  # the release, `_compute_self_attn_loss_cos`
RELATED_WEIGHT = 0.5  # λ of the contrast; 1 gained less on tuning prompts (benchmarks/RESULTS.md)
PLACE_WEIGHT = 0.25  # μ of the contrast; 1 gained less, too
TINY = torch.finfo(torch.float32).tiny  # keeps divisors above zero; added, because clamping costs a backward pass more
EPSILON = 1e-12  # the same for norms, whose gradient it bounds
ROUNDING = 1e-6  # of a mean over a map in float32
FP16_LOSS_SCALE = 2.0**12
FP16_LOSS_SCALE_BACKOFF = 2.0**-4
FP16_ATTEMPTS = 6  # the last scales by 2^-8


# ----------------------------------------------------------------------------------------------------------------------
# T: the syntax that the text encoder reads


class TextSelfAttention(NamedTuple):
    """A batch of prompts' self-attention.

    attention: T', the mean over all layers and heads, float32 (B, N, N). Eq. (2). For a prompt in windows of n tokens
    (B, N, n), because tokens attend only to their own window.
    content: which tokens are the prompt's own, bool (B, N).
    tokens: those tokens' texts, a list of strings per prompt.
    lengths: how many tokens each prompt has before its padding, (B,), or None if not needed.
    """

    attention: torch.Tensor
    content: torch.Tensor
    tokens: list
    lengths: torch.Tensor | None = None


def content_of(input_ids, bos_token_id, eos_token_id):
    """Which tokens are the prompt's own: ids (B, N) -> bool (B, N). The first <eos> ends it (CLIP pads with it)."""
    before_eos = (input_ids == eos_token_id).cumsum(-1) == 0
    return before_eos if bos_token_id is None else before_eos & (input_ids != bos_token_id)


def text_of(attention, input_ids, tokenizer):
    """The `TextSelfAttention` with T' (B, N, N) for the ids (B, N) from `tokenizer`."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} ends no prompt with <eos>, so that T-SAM cannot tell which tokens are its own."
            " Pass `tsam_steps=0`, or a `TextSelfAttention` of your own as `text_self_attention`."
        )
    content = content_of(input_ids, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return TextSelfAttention(
        attention, content, [texts_of(ids[own], tokenizer) for ids, own in zip(input_ids, content)]
    )


def texts_of(ids, tokenizer):
    """Each token's text."""
    return [tokenizer.decode(token) for token in ids]


def join_windows(text, windows):
    """Join the `TextSelfAttention` of B·K windows, K consecutive ones per prompt, into that of B prompts."""
    attention, content = (x.unflatten(0, (-1, windows)).flatten(1, 2) for x in text[:2])
    of_prompts = range(0, len(text.tokens), windows)
    return TextSelfAttention(attention, content, [sum(text.tokens[k : k + windows], []) for k in of_prompts])


def symmetrize(attention):
    """Make a bidirectional text encoder's T' causal: tril((T' + T'ᵀ)/2), (B, N, N). App. B.2."""
    return (attention + attention.mT).tril() / 2


def full_precision(device_type):
    """Turn the caller's `torch.autocast` off."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _normalize_rows(matrix):
    """Divide each row by its sum; a row of zeros stays zero."""
    total = matrix.sum(-1, keepdim=True)
    return matrix / torch.where(total > 0, total, 1)


def _pairs(content):
    """Which pairs of tokens are both content: (B, N) bool -> (B, N, N) bool."""
    return content.unsqueeze(-1) & content.unsqueeze(-2)


def normalize_text_attention(attention, content, gamma):
    """T: rows of text self-attention, sharpened by `gamma` and normalised over the content tokens up to their own.

    attention (B, N, N), content (B, N) -> float32 (B, N, N), zero outside. The power precedes the normalisation, as in
    the release: rows of Eq. (14) as printed would not sum to one, and S could not approach them, because its rows do.
    Eq. (3), (14).
    """
    attention = attention.float().where(_pairs(content).tril(), 0)
    return _normalize_rows(_by_largest(attention) ** gamma)  # which keeps the power from underflowing


# ----------------------------------------------------------------------------------------------------------------------
# S: what the cross-attention maps have in common


def smooth(maps):
    """Blur maps (B, N, H, W) by a 3x3 Gaussian kernel, reflecting at the border. App. B.2.

    The kernel is the release's, exp(-(x² + y²) / (2σ)²), of standard deviation √2·σ. It is separable: as two products
    its backward pass is deterministic on every device; that of torch's reflection padding is not.
    """
    down, along = (_blur(side, maps.dtype, maps.device) for side in maps.shape[-2:])
    return down @ maps @ along.mT


@functools.lru_cache(maxsize=16)  # a guided step builds nothing and moves nothing to the device
@torch.inference_mode(False)
def _blur(side, dtype, device):
    """(side, side): each row has a position's own share and its neighbours', and sums to one."""
    position, neighbour = torch.arange(side), math.exp(-1 / (2 * SMOOTHING_SIGMA) ** 2)
    matrix = torch.eye(side)
    for step in (-1, 1):
        beside = (position + step).abs()  # reflected at the first position, and at the last
        matrix[position, torch.where(beside < side, beside, 2 * (side - 1) - beside)] += neighbour
    return (matrix / (1 + 2 * neighbour)).to(device, dtype)


def cosine_similarity(maps):
    """C: cosine similarity between every two tokens' maps. maps (B, N, P) -> (B, N, N). Eq. (7)."""
    maps = maps / (torch.linalg.vector_norm(maps, dim=-1, keepdim=True) + EPSILON)
    return torch.bmm(maps, maps.mT)


def normalize_similarity(similarity, content):
    """S: rows of C over the content tokens up to their own, similarity, content -> (B, N, N), lower triangle. Eq. (7).

    Sums over k <= i, as in the release, so that rows sum to one as T's do. Eq. (7) as printed sums over all k.
    """
    return _normalize_rows(similarity.where(_pairs(content).tril(), 0))


def similarity_of(maps, content):
    """S of maps (B, N, H, W), smoothed. Eq. (7)."""
    return normalize_similarity(cosine_similarity(smooth(maps).flatten(2)), content)


# ----------------------------------------------------------------------------------------------------------------------
# Objectives: how far maps and syntax are apart


class Syntax(NamedTuple):
    """What an objective may know about the prompts of B images.

    target: T (B, N, N), sharpened and normalised. attention: T' (B, N, N). content: (B, N). tokens: the content tokens'
    texts, a list of strings per image. relation: R (B, N, N). Each window of a prompt is a row of its own, in order:
    (B·K, n, n).
    """

    target: torch.Tensor
    attention: torch.Tensor
    content: torch.Tensor
    tokens: list
    relation: torch.Tensor


def l1_loss(text_attention, similarity, content):
    """Σ_i (i/s) Σ_{j<=i} |T_ij - S_ij| over content tokens i = 1..s: T and S (B, N, N) -> (B,). Eq. (14)."""
    weight = content.cumsum(-1) / content.sum(-1, keepdim=True).clamp(min=1)
    return (weight * (text_attention - similarity).abs().sum(-1)).sum(-1)


def cosine_loss(text_attention, similarity, content):
    """Σ_i 0.2·(i - 1)·(1 - cos(T_i, S_i)) over columns j < i: T and S (B, N, N) -> (B,). The release's default."""
    columns = content.cumsum(-1) - 1
    rows = _normalize_rows(text_attention.tril(-1))  # lifts tiny rows above cosine_similarity's epsilon
    distance = 1 - F.cosine_similarity(rows, similarity.tril(-1), dim=-1)
    return (RELEASE_ROW_WEIGHT * columns * distance).where(content & (columns > 0), 0).sum(-1)


def l1(maps, text):
    """The paper's: T against S. Eq. (14)."""
    return l1_loss(text.target, similarity_of(maps, text.content), text.content)


def cosine(maps, text):
    """The release's default: the cosine distance of their rows without the diagonal."""
    return cosine_loss(text.target, similarity_of(maps, text.content), text.content)


def attainable_target(text_attention):
    """The nearest T that S can reach: (B, N, N) -> (B, N, N). Raises the diagonal to its row's largest entry, then
    divides rows by their sums.

    A map is most similar to itself, so S_ii is its row's largest in any picture, but a noun's row of T gives most to
    its colour. Eq. (14) against T itself therefore never vanishes, and goes on pushing what is already aligned.
    """
    largest = text_attention.amax(-1)
    return _normalize_rows(text_attention.tril(-1) + torch.diag_embed(largest))


def attainable(maps, text):
    """Eq. (14) against the T that S can reach. Ours, not the paper's."""
    return l1_loss(attainable_target(text.target), similarity_of(maps, text.content), text.content)


def lift_of(attention, content):
    """How much more a token gives to each earlier one than later tokens do on average, zero elsewhere.

    A_ij / mean_{k>j} A_kj for j < i, where A is T' with rows normalised over the content tokens up to their own: T'
    (B, N, N), content (B, N) -> (B, N, N). The mean removes the attention that a word gets from all words. Ours.
    """
    shares = _normalize_rows(attention.float().where(_pairs(content).tril(), 0))
    earlier = _pairs(content).tril(-1)
    shares = shares.where(earlier, 0)
    mean = shares.sum(-2, keepdim=True) / earlier.sum(-2, keepdim=True).clamp(min=1)
    return shares / torch.where(mean > 0, mean, 1)


def relation_of(attention, content):
    """R: rows of the lift divided by their largest, 0 to 1, zero where j >= i: T' (B, N, N) -> (B, N, N). Ours."""
    return _by_largest(lift_of(attention, content))


def _by_largest(matrix):
    """Divide each row by its largest; a row of zeros stays zero."""
    largest = matrix.amax(-1, keepdim=True)
    return matrix / torch.where(largest > 0, largest, 1)


def weight_of(maps, content):
    """How localised each word's map is, w = (1 - mean/max)², without a gradient: (B, N, H, W) -> (B, N), 0 to 1.

    A spread-out map, such as a function word's, does not say where its word is. 0 outside `content` (B, N), and for a
    word that is alone. Ours.
    """
    maps, words = maps.detach().flatten(2), content & (content.sum(-1, keepdim=True) > 1)
    localised = 1 - (maps.mean(-1) / maps.amax(-1)).nan_to_num(1.0)  # a map of zeros is flat
    return F.threshold(localised, ROUNDING, 0) ** 2 * words  # the blur's error on a flat map


def relation_loss(relation, similarity, weight, related_weight=RELATED_WEIGHT):
    """How much unrelated words overlap, plus λ times how far related ones are apart, each 0 to 1: (B,). Ours.

    Σ w_i w_j (1 - R_ij) C_ij / Σ w_i w_j (1 - R_ij) + λ Σ w_i w_j R_ij (1 - C_ij) / Σ w_i w_j R_ij over j < i;
    R, C (B, N, N), w (B, N).
    """
    both = (weight.unsqueeze(-1) * weight.unsqueeze(-2)).tril(-1)
    apart, together = _shares(torch.stack([1 - relation, relation]) * both, (-2, -1))
    together = related_weight * together
    return ((apart - together) * similarity + together).sum((-2, -1))


def _shares(weights, dim=-1):
    """Divide by the sum; zeros stay."""
    return weights / (weights.sum(dim, keepdim=True) + TINY)


def spread_of(maps):
    """Each map's variance over places, after subtracting its minimum: (B, N, H, W) -> (B, N). Ours.

    v = 6 (Var x + Var y), with places from 0 to 1 across the picture, so that a uniform map has 1. Of a video the mean
    over its frames, because things move.
    """
    height, width = maps.shape[-2:]
    maps = maps.reshape(*maps.shape[:2], -1, height * width)
    moments = (maps - maps.amin(-1, keepdim=True)) @ _places(height, width, maps.dtype, maps.device)
    total, moments = moments.split((1, 3), -1)
    square, middle = (moments / (total + TINY)).split((1, 2), -1)
    return (square - (middle * middle).sum(-1, keepdim=True)).mean((-2, -1))


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _places(height, width, dtype, device):
    """1, y² + x², y and x of each position's middle, from the picture's, whose sides are √6: (H·W, 4)."""
    y, x = (6**0.5 * ((torch.arange(side, dtype=torch.float64) + 0.5) / side - 0.5) for side in (height, width))
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([torch.ones_like(y), y**2 + x**2, y, x], -1).flatten(0, 1).to(device, dtype)


def relation(maps, text):
    """Unrelated words apart, related ones together: `contrast` without the place term, for words that mean several
    things ("two cats"). Ours."""
    blurred = smooth(maps)
    return relation_loss(text.relation, cosine_similarity(blurred.flatten(2)), weight_of(blurred, text.content))


def contrast(maps, text):
    """`relation`, plus one place per word: μ Σ w_i v_i / Σ w_i. Without it two blobs of one colour satisfy the other
    terms, because the colour's map has two as well. Assumes that a word means one thing. Ours."""
    blurred = smooth(maps)
    weight = weight_of(blurred, text.content)
    places = PLACE_WEIGHT * _shares(weight) * spread_of(blurred)
    return relation_loss(text.relation, cosine_similarity(blurred.flatten(2)), weight) + places.sum(-1)


OBJECTIVES = {
    "l1": l1,
    "cosine": cosine,
    "attainable": attainable,
    "relation": relation,
    "contrast": contrast,
}


# ----------------------------------------------------------------------------------------------------------------------
# The update


class LatentAlignment:
    """Moves the latents of B images down the gradient of an objective, and keeps what it saw. Eq. (15).

    text: `TextSelfAttention` of the prompts, each drawn `num_images_per_prompt` times. settings: `Settings`; read are
    alpha, relative_step, gamma, objective, region_weight and output_attentions (keep the maps before each step's first
    update). A user's objective gets a prompt's windows as rows, (B·K, n, H, W); an image's loss is their sum.
    device: the latents'. layout: a `Layout` of the images, adds its loss.

    num_tokens: N, the number of map columns needed. losses: one (B,) tensor per update, taken before it.
    """

    def __init__(self, text, settings, num_images_per_prompt=1, device=None, layout=None):
        attention, content = (x.to(device).repeat_interleave(num_images_per_prompt, 0) for x in text[:2])
        self.tokens = [tokens for tokens in text.tokens for _ in range(num_images_per_prompt)]
        self.windows = content.shape[1] // attention.shape[2]
        self.num_tokens = content.shape[1] if self.windows > 1 else self._last_content(content) + 1
        content, attention = content[:, : self.num_tokens], attention[:, : self.num_tokens, : self.num_tokens]
        content, attention = self.split(content), self.split(attention)
        target = normalize_text_attention(attention, content, float(settings.gamma))
        tokens, relation = self._tokens_of_windows(content), relation_of(attention, content)
        self.text = Syntax(target, attention, content, tokens, relation)
        self.layout, self.region_weight = layout, float(settings.region_weight)
        self.regions = None  # the layout's, on the maps' grid when it is known
        self.objective = None if settings.objective == "layout" else settings.objective
        self.objective = OBJECTIVES[self.objective] if isinstance(self.objective, str) else self.objective
        self.relative_step = None if settings.relative_step is None else float(settings.relative_step)
        self.alpha: float | torch.Tensor = 0.0 if settings.alpha is None else float(settings.alpha)
        self.keep_maps = settings.output_attentions
        self.losses, self.maps, self.finite = [], [], []
        self.loss_scale = torch.empty(0)  # (B,) from the first update on; 1 except in float16

    def possible(self):
        """Whether there is anything to align, else a warning: our objectives need two tokens, because one attends only
        to itself."""
        least = 2 if self.objective in OBJECTIVES.values() else 1
        possible = self.layout is not None or bool((self.text.content.sum(-1) >= least).any())
        if not possible:
            logger.warning("T-SAM changes nothing: it aligns words with each other, and no prompt has two.")
        return possible

    def split(self, values):
        """Windows as rows: (B, K·n, ...) -> (B·K, n, ...)."""
        return values if self.windows == 1 else values.unflatten(1, (self.windows, -1)).flatten(0, 1)

    @staticmethod
    def _last_content(content):
        """The last position with content in any prompt; the first if none has."""
        positions = content.any(0).nonzero().flatten().tolist()
        return positions[-1] if positions else 0

    def _tokens_of_windows(self, content):
        """The content tokens' texts, a list per window. content (B·K, n)."""
        counts, rows = content.sum(-1).unflatten(0, (-1, self.windows)).tolist(), []
        for tokens, of_image in zip(self.tokens, counts):
            start = 0
            for count in of_image:
                rows.append(tokens[start : start + count])
                start += count
        return rows

    def update(self, latents, input_scale, maps_at, iterations=1):
        """Move latents (B, ...) `iterations` times: z' = z - α ∇ loss. Eq. (15).

        The step is taken at the model's input, z_in = c·z, where c is the scheduler's `input_scale`, so that one alpha
        holds under every scheduler: z' = z - (α/c) ∇_{z_in} loss. `maps_at(model_input)` returns the averaged
        cross-attention maps A (B, N, H, W), float32, for an input of their dtype. Eq. (6). ValueError if B differs.
        """
        if len(latents) != len(self.tokens):
            raise ValueError(
                f"`latents` hold {len(latents)} images, but {len(self.tokens)} are to be aligned: the prompts,"
                " each `num_images_per_prompt` times. Pass as many."
            )
        start = latents
        for iteration in range(iterations):
            gradient, loss, maps = self.gradient(latents, input_scale, maps_at)
            if self.relative_step is not None:
                # An image's first update with a gradient sets its α for good; before, it is 0.
                first = input_scale * self.alpha_of_first(_precise(latents), gradient)
                kept = self.alpha if isinstance(self.alpha, torch.Tensor) else first
                self.alpha = kept.where(kept > 0, first)
            moved = (_precise(latents) - self.alpha / input_scale * gradient).to(latents.dtype)
            self.finite.append(_size(moved, torch.inf) < torch.inf)
            latents = moved.where(self.finite[-1], latents)
            self.losses.append(loss)
            if self.keep_maps and iteration == 0:
                self.maps.append(maps)
        self.before_and_after = start, latents
        return latents

    @property
    def moved(self):
        """Which images the last `update` moved, (B,)."""
        before, after = self.before_and_after
        return (before != after).flatten(1).any(1)

    def alpha_of_first(self, model_input, gradient):
        """α (B, 1, ...) that gives α ∇ loss `relative_step` times the norm of each model input, or 0. Not in the paper.

        Gradients are large or small because a model's maps are sharp or flat; only their direction counts. α stays
        constant from then on, so that updates shrink with the loss.
        """
        return (self.relative_step * _size(model_input) / _size(gradient)).nan_to_num(0, 0, 0)

    def gradient(self, latents, input_scale, maps_at):
        """∇_{z_in} loss in float32, the loss (B,), and with `keep_maps` its maps.

        In float16, each image's loss is scaled before the backward pass, because gradients can underflow. An image
        with an overflowing gradient is retried at a smaller loss scale; it is not moved if every attempt overflows.
        RuntimeError if no gradient comes back.
        """
        half = latents.dtype == torch.float16
        if not len(self.loss_scale):
            self.loss_scale = torch.full((len(latents),), FP16_LOSS_SCALE if half else 1.0, device=latents.device)
        for _ in range(FP16_ATTEMPTS if half else 1):
            with torch.enable_grad():
                model_input = (input_scale * _precise(latents)).requires_grad_()
                maps = maps_at(model_input.to(latents.dtype))
                seen = maps.detach().clone() if self.keep_maps else None  # because an objective may write into them
                loss = self.loss_of(maps)
                gradient: Any = None
                if loss.requires_grad:
                    scale = self.loss_scale.to(loss.dtype)
                    (gradient,) = torch.autograd.grad(loss, model_input, scale, allow_unused=True)
                if gradient is None:
                    raise RuntimeError(
                        "No gradient comes back to the latents. Quantised activations let none through: quantise the"
                        " weights alone, or pass `tsam_steps=0`. An `objective` of yours has to depend on the maps."
                    )
            if not half:
                break
            finite = gradient.isfinite().flatten(1).all(1)
            if finite.all():
                break
            self.loss_scale = self.loss_scale.where(finite, self.loss_scale * FP16_LOSS_SCALE_BACKOFF)
        else:
            logger.warning("A gradient is not finite in float16, and its image stays as it is. Try bfloat16.")
            self.loss_scale = self.loss_scale.where(finite, FP16_LOSS_SCALE)  # for the next step
        gradient = gradient / _like(gradient, self.loss_scale) if half else gradient
        return gradient, loss.detach().float(), seen

    def loss_of(self, maps):
        """The loss per image (B,) of maps (B, N, H, W): the objective's, shape checked, plus the layout's."""
        with full_precision(maps.device.type):
            layout = None if self.layout is None else self.region_weight * layout_loss(*self.laid_out(maps))
            if self.objective is None:  # the layout's alone
                return layout
            windows = self.split(maps)
            loss = self.objective(windows, self.text)
            if not torch.is_tensor(loss) or loss.shape != windows.shape[:1]:
                found = tuple(loss.shape) if torch.is_tensor(loss) else loss
                raise ValueError(
                    f"`objective` returned {found}, but has to return a loss per image, ({len(windows)},)."
                )
            loss = loss if self.windows == 1 else loss.unflatten(0, (-1, self.windows)).sum(1)
            return loss if layout is None else loss + layout

    def laid_out(self, maps):
        """Arguments of `shares_inside` and `layout_loss`, with the regions on the maps' grid."""
        if self.regions is None or self.regions.shape[-2:] != maps.shape[-2:]:
            self.regions = regions_on(self.layout.regions, *maps.shape[-2:]).to(maps)
        maps = maps.reshape(*maps.shape[:2], -1, *maps.shape[-2:]).sum(2)  # a region holds in all frames of a video
        return maps, self.regions, self.layout.tokens[..., : self.num_tokens].to(maps)

    def losses_per_image(self):
        """(B, updates) on the CPU."""
        losses = torch.stack(self.losses, 1).cpu() if self.losses else torch.empty(len(self.tokens), 0)
        if self.finite and not torch.stack(self.finite).all():  # here, once a call, because it waits for the device
            logger.warning("A gradient was not finite, and its image stayed as it was at that update.")
        return losses

    def attentions(self, steps):
        """What `output_attentions` returns, a dict per image, on the CPU; s content tokens, G guided steps:

        tokens (s strings), text_attention T and relation R (s, s), steps (the G different ones given), maps
        (G, s, H, W) and similarity S (G, s, s), both before the step's first update, or None if nothing was guided.
        T, R and S are zero between windows. A layout adds region_shares, {phrase: (G,)}, the same maps' shares of
        attention inside.
        """
        steps = list(dict.fromkeys(steps))
        content = self.text.content.cpu()
        of_image = content.unflatten(0, (-1, self.windows)).flatten(1)

        def matrix(windows, image):
            """(s, s) of (B·K, n, n)."""
            rows = slice(image * self.windows, (image + 1) * self.windows)
            return torch.block_diag(*(values[own][:, own] for values, own in zip(windows[rows], content[rows])))

        target, relation = self.text.target.cpu(), self.text.relation.cpu()
        similar = [similarity_of(self.split(maps), self.text.content).cpu() for maps in self.maps]
        shares = [] if self.layout is None else [shares_inside(*self.laid_out(maps)).cpu() for maps in self.maps]
        kept, result = [maps.cpu() for maps in self.maps], []
        for image, own in enumerate(of_image):
            seen = {
                "tokens": self.tokens[image],
                "text_attention": matrix(target, image),
                "relation": matrix(relation, image),
                "steps": steps,
                "maps": torch.stack([maps[image, own] for maps in kept]) if kept else None,
                "similarity": torch.stack([matrix(windows, image) for windows in similar]) if kept else None,
            }
            if self.layout is not None:
                phrases = enumerate(self.layout.phrases[image])
                seen["region_shares"] = {
                    name: torch.tensor([share[image, k] for share in shares]) for k, name in phrases
                }
            result.append(seen)
        return result


def _precise(latents):
    """Cast to float32; float64 stays."""
    return latents if latents.dtype == torch.float64 else latents.float()


def _size(latents, order=2):
    """Each image's norm, (B, 1, ...)."""
    return torch.linalg.vector_norm(latents, order, [*range(1, latents.dim())], keepdim=True)


def _like(latents, per_image):
    """(B,) -> (B, 1, ...), to meet latents (B, ...)."""
    return per_image.reshape(-1, *[1] * (latents.dim() - 1))

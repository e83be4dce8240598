"""T-SAM: what is compared, and how the latent moves, from T to Eq. (15); to be read with the paper open.

"Eq. (n)" is Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236); "the release" is
the authors' code at https://github.com/t-sam-diffusion/code.

Shapes: B images, N tokens, maps of H x W positions. `content` (B, N) marks the prompt's own tokens: not <bos>, nothing
from the first <eos> on, no padding. A prompt that was encoded in K windows of n tokens has N = K·n, and in all
that is compared each window is a row of its own, (B·K, n). How maps are read from a network is no business of this
module: they are what a function `maps_at(model_input)` returns. (The means of Eq. (2) and (6) are in
attention_processors.py.)
"""

import math
import sys
from contextlib import nullcontext
from itertools import islice
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch.nn.utils.rnn import pad_sequence


logger = logging.get_logger("diffusers.tsam")  # below its own, so that its verbosity holds here too

SMOOTHING_SIGMA = 0.5  # App. B.2
RELEASE_ROW_WEIGHT = 0.2  # the release, `_compute_self_attn_loss_cos`
FP16_LOSS_SCALE = 2.0**12
FP16_LOSS_SCALE_BACKOFF = 2.0**-4
FP16_ATTEMPTS = 6  # the last one scales by 2^-8


# ----------------------------------------------------------------------------------------------------------------------
# T: the syntax that the text encoder reads


class TextSelfAttention(NamedTuple):
    """A batch of prompts' self-attention.

    attention: T', the mean over all layers and heads, float32 (B, N, N). Eq. (2). Of a prompt in windows of n tokens,
    which attend to their own window only, (B, N, n).
    content: which tokens are the prompt's own, bool (B, N).
    tokens: those tokens' texts, a list of strings per prompt.
    lengths: how many tokens each prompt has before its padding, (B,); None where nobody has to know.
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
    """The `TextSelfAttention` of T' (B, N, N) of the ids (B, N) that `tokenizer` made."""
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
    """The `TextSelfAttention` of B prompts from that of their B·K windows, the K of a prompt behind each other."""
    attention, content = (x.unflatten(0, (-1, windows)).flatten(1, 2) for x in text[:2])
    of_prompts = range(0, len(text.tokens), windows)
    return TextSelfAttention(attention, content, [sum(text.tokens[k : k + windows], []) for k in of_prompts])


def symmetrize(attention):
    """T' of a bidirectional text encoder as if it were causal: tril((T' + T'ᵀ)/2), (B, N, N). App. B.2."""
    return (attention + attention.mT).tril() / 2


def _normalize_rows(matrix):
    """Each row divided by its sum; a row of zeros stays one."""
    total = matrix.sum(-1, keepdim=True)
    return matrix / torch.where(total > 0, total, 1)


def _pairs(content):
    """Which pairs of tokens are both content: (B, N) bool -> (B, N, N) bool."""
    return content.unsqueeze(-1) & content.unsqueeze(-2)


def normalize_text_attention(attention, content, gamma):
    """T: rows of text self-attention, sharpened by `gamma` and normalised over the content tokens up to their own.

    attention (B, N, N), content (B, N) -> float32 (B, N, N), zero outside. The power comes before the normalisation, as
    in the release: rows of Eq. (14) as printed would not sum to one, and S, whose rows do, could not approach them.
    Eq. (3), (14).
    """
    attention = attention.float().where(_pairs(content).tril(), 0)
    largest = attention.amax(-1, keepdim=True)  # dividing by it changes nothing but keeps the power from underflowing
    return _normalize_rows((attention / torch.where(largest > 0, largest, 1)) ** gamma)


# ----------------------------------------------------------------------------------------------------------------------
# S: what the cross-attention maps have in common


def smooth(maps):
    """Blur maps (B, N, H, W) by a 3x3 Gaussian kernel, reflecting at the border. App. B.2.

    The kernel is the released one, exp(-(x² + y²) / (2σ)²), whose standard deviation is √2·σ. It is separable; as two
    products its backward pass is deterministic on every device, which torch's reflection padding is not.
    """
    down, along = (_blur(side, maps) for side in maps.shape[-2:])
    return down @ maps @ along.mT


def _blur(side, like):
    """(side, side), rows that sum to one: each position's own share and its two neighbours'."""
    position, neighbour = torch.arange(side), math.exp(-1 / (2 * SMOOTHING_SIGMA) ** 2)
    matrix = torch.eye(side)
    for step in (-1, 1):
        beside = (position + step).abs()  # reflected at the first position, and at the last
        matrix[position, torch.where(beside < side, beside, 2 * (side - 1) - beside)] += neighbour
    return (matrix / (1 + 2 * neighbour)).to(like)


def cosine_similarity(maps):
    """C: cosine similarity between every two tokens' maps. maps (B, N, P) -> (B, N, N). Eq. (7)."""
    maps = F.normalize(maps, dim=-1)
    return maps @ maps.mT


def normalize_similarity(similarity, content, full=False):
    """S: rows of C over the content tokens up to their own, k <= i, as in the release.

    similarity, content -> (B, N, N), lower triangle. `full` divides by the sum over all content tokens, as Eq. (7) is
    printed, so that rows do not sum to one.
    """
    pairs = _pairs(content)
    return _normalize_rows(similarity.where(pairs if full else pairs.tril(), 0)).tril()


def similarity_of(maps, content, full=False):
    """S of maps (B, N, H, W), smoothed. Eq. (7)."""
    return normalize_similarity(cosine_similarity(smooth(maps).flatten(2)), content, full)


# ----------------------------------------------------------------------------------------------------------------------
# Objectives: how far maps and syntax are apart


class Syntax(NamedTuple):
    """What an objective may know of the prompts of B images.

    target: T (B, N, N), sharpened and normalised. attention: T' (B, N, N). content: (B, N). tokens: the content tokens'
    texts, a list of strings per image. A prompt's windows are as many rows, (B·K, n, n), the first to the last.
    """

    target: torch.Tensor
    attention: torch.Tensor
    content: torch.Tensor
    tokens: list


def l1_loss(text_attention, similarity, content):
    """Σ_i (i/s) Σ_{j<=i} |T_ij - S_ij| over content tokens i = 1..s: T and S (B, N, N) -> (B,). Eq. (14)."""
    weight = content.cumsum(-1) / content.sum(-1, keepdim=True).clamp(min=1)
    return (weight * (text_attention - similarity).abs().sum(-1)).sum(-1)


def cosine_loss(text_attention, similarity, content):
    """Σ_i 0.2·(i - 1)·(1 - cos(T_i, S_i)) over columns j < i: T and S (B, N, N) -> (B,). The release's default."""
    columns = content.cumsum(-1) - 1
    rows = _normalize_rows(text_attention.tril(-1))  # a tiny row must not fall under cosine_similarity's epsilon
    distance = 1 - F.cosine_similarity(rows, similarity.tril(-1), dim=-1)
    return (RELEASE_ROW_WEIGHT * columns * distance).where(content & (columns > 0), 0).sum(-1)


def l1(maps, text):
    """The paper's: T against S. Eq. (14)."""
    return l1_loss(text.target, similarity_of(maps, text.content), text.content)


def l1_full(maps, text):
    """The same with S normalised over all tokens, as Eq. (7) is printed."""
    return l1_loss(text.target, similarity_of(maps, text.content, full=True), text.content)


def cosine(maps, text):
    """The release's default: the cosine distance of their rows, the diagonal apart."""
    return cosine_loss(text.target, similarity_of(maps, text.content), text.content)


def attainable_target(text_attention):
    """The nearest T that S can take: (B, N, N) -> (B, N, N), the diagonal raised to its row's largest entry, rows again
    divided by their sums.

    A map is most like itself, so S_ii is the largest of its row whatever the picture, but a noun's row of T gives most
    to its colour. Against T as it is, Eq. (14) therefore never vanishes and goes on pushing what is aligned.
    """
    largest = text_attention.amax(-1)
    return _normalize_rows(text_attention.tril(-1) + torch.diag_embed(largest))


def attainable(maps, text):
    """Eq. (14) against the T that S can take. Ours, not the paper's."""
    return l1_loss(attainable_target(text.target), similarity_of(maps, text.content), text.content)


OBJECTIVES = {"l1": l1, "l1_full": l1_full, "cosine": cosine, "attainable": attainable}


# ----------------------------------------------------------------------------------------------------------------------
# Layout: where phrases are to be


class Layout(NamedTuple):
    """Phrases of the prompts of B images, R of the image that has most, and where they are to be. Not the paper's.

    phrases: a list of strings per image. regions: for each a box (x0, y0, x1, y1) in fractions of the picture or a mask
    (h, w) of 0 to 1, a list per image. tokens: (B, R, N), which are each phrase's, divided by their number.
    """

    phrases: list
    regions: list
    tokens: torch.Tensor


def layout_of(regions, text, words_of, num_images_per_prompt=1, device=None):
    """The `Layout` of `regions`, which `check_regions` returned, for the prompts of `text`, a `TextSelfAttention`.

    words_of(phrase): the texts of a phrase's tokens, which are looked for among those of `text`. None without regions.
    ValueError for a phrase that the prompt does not have, or has twice.
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
    """Where a phrase's tokens begin among the prompt's own, and how many they are."""
    found = [k for k in range(len(own) - len(words) + 1) if words and own[k : k + len(words)] == words]
    if not found:
        raise ValueError(
            f"`regions` has {phrase!r}, but the prompt's tokens are {' '.join(own)!r}. Name words that stand in it, in"
            " the prompt's order and number; what the text encoder cuts off is not there."
        )
    if len(found) > 1:
        raise ValueError(
            f"`regions` has {phrase!r}, which the prompt has {len(found)} times. Take a word before or behind it along"
            " that only one of them has, or word the prompt otherwise."
        )
    return found[0], len(words)


def region_on(region, height, width):
    """How much of each position lies in a box or mask, (H, W), 0 to 1: by area."""
    if torch.is_tensor(region):
        return F.adaptive_avg_pool2d(region[None], (height, width))[0]
    x0, y0, x1, y1 = region
    return _covered(y0, y1, height)[:, None] * _covered(x0, x1, width)


def regions_on(regions, height, width):
    """A list of boxes and masks per image -> (B, R, H, W), zero where an image has fewer."""
    grids = [[region_on(region, height, width) for region in own] for own in regions]
    return pad_sequence([torch.stack(own) if own else torch.empty(0, height, width) for own in grids], True)


def _covered(start, end, side):
    """How much of each of `side` positions lies between two fractions of the side, (side,)."""
    position = torch.arange(side)
    return ((position + 1).clamp(max=end * side) - position.clamp(min=start * side)).clamp(min=0)


def shares_inside(maps, regions, tokens):
    """The share of each phrase's attention inside its region: mean over its tokens of Σ_a A_a R_a / Σ_a A_a.

    maps (B, N, H, W), regions (B, R, H, W), tokens (B, R, N) as a `Layout`'s -> (B, R), 0 where an image has fewer.
    """
    maps = maps.flatten(2)
    maps = maps / maps.sum(-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return (regions.flatten(2) @ maps.mT * tokens).sum(-1)


def layout_loss(maps, regions, tokens):
    """The share of attention outside, mean over an image's phrases, (B,); 0 without any.

    The idea of BoxDiff (Xie et al., ICCV 2023) and TokenCompose (Wang et al., CVPR 2024).
    """
    own = tokens.sum(-1) > 0
    outside = (1 - shares_inside(maps, regions, tokens)).where(own, 0)
    return outside.sum(-1) / own.sum(-1).clamp(min=1)


# ----------------------------------------------------------------------------------------------------------------------
# The update


class LatentAlignment:
    """Moves the latents of B images down the gradient of an objective, and keeps what it saw. Eq. (15).

    text: `TextSelfAttention` of the prompts, each drawn `num_images_per_prompt` times. alpha, gamma: α, γ. objective:
    one of OBJECTIVES, or a function of (maps (B, N, H, W), `Syntax`) that returns a loss per image, (B,); of prompts in
    windows it gets these as rows, (B·K, n, H, W), and an image's loss is their sum. None: the layout's loss alone.
    relative_step: instead of alpha, the share of its norm by which an image's first update moves the model's input.

    keep_maps: keep the `maps` (B, N, H, W) before each step's first update. device: the latents'. layout: a `Layout` of
    the images, whose loss is added `region_weight` times.

    num_tokens: N, the columns of maps that are needed. losses: one (B,) tensor an update, each taken before it. moved:
    (B,), which images the last `update` has moved.
    """

    def __init__(
        self,
        text,
        alpha,
        gamma,
        objective="l1",
        relative_step=None,
        keep_maps=False,
        num_images_per_prompt=1,
        device=None,
        layout=None,
        region_weight=10.0,
    ):
        attention, content = (x.to(device).repeat_interleave(num_images_per_prompt, 0) for x in text[:2])
        self.tokens = [tokens for tokens in text.tokens for _ in range(num_images_per_prompt)]
        self.windows = content.shape[1] // attention.shape[2]
        self.num_tokens = content.shape[1]
        if self.windows == 1:
            self.num_tokens = max([1 + token for token in content.any(0).nonzero().flatten().tolist()], default=1)
        content, attention = content[:, : self.num_tokens], attention[:, : self.num_tokens, : self.num_tokens]
        content, attention = self.split(content), self.split(attention)
        target, words = normalize_text_attention(attention, content, float(gamma)), map(iter, self.tokens)
        counts = content.sum(-1).unflatten(0, (-1, self.windows)).tolist()
        tokens = [list(islice(own, count)) for own, of_image in zip(words, counts) for count in of_image]
        self.text = Syntax(target, attention, content, tokens)
        self.layout, self.region_weight, self.regions = layout, float(region_weight), None  # these on the maps' grid
        self.objective = OBJECTIVES[objective] if isinstance(objective, str) else objective
        self.alpha: float | torch.Tensor = float(alpha)
        self.keep_maps = keep_maps
        self.relative_step = None if relative_step is None else float(relative_step)
        self.losses, self.maps, self.moved, self.loss_scale, self.lost = [], [], None, None, None
        if not self.possible:
            logger.warning("T-SAM changes nothing: it aligns words with each other, and no prompt has two.")

    @property
    def possible(self):
        """Whether there is anything to align: one token alone has only itself to attend to, in objectives of ours."""
        least = 2 if self.objective in OBJECTIVES.values() else 1
        return self.layout is not None or bool((self.text.content.sum(-1) >= least).any())

    def split(self, values):
        """Windows as rows: (B, K·n, ...) -> (B·K, n, ...)."""
        return values.unflatten(1, (self.windows, -1)).flatten(0, 1)

    def update(self, latents, input_scale, maps_at, iterations=1):
        """Move latents (B, ...) `iterations` times: z' = z - α ∇ loss. Eq. (15).

        The step is taken at the model's input, z_in = c·z with c the `input_scale` that the scheduler gives it, so that
        one alpha holds under every scheduler: z' = z - (α/c) ∇_{z_in} loss. `maps_at(model_input)` gives the averaged
        cross-attention maps A (B, N, H, W), float32, of a model input in the latents' dtype. Eq. (6).
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
                # An image's α is set at its first update that has a gradient, until which it is 0, and then kept.
                first = self.alpha_of_first(input_scale * _precise(latents), gradient)
                kept = self.alpha if isinstance(self.alpha, torch.Tensor) else first
                self.alpha = kept.where(kept > 0, first)
            moved = (_precise(latents) - self.alpha / input_scale * gradient).to(latents.dtype)
            latents = moved.where(_like(moved, moved.isfinite().flatten(1).all(1)), latents)
            self.losses.append(loss)
            if self.keep_maps and iteration == 0:
                self.maps.append(maps)
        self.moved = (latents != start).flatten(1).any(1)
        return latents

    def alpha_of_first(self, model_input, gradient):
        """α (B, 1, ...) of which α ∇ loss has `relative_step` of the norm of each model input. Not in the paper.

        A model's maps may be sharp or flat, which makes its gradients large or small; their direction is what counts. α
        is constant from then on, so that updates become smaller as the loss does.
        """
        norm, slope = (x.flatten(1).norm(dim=1) for x in (model_input, gradient))
        return _like(gradient, torch.where(slope > 0, self.relative_step * norm / slope, 0))

    def gradient(self, latents, input_scale, maps_at):
        """∇_{z_in} loss in float32, the loss (B,), and with `keep_maps` the maps that it is of.

        Half-precision gradients can underflow, so the loss of each image is scaled before the backward pass; an image
        whose gradient overflows is tried again with less, and stays where it is if nothing helps. RuntimeError where no
        gradient comes back.
        """
        half = latents.dtype == torch.float16
        if self.loss_scale is None:
            self.loss_scale = torch.full((len(latents),), FP16_LOSS_SCALE if half else 1.0, device=latents.device)
        for _ in range(FP16_ATTEMPTS if half else 1):
            with torch.enable_grad():
                model_input = (input_scale * _precise(latents)).requires_grad_()
                maps = maps_at(model_input.to(latents.dtype))
                seen = maps.detach().clone() if self.keep_maps else None  # a user's objective may write into them
                loss = self.loss_of(maps)
                gradient = None
                if loss.requires_grad:
                    scaled = (loss * self.loss_scale).sum()
                    (gradient,) = torch.autograd.grad(scaled, model_input, allow_unused=True)
                if gradient is None:
                    raise RuntimeError(
                        "No gradient comes back to the latents. Quantised activations let none through: quantise the"
                        " weights alone, or pass `tsam_steps=0`. An `objective` of yours has to depend on the maps."
                    )
            finite = gradient.isfinite().flatten(1).all(1)
            if not half or finite.all():
                break
            self.loss_scale = self.loss_scale.where(finite, self.loss_scale * FP16_LOSS_SCALE_BACKOFF)
        else:
            logger.warning("A gradient is not finite in float16, and its image stays as it is. Try bfloat16.")
            self.loss_scale = self.loss_scale.where(finite, FP16_LOSS_SCALE)  # the next step is another
        self.lost = ~finite if self.lost is None else self.lost | ~finite
        gradient = (gradient / _like(gradient, self.loss_scale)).where(_like(gradient, finite), 0)
        return gradient, loss.detach().float(), seen

    def loss_of(self, maps):
        """The loss per image (B,) of maps (B, N, H, W): the objective's, whose shape is checked, and the layout's."""
        with full_precision(maps.device.type):
            layout = 0 if self.layout is None else self.region_weight * layout_loss(*self.laid_out(maps))
            if self.objective is None:
                return layout
            windows = self.split(maps)
            loss = self.objective(windows, self.text)
            if not torch.is_tensor(loss) or loss.shape != windows.shape[:1]:
                found = tuple(loss.shape) if torch.is_tensor(loss) else loss
                raise ValueError(
                    f"`objective` returned {found}, but has to return a loss per image, ({len(windows)},)."
                )
            return loss.unflatten(0, (-1, self.windows)).sum(1) + layout

    def laid_out(self, maps):
        """What `shares_inside` and `layout_loss` take; the regions on the grid that the maps turn out to have."""
        if self.regions is None or self.regions.shape[-2:] != maps.shape[-2:]:
            self.regions = regions_on(self.layout.regions, *maps.shape[-2:]).to(maps)
        return maps, self.regions, self.layout.tokens[..., : self.num_tokens].to(maps)

    def losses_per_image(self):
        """(B, updates) on the CPU."""
        losses = torch.stack(self.losses, 1).cpu() if self.losses else torch.empty(len(self.tokens), 0)
        if self.lost is not None and self.lost.any():  # asked here, once a call, since it waits for the device
            logger.warning("A gradient was not finite, and its image stayed as it was at that update.")
        return losses

    def attentions(self, steps):
        """What `output_attentions` returns, a dict per image, on the CPU; s content tokens, G guided steps:

        tokens (s strings), text_attention T (s, s), steps (G positions in the scheduler's timesteps, the first of
        `steps`), maps (G, s, H, W) and similarity S (G, s, s), both before the step's first update, and None where
        nothing was guided. T and S are zero between windows. With a layout also region_shares, {phrase: (G,)}, the
        shares of attention inside, of the same maps.
        """
        content = self.text.content.cpu()
        of_image = content.unflatten(0, (-1, self.windows)).flatten(1)

        def matrix(windows, image):
            """(s, s) of (B·K, n, n)."""
            rows = slice(image * self.windows, (image + 1) * self.windows)
            return torch.block_diag(*(values[own][:, own] for values, own in zip(windows[rows], content[rows])))

        target = self.text.target.cpu()
        similar = [
            similarity_of(self.split(maps), self.text.content, self.objective is l1_full).cpu() for maps in self.maps
        ]
        shares = [] if self.layout is None else [shares_inside(*self.laid_out(maps)).cpu() for maps in self.maps]
        kept, result = [maps.cpu() for maps in self.maps], []
        for image, own in enumerate(of_image):
            seen = {
                "tokens": self.tokens[image],
                "text_attention": matrix(target, image),
                "steps": steps[: len(kept)],
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
    """In float32, or float64 if they are."""
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def _like(latents, per_image):
    """(B,) -> (B, 1, ...), to meet latents (B, ...)."""
    return per_image.reshape(-1, *[1] * (latents.dim() - 1))


def full_precision(device_type):
    """Outside of the caller's `torch.autocast`."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


# ----------------------------------------------------------------------------------------------------------------------
# When: schedules


class Schedule(NamedTuple):
    """Where the updates are, in percent of the denoising steps: how many of the first are `guided`, at which of them
    the latent is refined, and by how many more updates each."""

    guided: int
    refined: tuple
    iterations: int


SCHEDULES = {
    "paper": Schedule(50, (0, 20, 40), 40),  # of 50 steps 25, and 20 more updates at 0, 10 and 20; App. B.2
    # ours, of 50 steps 10, and 10 more at 0, 4 and 8: a picture stays below 1.5 times the plain one's operations
    "fast": Schedule(20, (0, 8, 16), 20),
    "light": Schedule(20, (), 0),  # ours, for larger updates: 1.1 times the plain one's operations
}


def updates_per_timestep(scheduler, num_inference_steps, tsam_steps, refinement_steps, refinement_iterations):
    """How many updates the latent gets before each entry of the scheduler's timesteps.

    A denoising step may take several entries: second-order schedulers evaluate the model twice, PNDM four times in its
    Runge-Kutta steps or, without these, twice in its first. Only a step's first evaluation is guided, since the later
    ones start again from the sample that the scheduler kept.
    """
    number, runge_kutta = len(scheduler.timesteps), getattr(scheduler, "prk_timesteps", None)
    if runge_kutta is not None and len(runge_kutta):
        first = len(runge_kutta)
        steps = [i // 4 if i < first else first // 4 + i - first for i in range(number)]
    else:
        warmup = max(number - num_inference_steps * scheduler.order, 0)
        steps = [max(i - warmup, 0) // scheduler.order for i in range(number)]
    return [
        0
        if step >= tsam_steps or (i > 0 and step == steps[i - 1])
        else 1 + refinement_iterations * (step in refinement_steps)
        for i, step in enumerate(steps)
    ]


def input_scale(scheduler, t):
    """c, by which the scheduler scales the model's input at timestep t; 1 where it does not."""
    one = torch.ones(())
    return scheduler.scale_model_input(one, t) if hasattr(scheduler, "scale_model_input") else one


# ----------------------------------------------------------------------------------------------------------------------
# The arguments of a call


def check_integer(name, value, limit, remedy):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` has to be an integer but is {value!r}. {remedy}")
    if value < limit:
        raise ValueError(f"`{name}` is {value}, but has to be at least {limit}. {remedy}")


def _check_number(name, value, remedy):
    if torch.is_tensor(value) and value.dim() == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` has to be a number but is {value!r}. {remedy}")
    if not -sys.float_info.max <= value <= sys.float_info.max:  # type: ignore[operator] # too large an integer, too
        raise ValueError(f"`{name}` is {value}, but has to be finite. {remedy}")


def check_alignment(alpha, gamma, objective, relative_step=None, regions=None, region_weight=10.0):
    """Check the arguments of `LatentAlignment`; regions as `check_regions` returned them."""
    if relative_step is not None:
        remedy = "Pass a share of the input's norm, 0.05 for instance, or None to set `alpha`."
        _check_number("relative_step", relative_step, remedy)
        if not 0 <= relative_step <= 1:
            raise ValueError(f"`relative_step` is {relative_step}, but has to be between 0 and 1. {remedy}")
    _check_number("alpha", alpha, "Pass the size of an update, 10.0 for instance.")
    if alpha < 0:
        raise ValueError(f"`alpha` is {alpha}, but has to be at least 0: below, the loss would rise. Pass 10.0.")
    _check_number("gamma", gamma, "Pass the exponent of T, 2.0 for instance.")
    if gamma <= 0:
        raise ValueError(f"`gamma` is {gamma}, but has to be above 0: at 0, T says nothing. Pass 2.0.")
    _check_number("region_weight", region_weight, "Pass the weight of the layout's loss, 10.0 for instance.")
    if region_weight < 0:
        raise ValueError(f"`region_weight` is {region_weight}, but has to be at least 0. Pass 10.0.")
    if objective is None and regions:
        return
    if not callable(objective) and not (isinstance(objective, str) and objective in OBJECTIVES):
        names = ", ".join(map(repr, OBJECTIVES))
        known = f"one of {names}, or a function (maps, text)"
        raise ValueError(f"`objective` is {objective!r}, but has to be {known}; or None with `regions`.")


def check_regions(regions, batch_size):
    """`regions` as a dict {phrase: box or mask (h, w)} per prompt; None where there is none.

    Masks may be PIL images, arrays or tensors. ValueError or TypeError naming the value, the limit and the remedy.
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
    """A region, checked: a box as four floats, a mask as a float32 tensor (h, w)."""
    name = f"`regions[{phrase!r}]`"
    if not isinstance(phrase, str) or not phrase.strip():
        raise TypeError(f"`regions` has {phrase!r}, but a phrase has to be words of the prompt. Pass 'a red cube'.")
    try:
        if hasattr(region, "convert"):  # PIL's
            region = np.asarray(region.convert("L")) / 255
        values = torch.as_tensor(region).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is {region!r}, which is neither a box (x0, y0, x1, y1) nor a mask (h, w).") from error
    if values.shape == (4,):
        x0, y0, x1, y1 = box = tuple(values.tolist())
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            raise ValueError(
                f"{name} is {box}, but a box is (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1:"
                " fractions of the picture, from its upper left corner. Divide pixels by width and height."
            )
        return box
    if values.dim() == 3 and len(values) == 1:
        values = values[0]
    if values.dim() != 2 or values.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(values.shape)}, but a box has four numbers and a mask is (h, w).")
    if not (values.amin() >= 0 and values.amax() <= 1):
        raise ValueError(
            f"{name} is a mask of {values.amin():g} to {values.amax():g}, but has to be of 0 to 1. Divide it by its"
            " largest value."
        )
    if not values.any():
        raise ValueError(f"{name} is a mask of zeros, so that there is nowhere to be. Leave the phrase out.")
    return values.float()


def resolve_schedule(
    num_steps, schedule, tsam_steps=None, refinement_steps=None, refinement_iterations=None, schedules=SCHEDULES
):
    """tsam_steps, refinement_steps (a set) and refinement_iterations of `num_steps` denoising steps: what is given,
    checked, and where it is None what `schedule` says.

    Raises ValueError or TypeError naming the value, the limit and the remedy.
    """
    if not isinstance(schedule, str) or schedule not in schedules:
        raise ValueError(f"`schedule` is {schedule!r}, but has to be one of {', '.join(map(repr, schedules))}.")
    percent = schedules[schedule]
    check_integer("num_inference_steps", num_steps, 1, "50 is usual.")
    if tsam_steps is None:
        tsam_steps = max(num_steps * percent.guided // 100, 1)
    remedy = f"Pass 0 to {num_steps} (0 is off), or None for {percent.guided} % of the steps."
    check_integer("tsam_steps", tsam_steps, 0, remedy)
    if tsam_steps > num_steps:
        raise ValueError(f"`tsam_steps` is {tsam_steps}, but there are only {num_steps} denoising steps. {remedy}")
    if refinement_iterations is None:
        refinement_iterations = num_steps * percent.iterations // 100
    check_integer("refinement_iterations", refinement_iterations, 0, "Pass 0 for no refinement.")
    if refinement_steps is None:
        defaults = {num_steps * refined // 100 for refined in percent.refined}
        return tsam_steps, {step for step in defaults if step < tsam_steps}, refinement_iterations
    if isinstance(refinement_steps, (str, bytes)) or not hasattr(refinement_steps, "__iter__"):
        raise TypeError(f"`refinement_steps` has to be a sequence but is {refinement_steps!r}. Pass (0, 10).")
    refinement_steps = list(refinement_steps)
    for step in refinement_steps:
        check_integer("refinement_steps", step, 0, "Steps count from 0; pass () for no refinement.")
        if step >= tsam_steps:
            raise ValueError(
                f"`refinement_steps` has {step}, but only steps 0 to {tsam_steps - 1} are guided: `tsam_steps` is"
                f" {tsam_steps}. Leave it out, or raise `tsam_steps`."
            )
    return tsam_steps, set(refinement_steps), refinement_iterations


def check_text_self_attention(text, prompt, batch_size, num_tokens, window=None):
    """Check the caller's `TextSelfAttention` for `batch_size` prompts of `num_tokens` tokens, which may be windows of
    `window` tokens each; text needs none."""
    if text is None:
        if prompt is None:
            raise ValueError(
                "T cannot be known from `prompt_embeds` alone. Pass `text_self_attention=pipe."
                "get_text_self_attention(prompt)` with them, or `tsam_steps=0`."
            )
        return
    if not {"attention", "content", "tokens"} <= set(getattr(text, "_fields", ())):
        raise TypeError(f"`text_self_attention` has to be what `get_text_self_attention` returns but is {type(text)}.")
    attention, content, texts = text.attention, text.content, text.tokens
    if not torch.is_tensor(attention) or not torch.is_tensor(content) or content.dtype != torch.bool:
        raise TypeError(
            "`text_self_attention` has to hold a tensor of attention and a bool tensor of content tokens, as"
            " `get_text_self_attention` returns them."
        )
    in_windows = window is not None and num_tokens % window == 0
    expected = (batch_size, num_tokens, window if in_windows and attention.shape[-1] == window else num_tokens)
    if tuple(attention.shape) != expected or tuple(content.shape) != expected[:2] or len(texts) != batch_size:
        raise ValueError(
            f"`text_self_attention` has attention {tuple(attention.shape)}, content {tuple(content.shape)} and"
            f" {len(texts)} lists of tokens, but these prompts need {expected}, {expected[:2]} and {batch_size}. Pass"
            " what `get_text_self_attention` returns for the same prompts."
        )
    if not attention.isfinite().all() or (attention < 0).any():
        raise ValueError("`text_self_attention` has negative or non-finite attention; pass probabilities.")


def check_lengths(text, mask):
    """Check that T and the embeddings, whose attention mask is (batch_size, N), are of prompts of the same lengths."""
    if text.lengths is not None and text.lengths.tolist() != mask.sum(-1).tolist():
        raise ValueError(
            f"`text_self_attention` is of prompts of {text.lengths.tolist()} tokens, but by their mask the embeddings"
            f" are of {mask.sum(-1).long().tolist()}. Encode and read the prompts in the same way, `clean_caption` and"
            " `max_sequence_length` included."
        )

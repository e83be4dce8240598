"""What T-SAM compares, how it reads attention, and how it moves the latent.

Pure functions of the paper's equations come first, then the reading of the two kinds of attention, then the update.
"Eq. (n)" is Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236); "the release" is
the authors' code at https://github.com/t-sam-diffusion/code.

Shapes: B images, N tokens, P = H x W positions of a layer's query grid. `content` (B, N) marks the prompt's own tokens:
not <bos>, nothing from the first <eos> on, no padding.
"""

import functools
import inspect
import json
import sys
from contextlib import contextmanager, nullcontext, suppress
from numbers import Integral, Real
from pathlib import Path
from threading import RLock, get_ident
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode


logger = logging.get_logger("diffusers.tsam")  # below its own, so that its verbosity holds here too

OBJECTIVES = ("l1", "l1_full", "cosine")
SMOOTHING_SIGMA = 0.5  # App. B.2
RELEASE_ROW_WEIGHT = 0.2  # the release, `_compute_self_attn_loss_cos`
FP16_LOSS_SCALE = 2.0**12
FP16_LOSS_SCALE_BACKOFF = 2.0**-4
FP16_ATTEMPTS = 6  # the last one scales by 2^-8


# ----------------------------------------------------------------------------------------------------------------------
# The equations


def _normalize_rows(matrix):
    """Each row divided by its sum; a row of zeros stays one."""
    total = matrix.sum(-1, keepdim=True)
    return matrix / torch.where(total > 0, total, 1)


def _pairs(content):
    """Which pairs of tokens are both content: (B, N) bool -> (B, N, N) bool."""
    return content.unsqueeze(-1) & content.unsqueeze(-2)


def symmetrize(attention):
    """T' of a bidirectional text encoder as if it were causal: tril((T' + T'ᵀ)/2), (B, N, N). App. B.2."""
    return (attention + attention.mT).tril() / 2


def normalize_text_attention(attention, content, gamma):
    """T: rows of text self-attention, sharpened by `gamma` and normalised over the content tokens up to their own.

    attention (B, N, N), content (B, N) -> float32 (B, N, N), zero outside. The power comes before the normalisation, as
    in the release: rows of Eq. (14) as printed would not sum to one, and S, whose rows do, could not approach them.
    Eq. (3), (14).
    """
    attention = attention.float().where(_pairs(content).tril(), 0)
    largest = attention.amax(-1, keepdim=True)  # dividing by it changes nothing but keeps the power from underflowing
    return _normalize_rows((attention / torch.where(largest > 0, largest, 1)) ** gamma)


def smooth(maps):
    """Blur maps (B, N, H, W) by a 3x3 Gaussian kernel, reflecting at the border. App. B.2.

    The kernel is the released one, exp(-(x² + y²) / (2σ)²), whose standard deviation is √2·σ.
    """
    x = torch.arange(-1, 2, dtype=maps.dtype, device=maps.device)
    row = torch.exp(-((x / (2 * SMOOTHING_SIGMA)) ** 2))
    kernel = torch.outer(row, row) / row.sum() ** 2
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"  # one row or column has nothing to reflect
    padded = F.pad(maps, (1, 1, 1, 1), mode=mode)
    return F.conv2d(padded.flatten(0, 1).unsqueeze(1), kernel[None, None]).view_as(maps)


def cosine_similarity(maps):
    """C: cosine similarity between every two tokens' maps. maps (B, N, P) -> (B, N, N). Eq. (7)."""
    maps = F.normalize(maps, dim=-1)
    return maps @ maps.mT


def normalize_similarity(similarity, content, objective="l1"):
    """S: rows of C over the content tokens up to their own, k <= i, as in the release.

    similarity, content -> (B, N, N), lower triangle. `"l1_full"` divides by the sum over all content tokens, as Eq. (7)
    is printed, so that its rows do not sum to one.
    """
    pairs = _pairs(content)
    support = pairs if objective == "l1_full" else pairs.tril()
    return _normalize_rows(similarity.where(support, 0)).tril()


def l1_loss(text_attention, similarity, content):
    """Σ_i (i/s) Σ_{j<=i} |T_ij - S_ij|: T and S (B, N, N) -> (B,). Eq. (14)."""
    weight = content.cumsum(-1) / content.sum(-1, keepdim=True).clamp(min=1)
    return (weight * (text_attention - similarity).abs().sum(-1)).sum(-1)


def cosine_loss(text_attention, similarity, content):
    """Σ_i 0.2·(i - 1)·(1 - cos(T_i, S_i)) over columns j < i: T and S (B, N, N) -> (B,). The release's default."""
    columns = content.cumsum(-1) - 1
    rows = _normalize_rows(text_attention.tril(-1))  # a tiny row must not fall under cosine_similarity's epsilon
    distance = 1 - F.cosine_similarity(rows, similarity.tril(-1), dim=-1)
    return (RELEASE_ROW_WEIGHT * columns * distance).where(content & (columns > 0), 0).sum(-1)


def alignment_loss(maps, text_attention, content, objective="l1"):
    """How far the cross-attention maps (B, N, H, W) are from the syntax T (B, N, N): loss (B,), and S (B, N, N)."""
    similarity = cosine_similarity(smooth(maps).flatten(2))
    similarity = normalize_similarity(similarity, content, objective)
    loss = cosine_loss if objective == "cosine" else l1_loss
    return loss(text_attention, similarity, content), similarity


# ----------------------------------------------------------------------------------------------------------------------
# Reading self-attention from the text encoder


class TextSelfAttention(NamedTuple):
    """A batch of prompts' self-attention.

    attention: T', the mean over all layers and heads, float32 (B, N, N). Eq. (2).
    content: which tokens are the prompt's own, bool (B, N).
    tokens: those tokens' texts, a list of strings per prompt.
    """

    attention: torch.Tensor
    content: torch.Tensor
    tokens: list


class _AttentionReader(TorchFunctionMode):
    """Hands the probabilities of each attention that torch computes in its context, (B, heads, P, N), to `read`.

    They are computed beside it from the same queries and keys, while `wanted()`; no result of a model is touched.
    """

    def __init__(self, read, wanted):
        super().__init__()
        self.read, self.wanted = read, wanted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if not self.wanted():
            return output
        if function is F.scaled_dot_product_attention:
            self.read(_softmax_of_scores(*args, **(kwargs or {})))
        elif function is F.softmax and output.dim() == 4:  # transformers' "eager"
            self.read(output)
        return output


def _softmax_of_scores(query, key, value=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
    """What `scaled_dot_product_attention` weighs the values with, float32 (B, heads, P, N)."""
    scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


class _SelfAttentionSum:
    """Of the first call of a text encoder: its token ids, the sum of its layers' attention (B, N, N), their number."""

    def __init__(self):
        self.calls, self.ids, self.sum, self.layers = 0, None, 0, 0
        self.thread = get_ident()

    def begin(self, module, args, kwargs):
        if get_ident() != self.thread:  # another pipeline's call
            return
        self.calls += 1
        if self.calls == 1:
            self.ids = args[0] if args else kwargs["input_ids"]

    def add(self, probabilities):
        self.sum = self.sum + probabilities.float().mean(1)
        self.layers += 1


@contextmanager
def record_self_attention(text_encoder):
    """Record the first prompts that a transformers text encoder encodes in the context, its results untouched.

    Layer by layer, so that no more than one layer's heads are held. Yields what `read_text_self_attention` reads.
    """
    recording = _SelfAttentionSum()
    hook = text_encoder.register_forward_pre_hook(recording.begin, with_kwargs=True)
    try:
        with _AttentionReader(recording.add, lambda: recording.calls == 1):
            yield recording
    finally:
        hook.remove()


def read_text_self_attention(recording, text_encoder, tokenizer):
    """T' of the prompts that were encoded first while `record_self_attention` was open. Eq. (2)."""
    expected, found = text_encoder.config.num_hidden_layers, recording.layers
    if found != expected:
        raise RuntimeError(
            f"The self-attention of {found} of the {expected} layers of {type(text_encoder).__name__} was seen. Load it"
            ' with `attn_implementation="sdpa"`, not compiled, or pass `tsam_steps=0`.'
        )
    ids, attention = recording.ids, recording.sum / expected
    content = content_of(ids, tokenizer.bos_token_id, tokenizer.eos_token_id)
    tokens = [[tokenizer.decode(token) for token in prompt[own]] for prompt, own in zip(ids, content)]
    return TextSelfAttention(attention, content, tokens)


def content_of(input_ids, bos_token_id, eos_token_id):
    """Which tokens are the prompt's own: ids (B, N) -> bool (B, N). The first <eos> ends it (CLIP pads with it)"""
    before_eos = (input_ids == eos_token_id).cumsum(-1) == 0
    return before_eos if bos_token_id is None else before_eos & (input_ids != bos_token_id)


# ----------------------------------------------------------------------------------------------------------------------
# Reading cross-attention from the denoiser


class LastMapRecorded(Exception):
    """Ends a forward pass whose remainder would change no map."""


class TSAMAttnProcessor(nn.Module):
    """Wraps a layer's processor: returns exactly what that one returns and records the probabilities beside it.

    A module, so that the parameters of a wrapped processor (IP-Adapter) stay registered.

    processor: what it wraps. maps: dict that receives this layer's probabilities, mean over heads, float32
    (B, P, tokens), under `name` (overwritten when gradient checkpointing calls again). tokens: columns kept. last:
    whether to raise `LastMapRecorded` then.
    """

    def __init__(self, processor, maps, name, tokens, last=False):
        super().__init__()
        self.processor, self.maps, self.name, self.tokens, self.last = processor, maps, name, tokens, last

    # `Attention` passes only the arguments that it finds named here.
    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
        ip_adapter_masks=None,
        **kwargs,
    ):
        given = {"temb": temb, "ip_adapter_masks": ip_adapter_masks, **kwargs}
        given = {name: value for name, value in given.items() if value is not None}  # not every processor has them
        context = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
        if self.last:
            self._record(cross_attention_probabilities(attn, hidden_states, context, attention_mask))
            raise LastMapRecorded
        read = []
        with _AttentionReader(read.append, lambda: not read):  # the text's comes first
            output = self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, **given)
        self._record(read[0] if read else cross_attention_probabilities(attn, hidden_states, context, attention_mask))
        return output

    def _record(self, probabilities):
        self.maps[self.name] = probabilities.mean(1)[..., : self.tokens]


def cross_attention_probabilities(attn, hidden_states, encoder_hidden_states, attention_mask=None):
    """softmax(q kᵀ/√d) of one `Attention` layer, float32 (B, heads, P, N); hidden_states (B, P, C)."""
    if attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    key = attn.to_k(encoder_hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    query = query if attn.norm_q is None else attn.norm_q(query)
    key = key if attn.norm_k is None else attn.norm_k(key)
    mask = None if attention_mask is None else attention_mask.unsqueeze(1)  # (B, 1, 1, N), additive
    return _softmax_of_scores(query, key, attn_mask=mask, scale=attn.scale)


@contextmanager
def record_cross_attention(layers, tokens, stop=False):
    """Record the probabilities of `layers` (a list of `Attention`, in the order they run) while the context is open.

    Yields a dict of one (B, P, tokens) map a layer, filled anew by every forward, which ends with `LastMapRecorded` at
    the last of them if `stop`. Afterwards each layer has its own processor again.
    """
    maps, processors = {}, [layer.processor for layer in layers]
    try:
        for name, layer in enumerate(layers):
            last = stop and layer is layers[-1]
            layer.set_processor(TSAMAttnProcessor(layer.processor, maps, name, tokens, last))
        yield maps
    finally:
        for layer, processor in zip(layers, processors):
            layer.set_processor(processor)


# ----------------------------------------------------------------------------------------------------------------------
# What a call does to the denoiser


@contextmanager
def frozen(model):
    """While the context is open, no parameter of `model` asks for a gradient, and a backward pass finds every weight as
    its forward pass used it.

    With gradient checkpointing parameters may go on to ask: its recomputation keeps copies of those that do, and of the
    others what offloading and layerwise casting have left when the gradient is taken.
    """
    checkpointing = getattr(model, "is_gradient_checkpointing", False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    # Group offloading and layerwise casting exchange the data under a weight as soon as its layer has run.
    exchanging = any(hasattr(module, "_diffusers_hook") for module in model.modules())
    try:
        if not checkpointing:
            model.requires_grad_(False)
        with saved_tensors_hooks(_keep, lambda tensor: tensor) if exchanging else nullcontext():
            yield
    finally:
        for name, parameter in model.named_parameters():  # by name: offloading replaces parameters
            parameter.requires_grad_(flags[name])


def _keep(tensor):
    """What autograd saves, of the data and not of the parameter."""
    tensor = tensor.detach()
    if tensor.is_cuda:  # loaded on another stream, which must not reuse it while the backward pass reads it
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


_locks = WeakKeyDictionary()


def lock_of(model):
    """The lock that all pipelines with this model share. Its thread may take it again: a callback may draw, too."""
    return _locks.setdefault(getattr(model, "_orig_mod", model), RLock())  # compiled or not


def one_at_a_time(denoiser):
    """Decorates a pipeline's call: calls that share their component named `denoiser` wait for each other.

    Guidance exchanges its processors, and drawing its pipeline's state, so that two threads would spoil each other's.
    """

    def decorate(call):
        @functools.wraps(call)
        def alone(self, *args, **kwargs):
            with lock_of(getattr(self, denoiser)):
                return call(self, *args, **kwargs)

        return alone

    return decorate


# ----------------------------------------------------------------------------------------------------------------------
# Moving the latent


class LatentAlignment:
    """What T-SAM keeps during one call of a pipeline.

    text: `TextSelfAttention` of the prompts, each drawn `num_images_per_prompt` times, B images in all. losses: one
    (B,) tensor an update, each taken before it. steps: with `keep_maps`, (position in the scheduler's timesteps, maps
    (B, N, H, W), S (B, N, N)) before each guided step's first update.
    """

    def __init__(self, text, alpha, gamma, objective="l1", keep_maps=False, num_images_per_prompt=1, device=None):
        attention, content, texts = text
        attention, content = (x.to(device).repeat_interleave(num_images_per_prompt, 0) for x in (attention, content))
        self.token_texts = [tokens for tokens in texts for _ in range(num_images_per_prompt)]
        self.tokens = max([1 + token for token in content.any(0).nonzero().flatten().tolist()], default=1)
        self.content = content[:, : self.tokens]
        attention = attention[:, : self.tokens, : self.tokens]
        self.text_attention = normalize_text_attention(attention, self.content, float(gamma))
        self.alpha, self.objective, self.keep_maps = float(alpha), objective, keep_maps
        self.losses, self.steps, self.loss_scale = [], [], None
        if not self.possible:
            logger.warning("T-SAM changes nothing: it aligns words with each other, and no prompt has two.")

    @property
    def possible(self):
        """Whether there is anything to align: one token alone has only itself to attend to."""
        return bool((self.content.sum(-1) > 1).any())

    def update(self, latents, scheduler, t, predict, layers, grid, step, iterations=1):
        """Move latents (B, C, h, w) before timestep t `iterations` times down the gradient of the loss. Eq. (15).

        The step is taken at the model's input, z_in = c·z with c the scale that `scheduler` gives it, so that one alpha
        holds under every scheduler: z' = z - (α/c) ∇_{z_in} loss. `predict(model_input)` runs the denoiser on the
        conditional half; `layers` are read on the query grid `grid` = (H, W).
        """
        input_scale = torch.ones((), device=latents.device)
        if hasattr(scheduler, "scale_model_input"):
            input_scale = scheduler.scale_model_input(input_scale, t)
        # Installed anew at every step (microseconds): in between, callbacks see, and may change, the layers' own.
        with record_cross_attention(layers, self.tokens, stop=True) as maps:
            for iteration in range(iterations):
                gradient, grids, similarity, loss = self._gradient(latents, input_scale, predict, maps, grid)
                moved = (latents.float() - self.alpha / input_scale * gradient).to(latents.dtype)
                finite = moved.isfinite().flatten(1).all(1)
                latents = moved.where(finite[:, None, None, None], latents)
                self.losses.append(loss)
                if self.keep_maps and iteration == 0:
                    self.steps.append((step, grids, similarity))
        # UniPC's corrector starts again from the previous sample, which would undo the move; without one it is skipped.
        if getattr(scheduler, "last_sample", None) is not None:
            scheduler.last_sample = None
        return latents

    def _gradient(self, latents, input_scale, predict, maps, grid):
        """∇_{z_in} loss in float32, and the maps, S and loss it comes from.

        Half-precision gradients can underflow, so the loss of each image is scaled before the backward pass; an image
        whose gradient overflows is tried again with less, and stays where it is if nothing helps.
        """
        half = latents.dtype == torch.float16
        if self.loss_scale is None:
            scale = FP16_LOSS_SCALE if half else 1.0
            self.loss_scale = torch.full((len(latents),), scale, device=latents.device)
        for _ in range(FP16_ATTEMPTS if half else 1):
            with torch.enable_grad():
                model_input = (input_scale * latents.float()).requires_grad_()
                # A compiled model runs uncompiled here: this pass is half the batch, keeps what its gradient needs, and
                # ends by an exception; it would be compiled anew, and on some versions of torch fail.
                with suppress(LastMapRecorded), torch.compiler.set_stance("force_eager"):
                    predict(model_input.to(latents.dtype))
                mean = torch.stack(list(maps.values())).mean(0)  # (B, P, N), Eq. (6)
                grids = mean.mT.unflatten(-1, grid)
                loss, similarity = alignment_loss(grids, self.text_attention, self.content, self.objective)
                (gradient,) = torch.autograd.grad((loss * self.loss_scale).sum(), model_input)
            maps.clear()
            finite = gradient.isfinite().flatten(1).all(1)
            if not half or finite.all():
                break
            self.loss_scale = self.loss_scale.where(finite, self.loss_scale * FP16_LOSS_SCALE_BACKOFF)
        else:
            logger.warning("A gradient is not finite in float16, and its image stays as it is. Try bfloat16.")
        gradient = (gradient / self.loss_scale[:, None, None, None]).where(finite[:, None, None, None], 0)
        return gradient, grids.detach(), similarity.detach(), loss.detach()

    def losses_per_image(self):
        """(B, updates) on the CPU."""
        return torch.stack(self.losses, 1).cpu() if self.losses else torch.empty(len(self.content), 0)

    def attentions(self):
        """What `output_attentions` returns, a dict per image, on the CPU; s content tokens, G guided steps:

        tokens (s strings), text_attention T (s, s), steps (G positions in the scheduler's timesteps), maps (G, s, H, W)
        and similarity S (G, s, s), both before the step's first update.
        """
        result, steps = [], [step for step, _, _ in self.steps]
        kept = [(maps.cpu(), similarity.cpu()) for _, maps, similarity in self.steps]
        for image, content in enumerate(self.content.cpu()):
            maps = [maps[image, content] for maps, _ in kept]
            similarity = [similarity[image][content][:, content] for _, similarity in kept]
            result.append(
                {
                    "tokens": self.token_texts[image],
                    "text_attention": self.text_attention[image].cpu()[content][:, content],
                    "steps": steps,
                    "maps": torch.stack(maps) if maps else None,
                    "similarity": torch.stack(similarity) if similarity else None,
                }
            )
        return result


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


# ----------------------------------------------------------------------------------------------------------------------
# Checking the arguments


class Schedule(NamedTuple):
    """Where the updates are: at the first `guided` percent of the steps, with more of them at `refined` percent.

    These are `iterations`, and `iterations_percent` percent of the number of steps.
    """

    guided: int
    refined: tuple
    iterations: int = 0
    iterations_percent: int = 0


SCHEDULES = {
    "paper": Schedule(50, (0, 20, 40), iterations=20),  # of 50 steps 25, and 20 more at 0, 10 and 20; App. B.2
    # of 50 steps 10, and 10 more at 0, 4 and 8: as many as a picture of 1.5 times the plain one's operations has
    "fast": Schedule(20, (0, 8, 16), iterations_percent=20),
}


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
    if not -sys.float_info.max <= value <= sys.float_info.max:  # also integers too large for a float
        raise ValueError(f"`{name}` is {value}, but has to be finite. {remedy}")


def check_stock_inputs(
    prompt,
    negative_prompt,
    height,
    width,
    num_images_per_prompt,
    guidance_scale,
    eta,
    generator,
    callback,
    tensor_inputs,
):
    """Check what the stock pipelines leave to fail later in other ways, or to draw NaN."""
    for name, texts in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        several = isinstance(texts, (list, tuple))
        if not all(text is None or isinstance(text, str) for text in (texts if several else [texts])):
            raise TypeError(f"`{name}` has to be a string or a list of strings but is {texts!r}.")
        if several and (not texts or None in texts):
            raise ValueError(f'`{name}` is {texts!r}, but has to hold a string for each picture. Pass "" for none.')
    if min(height, width) < 0:
        raise ValueError(f"`height` and `width` are {height} and {width}, but have to be positive.")
    check_integer("num_images_per_prompt", num_images_per_prompt, 1, "1 is usual.")
    _check_number("guidance_scale", guidance_scale, "7.5 is usual.")
    _check_number("eta", eta, "Pass 0.0 to 1.0.")
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise TypeError(f"`generator` has to be a torch.Generator or a list of them but is {generator!r}.")
    if callback is not None and (not callable(callback) or tensor_inputs is None):
        raise TypeError(
            f"`callback_on_step_end` has to be callable but is {callback!r}, with a list of tensors' names but"
            f' {tensor_inputs!r}. Pass a function and `callback_on_step_end_tensor_inputs=["latents"]`.'
        )


def check_tsam_inputs(
    num_steps,
    tsam_steps,
    alpha,
    gamma,
    refinement_steps,
    refinement_iterations,
    objective,
    schedule,
    schedules=SCHEDULES,
):
    """Check T-SAM's arguments against `num_steps` denoising steps, and fill in what `schedule` sets where it is None.

    Returns tsam_steps, refinement_steps (a set) and refinement_iterations. Raises ValueError or TypeError naming the
    value, the limit and the remedy.
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

    _check_number("alpha", alpha, "Pass the size of an update, 10.0 for instance.")
    if alpha < 0:
        raise ValueError(f"`alpha` is {alpha}, but has to be at least 0: below, the loss would rise. Pass 10.0.")
    _check_number("gamma", gamma, "Pass the exponent of T, 2.0 for instance.")
    if gamma <= 0:
        raise ValueError(f"`gamma` is {gamma}, but has to be above 0: at 0, T says nothing. Pass 2.0.")
    if refinement_iterations is None:
        refinement_iterations = percent.iterations + num_steps * percent.iterations_percent // 100
    check_integer("refinement_iterations", refinement_iterations, 0, "Pass 0 for no refinement.")
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` is {objective!r}, but has to be one of {', '.join(map(repr, OBJECTIVES))}.")

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


def check_text_self_attention(text, prompt, batch_size, tokens):
    """Check the caller's `TextSelfAttention` for `batch_size` prompts of `tokens` tokens; none is needed with text."""
    if text is None:
        if prompt is None:
            raise ValueError(
                "T cannot be known from `prompt_embeds` alone. Pass `text_self_attention=pipe."
                "get_text_self_attention(prompt)` with them, or `tsam_steps=0`."
            )
        return
    try:
        attention, content, texts = text
    except (TypeError, ValueError):
        raise TypeError(
            f"`text_self_attention` has to be what `get_text_self_attention` returns but is {type(text)}."
        ) from None
    if not torch.is_tensor(attention) or not torch.is_tensor(content) or content.dtype != torch.bool:
        raise TypeError(
            "`text_self_attention` has to hold a tensor of attention and a bool tensor of content tokens, as"
            " `get_text_self_attention` returns them."
        )
    expected = (batch_size, tokens, tokens)
    if tuple(attention.shape) != expected or tuple(content.shape) != expected[:2] or len(texts) != batch_size:
        raise ValueError(
            f"`text_self_attention` has attention {tuple(attention.shape)}, content {tuple(content.shape)} and"
            f" {len(texts)} lists of tokens, but these prompts need {expected}, {expected[:2]} and {batch_size}. Pass"
            " what `get_text_self_attention` returns for the same prompts."
        )
    if not attention.isfinite().all() or (attention < 0).any():
        raise ValueError("`text_self_attention` has negative or non-finite attention; pass probabilities.")


# ----------------------------------------------------------------------------------------------------------------------
# Loading and saving


def add_code(index, file, class_name):
    """Let a saved pipeline load as the class `class_name` of the Python file `file`.

    index: its model_index.json, which then names that class, and beside which copies of `file` and of this module lie.
    """
    index, file = Path(index), Path(file)
    config = {**json.loads(index.read_bytes()), "_class_name": [file.stem, class_name]}
    index.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for source in (file, Path(__file__)):
        (index.parent / source.name).write_bytes(source.read_bytes())  # not shutil's, which fail on the file itself


class TSAMPipelineMixin:
    """What both pipelines change in how diffusers loads, shares and saves them."""

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As the stock method, but in the dtype of `pipeline`, with which the components are shared, unless given."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        return super().from_pipe(pipeline, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file):
        """As the stock method, but it is this class that is loaded, not the copy of its code that was saved."""
        config = super()._dict_from_json_file(json_file)
        if isinstance(config.get("_class_name"), list):
            config["_class_name"] = cls.__name__
        return config

    def to_json_file(self, json_file_path):
        """As the stock method, for saving and pushing; the code is put beside, so that it loads as this class again.

        Not for a user's subclass, whose code this is not: a warning instead.
        """
        super().to_json_file(json_file_path)
        cls = type(self)
        own = next(parent for parent in cls.__mro__ if TSAMPipelineMixin in parent.__bases__)
        if cls is own:
            add_code(json_file_path, inspect.getfile(cls), cls.__name__)
        else:
            logger.warning(
                f"{json_file_path} names {cls.__name__} without its code, since that is a subclass of {own.__name__}."
                f" Load it with `{cls.__name__}.from_pretrained`."
            )

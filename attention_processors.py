"""How attention is read from text encoders and denoisers, and how a call changes these models and restores them.

Readers change no output: every network returns exactly what it returns without one. `tsam.py` says what the maps are
compared with, and how; "Eq. (n)" is the paper's (arXiv:2411.15236).

Shapes: B images, N tokens, P = H x W positions of a layer's query grid.
"""

import functools
from contextlib import ExitStack, contextmanager, suppress
from math import prod
from threading import Lock, RLock, get_ident

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_wan import WanAttention
from torch.overrides import TorchFunctionMode

from .tsam import full_precision


# ----------------------------------------------------------------------------------------------------------------------
# Self-attention of text encoders


class SelfAttentionRecording:
    """Keeps the token ids (B, N) and the summed attention of a text encoder's first call in this thread."""

    def __init__(self, encoder):
        self.encoder, self.thread = encoder, get_ident()
        self.input_ids, self.sum, self.layers, self.open = None, 0, 0, False
        self.paused = False

    def begin(self, encoder, args, kwargs=None):  # without `kwargs` if another thread calls too early
        if self.input_ids is None and get_ident() == self.thread:
            names = "input_ids", "target_input_ids"
            self.input_ids, self.open = args[0] if args else next(kwargs[n] for n in names if n in kwargs), True

    def end(self, encoder, args, output):
        if get_ident() == self.thread:
            self.open = False

    def pause(self, layer, args):
        """During cross-attention, which Anima's text conditioner has, too."""
        if get_ident() == self.thread:
            self.paused, self.open = self.open, False

    def go_on(self, layer, args, output):
        if get_ident() == self.thread:
            self.open = self.paused

    def add(self, probabilities):
        """Add one layer's probabilities (B, heads, N, N)."""
        self.sum = self.sum + probabilities.float().mean(1)
        self.layers += 1


class _RecordSelfAttention(TorchFunctionMode):
    """Adds the probabilities of every attention that torch computes to the open recording, if any."""

    def __init__(self, recordings):
        super().__init__()
        self.recordings = recordings

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        recording = next((recording for recording in self.recordings if recording.open), None)
        if recording is not None and function is F.scaled_dot_product_attention:
            recording.add(attention_probabilities(*args, **(kwargs or {})))
        elif recording is not None and function is F.softmax and output.dim() == 4:  # transformers' "eager"
            recording.add(output)
        return output


@contextmanager
def record_self_attention(*encoders):
    """Record the first prompts that each text encoder of transformers, or Anima's text conditioner, encodes in the
    context; its results stay the same.

    Sums layer by layer, to hold only one layer's heads. Yields a `SelfAttentionRecording` per encoder. Calls that share
    an encoder wait for each other; other threads' calls are not recorded.
    """
    if None in encoders:
        raise ValueError(
            "This pipeline has no text encoder to read T from. Load one, or pass `prompt_embeds` with the"
            " `text_self_attention` that another pipeline's `get_text_self_attention` gives, or `tsam_steps=0`."
        )
    recordings = [SelfAttentionRecording(encoder) for encoder in encoders]
    with ExitStack() as stack:
        stack.enter_context(locked(*encoders))
        for recording in recordings:
            stack.callback(recording.encoder.register_forward_pre_hook(recording.begin, with_kwargs=True).remove)
            stack.callback(recording.encoder.register_forward_hook(recording.end).remove)
            for layer in (part for name, part in recording.encoder.named_modules() if name.endswith("cross_attn")):
                stack.callback(layer.register_forward_pre_hook(recording.pause).remove)
                stack.callback(layer.register_forward_hook(recording.go_on).remove)
        stack.enter_context(_RecordSelfAttention(recordings))
        yield recordings


def mean_self_attention(recordings):
    """T' (B, N, N), float32: the mean over all layers and heads of all encoders. Eq. (2)."""
    for recording in recordings:
        config, found = recording.encoder.config, recording.layers
        expected = config.num_hidden_layers if hasattr(config, "num_hidden_layers") else config.num_layers
        if found != expected:
            raise RuntimeError(
                f"The self-attention of {found} of the {expected} layers of {type(recording.encoder).__name__} was"
                ' seen. Load it with `attn_implementation="sdpa"`, not compiled, or pass `tsam_steps=0`.'
            )
    return sum(recording.sum for recording in recordings) / sum(recording.layers for recording in recordings)


def attention_probabilities(
    query, key, value=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """The weights that `scaled_dot_product_attention` uses, float32 (B, heads, P, N)."""
    if enable_gqa:  # several query heads share a key head
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    with full_precision(query.device.type):
        scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# Cross-attention of denoisers


REPLACED = (
    "Something changes or skips the denoiser's cross-attention: token merging, DeepCache and a denoiser that was"
    " replaced meanwhile do. Take it off, or pass `tsam_steps=0`."
)


class LastMapRecorded(Exception):
    """Ends a forward pass, because the rest changes no map."""

    def __str__(self):  # seen only if somebody runs the denoiser meanwhile
        return "An `objective` cannot run the denoiser that its maps are of. Let it run a copy, made before the call."


class TSAMAttnProcessor:
    """Wraps a layer's processor: records the probabilities, and returns exactly what the processor returns.

    maps: dict that receives this layer's probabilities, mean over heads, float32 (B, P, num_tokens), under `index`
    (overwritten when gradient checkpointing recomputes). last: whether to raise `LastMapRecorded` then. graph: whether
    to record passes with a gradient.
    """

    def __init__(self, processor, maps, index, num_tokens, last=False, graph=True):
        self.processor, self.maps, self.index, self.num_tokens, self.last = processor, maps, index, num_tokens, last
        self.graph, self.thread = graph, get_ident()

        vars(self)["__call__"] = processor.__call__  # `Attention` passes only the arguments that it takes

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, *args, **kwargs):
        # Skip other threads' passes, but not autograd's: gradient checkpointing recomputes there, with gradients on.
        own = get_ident() == self.thread or hidden_states.requires_grad
        if own and (self.graph or not torch.is_grad_enabled()):
            context = encoder_hidden_states[0] if isinstance(encoder_hidden_states, tuple) else encoder_hidden_states
            probabilities = cross_attention_probabilities(attn, hidden_states, context, attention_mask, self.processor)
            self.maps[self.index] = probabilities.mean(1)[..., : self.num_tokens]
            if self.last:
                raise LastMapRecorded
        return self.processor(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)


def cross_attention_probabilities(attn, hidden_states, encoder_hidden_states, attention_mask=None, processor=None):
    """softmax(q kᵀ/√d) of one `Attention` or `WanAttention`, float32 (B, heads, P, N); hidden_states (B, P, C)."""
    wan = isinstance(attn, WanAttention)
    if not wan and attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)

    def heads(name, states, norm):
        own = getattr(processor, f"{name}_custom_diffusion", None)  # Custom Diffusion trains projections of its own
        projected = getattr(attn, name)(states) if own is None else own(states.to(own.weight.dtype))
        projected = norm(projected) if wan else projected  # over all heads together
        projected = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return projected if wan or norm is None else norm(projected)

    query, key = heads("to_q", hidden_states, attn.norm_q), heads("to_k", encoder_hidden_states, attn.norm_k)
    mask = None if attention_mask is None else attention_mask.unsqueeze(1)  # (B, 1, 1, N), additive
    return attention_probabilities(query, key, attn_mask=mask, scale=None if wan else attn.scale)


def unet_cross_attention_layers(unet, attention_resolution):
    """A UNet's cross-attention layers with a query grid of that many positions a side at its default size.

    A list of `Attention` in the order they run. ValueError if there are none.
    """
    side = unet.config.sample_size
    if side is None:
        raise ValueError(
            "This UNet's config has no `sample_size`, so that its grids have no known size. Set it, by"
            " `pipe.unet.register_to_config(sample_size=64)` for 512 pixels, or pass `tsam_steps=0`."
        )
    side = side if isinstance(side, int) else side[0]
    layers = {}

    def add(block, level):
        for transformer in getattr(block, "attentions", None) or []:
            for layer in getattr(transformer, "transformer_blocks", []):
                if getattr(layer, "attn2", None) is not None:
                    layers.setdefault(-(-side // 2**level), []).append(layer.attn2)

    level = 0
    for block in unet.down_blocks:
        add(block, level)
        level += block.downsamplers is not None
    add(unet.mid_block, level)
    for block in unet.up_blocks:
        add(block, level)
        level -= block.upsamplers is not None
    if attention_resolution not in list(layers):
        raise ValueError(
            f"`attention_resolution` is {attention_resolution!r}, but at its default size of {side} this UNet has"
            f" cross-attention on grids of {', '.join(map(str, sorted(layers))) or 'no size'}. Pass one of these,"
            " or `tsam_steps=0`."
        )
    return layers[attention_resolution]


@contextmanager
def record_cross_attention(layers, num_tokens, stop=False, graph=True):
    """Record the probabilities of `layers` (a list of `Attention`, in the order they run) while the context is open.

    Yields a dict with one map (B, P, num_tokens) per layer, refilled by every forward pass. With `stop`, that ends at
    the last layer by `LastMapRecorded`. Without `graph`, passes with a gradient are skipped, so that an observer of a
    whole call sees its noise predictions alone. Each layer's own processor is restored.
    """
    maps = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            last = stop and layer is layers[-1]
            processor = TSAMAttnProcessor(layer.processor, maps, index, num_tokens, last, graph)
            stack.enter_context(shadowed(layer, "processor", processor))
        yield maps


def joint_attention_probabilities(attn, hidden_states, encoder_hidden_states, num_text, rotary=None, all_keys=False):
    """softmax(q kᵀ/√d) of one joint attention, image rows and text columns, float32 (B, heads, P, num_text).

    hidden_states (B, P, C), encoder_hidden_states (B, num_text, C), or None if hidden_states holds both, text first.
    rotary: the positions' cosines and sines, text first. The softmax is over the text's keys, or over all.
    """
    both = encoder_hidden_states is None
    text = hidden_states[:, :num_text] if both else encoder_hidden_states
    image = hidden_states[:, num_text:] if both else hidden_states

    def project(x, linear, norm, positions):
        x = linear(x).unflatten(-1, (attn.heads, -1))
        x = x if norm is None else norm(x)
        if rotary is not None:
            x = apply_rotary_emb(x, [part[positions] for part in rotary], sequence_dim=1)
        return x.transpose(1, 2)

    of_text, of_image = slice(0, num_text), slice(num_text, None)
    query = project(image, attn.to_q, attn.norm_q, of_image)
    linear, norm = (attn.to_k, attn.norm_k) if both else (attn.add_k_proj, attn.norm_added_k)
    key = project(text, linear, norm, of_text)
    if all_keys:
        key = torch.cat([key, project(image, attn.to_k, attn.norm_k, of_image)], 2)
    return attention_probabilities(query, key)[..., :num_text]


@contextmanager
def record_joint_attention(layers, num_tokens, num_text, all_keys=False, stop=False):
    """Like `record_cross_attention`, for the joint attention `layers` of SD3 or FLUX: what image rows give to the first
    `num_tokens` of `num_text` text columns, over the text's keys alone, or over all.

    Uses hooks: their processors have too many signatures to wrap.
    """
    maps, thread = {}, get_ident()

    def record(index, attn, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if get_ident() != thread and not hidden_states.requires_grad:  # as in `TSAMAttnProcessor`
            return
        context, rotary = kwargs.get("encoder_hidden_states"), kwargs.get("image_rotary_emb")
        probabilities = joint_attention_probabilities(attn, hidden_states, context, num_text, rotary, all_keys)
        maps[index] = probabilities.mean(1)[..., :num_tokens]
        if stop and attn is layers[-1]:
            raise LastMapRecorded

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = functools.partial(record, index)
            stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield maps


def run_to_last_map(model, *args, **kwargs):
    """Run a denoiser only up to the last recorded map.

    A compiled one runs uncompiled, because this pass has half the batch, keeps what its gradient needs and ends by an
    exception: torch would compile it anew, and some versions fail.
    """
    with suppress(LastMapRecorded), _uncompiled():
        model(*args, **kwargs, return_dict=False)


class _uncompiled:
    """The first thread inside sets torch's stance and the last resets it, because the process has only one."""

    lock, inside, stance = Lock(), 0, None

    def __enter__(self):
        with self.lock:
            if _uncompiled.inside == 0:
                _uncompiled.stance = torch.compiler.set_stance("force_eager")
            _uncompiled.inside += 1

    def __exit__(self, *error):
        with self.lock:
            _uncompiled.inside -= 1
            if _uncompiled.inside == 0:
                _uncompiled.stance.__exit__(None, None, None)


def mean_maps(maps, height, width, number=None, frames=()):
    """A (B, N, *frames, H, W), the mean over layers of recorded maps (B, P, N); empties `maps`. Eq. (6).

    Halving the latent's size, rounded up or down as networks do, gives the grid with P positions.
    RuntimeError unless `number` maps of one such grid were recorded.
    """
    sizes = sorted({of_layer.shape[1] for of_layer in maps.values()})
    if not maps or len(maps) != (number or len(maps)) or len(sizes) > 1:
        raise RuntimeError(
            f"{number or 'Some'} cross-attention maps of one size were expected, but {len(maps)} came, of"
            f" {' and '.join(map(str, sizes)) or 'no'} positions. {REPLACED}"
        )
    mean = torch.stack([maps.pop(index) for index in sorted(maps)]).mean(0)
    places = mean.shape[1] // prod(frames)
    for rounding in (1, 0):
        grid = height, width
        while grid[0] * grid[1] > places:
            grid = (grid[0] + rounding) // 2, (grid[1] + rounding) // 2
        if grid[0] * grid[1] == places:
            return mean.mT.unflatten(-1, (*frames, *grid))
    raise RuntimeError(f"Maps of {mean.shape[1]} positions came, no grid of {height}x{width} latents. {REPLACED}")


# ----------------------------------------------------------------------------------------------------------------------
# How readers share a model


@contextmanager
def shadowed(owner, name, value):
    """While the context is open, `value` hides the attribute `name` of `owner`, in every thread.

    Setting a module (an IP-Adapter's processor) anew would leave a moment without one, and would change what is
    registered.
    """
    attributes = vars(owner)
    had, own = name in attributes, attributes.get(name)
    attributes[name] = value
    try:
        yield
    finally:
        if attributes.get(name) is value:  # else the user replaced it meanwhile
            if had:
                attributes[name] = own
            else:
                del attributes[name]


class ModelLock:
    """A reentrant lock to keep on a model: a copied model gets its own lock, a pickled one none."""

    def __init__(self):
        self.lock = RLock()

    def __enter__(self):
        self.lock.acquire()

    def __exit__(self, *error):
        self.lock.release()

    def __deepcopy__(self, memo):
        return ModelLock()

    def __reduce__(self):
        return type(None), ()


def lock_of(model):
    """The lock that all pipelines with this model share; reentrant, because a callback may draw, too."""
    attributes = vars(getattr(model, "_orig_mod", model))  # compiled or not
    if attributes.get("_tsam_lock", False) is None:  # pickled
        attributes["_tsam_lock"] = ModelLock()
    return attributes.setdefault("_tsam_lock", ModelLock())


@contextmanager
def locked(*models):
    """Hold the locks of all `models`; None has none."""
    with ExitStack() as stack:
        for model in models:
            if model is not None:
                stack.enter_context(lock_of(model))
        yield

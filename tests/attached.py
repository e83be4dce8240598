"""T-SAM attached to any classic stock pipeline for the length of a call: a second way to guide, to hold the first to.

It shares no code with the product: what is attended to is seen where torch computes attention, and the latents are
moved behind the pipeline's back, in its denoiser's input and its scheduler's sample.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import oracle


class Seen(TorchFunctionMode):
    """Queries and keys of every attention that is computed inside one of `layers`, in order."""

    def __init__(self, layers):
        super().__init__()
        self.layers, self.inside, self.pairs, self.hooks = layers, False, [], []

    def __enter__(self):
        for layer in self.layers:
            self.hooks += [layer.register_forward_pre_hook(self.enter), layer.register_forward_hook(self.leave)]
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*error)

    def enter(self, *_):
        self.inside = True

    def leave(self, *_):
        self.inside = False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and self.inside:
            self.pairs.append((args[0] if args else kwargs["query"], args[1] if args else kwargs["key"]))
        return function(*args, **(kwargs or {}))


def attention_maps(pairs, rows, columns, all_keys):
    """(B, rows, columns): softmax over the columns' keys or over all, mean over heads and layers."""
    maps = []
    for query, key in pairs:
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key)[:, :, rows] / query.shape[-1] ** 0.5
        weights = scores.softmax(-1)[..., columns] if all_keys else scores[..., columns].softmax(-1)
        maps.append(weights.mean(1))
    return torch.stack(maps).mean(0)


def l1(target, maps):
    """Eq. (14) of one image: T (s, s) and maps (s, H, W)."""
    square = torch.arange(-1.0, 2.0).square()
    kernel = (-(square[:, None] + square) / (2 * oracle.SIGMA) ** 2).exp().to(maps)
    blurred = F.conv2d(F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"), (kernel / kernel.sum())[None, None])
    similar = F.cosine_similarity(blurred.flatten(1)[:, None], blurred.flatten(1)[None], dim=-1).tril()
    weight = torch.arange(1, len(target) + 1) / len(target)
    return (weight[:, None] * (target - similar / similar.sum(-1, keepdim=True)).abs()).sum()


@contextmanager
def attached(pipe, model, layers, texts, alpha, updates, grid, rows=slice(None), columns=slice(None), all_keys=True):
    """Guide the next call of a stock `pipe` that asks its `model` once a step, or first for the prompt.

    texts: for each image its T (s, s), and its tokens' places among the columns. updates: how many at each
    step. rows, columns: of the image and the text in the attention of `layers`. Yields the losses, a list of one (B,)
    tensor an update.
    """
    losses, moves, stepped, images = [], [], [], len(texts)
    forward, step = model.forward, pipe.scheduler.step

    def of_condition(value):
        """Classifier-free guidance has it behind what is without."""
        if torch.is_tensor(value) and value.dim() and value.shape[0] == 2 * images:
            return value[images:]
        return {name: of_condition(item) for name, item in value.items()} if isinstance(value, dict) else value

    def loss_at(model_input, args, kwargs):
        with Seen(layers) as seen:
            forward(model_input, *args, **kwargs)
        maps = attention_maps(seen.pairs, rows, columns, all_keys).unflatten(1, grid).double()
        return torch.stack([l1(text, maps[k][..., own].permute(2, 0, 1)) for k, (text, own) in enumerate(texts)])

    def guided(sample=None, *args, hidden_states=None, **kwargs):
        sample = hidden_states if sample is None else sample
        start = model_input = of_condition(sample)
        own_args, own_kwargs = [of_condition(value) for value in args], of_condition(kwargs)
        for _ in range(updates[len(moves)] if len(moves) == len(stepped) else 0):
            with torch.enable_grad():
                leaf = model_input.detach().requires_grad_()
                loss = loss_at(leaf, own_args, own_kwargs)
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            model_input = model_input - alpha * gradient
            losses.append(loss.detach())
        if len(moves) == len(stepped):
            moves.append(model_input - start)
        return forward(sample + moves[-1].repeat(len(sample) // images, *[1] * (sample.dim() - 1)), *args, **kwargs)

    def moved_step(prediction, t, sample, *args, **kwargs):
        scale, _ = 1.0, stepped.append(t)
        if hasattr(pipe.scheduler, "scale_model_input"):
            scale = pipe.scheduler.scale_model_input(torch.ones(1), t)
        return step(prediction, t, sample + moves[-1] / scale, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(model, "forward", guided))
        stack.enter_context(mock.patch.object(pipe.scheduler, "step", moved_step))
        yield losses

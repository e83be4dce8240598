"""Chooses the start: draws several for each image and goes on from that with maps closest to the text.

The score is the contrast objective's loss, from forward passes alone. Ours, not the paper's.
"""

import torch

from .attention_processors import mean_maps, record_cross_attention, run_to_last_map
from .tsam import LatentAlignment
from .tsam_arguments import Settings


class Scouted(Exception):
    """Ends a call, because the rest would not change its starts' loss: (images,)."""

    def __init__(self, loss):
        self.loss = loss.float().cpu()


def score():
    """The settings of the loss that starts are compared by."""
    return Settings(preset="fast", objective="contrast")


class Scouting:
    """Mixed into a `GuidedLoop`: runs unguided to the comparison of starts, takes their loss and draws no picture.

    states: the generators' states to draw the starts from, or None for the current ones. start: what `prepare_latents`
    returned, and the states after it. loss: (images,) float32, None if the call was interrupted.
    """

    guided, reads, needed = False, True, True
    states = loss = None

    def progress_bar(self, stock, *args, **kwargs):
        bar = stock(total=self.settings.chosen_after(self.num_steps))
        if hasattr(bar, "set_description"):
            bar.set_description("choosing")
        return bar

    def prepare_latents(self, stock, *args, **kwargs):
        generators = generators_of(self.given)
        restore(generators, self.states or [])
        prepared = stock(*args, **kwargs)
        self.start = prepared, [generator.get_state() for generator in generators]
        return prepared

    def predict(self, sample, *args, **kwargs):
        kwargs |= {name: value[-len(sample) :] for name, value in self.conditions.items()}
        if self.index < (self.settings.chosen_after(self.num_steps) - 1) * self.scheduler.order:
            return self.model(sample, *args, **kwargs)
        alignment = LatentAlignment(self.text, score(), self.given["num_images_per_prompt"], self.latents.device)
        layers = self.pipe.layers_of(self.settings)
        kwargs.pop("return_dict", None)
        with record_cross_attention(layers, alignment.num_tokens, stop=True) as maps:
            run_to_last_map(self.model, sample, *args, **kwargs)
        maps = mean_maps(maps, *self.latents.shape[-2:], len(layers), self.latents.shape[2:-2])[-len(self.latents) :]
        raise Scouted(alignment.loss_of(maps))


def scouted(pipe, stock, given, settings, states=None, encoding=None):
    """Run and return a `Scouting` loop of one start per image. stock: the stock pipeline's call. encoding: the
    prompts', from another loop of this call."""
    loop = type("Scout", (Scouting, pipe.loop), {})(pipe, given, settings)
    settings.chosen_after(loop.num_steps)  # refuses too many before a network runs
    loop.states, loop.encoding = states, encoding
    silent = {name: None for name in ("callback", "callback_on_step_end") if name in given}
    try:
        with loop.open():
            stock(**given | silent | {"output_type": "latent", "return_dict": False})
    except Scouted as scouted:
        loop.loss = scouted.loss
    return loop


def choose(pipe, stock, given, settings, images):
    """The first start's loop, the start to use instead, the losses (images, k) of the k starts, and which of them
    was chosen, (images,).

    The first start is what a call without candidates would draw; the others come from the same generators, or from
    `latents` if it holds more. They run one after another, so that the call needs no more memory. An interrupted call
    skips those that are left.
    """
    own = given_starts(given.get("latents"), images, settings.candidates)
    loops, states, encoding = [], None, None
    for latents in own:
        latents = {"latents": latents} if "latents" in given else {}
        loops.append(scouted(pipe, stock, given | latents, settings, states, encoding))
        states, encoding = loops[-1].start[1], loops[0].encoding
        if pipe.interrupt:
            break
    losses = [loop.loss for loop in loops if loop.loss is not None]
    losses = torch.stack(losses, 1) if losses else torch.empty(images, 0)
    chosen = least(losses) if losses.numel() else torch.zeros(images, dtype=torch.long)
    first = loops[0]
    return first, (chosen_of([loop.start[0] for loop in loops], chosen), first.start[1]), losses, chosen


def given_starts(latents, images, number):
    """The starts that `latents` hold, and None for each of the `number` that is to be drawn."""
    own = [] if latents is None else list(latents.split(images))
    if own and (len(own) > number or len(own[-1]) != images):
        raise ValueError(
            f"`latents` hold {len(latents)} starts, but {images} images with `candidates` {number} take"
            f" {images} to {images * number}, a multiple of {images}. Pass as many."
        )
    return own + [None] * (number - len(own))


def least(losses):
    """Each image's start of least loss: (images, k) -> (images,). One that is not a number is never chosen."""
    return losses.nan_to_num(torch.inf).argmin(1)


def chosen_of(starts, chosen):
    """Take each image's rows from its chosen start, a tensor or a tuple or dict of them; the first's of all else."""
    first = starts[0]
    if isinstance(first, tuple):
        return tuple(chosen_of(parts, chosen) for parts in zip(*starts))
    if isinstance(first, dict):
        return {name: chosen_of([start[name] for start in starts], chosen) for name in first}
    if not torch.is_tensor(first) or first.shape[:1] != chosen.shape:
        return first
    return torch.stack(starts)[chosen.to(first.device), torch.arange(len(chosen), device=first.device)]


def restore(generators, states):
    """Set the generators to their `states`, none or one each."""
    for generator, state in zip(generators, states):
        generator.set_state(state)


def generators_of(given):
    """The call's generators, a list; torch's own for the CPU if none was passed."""
    generator = given["generator"]
    if generator is None:
        return [torch.default_generator]
    return list(generator) if isinstance(generator, (list, tuple)) else [generator]

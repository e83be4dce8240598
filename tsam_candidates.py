"""Chooses the start: draws several for each image and goes on from that with maps closest to the text.

The score is the contrast objective's loss, from forward passes alone. Ours, not the paper's.
"""

from contextlib import suppress

import torch

from .attention_processors import mean_maps, record_cross_attention, run_to_last_map
from .tsam import LatentAlignment
from .tsam_arguments import Settings


class Scouted(Exception):
    """Ends a call, because the rest would not change its starts' loss."""


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
        for generator, state in zip(generators, self.states or []):
            generator.set_state(state)
        prepared = stock(*args, **kwargs)
        self.start = prepared, [generator.get_state() for generator in generators]
        return prepared

    def predict(self, sample, *args, **kwargs):
        kwargs |= {name: value[-len(sample) :] for name, value in self.conditions.items()}
        if self.index < (self.settings.chosen_after(self.num_steps) - 1) * self.scheduler.order:
            return self.model(sample, *args, **kwargs)
        score = Settings(preset="fast", objective="contrast")
        alignment = LatentAlignment(self.text, score, self.given["num_images_per_prompt"], self.latents.device)
        layers = self.pipe.layers_of(self.settings)
        kwargs.pop("return_dict", None)
        with record_cross_attention(layers, alignment.num_tokens, stop=True) as maps:
            run_to_last_map(self.model, sample, *args, **kwargs)
        maps = mean_maps(maps, *self.latents.shape[-2:], len(layers))[-len(self.latents) :]
        self.loss = alignment.loss_of(maps).float().cpu()
        raise Scouted


def scouted(pipe, stock, given, settings, states=None, encoding=None):
    """Run and return a `Scouting` loop of one start per image. stock: the stock pipeline's call. encoding: the
    prompts', from another loop of this call."""
    loop = type("Scout", (Scouting, pipe.loop), {})(pipe, given, settings)
    settings.chosen_after(loop.num_steps)  # refuses too many before a network runs
    loop.states, loop.encoding = states, encoding
    silent = {name: None for name in ("callback", "callback_on_step_end") if name in given}
    with suppress(Scouted), loop.open():
        stock(**given | silent | {"output_type": "latent", "return_dict": False})
    return loop


def choose(pipe, stock, given, settings, images):
    """The first start's loop, the start to use instead, the losses (images, k) of the k starts, and which of them
    was chosen, (images,).

    The first start is what a call without candidates would draw; the others come from the same generators, or from
    `latents` if it holds more. They run one after another, so that the call needs no more memory. An interrupted call
    skips those that are left.
    """
    own = [] if given.get("latents") is None else list(given["latents"].split(images))
    number = settings.candidates
    if own and (len(own) > number or len(own[-1]) != images):
        raise ValueError(
            f"`latents` hold {len(given['latents'])} starts, but {images} images with `candidates` {number} take"
            f" {images} to {images * number}, a multiple of {images}. Pass as many."
        )
    loops, states, encoding = [], None, None
    for candidate in range(number):
        latents = {"latents": own[candidate] if candidate < len(own) else None} if "latents" in given else {}
        loops.append(scouted(pipe, stock, given | latents, settings, states, encoding))
        states, encoding = loops[-1].start[1], loops[0].encoding
        if pipe.interrupt:
            break
    losses = [loop.loss for loop in loops if loop.loss is not None]
    losses = torch.stack(losses, 1) if losses else torch.empty(images, 0)
    chosen = losses.argmin(1) if losses.numel() else torch.zeros(images, dtype=torch.long)
    first = loops[0]
    return first, (chosen_of([loop.start[0] for loop in loops], chosen), first.start[1]), losses, chosen


def chosen_of(starts, chosen):
    """Take each image's rows from its chosen start, a tensor or a tuple of them."""
    if isinstance(starts[0], tuple):
        return tuple(chosen_of(parts, chosen) for parts in zip(*starts))
    return torch.stack(starts)[chosen.to(starts[0].device), torch.arange(len(chosen), device=starts[0].device)]


def generators_of(given):
    """The call's generators, a list; torch's own for the CPU if none was passed."""
    generator = given["generator"]
    if generator is None:
        return [torch.default_generator]
    return list(generator) if isinstance(generator, (list, tuple)) else [generator]

"""Chooses the start: draws several for each image and goes on from that with maps closest to the text.

The score is the contrast objective's loss, from forward passes alone. Ours, not the paper's.
"""

import inspect
from copy import deepcopy

import torch

from .attention_processors import mean_maps, record_cross_attention, run_to_last_map
from .tsam import LatentAlignment, logger
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

    own: the given latents of each start of this call, None where they are drawn; the starts of one image are rows
    beside each other. states: the generators' states to draw the first from, or None for the current ones. starts: of
    each, what `prepare_latents` returned, and the states after it. losses: (starts, images) float32, None if the call
    was interrupted.
    """

    guided, reads, needed = False, True, True
    states = losses = None

    def progress_bar(self, *args, **kwargs):
        bar = self.pipe.progress_bar(total=self.settings.chosen_after(self.num_steps))
        if hasattr(bar, "set_description"):
            bar.set_description("choosing")
        return bar

    def prepare_latents(self, *args, **kwargs):
        stock = self.pipe.prepare_latents
        call, generators = inspect.signature(stock).bind(*args, **kwargs), self.generators
        call.arguments["batch_size"] //= len(self.own)
        restore(generators, self.states or [])
        self.starts = []
        for latents in self.own:
            if "latents" in self.given:
                call.arguments["latents"] = latents
            self.starts.append((stock(*call.args, **call.kwargs), states_of(generators)))
        self.running = [(self.scheduler, self.starts[0][1])]
        return self.beside([prepared for prepared, _ in self.starts])

    def beside(self, parts):
        """Rows of starts, (images, ...) each, tensors or tuples of them -> rows of all, (prompts, starts, images of a
        prompt) flattened."""
        if isinstance(parts[0], tuple):
            return tuple(map(self.beside, zip(*parts)))
        if len(parts) == 1 or not torch.is_tensor(parts[0]):
            return parts[0]
        return torch.stack([part.unflatten(0, (prompts_of(self.given), -1)) for part in parts], 1).flatten(0, 2)

    def apart(self, rows):
        """The inverse of `beside` for a tensor."""
        shape = prompts_of(self.given), len(self.own), -1
        return [part.flatten(0, 1) for part in rows.unflatten(0, shape).unbind(1)]

    def stepped(self, prediction, t, sample, *args, **kwargs):
        """Each start has a scheduler and generators of its own, as if it ran alone."""
        if len(self.own) == 1:
            return super().stepped(prediction, t, sample, *args, **kwargs)
        if len(self.running) == 1:
            self.running += [(deepcopy(self.scheduler), states) for _, states in self.starts[1:]]
        stepped, generators = [], self.generators
        for k, parts in enumerate(zip(self.apart(prediction), self.apart(sample))):
            scheduler, states = self.running[k]
            restore(generators, states)
            stepped.append(scheduler.step(parts[0], t, parts[1], *args, **kwargs)[0])
            self.running[k] = scheduler, states_of(generators)
        return self.beside(stepped), None

    def prediction(self, sample, *args, **kwargs):
        if self.index < (self.settings.chosen_after(self.num_steps) - 1) * self.scheduler.order:
            return self.model(sample, *args, **kwargs)
        alignment = LatentAlignment(self.text, score(), self.given[self.per_prompt], self.latents.device)
        layers = self.pipe.layers_of(self.settings)
        kwargs.pop("return_dict", None)
        with record_cross_attention(layers, alignment.num_tokens, stop=True) as maps:
            run_to_last_map(self.model, sample, *args, **kwargs)
        maps = mean_maps(maps, *self.latents.shape[-2:], len(layers), self.latents.shape[2:-2])[-len(self.latents) :]
        raise Scouted(torch.stack(self.apart(alignment.loss_of(maps))))


def scouted(pipe, given, settings, own, states=None, encoding=None):
    """Run and return a `Scouting` loop of the starts in `own`. encoding: the prompts', from another loop of this call
    with as many starts."""
    given = given | {name: None for name in ("callback", "callback_on_step_end") if name in given}
    given |= {pipe.loop.per_prompt: given[pipe.loop.per_prompt] * len(own)}
    loop = type("Scout", (Scouting, pipe.loop), {})(pipe, given, settings)
    settings.chosen_after(loop.num_steps)  # refuse too many before a network runs
    loop.own, loop.states, loop.encoding = own, states, encoding
    try:
        loop.run(output_type="latent", return_dict=False)
    except Scouted as scouted:
        loop.losses = scouted.loss
    return loop


def choose(pipe, given, settings, images):
    """The prompts' encoding, the start to use, the losses (images, k) of the k starts, and which of them was chosen,
    (images,).

    The first start is what a call without candidates would draw; the others come from the same generators, or from
    `latents` if it holds more. `candidate_batch` of them run at once, else one after another, so that the call needs no
    more memory. An interrupted call skips those that are left.
    """
    own = given_starts(given.get("latents"), images, settings.candidates)
    # Starts from a picture have timesteps and, inpainting, a masked picture of their own.
    size = 1 if "strength" in given else settings.candidate_batch or 1
    loops, states, encoding = [], None, None
    for k in range(0, len(own), size):
        part = own[k : k + size]
        loops.append(scouted(pipe, given, settings, part, states, encoding if len(part) == size else None))
        states, encoding = loops[-1].starts[-1][1], loops[0].encoding
        if pipe.interrupt:
            break
    losses = [loop.losses for loop in loops if loop.losses is not None]
    losses = torch.cat(losses).T if losses else torch.empty(images, 0)
    chosen = least(losses) if losses.numel() else torch.zeros(images, dtype=torch.long)
    starts = sum((loop.starts for loop in loops), [])
    start = chosen_of([prepared for prepared, _ in starts], chosen), starts[0][1]
    return encoding if size == 1 else None, start, losses, chosen


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
    if (losses == losses[:, :1]).all():
        logger.warning("T-SAM finds all starts alike, so that each image keeps its first.")
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


def prompts_of(given):
    """Count a call's prompts; 1 for what stock refuses."""
    prompt = given["prompt_embeds"] if given["prompt"] is None else given["prompt"]
    return 1 if isinstance(prompt, str) or not hasattr(prompt, "__len__") else len(prompt)


def states_of(generators):
    return [generator.get_state() for generator in generators]


def restore(generators, states):
    """Set the generators to their `states`, none or one each."""
    for generator, state in zip(generators, states):
        generator.set_state(state)


def generators_of(given, device):
    """The call's generators, a list; the device's own if none was passed."""
    generator, device = given["generator"], torch.device(device)
    if generator is None and device.type == "cuda":
        return [torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]]
    if generator is None:
        return [torch.default_generator]
    return list(generator) if isinstance(generator, (list, tuple)) else [generator]

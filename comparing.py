"""Draws one prompt without and with T-SAM from one seed, and keeps what it saw: for the command and the demo."""

import functools
import inspect
import math
from typing import Any, NamedTuple

import torch

from .attention_processors import lock_of, mean_maps, record_cross_attention
from .cli import check_prompt
from .tsam import LatentAlignment
from .tsam_layout import check_regions, layout_of


class Drawn(NamedTuple):
    """A picture, and what its G denoising steps saw when they predicted the noise: in guided ones, after the updates.

    losses: G numbers. guided: the guided steps. attentions: those of `LatentAlignment.attentions` for all steps, plus
    uncut, all tokens of the prompt, and regions, if any, as `figures.figure` draws them.
    """

    picture: Any
    losses: list
    guided: list
    attentions: dict


def compare(pipe, prompt, seed, settings, on_step=None, **arguments):
    """Draw one prompt without and with T-SAM, from one seed: a pair of `Drawn`. settings: `Settings`, guided.
    arguments: stock's.

    on_step: called as (pipe, "T-SAM" or "stock", step, latents, loss) after every step. If it sets `pipe._interrupt`,
    the drawing ends and None is returned. ValueError for a picture that breaks.
    """
    layers, model = pipe.layers_of(settings), getattr(pipe, pipe.denoiser)
    ours, usual = settings.given, inspect.signature(pipe.__call__).parameters
    given = {name: each.default for name, each in usual.items()} | arguments | ours | {"prompt": prompt}

    def named(method):
        """`method`, given the call's arguments by name."""
        names = given.keys() & inspect.signature(method).parameters.keys()
        return functools.partial(method, **{name: given[name] for name in names})

    text = named(pipe.get_text_self_attention)()
    check_prompt(prompt, text.content.sum())
    size = "alpha" if settings.relative_step is None else "relative_step"
    lower = {"stock": "`guidance_scale`, or pass another `dtype`"}
    lower["T-SAM"] = f"`{size}`, which is {getattr(settings, size)}, or {lower['stock']}"
    layout = layout_of(check_regions(settings.regions, 1), text, named(pipe.words_of))

    def run(name, **changes):
        steps, seen = [], LatentAlignment(text, settings, device="cpu", layout=layout)

        def keep(pipe, i, t, tensors):
            latents = tensors["latents"]
            maps = mean_maps(recorded, *latents.shape[-2:])[-1:].cpu()  # of the half with the prompt
            steps.append(i)
            seen.maps.append(maps)
            seen.losses.append(seen.loss_of(maps))
            loss = seen.losses[-1].item()
            if not (math.isfinite(loss) and latents.isfinite().all()):
                raise ValueError(f"{name}'s picture broke at step {i + 1}: no finite numbers. Lower {lower[name]}.")
            if on_step is not None:
                on_step(pipe, name, i, latents, loss)
            return {}

        pipe.set_progress_bar_config(desc=name)
        generator = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
        call = {**arguments, **ours, **changes, "generator": generator, "callback_on_step_end": keep}
        # Hold the lock, because another thread's call would draw through this recorder.
        with lock_of(model), record_cross_attention(layers, seen.num_tokens, graph=False) as recorded:
            output = pipe(prompt, **call)
        guided = list(dict.fromkeys(output.steps))
        attentions = seen.attentions(steps)[0] | {"uncut": named(pipe.words_of)(prompt)}
        if layout is not None:
            words = layout.tokens[0][:, text.content[0]]
            own = [of_phrase.nonzero().flatten().tolist() for of_phrase in words]
            attentions["regions"] = list(zip(layout.regions[0], own))
        return Drawn(output.images[0], seen.losses_per_image()[0].tolist(), guided, attentions)

    tsam = run("T-SAM")
    stock = None if pipe.interrupt else run("stock", tsam_steps=0)
    return None if pipe.interrupt else (stock, tsam)


def draw(pipe, prompt, seed, settings, **arguments):
    """`compare` at the last guided step: both pictures, both losses, the number of guided steps, and the attentions,
    with stock and T-SAM in place of the steps."""
    pair = compare(pipe, prompt, seed, settings, **arguments)
    guided = pair[1].guided
    pictures, losses = [drawn.picture for drawn in pair], [drawn.losses[guided[-1]] for drawn in pair]
    attentions = {**pair[1].attentions, "steps": ["stock", "T-SAM"]}
    for name in ("maps", "similarity"):
        attentions[name] = torch.stack([drawn.attentions[name][guided[-1]] for drawn in pair])
    if "region_shares" in attentions:
        shares = [drawn.attentions["region_shares"] for drawn in pair]
        attentions["region_shares"] = {
            phrase: torch.stack([share[phrase][guided[-1]] for share in shares]) for phrase in shares[0]
        }
    return pictures, losses, len(guided), attentions

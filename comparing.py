"""One prompt without and with T-SAM from one seed, and what was seen in both: for the command and the demo."""

import functools
import inspect
from typing import Any, NamedTuple

import torch

from .attention_processors import lock_of, mean_maps, record_cross_attention
from .tsam import LatentAlignment
from .tsam_layout import check_regions, layout_of


class Drawn(NamedTuple):
    """A picture, and what was seen in its G denoising steps, when they predict the noise: after a guided one's updates.

    losses: G numbers. guided: which steps were. attentions: what `LatentAlignment.attentions` returns, of all steps;
    with regions also these, as `figures.figure` draws them.
    """

    picture: Any
    losses: list
    guided: list
    attentions: dict


def compare(pipe, prompt, seed, settings, on_step=None, **arguments):
    """One prompt without and with T-SAM, from one seed: a pair of `Drawn`. settings: `Settings`, guided. arguments: of
    the stock call.

    on_step: called as (pipe, "T-SAM" or "stock", step, latents, loss) after every step. None is returned where it sets
    `pipe._interrupt`, which ends the drawing.
    """
    layers, model = pipe.layers_of(settings), getattr(pipe, pipe.denoiser)
    ours = settings.given
    given = arguments | ours | {"prompt": prompt}

    def named(method):
        """The arguments of `method` that are given."""
        names = given.keys() & inspect.signature(method).parameters.keys()
        return functools.partial(method, **{name: given[name] for name in names})

    text = named(pipe.get_text_self_attention)()
    if text.content.sum() < 2:
        raise ValueError(f"T-SAM aligns words with each other: {prompt!r} needs two or more.")
    layout = layout_of(check_regions(settings.regions, 1), text, named(pipe.words_of))

    def run(name, **changes):
        steps, seen = [], LatentAlignment(text, settings, device="cpu", layout=layout)

        def keep(pipe, i, t, tensors):
            latents = tensors["latents"]
            maps = mean_maps(recorded, *latents.shape[-2:])[-1:].cpu()  # of the half with the prompt
            steps.append(i)
            seen.maps.append(maps)
            seen.losses.append(seen.loss_of(maps))
            if on_step is not None:
                on_step(pipe, name, i, latents, seen.losses[-1].item())
            return {}

        pipe.set_progress_bar_config(desc=name)
        generator = torch.Generator("cpu").manual_seed(seed)  # the same noise on every device
        call = {**arguments, **ours, **changes, "generator": generator, "callback_on_step_end": keep}
        # Another thread's call, which holds the lock, would draw through this one's recorder.
        with lock_of(model), record_cross_attention(layers, seen.num_tokens, graph=False) as recorded:
            output = pipe(prompt, **call)
        guided = list(dict.fromkeys(output.steps))
        attentions = seen.attentions(steps)[0]
        if layout is not None:
            words = layout.tokens[0][:, text.content[0]]
            own = [of_phrase.nonzero().flatten().tolist() for of_phrase in words]
            attentions["regions"] = list(zip(layout.regions[0], own))
        return Drawn(output.images[0], seen.losses_per_image()[0].tolist(), guided, attentions)

    tsam = run("T-SAM")
    stock = None if pipe.interrupt else run("stock", tsam_steps=0)
    return None if pipe.interrupt else (stock, tsam)


def draw(pipe, prompt, seed, settings, **arguments):
    """`compare` at the last guided step: both pictures, both losses, how many steps were guided, and the attentions,
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

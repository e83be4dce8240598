"""What T-SAM has to work with on the shipped model: T, the cross-attention maps, and the size of an update.

    python benchmarks/anatomy.py

Over two-solid prompts of the tuning split, one seed each: where a noun's row of T goes; how similar the maps of two
words are along the stock trajectory, in pictures that came out right and in those that did not; and how far one update
with alpha = 1 moves the model's input, relative to its norm, under each objective. Goes to results/anatomy.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from rows import rounded

from diffusers_tsam.evaluation.generate import load
from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.shapes.scenes import prompts, words_of_solids
from diffusers_tsam.tsam import OBJECTIVES, LatentAlignment, cosine_similarity, normalize_text_attention, smooth
from diffusers_tsam.tsam_pipeline import frozen


RESULTS = Path(__file__).parent / "results" / "anatomy.json"
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)


def kinds_of(caption):
    """Pairs of a two-solid caption's words by kind: {name: [(i, j), ...]}, i > j."""
    (colour_1, noun_1), (colour_2, noun_2) = words_of_solids(caption)
    joiner = noun_1 + 1
    return {
        "noun - own colour": [(noun_1, colour_1), (noun_2, colour_2)],
        "noun - other noun": [(noun_2, noun_1)],
        "colour - other colour": [(colour_2, colour_1)],
        "noun 2 - colour 1": [(noun_2, colour_1)],
        "noun - own article": [(noun_1, colour_1 - 1), (noun_2, colour_2 - 1)],
        "noun 2 - 'and'": [(noun_2, joiner)],
        "noun - itself": [(noun_1, noun_1), (noun_2, noun_2)],
    }


def means(matrices, captions):
    """{kind: the mean of each caption's pairs, (captions,)} of a matrix a caption."""
    kinds = [kinds_of(caption) for caption in captions]
    return {
        name: np.array([np.mean([matrix[pair] for pair in own[name]]) for matrix, own in zip(matrices, kinds)])
        for name in kinds[0]
    }


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="sd", help="sd, sink, or the folder of another small Stable Diffusion")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    pipe, _, arguments = load(args.model, torch.device("cpu"), guidance_scale=4.0)
    pipe.set_progress_bar_config(disable=True)
    wanted = prompts(2, "tune", args.prompts)
    captions, noise = [caption for caption, _ in wanted], torch.Generator()
    kept = {0: torch.cat([torch.randn(1, 4, 16, 16, generator=noise.manual_seed(k)) for k in range(len(captions))])}

    def keep(pipe, i, t, tensors):
        kept[i + 1] = tensors["latents"].clone()
        return {}

    watch = {"tsam_steps": args.steps, "alpha": 0.0, "refinement_steps": (), "output_attentions": True}
    call = arguments | watch | {"num_inference_steps": args.steps, "callback_on_step_end": keep}
    output = pipe(captions, latents=kept[0], **call)
    right = np.array([set(own) <= seen for (_, own), seen in zip(wanted, Judge.from_pretrained().read(output.images))])

    text, rows, similar, sizes = pipe.get_text_self_attention(captions), {}, {}, {}
    for gamma in (1.0, 2.0, 4.0):
        matrices = normalize_text_attention(text.attention, text.content, gamma)[:, 1:, 1:]
        rows[gamma] = {kind: values.mean() for kind, values in means(matrices, captions).items()}
    steps = [int(fraction * args.steps) for fraction in FRACTIONS]
    for step in steps:
        maps = [attention["maps"][step][None] for attention in output.attentions]
        found = means([cosine_similarity(smooth(each).flatten(2))[0] for each in maps], captions)
        del found["noun - itself"]
        groups = {name: own for name, own in (("right", right), ("wrong", ~right)) if own.any()}
        similar[step] = {k: {name: values[own].mean() for name, own in groups.items()} for k, values in found.items()}

    embeds = {"encoder_hidden_states": pipe.encode_prompt(captions, "cpu", 1, False)[0]}
    for objective in OBJECTIVES:
        settings, sizes[objective] = pipe.settings(alpha=1.0, gamma=2.0, objective=objective), {}
        for step in steps:
            before, t, alignment = kept[step], pipe.scheduler.timesteps[step], LatentAlignment(text, settings)
            with frozen(pipe.unet):
                moved = pipe.align_latents(alignment, before, t, [t], embeds, pipe.layers_of(settings))
            moves = (moved - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
            sizes[objective][step] = moves.mean().item()

    found = {"prompts": len(captions), "steps": args.steps, "stock_right": sum(right), "alpha": 1.0, "gamma": 2.0}
    found |= {"rows_of_t": rows, "similarity": similar, "relative_update": sizes}
    RESULTS.write_text(json.dumps(rounded(found), indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()

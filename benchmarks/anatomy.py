"""What T-SAM has to work with on the shipped model: T, the cross-attention maps, and the size of an update.

    python benchmarks/anatomy.py

Three tables over two-solid prompts of the tuning split, one seed each: where a noun's row of T goes; how similar the
maps of two words are along the stock trajectory, in pictures that came out right and in those that did not; and how far
one update with alpha = 1 moves the model's input, relative to its norm, under each objective.
"""

import argparse

import numpy as np
import torch
from diffusers.utils import logging

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.attention_processors import (
    OBJECTIVES,
    LatentAlignment,
    cosine_similarity,
    normalize_text_attention,
    smooth,
)
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.shapes.scenes import prompts, words_of_solids


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


def mean_of(matrix, caption, kind):
    return float(np.mean([matrix[i, j] for i, j in kinds_of(caption)[kind]]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(MODELS["sd"]), help="folder of a model of the shapes world")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    logging.disable_progress_bar()
    pipe = StableDiffusionTSAMPipeline.from_pretrained(args.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    wanted = prompts(2, "tune", args.prompts)
    captions = [caption for caption, _ in wanted]
    kinds = list(kinds_of(captions[0]))

    text = pipe.get_text_self_attention(captions)
    print("| a noun's row of T, gamma |", " | ".join(kinds), "|\n|---|" + "---|" * len(kinds))
    for gamma in (1.0, 2.0, 4.0):
        matrix = normalize_text_attention(text.attention, text.content, gamma)[:, 1:, 1:]
        cells = (np.mean([mean_of(m, c, kind) for m, c in zip(matrix, captions)]) for kind in kinds)
        print(f"| {gamma:g} |", " | ".join(f"{100 * cell:.0f} %" for cell in cells), "|")

    kept = {}

    def keep(pipe, i, t, kwargs):
        kept[i + 1] = kwargs["latents"].clone()
        return kwargs

    generator = [torch.Generator().manual_seed(seed) for seed in range(len(captions))]
    kept[0] = torch.cat(
        [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(len(captions))]
    )
    output = pipe(
        captions,
        generator=generator,
        num_inference_steps=args.steps,
        **ARGUMENTS["sd"],
        tsam_steps=args.steps,
        alpha=0.0,
        refinement_steps=(),
        output_attentions=True,
        callback_on_step_end=keep,
    )
    right = [set(solids) <= seen for (_, solids), seen in zip(wanted, Judge.from_pretrained().read(output.images))]
    print(
        f"\n{sum(right)} of {len(right)} stock pictures are right. Mean C of two words' maps, right / wrong pictures:\n"
    )
    print("| step |", " | ".join(kinds[:-1]), "|\n|---|" + "---|" * (len(kinds) - 1))
    steps = [int(fraction * args.steps) for fraction in FRACTIONS]
    for step in steps:
        similarity = [cosine_similarity(smooth(a["maps"][step][None]).flatten(2))[0] for a in output.attentions]
        cells = []
        for kind in kinds[:-1]:
            values = [mean_of(m, c, kind) for m, c in zip(similarity, captions)]
            groups = [[v for v, r in zip(values, right) if r == wanted_right] for wanted_right in (True, False)]
            cells.append(" / ".join(f"{np.mean(group):.2f}" if group else "-" for group in groups))
        print(f"| {step} |", " | ".join(cells), "|")

    print("\n| one update, alpha = 1, gamma = 2: relative size at step |", " | ".join(map(str, steps)), "|")
    print("|---|" + "---|" * len(steps))
    embeds = pipe.encode_prompt(captions, "cpu", 1, False)[0]
    layers, level = pipe.cross_attention_layers()
    for objective in OBJECTIVES:
        cells = []
        for step in steps:
            alignment = LatentAlignment(text, 1.0, 2.0, objective)
            with torch.no_grad():
                t = pipe.scheduler.timesteps[step]
                moved = pipe.align_latents(alignment, kept[step], t, layers, level, step, 1, embeds)
            cells.append(((moved - kept[step]).flatten(1).norm(dim=1) / kept[step].flatten(1).norm(dim=1)).mean())
        print(f"| {objective} |", " | ".join(f"{100 * cell:.2f} %" for cell in cells), "|")


if __name__ == "__main__":
    main()

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
from diffusers.utils import logging

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS
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
    rows = {}
    for gamma in (1.0, 2.0, 4.0):
        matrix = normalize_text_attention(text.attention, text.content, gamma)[:, 1:, 1:]
        rows[gamma] = {k: np.mean([mean_of(m, c, k) for m, c in zip(matrix, captions)]) for k in kinds}

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
    steps = [int(fraction * args.steps) for fraction in FRACTIONS]
    similar = {}
    for step in steps:
        matrices = [cosine_similarity(smooth(a["maps"][step][None]).flatten(2))[0] for a in output.attentions]
        similar[step] = {}
        for kind in kinds[:-1]:
            values = np.array([mean_of(m, c, kind) for m, c in zip(matrices, captions)])
            groups = {name: values[np.array(right) == wanted] for name, wanted in (("right", True), ("wrong", False))}
            similar[step][kind] = {name: group.mean() for name, group in groups.items() if len(group)}

    conditions, sizes = {"encoder_hidden_states": pipe.encode_prompt(captions, "cpu", 1, False)[0]}, {}
    for objective in OBJECTIVES:
        sizes[objective] = {}
        for step in steps:
            settings = pipe.settings(alpha=1.0, gamma=2.0, objective=objective)
            call = (kept[step], pipe.scheduler.timesteps[step], [pipe.scheduler.timesteps[step]], conditions)
            with torch.no_grad(), frozen(pipe.unet):
                moved = pipe.align_latents(LatentAlignment(text, settings), *call, pipe.layers_of(settings))
            moves = (moved - kept[step]).flatten(1).norm(dim=1) / kept[step].flatten(1).norm(dim=1)
            sizes[objective][step] = moves.mean().item()

    found = {"prompts": len(captions), "steps": args.steps, "stock_right": sum(right), "alpha": 1.0, "gamma": 2.0}
    found |= {"rows_of_t": rows, "similarity": similar, "relative_update": sizes}
    RESULTS.parent.mkdir(exist_ok=True)
    found = json.loads(json.dumps(found, default=float), parse_float=lambda number: round(float(number), 4))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(RESULTS.read_text())


if __name__ == "__main__":
    main()

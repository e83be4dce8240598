"""The paper's mechanism in small: an attention sink hides who belongs to whom from the picture, T-SAM brings it back.

    python examples/sink.py

The prompts and seeds were picked. How often it helps: benchmarks/RESULTS.md.
"""

import argparse

import torch
from matplotlib.figure import Figure

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.figures import draw_picture, save
from diffusers_tsam.shapes import ARGUMENTS, MODELS, TUNED
from diffusers_tsam.shapes.sink import add_sink


SEEDS = {
    "an orange sphere and a red cone": 2658822507,
    "a green sphere and a blue star": 3664125443,
    "a black cylinder and a green ring": 9,
    "a purple sphere and a blue cone": 0,
}

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=25)
args = parser.parse_args()

pipe = add_sink(StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"]))
drawn = {}
for name, chosen in {"stock": {"tsam_steps": 0}, "T-SAM": TUNED["sink"]}.items():
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS.values()]
    drawn[name] = pipe(
        list(SEEDS), generator=generators, num_inference_steps=args.steps, **ARGUMENTS["sd"], **chosen
    ).images

figure = Figure((2.2 * len(SEEDS), 4.8), layout="constrained")
for name, pictures, row in zip(drawn, drawn.values(), figure.subplots(2, len(SEEDS))):
    row[0].set_ylabel(name)
    for prompt, picture, axes in zip(SEEDS, pictures, row):
        draw_picture(axes, picture)
        if name == "stock":
            axes.set_title(prompt.replace(" and ", "\nand "), size=10)
save(figure, "sink.png")

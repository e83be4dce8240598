"""What T-SAM sees: T of the text encoder, S of the cross-attention, and where each word looks, step by step.

    python examples/attention.py

`--relative-step 0` only watches: the picture is the stock one, and so are its maps.
"""

import argparse

import torch
from matplotlib.figure import Figure

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.figures import draw_map, draw_picture, draw_table, save
from diffusers_tsam.shapes import ARGUMENTS, MODELS


parser = argparse.ArgumentParser()
parser.add_argument("--prompt", default="a red cube and a blue sphere")
parser.add_argument("--seed", type=int, default=74)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--relative-step", type=float, default=0.05)
args = parser.parse_args()

# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), and settings without ARGUMENTS
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
settings = {"preset": "fast", "relative_step": args.relative_step, "num_inference_steps": args.steps} | ARGUMENTS["sd"]
generator = torch.Generator().manual_seed(args.seed)
output = pipe(args.prompt, generator=generator, output_attentions=True, **settings)

picture, seen = output.images[0], output.attentions[0]  # maps and S are those before a step's first update
words, steps = seen["tokens"], seen["steps"]
figure = Figure((max(1.2 * len(steps) + 1, 13), 1.2 * len(words) + 5), layout="constrained")
above, below = figure.subfigures(2, height_ratios=(4, 1.2 * len(words)))

first, *panels = above.subplots(1, 4)
draw_picture(first, picture)
tables = {"T": seen["text_attention"], "S, first step": seen["similarity"][0], "S, last step": seen["similarity"][-1]}
for axes, (title, table) in zip(panels, tables.items()):
    draw_table(axes, table, words)  # row: a word; column: the words up to it
    axes.set_title(title)

rows = below.subplots(len(words), len(steps), squeeze=False)
for word, row, maps in zip(words, rows, seen["maps"].transpose(0, 1)):
    row[0].set_ylabel(word)
    for axes, attention in zip(row, maps):
        draw_map(axes, attention, maps.max(), picture)  # a word's maps share one scale
for axes, step in zip(rows[0], steps):
    axes.set_title(f"step {step}")
save(figure, "attention.png")

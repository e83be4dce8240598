"""What T-SAM sees: T of the text encoder, S of the cross-attention, and where each word looks, step by step.

    python examples/attention.py

`--alpha 0` only watches: the picture is the stock one, and so are its maps.
"""

import argparse

import torch
from matplotlib.figure import Figure

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS, TUNED


parser = argparse.ArgumentParser()
parser.add_argument("--prompt", default="a red cube and a blue sphere")
parser.add_argument("--seed", type=int, default=74)
parser.add_argument("--steps", type=int, default=50)
parser.add_argument("--alpha", type=float, default=TUNED["sd"]["alpha"])
args = parser.parse_args()

# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), and settings = {"schedule": "fast"}
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
settings = TUNED["sd"] | ARGUMENTS["sd"] | {"num_inference_steps": args.steps, "alpha": args.alpha}
generator = torch.Generator().manual_seed(args.seed)
output = pipe(args.prompt, generator=generator, output_attentions=True, **settings)

seen = output.attentions[0]  # of the first picture; maps and S are those before a step's first update
words, steps = seen["tokens"], seen["steps"]
figure = Figure((1.2 * len(steps) + 1, 1.2 * len(words) + 5), layout="constrained")
above, below = figure.subfigures(2, height_ratios=(4, 1.2 * len(words)))

panels = above.subplots(1, 4)
panels[0].imshow(output.images[0])
panels[0].set_title("picture")
tables = {"T": seen["text_attention"], "S, first step": seen["similarity"][0], "S, last step": seen["similarity"][-1]}
for axes, (title, table) in zip(panels[1:], tables.items()):
    axes.imshow(table, vmin=0, vmax=1)  # row: a word; column: the words up to it
    axes.set_title(title)
    axes.set_xticks(range(len(words)), words, rotation=90)
    axes.set_yticks(range(len(words)), words)

rows = below.subplots(len(words), len(steps), squeeze=False)
for word, row, maps in zip(words, rows, seen["maps"].transpose(0, 1)):
    row[0].set_ylabel(word)
    for axes, step, attention in zip(row, steps, maps):
        axes.imshow(attention, "inferno", vmin=0, vmax=maps.max())  # a word's maps share one scale
        axes.set(xticks=[], yticks=[])
        if axes in rows[0]:
            axes.set_title(f"step {step}")
figure.savefig("attention.png")

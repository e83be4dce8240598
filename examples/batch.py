"""Several prompts, several seeds, one call: a row of pictures for every prompt, a column for every seed.

The prompts may be of any length: each picture has its own words, its own loss and its own update, so it is the same as
if it had been drawn alone.

    python examples/batch.py
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS


PROMPTS = ["a red cube and a blue sphere", "a green cube and a purple ring and a red star", "a white cone"]
SEEDS = [74, 1, 2]

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), and settings without ARGUMENTS
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
settings = {"preset": "fast"} | ARGUMENTS["sd"] | {"num_inference_steps": args.steps, "output_type": "np"}

prompts = [prompt for prompt in PROMPTS for _ in SEEDS]
seeds = SEEDS * len(PROMPTS)
together = pipe(prompts, generator=[torch.Generator().manual_seed(seed) for seed in seeds], **settings)

for prompt, seed, losses in zip(prompts, seeds, together.losses):
    print(f"{prompt}, seed {seed}: loss {losses[0]:.3f} before the first update, {losses[-1]:.3f} before the last")

alone = pipe(prompts[0], generator=torch.Generator().manual_seed(seeds[0]), **settings)
difference = abs(together.images[0] - alone.images[0]).max()
print(f"The first picture alone: no pixel differs by more than {difference:.1e}, where white is 1")

pictures = pipe.numpy_to_pil(together.images)
grid = make_image_grid(pictures, rows=len(PROMPTS), cols=len(SEEDS), resize=max(192, pictures[0].width))
grid.save("batch.png")

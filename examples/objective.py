"""T-SAM with a loss of your own: a function of the maps and of what is known of the prompts, a loss per image.

This one is in the spirit of Attend-and-Excite: the noun that is seen least has to be seen somewhere. It is told the
nouns, where T-SAM's own loss reads what belongs together out of the text. From the left: stock, T-SAM, and this loss.

    python examples/objective.py
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.tsam import smooth


NOUNS = {"cube", "sphere"}
SEEDS = [74, 30]  # stock forgets the sphere, and draws something unasked beside

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()


def neglect(maps, text):
    """1 minus the highest attention to the noun that is seen least: maps (B, N, H, W), `Syntax` -> (B,).

    A token's map is at the token's place in the prompt, where `text.content` (B, N) is true for the prompt's own.
    """
    peaks = smooth(maps).amax((2, 3))  # (B, N)
    losses = []
    for peak, own, tokens in zip(peaks, text.content, text.tokens):
        nouns = torch.tensor([token in NOUNS for token in tokens], device=peak.device)
        losses.append(1 - peak[own][nouns].min())
    return torch.stack(losses)


# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), and settings without ARGUMENTS
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
settings = {"preset": "fast"} | ARGUMENTS["sd"] | {"num_inference_steps": args.steps}


def draw(**changes):
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipe(["a red cube and a blue sphere"] * len(SEEDS), generator=generators, **{**settings, **changes})


stock, tsam = draw(tsam_steps=0), draw()
own = draw(objective=neglect, alpha=3.0)  # found by trying: a loss has its own scale
for seed, losses in zip(SEEDS, own.losses):
    print(f"seed {seed}: the least seen noun's highest attention went from {1 - losses[0]:.2f} to {1 - losses[-1]:.2f}")
pictures = [image for images in zip(stock.images, tsam.images, own.images) for image in images]
make_image_grid(pictures, rows=len(SEEDS), cols=3, resize=256).save("objective.png")

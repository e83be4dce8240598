"""Where things are to be: words of the prompt are held to boxes or masks, by the same updates that hold them to T.

    python examples/layout.py

Left: stock; middle: the red cube on the left, the blue sphere on the right; right: the other way round, the sphere in a
round mask. A box is (left, top, right, bottom) in fractions of the picture, a mask a tensor.
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS


parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=3)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), and settings without ARGUMENTS
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
settings = {"preset": "fast"} | ARGUMENTS["sd"] | {"num_inference_steps": args.steps}
prompt = "a red cube and a blue sphere"
LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
row, column = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(64) + 0.5, indexing="ij")
DISC = (row - 32) ** 2 + (column - 16) ** 2 < 15**2  # in the middle of the left half


def draw(**changes):
    generator = torch.Generator().manual_seed(args.seed)
    return pipe(prompt, generator=generator, output_attentions=True, **{**settings, **changes})


stock = draw(tsam_steps=0).images[0]
outputs = [draw(regions={"a red cube": cube, "sphere": sphere}) for cube, sphere in ((LEFT, RIGHT), (RIGHT, DISC))]
for output in outputs:
    for phrase, shares in output.attentions[0]["region_shares"].items():
        print(
            f"{phrase}: {shares[0]:.0%} of its attention inside before the first update, {shares[-1]:.0%} at the last"
        )

pictures = [stock, *(output.images[0] for output in outputs)]
make_image_grid(pictures, rows=1, cols=3, resize=256).save("layout.png")

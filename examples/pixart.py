"""PixArt-α without T-SAM and with it, from the same seed: stock forgets the orange star, T-SAM draws it.

A picked prompt and seed; the README has how often T-SAM helps. With the small model that ships, on a CPU:

    python examples/pixart.py

With PixArt-α itself, on a GPU:

    python examples/pixart.py --model PixArt-alpha/PixArt-XL-2-512x512 --prompt "a black car and a white clock"
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import PixArtAlphaTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=MODELS["pixart"], help="folder or Hub id")
parser.add_argument("--prompt", default="a red cube and an orange star and a yellow cone")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = PixArtAlphaTSAMPipeline.from_pretrained(args.model, dtype=dtype).to(device)

# The fast preset guides the first fifth of the steps. The small model has a guidance scale of its own.
settings = {"preset": "fast"} | (ARGUMENTS["pixart"] if args.model == MODELS["pixart"] else {})


def draw(**changes):
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same noise everywhere
    return pipe(args.prompt, num_inference_steps=args.steps, generator=generator, **{**settings, **changes})


stock = draw(tsam_steps=0).images[0]
tsam = draw().images[0]
make_image_grid([stock, tsam], rows=1, cols=2, resize=max(256, tsam.width)).save("pixart.png")

"""Stable Diffusion without T-SAM and with it, from the same seed: stock forgets the blue sphere, T-SAM draws it.

With the small model that ships, on a CPU:

    python examples/stable_diffusion.py

With Stable Diffusion 1.5, on a GPU:

    python examples/stable_diffusion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --prompt "a black car and a white clock" --seed 0
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=MODELS["sd"], help="folder or Hub id")
parser.add_argument("--prompt", default="a red cube and a blue sphere")
parser.add_argument("--seed", type=int, default=74)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionTSAMPipeline.from_pretrained(args.model, dtype=dtype).to(device)

# The fast preset guides the first fifth of the steps. The small model has a guidance scale of its own.
settings = {"preset": "fast"} | (ARGUMENTS["sd"] if args.model == MODELS["sd"] else {})


def draw(**changes):
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same noise everywhere
    return pipe(args.prompt, num_inference_steps=args.steps, generator=generator, **{**settings, **changes})


stock = draw(tsam_steps=0).images[0]
tsam = draw().images[0]
make_image_grid([stock, tsam], rows=1, cols=2, resize=max(256, tsam.width)).save("stable_diffusion.png")

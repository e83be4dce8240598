"""Stable Diffusion XL without T-SAM and with it, from one seed, as modular blocks. Not run on the real weights here:

    python examples/sdxl.py --prompt "a black car and a white clock"

Other workflows (image2image, inpainting, controlnet_text2image, ...) and guiders take the same arguments.
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import StableDiffusionXLTSAMBlocks


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0", help="folder or Hub id")
parser.add_argument("--prompt", default="a black car and a white clock")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionXLTSAMBlocks().get_workflow("text2image").init_pipeline(args.model)
pipe.load_components(dtype=dtype)
pipe.to(device)
pipe.vae.to(torch.float32)  # SDXL's overflows in float16
pipe.unet.enable_gradient_checkpointing()  # a guided pass: a quarter less memory, 1.4 times the operations


def draw(**changes):
    # The light preset guides the first fifth of the steps, each once.
    settings = {"preset": "light", "output": "images", **changes}
    generator = torch.Generator().manual_seed(args.seed)  # on the CPU: the same noise everywhere
    return pipe(prompt=args.prompt, num_inference_steps=args.steps, generator=generator, **settings)[0]


stock = draw(tsam_steps=0)
tsam = draw()
make_image_grid([stock, tsam], rows=1, cols=2, resize=max(256, tsam.width)).save("sdxl.png")

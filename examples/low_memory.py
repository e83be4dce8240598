"""T-SAM on a small graphics card: what diffusers has against running out of memory works under guidance, too.

A guided step needs the most, since it keeps what its backward pass reads; gradient checkpointing keeps little of it.
On a CPU, this draws before and after, and compares; on a GPU, it prints how much memory was used at most.

    python examples/low_memory.py --model stable-diffusion-v1-5/stable-diffusion-v1-5
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=MODELS["sd"], help="folder or Hub id")
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

gpu = torch.cuda.is_available()
device, dtype = ("cuda", torch.float16) if gpu else ("cpu", torch.float32)
pipe = StableDiffusionTSAMPipeline.from_pretrained(args.model, dtype=dtype)
# The fast preset guides fewer steps, which saves time; a guided step takes as much memory.
settings = {"preset": "fast"} | (ARGUMENTS["sd"] if args.model == MODELS["sd"] else {})
prompts = ["a red cube and a blue sphere", "a black cone and a white ring"]


def draw():
    generators = [torch.Generator().manual_seed(seed) for seed in (74, 1)]
    return pipe(prompts, generator=generators, num_inference_steps=args.steps, output_type="np", **settings).images


plain = None if gpu else draw()

pipe.unet.enable_gradient_checkpointing()  # computes again, in the backward pass, what it would have kept
pipe.enable_attention_slicing()  # head by head; of use only where torch has no memory-efficient attention
pipe.vae.enable_slicing()  # decodes one image at a time
pipe.vae.enable_tiling()  # and a large one in overlapping parts, which changes it a little
pipe.enable_model_cpu_offload(device=device)  # only the model that runs is on the GPU
# Not `unet.enable_layerwise_casting`: it works, but the backward pass needs the weights as they were computed with, so
# that guidance holds many of them twice.

frugal = draw()
if gpu:
    print(f"At most {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
else:
    print(f"No pixel differs by more than {abs(frugal - plain).max():.1e}, where white is 1")
pictures = pipe.numpy_to_pil(frugal)
make_image_grid(pictures, rows=1, cols=2, resize=max(256, pictures[0].width)).save("low_memory.png")

"""T-SAM with a stopping rule of your own: an image is moved only while its own loss is above a limit.

The call moves every image of a batch equally often. Here it guides nothing (`tsam_steps=0`), and a callback aligns the
latents between two steps, from the second on. Above, the stock pictures; below, the aligned ones.

    python examples/callback.py
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import LatentAlignment, StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS


LIMIT, UPDATES = 2.9, 10  # the loss that is low enough, and how many updates a step gets at most
SEEDS = [74, 30, 1, 2]  # stock forgets the sphere at the first, and draws something unasked at the second

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), α 10, γ 2, and a limit that suits its losses
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
prompts = ["a red cube and a blue sphere"] * len(SEEDS)
alignment = LatentAlignment(pipe.get_text_self_attention(prompts), pipe.settings(alpha=1.0, gamma=4.0))
layers = pipe.cross_attention_layers(16)
moves = [0] * len(SEEDS)


def align(pipe, i, t, tensors):
    """Before one of the first fifth of the steps, move the images whose words look at the wrong places."""
    latents, conditions = tensors["latents"], {"encoder_hidden_states": tensors["prompt_embeds"]}
    if i + 1 < max(args.steps // 5, 2):
        for _ in range(UPDATES):
            t = pipe.scheduler.timesteps[i + 1]
            moved = pipe.align_latents(alignment, latents, t, (t,), conditions, layers)
            above = alignment.losses[-1] > LIMIT  # taken before the move
            latents = moved.where(above[:, None, None, None], latents)
            moves[:] = [number + more for number, more in zip(moves, above.tolist())]
            if not above.any():
                break
    return {"latents": latents}


def draw(**callback):
    settings = ARGUMENTS["sd"] | {"generator": [torch.Generator().manual_seed(seed) for seed in SEEDS]} | callback
    return pipe(prompts, num_inference_steps=args.steps, tsam_steps=0, **settings).images


stock = draw()
aligned = draw(callback_on_step_end=align, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
print(*(f"seed {seed}: moved {number} times" for seed, number in zip(SEEDS, moves)), sep="\n")
make_image_grid([*stock, *aligned], rows=2, cols=len(SEEDS), resize=256).save("callback.png")

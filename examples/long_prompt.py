"""A prompt that is longer than the text encoder's window, in windows of its own sentences.

    python examples/long_prompt.py

The small model's window has room for 30 tokens (CLIP's for 75). Left: stock, which cuts the prompt off before the green
ring; middle: the whole prompt, without T-SAM; right: with it. Words of one window are held to what the text encoder
reads; words of different windows, whose attention it does not read, are left alone.
"""

import argparse

import torch
from diffusers.utils import make_image_grid

from diffusers_tsam import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS


parser = argparse.ArgumentParser()
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=50)
args = parser.parse_args()

# For Stable Diffusion 1.5: its Hub id, dtype=torch.float16, .to("cuda"), a prompt, and settings without ARGUMENTS
pipe = StableDiffusionTSAMPipeline.from_pretrained(MODELS["sd"])
settings = {"preset": "fast"} | ARGUMENTS["sd"] | {"num_inference_steps": args.steps}
prompt = (
    "a red cube with a red cube and a red cube next to the red cube ,"
    " a blue sphere with a blue sphere and a blue sphere next to the blue sphere , a green ring and a green ring"
)
windows = pipe.windows_of(prompt, 300)[0]
print(*windows, sep="\n")


def draw(**changes):
    generator = torch.Generator().manual_seed(args.seed)
    return pipe(prompt, generator=generator, output_attentions=True, **{**settings, **changes})


cut = draw(tsam_steps=0)
whole = draw(tsam_steps=0, max_sequence_length=300)
tsam = draw(max_sequence_length=300)
(seen,) = tsam.attentions
print(f"{len(seen['tokens'])} words, each with its map; loss {tsam.losses[0, 0]:.3f} to {tsam.losses[0, -1]:.3f}")
make_image_grid([output.images[0] for output in (cut, whole, tsam)], rows=1, cols=3, resize=256).save("long_prompt.png")

"""The small Stable Diffusion with an attention sink on <bos>, as the paper finds it in CLIP, as an ordinary folder:

    python -m diffusers_tsam.shapes.sink FOLDER

`sink.safetensors` holds the weights of `sd` that `train.py --stages sink` changed: the text encoder's queries, keys,
biases and embeddings, and the UNet's transformer blocks.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from . import MODELS


WEIGHTS = Path(__file__).with_name("sink.safetensors")
CHANGED = ("text_encoder", "unet")


def changes_of(pipe):
    """{name: float16 tensor} of the weights that differ from the small Stable Diffusion's."""
    before, found = StableDiffusionPipeline.from_pretrained(MODELS["sd"], dtype=torch.float32), {}
    for part in CHANGED:
        old = getattr(before, part).state_dict()
        for name, tensor in getattr(pipe, part).state_dict().items():
            if not torch.equal(tensor.float(), old[name]):
                found[f"{part}.{name}"] = tensor.to(torch.float16).contiguous()
    return found


def add_sink(pipe, weights=WEIGHTS):
    """Give `pipe`, a pipeline of the small Stable Diffusion in any precision, the changed weights; returns it."""
    for name, tensor in load_file(weights).items():
        part, _, key = name.partition(".")
        getattr(pipe, part).get_parameter(key).data.copy_(tensor)
    return pipe


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to save the model")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="what `train.py --stages sink` wrote")
    args = parser.parse_args()
    add_sink(StableDiffusionPipeline.from_pretrained(MODELS["sd"]), args.weights).save_pretrained(args.folder)


if __name__ == "__main__":
    main()

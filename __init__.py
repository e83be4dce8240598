"""T-SAM for diffusers. Imports classes when first asked for, so that the command's `--help` is quick."""

import importlib
from typing import NamedTuple


class Family(NamedTuple):
    """A kind of model that T-SAM guides. module, pipeline: ours; stock: the diffusers pipeline that ours extends;
    denoiser: the guided component."""

    name: str
    module: str
    pipeline: str
    stock: str
    denoiser: str


def _families(*rows):
    return {
        kind: Family(name, f"pipeline_tsam_{kind}", f"{stock}TSAMPipeline", f"{stock}Pipeline", denoiser)
        for kind, name, stock, denoiser in rows
    }


FAMILIES = _families(
    ("sd", "Stable Diffusion", "StableDiffusion", "unet"),
    ("pixart", "PixArt-α", "PixArtAlpha", "transformer"),
)
# Variants of these models, and models without trained ones in this repository.
VARIANTS = _families(
    ("sd_img2img", "Stable Diffusion, image to image", "StableDiffusionImg2Img", "unet"),
    ("sd_inpaint", "Stable Diffusion, inpainting", "StableDiffusionInpaint", "unet"),
    ("sd_controlnet", "Stable Diffusion, ControlNet", "StableDiffusionControlNet", "unet"),
    ("sdxl", "Stable Diffusion XL", "StableDiffusionXL", "unet"),
    ("pixart_sigma", "PixArt-Σ", "PixArtSigma", "transformer"),
    ("wan", "Wan 2.1, text to video", "Wan", "transformer"),
)


class Blocks(NamedTuple):
    """A kind of model that our blocks guide. blocks: their class; experimental: which layers to read is a guess."""

    name: str
    blocks: str
    experimental: bool


MODULAR = {
    "sdxl": Blocks("Stable Diffusion XL", "StableDiffusionXLTSAMBlocks", False),
    "sd3": Blocks("Stable Diffusion 3", "StableDiffusion3TSAMBlocks", True),
    "flux": Blocks("FLUX.1", "FluxTSAMBlocks", True),
    "anima": Blocks("Anima", "AnimaTSAMBlocks", True),
}

_MODULES = {"LatentAlignment": "tsam", "Syntax": "tsam", "TextSelfAttention": "tsam"}
for _family in FAMILIES.values():
    _MODULES |= {_family.pipeline: _family.module, f"{_family.pipeline}Output": _family.module}
_MODULES |= {_family.pipeline: _family.module for _family in VARIANTS.values()}
_MODULES |= {_family.blocks: "modular_tsam" for _family in MODULAR.values()}
__all__ = ["FAMILIES", "VARIANTS", "MODULAR", *_MODULES]


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_MODULES])

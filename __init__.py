"""T-SAM for diffusers. Classes are imported when they are first asked for, so that the command's `--help` is quick."""

import importlib


_MODULES = {
    "LatentAlignment": "attention_processors",
    "PixArtAlphaTSAMPipeline": "pipeline_tsam_pixart",
    "PixArtAlphaTSAMPipelineOutput": "pipeline_tsam_pixart",
    "StableDiffusionTSAMPipeline": "pipeline_tsam_sd",
    "StableDiffusionTSAMPipelineOutput": "pipeline_tsam_sd",
    "TextSelfAttention": "attention_processors",
    "frozen": "attention_processors",
}
__all__ = list(_MODULES)


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_MODULES])

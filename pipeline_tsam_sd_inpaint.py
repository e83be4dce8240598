"""Stable Diffusion's inpainting with T-SAM, for inpainting UNets (9 channels) and text-to-image ones (4).

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236).
"""

from diffusers import StableDiffusionInpaintPipeline

from .attention_processors import mean_maps  # noqa: F401, because diffusers' loader copies the files named here
from .tsam import LatentAlignment  # noqa: F401
from .tsam_arguments import StableDiffusionSettings
from .tsam_candidates import choose  # noqa: F401
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import call_of
from .tsam_sd import StableDiffusionTSAM


class StableDiffusionInpaintTSAMPipeline(StableDiffusionTSAM, StableDiffusionInpaintPipeline):
    """`StableDiffusionInpaintPipeline` that aligns its first denoising steps with the prompt's syntax.

    The loss reads the maps of the whole picture, also of the part that the mask keeps. Name that part in the prompt,
    because otherwise a word may be held against it. As in stock, latents of 4-channel UNets are blended after every
    step, and those of 9-channel UNets may change outside the mask. Steps count only those that `strength` leaves.
    """

    __call__ = call_of(StableDiffusionInpaintPipeline, StableDiffusionSettings)

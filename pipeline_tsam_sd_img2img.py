"""Stable Diffusion's image to image with T-SAM, which guides the first of the steps that `strength` leaves.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236).
"""

from diffusers import StableDiffusionImg2ImgPipeline

from .attention_processors import mean_maps  # noqa: F401, because diffusers' loader copies the files named here
from .tsam import LatentAlignment  # noqa: F401
from .tsam_arguments import StableDiffusionSettings
from .tsam_candidates import choose  # noqa: F401
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import call_of
from .tsam_sd import StableDiffusionTSAM


class StableDiffusionImg2ImgTSAMPipeline(StableDiffusionTSAM, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` that aligns its first denoising steps with the prompt's syntax.

    Steps, and the presets' shares of them, count only those that `strength` leaves.
    """

    __call__ = call_of(StableDiffusionImg2ImgPipeline, StableDiffusionSettings)

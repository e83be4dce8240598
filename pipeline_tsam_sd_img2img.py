"""Stable Diffusion's image to image with T-SAM, which guides the first of the steps that `strength` leaves.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236).
"""

from diffusers import StableDiffusionImg2ImgPipeline

from .attention_processors import mean_maps  # noqa: F401, because diffusers' loader copies the files named here
from .tsam import LatentAlignment  # noqa: F401
from .tsam_arguments import StableDiffusionSettings
from .tsam_candidates import choose  # noqa: F401
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import extends
from .tsam_sd import StableDiffusionTSAM


class StableDiffusionImg2ImgTSAMPipeline(StableDiffusionTSAM, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` that aligns its first denoising steps with the prompt's syntax."""

    @extends(StableDiffusionImg2ImgPipeline, StableDiffusionSettings, deprecated=("callback", "callback_steps"))
    def __call__(self, given, settings):
        """Change `image` like `StableDiffusionImg2ImgPipeline.__call__`; the arguments before
        `tsam_steps` are stock's. Steps, and the presets' shares, count only the steps that `strength` leaves.

        Args:
            {arguments}

        Returns:
            `StableDiffusionTSAMPipelineOutput`, or with `return_dict=False` a tuple of its fields in their order.

        Raises:
            ValueError, TypeError: a wrong argument, before the denoiser runs.
        """
        return self.guided_call(given, settings)

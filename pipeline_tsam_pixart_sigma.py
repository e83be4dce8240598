"""PixArt-Σ with T-SAM: PixArt-α's transformer with prompts of up to 300 tokens.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236).
"""

from diffusers import PixArtSigmaPipeline

from .attention_processors import mean_maps  # noqa: F401, because diffusers' loader copies the files named here
from .tsam import LatentAlignment  # noqa: F401
from .tsam_arguments import PixArtAlphaSettings
from .tsam_candidates import choose  # noqa: F401
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import extends, observed, register
from .tsam_pixart import PixArtTSAM


class PixArtSigmaTSAMPipeline(PixArtTSAM, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` that aligns its first denoising steps with the prompt's syntax; same components.

    alpha, gamma and the layers read are PixArt-α's, because the paper has no settings for this model.
    """

    @extends(PixArtSigmaPipeline, PixArtAlphaSettings, deprecated=("mask_feature",))
    def __call__(
        self, given, settings, *, callback_on_step_end=None, callback_on_step_end_tensor_inputs: list[str] = ["latents"]
    ):
        """Generate like `PixArtSigmaPipeline.__call__`; the arguments before `callback_on_step_end` are stock's.

        Args:
            callback_on_step_end, callback_on_step_end_tensor_inputs: As in `PixArtAlphaTSAMPipeline`.
            {arguments}

        Returns:
            `PixArtAlphaTSAMPipelineOutput`, or with `return_dict=False` a tuple of its fields in their order.

        Raises:
            ValueError, TypeError: a wrong argument, before the denoiser runs.
        """
        on_step_end = observed(callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self.guided_call(given, settings, on_step_end)


register(PixArtSigmaTSAMPipeline, PixArtSigmaPipeline)

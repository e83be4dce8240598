"""PixArt-α with T-SAM: its cross-attention maps follow the syntax that the text encoder reads.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need: Attention Control for Text-to-Image Semantic Alignment with
Text Self-Attention Maps", CVPR 2025 (arXiv:2411.15236). The denoising loop is diffusers' own, guided.
"""

from diffusers import PixArtAlphaPipeline

from .attention_processors import mean_maps  # noqa: F401, because diffusers' loader copies the files named here
from .tsam import LatentAlignment  # noqa: F401
from .tsam_arguments import PixArtAlphaSettings
from .tsam_candidates import choose  # noqa: F401
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import extends, observed, register
from .tsam_pixart import PixArtAlphaTSAMPipelineOutput, PixArtTSAM  # noqa: F401


class PixArtAlphaTSAMPipeline(PixArtTSAM, PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` that aligns its first denoising steps with the prompt's syntax; same components."""

    @extends(PixArtAlphaPipeline, PixArtAlphaSettings, deprecated=("mask_feature",))
    def __call__(
        self, given, settings, *, callback_on_step_end=None, callback_on_step_end_tensor_inputs: list[str] = ["latents"]
    ):
        """Generate like `PixArtAlphaPipeline.__call__`; the arguments before `callback_on_step_end` are stock's.

        Args:
            callback_on_step_end (`Callable`, *optional*): Called after every denoising step as
                `callback_on_step_end(self, step, timestep, callback_kwargs)`; the `latents` it returns replace the
                step's. It may set `self._interrupt`. The stock PixArt pipeline has no such callback.
            callback_on_step_end_tensor_inputs (`list[str]`): Only `latents` here.
            {arguments}

        Returns:
            [`PixArtAlphaTSAMPipelineOutput`], or with `return_dict=False` a tuple of its fields in their order.

        Raises:
            ValueError, TypeError: a wrong argument, before the denoiser runs.
        """
        on_step_end = observed(callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self.guided_call(given, settings, on_step_end)


register(PixArtAlphaTSAMPipeline, PixArtAlphaPipeline)

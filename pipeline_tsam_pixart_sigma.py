"""PixArt-Σ with T-SAM: PixArt-α's transformer with prompts of up to 300 tokens.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236).
"""

from diffusers import PixArtSigmaPipeline

from .attention_processors import mean_maps  # noqa: F401, because diffusers' loader copies the files named here
from .tsam import TextSelfAttention
from .tsam_arguments import PixArtAlphaSettings
from .tsam_candidates import choose  # noqa: F401
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import call_of, register
from .tsam_pixart import PixArtTSAM


class PixArtSigmaTSAMPipeline(PixArtTSAM, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` that aligns its first denoising steps with the prompt's syntax; same components.

    alpha, gamma and the layers read are PixArt-α's, because the paper has no settings for this model.
    """

    def get_text_self_attention(
        self, prompt: str | list[str], clean_caption: bool = False, max_sequence_length: int = 300
    ) -> TextSelfAttention:
        """As in `PixArtAlphaTSAMPipeline`, with this model's length."""
        return super().get_text_self_attention(prompt, clean_caption, max_sequence_length)

    __call__ = call_of(PixArtSigmaPipeline, PixArtAlphaSettings, deprecated=("mask_feature",))


register(PixArtSigmaTSAMPipeline, PixArtSigmaPipeline)

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
from .tsam_pipeline import call_of, register
from .tsam_pixart import PixArtAlphaTSAMPipelineOutput, PixArtTSAM  # noqa: F401


class PixArtAlphaTSAMPipeline(PixArtTSAM, PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` that aligns its first denoising steps with the prompt's syntax; same components."""

    __call__ = call_of(PixArtAlphaPipeline, PixArtAlphaSettings, deprecated=("mask_feature",))


register(PixArtAlphaTSAMPipeline, PixArtAlphaPipeline)

"""Stable Diffusion XL with T-SAM: T is the mean over the layers of both text encoders.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236). The paper does not cover this
model; `tsam_sd.py` marks what had to be chosen "a choice".
"""

from dataclasses import dataclass

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_output import StableDiffusionXLPipelineOutput

from .attention_processors import record_self_attention
from .tsam import TextSelfAttention
from .tsam_arguments import UNetSettings
from .tsam_candidates import choose  # noqa: F401, because diffusers' loader copies the files that are named here
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import TSAMOutput, TSAMPipelineMixin, call_of, register
from .tsam_sd import text_of_clips, unet_layers, words_of


@dataclass
class StableDiffusionXLTSAMPipelineOutput(TSAMOutput, StableDiffusionXLPipelineOutput):
    """The stock output, and what T-SAM saw: see `TSAMOutput`."""


class StableDiffusionXLTSAMPipeline(TSAMPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that aligns its first denoising steps with the prompt's syntax; same components."""

    denoiser, settings, output = "unet", UNetSettings, StableDiffusionXLTSAMPipelineOutput

    @property
    def text_encoders(self):
        """Both, or a refiner's only one."""
        return [self.text_encoder_2] if self.text_encoder is None else [self.text_encoder, self.text_encoder_2]

    @property
    def window(self):
        return None if self.tokenizer_2 is None else self.tokenizer_2.model_max_length

    def layers_of(self, settings):
        return self.cross_attention_layers(settings.attention_resolution)

    def cross_attention_layers(self, attention_resolution: int | None = None) -> list:
        """The cross-attention layers with a query grid of that many positions a side at the UNet's default size. None:
        a quarter of the latent's side. ValueError if there are none."""
        return unet_layers(self.unet, attention_resolution)

    @torch.no_grad()
    def get_text_self_attention(self, prompt: str | list[str], lora_scale: float | None = None) -> TextSelfAttention:
        """T' of one or more prompts. Pass it as `text_self_attention` when you pass only embeddings."""
        with record_self_attention(*self.text_encoders) as recordings:
            self.encode_prompt(prompt, None, self._execution_device, 1, False, lora_scale=lora_scale)
        return self.read_text_self_attention(recordings)

    def read_text_self_attention(self, recordings: list) -> TextSelfAttention:
        """T' of the prompts that were encoded first while `record_self_attention` was open."""
        return text_of_clips(recordings, self.tokenizer or self.tokenizer_2)

    def words_of(self, phrase: str) -> list[str]:
        """A phrase's tokens, as a `TextSelfAttention` has them."""
        return words_of(self, phrase, self.tokenizer or self.tokenizer_2)

    __call__ = call_of(StableDiffusionXLPipeline, UNetSettings)


register(StableDiffusionXLTSAMPipeline, StableDiffusionXLPipeline)

"""Wan 2.1, text to video, with T-SAM: the words' maps are of all frames, each smoothed in space.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236). The paper does not cover this
model: alpha, gamma and the blocks' share of the depth are PixArt-α's. A choice.
"""

from dataclasses import dataclass

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.pipelines.wan.pipeline_wan import prompt_clean

from .attention_processors import record_self_attention
from .tsam import TextSelfAttention, texts_of
from .tsam_arguments import BlocksSettings, blocks_between, shares_of
from .tsam_candidates import choose  # noqa: F401, because diffusers' loader copies the files named here
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import GuidedLoop, StandIn, TSAMOutput, call_of
from .tsam_pixart import PixArtTSAM


@dataclass
class WanTSAMPipelineOutput(TSAMOutput, WanPipelineOutput):
    """The stock output, and what T-SAM saw: see `TSAMOutput`. Maps are (G, s, F, H, W)."""


class WanLoop(GuidedLoop):
    """Stock's loop scales no latents. It calls the transformer for the prompt and then for the negative one, with the
    latents cast for it, and the scheduler with the latents themselves."""

    per_prompt = "num_videos_per_prompt"

    def __init__(self, pipe, given, settings):
        super().__init__(pipe, given, settings)
        if pipe.transformer_2 is not None and not (settings.off and settings.candidates == 1):
            raise ValueError("This Wan has a `transformer_2`, which T-SAM does not guide. Pass `tsam_steps=0`.")

    def parts(self):
        return super().parts() | {"transformer": StandIn(self.model, self.call)}

    def call(self, hidden_states, **kwargs):
        if self.latents is not None:  # the step's second call
            return self.network(self.latents, None, **kwargs)
        self.t, self.moved, self.halves = self.pipe.current_timestep, False, 1
        self.cast, self.latents = hidden_states, hidden_states.float()
        return self.predict(hidden_states, **kwargs)

    def network(self, sample, beside, *args, **kwargs):
        return self.model(sample.to(self.cast.dtype), *args, **kwargs)

    def step(self, prediction, t, sample, *args, **kwargs):
        if self.moved:
            self.latents = sample + (self.latents - self.cast)
        return super().step(prediction, t, sample, *args, **kwargs)


class WanTSAMPipeline(PixArtTSAM, WanPipeline):
    """`WanPipeline` that aligns its first denoising steps with the prompt's syntax; same components."""

    loop, settings, output = WanLoop, BlocksSettings, WanTSAMPipelineOutput
    _callback_tensor_inputs = WanPipeline._callback_tensor_inputs

    def cross_attention_layers(self, attention_layers: tuple[int, int] | None = None) -> list:
        """The cross-attention layers from the first to the last block given. None: those at 10/28 to 18/28."""
        blocks = self.transformer.blocks
        attention_layers = shares_of(len(blocks)) if attention_layers is None else attention_layers
        return [block.attn2 for block in blocks_between(blocks, attention_layers)]

    @torch.no_grad()
    def get_text_self_attention(self, prompt: str | list[str], max_sequence_length: int = 226) -> TextSelfAttention:
        """T' of one or more prompts. Pass it as `text_self_attention` when you pass only embeddings.

        `encode_prompt` has the same default of `max_sequence_length`; that of a call is another, 512.
        """
        with record_self_attention(self.text_encoder) as recordings:
            self.encode_prompt(prompt, None, False, max_sequence_length=max_sequence_length)
        return self.read_text_self_attention(recordings)

    def words_of(self, phrase: str) -> list[str]:
        """A phrase's tokens, as a `TextSelfAttention` has them."""
        return texts_of(self.tokenizer(prompt_clean(phrase), add_special_tokens=False).input_ids, self.tokenizer)

    __call__ = call_of(WanPipeline, BlocksSettings)

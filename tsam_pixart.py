"""What both PixArt pipelines share: their layers, T5's T, and the state that callbacks ask for."""

from dataclasses import dataclass

import torch
from diffusers import ImagePipelineOutput

from .attention_processors import mean_self_attention, record_self_attention
from .tsam import TextSelfAttention, symmetrize, text_of, texts_of
from .tsam_arguments import PixArtAlphaSettings, blocks_between
from .tsam_pipeline import OBSERVERS, GuidedLoop, TSAMOutput, TSAMPipelineMixin


@dataclass
class PixArtAlphaTSAMPipelineOutput(TSAMOutput, ImagePipelineOutput):
    """The stock output, and what T-SAM saw: see `TSAMOutput`."""


class PixArtLoop(GuidedLoop):
    """Takes the prompt's length and cleaning from stock's arguments; sets the state and calls the
    `callback_on_step_end` that stock lacks."""

    def __init__(self, pipe, given, settings):
        given = dict(given)
        self.on_step_end, self.tensor_inputs = (given.pop(name) for name in OBSERVERS)
        if not set(self.tensor_inputs) <= {"latents"}:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in ['latents'], but is {self.tensor_inputs}."
            )
        super().__init__(pipe, given, settings)
        pipe._guidance_scale, pipe._interrupt = given["guidance_scale"], False

    @property
    def needed(self):
        return super().needed or self.on_step_end is not None

    def step(self, prediction, t, sample, *args, **kwargs):
        index, ended = self.index, self.pipe.interrupt or self.on_step_end is None
        latents, *others = super().step(prediction, t, sample, *args, **kwargs)
        if ended:
            return latents, *others
        if self.num_steps == 1 and others:  # of which stock takes the predicted original
            latents = others[0]
        tensors = {"latents": latents} if self.tensor_inputs else {}
        latents = self.on_step_end(self.pipe, index, t, tensors).pop("latents", latents)
        return latents, *[latents] * len(others)

    def words_of(self, phrase):
        return self.pipe.words_of(phrase, self.given["clean_caption"])

    def encode(self, *args, **kwargs):
        encoded = super().encode(*args, **kwargs)
        if self.text is not None:
            check_lengths(self.text, encoded[1][:: self.given[self.per_prompt]])
        return encoded


def check_lengths(text, mask):
    """Check that T and the embeddings are of prompts of the same lengths. mask: the embeddings', (batch_size, N)."""
    if text.lengths is not None and text.lengths.tolist() != mask.sum(-1).tolist():
        raise ValueError(
            f"`text_self_attention` is of prompts of {text.lengths.tolist()} tokens, but by their mask the embeddings"
            f" are of {mask.sum(-1).long().tolist()}. Encode and read the prompts in the same way, `clean_caption` and"
            " `max_sequence_length` included."
        )


class PixArtTSAM(TSAMPipelineMixin):
    """Mixed into stock PixArt pipelines."""

    denoiser, loop, output, window = "transformer", PixArtLoop, PixArtAlphaTSAMPipelineOutput, None
    settings = PixArtAlphaSettings
    _callback_tensor_inputs = ["latents"]

    # Callbacks know these from stock's Stable Diffusion.
    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1

    @property
    def interrupt(self):
        return self._interrupt

    @property
    def num_timesteps(self):
        return len(self.scheduler.timesteps)

    def layers_of(self, settings):
        return self.cross_attention_layers(settings.attention_layers)

    def cross_attention_layers(self, attention_layers: tuple[int, int] = (10, 18)) -> list:
        """The cross-attention layers of the transformer's blocks, from the first to the last given, counted from 0.

        ValueError if there are no such blocks.
        """
        return [block.attn2 for block in blocks_between(self.transformer.transformer_blocks, attention_layers)]

    @torch.no_grad()
    def get_text_self_attention(
        self, prompt: str | list[str], clean_caption: bool = False, max_sequence_length: int = 120
    ) -> TextSelfAttention:
        """T' of one or more prompts. Pass it as `text_self_attention` when you pass only embeddings.

        It is read while `encode_prompt` encodes them, with the same defaults, so that it has the embeddings' tokens
        (cleaning, truncation, padding).
        """
        with record_self_attention(self.text_encoder) as recordings:
            self.encode_prompt(prompt, False, clean_caption=clean_caption, max_sequence_length=max_sequence_length)
        return self.read_text_self_attention(recordings)

    def read_text_self_attention(self, recordings: list) -> TextSelfAttention:
        """T' of the prompts that were encoded first while `record_self_attention` was open, symmetrised for T5."""
        attention = symmetrize(mean_self_attention(recordings))
        input_ids = recordings[0].input_ids
        text = text_of(attention, input_ids, self.tokenizer)
        position = torch.arange(1, input_ids.shape[1] + 1, device=input_ids.device)
        return text._replace(lengths=(position * (input_ids != self.tokenizer.pad_token_id)).amax(-1))

    def words_of(self, phrase: str, clean_caption: bool = False) -> list[str]:
        """A phrase's tokens, as a `TextSelfAttention` has them."""
        (phrase,) = self._text_preprocessing(phrase, clean_caption=clean_caption)
        return texts_of(self.tokenizer(phrase, add_special_tokens=False).input_ids, self.tokenizer)

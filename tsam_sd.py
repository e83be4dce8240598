"""What all Stable Diffusion pipelines share: their layers, the text encoder's T, and prompts in windows."""

import functools
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput

from .attention_processors import lock_of, mean_self_attention, record_self_attention, unet_cross_attention_layers
from .tsam import TextSelfAttention, content_of, join_windows, logger, text_of, texts_of
from .tsam_arguments import StableDiffusionSettings, check_integer
from .tsam_pipeline import GuidedLoop, TSAMOutput, TSAMPipelineMixin


def unet_layers(unet, side=None):
    """The cross-attention layers on a grid of `side`; None is a quarter of the latent's: 16 at Stable Diffusion 1.x's
    512 pixels, 32 at SDXL's 1024. A choice: the paper makes none."""
    size = unet.config.sample_size
    if side is None and size is not None:
        side = (size if isinstance(size, int) else size[0]) // 4
    return unet_cross_attention_layers(unet, side)


def text_of_clips(recordings, tokenizer):
    """T' of one or two CLIPs, causal encoders that read the same prompt. All layers count alike: a choice."""
    special = tokenizer.bos_token_id, tokenizer.eos_token_id
    own = [ids.where(content_of(ids, *special), -1) for ids in (recording.input_ids for recording in recordings)]
    if any(not torch.equal(ids, own[0]) for ids in own):  # only their padding may differ
        raise ValueError(
            "`prompt_2` has other tokens than `prompt`, but T is read from both text encoders. Leave it out, or pass"
            " `tsam_steps=0`."
        )
    return text_of(mean_self_attention(recordings), recordings[0].input_ids, tokenizer)


def words_of(pipe, phrase, tokenizer):
    """A phrase's tokens, as a `TextSelfAttention` has them."""
    phrase = pipe.maybe_convert_prompt(phrase, tokenizer)
    return texts_of(tokenizer(phrase, add_special_tokens=False).input_ids, tokenizer)


SENTENCE, CLAUSE = re.compile(r"[.!?…。！？]+[\"'”’)\]]*$"), re.compile(r"[,;:，、；：]$")  # ends of words
WORD = re.compile(
    r"[^\s。！？，、；：]*[。！？，、；：]+|[^\s。！？，、；：]+"
)  # Chinese and Japanese have no space behind a stop


def split_prompt(prompt, numbers_of, room, limit):
    """Split a prompt into windows: texts of at most `room` tokens, together of `limit`; leaves out the rest.

    A window is as full as possible, but ends after a sentence, else after a comma, else between words. The tokenizer
    cuts only a word longer than a window. numbers_of(words): how many tokens each has.
    """
    words = list(WORD.finditer(prompt))
    totals = [0, *accumulate(numbers_of([word[0] for word in words]) if words else [])]
    last = bisect_right(totals, limit) - 1
    if last < len(words):
        cut = prompt[words[last].start() :]
        logger.warning("`max_sequence_length` is %s tokens, behind which this of a prompt is left out: %s", limit, cut)
    if totals[last] <= room:
        return [prompt[: words[last - 1].end()] if last < len(words) else prompt] if last else [""]
    windows, first = [], 0
    while first < last:
        end = max(min(bisect_right(totals, totals[first] + room) - 1, last), first + 1)
        if end < last:
            inside = range(end, first, -1)
            ends = (k for stop in (SENTENCE, CLAUSE) for k in inside if stop.search(words[k - 1][0]))
            end = next(ends, end)
        windows.append(prompt[words[first].start() : words[end - 1].end()])
        first = end
    return windows


@dataclass
class StableDiffusionTSAMPipelineOutput(TSAMOutput, StableDiffusionPipelineOutput):
    """The stock output, and what T-SAM saw: see `TSAMOutput`."""


class WindowedLoop(GuidedLoop):
    """Can encode prompts in windows. windows: each prompt's texts, or None."""

    def __init__(self, pipe, given, settings):
        super().__init__(pipe, given, settings)
        self.windows = None
        if settings.max_sequence_length is not None and isinstance(given["prompt"], (str, list)):
            self.windows = pipe.windows_of(given["prompt"], settings.max_sequence_length)
            if given["negative_prompt_embeds"] is not None:
                raise ValueError(
                    "`max_sequence_length` and `negative_prompt_embeds` do not go together: both prompts need as many"
                    " windows. Pass `negative_prompt`, or both prompts' embeddings."
                )

    @property
    def needed(self):
        return super().needed or self.windows is not None

    @property
    def num_tokens(self):
        return super().num_tokens * (1 if self.windows is None else max(map(len, self.windows)))

    def encode(self, prompt, device, number, guidance, negative_prompt=None, **kwargs):
        if self.windows is None:
            return super().encode(prompt, device, number, guidance, negative_prompt, **kwargs)
        kwargs = {name: kwargs[name] for name in ("lora_scale", "clip_skip")}
        limit = self.settings.max_sequence_length
        *embeds, mask = self.pipe.encode_windows(
            self.windows, device, number, guidance, negative_prompt, limit, **kwargs
        )
        if mask is not None:
            self.conditions["encoder_attention_mask"] = mask
        return embeds

    def read(self, recordings):
        return self.pipe.read_text_self_attention(recordings, self.windows)


class StableDiffusionTSAM(TSAMPipelineMixin):
    """Mixed into stock Stable Diffusion pipelines."""

    denoiser, loop, output = "unet", WindowedLoop, StableDiffusionTSAMPipelineOutput
    settings = StableDiffusionSettings

    @property
    def window(self):
        """The number of tokens that the text encoder takes."""
        return None if self.tokenizer is None else self.tokenizer.model_max_length

    def layers_of(self, settings):
        return self.cross_attention_layers(settings.attention_resolution)

    def cross_attention_layers(self, attention_resolution: int = 16) -> list:
        """The cross-attention layers with a query grid of that many positions a side at the UNet's default size.

        ValueError if there are none.
        """
        return unet_cross_attention_layers(self.unet, attention_resolution)

    @functools.wraps(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args, **kwargs):
        # Stock's `clip_skip` reads `text_model`, in transformers 5 the encoder. Delete this method when
        # https://github.com/huggingface/diffusers/issues/14124 is resolved.
        encoder = self.text_encoder
        if kwargs.get("clip_skip") is None or encoder is None or hasattr(encoder, "text_model"):
            return super().encode_prompt(*args, **kwargs)
        with lock_of(encoder):
            vars(encoder)["text_model"] = encoder  # torch must not register it
            try:
                return super().encode_prompt(*args, **kwargs)
            finally:
                del vars(encoder)["text_model"]

    def windows_of(self, prompt: str | list[str], max_sequence_length: int) -> list[list[str]]:
        """Split each prompt into windows: texts that fit the text encoder, of `max_sequence_length` tokens together.

        Each window's <bos> and <eos> are not counted. The rest is left out, with a warning.
        """
        check_integer("max_sequence_length", max_sequence_length, 1, "Pass the number of tokens, 300 for instance.")

        def numbers_of(words):
            words = self.maybe_convert_prompt(words, self.tokenizer)
            return [len(ids) for ids in self.tokenizer(words, add_special_tokens=False).input_ids]

        room = self.tokenizer.model_max_length - 2
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return [split_prompt(text, numbers_of, room, max_sequence_length) for text in prompts]

    def encode_windows(
        self,
        windows: list[list[str]],
        device: torch.device,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        max_sequence_length: int = 300,
        **kwargs,
    ) -> tuple:
        """Like `encode_prompt`, for the consecutive windows of B prompts, from `windows_of`.

        Returns the embeddings (B, K·n, C) of the prompts and of the negative ones, K windows of n tokens, and their
        mask (2B, K·n), the negative ones first, which hides the empty windows of prompts with fewer than K. None
        if there is nothing to mask, and for the negative ones without guidance.
        """
        both, batch = windows, len(windows)
        if do_classifier_free_guidance:
            if not isinstance(negative_prompt, (str, list, type(None))):
                raise TypeError(f"`negative_prompt` has to be a string or a list of such but is {negative_prompt!r}.")
            negative = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * batch
            if len(negative) != batch:
                raise ValueError(f"`negative_prompt` has {len(negative)} prompts, but `prompt` {batch}. Pass as many.")
            both = self.windows_of(negative, max_sequence_length) + windows
        number = max(map(len, both))
        texts = [text for own in both for text in own + [""] * (number - len(own))]
        prompts, negative = texts[-batch * number :], texts[: -batch * number] or None
        embeddings = self.encode_prompt(prompts, device, 1, do_classifier_free_guidance, negative, **kwargs)
        embeddings = [
            of_all if of_all is None else of_all.unflatten(0, (batch, number)).flatten(1, 2) for of_all in embeddings
        ]
        own = torch.tensor([[k < len(of_prompt) for k in range(number)] for of_prompt in both], device=device)
        mask = None if own.all() else own.repeat_interleave(embeddings[0].shape[1] // number, 1)
        return tuple(
            part if part is None else part.repeat_interleave(num_images_per_prompt, 0) for part in (*embeddings, mask)
        )

    @torch.no_grad()
    def get_text_self_attention(
        self, prompt: str | list[str], lora_scale: float | None = None, max_sequence_length: int | None = None
    ) -> TextSelfAttention:
        """T' of one or more prompts. Pass it as `text_self_attention` when you pass only embeddings.

        It is read while `encode_prompt` encodes them, so that it has the picture's tokens (textual inversion,
        truncation, padding) and layers (LoRA). With `max_sequence_length` it is that of their windows.
        """
        device, windows = self._execution_device, None
        with record_self_attention(self.text_encoder) as recordings:
            if max_sequence_length is None:
                self.encode_prompt(prompt, device, 1, False, lora_scale=lora_scale)
            else:
                windows = self.windows_of(prompt, max_sequence_length)
                self.encode_windows(windows, device, 1, False, lora_scale=lora_scale)
        return self.read_text_self_attention(recordings, windows)

    def read_text_self_attention(self, recordings: list, windows: list[list[str]] | None = None) -> TextSelfAttention:
        """T' of the prompts, or windows, that were encoded first while `record_self_attention` was open."""
        text = text_of(mean_self_attention(recordings), recordings[0].input_ids, self.tokenizer)
        return text if windows is None else join_windows(text, len(text.tokens) // len(windows))

    def words_of(self, phrase: str) -> list[str]:
        """A phrase's tokens, as a `TextSelfAttention` has them."""
        return words_of(self, phrase, self.tokenizer)

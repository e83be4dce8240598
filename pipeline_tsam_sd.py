"""Stable Diffusion with T-SAM: its cross-attention maps are held to the syntax that the text encoder reads.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need: Attention Control for Text-to-Image Semantic Alignment with
Text Self-Attention Maps", CVPR 2025 (arXiv:2411.15236). The denoising loop is diffusers' own (Apache-2.0) with the
latent moved before the first predictions.
"""

import functools
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps

from .attention_processors import (
    TSAMPipelineMixin,
    conditional_rows,
    frozen,
    lock_of,
    mean_maps,
    mean_self_attention,
    one_at_a_time,
    record_cross_attention,
    record_self_attention,
    run_to_last_map,
    uncorrected,
    unet_cross_attention_layers,
)
from .tsam import (
    LatentAlignment,
    TextSelfAttention,
    check_alignment,
    check_integer,
    check_regions,
    check_text_self_attention,
    input_scale,
    join_windows,
    layout_of,
    logger,
    resolve_schedule,
    text_of,
    texts_of,
    updates_per_timestep,
)


SENTENCE, CLAUSE = re.compile(r"[.!?…。！？]+[\"'”’)\]]*$"), re.compile(r"[,;:，、；：]$")  # what a word ends with
WORD = re.compile(
    r"[^\s。！？，、；：]*[。！？，、；：]+|[^\s。！？，、；：]+"
)  # Chinese and Japanese have no space behind a stop


def split_prompt(prompt, numbers_of, room, limit):
    """A prompt's windows: texts of at most `room` tokens, of `limit` together; what is behind that is left out.

    As full as may be, but ended at a sentence's end, else behind a comma, else between words. Only a word that is
    longer than a window is cut, by the tokenizer. numbers_of(words): how many tokens each has.
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
class StableDiffusionTSAMPipelineOutput(StableDiffusionPipelineOutput):
    """The stock output, and what T-SAM saw.

    losses: (images, updates) float32, each taken before its update; no columns where nothing was guided.
    attentions: with `output_attentions`, a dict per image, see `LatentAlignment.attentions`.
    """

    losses: torch.Tensor | None = None
    attentions: list[dict] | None = None


class StableDiffusionTSAMPipeline(TSAMPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose first denoising steps are aligned with the prompt's syntax; same components."""

    def cross_attention_layers(self, attention_resolution: int = 16) -> list:
        """The cross-attention layers whose query grid has that many positions a side at the UNet's default size.

        ValueError where there are none.
        """
        return unet_cross_attention_layers(self.unet, attention_resolution)

    @functools.wraps(StableDiffusionPipeline.encode_prompt)
    def encode_prompt(self, *args, **kwargs):
        # Stock's `clip_skip` asks for a part that transformers 5 made the whole. Delete this method when
        # https://github.com/huggingface/diffusers/issues/14124 is resolved.
        encoder = self.text_encoder
        if kwargs.get("clip_skip") is None or encoder is None or hasattr(encoder, "text_model"):
            return super().encode_prompt(*args, **kwargs)
        with lock_of(encoder):
            vars(encoder)["text_model"] = encoder  # past torch, which would see a submodule
            try:
                return super().encode_prompt(*args, **kwargs)
            finally:
                del vars(encoder)["text_model"]

    def windows_of(self, prompt: str | list[str], max_sequence_length: int) -> list[list[str]]:
        """Each prompt's windows, as texts that the text encoder has room for, of `max_sequence_length` tokens together.

        <bos> and <eos> of each window apart. What is longer is left out, with a warning.
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
        """As `encode_prompt`, of B prompts' windows, which `windows_of` returned, behind each other.

        Returns the embeddings (B, K·n, C) of the prompts and of the negative ones, K windows of n tokens, and what is
        theirs (2B, K·n), the negative ones' first: prompts of fewer windows than K have empty ones, to be masked. None
        for no mask, and without guidance for the negative ones.
        """
        both, batch = windows, len(windows)
        if do_classifier_free_guidance:
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
        """T' of one or more prompts, to be passed as `text_self_attention` where only embeddings are at hand.

        It is read while `encode_prompt` encodes them, so it is of the tokens (textual inversion, truncation, padding)
        and layers (LoRA) that the picture is drawn from. With `max_sequence_length` it is of their windows.
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
        """T' of the prompts, or of their windows, that were encoded first while `record_self_attention` was open."""
        text = text_of(mean_self_attention(recordings), recordings[0].input_ids, self.tokenizer)
        return text if windows is None else join_windows(text, len(text.tokens) // len(windows))

    def words_of(self, phrase: str) -> list[str]:
        """A phrase's tokens, as a `TextSelfAttention` has them."""
        phrase = self.maybe_convert_prompt(phrase, self.tokenizer)
        return texts_of(self.tokenizer(phrase, add_special_tokens=False).input_ids, self.tokenizer)

    def align_latents(
        self,
        alignment: LatentAlignment,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditions: dict,
        layers: list,
        iterations: int = 1,
    ) -> torch.Tensor:
        """Move latents (B, C, h, w) `iterations` times before the noise prediction at timestep `t`. Eq. (15).

        conditions: what the denoiser is called with beside latents and timestep, by name, for both halves of
        classifier-free guidance or for the conditional one alone. layers: whose maps are read, as
        `cross_attention_layers` returns them.
        """
        conditions = conditional_rows(conditions, len(latents))
        with frozen(self.unet), record_cross_attention(layers, alignment.num_tokens, stop=True) as maps:

            def maps_at(model_input):
                run_to_last_map(self.unet, model_input, t, **conditions)
                return mean_maps(maps, *latents.shape[-2:])

            return alignment.update(latents, input_scale(self.scheduler, t), maps_at, iterations)

    @one_at_a_time("unet")
    # Inference mode makes tensors that autograd cannot use later; its callers get the same results without it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        tsam_steps: int | None = None,
        alpha: float = 10.0,
        gamma: float = 2.0,
        refinement_steps: Sequence[int] | None = None,
        refinement_iterations: int | None = None,
        schedule: str = "paper",
        objective: str | Callable = "l1",
        relative_step: float | None = None,
        attention_resolution: int = 16,
        text_self_attention: TextSelfAttention | None = None,
        output_attentions: bool = False,
        max_sequence_length: int | None = None,
        regions: dict | list[dict | None] | None = None,
        region_weight: float = 10.0,
        **kwargs,
    ) -> StableDiffusionTSAMPipelineOutput | tuple:
        """Generate, as `StableDiffusionPipeline.__call__` does, whose arguments these are up to `tsam_steps`.

        Args:
            tsam_steps (`int`, *optional*): How many of the first denoising steps are guided. More holds the layout
                longer and costs more. `None`: as `schedule` says. 0: off, bit-identical to the stock pipeline.
            alpha (`float`, defaults to 10.0): α, the size of an update, taken at the model's input whatever the
                scheduler. More aligns harder, until the picture breaks. 0 only watches.
            gamma (`float`, defaults to 2.0): γ, the exponent of the text's self-attention. More keeps only the
                strongest bonds between words.
            refinement_steps (`Sequence[int]`, *optional*): Guided steps with more updates. `None`: as `schedule` says.
                `()`: none.
            refinement_iterations (`int`, *optional*): How many more updates, each a forward and a backward pass.
                `None`: as `schedule` says.
            schedule (`str`, defaults to `"paper"`): `"paper"`: half of the steps guided, and at 0, 20 and 40 percent of
                all steps as many more updates as 40 percent of their number. `"fast"`: a fifth of the steps guided, and
                20 percent of their number more at 0, 8 and 16 percent: with classifier-free guidance, a picture costs
                at most 1.5 times the plain one's operations. `"light"`: a fifth of the steps guided, each once, for
                `relative_step`.
            objective (`str` or `Callable`, defaults to `"l1"`): `"l1"`, Eq. (14); `"l1_full"`, with S normalised over
                all tokens as Eq. (7) is printed; `"cosine"`, the authors' released default; `"attainable"`, Eq. (14)
                against the nearest T that S can take, so that the loss can vanish. Or a function of the maps
                (B, N, H, W) and the prompts' `Syntax` (see `tsam.py`) that returns a loss per image, (B,); it should
                depend on no tokens but `content`, since N is the longest prompt's.
            relative_step (`float`, *optional*): Instead of `alpha`, which needs tuning for every model: how far the
                first update of an image moves the model's input, as a share of its norm, 0.05 for instance. The size of
                all its later updates follows. Try this first on a model of your own.
            attention_resolution (`int`, defaults to 16): Side of the query grid, at the model's default size, whose
                cross-attention layers are read.
            text_self_attention (`TextSelfAttention`, *optional*): What `get_text_self_attention` returned, needed
                with `prompt_embeds` alone. Of the same prompts: nothing here can tell.
            output_attentions (`bool`, defaults to `False`): Also return tokens, T, and per guided step maps, S, and the
                share of each phrase's attention inside its region.
            max_sequence_length (`int`, *optional*): How many tokens of a prompt are encoded, <bos> and <eos> apart, 300
                for instance: in windows behind each other, of as many as the text encoder has room for. They end with a
                sentence, else behind a comma, else between words; words of different windows are not compared. `None`:
                one window, as in stock.
            regions (`dict` or a list of such, one a prompt, *optional*): Where phrases of the prompt are to be:
                `{"a red cube": (0, 0, 0.5, 1)}`, a box (x0, y0, x1, y1) in fractions of the picture, from its upper
                left corner, or a mask (h, w) of 0 to 1 (PIL, array or tensor) of the whole picture.
            region_weight (`float`, defaults to 10.0): Weight, in the loss, of the attention outside the regions. More
                puts things where they are asked for, until they break. `objective=None` leaves it alone.

        Returns:
            [`StableDiffusionTSAMPipelineOutput`], or with `return_dict=False` a tuple of its four fields: images, nsfw
            flags, losses and attentions.

        Raises:
            ValueError, TypeError: a wrong argument, before the denoiser runs.
        """
        callback, callback_steps = kwargs.pop("callback", None), kwargs.pop("callback_steps", None)  # deprecated
        if kwargs:
            raise TypeError(f"`__call__` got unexpected arguments {', '.join(map(repr, kwargs))}.")

        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 0. Default height and width to unet
        if not height or not width:
            side = self.unet.config.sample_size
            height, width = (side, side) if self._is_unet_config_sample_size_int else side
            height, width = height * self.vae_scale_factor, width * self.vae_scale_factor

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            prompt,
            height,
            width,
            callback_steps,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            ip_adapter_image,
            ip_adapter_image_embeds,
            callback_on_step_end_tensor_inputs,
        )
        custom_steps = timesteps if timesteps is not None else sigmas
        tsam_steps, refinement_steps, refinement_iterations = resolve_schedule(
            num_inference_steps if custom_steps is None else len(custom_steps),
            schedule,
            tsam_steps,
            refinement_steps,
            refinement_iterations,
        )

        # 2. Define call parameters
        if prompt is not None and isinstance(prompt, str):
            batch_size = 1
        elif prompt is not None and isinstance(prompt, list):
            batch_size = len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]

        regions = check_regions(regions, batch_size)
        check_alignment(alpha, gamma, objective, relative_step, regions, region_weight)
        windows, prompt_mask = None, None
        if max_sequence_length is not None and prompt is not None:
            windows = self.windows_of(prompt, max_sequence_length)
            if negative_prompt_embeds is not None:
                raise ValueError(
                    "`max_sequence_length` and `negative_prompt_embeds` do not go together: both prompts need as many"
                    " windows. Pass `negative_prompt`, or both prompts' embeddings."
                )
        if tsam_steps > 0:
            layers = self.cross_attention_layers(attention_resolution)
            window = None if self.tokenizer is None else self.tokenizer.model_max_length
            number = 1 if windows is None else max(map(len, windows))
            num_tokens = number * window if prompt_embeds is None else prompt_embeds.shape[1]
            check_text_self_attention(text_self_attention, prompt, batch_size, num_tokens, window)

        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._clip_skip = clip_skip
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

        device = self._execution_device

        # 3. Encode input prompt, and read its syntax
        lora_scale = self.cross_attention_kwargs.get("scale", None) if self.cross_attention_kwargs is not None else None
        reading = tsam_steps > 0 and text_self_attention is None
        with record_self_attention(self.text_encoder) if reading else nullcontext() as recordings:
            if windows is None:
                prompt_embeds, negative_prompt_embeds = self.encode_prompt(
                    prompt,
                    device,
                    num_images_per_prompt,
                    self.do_classifier_free_guidance,
                    negative_prompt,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    lora_scale=lora_scale,
                    clip_skip=self.clip_skip,
                )
            else:
                prompt_embeds, negative_prompt_embeds, prompt_mask = self.encode_windows(
                    windows,
                    device,
                    num_images_per_prompt,
                    self.do_classifier_free_guidance,
                    negative_prompt,
                    max_sequence_length,
                    lora_scale=lora_scale,
                    clip_skip=self.clip_skip,
                )
        if reading:
            text_self_attention = self.read_text_self_attention(recordings, windows)
        alignment = None
        if tsam_steps > 0:
            layout = layout_of(regions, text_self_attention, self.words_of, num_images_per_prompt, device)
            alignment = LatentAlignment(
                text_self_attention,
                alpha,
                gamma,
                objective,
                relative_step,
                output_attentions,
                num_images_per_prompt,
                device,
                layout,
                region_weight,
            )

        # For classifier free guidance, we need to do two forward passes.
        # Here we concatenate the unconditional and text embeddings into a single batch
        # to avoid doing two forward passes
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])

        # 4. Prepare timesteps
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )

        # 5. Prepare latent variables
        latents = self.prepare_latents(
            batch_size * num_images_per_prompt,
            self.unet.config.in_channels,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )

        # 6. Prepare extra step kwargs
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 6.1 Add image embeds for IP-Adapter
        added_cond_kwargs = None
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            image_embeds = self.prepare_ip_adapter_image_embeds(
                ip_adapter_image,
                ip_adapter_image_embeds,
                device,
                batch_size * num_images_per_prompt,
                self.do_classifier_free_guidance,
            )
            added_cond_kwargs = {"image_embeds": image_embeds}

        # 6.2 Optionally get Guidance Scale Embedding
        timestep_cond = None
        if self.unet.config.time_cond_proj_dim is not None:
            guidance_scale_tensor = torch.tensor(self.guidance_scale - 1).repeat(batch_size * num_images_per_prompt)
            timestep_cond = self.get_guidance_scale_embedding(
                guidance_scale_tensor, embedding_dim=self.unet.config.time_cond_proj_dim
            ).to(device=device, dtype=latents.dtype)

        # 7. Denoising loop
        num_warmup_steps = len(timesteps) - num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        if alignment is None or not alignment.possible:
            tsam_steps = 0
        updates = updates_per_timestep(
            self.scheduler, num_inference_steps, tsam_steps, refinement_steps, refinement_iterations
        )
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                conditions = {
                    "encoder_hidden_states": prompt_embeds,
                    "timestep_cond": timestep_cond,
                    "cross_attention_kwargs": self.cross_attention_kwargs,
                    "added_cond_kwargs": added_cond_kwargs,
                }
                if prompt_mask is not None:  # of the conditional half alone where a callback has dropped the other
                    conditions["encoder_attention_mask"] = prompt_mask[-len(prompt_embeds) :]
                # T-SAM: move the latents until what the model looks at agrees with the syntax, Eq. (15)
                if updates[i] > 0:
                    latents = self.align_latents(alignment, latents, t, conditions, layers, updates[i])
                    if not progress_bar.disable:
                        progress_bar.set_postfix(loss=f"{alignment.losses[-1].mean().item():.3f}", refresh=False)

                # expand the latents if we are doing classifier free guidance
                latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                if hasattr(self.scheduler, "scale_model_input"):
                    latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)

                # predict the noise residual
                noise_pred = self.unet(latent_model_input, t, **conditions, return_dict=False)[0]

                # perform guidance
                if self.do_classifier_free_guidance:
                    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)

                if self.do_classifier_free_guidance and self.guidance_rescale > 0.0:
                    # Based on 3.4. in https://huggingface.co/papers/2305.08891
                    noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, guidance_rescale=self.guidance_rescale)

                # T-SAM: a scheduler's corrector would take the move back
                # compute the previous noisy sample x_t -> x_t-1
                with uncorrected(self.scheduler, alignment.moved if updates[i] > 0 else None):
                    latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for k in callback_on_step_end_tensor_inputs:
                        callback_kwargs[k] = locals()[k]
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)

                    latents = callback_outputs.pop("latents", latents)
                    prompt_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)

                # call the callback, if provided
                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()
                    if callback is not None and i % callback_steps == 0:
                        step_idx = i // getattr(self.scheduler, "order", 1)
                        callback(step_idx, t, latents)

        if not output_type == "latent":
            image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False, generator=generator)[0]
            image, has_nsfw_concept = self.run_safety_checker(image, device, prompt_embeds.dtype)
        else:
            image = latents
            has_nsfw_concept = None

        if has_nsfw_concept is None:
            do_denormalize = [True] * image.shape[0]
        else:
            do_denormalize = [not has_nsfw for has_nsfw in has_nsfw_concept]
        image = self.image_processor.postprocess(image, output_type=output_type, do_denormalize=do_denormalize)

        # Offload all models
        self.maybe_free_model_hooks()

        losses = torch.empty(len(latents), 0) if alignment is None else alignment.losses_per_image()
        guided = [i for i, number in enumerate(updates) if number > 0]
        attentions = alignment.attentions(guided) if alignment is not None and output_attentions else None
        if not return_dict:
            return image, has_nsfw_concept, losses, attentions

        return StableDiffusionTSAMPipelineOutput(
            images=image, nsfw_content_detected=has_nsfw_concept, losses=losses, attentions=attentions
        )

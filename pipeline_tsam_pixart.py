"""PixArt-α with T-SAM: its cross-attention maps are held to the syntax that the text encoder reads.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need: Attention Control for Text-to-Image Semantic Alignment with
Text Self-Attention Maps", CVPR 2025 (arXiv:2411.15236). The denoising loop is diffusers' own (Apache-2.0) with the
latent moved before the first predictions.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import ImagePipelineOutput, PixArtAlphaPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_256_BIN,
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
    retrieve_timesteps,
)

from .attention_processors import (
    TSAMPipelineMixin,
    conditional_rows,
    frozen,
    mean_maps,
    mean_self_attention,
    one_at_a_time,
    record_cross_attention,
    record_self_attention,
    run_to_last_map,
    uncorrected,
)
from .tsam import (
    SCHEDULES,
    LatentAlignment,
    TextSelfAttention,
    check_alignment,
    check_integer,
    check_lengths,
    check_regions,
    check_text_self_attention,
    input_scale,
    layout_of,
    resolve_schedule,
    symmetrize,
    text_of,
    texts_of,
    updates_per_timestep,
)


PIXART_SCHEDULES = SCHEDULES | {
    "paper": SCHEDULES["paper"]._replace(iterations=20),  # of 50 steps 10 more updates; App. B.2
    "fast": SCHEDULES["fast"]._replace(iterations=16),  # a pass costs more than Stable Diffusion's
}
ASPECT_RATIO_BINS = {32: ASPECT_RATIO_256_BIN, 64: ASPECT_RATIO_512_BIN, 128: ASPECT_RATIO_1024_BIN}


@dataclass
class PixArtAlphaTSAMPipelineOutput(ImagePipelineOutput):
    """The stock output, and what T-SAM saw.

    losses: (images, updates) float32, each taken before its update; no columns where nothing was guided.
    attentions: with `output_attentions`, a dict per image, see `LatentAlignment.attentions`.
    """

    losses: torch.Tensor | None = None
    attentions: list[dict] | None = None


class PixArtAlphaTSAMPipeline(TSAMPipelineMixin, PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` whose first denoising steps are aligned with the prompt's syntax; same components."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    @property
    def guidance_scale(self):
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self):
        return self._guidance_scale > 1

    @property
    def num_timesteps(self):
        return self._num_timesteps

    @property
    def interrupt(self):
        return self._interrupt

    def cross_attention_layers(self, attention_layers: tuple[int, int] = (10, 18)) -> list:
        """The cross-attention layers of the transformer's blocks from the first to the last given, counted from 0.

        ValueError where there are no such blocks.
        """
        depth, remedy = len(self.transformer.transformer_blocks), "Pass the first and the last block to read, both read"
        if not isinstance(attention_layers, (tuple, list)) or len(attention_layers) != 2:
            raise TypeError(
                f"`attention_layers` has to be two integers but is {attention_layers!r}. {remedy}, as (10, 18)."
            )
        for block in attention_layers:
            check_integer("attention_layers", block, 0, f"{remedy}, as (10, 18).")
        first, last = attention_layers
        if not first <= last < depth:
            raise ValueError(
                f"`attention_layers` is ({first}, {last}), but this transformer has {depth} blocks, 0 to {depth - 1}."
                f" {remedy}, for instance ({10 * depth // 28}, {18 * depth // 28}), or `tsam_steps=0`."
            )
        return [block.attn2 for block in self.transformer.transformer_blocks[first : last + 1]]

    @torch.no_grad()
    def get_text_self_attention(
        self, prompt: str | list[str], clean_caption: bool = False, max_sequence_length: int = 120
    ) -> TextSelfAttention:
        """T' of one or more prompts, to be passed as `text_self_attention` where only embeddings are at hand.

        It is read while `encode_prompt` encodes them, with the same defaults, so it is of the tokens (cleaning,
        truncation, padding) that the embeddings are of.
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
        timestep = torch.as_tensor(t, device=latents.device).expand(len(latents))
        with frozen(self.transformer), record_cross_attention(layers, alignment.num_tokens, stop=True) as maps:

            def maps_at(model_input):
                run_to_last_map(self.transformer, model_input, timestep=timestep, **conditions)
                return mean_maps(maps, *latents.shape[-2:])

            return alignment.update(latents, input_scale(self.scheduler, t), maps_at, iterations)

    @one_at_a_time("transformer")
    # Inference mode makes tensors that autograd cannot use later; its callers get the same results without it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = None,
        negative_prompt: str = "",
        num_inference_steps: int = 20,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int | None = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, int, torch.Tensor], None] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 120,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        tsam_steps: int | None = None,
        alpha: float = 15.0,
        gamma: float = 4.0,
        refinement_steps: Sequence[int] | None = None,
        refinement_iterations: int | None = None,
        schedule: str = "paper",
        objective: str | Callable = "l1",
        relative_step: float | None = None,
        attention_layers: tuple[int, int] = (10, 18),
        text_self_attention: TextSelfAttention | None = None,
        output_attentions: bool = False,
        regions: dict | list[dict | None] | None = None,
        region_weight: float = 10.0,
        **kwargs,
    ) -> PixArtAlphaTSAMPipelineOutput | tuple:
        """Generate, as `PixArtAlphaPipeline.__call__` does, whose arguments these are up to `callback_on_step_end`.

        Args:
            callback_on_step_end (`Callable`, *optional*): Called after every denoising step as
                `callback_on_step_end(self, step, timestep, callback_kwargs)`; what it returns replaces the tensors
                named in `callback_on_step_end_tensor_inputs`. The stock PixArt pipeline has none.
            callback_on_step_end_tensor_inputs (`list[str]`): Of `latents`, `prompt_embeds`, `negative_prompt_embeds`.
            tsam_steps (`int`, *optional*): How many of the first denoising steps are guided. More holds the layout
                longer and costs more. `None`: as `schedule` says. 0: off, bit-identical to the stock pipeline.
            alpha (`float`, defaults to 15.0): α, the size of an update, taken at the model's input whatever the
                scheduler. More aligns harder, until the picture breaks. 0 only watches.
            gamma (`float`, defaults to 4.0): γ, the exponent of the text's self-attention. More keeps only the
                strongest bonds between words.
            refinement_steps (`Sequence[int]`, *optional*): Guided steps with more updates. `None`: as `schedule` says.
                `()`: none.
            refinement_iterations (`int`, *optional*): How many more updates, each a forward and a backward pass.
                `None`: as `schedule` says.
            schedule (`str`, defaults to `"paper"`): `"paper"`: half of the steps guided, and at 0, 20 and 40 percent of
                all steps as many more updates as 20 percent of their number. `"fast"`: a fifth of the steps guided, and
                16 percent of their number more at 0, 8 and 16 percent: with classifier-free guidance, a picture costs
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
            attention_layers (`tuple[int, int]`, defaults to (10, 18)): First and last transformer block, counted from
                0, whose cross-attention is read, with all between.
            text_self_attention (`TextSelfAttention`, *optional*): What `get_text_self_attention` returned, needed
                with `prompt_embeds` alone.
            output_attentions (`bool`, defaults to `False`): Also return tokens, T, and per guided step maps, S, and the
                share of each phrase's attention inside its region.
            regions (`dict` or a list of such, one a prompt, *optional*): Where phrases of the prompt are to be:
                `{"a red cube": (0, 0, 0.5, 1)}`, a box (x0, y0, x1, y1) in fractions of the picture, from its upper
                left corner, or a mask (h, w) of 0 to 1 (PIL, array or tensor) of the whole picture,
                before that is cut from a size that the model was trained on to its own.
            region_weight (`float`, defaults to 10.0): Weight, in the loss, of the attention outside the regions. More
                puts things where they are asked for, until they break. `objective=None` leaves it alone.

        Returns:
            [`PixArtAlphaTSAMPipelineOutput`], or with `return_dict=False` a tuple of its three fields: images, losses
            and attentions.

        Raises:
            ValueError, TypeError: a wrong argument, before the denoiser runs.
        """
        kwargs.pop("mask_feature", None)  # deprecated, without effect
        if kwargs:
            raise TypeError(f"`__call__` got unexpected arguments {', '.join(map(repr, kwargs))}.")

        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 0. Default height and width to transformer, and map them to the closest resolution it was trained on
        sample_size = self.transformer.config.sample_size
        height = height or sample_size * self.vae_scale_factor
        width = width or sample_size * self.vae_scale_factor
        if use_resolution_binning:
            if sample_size not in ASPECT_RATIO_BINS:
                raise ValueError(
                    f"There are no resolutions to choose from for a transformer with a sample size of {sample_size},"
                    f" only for {', '.join(map(str, ASPECT_RATIO_BINS))}. Pass `use_resolution_binning=False`."
                )
            orig_height, orig_width = height, width
            height, width = self.image_processor.classify_height_width_bin(
                height, width, ratios=ASPECT_RATIO_BINS[sample_size]
            )

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            callback_steps,
            prompt_embeds,
            negative_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )
        tensors = self._callback_tensor_inputs
        if not set(callback_on_step_end_tensor_inputs) <= set(tensors):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {tensors}, but is"
                f" {callback_on_step_end_tensor_inputs}."
            )
        custom_steps = timesteps if timesteps is not None else sigmas
        tsam_steps, refinement_steps, refinement_iterations = resolve_schedule(
            num_inference_steps if custom_steps is None else len(custom_steps),
            schedule,
            tsam_steps,
            refinement_steps,
            refinement_iterations,
            PIXART_SCHEDULES,
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
        if tsam_steps > 0:
            layers = self.cross_attention_layers(attention_layers)
            num_tokens = max_sequence_length if prompt_embeds is None else prompt_embeds.shape[1]
            check_text_self_attention(text_self_attention, prompt, batch_size, num_tokens)

        self._guidance_scale = guidance_scale
        self._interrupt = False

        device = self._execution_device

        # 3. Encode input prompt, and read its syntax
        reading = tsam_steps > 0 and text_self_attention is None
        with record_self_attention(self.text_encoder) if reading else nullcontext() as recordings:
            prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask = (
                self.encode_prompt(
                    prompt,
                    self.do_classifier_free_guidance,
                    negative_prompt=negative_prompt,
                    num_images_per_prompt=num_images_per_prompt,
                    device=device,
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    prompt_attention_mask=prompt_attention_mask,
                    negative_prompt_attention_mask=negative_prompt_attention_mask,
                    clean_caption=clean_caption,
                    max_sequence_length=max_sequence_length,
                )
            )
        if reading:
            text_self_attention = self.read_text_self_attention(recordings)
        alignment = None
        if tsam_steps > 0:
            check_lengths(text_self_attention, prompt_attention_mask[::num_images_per_prompt])
            words_of = functools.partial(self.words_of, clean_caption=clean_caption)
            layout = layout_of(regions, text_self_attention, words_of, num_images_per_prompt, device)
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
            prompt_attention_mask = torch.cat([negative_prompt_attention_mask, prompt_attention_mask])

        # 4. Prepare timesteps
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )

        # 5. Prepare latent variables
        latent_channels = self.transformer.config.in_channels
        latents = self.prepare_latents(
            batch_size * num_images_per_prompt,
            latent_channels,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )

        # 6. Prepare extra step kwargs
        extra_step_kwargs = self.prepare_extra_step_kwargs(generator, eta)

        # 6.1 Prepare micro-conditions
        added_cond_kwargs = {"resolution": None, "aspect_ratio": None}
        if sample_size == 128:
            resolution = torch.tensor([height, width]).to(prompt_embeds)
            aspect_ratio = torch.tensor([float(height / width)]).to(prompt_embeds)
            added_cond_kwargs = {
                "resolution": resolution.repeat(len(prompt_embeds), 1),
                "aspect_ratio": aspect_ratio.repeat(len(prompt_embeds), 1),
            }

        # 7. Denoising loop
        num_warmup_steps = max(len(timesteps) - num_inference_steps * self.scheduler.order, 0)
        self._num_timesteps = len(timesteps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
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
                    "encoder_attention_mask": prompt_attention_mask,
                    "added_cond_kwargs": added_cond_kwargs,
                }
                # T-SAM: move the latents until what the model looks at agrees with the syntax, Eq. (15)
                if updates[i] > 0:
                    latents = self.align_latents(alignment, latents, t, conditions, layers, updates[i])
                    if not progress_bar.disable:
                        progress_bar.set_postfix(loss=f"{alignment.losses[-1].mean().item():.3f}", refresh=False)

                # expand the latents if we are doing classifier free guidance
                latent_model_input = torch.cat([latents] * 2) if self.do_classifier_free_guidance else latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                batch = len(latent_model_input)  # a callback may have dropped the unconditional half

                # predict the noise residual
                timestep = torch.as_tensor(t, device=device).expand(batch)
                if not self.do_classifier_free_guidance:
                    conditions = conditional_rows(conditions, batch)
                noise_pred = self.transformer(latent_model_input, timestep=timestep, **conditions, return_dict=False)[0]

                # perform guidance
                if self.do_classifier_free_guidance:
                    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)

                # learned sigma
                if self.transformer.config.out_channels // 2 == latent_channels:
                    noise_pred = noise_pred.chunk(2, dim=1)[0]

                # T-SAM: a scheduler's corrector would take the move back
                # compute the previous noisy sample x_t -> x_t-1; a single step goes straight to x_0
                with uncorrected(self.scheduler, alignment.moved if updates[i] > 0 else None):
                    latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[
                        1 if num_inference_steps == 1 else 0
                    ]

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
            image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            if use_resolution_binning:
                image = self.image_processor.resize_and_crop_tensor(image, orig_width, orig_height)
            image = self.image_processor.postprocess(image, output_type=output_type)
        else:
            image = latents

        # Offload all models
        self.maybe_free_model_hooks()

        losses = torch.empty(len(latents), 0) if alignment is None else alignment.losses_per_image()
        guided = [i for i, number in enumerate(updates) if number > 0]
        attentions = alignment.attentions(guided) if alignment is not None and output_attentions else None
        if not return_dict:
            return image, losses, attentions

        return PixArtAlphaTSAMPipelineOutput(images=image, losses=losses, attentions=attentions)

"""T-SAM as blocks of diffusers' modular pipelines: Stable Diffusion XL, and experimentally SD3, FLUX and Anima.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236). Two kinds of stock blocks change
in every workflow: text steps read the text encoders' self-attention while they encode, and denoising loops move their
latents before they predict. Guiders, image to image, inpainting, ControlNet and IP-Adapter work, as no loop is copied.

The paper covers none of these models. "A choice" marks what had to be chosen.
"""

import copyreg
import functools
import inspect
import shutil
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers.modular_pipelines import (
    AnimaAutoBlocks,
    FluxAutoBlocks,
    StableDiffusion3AutoBlocks,
    StableDiffusionXLAutoBlocks,
)
from diffusers.modular_pipelines.anima.before_denoise import AnimaTextConditioningStep
from diffusers.modular_pipelines.flux.encoders import FluxTextEncoderStep
from diffusers.modular_pipelines.modular_pipeline import (
    BlockState,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    PipelineState,
)
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam
from diffusers.modular_pipelines.stable_diffusion_3.encoders import StableDiffusion3TextEncoderStep
from diffusers.modular_pipelines.stable_diffusion_xl.encoders import StableDiffusionXLTextEncoderStep
from transformers import T5EncoderModel, T5TokenizerFast

from .attention_processors import (
    lock_of,
    locked,
    mean_maps,
    mean_self_attention,
    record_cross_attention,
    record_joint_attention,
    record_self_attention,
    run_to_last_map,
    shadowed,
)
from .tsam import LatentAlignment, logger, symmetrize, text_of
from .tsam_arguments import (
    BlocksSettings,
    JointSettings,
    Settings,
    UNetSettings,
    blocks_between,
    check_text_self_attention,
    shares_of,
)
from .tsam_candidates import Scouted, chosen_of, generators_of, given_starts, least, restore, score
from .tsam_layout import Layout  # noqa: F401, because diffusers' loader copies the files that are named here
from .tsam_pipeline import TESTED, StandIn, frozen, input_scale, steps_of, uncorrected, updates_per_timestep
from .tsam_sd import text_of_clips, unet_layers


CODE = [f"{name}.py" for name in ("modular_tsam", "attention_processors", "tsam")]
CODE += [f"tsam_{name}.py" for name in ("arguments", "candidates", "layout", "pipeline", "sd")]
UNSUPPORTED = ("regions", "region_weight", "candidate_batch")  # pipelines have them


def inputs_of(settings):
    """The fields of `settings` as a block's inputs."""
    return [
        InputParam(each.name, default=each.default, description=each.metadata["help"])
        for each in fields(settings)
        if each.name not in UNSUPPORTED
    ]


TSAM_STEPS, CANDIDATES = (each for each in inputs_of(Settings) if each.name in ("tsam_steps", "candidates"))
TEXT_SELF_ATTENTION = OutputParam("text_self_attention", description="`TextSelfAttention` of the prompts.")
TSAM_OUTPUTS = [
    OutputParam("losses", description="(images, updates) float32, each taken before its update."),
    OutputParam("steps", description="The denoising step of each column of `losses`."),
    OutputParam("attentions", description="With `output_attentions` a dict per image: `LatentAlignment.attentions`."),
    OutputParam("candidate_losses", description="(images, candidates), with more than one candidate."),
    OutputParam("chosen", description="Which start each image was drawn from, (images,)."),
]


# ----------------------------------------------------------------------------------------------------------------------
# T: text steps


def text_of_t5(recordings, tokenizer):
    """T5's T', made causal like PixArt-α's, because T5 is bidirectional."""
    return text_of(symmetrize(mean_self_attention(recordings)), recordings[0].input_ids, tokenizer)


class TextStep:
    """Mixed into a stock text encoder step: reads T' while that encodes. tokenizer: its name, if not the encoder's."""

    tokenizer = None

    @property
    def inputs(self):
        return [*super().inputs, TSAM_STEPS, CANDIDATES]

    @property
    def intermediate_outputs(self):
        return [*super().intermediate_outputs, TEXT_SELF_ATTENTION]

    def get_block_state(self, state):
        block_state = super().get_block_state(state)
        block_state.text_self_attention = None  # stock puts out every declared output, also before it is known
        return block_state

    def __call__(self, components, state):
        remind(components)
        names = self.encoders(components)
        encoders = dict.fromkeys(getattr(components, f"text_{name}") for name in names)
        if state.get("tsam_steps") == 0 and state.get("candidates") in (None, 1):
            with locked(*encoders):  # because they tokenize
                return super().__call__(components, state)
        with record_self_attention(*encoders) as recordings:
            components, state = super().__call__(components, state)
        tokenizer = getattr(components, self.tokenizer or names[0].replace("encoder", "tokenizer"))
        state.set("text_self_attention", self.text(recordings, tokenizer, state.get("prompt_embeds").shape[1]))
        return components, state


class SDXLTextStep(TextStep, StableDiffusionXLTextEncoderStep):
    """Reads both CLIPs, or a refiner's only one."""

    def encoders(self, components):
        return ["encoder", "encoder_2"] if components.text_encoder is not None else ["encoder_2"]

    def text(self, recordings, tokenizer, length):
        return text_of_clips(recordings, tokenizer)


class FluxTextStep(TextStep, FluxTextEncoderStep):
    """T5. Its columns come first."""

    def encoders(self, components):
        return ["encoder_2"]

    def text(self, recordings, tokenizer, length):
        return text_of_t5(recordings, tokenizer)


class SD3TextStep(TextStep, StableDiffusion3TextEncoderStep):
    """Reads T5, with columns after CLIP's; without T5 both CLIPs, before as many columns of zeros."""

    def encoders(self, components):
        return ["encoder_3"] if components.text_encoder_3 is not None else ["encoder", "encoder_2"]

    def text(self, recordings, tokenizer, length):
        t5 = isinstance(recordings[0].encoder, T5EncoderModel)
        text = (text_of_t5 if t5 else text_of_clips)(recordings, tokenizer)
        others = length - text.content.shape[1]
        columns = (others, 0) if t5 else (0, others)
        return text._replace(attention=F.pad(text.attention, columns * 2), content=F.pad(text.content, columns))


class AnimaTextStep(TextStep, AnimaTextConditioningStep):
    """Reads the text conditioner's self-attention, symmetrised: a choice.

    The denoiser's columns are T5 tokens, of which there are ids but no T5: the conditioner embeds them, and in each
    block they attend to each other, in both directions, and then to Qwen3's states. No other attention is among them.
    Qwen3 reads the prompt, too, by its own tokens, which are not the columns.
    """

    tokenizer = "t5_tokenizer"

    @property
    def expected_components(self):
        return [*super().expected_components, ComponentSpec("t5_tokenizer", T5TokenizerFast)]

    def encoders(self, components):
        return ["conditioner"]

    def text(self, recordings, tokenizer, length):
        text = text_of_t5(recordings, tokenizer)
        others = 0, length - text.content.shape[1]
        return text._replace(attention=F.pad(text.attention, others * 2), content=F.pad(text.content, others))


class WaitingStep:
    """Mixed into a stock step that tokenizes and encodes, but does not give T: it waits, for `alone`'s reason."""

    def __call__(self, components, state):
        with locked(components.text_encoder):
            return super().__call__(components, state)


# ----------------------------------------------------------------------------------------------------------------------
# Candidates: steps that prepare latents


def copy_of(state, values):
    """A state to change, with other `values` but the same generators."""
    return PipelineState(state.values | values, deepcopy(state.kwargs_mapping))


class StartsStep:
    """Mixed into a stock step that prepares latents: does so for each candidate, one after another.

    Sets `starts`, for the loop: a pair for each, its values and the generators' states after it.
    """

    @property
    def inputs(self):
        return [*super().inputs, CANDIDATES]

    def __call__(self, components, state):
        given = self.get_block_state(state)
        number = Settings(tsam_steps=1, candidates=given.candidates).candidates  # checked
        if number == 1:
            return super().__call__(components, state)
        starts = state.get("starts")
        if starts is None:  # else another such step has run: image to image has two
            images = state.get("batch_size") * state.get("num_images_per_prompt", 1)
            starts = [({"latents": own}, []) for own in given_starts(state.get("latents"), images, number)]
        generators, prepared = generators_of(state.values, components._execution_device), []
        for values, states in starts:
            restore(generators, states)
            own = copy_of(state, values)
            super().__call__(components, own)
            changed = {name: value for name, value in own.values.items() if value is not state.get(name)}
            prepared.append((values | changed, [generator.get_state() for generator in generators]))
        state.values |= prepared[0][0] | {"starts": prepared}
        return components, state


# ----------------------------------------------------------------------------------------------------------------------
# Eq. (15): denoising loops


class Called(Exception):
    """A denoiser's stand-in raises it with the arguments."""

    @classmethod
    def how(cls, *args, **kwargs):
        raise cls(args, kwargs)


def usable(value):
    """Make nested arguments usable by autograd: copies inference mode's tensors, and dicts, because models write into
    them."""
    if torch.is_tensor(value):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {name: usable(item) for name, item in value.items()}
    return type(value)(map(usable, value)) if isinstance(value, (list, tuple)) else value


class AlignedLoop:
    """Mixed into a stock denoising loop: moves the latents before its first steps' predictions."""

    denoiser = "transformer"
    settings = Settings

    @property
    def loop_inputs(self):
        return [*super().loop_inputs, *inputs_of(self.settings)]

    @property
    def loop_intermediate_outputs(self):
        return [*super().loop_intermediate_outputs, *TSAM_OUTPUTS]

    def layers(self, model, settings):
        """The layers to read, in the order they run."""
        raise NotImplementedError

    def recording(self, block_state):
        """The context that reads the layers and stops after the last."""
        raise NotImplementedError

    def grid(self, block_state):
        """Height and width of the latents, or of the maps."""
        return block_state.latents.shape[-2:]

    def __call__(self, components, state):
        remind(components)
        model = getattr(components, self.denoiser)
        self.choose(components, state)
        if state.get("tsam_steps") == 0:
            return super().__call__(components, state)
        with lock_of(model), frozen(model) as state.saving:  # once a loop, because it walks over all weights
            try:
                return super().__call__(components, state)
            finally:
                del state.saving

    def choose(self, components, state):
        """Let the loop go on from each image's best start, and keep their losses and which was chosen."""
        given, starts = self.get_block_state(state), state.values.pop("starts", None)
        state.values |= {"candidate_losses": None, "chosen": None}
        if given.candidates == 1 or not len(given.timesteps):  # a low strength may leave no step: then stock draws
            return
        if starts is None:
            raise ValueError(
                f"`candidates` is {given.candidates}, but no step of T-SAM prepared the latents. Run one in the same"
                " pipeline, or pass `candidates=1`."
            )
        steps, stock = self.settings_of(given).chosen_after(given.num_inference_steps), self.progress_bar
        generators, losses = generators_of(state.values, components._execution_device), []

        def progress_bar(*args, **kwargs):
            bar = stock(total=steps)
            bar.set_description("choosing")
            return bar

        for values, states in starts:
            restore(generators, states)
            scout = copy_of(state, values)
            scout.scored_at = (steps - 1) * components.scheduler.order
            scouting = StandIn(components, scheduler=deepcopy(components.scheduler))
            with lock_of(getattr(components, self.denoiser)), shadowed(self, "progress_bar", progress_bar):
                try:
                    super().__call__(scouting, scout)
                except Scouted as scouted:
                    losses.append(scouted.loss)
        restore(generators, starts[0][1])
        losses = torch.stack(losses, 1)
        chosen = least(losses)
        state.values |= chosen_of([values for values, _ in starts], chosen)
        state.values |= {"candidate_losses": losses, "chosen": chosen}

    def get_block_state(self, state):
        block_state = super().get_block_state(state)
        block_state.saving = getattr(state, "saving", nullcontext)
        block_state.scored_at = getattr(state, "scored_at", None)  # where a start's loss is taken and the loop ends
        block_state.candidate_losses, block_state.chosen = state.get("candidate_losses"), state.get("chosen")
        return block_state

    def settings_of(self, block_state):
        names = [each.name for each in fields(self.settings) if each.name not in UNSUPPORTED]
        return self.settings(**{name: getattr(block_state, name) for name in names})

    def loop_step(self, components, block_state, i, t):
        if i == 0:
            self.begin(components, block_state)
        if i == block_state.scored_at:
            with self.maps_of(components, block_state, i, t) as maps_at:
                scale = input_scale(components.scheduler, t)
                raise Scouted(block_state.alignment.loss_of(maps_at(scale * block_state.latents)))
        moving = block_state.updates[i] > 0
        if moving:
            self.align(components, block_state, i, t)
        with uncorrected(components.scheduler, block_state.alignment if moving else None):
            return super().loop_step(components, block_state, i=i, t=t)

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin(self, components, block_state):
        """Check the arguments, and plan the updates."""
        given, scheduler, timesteps = block_state, components.scheduler, block_state.timesteps
        block_state.alignment, block_state.updates = None, [0] * len(timesteps)
        block_state.given = settings = self.settings_of(given)
        plan, scouting = settings.plan(given.num_inference_steps), given.scored_at is not None
        if plan.tsam_steps == 0 and not scouting:
            return
        model = getattr(components, self.denoiser)
        block_state.layers = self.layers(model, settings)
        text, latents = settings.text_self_attention, given.latents
        if text is None:
            raise ValueError(
                "T is not known, since no text step of T-SAM ran with `tsam_steps` above 0. Pass the"
                " `text_self_attention` that it returns for the same prompts, or `tsam_steps=0` and no `candidates`."
            )
        check_text_self_attention(text, None, None, given.prompt_embeds.shape[1])
        images = max(len(latents) // len(text.tokens), 1)
        block_state.alignment = LatentAlignment(text, score() if scouting else settings, images, latents.device)
        if not scouting and block_state.alignment.possible():
            steps = given.num_inference_steps
            block_state.updates = updates_per_timestep(scheduler, steps, *plan, len(timesteps))

    def conditional_call(self, components, block_state, i, t):
        """The arguments of this loop's first denoiser call, which is the conditional one under every guider."""
        model = getattr(components, self.denoiser)
        components = StandIn(components, **{self.denoiser: StandIn(model, Called.how)})
        block_state = BlockState(**block_state.as_dict())
        try:
            for block in self.sub_blocks.values():
                components, block_state = block(components, block_state, i=i, t=t)
        except Called as call:
            return usable(call.args)
        raise RuntimeError(f"{type(self).__name__} did not call its `{self.denoiser}`. Pass `tsam_steps=0`.")

    @torch.inference_mode(False)
    @torch.no_grad()
    def align(self, components, block_state, i, t):
        """Move the latents before the prediction at timestep `t`."""
        latents, iterations = usable(block_state.latents), block_state.updates[i]
        with block_state.saving(), self.maps_of(components, block_state, i, t) as maps_at:
            scale = input_scale(components.scheduler, t)
            block_state.latents = block_state.alignment.update(latents, scale, maps_at, iterations)

    @contextmanager
    def maps_of(self, components, block_state, i, t):
        """Yield the function that returns the maps of a model input at timestep `t`."""
        model = getattr(components, self.denoiser)
        args, kwargs = self.conditional_call(components, block_state, i, t)
        sample, *args = args or [kwargs.pop("hidden_states")]
        beside = sample[:, block_state.latents.shape[1] :]  # an inpainting model's mask and picture
        kwargs.pop("return_dict", None)
        with self.recording(block_state) as maps:

            def maps_at(model_input):
                model_input = torch.cat([model_input.to(sample.dtype), beside], 1)
                run_to_last_map(model, model_input, *args, **usable(kwargs))
                return mean_maps(maps, *self.grid(block_state))

            yield maps_at

    def set_block_state(self, state, block_state):
        alignment = getattr(block_state, "alignment", None)
        block_state.losses, block_state.steps = torch.empty(len(block_state.latents), 0), []
        block_state.attentions = None
        if alignment is not None:
            block_state.losses = alignment.losses_per_image()
            block_state.steps = steps_of(block_state.updates)
            if alignment.keep_maps:
                block_state.attentions = alignment.attentions(block_state.steps)
        super().set_block_state(state, block_state)


class UNetLoop(AlignedLoop):
    """SDXL's cross-attention."""

    denoiser = "unet"
    settings = UNetSettings

    def layers(self, model, settings):
        return unet_layers(model, settings.attention_resolution)

    def recording(self, block_state):
        return record_cross_attention(block_state.layers, block_state.alignment.num_tokens, stop=True)


class AnimaLoop(AlignedLoop):
    """Anima's cross-attention, whose columns are T5 tokens."""

    settings = BlocksSettings
    recording = UNetLoop.recording

    def layers(self, model, settings):
        blocks, given = model.transformer_blocks, settings.attention_layers
        return [block.attn2 for block in blocks_between(blocks, shares_of(len(blocks)) if given is None else given)]


class JointLoop(AlignedLoop):
    """SD3 and FLUX: image rows and text columns of joint attention. The keys and the blocks are a choice.

    FLUX's single blocks count on from its double ones, but cost three times as much, so the default reads double ones.
    """

    settings = JointSettings

    def layers(self, model, settings):
        blocks = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]
        given = settings.attention_layers
        given = shares_of(len(model.transformer_blocks)) if given is None else given
        return [block.attn for block in blocks_between(blocks, given)]

    def recording(self, block_state):
        num_tokens, num_text = block_state.alignment.num_tokens, block_state.prompt_embeds.shape[1]
        all_keys = block_state.given.attention_keys == "all"
        return record_joint_attention(block_state.layers, num_tokens, num_text, all_keys, stop=True)


class FluxLoop(JointLoop):
    def grid(self, block_state):
        return tuple(1 + int(position) for position in block_state.img_ids[:, 1:].amax(0))


# ----------------------------------------------------------------------------------------------------------------------
# Blocks


class Mixture(type):
    """A class of two others. No module has it, so that it is pickled as these."""


def mixture(name, mixin, cls):
    return Mixture(name, (mixin, cls), {"__module__": cls.__module__})


copyreg.pickle(Mixture, lambda cls: (mixture, (cls.__name__, *cls.__bases__)))


class RemindsOfCode:
    """Warns on `save_pretrained` that the code is left out, because stock saves only weights."""

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        logger.warning(
            f"{save_directory} has no code of T-SAM: loaded as it is, it draws without. Load it by"
            f" `{self._blocks.__class__.__name__}().init_pipeline({str(save_directory)!r})`, or add the code by"
            f" `pipe.blocks.save_pretrained({str(save_directory)!r})`."
        )


def remind(pipeline):
    """Mix `RemindsOfCode` into a pipeline's class."""
    cls = type(pipeline)
    if hasattr(pipeline, "_blocks") and not isinstance(pipeline, RemindsOfCode):
        pipeline.__class__ = mixture(cls.__name__, RemindsOfCode, cls)


def mixed(mixin, block):
    """A block of the class of `block`, with `mixin` before it."""
    cls = type(block)
    return mixture(f"TSAM{cls.__name__}", mixin, cls)()


class TSAMBlocks:
    """Replaces stock blocks' text steps and loops by ours."""

    text_step = loop = None

    def __init__(self):
        super().__init__()
        self.sub_blocks = deepcopy(self.sub_blocks)  # stock's instances share them
        if not self._replace(self.sub_blocks):
            raise RuntimeError(
                f"{type(self).__name__} found no denoising loop that takes steps as in diffusers {TESTED}, its tested"
                f" one, in diffusers {diffusers.__version__}. Install that one, or use a pipeline class."
            )

    def _replace(self, blocks):
        """Count the replaced loops. diffusers' pull request 14159 will change the signature of `loop_step`."""
        loops = 0
        stock = next(cls for cls in self.text_step.__mro__ if cls.__module__.startswith("diffusers."))
        for name, block in blocks.items():
            if type(block) is stock:
                blocks[name] = self.text_step()
            elif isinstance(block, LoopSequentialPipelineBlocks):
                if list(inspect.signature(type(block).loop_step).parameters)[:2] == ["self", "components"]:
                    blocks[name] = mixed(self.loop, block)
                    loops += 1
            elif type(block).__name__.endswith("TextEncoderStep"):  # Anima's
                blocks[name] = mixed(WaitingStep, block)
            elif type(block).__name__.endswith("PrepareLatentsStep"):
                blocks[name] = mixed(StartsStep, block)
            else:
                loops += self._replace(block.sub_blocks)
        return loops

    def __call__(self, components, state):
        name = self.loop.denoiser
        if getattr(components, name, self) is None:  # blocks that only encode have no such attribute
            raise ValueError(
                f"This pipeline has no `{name}` and cannot draw. Call `load_components()`, or give it one by"
                f" `update_components({name}=...)`."
            )
        return super().__call__(components, state)

    @property
    def outputs(self):
        return [*super().outputs, *TSAM_OUTPUTS]

    def get_workflow(self, workflow_name):
        """The stock method, but its result saves its code, too."""
        blocks = super().get_workflow(workflow_name)
        blocks.__class__ = type(self)
        return blocks

    def init_pipeline(self, *args, **kwargs):
        pipeline = super().init_pipeline(*args, **kwargs)
        remind(pipeline)
        return pipeline

    @functools.wraps(ModularPipelineBlocks.save_pretrained)  # it looks at its own name
    def save_pretrained(self, save_directory, *args, **kwargs):
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for file in CODE:
            shutil.copy(Path(__file__).with_name(file), save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


class StableDiffusionXLTSAMBlocks(TSAMBlocks, StableDiffusionXLAutoBlocks):
    """`StableDiffusionXLAutoBlocks` that aligns its first denoising steps with the prompt's syntax.

    `StableDiffusionXLTSAMBlocks().get_workflow("text2image").init_pipeline(ID)` makes a pipeline that takes
    `inputs_of(UNetSettings)`. Wrong ones raise ValueError or TypeError before the UNet runs.
    """

    text_step, loop = SDXLTextStep, UNetLoop


class StableDiffusion3TSAMBlocks(TSAMBlocks, StableDiffusion3AutoBlocks):
    """Experimental: `StableDiffusion3AutoBlocks` with T-SAM; see `JointSettings` and `JointLoop`."""

    text_step, loop = SD3TextStep, JointLoop


class FluxTSAMBlocks(TSAMBlocks, FluxAutoBlocks):
    """Experimental: `FluxAutoBlocks` with T-SAM; see `JointSettings` and `JointLoop`."""

    text_step, loop = FluxTextStep, FluxLoop


class AnimaTSAMBlocks(TSAMBlocks, AnimaAutoBlocks):
    """Experimental: `AnimaAutoBlocks` with T-SAM; see `BlocksSettings` and `AnimaTextStep`."""

    text_step, loop = AnimaTextStep, AnimaLoop

"""Stable Diffusion's ControlNet with T-SAM.

Kim, Esmaeili, Qiu, "Text Embedding is Not All You Need", CVPR 2025 (arXiv:2411.15236).
"""

from contextlib import contextmanager, nullcontext

import torch.nn.functional as F
from diffusers import StableDiffusionControlNetPipeline

from .attention_processors import locked
from .tsam import LatentAlignment  # noqa: F401, because diffusers' loader copies the files that are named here
from .tsam_arguments import StableDiffusionSettings
from .tsam_candidates import choose  # noqa: F401
from .tsam_layout import Layout  # noqa: F401
from .tsam_pipeline import StandIn, call_of, conditional_rows, frozen
from .tsam_sd import StableDiffusionTSAM, WindowedLoop


class ControlledLoop(WindowedLoop):
    """Recomputes ControlNet's residuals after moving the latents, because they depend on the model input.

    controlled: stock's arguments to the ControlNet in this step, after the model input.
    """

    @contextmanager
    def prepared(self):
        model = self.pipe.controlnet
        with (
            locked(*getattr(model, "nets", [model])),  # another UNet's pipeline may share it
            frozen(model) if self.guided else nullcontext(nullcontext) as saving,
            super().prepared(),
        ):
            self.saving = self.saving if saving is nullcontext else saving  # if either exchanges its weights
            yield

    def encode(self, *args, **kwargs):
        encoded = super().encode(*args, **kwargs)
        mask = self.conditions.get("encoder_attention_mask")
        halves = 2 if self.pipe.do_classifier_free_guidance else 1
        if mask is not None and not mask.unflatten(0, (halves, -1)).any(0).all():
            raise ValueError(
                "These prompts take different numbers of windows, but a ControlNet reads a batch's empty ones, too."
                " Draw them in calls of their own, or leave out `max_sequence_length`."
            )
        return encoded

    def parts(self):
        return super().parts() | {"controlnet": StandIn(self.pipe.controlnet, self.control)}

    def control(self, sample, *args, **kwargs):
        self.controlled = args, kwargs
        return self.pipe.controlnet(sample, *args, **kwargs)

    def network(self, sample, beside, *args, **kwargs):
        rows = min(len(sample), len(self.controlled[1]["encoder_hidden_states"]))  # `guess_mode`: the last half only
        own_args, own = conditional_rows(self.controlled, rows)
        down, middle = self.pipe.controlnet(sample[-rows:], *own_args, **own)
        *down, middle = (F.pad(part, (0,) * 6 + (len(sample) - rows, 0)) for part in (*down, middle))
        kwargs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return super().network(sample, beside, *args, **kwargs)


class StableDiffusionControlNetTSAMPipeline(StableDiffusionTSAM, StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` that aligns its first denoising steps with the prompt's syntax.

    An update also runs the ControlNet forward and backward, and a guided step once more forward.
    """

    loop = ControlledLoop

    __call__ = call_of(StableDiffusionControlNetPipeline, StableDiffusionSettings)

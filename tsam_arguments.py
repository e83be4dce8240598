"""The arguments that T-SAM adds to a call: names, defaults, meanings, presets and checks. Imports no torch."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args, get_origin


# The keys of tsam.OBJECTIVES, and "layout": the regions' loss alone.
OBJECTIVE_NAMES = ("l1", "cosine", "attainable", "relation", "contrast", "layout")


class Preset(NamedTuple):
    """What a call uses for arguments that the caller leaves out. `guided`, `refined` and `iterations` are percentages
    of the denoising steps: how many of the first are guided, which of them get more updates, and how many more each."""

    objective: str
    gamma: float
    alpha: float | None
    relative_step: float | None
    guided: int
    refined: tuple
    iterations: int


PRESETS = {
    # App. B.2: 25 of 50 steps, with 20 more updates at 0, 10 and 20
    "paper": Preset("l1", 2.0, 10.0, None, 50, (0, 20, 40), 40),
    # Ours. 10 of 50 steps, 10 more updates at 0, 4 and 8: 1.4 times a plain picture's operations, on SDXL 1.7 times
    "fast": Preset("contrast", 4.0, None, 0.05, 20, (0, 8, 16), 20),
    # Ours, 1.1 times a plain picture's operations, on SDXL 1.2 times
    "light": Preset("contrast", 4.0, None, 0.05, 20, (), 0),
}
CHOSEN_AFTER = 20  # percent of the steps: on most models as good as 40 (benchmarks/RESULTS.md) at half the cost

T5_PRESETS = {
    "paper": PRESETS["paper"]._replace(gamma=4.0, alpha=15.0, iterations=20),  # App. B.2, PixArt-α
    "fast": PRESETS["fast"]._replace(iterations=16),  # a pass costs more than Stable Diffusion's
    "light": PRESETS["light"],
}


class Plan(NamedTuple):
    """Which denoising steps are guided: the first `tsam_steps`; those in `refinement_steps` (a set) get
    `refinement_iterations` more updates each."""

    tsam_steps: int
    refinement_steps: frozenset
    refinement_iterations: int


OFF = Plan(0, frozenset(), 0)


def argument(default, help, choices=None):
    """A field of `Settings`: its default, its line in every front's documentation, and its choices, if any."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Settings:
    """T-SAM's arguments of one call, checked. The preset fills in None; `plan` does so for those that need the number
    of steps. With `tsam_steps=0` nothing else is used.

    ValueError or TypeError for a wrong value, with the value, the limit and the remedy.
    """

    tsam_steps: int | None = argument(
        None,
        "How many of the first denoising steps are guided. More holds the layout longer and costs more. 0: off,"
        " bit-identical to the stock pipeline.",
    )
    alpha: float | None = argument(
        None,
        "α of Eq. (15), the size of an update, taken at the model's input whatever the scheduler. More aligns harder,"
        " until the picture breaks. 0 only watches.",
    )
    gamma: float | None = argument(
        None, "γ of Eq. (14), the exponent of the text's self-attention. More keeps only the strongest bonds of words."
    )
    refinement_steps: Sequence[int] | None = argument(None, "Guided steps with more updates. (): none.")
    refinement_iterations: int | None = argument(None, "How many more updates at each of these.")
    preset: str = argument(
        "paper",
        "Gives every setting that is left out. 'paper': the paper's. 'fast': ours, 1.3 to 1.7 times a plain picture's"
        " operations. 'light': ours, 1.1 to 1.2 times.",
        tuple(PRESETS),
    )
    objective: str | Callable | None = argument(
        None,
        "'l1': Eq. (14). 'contrast': ours, unrelated words apart, related ones together, one place for a word;"
        " 'relation' without the last, for prompts such as 'two cats'. 'attainable': Eq. (14) against the nearest T"
        " that S can take. 'cosine': the authors' released default. 'layout': the regions' loss alone. Or a function of"
        " the maps (B, N, H, W) and the prompts' `Syntax` (see `tsam.py`) that returns a loss per image, (B,), and"
        " reads no tokens but `content`.",
        OBJECTIVE_NAMES,
    )
    relative_step: float | None = argument(
        None,
        "Instead of `alpha`, which needs tuning for every model: how far an image's first update moves the model's"
        " input, as a share of its norm, 0.05 for instance. Later updates shrink as the loss does.",
    )
    text_self_attention: Any = argument(
        None,
        "What `get_text_self_attention` returns for the same prompts; needed with `prompt_embeds` alone.",
    )
    output_attentions: bool = argument(
        False, "Also return tokens, T, and per guided step maps, S and each phrase's share of attention in its region."
    )
    regions: dict | list | None = argument(
        None,
        "Where phrases of the prompt are to be, a dict or a list of such, one a prompt: {'a red cube': (0, 0, 0.5, 1)}"
        " is a box (x0, y0, x1, y1) in fractions of the picture from its upper left corner; or a mask tensor (h, w) of"
        " 0 to 1.",
    )
    region_weight: float = argument(
        10.0, "Weight in the loss of attention outside the regions. More holds phrases there harder, until they break."
    )

    candidates: int = argument(
        1,
        "How many starts are drawn for each image. Each runs unguided through `candidate_steps`; the one whose maps"
        " agree best with the text is drawn. The first is what 1 would draw.",
    )
    candidate_steps: int | None = argument(
        None, "After how many steps the starts are compared. None: a fifth of the steps."
    )
    candidate_batch: int | None = argument(
        None,
        "How many starts of an image run at once. More is faster and takes more memory, up to that of as many images;"
        " the choice is the same. None: one. Image to image and inpainting run one after another.",
    )

    presets = PRESETS

    def __post_init__(self):
        if self.tsam_steps is not None:
            check_integer("tsam_steps", self.tsam_steps, 0, "Pass 0 for off, or None for what the preset says.")
        if not isinstance(self.preset, str) or self.preset not in self.presets:
            if self.off:
                return
            raise ValueError(f"`preset` is {self.preset!r}, but has to be {one_of(self.presets)}.")
        self.percent = self.presets[self.preset]
        check_integer("candidates", self.candidates, 1, "Pass how many starts to choose from, 4 for instance.")
        if self.candidate_steps is not None:
            check_integer("candidate_steps", self.candidate_steps, 1, "Pass how many steps to look ahead, 5 of 25.")
        if self.candidate_batch is not None:
            check_integer("candidate_batch", self.candidate_batch, 1, "Pass how many starts of an image run at once.")
        if self.off:
            return
        if self.alpha is not None and self.relative_step is not None:
            raise ValueError(
                f"`alpha` is {self.alpha!r} and `relative_step` {self.relative_step!r}, but either gives the size of an"
                " update. Leave one out."
            )
        if self.alpha is None and self.relative_step is None:
            self.alpha, self.relative_step = self.percent.alpha, self.percent.relative_step
        self.gamma = self.percent.gamma if self.gamma is None else self.gamma
        self.objective = self.percent.objective if self.objective is None else self.objective
        self._check()

    @property
    def given(self):
        """The call arguments that give these settings again."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def off(self):
        return self.tsam_steps == 0

    def _check(self):
        if self.alpha is not None:
            check_number("alpha", self.alpha, "Pass the size of an update, 10.0 for instance.", least=0)
        if self.relative_step is not None:
            remedy = "Pass a share of the input's norm, 0.05 for instance, or `alpha` instead."
            check_number("relative_step", self.relative_step, remedy, least=0, most=1)
        check_number("gamma", self.gamma, "Pass the exponent of T, 2.0 for instance.", above=0)
        check_number("region_weight", self.region_weight, "Pass the weight of the regions' loss, 10.0.", least=0)
        known = isinstance(self.objective, str) and self.objective in OBJECTIVE_NAMES
        if not known and not callable(self.objective):
            raise ValueError(
                f"`objective` is {self.objective!r}, but has to be {one_of(OBJECTIVE_NAMES)}, or a function"
                " (maps, text)."
            )
        if self.objective == "layout" and not self.regions:
            raise ValueError("`objective` is 'layout', but there are no `regions` to hold. Pass some, or leave it out.")
        if self.refinement_iterations is not None:
            check_integer("refinement_iterations", self.refinement_iterations, 0, "Pass 0 for no refinement.")
        if self.refinement_steps is not None:
            if isinstance(self.refinement_steps, (str, bytes)) or not hasattr(self.refinement_steps, "__iter__"):
                raise TypeError(
                    f"`refinement_steps` has to be a sequence but is {self.refinement_steps!r}. Pass (0, 10)."
                )
            self.refinement_steps = tuple(self.refinement_steps)
            for step in self.refinement_steps:
                check_integer("refinement_steps", step, 0, "Steps count from 0; pass () for no refinement.")

    def plan(self, num_steps):
        """The `Plan` for `num_steps` denoising steps. ValueError for a step beyond them."""
        check_integer("num_inference_steps", num_steps, 1, "50 is usual.")
        if self.off:
            return OFF
        percent, tsam_steps, iterations = self.percent, self.tsam_steps, self.refinement_iterations
        if tsam_steps is None:
            tsam_steps = max(num_steps * percent.guided // 100, 1)
        if tsam_steps > num_steps:
            raise ValueError(
                f"`tsam_steps` is {tsam_steps}, but there are only {num_steps} denoising steps. Pass 0 to {num_steps}"
                f" (0 is off), or None for {percent.guided} % of the steps."
            )
        if iterations is None:
            iterations = num_steps * percent.iterations // 100
        if self.refinement_steps is None:
            refined = {num_steps * share // 100 for share in percent.refined}
            return Plan(tsam_steps, frozenset(step for step in refined if step < tsam_steps), iterations)
        for step in self.refinement_steps:
            if step >= tsam_steps:
                raise ValueError(
                    f"`refinement_steps` has {step}, but only steps 0 to {tsam_steps - 1} are guided: `tsam_steps` is"
                    f" {tsam_steps}. Leave it out, or raise `tsam_steps`."
                )
        return Plan(tsam_steps, frozenset(self.refinement_steps), iterations)

    def chosen_after(self, num_steps):
        """After how many of `num_steps` denoising steps the starts are compared. ValueError if it is more."""
        steps = max(num_steps * CHOSEN_AFTER // 100, 1) if self.candidate_steps is None else self.candidate_steps
        if steps > num_steps:
            raise ValueError(
                f"`candidate_steps` is {steps}, but there are only {num_steps} denoising steps. Pass 1 to {num_steps}."
            )
        return steps

    @classmethod
    def documentation(cls):
        """The lines of an `Args:` section, one per argument, as in diffusers."""
        lines = []
        for each in fields(cls):
            kind = (
                each.type.__name__ if isinstance(each.type, type) else re.sub(r"[a-z]+\.| \| None", "", str(each.type))
            )
            default = "*optional*" if each.default is None else f"defaults to {each.default!r}"
            lines.append(f"{each.name} (`{kind}`, {default}): {each.metadata['help']}")
        return lines


@dataclass
class StableDiffusionSettings(Settings):
    """`Settings`, plus Stable Diffusion's own."""

    attention_resolution: int = argument(
        16, "Side of the query grid, at the model's default size, whose cross-attention layers are read."
    )
    max_sequence_length: int | None = argument(
        None,
        "How many tokens of a prompt are encoded, <bos> and <eos> apart, 300 for instance: in windows, of as many as"
        " the text encoder takes at once. A window ends with a sentence, else behind a comma, else between words; words"
        " of different windows are not compared. None: one window, as in stock.",
    )


@dataclass
class PixArtAlphaSettings(Settings):
    """`Settings`, plus PixArt-α's own."""

    attention_layers: tuple[int, int] = argument(
        (10, 18),
        "First and last transformer block, counted from 0, whose cross-attention is read, with all between.",
    )

    presets = T5_PRESETS


@dataclass
class UNetSettings(Settings):
    """`Settings`, plus SDXL's own."""

    attention_resolution: int | None = argument(None, "Side of the grid that is read. None: the latent's quarter.")


@dataclass
class BlocksSettings(Settings):
    """`Settings`, plus which blocks of a transformer of any depth are read: Wan's and Anima's."""

    attention_layers: tuple[int, int] | None = argument(
        None, "First and last block that are read. None: those at 10/28 to 18/28."
    )

    presets = T5_PRESETS  # T5 reads, as in PixArt-α


@dataclass
class JointSettings(BlocksSettings):
    """`Settings`, plus those of SD3's and FLUX's blocks."""

    attention_keys: str = argument("text", "'text': a softmax over the text's keys; 'all': over the image's, too.")

    def _check(self):
        super()._check()
        if self.attention_keys not in ("text", "all"):
            raise ValueError(f"`attention_keys` is {self.attention_keys!r}, but has to be {one_of(('text', 'all'))}.")


def kind_of_field(each):
    """The type of a field of `Settings`, except None: `int` for `int | None`, `tuple` for `tuple[int, int]`."""
    kind = next((kind for kind in get_args(each.type) if kind is not type(None)), each.type)
    kind = each.type if get_origin(each.type) is tuple else kind
    return get_origin(kind) or kind


def one_of(names):
    return f"one of {', '.join(map(repr, names))}"


def check_integer(name, value, limit, remedy):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` has to be an integer but is {value!r}. {remedy}")
    if value < limit:
        raise ValueError(f"`{name}` is {value}, but has to be at least {limit}. {remedy}")


def shares_of(depth):
    """PixArt-α's first and last block of 28 as shares of a depth: a choice."""
    return 10 * depth // 28, 18 * depth // 28


def blocks_between(blocks, attention_layers):
    """The blocks from the first to the last of `attention_layers`, counted from 0."""
    depth, remedy = len(blocks), "Pass the first and the last block to read, both read"
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
            f" {remedy}, for instance {shares_of(depth)}, or `tsam_steps=0`."
        )
    return blocks[first : last + 1]


def check_number(name, value, remedy, least=-sys.float_info.max, most=sys.float_info.max, above=None):
    if getattr(value, "ndim", None) == 0:  # one number in a tensor or array
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` has to be a number but is {value!r}. {remedy}")
    if not abs(value) <= sys.float_info.max:  # also catches huge integers
        raise ValueError(f"`{name}` is {value}, but has to be finite. {remedy}")
    if above is not None and value <= above:
        raise ValueError(f"`{name}` is {value}, but has to be above {above}. {remedy}")
    if not least <= value <= most:
        limit = f"at least {least}" if most == sys.float_info.max else f"between {least} and {most}"
        raise ValueError(f"`{name}` is {value}, but has to be {limit}. {remedy}")


def check_text_self_attention(text, prompt, batch_size, num_tokens, window=None):
    """Check the caller's `TextSelfAttention` for `batch_size` prompts of `num_tokens` tokens, possibly in windows of
    `window` tokens each. If it is None, `prompt` must not be."""
    import torch

    if text is None:
        if prompt is None:
            raise ValueError(
                "T cannot be known from `prompt_embeds` alone. Pass `text_self_attention=pipe."
                "get_text_self_attention(prompt)` with them, or `tsam_steps=0`."
            )
        return
    remedy = "Pass what `get_text_self_attention` returns for the same prompts."
    if not {"attention", "content", "tokens"} <= set(getattr(text, "_fields", ())):
        raise TypeError(f"`text_self_attention` is {type(text)}. {remedy}")
    attention, content, texts = text.attention, text.content, text.tokens
    if not torch.is_tensor(attention) or not torch.is_tensor(content) or content.dtype != torch.bool:
        raise TypeError(
            "`text_self_attention` has to hold a tensor of attention and a bool tensor of content tokens. " + remedy
        )
    if batch_size is None:
        batch_size = len(texts)
    in_windows = window is not None and num_tokens % window == 0 and attention.shape[-1:] == (window,)
    # Padding to a longer negative prompt makes embeddings longer than T; refuse it if T's prompt may be cut off.
    whole = attention.dim() == 3 and content.dim() == 2 and content.sum(-1).max() < content.shape[1] - 2
    length = min(attention.shape[1], num_tokens) if whole else num_tokens
    expected = (batch_size, length, window if in_windows else length)
    if batch_size == 0 or (*attention.shape, *content.shape, len(texts)) != (*expected, *expected[:2], batch_size):
        raise ValueError(
            f"`text_self_attention` has attention {tuple(attention.shape)}, content {tuple(content.shape)} and"
            f" {len(texts)} lists of tokens, but these prompts need {expected}, {expected[:2]} and {batch_size}."
            f" {remedy} For a long prompt's embeddings, give it the `max_sequence_length` that they were made with."
        )
    if not attention.isfinite().all() or (attention < 0).any():
        raise ValueError(f"`text_self_attention` has negative or non-finite attention, not probabilities. {remedy}")

"""No call ends half-way: it draws what was asked for, or is refused before the denoiser runs."""

import functools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusers_tsam.tsam import OBJECTIVES
from kinds import INPUTS, KINDS, PROMPT, calls_of, denoiser_of, embeddings, make, refused, run, state_of
from tiny import BYTES, WORDS, tiny_components, tiny_pixart_components


TEXTS = [
    "",
    " \t\n ",
    "car",
    "car car car car",
    "?!... -- ,;: ()[]{}",
    "(red:1.3) cube and ((blue)) [sphere]",
    "a 🐱 and a 👩‍👩‍👧 on the table",
    "كرة زرقاء ومكعب أحمر",
    "e\u0301 \u202ered\u202c a\u0000b\u0007\u001b[31m \u200bcube\ufeff",
    "<|endoftext|> a red car </s> <pad> <unk>",
    "a red cube " * 909,  # 10,000 characters
    "x" * 10_000,
]


def keep(pipe, step, t, tensors):
    return tensors


CALL = {"prompt": PROMPT, "num_inference_steps": 1, "tsam_steps": None, "refinement_steps": None, "preset": "paper"}
CALL |= {"refinement_iterations": 1, "num_images_per_prompt": 1, "height": 16, "width": 32, "generator": 0}
CALL |= {"output_type": "np", "return_dict": True, "output_attentions": False}
TWICE = {"num_images_per_prompt": 2, "output_attentions": True}
# Drawn by one pipeline or the other, or with some other arguments
ODD = {
    "negative_prompt": ["", ["a dog"]],
    "num_images_per_prompt": [True],
    "guidance_scale": [0, -3, 1, "7.5", None, torch.tensor(2.0)],
    "alpha": [0, 1, 1e-300, 1e300, 10**300, Fraction(21, 2), torch.ones(())],
    "relative_step": [0, 1, Fraction(1, 10), torch.tensor(0.5)],
    "gamma": [1, 1e-300, 1e300, 10**300, Fraction(3, 2)],
    "refinement_steps": [{0}, range(1), (0, 0), {0: 1}],
    "height": [0, None, 24, 4, 30, 1.5, math.nan, "32", [32]],
    "width": [0, None, 24, 4, 30, 1.5, math.nan, "32", [32]],
    "eta": [0, 1, -1],
    "generator": [None, (0,), (0, 1)],
    "output_type": ["PIL", "wrong", None, 3],
    "return_dict": [None, 0, "no"],
    "output_attentions": [None, 1],
    INPUTS: [[], ("latents",), {"latents"}],
}
ODD = [(name, value) for name, values in ODD.items() for value in values]


@functools.cache
def pipe_of(name):
    """Of a tiny model: with a tokenizer that knows every character, or with few blocks."""
    components = tiny_components(alphabet=BYTES) if name == "sd" else tiny_pixart_components(blocks=4)
    return make(KINDS[name].tsam, components)


def count(prompt):
    return len(prompt) if isinstance(prompt, list) else 1


def others(kind):
    """The arguments that this pipeline does not have."""
    return {"attention_resolution", "attention_layers"} - kind.extra


def arguments(kind, call):
    """A call as this pipeline takes it."""
    seeds = call["generator"]  # which stand for generators, so that a call that fails can be read and repeated
    if isinstance(seeds, tuple):
        call = call | {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
    elif seeds is not None:
        call = call | {"generator": torch.Generator().manual_seed(seeds)}
    return kind.call | {name: value for name, value in call.items() if name not in others(kind)}


@st.composite
def calls(draw):
    """The arguments of a call that is drawn."""
    words = st.lists(st.sampled_from(WORDS), min_size=2, max_size=9).map(" ".join)
    text = words | st.sampled_from(TEXTS) | st.text(max_size=40)
    prompt = draw(text | st.lists(text, min_size=1, max_size=3))
    negative = text if isinstance(prompt, str) else st.lists(text, min_size=len(prompt), max_size=len(prompt))
    steps = draw(st.sampled_from([2, 3, 2, 3, 1]))
    guided = draw(st.sampled_from([1, *range(steps + 1), *[None] * (steps > 1)]))
    last = (1 if guided is None else guided) - 1
    images = draw(st.sampled_from([1, 1, 2]))
    size = st.sampled_from([8, 16, 32, 40])
    return {
        "prompt": prompt,
        "negative_prompt": draw(negative),
        "num_inference_steps": steps,
        "tsam_steps": guided,
        "refinement_steps": draw(st.none() | st.lists(st.integers(0, last), max_size=2)) if last >= 0 else (),
        "refinement_iterations": draw(st.integers(0, 2)),
        **draw(st.sampled_from([{"alpha": 0.0}, {"alpha": 40.0}, {"relative_step": 0.0}, {"relative_step": 1.0}])),
        "gamma": draw(st.floats(0.1, 20)),
        "preset": draw(st.sampled_from(["paper", "fast"])),
        "objective": draw(st.sampled_from(list(OBJECTIVES))),
        "attention_resolution": 16,
        "attention_layers": draw(st.sampled_from([(1, 2), [0, 3], (3, 3)])),
        "num_images_per_prompt": images,
        "guidance_scale": draw(st.sampled_from([1.0, 4.5, 7.5])),
        "height": draw(size),
        "width": draw(size),
        "generator": draw(st.sampled_from([0, tuple(range(images * count(prompt)))])),
        "eta": draw(st.sampled_from([0.0, 0.5])),
        "output_type": draw(st.sampled_from(["latent", "np", "pil", "pt"])),
        "return_dict": draw(st.booleans()),
        "output_attentions": draw(st.booleans()),
        "callback_on_step_end": draw(st.sampled_from([None, keep])),
        INPUTS: draw(st.sampled_from([[], ["latents"]])),
    }


def check(pipe, kind, call, output):
    """Whether the output is of the number, size and type that was asked for, and finite."""
    if not call["return_dict"]:
        output = dict(zip(kind.fields, output, strict=True))
    number = count(call["prompt"]) * int(call["num_images_per_prompt"])
    sides = call["height"], call["width"]
    height, width = (64, 64) if kind is KINDS["sd"] and not all(sides) else (int(side or 64) for side in sides)
    if call["output_type"] == "pil":
        assert [picture.size for picture in output["images"]] == [(width, height)] * number
    else:
        shapes = {"latent": (number, 4, height // 2, width // 2), "pt": (number, 3, height, width)}
        assert output["images"].shape == shapes.get(call["output_type"], (number, height, width, 3))
        assert torch.as_tensor(output["images"]).isfinite().all()

    names = "tsam_steps", "refinement_steps", "refinement_iterations", "preset"
    plan = pipe.settings(**{name: call[name] for name in names}).plan(call["num_inference_steps"])
    possible = pipe.get_text_self_attention(call["prompt"]).content.sum(-1).max() > 1
    updates = (plan.tsam_steps + plan.refinement_iterations * len(plan.refinement_steps)) * possible
    losses = output["losses"]
    assert losses.shape == (number, updates) and losses.dtype == torch.float32
    assert losses.isfinite().all() and (losses > -1e-5).all()
    attentions = dict(output).get("attentions")
    assert len(attentions or []) == number * bool(call["output_attentions"] and plan.tsam_steps)


def every_odd_value(test):
    for odd in ODD:
        test = example(CALL, [odd])(test)
    return test


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # an unknown output_type is deprecated
@settings(derandomize=True, deadline=None, max_examples=70, database=None)
@given(call=calls(), odd=st.lists(st.sampled_from(ODD), max_size=2, unique_by=lambda odd: odd[0]))
@every_odd_value
@example(CALL, [])
@example(CALL | {"prompt": TEXTS, "negative_prompt": TEXTS[::-1], "tsam_steps": 1}, [])
@example(CALL | {"prompt": ["", "car", PROMPT], "negative_prompt": ["", "car", ""], **TWICE}, [])
@example(CALL | {"guidance_scale": 1.0, "height": 8, "width": 8}, [])
def test_a_call_draws_what_was_asked_for_or_is_refused_before_the_denoiser_runs(name, call, odd):
    kind, pipe = KINDS[name], pipe_of(name)
    call = call | dict(odd)
    before, output = state_of(pipe), None
    with calls_of(denoiser_of(pipe)) as denoised:
        try:
            output = pipe(**arguments(kind, call))
        except (ValueError, TypeError):
            assert odd and not denoised
    assert state_of(pipe) == before
    if output is not None:
        check(pipe, kind, call, output)


ALWAYS = "num_inference_steps", INPUTS, "prompt", "refinment_steps"  # where no step is guided, too
WRONG = [  # what is said behind the name; the wrong values of `Settings` are in test_tsam.py
    ("num_inference_steps", [0, -1], ValueError, "is .*, but has to be at least 1. 50 is usual"),
    ("num_inference_steps", [2.0, True, "2", None, [2], math.nan], TypeError, "has to be an integer but is"),
    (INPUTS, [["noise_pred"], ["latents", ""], "latents", [1], [None]], ValueError, "has to be in"),
    ("refinment_steps", [()], None, None),
    ("prompt", [None], ValueError, "or `prompt_embeds`. Cannot leave both"),
    ("prompt", [b"a red cube", 3, ("a red cube",), {"a red cube": 1}], ValueError, "has to be of type"),
    ("alpha", [-1.0], ValueError, "is -1.0, but has to be at least 0.* Pass .* 10.0"),
    ("attention_resolution", [8, 0, -16, 15.5, "16", None, [16], {}], ValueError, "on grids of 16.* or `tsam_steps=0`"),
    ("attention_layers", [(1, 4), (10, 20)], ValueError, "has 4 blocks, 0 to 3.* or `tsam_steps=0`"),
    ("attention_layers", [(2, 1), (18, 10)], ValueError, r"is \((2, 1|18, 10)\), but .* has 4 blocks"),
    ("attention_layers", [(-1, 3)], ValueError, "is -1, but has to be at least 0"),
    ("attention_layers", [(1.0, 3), (True, 3), (math.nan, 3)], TypeError, "has to be an integer but is"),
    ("attention_layers", [(1, 2, 3), 10, "01", None, {1, 2}], TypeError, r"has to be two integers.*, as \(10, 18\)"),
    ("text_self_attention", [3, "abc", (1, 2, 3), torch.ones(7, 7)], TypeError, "is .* what `get_text_self_attention`"),
]


@pytest.mark.parametrize("name, values, error, message", WRONG)
def test_a_wrong_value_is_named_with_its_limit_and_remedy_before_any_network_runs(
    kind, pipe, name, values, error, message
):
    message = f"`{name}` .*{message}"
    if name in others(kind) or name == "refinment_steps":
        error, message = TypeError, f"unexpected arguments '{name}'"
    for value in values:
        for further in ({}, {"tsam_steps": 0}) if name in ALWAYS else ({},):
            with refused(pipe, error, message):
                run(pipe, **{name: value} | further)


@pytest.mark.parametrize(
    "arguments",
    [
        {"height": 60, "width": 64},
        {"prompt": None},
        {"prompt": 3},
        {"prompt_embeds": torch.zeros(1, 7, 16)},
        {"callback_steps": 0},
        {"callback_steps": 1.5},
        {"embedded": {"negative_prompt": "a dog"}},
        {"embedded": {"negative_prompt_embeds": torch.zeros(1, 7, 16)}},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`callback_steps`:FutureWarning")
def test_what_stock_refuses_is_refused_in_its_words(stock, pipe, arguments):
    if "embedded" in arguments:
        arguments = {"prompt": None, **embeddings(stock, PROMPT), **arguments["embedded"]}
    said = []
    for one in (stock, pipe):
        with pytest.raises((ValueError, TypeError)) as error:
            run(one, **{"prompt": PROMPT, **arguments})
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]

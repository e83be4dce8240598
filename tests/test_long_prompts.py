"""Prompts longer than the text encoder's window: what a window is, and that it is compared with nothing but itself."""

import functools
import random
import re

import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from test_oracle import GAMMA, Scaling, distance, self_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import oracle
from diffusers_tsam import TextSelfAttention
from diffusers_tsam.tsam import OBJECTIVES
from diffusers_tsam.tsam_sd import split_prompt
from kinds import KINDS, OF_T, PROMPT, Kind, aligned, alignment_of, calls_of, generators, make, refused, run
from tiny import WORDS, tiny_components


ROOM, LENGTH = 10, 12  # words of a window, and with <bos> and <eos>
WINDOWS = ["a red cube.", "a blue sphere on the table,", "with a black dog."]
WINDOWS += ["a white clock and a green car and red sphere"]
LONG = " ".join(WINDOWS)
SHORTLY = {"num_inference_steps": 2, "tsam_steps": 2, "refinement_steps": (), "max_sequence_length": 60}


@pytest.fixture(scope="module")
def kind():
    return Kind("sd", functools.partial(tiny_components, LENGTH), 20.0, {})


def split(prompt, room=5, limit=100):
    """Every word is a token, and so is every stop."""
    return split_prompt(
        prompt, lambda words: [1 + (len(word) > 1 and not word.isalpha()) for word in words], room, limit
    )


WHOLE = [[""], ["a b c d e"], ["a b.", "c d e f"], ["a. b.", "c d e f"], ['a b."', "c d e f"], ["a,", "b c d e f"]]
WHOLE += [["a.", "b,", "c d e f g"], ["a b c d e", "f g"], ["a , b c .", "d e f"]]
SPLIT = [(" ".join(windows), windows) for windows in WHOLE]
# Space may be of any length, and is not needed behind a stop of Chinese or Japanese.
SPLIT += [("a b  c d e\n f", ["a b  c d e", "f"]), ("猫。犬、象 鳥 a b", ["猫。", "犬、", "象 鳥 a b"])]


@pytest.mark.parametrize("prompt, windows", SPLIT)
def test_a_window_ends_with_a_sentence_else_behind_a_comma_else_between_words(prompt, windows):
    assert split(prompt) == windows


def test_windows_are_as_full_as_may_be_and_lose_no_word():
    rng = random.Random(0)
    for _ in range(200):
        prompt = " ".join(rng.choice("abcdefg") + rng.choice([""] * 6 + [",", "."]) for _ in range(rng.randint(1, 40)))
        windows = split(prompt, 7)
        assert " ".join(windows) == prompt
        for window, following in zip(windows, windows[1:]):
            words, (word, *_) = re.findall(r"\w|[.,]", window), following.split()
            assert len(words) <= 7
            assert window[-1] == "." or "." not in window
            assert window[-1] in ".," or "," not in window
            assert window[-1] in ".," or len(words) + len(re.findall(r"\w|[.,]", word)) > 7


def test_what_is_behind_the_limit_is_left_out_and_that_is_said(warnings_seen):
    assert split("a b c d e f g", limit=6) == ["a b c d e", "f"]
    assert "6 tokens, behind which this of a prompt is left out: g" in warnings_seen.text
    assert split("a b c d e f g", limit=3) == ["a b c"]
    assert split("a b c d e f g", limit=7) == ["a b c d e", "f g"]


K, N, GRID = 3, 6, (4, 3)
LENGTHS = ((4, 6, 2), (5, 0, 0), (1, 1, 1))  # content tokens of every window of three images


def windowed():
    """A `TextSelfAttention` of these, and maps."""
    content = torch.tensor([[k < length for length in of_image for k in range(N)] for of_image in LENGTHS])
    attention = torch.rand(len(LENGTHS), K * N, N).add(0.02)
    maps = torch.rand(len(LENGTHS), K * N, *GRID)
    return TextSelfAttention(attention, content, [["word"] * sum(of_image) for of_image in LENGTHS]), maps


def compared(objective, text, image, window):
    """What the oracle holds a window's maps against, R or T, and the window's columns."""
    own = range(window * N, window * N + LENGTHS[image][window])
    attention, words = text.attention[image, own].tolist(), range(len(own))
    of_t = objective in OF_T
    return (oracle.text_attention(attention, words, GAMMA) if of_t else oracle.relation(attention, words)), own


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_sum_of_every_windows_and_words_of_different_ones_neither_attract_nor_repel(objective):
    """The gradient on the first window's maps is the same to the bit whatever the others look at."""
    text, maps = windowed()
    alignment, gradients = alignment_of(text, 1.0, GAMMA, objective), []
    for image, loss in enumerate(alignment.loss_of(maps).tolist()):
        windows = [compared(objective, text, image, window) for window in range(K)]
        expected = sum(oracle.loss(matrix, maps[image, own].tolist(), objective) for matrix, own in windows)
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for others in (maps, torch.rand_like(maps), maps[:, :N].repeat(1, K, 1, 1)):  # the last: at the very same places
        seen = torch.cat([maps[:, :N], others[:, N:]], 1).requires_grad_()
        (gradient,) = torch.autograd.grad(alignment.loss_of(seen).sum(), seen)
        gradients.append(gradient[:, :N])
    assert gradients[0][:2].any() and all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert not gradients[0][2].any() or objective == "cosine"  # a window of one word has nothing to be compared with


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_prompt_of_one_word_in_each_window_is_said_to_have_nothing_to_align(objective, warnings_seen):
    text, _ = windowed()
    assert alignment_of(text, 1.0, GAMMA, objective).possible() and not warnings_seen.text
    one = TextSelfAttention(text.attention[2:], text.content[2:], text.tokens[2:])
    assert not alignment_of(one, 1.0, GAMMA, objective).possible() and "no prompt has two" in warnings_seen.text


def test_an_objective_of_ones_own_gets_every_window_as_a_row():
    text, maps = windowed()
    seen = []

    def objective(maps, text):
        seen.append((maps, text))
        return maps.flatten(1).sum(1)

    loss = alignment_of(text, 1.0, GAMMA, objective).loss_of(maps)
    ((rows, syntax),) = seen
    assert rows.shape == (len(LENGTHS) * K, N, *GRID) and syntax.target.shape == (len(LENGTHS) * K, N, N)
    assert [len(words) for words in syntax.tokens] == syntax.content.sum(-1).tolist() == [*sum(LENGTHS, ())]
    torch.testing.assert_close(loss, maps.flatten(1).sum(1))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(output) if torch.is_tensor(x))])
        return output


@pytest.mark.parametrize("objective", OF_T)
def test_memory_grows_with_the_number_of_windows_and_not_with_its_square(objective):
    largest, length = [], 40  # with maps so small that S is the largest
    for windows in (2, 8):
        content = torch.ones(1, windows * length, dtype=torch.bool)
        text = TextSelfAttention(torch.rand(1, windows * length, length), content, [["word"] * windows * length])
        with Largest() as operations:
            alignment = alignment_of(text, 1.0, GAMMA, objective)
            maps = torch.rand(1, windows * length, 4, 4, requires_grad=True)
            alignment.loss_of(maps).sum().backward()
        largest.append(operations.numbers)
    assert largest == [2 * length**2, 8 * length**2]


@pytest.mark.parametrize("objective", ["l1", "contrast"])
def test_attentions_are_of_all_windows_and_zero_between_them(objective):
    text, maps = windowed()
    alignment = alignment_of(text, 1.0, GAMMA, objective, keep_maps=True)
    alignment.maps = [maps]
    for image, (seen, of_image) in enumerate(zip(alignment.attentions([0]), LENGTHS)):
        number, first = sum(of_image), of_image[0]
        assert seen["maps"].shape == (1, number, *GRID) and len(seen["tokens"]) == number
        assert torch.equal(seen["maps"][0], maps[image, text.content[image]])
        for matrix in (seen["text_attention"], seen["similarity"][0]):
            assert matrix.shape == (number, number) and not matrix[first:, :first].any()
            torch.testing.assert_close(matrix.sum(-1), torch.ones(number))
        related = [compared("relation", text, image, window)[0] for window in range(K)]
        blocks = [torch.tensor([row + [0.0] * (len(rows) - len(row)) for row in rows]) for rows in related if rows]
        torch.testing.assert_close(seen["relation"], torch.block_diag(*blocks))


def read_by_the_oracle(pipe, windows):
    """Token ids and T' of every window."""
    ids = pipe.tokenizer(windows, padding="max_length", return_tensors="pt").input_ids
    return [*zip(ids, self_attention(pipe, ids))]


def test_a_long_prompt_is_encoded_and_read_window_by_window(pipe):
    assert pipe.windows_of(LONG, 60) == [WINDOWS]
    embeddings, nothing, mask = pipe.encode_windows([WINDOWS], "cpu", 1, False)
    assert nothing is None and mask is None
    assert torch.equal(embeddings[0], pipe.encode_prompt(WINDOWS, "cpu", 1, False)[0].flatten(0, 1))
    text = pipe.get_text_self_attention(LONG, max_sequence_length=60)
    assert " ".join(text.tokens[0]) == re.sub(r"([.,])", r" \1", LONG)
    expected = torch.stack([attention for _, attention in read_by_the_oracle(pipe, WINDOWS)])
    torch.testing.assert_close(text.attention.double(), expected.flatten(0, 1)[None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", OF_T)
def test_update_of_long_prompts_is_the_oracles(pipe, objective):
    """In a batch with a shorter one, whose missing windows are masked."""
    prompts, alpha = [LONG, "a black dog"], 20.0
    windows = pipe.windows_of(prompts, 60)
    with torch.no_grad():
        positive, negative, mask = pipe.encode_windows(windows, "cpu", 1, True)
    conditions = {"encoder_hidden_states": torch.cat([negative, positive]), "encoder_attention_mask": mask}
    assert mask.sum(-1).tolist() == [LENGTH, LENGTH, 4 * LENGTH, LENGTH]
    alignment = alignment_of(pipe.get_text_self_attention(prompts, max_sequence_length=60), alpha, GAMMA, objective)
    latents, pipe.scheduler = torch.randn(2, 4, 7, 6), Scaling(1.0)
    with torch.no_grad():
        moved = aligned(pipe, alignment, latents, 500, conditions, pipe.cross_attention_layers())
    names, model = oracle.layers_at(pipe.unet, 16), oracle.double(pipe.unet)
    for image, own in enumerate(windows):
        known = []
        for window, (ids, attention) in enumerate(read_by_the_oracle(pipe, own)):
            content = oracle.content(ids.tolist(), pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id)
            text = oracle.text_attention(attention.tolist(), content, GAMMA)
            known.append(([window * LENGTH + position for position in content], text))
        given = {"timestep": 500, "encoder_hidden_states": positive[image : image + 1].double()}
        given["encoder_attention_mask"] = mask[2 + image :][:1].double()
        where = given, names, known, (4, 3), objective
        expected, loss = oracle.update(model, latents[image].double(), 1.0, alpha, *where)
        assert distance(moved[image] - latents[image], expected - latents[image]) < 2e-5
        assert alignment.losses[0][image].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)


OPTIONS = [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}]


@pytest.mark.parametrize("options", [*OPTIONS, {"clip_skip": 1}], ids=str)
def test_a_prompt_with_room_in_one_window_is_drawn_as_without(pipe, options):
    options = {**SHORTLY, **options}
    plain, windowed = (run(pipe, "a red cube, a dog", **options | {"max_sequence_length": n}) for n in (None, 60))
    assert torch.equal(plain.images, windowed.images) and torch.equal(plain.losses, windowed.losses)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_off_a_long_prompt_is_what_stock_draws_of_its_embeddings(stock, pipe, options):
    embeds, options = pipe.encode_prompt(WINDOWS, "cpu", 1, False)[0].flatten(0, 1)[None], {**SHORTLY, **options}
    theirs = run(stock, None, prompt_embeds=embeds, negative_prompt_embeds=embeds.clone(), **options)
    ours = run(pipe, LONG, negative_prompt=LONG, **options | {"tsam_steps": 0})
    torch.testing.assert_close(ours.images, theirs.images)


def test_every_image_gets_its_prompts_windows_and_is_the_same_among_longer_and_shorter_prompts_and_alone(pipe):
    prompts, negatives = [LONG, "a red cube", PROMPT], ["", "a dog " * 12, "a dog"]
    options = {"negative_prompt": negatives, "generator": generators(6), "num_images_per_prompt": 2}
    together = run(pipe, prompts, output_attentions=True, **options, **SHORTLY)
    assert [len(seen["tokens"]) for seen in together.attentions] == [26, 26, 3, 3, 7, 7]
    for image in range(6):
        alone = run(pipe, prompts[image // 2], negative_prompt=negatives[image // 2], seed=image, **SHORTLY)
        torch.testing.assert_close(together.images[image], alone.images[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.losses[image], alone.losses[0], rtol=1e-3, atol=1e-4)


def test_embeddings_of_windows_are_drawn_as_the_prompt_is(pipe):
    with torch.no_grad():
        positive, negative, _ = pipe.encode_windows([WINDOWS], "cpu", 1, True, LONG, max_sequence_length=60)
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    text = pipe.get_text_self_attention(LONG, max_sequence_length=60)
    prompts = {"prompt": LONG, "negative_prompt": LONG}
    expected = run(pipe, **prompts, **SHORTLY)
    for more in ({"prompt": None, **given}, prompts):
        output = run(pipe, text_self_attention=text, **more, **SHORTLY)
        assert torch.equal(output.images, expected.images) and torch.equal(output.losses, expected.losses)
    one_window = pipe.get_text_self_attention(LONG)
    with refused(pipe, ValueError, r"these prompts need \(1, 48, 12\)"):
        run(pipe, None, text_self_attention=one_window, **given)


def test_a_callback_may_drop_the_unconditional_half_and_its_mask(pipe):
    callback = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with calls_of(pipe.unet) as calls:
        run(pipe, LONG, callback_on_step_end=callback, **SHORTLY)
    masks = [kwargs["encoder_attention_mask"].sum(-1).tolist() for _, kwargs in calls]
    assert masks == [[4 * LENGTH], [LENGTH, 4 * LENGTH], [4 * LENGTH], [4 * LENGTH]]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"max_sequence_length": 0}, ValueError, "`max_sequence_length` is 0, but .* at least 1.* 300 for instance"),
        ({"max_sequence_length": 77.0}, TypeError, "`max_sequence_length` has to be an integer but is 77.0"),
        ({"negative_prompt_embeds": torch.zeros(1, LENGTH, 16)}, ValueError, "do not go together.* `negative_prompt`"),
        ({"negative_prompt": [""]}, ValueError, "`negative_prompt` has 1 prompts, but `prompt` 2"),
        ({"negative_prompt": ("", "")}, TypeError, r"has to be a string or a list of such but is \('', ''\)"),
    ],
)
def test_wrong_values_are_refused_with_the_remedy(pipe, arguments, error, message):
    with refused(pipe, error, message):
        run(pipe, [LONG, PROMPT], **SHORTLY | arguments)


@pytest.mark.parametrize("name", KINDS)
def test_every_word_of_a_prompt_of_300_tokens_has_a_map(name):
    """PixArt-α has them in one window, where its last is </s>."""
    pipe = make(KINDS[name].tsam, KINDS[name].components)
    words = [WORDS[k * 7 % len(WORDS)] + ("." if k % 9 == 8 else "") for k in range(270)]
    prompt = " ".join(words)
    length = 300 if name == "sd" else 301
    output = run(pipe, prompt, num_inference_steps=1, tsam_steps=1, max_sequence_length=length, output_attentions=True)
    (seen,) = output.attentions
    assert seen["tokens"] == re.findall(r"\w+|\.", prompt) and len(seen["tokens"]) == 300
    assert seen["maps"].shape[:2] == (1, 300) and (seen["maps"].flatten(2).sum(-1) > 0).all()
    assert seen["text_attention"].shape == (300, 300) and output.losses.isfinite().all()
    assert (seen["text_attention"][-1, 0] == 0) == (name == "sd")  # which has several windows

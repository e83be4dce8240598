"""Phrases that are held to regions of the picture."""

import numpy as np
import pytest
import torch
from test_oracle import Scene, check_update

import oracle
from diffusers_tsam import TextSelfAttention, tsam_layout
from kinds import KINDS, PROMPT, SHORT, calls_of, denoiser_of, embeddings, generators, make, refused, run
from tiny import tiny_components


LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
REGIONS = {"black car": (0.1, 0.2, 0.55, 0.9), "white clock": np.tri(8)[:, ::-1].copy()}
SHORTLY = {"num_inference_steps": 2, "tsam_steps": 2, "refinement_steps": ()}
EXACT = {"rel": 1e-5, "abs": 1e-6}


def layout_of(regions, tokens):
    """The `Layout` of prompts that are nothing but these words, behind a token that is not theirs."""
    length = max(map(len, tokens))
    content = torch.tensor([[0 < k <= len(own) for k in range(length + 1)] for own in tokens])
    text = TextSelfAttention(torch.ones(len(tokens), length + 1, length + 1), content, tokens)
    return tsam_layout.layout_of(tsam_layout.check_regions(regions, len(tokens)), text, str.split)


@pytest.mark.parametrize("box", [LEFT, (0.1, 0.2, 0.55, 0.9), (0.4, 0.4, 0.41, 0.42), (0.0, 0.0, 1.0, 1.0)])
def test_a_box_covers_of_each_position_the_part_that_lies_in_it(box):
    for grid in ((4, 3), (1, 1), (16, 16)):
        found, expected = tsam_layout.region_on(box, *grid), torch.tensor(oracle.box_on(box, *grid))
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)
        assert found.mean().item() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), rel=1e-4)


def test_a_mask_of_any_number_type_is_averaged_over_each_position():
    array = np.random.default_rng(0).random((12, 8)) < 0.5
    for mask in (torch.tensor(array), torch.tensor(array).double(), array, array.astype(np.float64)):
        (checked,) = tsam_layout.check_regions({"car": mask}, 1)[0].values()
        for grid in ((4, 2), (12, 8), (1, 1)):
            expected = torch.tensor(oracle.mask_on(array.astype(float).tolist(), *grid))
            torch.testing.assert_close(tsam_layout.region_on(checked, *grid), expected)


def test_the_loss_is_the_mean_over_phrases_and_words_of_the_attention_outside():
    tokens, mask, grid = [PROMPT.split(), SHORT.split(), ["a", "dog"]], torch.rand(8, 6), (4, 3)
    small = (0.2, 0.2, 0.7, 0.6)
    layout = layout_of([{"black car": LEFT, "a white clock": mask}, {"cube": small}, None], tokens)
    maps, on_grid = torch.rand(3, 8, *grid), tsam_layout.regions_on(layout.regions, *grid)
    shares, loss = (f(maps, on_grid, layout.tokens) for f in (tsam_layout.shares_inside, tsam_layout.layout_loss))
    own = maps.double().tolist()
    phrases = [  # of each image: of each phrase the maps of its words, and its region
        [(own[0][2:4], oracle.box_on(LEFT, *grid)), (own[0][5:8], oracle.mask_on(mask.tolist(), *grid))],
        [(own[1][3:4], oracle.box_on(small, *grid))],
        [],
    ]
    assert loss.tolist() == pytest.approx([oracle.layout(of_image) for of_image in phrases], **EXACT)
    for image, of_image in enumerate(phrases):
        each = [1 - oracle.layout([phrase]) for phrase in of_image]
        assert shares[image].tolist() == pytest.approx(each + [0] * (2 - len(each)), **EXACT)


def test_attention_that_lies_inside_and_attention_on_nothing_costs_nothing_to_speak_of():
    maps, layout = torch.zeros(1, 3, 4, 4), layout_of([{"cube": LEFT}], [["red", "cube"]])
    given = tsam_layout.regions_on(layout.regions, 4, 4), layout.tokens
    assert tsam_layout.layout_loss(maps, *given).isfinite().all()
    maps[0, 2, :, 0] = 0.3
    assert tsam_layout.layout_loss(maps, *given).item() == pytest.approx(0)


@pytest.mark.parametrize("objective", ["l1", "attainable", "layout"])
def test_update_with_regions_is_the_oracles(pipe, objective):
    """Of two phrases, of a mask, and of a prompt without regions, which nothing but T moves."""
    scene, box, mask = Scene(pipe), (0.1, 0.3, 0.8, 1), torch.rand(8, 12)
    regions = [{"a black car": box}, {"red cube": mask, "sphere": RIGHT}, None]
    scene.layout = tsam_layout.layout_of(tsam_layout.check_regions(regions, len(regions)), scene.text, pipe.words_of)
    scene.weight, on_grid, first = 0.7, oracle.mask_on(mask.tolist(), *scene.grid), scene.kind.first
    scene.phrases = [
        [(range(first, first + 3), oracle.box_on(box, *scene.grid))],
        [([first + 1, first + 2], on_grid), ([first + 6], oracle.box_on(RIGHT, *scene.grid))],
        [],
    ]
    check_update(scene, objective, close=2e-5)


def test_alone_it_draws_each_phrase_into_its_region(pipe):
    options = {"num_inference_steps": 3, "tsam_steps": 2, "refinement_steps": (0,), "refinement_iterations": 5}
    options |= {"objective": "layout", "relative_step": 0.1, "region_weight": 1.0, "output_attentions": True}
    output = run(pipe, regions=REGIONS, **options)
    (seen,) = output.attentions
    shares, maps, tokens = seen["region_shares"], seen["maps"], seen["tokens"]
    assert output.losses.shape == (1, 7) and output.losses[0, 5] < output.losses[0, 0]
    assert [*shares] == [*REGIONS] and all(share.shape == (2,) and share[1] > share[0] for share in shares.values())
    assert output.losses[0, 0].item() == pytest.approx(1 - sum(share[0].item() for share in shares.values()) / 2)
    own = [maps[0, tokens.index(word)].tolist() for word in ("black", "car")]
    expected = 1 - oracle.layout([(own, oracle.box_on(REGIONS["black car"], *maps.shape[-2:]))])
    assert shares["black car"][0].item() == pytest.approx(expected, rel=1e-4)


def test_regions_of_no_weight_change_nothing_and_of_weight_do(kind, pipe):
    plain, weightless, weighted = (
        run(pipe, alpha=kind.alpha, **SHORTLY, **layout)
        for layout in ({}, {"regions": REGIONS, "region_weight": 0.0}, {"regions": REGIONS, "region_weight": 5.0})
    )
    torch.testing.assert_close(weightless.images, plain.images)
    assert not torch.equal(weighted.images, plain.images)
    assert "region_shares" not in run(pipe, output_attentions=True, **SHORTLY).attentions[0]


def test_every_image_of_a_batch_has_its_prompts_regions_and_is_the_same_alone(kind, pipe):
    prompts, regions = [PROMPT, SHORT, "a dog"], [REGIONS, None, {"dog": (0.2, 0.2, 0.9, 0.4)}]
    options = {**SHORTLY, "height": 48, "width": 80, "alpha": kind.alpha, "region_weight": 3.0}
    together = run(pipe, prompts, regions=regions, num_images_per_prompt=2, generator=generators(6), **options)
    for image in (0, 1, 3, 5):
        alone = run(pipe, prompts[image // 2], regions=regions[image // 2], seed=image, **options)
        if alone.losses.shape[1]:
            torch.testing.assert_close(together.losses[image], alone.losses[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.images[image], alone.images[0], rtol=1e-2, atol=1e-2)


def test_a_prompt_of_one_word_can_be_held_to_a_region(pipe):
    output = run(pipe, "dog", regions={"dog": LEFT}, objective="layout", relative_step=0.1, **SHORTLY)
    assert output.losses.shape == (1, 2) and (output.losses > 0).all()


def test_a_phrase_may_lie_in_any_window_of_a_long_prompt():
    pipe = make(KINDS["sd"].tsam, tiny_components(12))
    prompt = "a red cube on the table. a blue sphere with a dog. a white clock"
    options = {**SHORTLY, "objective": "layout", "max_sequence_length": 60, "output_attentions": True}
    output = run(pipe, prompt, regions={"a blue sphere": LEFT, "clock": RIGHT}, region_weight=1.0, **options)
    (seen,) = output.attentions
    sphere, clock, grid = seen["tokens"].index("sphere"), seen["tokens"].index("clock"), seen["maps"].shape[-2:]
    own = seen["maps"][0].tolist()
    phrases = [(own[sphere - 2 : sphere + 1], oracle.box_on(LEFT, *grid)), ([own[clock]], oracle.box_on(RIGHT, *grid))]
    assert output.losses[0, 0].item() == pytest.approx(oracle.layout(phrases), rel=1e-4)


def test_embeddings_take_regions_of_the_prompt_that_their_text_is_of(pipe):
    given, options = embeddings(pipe, PROMPT), {**SHORTLY, "regions": REGIONS}
    output = run(pipe, None, text_self_attention=pipe.get_text_self_attention(PROMPT), **given, **options)
    torch.testing.assert_close(output.losses, run(pipe, **options).losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"regions": 3}, TypeError, "`regions` has to be a dict of phrases .* but is 3. Pass {"),
        ({"regions": [LEFT]}, TypeError, "`regions` has to be a dict of phrases"),
        ({"regions": [REGIONS, None]}, ValueError, "of 2 prompts, but there are 1. Pass a list with a dict for each"),
        ({"regions": {3: LEFT}}, TypeError, "`regions` has 3, but a phrase has to be words"),
        ({"regions": {"": LEFT}}, TypeError, "`regions` has '', but a phrase has to be words"),
        ((0, 0, 64, 64), ValueError, "fractions of the picture.* Divide pixels by width"),
        ((0.5, 0, 0.5, 1), ValueError, "0 <= x0 < x1 <= 1"),
        ((float("nan"), 0, 1, 1), ValueError, "0 <= x0 < x1 <= 1"),
        ((0, 0, 1), ValueError, r"has shape \(3,\), but a box has four numbers"),
        ("left", TypeError, r"is 'left', which is neither a box \(x0, y0, x1, y1\) nor a mask"),
        (None, TypeError, "is None, which is neither a box"),
        (np.full((4, 4), 255), ValueError, "a mask of 255 to 255.* Divide it"),
        (np.zeros((4, 4)), ValueError, "a mask of zeros.* Leave the phrase out"),
        (torch.ones(3, 4, 4), ValueError, r"has shape \(3, 4, 4\)"),
        ({"objective": "layout", "regions": {}}, ValueError, "`objective` is 'layout', but there are no `regions`"),
    ],
    ids=str,
)
def test_wrong_arguments_and_a_cars_wrong_region_are_refused_before_any_network_runs(pipe, wrong, error, message):
    with refused(pipe, error, message):
        run(pipe, **(wrong if isinstance(wrong, dict) else {"regions": {"car": wrong}}))


@pytest.mark.parametrize(
    "phrase, message",
    [
        ("dog", "has 'dog', but the prompt's tokens are 'a black car and a white clock'. Name words of the prompt"),
        ("black clock", "has 'black clock', but the prompt's tokens are"),
        ("a", "has 'a', which the prompt has 2 times. Add a word before or after it"),
    ],
)
def test_a_phrase_that_the_prompt_has_not_or_twice_is_refused_and_the_remedy_works(pipe, phrase, message):
    with calls_of(denoiser_of(pipe)) as denoised, pytest.raises(ValueError, match=message):
        run(pipe, regions={phrase: LEFT}, **SHORTLY)
    assert not denoised
    assert run(pipe, regions={"a black": LEFT, "A  BLACK car": RIGHT}, **SHORTLY).losses.isfinite().all()

"""Pictures of maps, T and S: every word is there, none is cut, whatever the prompt."""

import warnings

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox
from PIL import Image

from diffusers_tsam import figures


LONG = "a red cube and a blue sphere and a green car and a black dog on the white table"  # 19 words


def figure(prompt, words=None, size=(64, 64), footer="seed 0"):
    random = np.random.default_rng(0)
    words = prompt.split() if words is None else words
    picture = Image.fromarray(random.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
    rows = [(name, f"loss of {name}", picture, random.random((len(words), 8, 8))) for name in ("stock", "T-SAM")]
    tables = [(name, np.tril(random.random((len(words), len(words))))) for name in ("T", "S: stock", "S: T-SAM")]
    return figures.figure(prompt, words, rows, tables, footer)


def sheet(prompt, size=(64, 64), footer="seed 0", columns=8):
    pictures = [Image.new("RGB", size)] * columns
    rows = [(name, [f"loss 0.123 · {'a blue sphere, ' * 4}"] * columns, pictures) for name in ("stock", "T-SAM")]
    return figures.sheet(prompt, [f"seed {seed}" for seed in range(columns)], rows, footer)


def texts(fig):
    """All the texts that show, and the figure's inches in which they are."""
    FigureCanvasAgg(fig)
    fig.draw_without_rendering()
    found = [text for text in fig.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text().strip()]
    return {text: text.get_window_extent() for text in found if text.get_visible()}


@pytest.mark.parametrize("prompt, shown", [("red cube", 2), ("a black car and a white clock", 7), (LONG, 14)])
def test_every_word_has_a_map_beside_each_picture_and_a_long_prompt_says_what_is_left_out(prompt, shown):
    fig = figure(prompt)
    assert len(fig.axes) == 2 * (1 + shown) + 3
    titles = [axes.get_title() for axes in fig.axes]
    assert titles[1 : 1 + shown] == titles[2 + shown : 2 + 2 * shown] == prompt.split()[:shown]
    assert titles[-3:] == ["T", "S: stock", "S: T-SAM"]
    written = [text.get_text() for text in texts(fig)]
    assert ("the first 14 of 19 words · seed 0" in written) == (prompt == LONG)
    assert {"stock", "T-SAM", "loss of stock", "loss of T-SAM"} <= set(written)


@pytest.mark.parametrize(
    "prompt, words, size",
    [
        ("red cube", None, (64, 64)),
        ("a red cube", None, (96, 32)),
        ("a red cube", None, (32, 96)),
        (LONG * 9, LONG.split(), (64, 64)),
        ("x" * 900, ["x", "y"], (64, 64)),
        ("一只红色的狗和一只蓝色的猫" * 30, ["一只", "红色", "🐕"], (64, 64)),
        ("photorealistic refrigerators " * 7, None, (64, 64)),
    ],
)
def test_nothing_is_cut_or_covered_by_another_text(prompt, words, size, tmp_path):
    long = "a setting · " * 30
    for fig in (figure(prompt, words, size, long), sheet(prompt, size, long), sheet(prompt, size, long, 2)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of signs that the font lacks
            boxes = texts(fig)
        for text, box in boxes.items():
            assert np.allclose(Bbox.union([fig.bbox, box]).extents, fig.bbox.extents, atol=1), text
        straight = [box.extents for text, box in boxes.items() if text.get_rotation() == 0]
        left, bottom, right, top = np.transpose(straight)
        width = np.minimum.outer(right, right) - np.maximum.outer(left, left)
        height = np.minimum.outer(top, top) - np.maximum.outer(bottom, bottom)
        assert not np.triu(np.minimum(width, height) > 1, 1).any()
        for axes in fig.axes:
            assert min(axes.get_window_extent().size) > 60  # pixels


@pytest.mark.parametrize("prompt", ["一只 🐕 مرحبا שלום", "a\tb\nc $\\frac$ $$ $\\ %#_^{"])
def test_any_signs_are_drawn_as_they_are_without_a_warning(prompt, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = figure(prompt, footer=prompt)
        figures.save(fig, tmp_path / "figure.png")
    assert prompt.split() == [axes.get_title() for axes in fig.axes[1 : 1 + len(prompt.split())]]
    assert Image.open(tmp_path / "figure.png").size[0] > 1000


def test_regions_are_outlined_in_every_picture_and_in_the_maps_of_their_words():
    size, mask = (64, 32), np.zeros((8, 8))
    mask[2:6, 4:] = 1
    picture, maps = Image.new("RGB", size), np.ones((3, 4, 4))
    regions = [((0.25, 0.5, 0.75, 1.0), [1]), (mask, [1, 2])]
    rows = [("", "", picture, maps)] * 2
    fig = figures.figure("a b c", ["a", "b", "c"], rows, [("T", np.eye(3))], regions=regions)
    *shown, _ = fig.axes
    boxes = [[patch.get_bbox().bounds for patch in axes.patches] for axes in shown]
    assert boxes == [[(15.5, 15.5, 32, 16)], [], [(15.5, 15.5, 32, 16)], []] * 2
    contours = [[c for c in axes.collections if c.get_paths()] for axes in shown]
    assert [len(each) for each in contours] == [1, 0, 1, 1] * 2
    (outline,) = contours[0][0].get_paths()
    assert outline.vertices.min(0).tolist() == pytest.approx([31.5, 7.5], abs=2)  # right of the middle, from a quarter
    assert all(axes.get_xlim() == (-0.5, 63.5) and axes.get_ylim() == (31.5, -0.5) for axes in shown)


def test_a_words_maps_share_one_scale_and_a_table_shows_its_lower_triangle_with_two_digits():
    picture, values = Image.new("RGB", (64, 64)), np.array([[1.0, 9.0], [0.256, 0.744]])
    low, high = np.full((2, 8, 8), 0.25), np.stack([np.full((8, 8), 0.5), np.zeros((8, 8))])
    fig = figures.figure("a b", ["a", "b"], [("", "", picture, low), ("", "", picture, high)], [("T", values)])
    scales = [axes.images[1].get_clim() for axes in fig.axes if len(axes.images) == 2]
    assert scales == [(0, 0.5), (0, 0.25)] * 2
    numbers = {text.get_position(): text.get_text() for text in fig.axes[-1].texts}
    assert numbers == {(0, 0): "1.00", (0, 1): ".26", (1, 1): ".74"}
    assert fig.axes[-1].images[0].get_array().mask.tolist() == [[False, True], [False, False]]


def test_a_sheet_has_a_column_for_each_name_and_a_row_under_another():
    fig = sheet("a red cube", columns=3)
    assert [axes.get_title() for axes in fig.axes] == ["seed 0", "seed 1", "seed 2"] * 2
    assert [axes.get_ylabel() for axes in fig.axes] == ["stock", "", "", "T-SAM", "", ""]
    assert all(axes.get_xlabel().startswith("loss 0.123 · a blue") and axes.images for axes in fig.axes)

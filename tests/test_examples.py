"""Every example is run with the models that ship, and does what it says."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.shapes.scenes import solids_of
from tiny import tiny_sdxl_components


pytestmark = pytest.mark.slow
EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
ROUNDING = 2e-4  # where white is 1
CUBE, SPHERE = ("red", "cube"), ("blue", "sphere")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in a folder of its own, on the CPU; what it has defined when it ends."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        defined = runpy.run_path(str(EXAMPLES[0].with_stem(name)), run_name="__main__")
        (picture,) = tmp_path.glob("*.png")
        assert picture.stem == name
        assert np.asarray(Image.open(picture).convert("L")).std() > 4  # not blank
        return SimpleNamespace(**defined)

    return run


@pytest.fixture(scope="module")
def judge():
    return Judge.from_pretrained()


def differ(one, other):
    return np.abs(np.asarray(one, dtype=np.float32) - np.asarray(other, dtype=np.float32)).max()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_says_how_to_run_it_and_is_run_here(example):
    source = example.read_text()
    assert len(source.splitlines()) < 60
    assert f"python examples/{example.name}" in source.split('"""')[1]
    assert f'"{example.stem}"' in Path(__file__).read_text()


@pytest.mark.parametrize("name, arguments, least", [("pixart", "--steps 5", 20), ("sdxl", "--steps 5 --model .", 10)])
def test_guidance_changes_the_picture_of_a_seed(name, arguments, least, run):
    StableDiffusionXLPipeline(**tiny_sdxl_components()).save_pretrained(".")
    drawn = run(name, *arguments.split())
    assert differ(drawn.stock, drawn.tsam) > least


def test_stock_forgets_the_sphere_that_guidance_draws(run, judge):
    drawn = run("stable_diffusion", "--steps", 10)
    assert judge.read([drawn.stock, drawn.tsam]) == [{CUBE}, {CUBE, SPHERE}]


def test_a_picture_of_a_batch_is_the_same_alone(run, capsys):
    drawn = run("batch", "--steps", 5)
    assert len(drawn.pictures) == 9 and capsys.readouterr().out.count(" before the last\n") == 9
    assert differ(drawn.together.images[0], drawn.alone.images[0]) < ROUNDING
    assert (drawn.together.losses[:6, -1] < drawn.together.losses[:6, 0]).all()


def test_a_lora_acts_at_its_scale_and_not_at_zero(run):
    pytest.importorskip("peft")
    drawn = run("lora", "--steps", 3, "--training-steps", 1)
    drawn.pipe.unload_lora_weights()
    generators = [torch.Generator().manual_seed(seed) for seed in (74, 1)]
    without = drawn.pipe(drawn.prompts, **drawn.settings | {"generator": generators}).images
    for none, half, full, stock in zip(*(drawn.pictures[i : i + 2] for i in (0, 2, 4)), without):
        assert differ(none, stock) == 0 < differ(none, half) and differ(half, full) > 0


def test_what_saves_memory_changes_the_picture_by_rounding(run):
    drawn = run("low_memory", "--steps", 5)
    assert drawn.pipe.unet.is_gradient_checkpointing
    assert differ(drawn.plain, drawn.frugal) < ROUNDING


def test_the_attention_of_every_word_and_step_is_shown(run):
    drawn = run("attention", "--steps", 10)
    assert drawn.rows.shape == (7, 2) and set(drawn.tables) == {"T", "S, first step", "S, last step"}


def test_an_image_is_moved_until_its_own_loss_is_low_enough(run):
    drawn = run("callback", "--steps", 5)
    losses = torch.stack(drawn.alignment.losses)
    assert drawn.moves == (losses > drawn.LIMIT).sum(0).tolist() and len(set(drawn.moves)) > 1
    for number, stock, aligned in zip(drawn.moves, drawn.stock, drawn.aligned):
        assert (differ(stock, aligned) > 0) == (number > 0)


def test_ones_own_loop_draws_what_the_pipeline_draws(run):
    drawn = run("own_loop", "--steps", 10)
    assert differ(drawn.called, drawn.own) == 0 < differ(drawn.own, drawn.fading)


def test_ones_own_loss_falls_and_draws_the_sphere_that_stock_forgets(run, judge):
    drawn = run("objective", "--steps", 10)
    assert {CUBE, SPHERE} not in judge.read(drawn.stock.images)
    assert judge.read(drawn.own.images) == [{CUBE, SPHERE}] * 2
    assert (drawn.own.losses[:, -1] < drawn.own.losses[:, 0]).all()


def test_solids_get_the_colours_back_that_stock_swaps(run, judge):
    drawn = run("sink", "--steps", 10)
    for prompt, *pictures in zip(drawn.SEEDS, *drawn.drawn.values()):
        stock, tsam = judge.read(pictures)
        assert tsam == set(solids_of(prompt)) != stock


def test_solids_are_drawn_where_they_are_asked_for_and_where_they_are_not_when_asked_otherwise(run, judge):
    one, other = judge.locate([output.images[0] for output in run("layout", "--steps", 10).outputs])
    assert one[CUBE][0] < 0.5 < one[SPHERE][0] and other[SPHERE][0] < 0.5 < other[CUBE][0]


def test_a_long_prompt_is_cut_by_stock_alone(run):
    drawn = run("long_prompt", "--steps", 5)
    assert len(drawn.windows) == 2 and drawn.seen["maps"].shape[1] == len(drawn.seen["tokens"]) > 30
    assert differ(drawn.cut.images[0], drawn.whole.images[0]) > 20
    assert differ(drawn.whole.images[0], drawn.tsam.images[0]) > 0

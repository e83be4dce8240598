"""Every example is run with the models that ship, and does what it says."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.shapes.scenes import words_of_solids
from tiny import tiny_sdxl_components


pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parent.parent / "examples"
ROUNDING = 2e-4  # where white is 1


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run an example in a folder of its own, on the CPU; what it has defined when it ends."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        defined = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        (picture,) = tmp_path.glob("*.png")
        assert picture.stem == name
        assert np.asarray(Image.open(picture).convert("L")).std() > 4  # not blank
        return defined

    return run


def differ(one, other):
    return np.abs(np.asarray(one, dtype=np.float32) - np.asarray(other, dtype=np.float32)).max()


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short_and_says_how_to_run_it(example):
    source = example.read_text()
    assert len(source.splitlines()) < 60
    assert f"python examples/{example.name}" in source.split('"""')[1]


def test_every_example_is_run_here():
    source = Path(__file__).read_text()
    assert all(f'"{example.stem}"' in source for example in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", ["stable_diffusion", "pixart"])
def test_guidance_changes_the_picture_of_a_seed(name, run):
    defined = run(name, "--steps", 10)
    assert differ(defined["stock"], defined["tsam"]) > 20


def test_guidance_changes_the_picture_of_a_tiny_sdxl(run, tmp_path):
    StableDiffusionXLPipeline(**tiny_sdxl_components()).save_pretrained(tmp_path / "model")
    defined = run("sdxl", "--model", tmp_path / "model", "--steps", 5)
    assert differ(defined["stock"], defined["tsam"]) > 10


def test_stock_forgets_the_sphere_that_guidance_draws(run):
    defined = run("stable_diffusion")
    stock, tsam = Judge.from_pretrained().read([defined["stock"], defined["tsam"]])
    assert stock == {("red", "cube")} and tsam == {("red", "cube"), ("blue", "sphere")}


def test_a_picture_of_a_batch_is_the_same_alone(run, capsys):
    defined = run("batch", "--steps", 10)
    assert len(defined["pictures"]) == 9 and capsys.readouterr().out.count(" before the last\n") == 9
    assert differ(defined["together"].images[0], defined["alone"].images[0]) < ROUNDING
    assert (defined["together"].losses[:6, -1] < defined["together"].losses[:6, 0]).all()


def test_a_lora_acts_at_its_scale_and_not_at_zero(run):
    pytest.importorskip("peft")
    defined = run("lora", "--steps", 5, "--training-steps", 8)
    none, half, full = (defined["pictures"][i : i + 2] for i in (0, 2, 4))
    pipe = defined["pipe"]
    pipe.unload_lora_weights()
    generators = [torch.Generator().manual_seed(seed) for seed in (74, 1)]
    without = pipe(defined["prompts"], **{**defined["settings"], "generator": generators}).images
    for i in range(2):
        assert differ(none[i], without[i]) == 0
        assert 0 < differ(none[i], half[i]) and 0 < differ(half[i], full[i])


def test_what_saves_memory_changes_the_picture_by_rounding(run):
    defined = run("low_memory", "--steps", 5)
    assert defined["pipe"].unet.is_gradient_checkpointing
    assert differ(defined["plain"], defined["frugal"]) < ROUNDING


def test_the_attention_of_every_word_and_step_is_shown(run):
    defined = run("attention", "--steps", 15)
    assert defined["rows"].shape == (7, 3) and set(defined["tables"]) == {"T", "S, first step", "S, last step"}


def test_an_image_is_moved_until_its_own_loss_is_low_enough(run):
    defined = run("callback", "--steps", 10)
    losses = torch.stack(defined["alignment"].losses)
    assert defined["moves"] == (losses > defined["LIMIT"]).sum(0).tolist() and len(set(defined["moves"])) > 1
    for number, stock, aligned in zip(defined["moves"], defined["stock"], defined["aligned"]):
        assert (differ(stock, aligned) > 0) == (number > 0)


def test_ones_own_loop_draws_what_the_pipeline_draws(run):
    defined = run("own_loop", "--steps", 10)
    assert differ(defined["called"], defined["own"]) == 0
    assert differ(defined["own"], defined["fading"]) > 0


def test_ones_own_loss_falls_and_draws_the_sphere_that_stock_forgets(run):
    defined, judge = run("objective"), Judge.from_pretrained()
    right = {("red", "cube"), ("blue", "sphere")}
    assert right not in judge.read(defined["stock"].images)
    assert judge.read(defined["own"].images) == [right, right]
    losses = defined["own"].losses
    assert (losses[:, -1] < losses[:, 0]).all()


def test_solids_get_the_colours_back_that_stock_swaps(run):
    defined, judge = run("sink"), Judge.from_pretrained()
    for prompt, *pictures in zip(defined["SEEDS"], *defined["drawn"].values()):
        words = prompt.split()
        wanted = {(words[colour], words[noun]) for colour, noun in words_of_solids(prompt)}
        stock, tsam = judge.read(pictures)
        assert tsam == wanted != stock


def test_solids_are_drawn_where_they_are_asked_for_and_where_they_are_not_when_asked_otherwise(run):
    defined, judge = run("layout"), Judge.from_pretrained()
    cube, sphere = ("red", "cube"), ("blue", "sphere")
    one, other = judge.locate([output.images[0] for output in defined["outputs"]])
    assert one[cube][0] < 0.5 < one[sphere][0] and other[sphere][0] < 0.5 < other[cube][0]


def test_a_long_prompt_is_cut_by_stock_alone(run):
    defined = run("long_prompt", "--steps", 10)
    assert len(defined["windows"]) == 2 and defined["seen"]["maps"].shape[1] == len(defined["seen"]["tokens"]) > 30
    assert differ(defined["cut"].images[0], defined["whole"].images[0]) > 20
    assert differ(defined["whole"].images[0], defined["tsam"].images[0]) > 0

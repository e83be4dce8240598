"""The `tsam` command, on a tiny model saved to a folder."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_tsam import cli
from diffusers_tsam.attention_processors import OBJECTIVES
from diffusers_tsam.pipeline_tsam_sd import StableDiffusionTSAMPipeline


PROMPT = "a black car and a white clock"
LONG = "a red cube and a blue sphere and a green car and a black dog on the white table"  # 19 words


@pytest.fixture
def tsam(folder, tmp_path, monkeypatch):
    """Runs the command in an empty folder with a short schedule."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=folder):
        cli.main([*arguments, "--model", model, "--device", "cpu", "--steps", "4", "--refinement-iterations", "1"])

    return run


def test_it_draws_one_png_and_prints_where_and_both_losses(tsam, tmp_path, capsys):
    tsam(PROMPT, "--alpha", "30")
    where, losses = capsys.readouterr().out.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == [where] == ["tsam.png"]
    assert losses.startswith("loss at guided step 2 of 2: stock ") and ", T-SAM " in losses
    with Image.open(where) as image:
        assert image.format == "PNG" and all(800 <= side <= 2400 for side in image.size)


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(tsam):
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        tsam(PROMPT, "--seed", seed, "--output", name)
    a, b, c = (np.asarray(Image.open(name)) for name in ("a.png", "b.png", "c.png"))
    assert np.array_equal(a, b)
    assert a.shape != c.shape or not np.array_equal(a, c)


def test_the_stock_picture_is_what_the_stock_pipeline_draws(stock, pipe):
    ours, tsam = cli.draw(pipe, PROMPT, 3, num_inference_steps=4, alpha=30.0, refinement_iterations=1)
    theirs = stock(PROMPT, num_inference_steps=4, generator=torch.Generator().manual_seed(3))
    assert np.array_equal(ours.images[0], theirs.images[0])
    assert not np.array_equal(ours.images[0], tsam.images[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_final_losses_are_those_the_pipeline_reports(pipe, objective):
    settings = {"num_inference_steps": 8, "alpha": 30.0, "objective": objective, "refinement_iterations": 0}
    for output in cli.draw(pipe, PROMPT, **settings):
        assert cli.final_loss(output, objective) == pytest.approx(output.losses[0, -1].item(), rel=1e-5)


def test_final_loss_belongs_to_the_maps_shown_even_where_the_last_step_is_refined(pipe):
    stock, tsam = cli.draw(pipe, PROMPT, num_inference_steps=2, alpha=30.0, refinement_iterations=3)
    assert tsam.losses.shape == (1, 4)  # one guided step, nothing moved before it
    assert cli.final_loss(tsam, "l1") == cli.final_loss(stock, "l1") == pytest.approx(tsam.losses[0, 0].item())


@pytest.mark.parametrize("prompt, words", [("red cube", 2), (PROMPT, 7), (LONG, 14)])
def test_every_word_has_a_map_under_each_picture_and_a_long_prompt_says_what_is_left_out(pipe, prompt, words):
    stock, tsam = cli.draw(pipe, prompt, num_inference_steps=2, refinement_iterations=0)
    figure = cli.figure(prompt, stock, tsam)
    assert len(figure.axes) == 2 * (1 + words) + 3
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[1 : 1 + words] == titles[2 + words : 2 + 2 * words] == prompt.split()[:words]
    assert any("the first 14 of 19 words" in text.get_text() for text in figure.texts) == (prompt == LONG)
    for axes in figure.axes:
        assert 0 <= axes.get_position().x0 < axes.get_position().x1 <= 1
        assert 0 <= axes.get_position().y0 < axes.get_position().y1 <= 1


def test_signs_that_matplotlib_would_read_as_mathematics_are_drawn(pipe):
    prompt = r"$\frac$ car"
    outputs = cli.draw(pipe, prompt, num_inference_steps=2, refinement_iterations=0)
    for output in outputs:
        output.attentions[0]["tokens"][0] = r"$\frac$"
    cli.figure(prompt, *outputs, footer=prompt).savefig(io.BytesIO())


def test_another_model_runs_with_the_pipelines_own_defaults(pipe, folder, monkeypatch, tmp_path):
    given = {}

    def draw(*_, **settings):
        given.update(settings)
        raise ValueError("enough")

    monkeypatch.setattr(cli, "draw", draw)
    with pytest.raises(SystemExit):
        cli.main([PROMPT, "--model", folder, "--gamma", "3", "--output", str(tmp_path / "a.png")])
    own = {
        "alpha": 10.0,
        "objective": "l1",
        "refinement_steps": None,
        "refinement_iterations": None,
        "schedule": "paper",
    }
    assert given == {"num_inference_steps": 50, "tsam_steps": None, "gamma": 3.0, "guidance_scale": 7.5, **own}


def test_the_shipped_model_has_its_own_defaults_and_is_judged(tsam, folder, monkeypatch, capsys):
    from diffusers_tsam.shapes import TUNED
    from diffusers_tsam.shapes.judge import Judge

    class Seen(Judge):
        def read(self, images):
            assert [image.size for image in images] == [(64, 64)] * 2
            return [set(), {("red", "cube"), ("blue", "ring")}]

    given, draw = {}, cli.draw
    monkeypatch.setitem(cli.MODELS, "sd", cli.Path(folder))
    monkeypatch.setattr(Judge, "from_pretrained", Seen)
    monkeypatch.setattr(cli, "draw", lambda *args, **settings: given.update(settings) or draw(*args, **settings))
    tsam(PROMPT)
    assert capsys.readouterr().out.splitlines()[2] == "the judge sees: stock nothing; T-SAM blue ring, red cube"
    tuned = {**TUNED["sd"], "refinement_iterations": 1}
    assert {name: given[name] for name in tuned} == tuned and given["guidance_scale"] == 4.0


@pytest.mark.parametrize(
    "arguments", [["--pipeline", "sd"], ["--pipeline", "pixart"], ["--model", str(cli.MODELS["pixart"])]]
)
def test_the_shipped_models_draw_and_are_judged(arguments, tmp_path, capsys):
    output = tmp_path / "shapes.png"
    cli.main(["a red cube and a blue sphere", "--steps", "4", "--output", str(output), *arguments])
    assert output.exists() and "the judge sees: stock " in capsys.readouterr().out


def test_the_pipeline_is_told_by_the_models_components(folder, tmp_path):
    assert cli.kind_of(folder) == "sd" and cli.kind_of(cli.MODELS["pixart"]) == "pixart"
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline", "transformer": ["diffusers", "Flux"]}')
    with pytest.raises(ValueError, match="a FluxPipeline. T-SAM is for sd, pixart"):
        cli.kind_of(tmp_path)


def test_help_explains_every_option_in_one_line_and_imports_nothing_heavy(tmp_path):
    options = cli.arguments()._actions
    assert all(option.help and "\n" not in option.help for option in options)
    (tmp_path / "diffusers_tsam").symlink_to(cli.Path(cli.__file__).parent)  # a checkout need not be installed
    command = [sys.executable, "-X", "importtime", "-m", "diffusers_tsam.cli", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for option in options for name in option.option_strings)
    assert not any(f" {heavy}\n" in done.stderr for heavy in ("torch", "diffusers", "transformers", "numpy"))


def test_the_choices_of_objective_are_the_pipelines():
    (objective,) = (option for option in cli.arguments()._actions if option.dest == "objective")
    assert objective.choices == OBJECTIVES


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([""], "needs two or more"),
        (["cube"], "needs two or more"),
        ([PROMPT, "--model", "/no/such/model"], "neither a folder"),
        ([PROMPT, "--model", "no/such"], "no/such"),
        ([PROMPT, "--model", "."], "model_index.json"),
        ([PROMPT, "--alpha", "-1"], "`alpha` is -1.0"),
        ([PROMPT, "--gamma", "0"], "`gamma` is 0.0"),
        ([PROMPT, "--alpha", "nan"], "finite"),
        ([PROMPT, "--steps", "-4"], "`num_inference_steps` is -4"),
        ([PROMPT, "--steps", "two"], "invalid int"),
        ([PROMPT, "--steps", "1"], "none is guided"),
        ([PROMPT, "--tsam-steps", "0"], "none is guided"),
        ([PROMPT, "--tsam-steps", "51"], "only 50"),
        ([PROMPT, "--refinement-iterations", "-1"], "`refinement_iterations` is -1"),
        ([PROMPT, "--objective", "l2"], "l1_full"),
        ([PROMPT, "--dtype", "int8"], "bfloat16"),
        ([PROMPT, "--device", "toaster"], "toaster"),
        ([PROMPT, "--output", "no/such/folder/a.png"], "no folder"),
        ([PROMPT, "--output", "a.jpg"], "end in .png"),
        ([PROMPT, "--output", "folder.png"], "cannot be written"),
        ([], "required"),
    ],
)
def test_wrong_values_end_with_a_line_on_stderr_before_anything_is_drawn(
    arguments, reason, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionTSAMPipeline, "progress_bar", lambda *_, **__: pytest.fail("it denoises"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, *([] if "--model" in arguments else ["--model", folder])])
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]  # the Hub's client says in its own words when it cannot be reached
    assert stop.value.code == 2 and not out
    assert last.startswith("tsam: ") and reason in last and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_loading_prints_nothing_and_puts_the_loggers_back(folder, capfd):
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    def state():
        loggers = diffusers_logging, transformers_logging
        return [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]

    before = state()
    pipe, kind = cli.load(folder, device="cpu", dtype="bfloat16")
    assert (kind, pipe.unet.dtype) == ("sd", torch.bfloat16)
    assert capfd.readouterr() == ("", "") and state() == before

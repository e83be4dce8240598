"""The `tsam` command, on a tiny model saved to a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_tsam import FAMILIES, cli, comparing
from diffusers_tsam.pipeline_tsam_sd import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import TUNED
from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.tsam import OBJECTIVES
from diffusers_tsam.tsam_arguments import PRESETS
from kinds import KINDS, PROMPT, make


@pytest.fixture
def tsam(folder, tmp_path, monkeypatch):
    """Runs the command in an empty folder with few updates."""
    monkeypatch.chdir(tmp_path)
    few = ["--model", folder, "--device", "cpu", "--steps", "4", "--refinement-iterations", "1"]
    return lambda *arguments: cli.main([*arguments, *few])


@pytest.fixture
def refused(capsys):
    """Runs the command, which has to end with the code and one line of its own; that line."""

    def run(arguments, code=2):
        with pytest.raises(SystemExit) as stop:
            cli.main([*map(str, arguments)])
        out, err = capsys.readouterr()
        *others, last = err.splitlines()  # the Hub's client says in its own words when it cannot be reached
        assert stop.value.code == code and not out
        assert last.startswith("tsam: ") and not any("Traceback" in line for line in others)
        return last

    return run


def fails(monkeypatch, error):
    """Let drawing raise, and hand out what it was asked for."""
    found = SimpleNamespace()

    def draw(pipe, prompt, seed, settings, **arguments):
        vars(found).update(pipe=pipe, seed=seed, settings=settings, arguments=arguments)
        raise error

    monkeypatch.setattr(comparing, "draw", draw)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn


def test_it_draws_one_png_and_prints_where_and_both_losses(tsam, tmp_path, capsys):
    tsam(PROMPT, "--alpha", "30")
    where, losses = capsys.readouterr().out.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == [where] == ["tsam.png"]
    assert losses.startswith("loss at step 2 of 4, after its updates: stock ") and ", T-SAM " in losses
    with Image.open(where) as image:
        assert image.format == "PNG" and all(800 <= side <= 2400 for side in image.size)


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(tsam):
    for name, seed in (("a.png", "1"), ("b.png", "1"), ("c.png", "2")):
        tsam("red cube", "--seed", seed, "--output", name)
    a, b, c = (np.asarray(Image.open(name)) for name in ("a.png", "b.png", "c.png"))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_both_pictures_are_those_that_the_pipelines_draw(kind, stock, pipe):
    call, guidance = {**kind.call, "num_inference_steps": 4}, {"alpha": 30.0, "refinement_iterations": 1}
    (ours, aligned), *_ = comparing.draw(pipe, PROMPT, 3, pipe.settings(**guidance), **call)
    theirs, called = (
        each(PROMPT, generator=torch.Generator().manual_seed(3), **call, **arguments).images[0]
        for each, arguments in ((stock, {}), (pipe, guidance))
    )
    assert np.array_equal(ours, theirs) and np.array_equal(aligned, called)
    assert not np.array_equal(ours, aligned)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_maps_and_s_are_those_of_the_last_guided_step_after_its_updates(kind, objective, pipe):
    call, settings = {**kind.call, "num_inference_steps": 6}, {"objective": objective, "gamma": 3.0, "tsam_steps": 2}

    def seen(**changes):
        generator = torch.Generator().manual_seed(5)
        given = {**settings, "refinement_steps": [1], **changes}
        output = pipe(PROMPT, generator=generator, output_attentions=True, **call, **given)
        return output.losses[0], output.attentions[0]

    # An update more than is made sees what those before it have led to; to watch, none is made.
    settings["alpha"] = 0.1 * kind.alpha
    stock, watched = seen(alpha=0, refinement_iterations=0)
    aligned, _ = seen(refinement_iterations=3)
    _, (before, after), guided, attentions = comparing.draw(
        pipe, PROMPT, 5, pipe.settings(**settings, refinement_iterations=0), **call
    )
    assert guided == 2 and before == pytest.approx(stock[1].item(), rel=1e-5)
    assert after == pytest.approx(aligned[2].item(), rel=1e-4) and after < before
    assert attentions["tokens"] == PROMPT.split() and attentions["maps"].shape[:2] == (2, 7)
    for name in ("maps", "similarity"):
        torch.testing.assert_close(attentions[name][0], watched[name][1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attentions["text_attention"], watched["text_attention"])


def test_one_guided_step_shows_what_its_update_has_changed_and_in_which_region(kind, pipe):
    regions = {"black car": (0.0, 0.0, 0.5, 1.0), "a white clock": (0.5, 0.0, 1.0, 1.0)}
    call, settings = {**kind.call, "num_inference_steps": 1}, {"alpha": 0.1 * kind.alpha, "refinement_iterations": 0}
    _, (before, after), guided, _ = comparing.draw(pipe, PROMPT, 0, pipe.settings(**settings), **call)
    assert guided == 1 and after < before
    settings |= {"objective": "layout", "regions": regions}
    _, (before, after), _, seen = comparing.draw(pipe, PROMPT, 0, pipe.settings(**settings), **call)
    assert seen["regions"] == [((0.0, 0.0, 0.5, 1.0), [1, 2]), ((0.5, 0.0, 1.0, 1.0), [4, 5, 6])]
    shares = torch.stack([*seen["region_shares"].values()])
    assert [*seen["region_shares"]] == [*regions] and after < before
    torch.testing.assert_close(10 * (1 - shares.mean(0)), torch.tensor([before, after]))


@pytest.mark.parametrize("name, number", [("attention_resolution", 8), ("attention_layers", (2, 5))])
def test_the_maps_shown_are_of_the_layers_that_are_asked_for(name, number):
    kind = KINDS["sd" if name == "attention_resolution" else "pixart"]
    pipe, asked = make(kind.tsam, kind.components), []
    layers = pipe.cross_attention_layers
    pipe.cross_attention_layers = lambda value: asked.append(value) or layers()
    with pytest.raises(ValueError, match="needs two or more"):
        comparing.draw(pipe, "cube", 0, pipe.settings(**{name: number}), **kind.call)
    assert asked == [number]


def test_it_takes_regions_and_long_prompts(tsam, capsys):
    regions = "--region", "car=0,0,0.5,1", "--region", "white clock=0.5,0,1,1"
    tsam(PROMPT, *regions, "--region-weight", "5", "--max-sequence-length", "150")
    _, _, car, clock = capsys.readouterr().out.splitlines()
    assert car.startswith("attention of 'car' inside its region: stock ") and "%, T-SAM " in clock


def test_a_prompt_of_other_scripts_warns_of_nothing(tsam, recwarn):
    tsam("a red cube 一只红色的狗 🐕")
    assert not [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)]


# ----------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("name, guidance, sunk", [(None, {}, False), ("sd", 4.0, False), ("sink", 4.0, True)])
def test_a_shipped_model_has_its_own_settings_and_another_the_pipelines(
    name, guidance, sunk, folder, tmp_path, monkeypatch, refused
):
    drawn, model = fails(monkeypatch, ValueError("enough")), {None: ["--model", folder], "sd": [], "sink": ["--sink"]}
    given = ["a red cube and a blue sphere", "--gamma", "3", "--output", tmp_path / "a.png", *model[name]]
    assert refused(given) == "tsam: enough"
    assert drawn.settings == StableDiffusionTSAMPipeline.settings(**TUNED.get(name, {}), gamma=3.0)
    assert drawn.arguments == {"num_inference_steps": 50} | ({"guidance_scale": guidance} if name else {})
    assert drawn.seed == cli.SEEDS[name or "sd"]
    text = drawn.pipe.get_text_self_attention([given[0]])
    assert (text.attention[0, 1:8, 0].mean() > 0.9) == sunk


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--attention-resolution", "8"],
        ["--pipeline", "pixart", "--attention-layers", "2", "5"],
        ["--model", str(cli.MODELS["pixart"])],
        ["--sink"],
    ],
)
def test_the_shipped_models_draw_and_are_judged(arguments, tmp_path, capsys):
    output = tmp_path / "shapes.png"
    cli.main(["a red cube and a blue sphere", "--steps", "1", "--output", str(output), *arguments])
    assert output.exists() and "the judge sees: stock " in capsys.readouterr().out


def test_what_the_judge_sees_is_said_in_words(monkeypatch):
    solids = ("red", "cube", (0, 0)), ("blue", "ring", (0, 0)), ("blue", "ring", (1, 1))
    monkeypatch.setattr(Judge, "from_pretrained", lambda: SimpleNamespace(solids=lambda images: images))
    assert cli.judged([[], solids]) == ["nothing", "2 blue rings, red cube"]


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the model, to be broken."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def class_name(name):
    return lambda model: (model / "model_index.json").write_text(json.dumps({"_class_name": name}))


OTHERS = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionInpaintPipeline"
NO_INDEX = "", "{", "[]", "{}", '"text"', '{"_class_name": null}', '{"_class_name": []}', "\xff"


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_are_refused_by_name_before_they_are_loaded(name, broken, refused, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("it loads"))
    class_name(name)(broken)
    families = "Stable Diffusion (StableDiffusionPipeline) and PixArt-α (PixArtAlphaPipeline)"
    assert refused([PROMPT, "--model", broken]).endswith(f": it is a {name}. This draws with {families}.")


def test_a_model_that_cannot_be_loaded_is_said_in_a_line(folder, tmp_path, refused):
    parts = "tokenizer", "unet", "text_encoder/model.safetensors", "vae/config.json"
    states = [("model_index.json", text) for text in NO_INDEX] + [
        (part, text) for part in parts for text in (None, "{")
    ]
    for number, (part, text) in enumerate(states):
        model = Path(shutil.copytree(folder, tmp_path / str(number)))
        path = model / part
        for file in list(path.rglob("*")) if path.is_dir() else [path]:
            file.unlink() if text is None else file.write_bytes(text.encode("latin-1"))
        why = "its model_index.json is not" if part == "model_index.json" else ""
        assert f"--model is {str(model)!r}, which cannot be loaded: {why}" in refused([PROMPT, "--model", model])


def test_an_inpainting_unet_is_refused_whatever_its_folder_says(broken, refused):
    unet = KINDS["sd"].components["unet"]
    type(unet).from_config(unet.config, in_channels=9).save_pretrained(broken / "unet")
    assert "its unet takes 9 channels" in refused([PROMPT, "--model", broken])


def test_what_an_older_version_saved_loads_and_its_code_is_not_run(kind, stock, tmp_path):
    stock.save_pretrained(tmp_path)
    (tmp_path / kind.file).write_text("raise SystemExit")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = [Path(kind.file).stem, kind.tsam.__name__]
    index.get("transformer", ["", ""])[1] = "Transformer2DModel"  # as the published PixArt-α calls it
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe, name = cli.load(tmp_path, device="cpu")
    assert type(pipe) is kind.tsam and name == kind.name


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


# ----------------------------------------------------------------------------------------------------------------------
# What is said


@pytest.mark.slow
def test_help_explains_every_option_in_one_line_imports_nothing_heavy_and_needs_no_utf8(tmp_path):
    (tmp_path / "diffusers_tsam").symlink_to(Path(cli.__file__).parent)  # this package need not be installed

    def run(*arguments):
        ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=ascii_only, capture_output=True, text=True
        )

    options = cli.arguments()._actions
    assert all(option.help and "\n" not in option.help for option in options)
    done = run("-X", "importtime", "-m", "diffusers_tsam", "--help")
    assert done.returncode == 0 and all(name in done.stdout for option in options for name in option.option_strings)
    assert not any(f" {heavy}\n" in done.stderr for heavy in ("torch", "diffusers", "transformers", "numpy"))
    code = "from diffusers_tsam import cli; cli.run = lambda args: [args.output]; cli.main(['a', '--output', 'Å.png'])"
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (0, "\\xc5.png\n")


def test_the_choices_are_the_pipelines():
    choices = {option.dest: option.choices for option in cli.arguments()._actions}
    assert choices["preset"] == tuple(PRESETS) and choices["pipeline"] == tuple(FAMILIES)


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([""], "needs two or more"),
        (["cube"], "needs two or more"),
        (["a \udcff cube"], "not in UTF-8"),
        ([PROMPT, "--model", "/no/such/model"], "neither a folder"),
        ([PROMPT, "--model", "no/such"], "no/such"),
        ([PROMPT, "--model", "."], "model_index.json"),
        ([PROMPT, "--pipeline", "pixart"], "it is a Stable Diffusion, but --pipeline is pixart"),
        ([PROMPT, "--sink", "--pipeline", "pixart"], "Leave --model and --pipeline out."),
        ([PROMPT, "--sink", "--model", "somewhere"], "Leave --model and --pipeline out."),
        ([PROMPT, "--alpha", "-1"], "--alpha is -1.0"),
        ([PROMPT, "--steps", "-4"], "--steps is -4"),
        ([PROMPT, "--steps", "two"], "invalid int"),
        ([PROMPT, "--tsam-steps", "0"], "--tsam-steps is 0"),
        ([PROMPT, "--tsam-steps", "51"], "only 50"),
        ([PROMPT, "--refinement-iterations", "-1"], "--refinement-iterations is -1"),
        ([PROMPT, "--objective", "l2"], "contrast"),
        ([PROMPT, "--attention-resolution", "5"], "--attention-resolution is 5"),
        ([PROMPT, "--attention-layers", "2", "5"], "--attention-layers is not for Stable Diffusion"),
        ([PROMPT, "--region", "car"], "it is 'car', but has to be as \"a red cube=0,0,0.5,1\"."),
        ([PROMPT, "--region", "car=0,0,left,1"], "it is 'car=0,0,left,1', but has to be as"),
        ([PROMPT, "--region", "=0,0,1,1"], "it is '=0,0,1,1', but has to be as"),
        ([PROMPT, "--region", "car=0,0,64,64"], "fractions of the picture"),
        ([PROMPT, "--region", "dog=0,0,1,1"], f"--region has 'dog', but the prompt's tokens are '{PROMPT}'"),
        ([PROMPT, "--dtype", "int8"], "bfloat16"),
        ([PROMPT, "--device", "toaster"], "toaster"),
        ([PROMPT, "--device", "xla"], "--device is 'xla'"),
        ([PROMPT, "--output", "no/such/folder/a.png"], "no folder"),
        ([PROMPT, "--output", "a.jpg"], "end in .png"),
        ([PROMPT, "--output", "folder.png"], "cannot be written"),
        ([], "required"),
    ],
)
def test_wrong_values_end_with_a_line_in_the_commands_words_before_anything_is_drawn(
    arguments, reason, folder, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionTSAMPipeline, "progress_bar", lambda *_, **__: pytest.fail("it denoises"))
    (tmp_path / "folder.png").mkdir()
    own = "--model" in arguments or "--sink" in arguments
    assert reason in refused([*arguments, *([] if own else ["--model", folder])])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_ctrl_c_ends_with_a_line_and_a_mistake_of_ours_is_not_hidden(tsam, folder, monkeypatch, refused):
    fails(monkeypatch, KeyboardInterrupt())
    assert refused([PROMPT, "--model", folder], code=130) == "tsam: interrupted"
    fails(monkeypatch, KeyError("no such key"))
    with pytest.raises(KeyError):
        tsam(PROMPT)

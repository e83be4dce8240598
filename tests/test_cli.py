"""The `tsam` command, on a tiny model saved to a folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_tsam import FAMILIES, cli, comparing
from diffusers_tsam.pipeline_tsam_sd import StableDiffusionTSAMPipeline
from diffusers_tsam.tsam import OBJECTIVES
from diffusers_tsam.tsam_arguments import OBJECTIVE_NAMES
from kinds import KINDS, make


PROMPT = "a black car and a white clock"


@pytest.fixture
def tsam(folder, tmp_path, monkeypatch):
    """Runs the command in an empty folder with a short schedule."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, model=folder):
        cli.main([*arguments, "--model", model, "--device", "cpu", "--steps", "4", "--refinement-iterations", "1"])

    return run


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


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the model that may be broken: `broken(index={...})` changes its model_index.json."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)

    def change(**index):
        file = copy / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | index))
        return copy

    return change


@pytest.fixture
def checkout(tmp_path):
    """A folder from which this package can be imported, which need not be installed."""
    (tmp_path / "diffusers_tsam").symlink_to(Path(cli.__file__).parent)
    return tmp_path


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
    assert np.array_equal(a, b)
    assert a.shape != c.shape or not np.array_equal(a, c)


def test_both_pictures_are_those_that_the_pipelines_draw(kind, stock, pipe):
    settings = {**kind.call, "num_inference_steps": 4}
    guidance = {"alpha": 30.0, "refinement_iterations": 1}
    (ours, aligned), *_ = comparing.draw(pipe, PROMPT, 3, pipe.settings(**guidance), **settings)
    theirs, called = (
        each(PROMPT, generator=torch.Generator().manual_seed(3), **settings, **arguments).images[0]
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


def test_regions_are_those_of_the_last_guided_step_after_its_updates_and_outlined(kind, pipe):
    regions = {"black car": (0.0, 0.0, 0.5, 1.0), "a white clock": (0.5, 0.0, 1.0, 1.0)}
    settings = pipe.settings(objective="layout", alpha=0.1 * kind.alpha, regions=regions, refinement_iterations=0)
    _, (before, after), _, seen = comparing.draw(pipe, PROMPT, 0, settings, num_inference_steps=1, **kind.call)
    assert seen["regions"] == [((0.0, 0.0, 0.5, 1.0), [1, 2]), ((0.5, 0.0, 1.0, 1.0), [4, 5, 6])]
    shares = torch.stack([*seen["region_shares"].values()])
    assert [*seen["region_shares"]] == [*regions] and after < before
    torch.testing.assert_close(10 * (1 - shares.mean(0)), torch.tensor([before, after]))


def test_it_takes_regions_and_long_prompts(tsam, capsys, folder):
    regions = "--region", "car=0,0,0.5,1", "--region", "white clock=0.5,0,1,1"
    tsam(PROMPT, *regions, "--region-weight", "5", "--max-sequence-length", "150")
    _, _, car, clock = capsys.readouterr().out.splitlines()
    assert car.startswith("attention of 'car' inside its region: stock ") and "%, T-SAM " in clock


@pytest.mark.parametrize(
    "region, reason",
    [
        ("car", "it is 'car', but has to be as \"a red cube=0,0,0.5,1\"."),
        ("car=0,0,left,1", "it is 'car=0,0,left,1', but has to be as"),
        ("=0,0,1,1", "it is '=0,0,1,1', but has to be as"),
        ("car=0,0,64,64", "fractions of the picture"),
        ("dog=0,0,1,1", "`regions` has 'dog', but the prompt's tokens are 'a black car and a white clock'"),
    ],
)
def test_a_region_that_is_none_is_refused_in_one_line(folder, refused, region, reason):
    assert reason in refused([PROMPT, "--model", folder, "--region", region])


def test_one_guided_step_shows_what_its_update_has_changed(kind, pipe):
    settings = pipe.settings(alpha=0.1 * kind.alpha, refinement_iterations=0)
    _, (before, after), guided, _ = comparing.draw(pipe, PROMPT, 0, settings, num_inference_steps=1, **kind.call)
    assert guided == 1 and after < before


def test_another_model_runs_with_the_pipelines_own_defaults(folder, monkeypatch, tmp_path, refused):
    given = {}

    def draw(pipe, prompt, seed, settings, **arguments):
        given.update(settings=settings, **arguments)
        raise ValueError("enough")

    monkeypatch.setattr(comparing, "draw", draw)
    assert refused([PROMPT, "--model", folder, "--gamma", "3", "--output", tmp_path / "a.png"]) == "tsam: enough"
    assert given == {"settings": StableDiffusionTSAMPipeline.settings(gamma=3.0), "num_inference_steps": 50}


def test_the_shipped_model_has_its_own_defaults_and_is_judged(tsam, folder, monkeypatch, capsys):
    from diffusers_tsam.shapes import TUNED
    from diffusers_tsam.shapes.judge import Judge

    class Seen(Judge):
        def solids(self, images):
            assert [image.size for image in images] == [(64, 64)] * 2
            return [[], [(*solid, (0.5, 0.5)) for solid in (("red", "cube"), ("blue", "ring"), ("blue", "ring"))]]

    given, draw = {}, comparing.draw

    def noted(pipe, prompt, seed, settings, **arguments):
        given.update(settings=settings, **arguments)
        return draw(pipe, prompt, seed, settings, **arguments)

    monkeypatch.setitem(cli.MODELS, "sd", Path(folder))
    monkeypatch.setattr(Judge, "from_pretrained", Seen)
    monkeypatch.setattr(comparing, "draw", noted)
    tsam(PROMPT)
    assert capsys.readouterr().out.splitlines()[2] == "the judge sees: stock nothing; T-SAM 2 blue rings, red cube"
    tuned = StableDiffusionTSAMPipeline.settings(**TUNED["sd"], refinement_iterations=1)
    assert given["settings"] == tuned and given["guidance_scale"] == 4.0


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


@pytest.mark.parametrize("other", [["--pipeline", "pixart"], ["--model", "somewhere"]])
def test_the_sink_is_only_for_the_shipped_stable_diffusion(other, refused):
    assert "Leave --model and --pipeline out." in refused([PROMPT, "--sink", *other])


def test_the_sink_draws_with_the_weights_and_settings_of_its_own(monkeypatch, tmp_path, refused):
    from diffusers_tsam.shapes import TUNED

    found = {}

    def draw(pipe, prompt, seed, settings, **_):
        attention = pipe.get_text_self_attention([prompt]).attention
        found.update(settings=settings, seed=seed, bos=attention[0, 1:8, 0].mean().item())
        raise ValueError("enough")

    monkeypatch.setattr(comparing, "draw", draw)
    assert refused(["a red cube and a blue sphere", "--sink", "--output", tmp_path / "a.png"]) == "tsam: enough"
    assert found["seed"] == cli.SEEDS["sink"] and found["bos"] > 0.9
    assert found["settings"] == StableDiffusionTSAMPipeline.settings(**TUNED["sink"])


@pytest.mark.parametrize("name, number", [("attention_resolution", 8), ("attention_layers", (2, 5))])
def test_the_maps_shown_are_of_the_layers_that_are_asked_for(name, number):
    kind = KINDS["sd" if name == "attention_resolution" else "pixart"]
    pipe, asked = make(kind.tsam, kind.components), []
    layers = pipe.cross_attention_layers
    pipe.cross_attention_layers = lambda value: asked.append(value) or layers()
    with pytest.raises(ValueError, match="needs two or more"):
        comparing.draw(pipe, "cube", 0, pipe.settings(**{name: number}), **kind.call)
    assert asked == [number]


def test_a_prompt_of_other_scripts_warns_of_nothing(tsam, recwarn):
    tsam("a red cube 一只红色的狗 🐕")
    assert not [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)]


def test_help_explains_every_option_in_one_line_and_imports_nothing_heavy(checkout):
    options = cli.arguments()._actions
    assert all(option.help and "\n" not in option.help for option in options)
    command = [sys.executable, "-X", "importtime", "-m", "diffusers_tsam", "--help"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=checkout, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for option in options for name in option.option_strings)
    assert not any(f" {heavy}\n" in done.stderr for heavy in ("torch", "diffusers", "transformers", "numpy"))


def test_what_it_prints_needs_no_utf8(checkout):
    code = "from diffusers_tsam import cli; cli.run = lambda args: [args.output]; cli.main(['a', '--output', 'Å.png'])"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, env=ascii_only, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\\xc5.png\n")


def test_the_choices_are_the_pipelines():
    choices = {option.dest: option.choices for option in cli.arguments()._actions}
    assert choices["objective"] == OBJECTIVE_NAMES and choices["pipeline"] == tuple(FAMILIES)


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
        ([PROMPT, "--alpha", "-1"], "--alpha is -1.0"),
        ([PROMPT, "--gamma", "0"], "--gamma is 0.0"),
        ([PROMPT, "--alpha", "nan"], "finite"),
        ([PROMPT, "--steps", "-4"], "--steps is -4"),
        ([PROMPT, "--steps", "two"], "invalid int"),
        ([PROMPT, "--tsam-steps", "0"], "--tsam-steps is 0"),
        ([PROMPT, "--tsam-steps", "51"], "only 50"),
        ([PROMPT, "--refinement-iterations", "-1"], "--refinement-iterations is -1"),
        ([PROMPT, "--objective", "l2"], "contrast"),
        ([PROMPT, "--attention-resolution", "5"], "--attention-resolution is 5"),
        ([PROMPT, "--attention-layers", "2", "5"], "--attention-layers is not for Stable Diffusion"),
        ([PROMPT, "--dtype", "int8"], "bfloat16"),
        ([PROMPT, "--device", "toaster"], "toaster"),
        ([PROMPT, "--device", "xla"], "--device is 'xla'"),
        ([PROMPT, "--output", "no/such/folder/a.png"], "no folder"),
        ([PROMPT, "--output", "a.jpg"], "end in .png"),
        ([PROMPT, "--output", "folder.png"], "cannot be written"),
        ([], "required"),
    ],
)
def test_wrong_values_end_with_a_line_on_stderr_before_anything_is_drawn(
    arguments, reason, folder, tmp_path, monkeypatch, refused
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionTSAMPipeline, "progress_bar", lambda *_, **__: pytest.fail("it denoises"))
    (tmp_path / "folder.png").mkdir()
    assert reason in refused([*arguments, *([] if "--model" in arguments else ["--model", folder])])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    "name", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionInpaintPipeline"]
)
def test_other_pipelines_are_refused_by_name_before_they_are_loaded(name, broken, refused, monkeypatch):
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("it loads"))
    families = "Stable Diffusion (StableDiffusionPipeline) and PixArt-α (PixArtAlphaPipeline)"
    assert refused([PROMPT, "--model", broken(_class_name=name)]).endswith(
        f": it is a {name}. T-SAM is for {families}."
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '"text"', '{"_class_name": null}', '{"_class_name": []}', "\xff"]
)
def test_a_model_index_that_cannot_be_read_is_said_in_a_line(text, broken, refused):
    model = broken()
    (model / "model_index.json").write_bytes(text.encode("latin-1"))
    assert f"--model is {str(model)!r}, which cannot be loaded: its model_index.json is not" in refused(
        [PROMPT, "--model", model]
    )


@pytest.mark.parametrize("part", ["tokenizer", "unet", "text_encoder/model.safetensors", "vae/config.json"])
@pytest.mark.parametrize("how", ["missing", "broken"])
def test_a_model_that_cannot_be_loaded_is_said_in_a_line(part, how, broken, refused):
    path = broken() / part
    for file in list(path.rglob("*")) if path.is_dir() else [path]:
        file.write_text("{") if how == "broken" else file.unlink()
    assert f"--model is {str(broken())!r}, which cannot be loaded: " in refused([PROMPT, "--model", broken()])


def test_an_inpainting_unet_is_refused_whatever_its_folder_says(broken, refused):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(KINDS["sd"].components["unet"].config, in_channels=9)
    unet.save_pretrained(broken() / "unet")
    assert "its unet takes 9 channels" in refused([PROMPT, "--model", broken()])


def test_what_an_older_version_saved_loads_and_its_code_is_not_run(kind, stock, tmp_path):
    stock.save_pretrained(tmp_path)
    (tmp_path / kind.file).write_text("raise SystemExit")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["_class_name"] = [Path(kind.file).stem, kind.tsam.__name__]
    index.get("transformer", ["", ""])[1] = "Transformer2DModel"  # as the published PixArt-α calls it
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipe, name = cli.load(tmp_path, device="cpu")
    assert type(pipe) is kind.tsam and name == kind.name


def test_ctrl_c_ends_with_a_line(folder, monkeypatch, tmp_path, refused):
    monkeypatch.chdir(tmp_path)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "draw", interrupt)
    assert refused([PROMPT, "--model", folder], code=130) == "tsam: interrupted"


def test_a_mistake_of_ours_is_not_hidden(tsam, monkeypatch):
    monkeypatch.setattr(comparing, "draw", lambda *_, **__: {}["no such key"])
    with pytest.raises(KeyError):
        tsam(PROMPT)


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

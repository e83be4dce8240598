"""The `tsam` command, on a tiny model saved to a folder."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from diffusers_tsam import FAMILIES, cli, comparing, figures
from diffusers_tsam.pipeline_tsam_sd import StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import TUNED
from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.tsam import OBJECTIVES
from diffusers_tsam.tsam_arguments import PRESETS
from kinds import KINDS, PROMPT, make, run


@pytest.fixture
def tsam(folder, tmp_path, monkeypatch):
    """Runs the command in an empty folder with few updates."""
    monkeypatch.chdir(tmp_path)
    few = ["--model", folder, "--device", "cpu", "--steps", "4", "--refinement-iterations", "1"]
    return lambda *arguments: cli.main([*arguments, *few])


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are made but not laid out and rendered, which takes seconds."""
    monkeypatch.setattr(figures, "save", lambda figure, path: Path(path).write_text("a figure"))


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


def spied(monkeypatch, module=comparing, name="draw", error=None):
    """The calls of a function, which goes on unless it is to raise."""
    spy = Mock(wraps=getattr(module, name), side_effect=error)
    monkeypatch.setattr(module, name, spy)
    return spy.call_args_list


def compared(kind, pipe, prompt, seed, given, **call):
    """What `comparing.draw` returns with a kind's arguments and those given, T-SAM's as `Settings`."""
    call, own = kind.call | call, {each.name for each in fields(pipe.settings)}
    ours = {name: value for name, value in call.items() if name in own} | given
    rest = {name: value for name, value in call.items() if name not in own}
    return comparing.draw(pipe, prompt, seed, pipe.settings(**ours), **rest)


def test_it_draws_one_png_and_prints_where_and_both_losses(tsam, capsys, monkeypatch):
    asked, shown = spied(monkeypatch), spied(monkeypatch, figures, "figure")
    tsam(PROMPT, "--alpha", "30", "--seed", "1")
    where, losses = capsys.readouterr().out.splitlines()
    assert losses.startswith("loss at step 2 of 4, after its updates: stock ") and ", T-SAM " in losses
    with Image.open(where) as image:
        assert image.format == "PNG" and all(800 <= side <= 2400 for side in image.size)
    (((_, words, rows, *_), _),), (drawing,) = shown, asked
    assert words == PROMPT.split() and drawing.args[2] == 1
    assert [picture for _, _, picture, _ in rows] == comparing.draw(*drawing.args, **drawing.kwargs)[0]


def test_it_overwrites_only_when_told(tsam, tmp_path, capsys, refused, unsaved):
    for name in ("tsam.png", "tsam-2.png"):
        (tmp_path / name).touch()
    tsam(PROMPT)
    assert capsys.readouterr().out.startswith("tsam-3.png\n")
    assert "exists. Pass --force" in refused([PROMPT, "--output", "tsam.png"])
    tsam(PROMPT, "--force")
    assert [(tmp_path / f"tsam{number}.png").read_text() for number in ("", "-2", "-3")] == ["a figure", "", "a figure"]


def test_several_seeds_are_a_sheet_and_the_best_of_them_ranks_first(tsam, capsys, monkeypatch, unsaved):
    asked, shown = spied(monkeypatch), spied(monkeypatch, figures, "sheet")
    tsam(PROMPT, "--seeds", "3-4")
    where, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(": loss at step 2 of 4")[0] for line in lines] == ["seed 3", "seed 4"] and Path(where).exists()
    (((_, columns, rows, _), _),), (three, four) = shown, asked
    pictures = [comparing.draw(*each.args, **each.kwargs)[0] for each in (three, four)]
    assert columns == ["seed 3", "seed 4"] and [name for name, *_ in rows] == ["Stock", "T-SAM, same seed"]
    assert [row for *_, row in rows] == [*zip(*pictures)]

    tsam(PROMPT, "--seed", "5", "--best-of", "3")
    ranked = three.args[0].rank(PROMPT, range(5, 8), num_inference_steps=4)
    listed = ", ".join(f"seed {seed} {loss:.3f}" for seed, loss in ranked)
    assert f"after step 1, best first: {listed}\n" in capsys.readouterr().out and asked[-1].args[2] == ranked[0][0]


def test_both_pictures_are_those_that_the_pipelines_draw(kind, stock, pipe):
    guidance = {"alpha": 30.0, "refinement_iterations": 1}
    (ours, aligned), *_ = compared(kind, pipe, PROMPT, 3, guidance, num_inference_steps=4)
    theirs, called = (run(each, seed=3, output_type="pil", **guidance).images[0] for each in (stock, pipe))
    assert ours == theirs != aligned == called


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_maps_and_s_are_those_of_the_last_guided_step_after_its_updates(kind, objective, pipe):
    settings = {"objective": objective, "gamma": 3.0, "tsam_steps": 2, "alpha": 0.1 * kind.alpha}

    def seen(**changes):
        call = {"num_inference_steps": 3, "refinement_steps": [1], "output_attentions": True}
        output = run(pipe, seed=5, **call, **settings | changes)
        return output.losses[0], output.attentions[0]

    # An update more than is made sees what those before it have led to; to watch, none is made.
    stock, watched = seen(alpha=0, refinement_iterations=0)
    aligned, _ = seen(refinement_iterations=3)
    settings["refinement_iterations"] = 0
    _, (before, after), guided, attentions = compared(kind, pipe, PROMPT, 5, settings, num_inference_steps=3)
    assert guided == 2 and before == pytest.approx(stock[1].item(), rel=1e-5)
    assert after == pytest.approx(aligned[2].item(), rel=1e-4) and after < before
    assert attentions["tokens"] == PROMPT.split() and attentions["maps"].shape[:2] == (2, 7)
    for name in ("maps", "similarity"):
        torch.testing.assert_close(attentions[name][0], watched[name][1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attentions["text_attention"], watched["text_attention"])


def test_one_guided_step_shows_what_its_update_has_changed_and_in_which_region(kind, pipe):
    regions = {"black car": (0.0, 0.0, 0.5, 1.0), "a white clock": (0.5, 0.0, 1.0, 1.0)}
    settings = {"alpha": 0.1 * kind.alpha, "refinement_iterations": 0}
    _, (before, after), guided, _ = compared(kind, pipe, PROMPT, 0, settings, num_inference_steps=1)
    assert guided == 1 and after < before
    settings |= {"objective": "layout", "regions": regions}
    _, (before, after), _, seen = compared(kind, pipe, PROMPT, 0, settings, num_inference_steps=1)
    assert seen["regions"] == [((0.0, 0.0, 0.5, 1.0), [1, 2]), ((0.5, 0.0, 1.0, 1.0), [4, 5, 6])]
    shares = torch.stack([*seen["region_shares"].values()])
    assert [*seen["region_shares"]] == [*regions] and after < before
    torch.testing.assert_close(10 * (1 - shares.mean(0)), torch.tensor([before, after]))


@pytest.mark.parametrize("name, number", [("attention_resolution", 8), ("attention_layers", (2, 5))])
def test_the_maps_shown_are_of_the_layers_that_are_asked_for(name, number):
    kind = KINDS["sd" if name == "attention_resolution" else "pixart"]
    pipe, asked = make(kind.tsam, kind.components), []
    layers = pipe.cross_attention_layers(**{each: kind.call[each] for each in {name} & {*kind.call}})
    pipe.cross_attention_layers = lambda value: asked.append(value) or layers
    for prompt in ("cube", f"{pipe.tokenizer.eos_token} cube"):  # one word, and one that the model reads
        with pytest.raises(ValueError, match="needs two or more"):
            compared(kind, pipe, prompt, 0, {name: number})
    assert asked == [number] * 2


def test_it_takes_regions_and_long_prompts_and_says_once_what_is_not_read(tsam, capsys, warnings_seen, unsaved):
    regions = "--region", "car=0,0,0.5,1", "--region", "white clock=0.5,0,1,1"
    tsam(PROMPT, *regions, "--region-weight", "5", "--max-sequence-length", "150")
    _, _, car, clock = capsys.readouterr().out.splitlines()
    assert car.startswith("attention of 'car' inside its region: stock ") and "%, T-SAM " in clock
    for read, *limit in ((75,), (7, "--max-sequence-length", "7")):
        tsam(f"{PROMPT} and {'a red cube and ' * 30}a dog", *limit)
        *_, cut = capsys.readouterr().out.splitlines()
        assert cut.startswith(f"the model reads {read} of the prompt's 130 tokens, without '")
        assert cut.endswith("and a dog'; --max-sequence-length 130 reads all")
    assert not warnings_seen.text


def test_an_objective_in_a_file_is_used_by_the_name_of_its_function(tsam, tmp_path, monkeypatch, refused, unsaved):
    asked = spied(monkeypatch)
    (tmp_path / "my.py").write_text("def peak(maps, text):\n    return 1 - maps.amax((1, 2, 3))\n")
    (tmp_path / "bad.py").write_text("import no_such_module")
    for text, reason in {
        "my.py:valley": "that file has no function 'valley'",
        "bad.py:peak": "whose file fails: ModuleNotFoundError: No module named 'no_such_module'",
        "no.py:peak": "'layout', or a function in a file, my.py:function.",
    }.items():
        assert f"--objective is {text!r}, " in (said := refused([PROMPT, "--objective", text])) and reason in said
    tsam(PROMPT, "--objective", "my.py:peak")
    assert asked[0].args[3].objective.__name__ == "peak"


def test_a_picture_that_breaks_is_no_result(tsam, kind, pipe, tmp_path, folder, refused):
    with pytest.raises(ValueError, match=r"T-SAM's picture broke at step 1: .* Lower `alpha`, which is 1e\+38"):
        compared(kind, pipe, PROMPT, 0, {"alpha": 1e38})
    if kind.name == "sd":
        said = refused([PROMPT, "--model", folder, "--alpha", "1e38"])
        assert "Lower --alpha, which is 1e+38, or --guidance-scale" in said and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", [None, "sd", "sink"])
def test_a_shipped_model_has_its_own_settings_and_another_the_pipelines(name, folder, tmp_path, monkeypatch, refused):
    asked = spied(monkeypatch, error=ValueError("enough"))
    model = {None: ["--model", folder], "sd": [], "sink": ["--sink"]}
    given = ["a red cube and a blue sphere", "--gamma", "3", "--output", tmp_path / "a.png", *model[name]]
    assert refused(given) == "tsam: enough"
    (((pipe, prompt, seed, settings), call),) = asked
    assert settings == StableDiffusionTSAMPipeline.settings(**TUNED.get(name, {}), gamma=3.0)
    assert call == {"num_inference_steps": 50} | ({"guidance_scale": 4.0} if name else {})
    assert seed == cli.SEEDS[name or "sd"]
    assert (pipe.get_text_self_attention([prompt]).attention[0, 1:8, 0].mean() > 0.9) == (name == "sink")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    ["--sink --attention-resolution 8", "--pipeline pixart --attention-layers 2 5", f"--model {cli.MODELS['pixart']}"],
)
def test_the_shipped_models_draw_are_judged_and_say_which_words_they_do_not_know(arguments, tmp_path, capsys, unsaved):
    output = tmp_path / "shapes.png"
    cli.main(["a red cube and a blue dog", "--steps", "1", "--output", str(output), *arguments.split()])
    said = capsys.readouterr().out
    assert output.exists() and "the judge sees: stock " in said and "solids, but not 'dog'; --model" in said


def test_what_the_judge_sees_and_which_words_are_unknown_is_said(monkeypatch):
    solids = ("red", "cube", (0, 0)), ("blue", "ring", (0, 0)), ("blue", "ring", (1, 1))
    monkeypatch.setattr(Judge, "from_pretrained", lambda: SimpleNamespace(solids=lambda images: images))
    assert cli.judged([[], solids]) == ["nothing", "2 blue rings, red cube"]
    seen, prompt = {"tokens": ["a"], "uncut": ["a"]}, "A photo of a Cat, and a red cube."
    (said,) = cli.remarks(seen, prompt, True, True)
    assert said == "the model knows 8 colours and 6 solids, but not 'photo', 'of', 'Cat'; --model takes another"
    assert not [*cli.remarks(seen, prompt, False, True), *cli.remarks(seen, "a red cube, a blue star", True, True)]


OTHERS = "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionInpaintPipeline"
NO_INDEX = "", "{", "[]", "{}", '"text"', '{"_class_name": null}', '{"_class_name": []}', "\xff"
PARTS = "tokenizer", "unet", "text_encoder/model.safetensors", "vae/config.json"


def test_a_model_that_cannot_be_loaded_is_said_before_where_its_index_tells(folder, tmp_path, refused, monkeypatch):
    families = "Stable Diffusion (StableDiffusionPipeline) and PixArt-α (PixArtAlphaPipeline)"
    broken = [("model_index.json", text, "its model_index.json is not") for text in NO_INDEX]
    for name in OTHERS:
        index = json.dumps({"_class_name": name})
        broken.append(("model_index.json", index, f"it is a {name}. This draws with {families}."))
    broken += [(part, text, "") for part in PARTS for text in (None, "{")]
    for number, (part, text, why) in enumerate(broken):
        model = Path(shutil.copytree(folder, tmp_path / str(number)))
        path = model / part
        for file in [path] if path.is_file() else path.iterdir():
            file.unlink() if text is None else file.write_text(text, "latin-1")
        with monkeypatch.context() as patch:
            if part == "model_index.json":
                patch.setattr(cli, "_load", lambda *_: pytest.fail("it loads"))
            assert f"--model is {str(model)!r}, which cannot be loaded: {why}" in refused([PROMPT, "--model", model])
    model, unet = shutil.copytree(folder, tmp_path / "model"), KINDS["sd"].components["unet"]
    type(unet).from_config(unet.config, in_channels=9).save_pretrained(model / "unet")
    assert "its unet takes 9 channels, as for inpainting" in refused([PROMPT, "--model", model])


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

    ours, stocks = (logging.getLogger(f"diffusers.{name}") for name in ("tsam", "pipelines"))

    def state():
        loggers = diffusers_logging, transformers_logging
        levels = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
        return levels, ours.level, list(ours.filters)

    before = state()
    pipe, kind = cli.load(folder, device="cpu", dtype="bfloat16")
    with cli.quiet():  # as drawing is
        assert ours.isEnabledFor(logging.WARNING) and not stocks.isEnabledFor(logging.WARNING)
    assert (kind, pipe.unet.dtype) == ("sd", torch.bfloat16)
    assert capfd.readouterr() == ("", "") and state() == before


@pytest.mark.slow
def test_help_explains_every_option_in_one_line_imports_nothing_heavy_and_needs_no_utf8(tmp_path, monkeypatch):
    (tmp_path / "diffusers_tsam").symlink_to(Path(cli.__file__).parent)  # this package need not be installed

    options = (parser := cli.arguments())._actions
    assert all(option.help and "\n" not in option.help for option in options)
    choices = {option.dest: option.choices for option in options}
    assert choices["preset"] == tuple(PRESETS) and choices["pipeline"] == tuple(FAMILIES)
    assert "know only these words: red, green" in parser.epilog and "ring, star, a, an, and, with" in parser.epilog
    command = [sys.executable, "-X", "importtime", "-m", "diffusers_tsam", "--help"]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for option in options for name in option.option_strings)
    assert not any(f" {heavy}\n" in done.stderr for heavy in ("torch", "diffusers", "transformers", "numpy"))
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(cli, "run", lambda args: [args.output])
    cli.main(["a", "--output", "Å.png"])
    assert stream.buffer.getvalue() == b"\\xc5.png\n"


EARLY = {  # behind the prompt, before a model is loaded
    "--model /no/such/model": "neither a folder",
    "--model no/such": "no/such",
    "--model .": "model_index.json",
    "--pipeline pixart": "it is a Stable Diffusion, but --pipeline is pixart",
    "--sink --model somewhere": "Leave --model and --pipeline out.",
    "--alpha -1": "--alpha is -1.0",
    "--steps -4": "--steps is -4",
    "--tsam-steps 0": "--tsam-steps is 0",
    "--candidate-steps 51": "--candidate-steps is 51, but there are only 50",
    "--max-sequence-length 0": "--max-sequence-length is 0",
    "--guidance-scale nan": "--guidance-scale is nan",
    "--seed -1": "it is '-1', but has to be a seed from 0 to 18446744073709551615",
    "--seed 99999999999999999999": "it is '99999999999999999999', but has to be a seed",
    "--seeds 7-0": "it is '7-0', but has to be",
    "--seeds 0-16": "at most 16 of them",
    "--best-of 0": "--best-of is 0",
    "--best-of 2 --seeds 0-7": "--best-of starts at one seed, but --seeds names 8",
    "--best-of 2 --seed 18446744073709551615": "--best-of 2 goes past the last seed",
    "--objective layout": "no --region to hold",
    "--attention-layers 2 5": "--attention-layers is not for Stable Diffusion",
    "--region car": "it is 'car', but has to be as \"a red cube=0,0,0.5,1\".",
    "--region =0,0,1,1": "it is '=0,0,1,1', but has to be as",
    "--region car=0,0,1,1 --region car=0,0,.5,1": "--region names the same words twice",
    "--region car=0,0,64,64": "--region['car'] is (0.0, 0.0, 64.0, 64.0), but a box is",
    "--device toaster": "toaster",
    "--device xla": "--device is 'xla'",
    "--output no/such/folder/a.png": "no folder",
    "--output a.jpg": "end in .png",
    "--output folder.png": "'folder.png', which cannot be written: Is a directory.",
    "--output /proc/a.png": "'/proc/a.png', which cannot be written: ",
}
LATE = {
    "--attention-resolution 5": "--attention-resolution is 5",
    "--region dog=0,0,1,1": f"--region has 'dog', but the prompt's tokens are '{PROMPT}'",
}
PROMPTS = {"": "needs two or more", "cube": "needs two or more", "a \udcff cube": "not in UTF-8"}


def test_wrong_values_end_with_a_line_before_anything_is_drawn(folder, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionTSAMPipeline, "progress_bar", lambda *_, **__: pytest.fail("it denoises"))
    (tmp_path / "folder.png").mkdir()
    for arguments, reason in LATE.items():
        assert reason in refused([PROMPT, *arguments.split(), "--model", folder])
    monkeypatch.setattr(cli, "_load", lambda *_: pytest.fail("it loads"))
    early = [([prompt], reason) for prompt, reason in PROMPTS.items()] + [([], "required")]
    early += [([PROMPT, *arguments.split()], reason) for arguments, reason in EARLY.items()]
    for arguments, reason in early:
        own = "--model" in arguments or "--sink" in arguments
        assert reason in refused([*arguments, *([] if own else ["--model", folder])]), arguments
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_ctrl_c_ends_with_a_line_and_a_mistake_of_ours_is_not_hidden(tsam, folder, monkeypatch, refused):
    spied(monkeypatch, error=KeyboardInterrupt())
    assert refused([PROMPT, "--model", folder], code=130) == "tsam: interrupted"
    spied(monkeypatch, error=KeyError("no such key"))
    with pytest.raises(KeyError):
        tsam(PROMPT)

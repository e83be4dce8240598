"""The evaluation's commands on the model that ships, and its metrics on tiny random models beside literal ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image

from diffusers_tsam.evaluation import generate as drawing
from diffusers_tsam.evaluation import report as reports
from diffusers_tsam.evaluation.__main__ import main
from diffusers_tsam.evaluation.baselines import BASELINES
from diffusers_tsam.evaluation.generate import generate, identity, parse_method, plan
from diffusers_tsam.evaluation.prompts import FORMS, Prompt, load, things_of_template
from diffusers_tsam.evaluation.runs import Run, opened, save, whole
from diffusers_tsam.evaluation.score import TEMPLATES, BlipAnswers, Caption, Clip, Nearest, Shapes, Tifa, in_template
from diffusers_tsam.shapes import MODELS, scenes
from tiny import tiny_tokenizer


SEEDS, METHODS = 2, "stock,tuned,conform:sharpness=none:preset=light:alpha=4"
DRAW = f"generate --model sd --methods {METHODS} --prompts shapes:3:test:2 --seeds {SEEDS}".split()
DRAW += "--steps 3 --batch 3 --output".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run, drawn, scored and reported by the three commands."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    main([*DRAW, str(folder)])
    main(["score", str(folder), "--metrics", "judge"])
    main(["report", str(folder)])
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def pictures(folder):
    found = sorted((Path(folder) / "pictures").rglob("*.png"))
    return {path.relative_to(folder): path.read_bytes() for path in found}


def named(*texts):
    """Prompts of which no words are told to belong together."""
    return [Prompt(str(k), text, []) for k, text in enumerate(texts)]


def refused(*argv):
    """What a command says when it refuses."""
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    return str(stopped.value.code)


ONE = "generate --model sd --steps 1 --methods".split()  # and what to draw, as quickly as can be


def test_three_commands_draw_score_and_report(run):
    assert len(pictures(run)) == 3 * 2 * SEEDS
    assert len(set(pictures(run).values())) == 3 * 2 * SEEDS  # no two alike
    text = (run / "report.md").read_text()
    assert "| stock (4) |" in text and "| conform:sharpness=none:preset=light:alpha=4 (4) |" in text
    assert "12 of 12 pictures drawn" in text
    assert "| right, % | over stock | every solid in its colour, % | over stock | right but for a double, % |" in text
    page = (run / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "http" not in page
    assert json.loads((run / "settings.json").read_text())["methods"]["stock"] == {"tsam_steps": 0}


def test_a_stopped_run_goes_on_where_it_was_and_draws_again_what_is_not_whole(copy):
    before = pictures(copy)
    lost, short, *kept = [copy / name for name in sorted(before)[4:]]
    lost.unlink()
    (lost.parent / f".{lost.name}").write_bytes(b"half of a picture")
    short.write_bytes(short.read_bytes()[:-1])
    lines = (copy / "drawn-0.jsonl").read_text().splitlines(keepends=True)
    (copy / "drawn-0.jsonl").write_text("".join(lines[:-2]) + lines[-2][:20])  # as if it had been killed
    kept = kept[:-1]  # the line of the last is lost
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert Run(copy).present().sum() == len(before) - 2
    main([*DRAW, str(copy)])
    assert pictures(copy) == before
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    again = Run(copy)
    assert again.done("drawn").all() and again.present().all()
    assert (copy / "drawn-0.jsonl").read_text().count("\n") == len(lines) + 2  # those two were drawn twice


@pytest.mark.parametrize("format", ("png", "jpg", "webp"))
def test_a_picture_is_whole_if_nothing_of_its_end_is_missing(format, tmp_path):
    path = tmp_path / f"picture.{format}"
    assert not whole(path)
    save(Image.new("RGB", (9, 7)), path)
    assert whole(path)
    content = path.read_bytes()
    for part in (content[:-1], content[:5], b"", bytes(len(content))):
        path.write_bytes(part)
        assert not whole(path)


SCRIPT = """import runpy, sys
import diffusers_tsam.cli, diffusers_tsam.pipeline_tsam_sd, diffusers_tsam.pipeline_tsam_pixart
assert "diffusers_tsam.evaluation" not in sys.modules
import diffusers_tsam.evaluation.baselines
assert not {"diffusers_tsam.evaluation.runs", "spacy"} & sys.modules.keys()
runpy.run_module("diffusers_tsam.evaluation", run_name="__main__")
"""


def test_two_processes_draw_the_pictures_that_one_draws_and_the_core_and_the_baselines_need_no_extra(run, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [tmp_path / "script.py", *DRAW, tmp_path / "run"]
    paths = os.pathsep.join(path for path in sys.path if path)
    threads = str(torch.get_num_threads())  # which the launcher would set to 1: another number rounds otherwise
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert pictures(tmp_path / "run") == pictures(run)
    each = [len((tmp_path / "run" / f"drawn-{k}.jsonl").read_text().splitlines()) for k in (0, 1)]
    assert sum(each) == 12 and min(each) > 0


def test_the_same_folder_takes_more_methods_and_seeds_and_other_batches_but_no_other_settings(copy):
    before, lost = pictures(copy), sorted(pictures(copy))[0]
    drawn = np.asarray(opened(copy / lost), dtype=int)
    (copy / lost).unlink()
    main([*DRAW, str(copy), "--methods", f"{METHODS},tsam:alpha=1", "--seeds", "3", "--batch", "2"])
    after = pictures(copy)
    assert {name: after[name] for name in before if name != lost}.items() <= before.items()
    assert np.abs(np.asarray(opened(copy / lost)) - drawn).max() <= 1  # to rounding
    assert len(after) == 12 + 6 + 6  # a third seed of the old methods, three of the new one
    said = refused(*DRAW, copy, "--steps", "4")
    assert "drawn with other settings: arguments" in said and "Choose another folder" in said
    assert "prompt_set" in refused(*DRAW, copy, "--prompts", "shapes:3:test:3")


def test_a_file_of_prompts_or_of_an_objective_that_has_changed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts, objective = "a red cube and a blue star\n\n", "def mine(maps, text): return maps.flatten(1).mean(1) + 3"
    Path("prompts.txt").write_text(prompts)
    Path("my.py").write_text(objective)
    Path("keep.py").write_text("def kept(pipe, prompts, output): return [{'kept': 1}] * len(prompts)")
    once = [*ONE, "tsam:objective=my.py:mine:preset=light,stock", "--prompts", "prompts.txt", "--keep", "keep.py:kept"]
    once += ["--output", "run"]
    main(once)
    assert len(set(pictures("run").values())) == 2  # so that it guides
    assert 3 < next(Run("run").rows("drawn"))["loss"][0] < 3.1
    Path("prompts.txt").write_text(prompts.replace("star", "ring"))
    assert "other settings: prompts" in refused(*once)
    Path("prompts.txt").write_text(prompts)
    Path("my.py").write_text(objective.replace("mean", "sum"))
    assert "other settings: tsam:objective=my.py:mine" in refused(*once)
    Path("my.py").write_text(objective)
    Path("keep.py").write_text(Path("keep.py").read_text().replace("1", "2"))
    assert "other settings: keep. The first of these was 'keep.py:kept " in refused(*once)


def test_errors_say_what_to_do(copy, tmp_path):
    score = ["score", copy, "--metrics", "judge"]
    (tmp_path / "settings.json").write_text("{}")  # another program's
    for folder in (tmp_path, tmp_path / "nothing"):
        assert f"'{folder}' is no run, since it has no settings.json of one" in refused("score", folder)
    assert "'clips', but has to be one of clip, caption, tifa, judge" in refused(*score[:3], "clips")
    assert "Pass --questions" in refused(*score[:3], "tifa")
    assert "settings.json' is no list" in refused(*score[:3], "tifa", "--questions", tmp_path / "settings.json")
    assert "--score-batch is 0" in refused(*score, "--score-batch", 0)
    (copy / "score-judge.json").write_text('{"clip": "another"}\n')
    assert "was scored with" in refused(*score)
    for path in copy.glob("score-*"):
        path.unlink()
    assert "no scores yet" in refused("report", copy)
    victim = sorted((copy / "pictures").rglob("*.png"))[0]
    victim.write_bytes(victim.read_bytes()[:50] + victim.read_bytes()[-20:])
    assert f"{str(victim)!r} is no picture" in refused(*score)
    victim.write_bytes(b"")
    assert f"1 pictures are missing or cut off, the first of them {victim}" in refused(*score)
    with (copy / "drawn-0.jsonl").open("a") as file:
        file.write("\0\0\n")
    assert f"'{copy}/drawn-0.jsonl, line 13' is no JSON" in refused(*score)
    (copy / "drawn-0.jsonl").unlink()
    assert "no pictures yet" in refused(*score)
    (copy / "settings.json").write_text("")
    assert f"'{copy}/settings.json' is no JSON" in refused(*score)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--prompts objekts", "is no file and none of"),
        ("--methods tsma", "but has to be one of stock"),
        ("--methods syngen:sharpness=none", "has no argument 'sharpness'"),
        ("--methods tsam:alpha", "no argument and value"),
        ("--methods tsam:alpha=nan", "The method 'tsam:alpha=nan': `alpha` is nan, but has to be finite"),
        ("--methods stock,tsam:tsam_steps=4", "but there are only 3 denoising steps"),
        ("--methods syngen:objective=l1", "has an objective of its own. Leave `objective` out"),
        ("--methods tsam:objective=none.py:mine", "or a function in a file, my.py:function"),
        ("--keep none.py:mine", "--keep is 'none.py:mine', but has to be a function in a file, my.py:function"),
        ("--seeds 0", "--seeds is 0, but has to be at least 1"),
        ("--steps 0", "--steps is 0, but has to be at least 1"),
        ("--batch 0", "--batch is 0, but has to be at least 1"),
        ("--guidance-scale inf", "--guidance-scale is inf, but has to be finite"),
        ("--methods stock:num_inference_steps=3", "changes 'num_inference_steps', which all of a run's methods share"),
        ("--methods tsam:regions=3", "changes 'regions', which all of a run's methods share"),
        ("--methods stock:timesteps=3", "changes 'timesteps', which all of a run's methods share"),
        ("--methods tsam:self=3", "The method 'tsam:self=3': `self` takes no number. Leave it out"),
        ("--methods stock:callback_on_step_end=3", "`callback_on_step_end` takes no number. Leave it out"),
        ("--methods tsam:clip_skip=1.5", "`clip_skip` is 1.5, but has to be an integer"),
        ("--methods stock:eta=none", "`eta` is None, but has to be a number"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_a_model_is_loaded(arguments, said, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "load_pipeline", None)
    assert said in refused(*DRAW, tmp_path / "new", *arguments.split())
    assert not (tmp_path / "new").exists()


REGIONS = [
    ({"a green cube": [0, 0, 2, 1]}, "is (0.0, 0.0, 2.0, 1.0), but a box is"),
    ({"a gren cube": [0, 0, 1, 1]}, "has a region for 'a gren cube', which it does not have"),
    ("left", "`regions` has to be a dict"),
]


@pytest.mark.parametrize("regions, said", REGIONS)
def test_regions_that_cannot_be_held_are_refused_before_anything_is_drawn(regions, said, tmp_path):
    prompts = [{"prompt": "a red cube"}, {"prompt": "a green cube and a red star", "regions": regions}]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    assert said in refused(*DRAW, tmp_path / "run", "--prompts", tmp_path / "prompts.json")
    assert not (tmp_path / "run").exists()


def test_methods_that_would_share_a_folder_of_pictures_are_refused(tmp_path):
    methods = dict.fromkeys(("tsam:objective=a/b.py:one", "tsam:objective=a_b.py:one"), {})
    with pytest.raises(ValueError, match="would share a folder of pictures"):
        Run.create(tmp_path, {"methods": methods, "seeds": 1, "format": "png"}, named("a red cube"))


def test_a_second_command_that_would_write_the_same_lines_or_over_a_users_prompts_is_refused(copy, tmp_path):
    for kind, command in (
        ("drawn", [*DRAW, copy, "--seeds", 3]),
        ("score-judge", ["score", copy, "--metrics", "judge"]),
    ):
        with Run(copy).writer(kind, 0) as append:
            append([{"method": 0, "prompt": 0, "seed": 0}])
            assert f"Another command is writing '{copy}/{kind}-0.jsonl'" in refused(*command)
        main([*map(str, command)])
    mine = tmp_path / "prompts.jsonl"
    mine.write_text('{"prompt": "a red cube"}\n')
    assert "has other prompts in prompts.jsonl" in refused(*ONE, "stock", "--prompts", mine, "--output", tmp_path)
    assert mine.read_text() == '{"prompt": "a red cube"}\n'


def test_an_interrupted_command_says_in_one_line_that_it_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "load_pipeline", mock.Mock(side_effect=KeyboardInterrupt))
    assert refused(*DRAW, tmp_path) == "130"
    assert capsys.readouterr().err == "evaluation: interrupted; the same command goes on\n"


def test_what_does_not_bind_is_said_and_files_of_others_are_no_part_of_a_model(tmp_path, capsys):
    model = shutil.copytree(MODELS["sd"], tmp_path / "model")
    for stray in (".DS_Store", "README.md", "unet/.DS_Store", "unet/._config.json", "unet/Thumbs.db"):
        (model / stray).write_text("a file manager's")
    assert identity(str(model)) == identity("sd")
    (tmp_path / "prompts.txt").write_text("a cube and a star\na red cube and a star\n")
    main([*ONE, "syngen,stock,tsam", "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "run")])
    said = "syngen has nothing to bind in 1 of 2 prompts, which are drawn as by stock, the first of them"
    assert f"{said} 'a cube and a star'.\n" in capsys.readouterr().out
    assert said in reports.about(Run(tmp_path / "run")) and "tsam has" not in reports.about(Run(tmp_path / "run"))
    (model / "unet" / "config.json").write_text("{}")
    assert identity(str(model)) != identity("sd")


METHODS_READ = {
    "stock": {"tsam_steps": 0},
    "tsam:alpha=20:objective=attainable": {"alpha": 20.0, "objective": "attainable"},
    "tsam:refinement_steps=none:tsam_steps=5": {"refinement_steps": (), "tsam_steps": 5},
    "tsam:attention_layers=4+7:attention_keys=all": {"attention_layers": (4, 7), "attention_keys": "all"},
    "tsam:objective=a/my.py:mine:alpha=4": {"objective": "a/my.py:mine", "alpha": 4.0},
    "tuned:alpha=2": {"preset": "fast", "alpha": 2.0},
    "syngen:refinement_steps=0+4": {"alpha": 20.0, "preset": "paper", "refinement_steps": (0, 4)},
    "syngen:tsam_steps=3:preset=fast": {"alpha": 20.0, "tsam_steps": 3, "preset": "fast"},
    "focus:alpha=3": {"alpha": 3.0, "preset": "paper", "refinement_steps": ()},
    "focus:preset=fast:refinement_steps=0": {"preset": "fast", "relative_step": 0.05, "refinement_steps": (0,)},
    "conform:sharpness=none": {"alpha": 20.0, "preset": "paper", "sharpness": None},
    "tsam:clip_skip=1:eta=0.5": {"clip_skip": 1, "eta": 0.5},
} | {f"{name}:preset=fast:relative_step=0.05": {"preset": "fast", "relative_step": 0.05} for name in BASELINES}


@pytest.mark.parametrize("text", METHODS_READ)
def test_a_method_is_a_name_and_changed_arguments(text):
    found, expected = (sorted(map(repr, each.items())) for each in (parse_method(text)[0], METHODS_READ[text]))
    assert found == expected  # as text, because 1 and 1.0 differ


@pytest.mark.parametrize("model", ("sink", "pixart", "sd3"))  # and sd, everywhere else
def test_every_small_model_is_drawn_by_the_same_methods(model, tmp_path):
    methods = "stock,tuned:tsam_steps=1:refinement_steps=none,syngen:preset=light:relative_step=0.05"
    command = f"generate --model {model} --prompts shapes:2:test:1 --steps 2 --output {tmp_path} --methods".split()
    main([*command, methods])
    assert len(set(pictures(tmp_path).values())) == 3
    assert [row["updates"] for row in Run(tmp_path).rows("drawn")] == [0, 1, 1]
    arguments = Run(tmp_path).settings["methods"].values()
    assert [each.get("preset") for each in arguments] == [None, "fast", "light"]
    other = {"pixart": "attention_keys=all", "sd3": "region_weight=2", "sink": "attention_layers=1+2"}[model]
    assert "has no argument" in refused(*command, f"tsam:{other}")
    assert "drawn with other settings: arguments" in refused(*command, methods, "--guidance-scale", "9")
    if model != "sink":  # a method may change what the shipped model's calls have
        main([*command, {"pixart": "stock:use_resolution_binning=0", "sd3": "stock:max_sequence_length=9"}[model]])
        assert len(pictures(tmp_path)) == 4
    if model == "sd3":
        quarters = ["--prompts", "quarters:2:test:1"]
        assert "have regions, which 'sd3' cannot hold" in refused(*command, methods, *quarters)


def test_a_run_of_a_thousand_seeds_is_complete_whatever_a_file_manager_leaves_in_it(tmp_path):
    settings = {"methods": {"stock": {"tsam_steps": 0}}, "seeds": 1002, "format": "png"}
    run = Run.create(tmp_path, settings, named("a red cube"))
    for seed in (0, 999, 1000, 1001):
        save(Image.new("RGB", (1, 1)), run.picture(0, 0, seed))
    folder = run.picture(0, 0, 0).parent
    for stray in ("Thumbs.db", ".001.png", "../.DS_Store", "../../.DS_Store", "002.txt"):  # the second is half-written
        (folder / stray).write_text("")
    (folder.parent / "00007").mkdir()  # of no prompt of this run
    assert np.flatnonzero(run.present()[0, 0]).tolist() == [0, 999, 1000, 1001]


@pytest.mark.parametrize("batch", (1, 4, 7, 100))
def test_every_job_is_in_one_batch_and_what_binds_nothing_is_drawn_as_stock(batch):
    prompts = [Prompt(text, text, things_of_template(text)) for text in ("a cat and a dog", "a red bow")]
    methods = {name: parse_method(name) for name in ("stock", "syngen")}
    batches = plan(prompts, methods, 5, batch)
    jobs = [(method, *job) for method, _, own in batches for job in own]
    assert sorted(jobs) == [(m, p, s) for m in (0, 1) for p in (0, 1) for s in range(5)]
    assert all(len(own) <= batch for *_, own in batches)
    for method, (arguments, baseline), own in batches:
        assert (baseline is not None) == (method == 1 and own[0][0] == 1)
        assert (arguments == {"tsam_steps": 0}) == (baseline is None)
        assert len({prompt for prompt, _ in own}) == 1 or method == 0


A, B, BOX = "a red bow", 'the "B", and a cat', {"cat": [0, 0, 0.5, 1]}
FILES = {
    "tifa.json": json.dumps([{"id": 7, "caption": A, "coco_val_id": "2"}, {"id": "x", "caption": B, "regions": BOX}]),
    "strings.json": json.dumps([A, B]),
    "lists.txt": json.dumps({"animals": [A], "objects": [B]}),  # as Attend-and-Excite's authors publish theirs
    "geneval.jsonl": "".join(json.dumps({"tag": "two", "include": [], "prompt": text}) + "\n" for text in (A, B)),
    "table.csv": 'number,Prompts\n1,a red bow\n2,"the ""B"", and a cat"\n',
    "parti.tsv": 'Prompt\tCategory\na red bow\tx\n"the ""B"", and a cat"\ty\n',
    "lines.txt": f"{A}\r\n\r\n {B}\n",
    "lines": f"{A}\n{B}",
}


@pytest.mark.parametrize("mark", ("", "\ufeff"))
@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_from_files(name, mark, tmp_path):
    path = tmp_path / name
    path.write_bytes((mark + FILES[name]).encode())
    names = {"tifa.json": ("7", "x"), "lists.txt": ("animals-0", "objects-0")}.get(name, ("0", "1"))
    box = BOX if name == "tifa.json" else None
    assert load(str(path)) == [Prompt(names[0], A, [[(2, 5), (6, 9)]]), Prompt(names[1], B, [], box)]
    if name == "lists.txt":
        assert [prompt.text for prompt in load(f"{path}:objects")] == [B]


SIXTEEN = "a cat".encode("utf-16")
OTHER_FILES = [
    ("prompts.xlsx", b"PK", ".xlsx is not read. Pass .txt (a prompt a line), .json, .jsonl, .csv or .tsv"),
    ("latin.txt", b"a caf\xe9", "is not in UTF-8 (unexpected end of data at byte 5). Save it in UTF-8"),
    ("sixteen.txt", SIXTEEN, "is not in UTF-8 (invalid start byte at byte 0). Save it in UTF-8: iconv -f UTF-16"),
    ("bracket.txt", b"[a] cat", "bracket.txt, read as JSON since it begins with [' is no JSON: Expecting"),
    ("half.json", b'["a cat"', "is no JSON: Expecting"),
    ("half.jsonl", b'{"prompt": "a cat"}\n{"pro', "half.jsonl, line 2' is no JSON"),
    ("half.csv", b'prompt\n"a cat', "is no table at line 2"),
    ("other.csv", b"text\na cat\n", "has an entry without a prompt, {'text': 'a cat'}"),
    ("other.json", b'[{"caption": 3}]', "has an entry without a prompt, {'caption': 3}"),
    ("deep.json", b'{"objects": {"a": "b"}}', "has to be a list of prompts, or a dictionary of such lists"),
    ("lists.json", b'{"objects": ["a cat"]}', "has no list 'animals', but 'objects'"),
    ("list.json", b'["a cat"]', "is no dictionary of lists"),
    ("empty.txt", b"\n", "in which there are none"),
]


@pytest.mark.parametrize("name, content, said", OTHER_FILES)
def test_other_files_of_prompts_are_refused_by_name(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        load(str(tmp_path / name) + ":animals" * name.startswith("list"))
    assert said in str(refusal.value) and name in str(refusal.value)


def test_a_repeated_prompt_is_drawn_once_and_is_one_cluster_of_an_interval(tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na cat\na cat\n")
    assert [prompt[:2] for prompt in load(str(tmp_path / "prompts.txt"))] == [("0", "a cat"), ("1", "a dog")]
    assert "2 of 4 prompts" in caplog.text and "repeat others, and are drawn once" in caplog.text
    settings = {"methods": {"stock": {}}, "seeds": 2, "format": "png"}
    run = Run.create(tmp_path, settings, named(*"aba"))
    values = np.array([[1.0, 3.0], [5.0, np.nan], [8.0, np.nan]])
    assert sorted(reports.per_prompt(values, run.clusters)) == [4.0, 5.0]


def test_prompts_of_the_shapes_world_come_in_four_forms():
    texts = {form: [prompt.text for prompt in load(f"{form}:2:test:5")] for form in FORMS}
    assert texts["quarters"] == texts["shapes"] and len(set(texts["shapes"])) == 5
    for plain, sentences, filled in zip(texts["shapes"], texts["sentences"], texts["filled"]):
        assert sentences == plain.replace(" and ", " , ")
        assert len(filled.split()) == len(sentences.split()) + 22
        assert scenes.solids_of(plain) == scenes.solids_of(filled)
    for prompt in load("quarters:3:test:5"):
        assert len(set(prompt.regions.values())) == 3 == sum(solid in prompt.text for solid in prompt.regions)
    assert load("quarters:3:test:5") == load("quarters:3:test:5")


def test_each_prompt_has_its_own_regions_and_something_of_each_picture_is_kept(tmp_path):
    def keep(pipe, prompts, output):
        shares = [attention["region_shares"] if attention else {} for attention in output.attentions or [None, None]]
        return [{"shares": list(own), "text": prompt.text} for own, prompt in zip(shares, prompts)]

    methods = ["stock", "tsam:preset=light:objective=layout"]
    run = generate("sd", methods, "quarters:2:test:2", 1, tmp_path, steps=2, keep=keep)
    for row in run.rows("drawn"):
        prompt = run.prompts[row["prompt"]]
        assert row["text"] == prompt.text and row["shares"] == ([*prompt.regions] if row["method"] else [])
    main(["score", str(tmp_path), "--metrics", "judge"])
    rows = list(run.rows("score-judge"))
    assert len(rows) == 4 and all(row["placed"] in (0, 0.5, 1) for row in rows)
    assert "solids where asked, %" in reports.report(tmp_path)
    for kept in (None, [{}], [1, 2], [{"prompt": "a red cube"}] * 2, [{"own": torch.ones(2)}] * 2):
        with pytest.raises(ValueError, match="`keep` returned .* for 2 pictures. Return a dict for each"):
            generate(
                "sd", ["stock"], "shapes:2:test:2", 1, tmp_path / "wrong", steps=1, keep=mock.Mock(return_value=kept)
            )
    assert not pictures(tmp_path / "wrong")


def test_a_solid_is_where_it_was_asked_for_if_it_is_seen_inside():
    regions = {"red cube": (0.0, 0.0, 0.5, 0.5), "a blue ring": (0.5, 0.5, 1.0, 1.0)}
    for place, there in (((0.2, 0.2), True), ((0.5, 0.2), False), ((0.2, 0.7), False)):
        found = Shapes.placed(regions, {("red", "cube"): place, ("white", "star"): (0.7, 0.7)})
        assert found == {"placed": 0.5 * there, "all_placed": 0}
    assert Shapes.placed(regions, {("red", "cube"): (0, 0), ("blue", "ring"): (0.9, 0.5)})["all_placed"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


LAYERS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCHES = {**LAYERS, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**LAYERS, "vocab_size": len(tokenizer), **ends}
    config = hf.CLIPConfig(text_config=text, vision_config=PATCHES, projection_dim=12)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return hf.CLIPModel(config).eval(), hf.CLIPProcessor(images, tokenizer)


BLIP_WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] yes no is there a cat car red black what colour it ?".split()


def blip(cls, tmp_path):
    """A tiny BLIP with random weights, and its processor."""
    torch.manual_seed(1)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(BLIP_WORDS))
    tokenizer = hf.BertTokenizer(str(vocabulary), bos_token="[DEC]")
    ids = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3}
    text = {**LAYERS, "vocab_size": len(BLIP_WORDS), "encoder_hidden_size": 16, **ids, "max_position_embeddings": 64}
    config = hf.BlipConfig(text_config=text, vision_config=PATCHES)
    model = cls(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # so that answers differ
    return model, hf.BlipProcessor(hf.BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer)


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(3)]


def literal(clip, text, templates=("{}",)):
    """The mean over templates of a text's features of length 1, again of length 1, read one at a time."""
    model, processor = clip
    total = 0
    for template in templates:
        tokens = processor.tokenizer([in_template(template, text)], return_tensors="pt", truncation=True)
        found = model.text_projection(model.text_model(**tokens).pooler_output)[0]
        total = total + found / found.norm()
    return total / total.norm()


@torch.no_grad()
def test_clip_scores_are_the_literal_ones_by_80_templates(clip, images):
    assert len(set(TEMPLATES)) == 80 and all(template.count("{}") == 1 for template in TEMPLATES)
    assert in_template("a photo of the {}.", "a red car") == "a photo of a red car."
    assert in_template("a photo of many {}.", "cars") == "a photo of many cars."
    model, processor = clip
    templates = ["a photo of a {}.", "itap of my {}.", "the origami {}."]
    texts = ["a red car and a black dog", "a cube with a blue sphere", "the table"]
    rows = Clip(*clip, templates)(images, named(*texts))
    for row, image, text in zip(rows, images, texts):
        pixels = processor.image_processor(images=image, return_tensors="pt").pixel_values
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)[0]
        parts = text.split(" and ") if " and " in text else text.split(" with ")
        near = [float(literal(clip, part, templates) @ seen / seen.norm()) for part in (text, *parts)]
        assert row["clip_full"] == pytest.approx(near[0], abs=1e-6)
        assert row["clip_min"] == (None if len(parts) == 1 else pytest.approx(min(near[1:]), abs=1e-6))


@torch.no_grad()
def test_a_caption_is_compared_with_its_prompt(clip, images, tmp_path):
    template, (model, processor) = ["a photo of a {}."], blip(hf.BlipForConditionalGeneration, tmp_path)
    rows = Caption(Clip(*clip, template), model, processor)(images, named("a red car") * 3)
    for row, image in zip(rows, images):
        ids = model.generate(**processor(images=image, return_tensors="pt"), num_beams=3, min_length=10, max_length=30)
        assert row["caption"] == processor.decode(ids[0], skip_special_tokens=True).strip()
        expected = literal(clip, "a red car", template) @ literal(clip, row["caption"])
        assert row["clip_text"] == pytest.approx(float(expected), abs=1e-6)


@torch.no_grad()
def test_blip_answers_as_it_does_alone_with_the_probability_of_each_token_in_turn(images, tmp_path):
    model, processor = blip(hf.BlipForQuestionAnswering, tmp_path)
    questions = ["is there a cat ?", "what colour is the car it is ? it ?", "is it red ?"]
    answers = ["yes", "black car", "no"]
    free, likely = BlipAnswers(model, processor)([images[0], images[0], images[1]], questions, answers)
    assert len(set(likely)) == 3
    for k, image in enumerate((images[0], images[0], images[1])):
        inputs = processor(images=image, text=questions[k], return_tensors="pt")
        own = model.generate(**inputs, max_length=50, do_sample=False)
        assert free[k] == processor.decode(own[0], skip_special_tokens=True).strip()
        seen = model.vision_model(inputs["pixel_values"])[0]
        state = model.text_encoder(inputs["input_ids"], inputs["attention_mask"], encoder_hidden_states=seen)[0]
        said, product = [5], 1.0  # [DEC]
        for token in [*map(BLIP_WORDS.index, answers[k].split()), 3]:  # [SEP]
            logits = model.text_decoder(torch.tensor([said]), encoder_hidden_states=state).logits[0, -1]
            product *= float(logits.softmax(-1)[token])
            said.append(token)
        assert likely[k] == pytest.approx(product, rel=1e-4)


def question(caption, asked, answer, kind, choices=("yes", "no")):
    return {"caption": caption, "question": asked, "answer": answer, "element_type": kind, "choices": list(choices)}


QUESTIONS = [
    question("a red cat", "is there a cat?", "yes", "animal"),
    question("a red cat", "what colour?", "red", "color", ("red", "blue")),
    question("a dog", "is there a dog?", "yes", "animal"),
]


FOUND = {"is there a cat?": ("yes", 0.9), "what colour?": ("blue", 0.25), "is there a dog?": ("no", 0.5)}


def known(images, questions, answers):
    """Answers that are known: the cat is there and blue, and no dog is."""
    return zip(*map(FOUND.get, questions))


def test_known_answers_have_known_scores_and_questions_and_judges_of_other_prompts_are_refused():
    prompts = named("a red cat", "a dog")
    cat, dog = Tifa(known, Nearest(), QUESTIONS, prompts)(["one", "other"], prompts)
    assert (cat["tifa"], cat["soft_tifa"], cat["answers"]) == (0.5, pytest.approx(0.575), ["yes", "blue"])
    assert (dog["tifa"], dog["soft_tifa"]) == (0.0, 0.5)
    assert cat["types"] == {"animal": [1, 1], "color": [0, 1]} and dog["types"] == {"animal": [0, 1]}
    with pytest.raises(ValueError, match="for other prompts: 1 of 2 have none, the first of them 'a bird'"):
        Tifa(known, Nearest(), QUESTIONS, named("a dog", "a bird"))
    with pytest.raises(ValueError, match="Question 1 has no question, choices"):
        Tifa(known, Nearest(), [QUESTIONS[0], {"caption": "a dog"}], prompts)
    with pytest.raises(ValueError, match="no pictures of 'a dog runs'"):
        Shapes(named("a dog runs"))


def test_an_answer_means_the_choice_whose_sentence_is_nearest():
    class Sentences(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):  # "automobile" lies beside "car"; padding lies far away
            return (torch.tensor([[9.0, 9.0], [1, 0], [0, 1], [0.9, 0.1]])[input_ids],)

    def tokenizer(texts, **_):
        ids = torch.tensor([[{"car": 1, "cat": 2, "automobile": 3}[text], 0] for text in texts])
        return hf.BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})

    nearest = Nearest(Sentences(), tokenizer)
    assert nearest("automobile", ["cat", "car"]) == "car" and nearest("cat", ["cat", "car"]) == "cat"


def test_models_are_loaded_from_folders_and_resume(copy, clip, tmp_path):
    for part in clip:
        part.save_pretrained(tmp_path / "clip")
    for part in blip(hf.BlipForQuestionAnswering, tmp_path):
        part.save_pretrained(tmp_path / "vqa")
    asked = [question(prompt.text, "is it red?", "yes", "color") for prompt in Run(copy).prompts]
    (tmp_path / "questions.json").write_text(json.dumps(asked))
    command = ["score", copy, "--metrics", "clip,tifa", "--clip", tmp_path / "clip", "--vqa", tmp_path / "vqa"]
    command = [*map(str, command), "--questions", str(tmp_path / "questions.json"), "--sentences", "none"]
    main([*command, "--score-batch", "5"])
    lines = (copy / "score-clip-0.jsonl").read_text()
    assert lines.count("\n") == 12
    (copy / "score-clip-0.jsonl").write_text(lines[:-30])
    main(command)
    again = Run(copy).table("score-clip", "clip_full")["clip_full"]
    assert np.isfinite(again).all()
    values = [json.loads(line)["clip_full"] for line in lines.splitlines()]
    np.testing.assert_allclose(np.sort(again.ravel()), np.sort(values), atol=1e-5)
    main(["report", str(copy)])
    text = (copy / "report.md").read_text()
    assert "CLIP-I, minimum object" in text and "soft TIFA" in text and "| color |" in text


def test_the_judges_scores_count_solids():
    wanted = ("blue", "star"), ("red", "cube")
    shown = wanted, (wanted[0], *wanted), wanted[:1], (("red", "star"), ("blue", "cube"))
    drawn = [scenes.draw_scene(np.random.default_rng(0), solids)[0] for solids in shown]
    prompts = named(scenes.caption_of(wanted)) * len(drawn)
    rows = Shapes(prompts)([Image.fromarray(picture) for picture in drawn], prompts)
    true = [{key for key in Shapes.keys if row[key]} for row in rows]
    assert true == [{"counted", "right"}, {"right", "double"}, {"missing"}, {"swap"}]
    assert [(row["count"], row["fragments"]) for row in rows] == [(2, 0), (3, 0), (1, 0), (2, 0)]


# ----------------------------------------------------------------------------------------------------------------------
# Reports


@pytest.fixture
def scored(tmp_path):
    """A run of known scores: two methods, three prompts, two seeds, one picture of which is not scored."""
    values = [[[0.1, 0.3], [0.5, 0.7], [0.2, 0.2]], [[0.2, 0.2], [0.9, np.nan], [0.4, 0.6]]]
    settings = {"methods": {"stock": {"tsam_steps": 0}, "tsam": {}}, "seeds": 2, "format": "png", "versions": {}}
    settings |= dict.fromkeys(("model", "revision", "scheduler", "dtype", "prompt_set"), "x")
    settings |= {"arguments": {"num_inference_steps": 1}}
    run = Run.create(tmp_path / "run", settings, named("a", "b", "<c>"))
    for number, ((method, prompt, seed), value) in enumerate(np.ndenumerate(values)):
        row = {"method": method, "prompt": prompt, "seed": seed, "clip_full": value, "clip_min": None}
        with run.writer("score-clip", process=number % 2) as append:
            append([row] if np.isfinite(value) else [])
    return run


def test_a_reports_numbers_are_those_of_the_lines_and_nothing_stands_for_those_that_are_not_there(scored):
    scores = reports.Scores(scored)
    assert list(scores.values) == ["clip_full"]
    means = [0.2, 0.9, 0.5]
    gains = [0.0, 0.4, 0.3]  # of the second prompt, the seed that both have
    for found, each in ((scores.of(1, "clip_full"), means), (scores.gain(1, "clip_full"), gains)):
        assert found == pytest.approx((np.mean(each), 1.96 * np.std(each, ddof=1) / 3**0.5), abs=1e-6)
    head, rows = reports.table_of(scores)
    assert head == ["method (pictures)", "CLIP-I, full prompt", "over stock"]
    assert rows[1] == ["tsam (5)", "0.533 ± 0.397", "+0.233 ± 0.236"]
    grid = {f"tsam:alpha={a}:gamma={g}": {"alpha": a, "gamma": g} for a in (1.0, 2.0) for g in (1.0, 2.0)}
    run = Run.create(scored.folder, scored.settings | {"methods": scored.settings["methods"] | grid}, scored.prompts)
    with run.writer("score-clip", 0) as append, run.writer("drawn", 0) as drawn:
        append([{"method": 2, "prompt": 0, "seed": 0, "clip_full": 0.5}])
        drawn([{"method": 3, "prompt": 0, "seed": 0}])
    text, page = reports.report(run.folder), (run.folder / "report.html").read_text()
    assert "+0.233 ± 0.236" in text and "<c>" not in page
    assert "| tsam:alpha=1.0:gamma=1.0 (1) | 0.500 | +0.400 |" in text  # of one prompt there is no interval
    assert "| tsam:alpha=1.0:gamma=2.0 (0) | not scored yet | no pair with stock yet |" in text
    assert "| tsam:alpha=2.0:gamma=2.0 (0) | not drawn yet | no pair with stock yet |" in text
    assert (run.folder / "sweep.png").exists() and "nan" not in text + page.partition("base64")[0]


def test_a_ratios_interval_is_that_of_a_mean_where_all_clusters_are_alike():
    parts, wholes = np.array([1.0, 3, 2, 0]), np.array([4.0, 4, 4, 4])
    assert reports.ratio_interval(parts, wholes) == pytest.approx(reports.interval(parts / wholes))


def test_sweeps_are_grids_of_alpha_and_gamma(scored):
    names = [f"tsam:objective={o}:alpha={a}:gamma={g}" for o in ("l1", "cosine") for a in (1, 2) for g in (1, 3)]
    scored.settings["methods"] |= {name: parse_method(name)[0] for name in names}
    grids, corners = reports.grids(scored), [(1.0, 1.0), (1.0, 3.0), (2.0, 1.0), (2.0, 3.0)]
    assert grids == {f"objective {o}": dict(zip(corners, range(k, 10))) for o, k in (("l1", 2), ("cosine", 6))}


def test_a_sweep_reports_its_best_on_other_prompts(tmp_path, capsys):
    command = f"sweep --model sd --prompts shapes:3:tune:2 --output {tmp_path} --steps 2 --metrics judge".split()
    command += "--alphas 0.5,2 --gammas 2,4 --presets light --objectives attainable --report-prompts".split()
    assert "prompts are in both sets" in refused(*command, "shapes:3:tune:1")
    assert "A metric is 'cli'" in refused(*command, "shapes:3:test:1", "--metrics", "cli")
    assert not any(tmp_path.iterdir())  # nothing was drawn
    main([*command, "shapes:3:test:1"])
    said = capsys.readouterr().out
    tuned, tested = Run(tmp_path / "tune"), Run(tmp_path / "test")
    scores = reports.Scores(tuned)
    gains = {name: scores.gain(k, "counted")[0] for k, name in enumerate(tuned.methods) if k}
    assert len(gains) == 4 and tested.methods == ["stock", max(gains, key=gains.get)]
    assert f"by right, %: {tested.methods[1]}" in said and (tmp_path / "tune" / "sweep.png").exists()

"""The demo: what a page may ask for, how it is drawn, and what is shown of it."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

from diffusers_tsam import FAMILIES, cli, comparing, figures
from diffusers_tsam.app import drawing
from diffusers_tsam.app.drawing import FIELDS, MAX_PROMPT, SHIPPED, Models, Result, Starts, Step, fields_of, wrong
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.shapes.sink import add_sink
from kinds import PROMPT


ROOT = Path(__file__).parent.parent
SD, PIXART, SINK = SHIPPED
SOLIDS = "a red cube and a blue sphere"
FAST = {"preset": "fast", "objective": "contrast", "alpha": None, "relative_step": 0.05, "gamma": 4.0}
PAPER = {"preset": "paper", "objective": "l1", "alpha": 10.0, "relative_step": None, "gamma": 2.0}


@pytest.fixture
def app():
    """The page's module, or a skipped test."""
    pytest.importorskip("gradio.blocks", reason="the page needs gradio: pip install '.[demo]'")
    from diffusers_tsam.app import app

    return app


@pytest.fixture(scope="module")
def models():
    return Models(device="cpu")


@pytest.fixture(scope="module")
def events(models):
    """What is drawn of a prompt with signs that HTML takes for its own."""
    return drawn(models, values_of(models, prompt="a <b>red</b> cube & a blue sphere"))


@pytest.fixture(scope="module")
def result(events):
    return events[-1]


@pytest.fixture
def local(folder):
    """Models of which one is the tiny Stable Diffusion, by `name`."""
    return Models([folder], device="cpu")


@pytest.fixture
def name(folder):
    return Path(folder).name


def values_of(models, start=SD, **changes):
    return {**fields_of(models, start, PROMPT, 3), "steps": 4, **changes}


def drawn(models, values, stopped=lambda: False):
    return list(drawing.draw(models, values, stopped))


def test_a_model_starts_with_what_was_tuned_for_it_or_its_pipelines_defaults(local, name):
    for model, steps, scale, settings in ((SD, 25, 4.0, FAST), (PIXART, 25, 4.0, FAST), (name, 50, 7.5, PAPER)):
        values = fields_of(local, model, PROMPT, 3)
        assert tuple(values) == FIELDS and not wrong(local, values)
        expected = {"model": model, "prompt": PROMPT, "seed": 3, "steps": steps, "seeds": 1, "starts": 1}
        assert values == expected | settings | {"guidance_scale": scale, "negative_prompt": "", "regions": ""}
    assert fields_of(local, SD, PROMPT, 3, preset="paper").items() >= PAPER.items()


@pytest.mark.parametrize("hub, also", [(False, ""), (True, ", or type a Hub id such as owner/name")])
def test_a_name_that_is_not_offered_is_refused_whatever_lies_on_the_disk(hub, also, tmp_path, folder, monkeypatch):
    (tmp_path / "models").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)  # which would be loaded in place of the Hub's
    for link in ("models/model", "secret"):
        (tmp_path / link).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    models = Models(["models"], hub)
    names = "..", "../sd", "/etc", "model/../../secret", "secret", "a/b/c", "a\nb/c", "~", "", 3, ["a"], "./sd", folder
    for name in (*names, "owner/name", *(() if hub else ("owner/other",))):
        with pytest.raises(ValueError, match=f"There is no model .* here. Choose one of the list{also}.$"):
            models.source(name)
        assert "model" in wrong(models, values_of(models) | {"model": name})
    assert not hub or models.source("owner/other") == "owner/other"


def test_links_that_lead_out_of_the_folders_given_are_not_offered(tmp_path, folder):
    inside = tmp_path / "models"
    for name in ("plain", "own"):
        (inside / name).mkdir(parents=True)
    (inside / "out").symlink_to(folder)
    (inside / "plain" / "model_index.json").symlink_to(Path(folder) / "model_index.json")
    (inside / "own" / "model_index.json").write_text("{}")
    (inside / "again").symlink_to(inside / "own")
    assert list(Models([inside]).offered())[len(SHIPPED) :] == ["models/again", "models/own"]
    (tmp_path / "other" / "models").mkdir(parents=True)
    for other, said in (("none", "is .*none', which is no folder"), ("other/models", "has two folders 'models'")):
        with pytest.raises(ValueError, match=f"--models {said}"):
            Models([inside, inside, tmp_path / other])


def test_code_beside_weights_is_never_run_and_an_error_does_not_say_where_they_lie(tmp_path, folder):
    model = Path(shutil.copytree(folder, tmp_path / "models" / "evil"))
    for file in ("pipeline.py", "evil.py", "unet/evil.py"):
        (model / file).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    index = json.loads((model / "model_index.json").read_text())
    for changes in ({"_class_name": ["evil", FAMILIES["sd"].pipeline]}, {"unet": ["evil", "UNet2DConditionModel"]}):
        index |= changes
        (model / "model_index.json").write_text(json.dumps(index))
        models = Models([tmp_path / "models"], device="cpu")
        if "unet" not in changes:
            assert models.load("models/evil")[0].unet is not None
    (model.parent / "empty").mkdir()
    (model.parent / "empty" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    for name in ("models/evil", "models/empty"):
        with pytest.raises(ValueError, match=f"The model '{name}' cannot be loaded: ") as refused:
            models.load(name)
        assert str(tmp_path) not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_no_large_model_is_loaded_and_no_more_than_the_limit(local, name, monkeypatch):
    monkeypatch.setattr(drawing, "MAX_LOADED", 1)
    first = local.load(name)
    assert local.load(name) is first
    local.load(SD)
    assert len(local.loaded) == 1 and local.load(name) is not first
    monkeypatch.setattr(drawing, "MAX_SIDE", 16)
    local.loaded.clear()
    with pytest.raises(ValueError, match="draws 64 pixels a side, but 16 is the limit"):
        local.load(name)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"prompt": " \n"}, "two words or more"),
        ({"prompt": None}, "two words or more"),
        ({"prompt": "cube"}, "Write two or more"),
        ({"prompt": "red " * MAX_PROMPT}, "at most 300"),
        ({"prompt": "a \udcff cube"}, "UTF-8"),
        ({"steps": 2.5}, "whole number"),
        ({"alpha": 10**400, "relative_step": None}, "finite"),
        ({"negative_prompt": "red " * MAX_PROMPT}, "at most 300"),
        ({"preset": "slow"}, "paper, fast, light"),
        ({"objective": ["l1"]}, "attainable"),
        ({"objective": "layout"}, "there are no regions"),
        ({"seeds": 3, "starts": 2}, "Choose among 3 starts or more"),
        ({"seed": 2**32 - 1, "seeds": 2}, "The last seed is 4294967295."),
        ({"seed": 2**32 - 7, "starts": 8}, "The last seed is 4294967295."),
        ({"regions": "a red cube: left"}, 'as "a red cube=0,0,0.5,1"'),
        ({"regions": "a red cube=0,0,64,64"}, "fractions of the picture"),
        ({"regions": "red " * MAX_PROMPT}, "at most 300"),
        ({"alpha": float("nan"), "relative_step": None}, "finite"),
        ({"relative_step": None}, "either alpha or a relative step"),
        ({"alpha": 4.0}, "either alpha or a relative step"),
        ({"relative_step": 2}, "between 0 and 1"),
        ({"gamma": "2"}, "has to be a number"),
        ({"model": "mine"}, "There is no model 'mine' here"),
    ],
)
def test_a_wrong_value_is_told_of_at_its_field(changes, says, models):
    ((field, message),) = wrong(models, values_of(models, **changes)).items()
    assert field in {"alpha", *changes} and says in message and "`" not in message


@pytest.mark.parametrize(
    "field, low, high",
    [("seed", 0, 2**32 - 1), ("steps", 1, 100), ("seeds", 1, 4), ("starts", 1, 8), ("guidance_scale", 1, 30)],
)
def test_the_limits_themselves_are_allowed_and_nothing_beyond_nor_what_is_no_number(field, low, high, models):
    assert not any(wrong(models, values_of(models, **{field: limit})) for limit in (low, high))
    for value in (low - 1, high + 1, 10**400, float("inf"), float("nan"), None, "2"):
        ((name, message),) = wrong(models, values_of(models, **{field: value})).items()
        assert name == field and message.startswith(f"{field.capitalize().replace('_', ' ')} has to be a ")
        assert message.endswith(f"number from {low} to {high}.")


@pytest.mark.slow
@pytest.mark.parametrize("model", SHIPPED)
def test_every_step_is_shown_and_the_pictures_are_those_of_the_command(model, models):
    values = values_of(models, model, prompt=SOLIDS, steps=3)
    *steps, result = drawn(models, values)
    assert [step[:3] for step in steps] == [(name, 3, i) for name in ("T-SAM", "stock") for i in range(3)]
    pipe, kind = cli.load(MODELS["pixart" if model == PIXART else "sd"], device="cpu")
    if model == SINK:
        add_sink(pipe)
    call = {**ARGUMENTS[kind], "num_inference_steps": 3}
    (stock, tsam), *_ = comparing.draw(pipe, SOLIDS, 3, cli.settings_of(pipe, kind, SHIPPED[model]), **call)
    assert [each.picture for each in result.pair] == [stock, tsam] and stock != tsam
    assert [step.loss for step in steps] == pytest.approx(result.pair[1].losses + result.pair[0].losses)
    assert len(result.seen) == 2 and 0 < result.moved < drawing.BREAKS


def test_of_several_seeds_each_is_drawn_as_it_is_alone(local, name):
    events = drawn(local, values_of(local, name, seed=7, seeds=3))
    results = [event for event in events if isinstance(event, Result)]
    assert [result.settings["seed"] for result in results] == [7, 8, 9]
    alone = drawn(local, results[1].settings)[-1]
    assert alone.settings == results[1].settings and alone.settings["seeds"] == 1
    assert alone.pair[1].picture == results[1].pair[1].picture != results[2].pair[1].picture


def test_starts_are_shown_as_they_are_ranked_and_the_best_are_drawn(local, name):
    values = values_of(local, name, seed=7, seeds=2, starts=4)
    events = drawn(local, values)
    pipe, settings = local.load(name)[0], local.defaults(name)[0]
    ranked = pipe.rank(PROMPT, range(7, 11), num_inference_steps=4, **settings.given)
    rows = [event for event in events if isinstance(event, Starts)]
    assert [len(row.pictures) for row in rows] == [1, 2, 3, 4] and all(row.ranked == ranked for row in rows)
    assert [event.settings["seed"] for event in events if isinstance(event, Result)] == [seed for seed, _ in ranked[:2]]
    call = {"num_inference_steps": 4, "guidance_scale": 7.5}
    assert rows[-1].pictures == [drawing.expected(pipe, PROMPT, seed, 1, **call) for seed, _ in ranked]


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_what_a_start_is_expected_to_become_is_in_the_last_step_the_picture(scheduler, local, name):
    pipe = local.load(name)[0]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    call = {"num_inference_steps": 4, "guidance_scale": 7.5}
    (picture,) = pipe(PROMPT, generator=torch.Generator().manual_seed(3), tsam_steps=0, **call).images
    expected = [np.asarray(drawing.expected(pipe, PROMPT, 3, step, **call), int) for step in (1, 4)]
    assert np.abs(expected[1] - picture).max() <= 1 < np.abs(expected[0] - picture).max()
    assert "step" not in vars(pipe.scheduler)


def test_what_a_start_is_expected_to_become_is_what_its_own_scheduler_predicts(local, name, monkeypatch):
    pipe, call = local.load(name)[0], {"num_inference_steps": 4, "guidance_scale": 7.5}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = drawing.expected(pipe, PROMPT, 3, 2, **call)
    step, seen = pipe.scheduler.step, []  # the latents of the next step, and those without noise
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **given: seen.append(step(*args, **given)) or seen[-1])
    pipe(PROMPT, generator=torch.Generator().manual_seed(3), tsam_steps=0, **call)
    decoded = pipe.vae.decode(seen[1][1] / pipe.vae.config.scaling_factor, return_dict=False)[0]
    (picture,) = pipe.image_processor.postprocess(decoded.detach())
    assert np.abs(np.asarray(expected, int) - picture).max() <= 1


def test_regions_hold_the_words_of_their_lines_and_a_refusal_is_raised_where_the_page_waits(local, name):
    *_, result = drawn(local, values_of(local, name, regions="black car=0,0,0.5,1\n\nwhite clock=0.5,0,1,1"))
    seen = result.pair[1].attentions
    words = [[seen["tokens"][i] for i in own] for _, own in seen["regions"]]
    assert [box for box, _ in seen["regions"]] == [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    assert words == [["black", "car"], ["white", "clock"]]
    for changes, says in (
        ({"regions": "a green cone=0,0,0.5,1"}, "has 'a green cone', but the prompt's tokens are"),
        ({"prompt": "\u200b \u200b"}, "needs two or more"),
    ):
        with pytest.raises(ValueError, match=says):
            drawn(local, values_of(local, name, **changes))


@pytest.mark.slow
def test_the_preview_resembles_the_picture(events):
    *_, last, result = events
    small = result.pair[0].picture.resize(last.preview.size, Image.Resampling.BOX)
    assert np.corrcoef(np.ravel(small).astype(float), np.ravel(last.preview).astype(float))[0, 1] > 0.7


@pytest.mark.parametrize(
    "prompt, stock, tsam, says",
    [
        (SOLIDS, ["red cube"], ["red cube", "blue sphere"], "Stock forgot the blue sphere; T-SAM drew both."),
        (SOLIDS, ["red cube", "blue sphere"], ["blue sphere", "red cube"], "Stock and T-SAM drew both."),
        ("A blue star", ["blue star"] * 2, ["blue star"], "Stock drew two blue stars, one unasked; T-SAM drew it."),
        ("a red cube", ["red ring"], ["red cube"], "Stock forgot the red cube and drew a red ring, unasked;"),
        ("a photo of a cat", [], ["red cube"], "The model knows 8 colours and 6 solids, but not photo, of, cat."),
    ],
)
def test_the_headline_says_what_was_forgotten_unasked_and_is_unknown(prompt, stock, tsam, says):
    solids = [[(*name.split(), (0.5, 0.5)) for name in names] for names in (stock, tsam)]
    assert drawing.headline(prompt, solids).startswith(says)


@pytest.mark.parametrize("at", [1, 5])
def test_stop_ends_the_drawing_at_its_next_step_and_the_next_one_is_whole(at, local, name):
    steps, values = [], values_of(local, name)
    for step in drawing.draw(local, values, lambda: len(steps) >= at):
        steps.append(step)
    assert all(isinstance(step, Step) for step in steps) and at <= len(steps) <= at + 2
    assert isinstance(drawn(local, values)[-1], Result)


def test_a_drawing_ends_when_its_page_has_gone(local, name):
    events = drawing.draw(local, values_of(local, name, steps=100), lambda: False)
    next(events)
    events.close()  # waits for the thread
    assert local.load(name)[0].interrupt


def shown(app, models, values, stopped=lambda: False):
    """What the page shows in the end."""
    page = {}
    for parts in app.live(models, values, stopped):
        page |= parts
    return page


@pytest.mark.slow
def test_an_alpha_that_breaks_the_picture_is_warned_of(app, models, result):
    page = shown(app, models, values_of(models, prompt=SOLIDS, alpha=4000.0, relative_step=None, steps=2))
    for kind, status in (("warning", page["status"]), ("note", app.summary(result))):
        assert f'class="tsam-{kind}"' in status and ("halve alpha" in status) == (kind == "warning")
    (broken,) = page["results"]
    captions = [f"{name}, seed 3: {solids}" for name, solids in zip(("Stock", "T-SAM"), broken.seen)]
    assert [(picture.size, text) for picture, text in page["pictures"]["value"]] == [((512, 512), c) for c in captions]
    assert page["result"] is broken


@pytest.mark.parametrize(
    "changes, says",
    [({"prompt": "cube"}, "Write two or more"), ({"model": "<b>"}, "no model &#x27;&lt;b&gt;"), ({}, "KeyError")],
)
def test_a_wrong_request_or_a_mistake_of_ours_is_a_message(changes, says, app, models, monkeypatch, caplog):
    monkeypatch.setattr(models, "load", lambda name: pytest.fail("it loads") if changes else {}["no such key"])
    page = shown(app, models, values_of(models, **changes))
    assert 'role="alert"' in page["status"] and says in page["status"] and "Traceback" not in page["status"]
    assert page["result"] is None
    assert ("no such key" in caplog.text) == (not changes)


@pytest.mark.parametrize("starts", [1, 3])
def test_stopping_is_said_and_leaves_no_result(starts, app, local, name):
    page = shown(app, local, values_of(local, name, seeds=2, starts=starts), lambda: True)
    assert "Stopped" in page["status"] and page["result"] is None and not page["starts"]["visible"]


def test_seeds_make_a_sheet_of_stock_above_tsam_and_the_row_of_starts_marks_the_best(app, local, name):
    page = shown(app, local, values_of(local, name, seeds=2, starts=3))
    first, second = (result.settings["seed"] for result in page["results"])
    captions = [f"{name}, seed {seed}" for name in ("Stock", "T-SAM") for seed in (first, second)]
    assert [text for _, text in page["pictures"]["value"]] == captions and page["pictures"]["columns"] == 2
    marked = [text for _, text in page["starts"]["value"]]
    assert ["best" in text for text in marked] == [True, False, False] and marked[0].startswith(f"seed {first}: ")
    assert page["result"] is page["results"][0] and f"seed {first} " in page["status"]


def test_words_and_prompts_are_escaped_and_the_tables_are_those_that_the_objective_reads(app, result):
    *_, tables = app.look(result, 0, 1)
    words = result.pair[1].attentions["tokens"]
    assert any("<" in word for word in words) and "&lt;" in tables and "<b>" not in tables
    assert tables.count("<table>") == 4 and tables.count('scope="row"') == 4 * len(words)
    assert tables.count("--value") == 4 * len(words) * (len(words) + 1) // 2
    other = result._replace(settings=result.settings | {"objective": "l1"})
    assert "R: " in tables and "R: " not in app.look(other, 0, 1)[-1]


def test_the_maps_shown_are_of_the_word_and_the_step_and_every_words_are_the_commands_figure(app, result, monkeypatch):
    shown, *others = (app.look(result, *at) for at in ((1, 2), (1, 1), (2, 2)))
    assert [each["visible"] for each in shown[:3]] == [True, True, False]
    for picture, *different in zip(*([each["value"] for each in look[:2]] for look in (shown, *others))):
        assert picture.size == (512, 512) and picture not in different
    figure = Mock(wraps=figures.figure)
    monkeypatch.setattr(figures, "figure", figure)
    *maps, every, tables = app.look(result, app.EVERY, 2)
    assert [each["visible"] for each in (*maps, every)] == [False, False, True] and shown[3] and not tables
    assert every["value"].width > 1000
    for drawn, (_, _, picture, maps) in zip(result.pair, figure.call_args.args[2], strict=True):
        assert picture == drawn.picture and torch.equal(maps, drawn.attentions["maps"][1])


def test_the_files_hold_the_pictures_and_the_numbers(app, result, tmp_path):
    *pictures, numbers = app.save(result, tmp_path / "session")
    for path, drawn in zip(pictures, result.pair):
        assert np.array_equal(Image.open(path), drawn.picture)
    numbers = json.loads(numbers.read_text())
    assert {name: numbers[name] for name in FIELDS} == result.settings
    assert numbers["guided_steps"] == [0] and numbers["words"] == result.pair[1].attentions["tokens"]
    similarity = torch.tensor(numbers["tsam"]["similarity"])
    torch.testing.assert_close(similarity, result.pair[1].attentions["similarity"])
    assert numbers["stock"]["losses"] == result.pair[0].losses


@pytest.mark.parametrize("model", SHIPPED)
def test_a_link_gives_back_the_settings_that_it_was_made_of(model, app, models):
    values = values_of(models, model, prompt="a “red” cube & a b=c ring", seed=2**32 - 1, gamma=3.5, preset="light")
    assert app.linked(models, dict(parse_qsl(app.link(values)[1:]))) == (values, "")


@pytest.mark.parametrize(
    "query, says",
    [
        ({"steps": "many"}, "The link's steps is 'many', which is no number."),
        ({"steps": "1000"}, "from 1 to 100"),
        ({"seed": "nan"}, "from 0 to 4294967295"),
        ({"model": "/etc"}, "There is no model '/etc' here"),
        ({"alpha": "nan"}, "finite"),
        ({"preset": "slow"}, "Choose one of"),
        ({"unknown": "1", "preset": "paper"}, ""),
    ],
)
def test_a_link_that_asks_for_what_cannot_be_is_told_of_and_a_preset_brings_its_settings(query, says, app, models):
    values, problem = app.linked(models, query)
    assert tuple(values) == FIELDS and (says in problem if says else not problem)
    assert all(low <= values[name] <= high for name, (low, high) in drawing.LIMITS.items())
    assert (values.items() >= PAPER.items()) == (query.get("preset") == "paper")


def test_sessions_keep_apart_and_leave_nothing_and_their_names_are_no_paths(app, models):
    sessions = [app.Session(SimpleNamespace(session_hash=name)) for name in ("a", "b", "../../a", None)]
    assert len({session.flag for session in sessions}) == 4
    assert all(path.parent == Path(app.WORK.name) for each in sessions for path in (each.flag, each.folder))
    (leave,) = (each.fn for each in app.build(models).fns.values() if each.name == "leave")
    sessions[0].go_on()
    sessions[0].folder.mkdir()
    assert [session.flag.exists() for session in sessions] == [True, False, False, False]
    for name in ("a", "b"):
        leave(SimpleNamespace(session_hash=name))
    assert not any(path.exists() for each in sessions for path in (each.flag, each.folder))


def test_drawings_take_turns_and_one_that_waits_can_be_stopped(app, local, name):
    functions = {each.name: each for each in app.build(local).fns.values()}
    again, request = functions["again"], SimpleNamespace(session_hash="waits")
    assert {(functions[each].concurrency_id, functions[each].concurrency_limit) for each in ("start", "again")} == {
        ("drawing", 1)
    }
    for row, says in ((Starts(values_of(local, name), [(3, 0.5)], []), "Stopped"), (None, "no longer kept")):
        again.validator(row, request)  # as the click on a start does
        app.Session(request).stop()
        *_, last = again.fn(row, request, SimpleNamespace(index=0))
        assert any(says in str(shown) for shown in last.values())


@pytest.mark.slow
def test_the_examples_are_what_they_claim(app, models):
    for kind, seed, prompt in app.EXAMPLES:
        name = next(name for name in SHIPPED if SHIPPED[name] == kind)
        stock, tsam = drawn(models, fields_of(models, name, prompt, seed))[-1].seen
        words = [word for word in prompt.split() if word not in ("a", "an", "and")]
        right = ", ".join(sorted(f"{colour} {solid}" for colour, solid in zip(words[::2], words[1::2])))
        assert tsam == right != stock


def test_it_listens_to_this_machine_alone_unless_asked(app, monkeypatch):
    given = {}
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    monkeypatch.setattr(app, "serve", lambda page, **where: given.update(where))
    app.main(["--device", "cpu"])
    assert given == {"server_name": None, "server_port": None}  # for Gradio: 127.0.0.1, or what a Space asks for
    monkeypatch.setattr(app, "serve", Mock(side_effect=OverflowError("port must be 0-65535.")))
    for arguments in ("--models /no/such/folder", "--device toaster", "--device cpu --port 99999"):
        with pytest.raises(SystemExit) as stop:
            app.main(arguments.split())
        assert stop.value.code == 2


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "app" / "app.py"))
    assert stop.value.code == 'The demo needs Gradio: pip install "diffusers-tsam[demo]"'


@pytest.mark.slow
def test_the_space_names_its_gradio_and_runs_from_its_own_folder(app, tmp_path, monkeypatch):
    front = dict(re.findall(r"^(\w+): (.+)$", (ROOT / "app" / "README.md").read_text(), re.MULTILINE))
    needed = re.search(r"gradio>=([\d.]+),<(\d+)", (ROOT / "setup.cfg").read_text())
    assert (front["sdk"], front["app_file"], front["license"]) == ("gradio", "app.py", "apache-2.0")
    installed = (ROOT / "setup.cfg").read_text().split("install_requires =")[1].split("\n\n")[0].split()
    assert {*installed} <= {*(ROOT / "app" / "requirements.txt").read_text().split()}
    assert front["sdk_version"].startswith(needed[1]) and int(needed[2]) == int(needed[1].split(".")[0]) + 1
    monkeypatch.syspath_prepend(ROOT / "hub")
    monkeypatch.setattr(sys, "argv", ["publish.py", "ada", "--space", "--dry-run", "--output", str(tmp_path / "hub")])
    runpy.run_path(str(ROOT / "hub" / "publish.py"), run_name="__main__")
    space = tmp_path / "hub" / "ada" / "tsam-demo"
    done = subprocess.run([sys.executable, "app.py", "--help"], cwd=space, capture_output=True, text=True)
    assert done.returncode == 0 and "--models" in done.stdout
    assert all((space / name).exists() for name in ("README.md", "requirements.txt", "style.css"))

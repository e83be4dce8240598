"""Publishing to a Hub of our own on the loopback, and loading from it as users do."""

import json
import re
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import diffusers
import numpy as np
import pytest
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import ModelCard, constants
from PIL import Image

from diffusers_tsam import FAMILIES, MODULAR
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from hub_server import Repository, hub_server
from kinds import ANIMA, FLUX, KINDS, SD3, SDXL, make
from test_loading import NOTHING_INSTALLED, ROOT, one_thread, run_fresh  # noqa: F401


pytestmark = pytest.mark.slow
CODE = {f"tsam/tsam-{kind}": kind for kind in FAMILIES}
WEIGHTS = {"tsam/shapes-tsam": "sd", "tsam/shapes-tsam-pixart": "pixart"}
BLOCKS = {f"tsam/tsam-{kind.name}": kind for kind in (SDXL, SD3, FLUX, ANIMA)}
REPOSITORIES = [*CODE, *WEIGHTS, *BLOCKS]
INDEX = "modular_model_index.json"
SHORT = {"num_inference_steps": 2, "refinement_iterations": 1}
single_file = runpy.run_path(str(ROOT / "hub" / "single_file.py"))["single_file"]


def publish(*arguments, hub=None, token=""):
    """(exit status, output, errors) of publish.py, which takes `hub` for the Hub, and without one has no network."""
    status, output, errors = 0, StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.syspath_prepend(ROOT / "hub")
        patch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
        patch.setattr(constants, "HF_HUB_OFFLINE", hub is None)
        patch.setattr(constants, "ENDPOINT", hub and hub.url)
        patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
        patch.setenv("HF_TOKEN", token)
        try:
            runpy.run_path(str(ROOT / "hub" / "publish.py"), run_name="__main__")
        except SystemExit as stop:
            status = stop.code
    return status, output.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What a dry run writes and prints, without a token and a network."""
    folder = tmp_path_factory.mktemp("dry") / "out"
    status, printed, errors = publish("tsam", "--dry-run", "--output", folder)
    assert status == 0, errors
    return folder, printed


@pytest.fixture(scope="module")
def hub():
    """A Hub to which everything was published twice."""
    with hub_server() as server:
        for _ in range(2):
            status, printed, errors = publish("tsam", hub=server, token="secret")
            assert status == 0 and all(f"{server.url}/{name} is up" in printed for name in REPOSITORIES), errors
        yield server


@pytest.fixture(scope="module")
def official(hub, tmp_path_factory):
    """Tiny models in place of the official weights that blocks point at: {repository: (its like, folder)}."""
    moved = {}
    for name, kind in BLOCKS.items():
        folder, files = str(tmp_path_factory.mktemp(kind.name)), hub.repositories[name]
        if kind is ANIMA:
            make(kind.stock, kind.components).save_pretrained(folder, overwrite_modular_index=True)
        else:
            getattr(diffusers, kind.classic)(**kind.components).save_pretrained(folder)
        entries = json.loads(files[INDEX])
        (place,) = {value[2]["pretrained_model_name_or_path"] for value in entries.values() if isinstance(value, list)}
        assert f"base_model: {place}\n" in files["README.md"].decode()
        moved[name] = f"{name}-moved", folder
        index = files[INDEX].replace(place.encode(), folder.encode())
        hub.repositories[f"{name}-moved"] = Repository({**files, INDEX: index})
    return moved


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(text, changes):
    for pattern, new in changes.items():
        text, found = re.subn(pattern, lambda match: new, text)  # noqa: B023
        assert found, pattern
    return text


def test_a_dry_run_writes_the_repositories_and_lists_them(dry):
    folder, printed = dry
    listed = {name: int(size.replace(",", "")) for size, name in re.findall(r"^ *([\d,]+)  (\S+)$", printed, re.M)}
    assert listed == {name: len(data) for name, data in files_of(folder).items()}
    written = {name: files_of(folder / name) for name in REPOSITORIES}
    shared = {"LICENSE": (ROOT / "LICENSE").read_bytes()}
    for name, kind in (CODE | WEIGHTS).items():
        model = files_of(MODELS[kind]) if name in WEIGHTS else {}
        file = KINDS[kind].file if model else "pipeline.py"
        assert not get_relative_imports(folder / name / file)
        code = {file: single_file(kind).encode()}
        own = {file: data for file, data in model.items() if file != "model_index.json"} | code | shared
        assert own.items() <= written[name].items()
        assert written[name].keys() == own.keys() | {"README.md", "tsam.png", *model}
    for name in BLOCKS:
        names = {f"{module}.py" for module in get_relative_imports(ROOT / "modular_tsam.py")} | {"modular_tsam.py"}
        own = {file: (ROOT / file).read_bytes() for file in names} | shared
        assert own.items() <= written[name].items()
        assert written[name].keys() == own.keys() | {"README.md", "modular_config.json", INDEX}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_the_hub_understands_the_card_and_its_links_are_ours(dry, name):
    card = ModelCard.load(dry[0] / name / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.license == "apache-2.0" and "arxiv:2411.15236" in card.data.tags
    assert ("](tsam.png)" in card.text) != (name in BLOCKS) and "$" not in card.text
    assert set(re.findall(r"https://huggingface.co/([\w-]+/[\w-]+)", card.text)) <= set(REPOSITORIES)


@pytest.mark.parametrize(
    "arguments, token, message",
    [
        (["my.org", "--dry-run"], "", "ORG is 'my.org', but diffusers loads no code from names with a dot"),
        (["tsam", "--dry-run", "--output", "."], "", "--output is '.': File exists. Pass a new folder."),
        (["", "--dry-run"], "", "ORG is empty. Pass a user or an organization."),
        (["tsam", "--dry-run", "--space", "--output", "."], "", "--output is '.': File exists. Pass a new folder."),
        (["tsam", "--dry-run", "--output", "/proc/out"], "", "--output is '/proc/out': "),
        (["tsam"], "", "no token found. You must provide a token or be logged in to Hugging Face with `hf auth login`"),
        (["tsam"], "wrong", "Invalid user token."),
        (["google"], "secret", "ORG is 'google', neither you nor an organization of yours. Pass one of ada, tsam."),
        (["ada"], "secret", "ada/tsam-pixart exists, and its 1 files are not T-SAM's. Rename it on the Hub first."),
        (["google", "--space"], "secret", "ORG is 'google', neither you nor an organization of yours. Pass one of "),
        (["ada", "--space"], "secret", "ada/tsam-demo exists, and its 1 files are not T-SAM's. Rename it on the Hub"),
    ],
)
def test_what_cannot_be_published_says_so_before_anything_is_uploaded(arguments, token, message):
    with hub_server() as hub:
        theirs = Repository({"notes.txt": b"mine"})
        hub.repositories |= dict.fromkeys(("ada/tsam-pixart", "ada/tsam-demo"), theirs)
        status, _, errors = publish(*arguments, hub=hub, token=token)
        assert status == 2 and message in errors and len(errors.splitlines()) == 1, errors
        assert [*hub.repositories.values()] == [theirs] * 2 and not theirs.commits


def test_what_is_published_is_what_the_dry_run_wrote_and_again_changes_nothing(hub, dry):
    for name in REPOSITORIES:
        assert hub.repositories[name] == files_of(dry[0] / name) and hub.repositories[name].commits == 1


def test_the_space_goes_up_alone_and_lists_its_files(hub):
    status, printed, errors = publish("ada", "--space", hub=hub, token="secret")
    listed = re.findall(r"^ *[\d,]+  ada/tsam-demo/(\S+)$", printed, re.M)
    assert status == 0 and hub.repositories["ada/tsam-demo"].keys() == {*listed} > {"app.py", "diffusers_tsam/tsam.py"}
    assert errors == "" and "/ada/tsam-demo is up" in printed and "ada/tsam-sd" not in hub.repositories


def card_codes(hub, official, name):
    """The code of a card as users paste it, but for size and weights; and the same with the installed class."""
    (code,) = re.findall(r"```python\n(.*?)```", hub.repositories[name]["README.md"].decode(), re.DOTALL)
    small = {"cuda": "cpu", "float16": "float32"}
    if name in BLOCKS:
        (moved, folder), call = official[name], BLOCKS[name].call | {"num_inference_steps": 2, "output_type": "pil"}
        code = changed(code, small | {name: moved, r"\*\*call,": f"**call, **{call},"})
        cls, made = MODULAR[BLOCKS[name].name].blocks, f"get_workflow('text2image').init_pipeline({folder!r})"
        ours = {"import ModularPipeline": f"import {cls}", r"ModularPipeline.from_\S+\(.*\)": f"{cls}().{made}"}
        return code, changed(code, ours | {"from diffusers ": "from diffusers_tsam "})
    kind = (CODE | WEIGHTS)[name]
    ours = {"from diffusers import": f"from diffusers_tsam import {FAMILIES[kind].pipeline} as"}
    if name in WEIGHTS:
        code = changed(code, {"num_inference_steps=25": "num_inference_steps=2, refinement_iterations=1"})
        return code, changed(code, ours | {f'"{name}", trust_remote_code=True': repr(str(MODELS[kind]))})
    small |= {r'"\S+/(stable-diffusion-v1-5|PixArt-XL-2-1024-MS)"': repr(str(MODELS[kind]))}
    code = changed(code, small | {"generator=generator": f"generator=generator, **{SHORT | ARGUMENTS[kind]}"})
    return code, changed(code, ours | {f'custom_pipeline="{name}",': "", "trust_remote_code=True,": ""})


TRUST = """
import os, sys
import diffusers

def refused(cls, name, **options):
    try:
        cls.from_pretrained(name, **options)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("ran code that is not trusted")

def without_trust_nothing_runs():
    for name, _, stock in pipelines:
        refused(diffusers.DiffusionPipeline, name)
        refused(getattr(diffusers, stock), name)
    for name, _ in blocks:
        refused(diffusers.ModularPipeline, name, workflow="text2image")

without_trust_nothing_runs()
"""
INSTALLED = """
del sys.modules["diffusers_tsam"]
import diffusers_tsam

without_trust_nothing_runs()
for name, ours, _ in pipelines:
    ours = getattr(diffusers_tsam, ours)
    assert all(type(ours.from_pretrained(name, **trust)) is ours for trust in ({}, {"trust_remote_code": True}))
"""


def test_every_cards_code_draws_the_installed_classes_picture_and_without_trust_none_runs_or_is_needed_if_installed(
    hub, official, tmp_path, monkeypatch
):
    """In a fresh process with nothing installed at first and nothing downloaded."""
    pipelines = [(name, FAMILIES[kind].pipeline, FAMILIES[kind].stock) for name, kind in WEIGHTS.items()]
    theirs = f"{NOTHING_INSTALLED}pipelines, blocks = {pipelines!r}, {[*official.values()]!r}\n{TRUST}"
    for name in REPOSITORIES:
        code, ours = card_codes(hub, official, name)
        for side in ("theirs", "ours"):
            (tmp_path / side / name).mkdir(parents=True)
        theirs += f"os.chdir({str(tmp_path / 'theirs' / name)!r})\n{code}"
        monkeypatch.chdir(tmp_path / "ours" / name)
        exec(ours, {})
    run_fresh(tmp_path / "home", theirs + INSTALLED, url=hub.url)
    for name in REPOSITORIES:
        (picture,) = (tmp_path / "theirs" / name).glob("*.png")
        expected = np.array(Image.open(tmp_path / "ours" / name / picture.name))
        assert expected.any() and np.array_equal(np.array(Image.open(picture)), expected)

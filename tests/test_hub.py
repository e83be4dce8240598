"""Publishing to a Hub of our own on the loopback, and loading from it as users do."""

import json
import re
import runpy

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_tsam import FAMILIES, MODULAR
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from hub_server import Repository, hub_server
from kinds import BLOCKS as BUILDS
from kinds import KINDS
from test_loading import NOTHING_INSTALLED, ROOT, SHARED, one_thread, python, run_fresh  # noqa: F401


pytestmark = pytest.mark.slow
CODE = {kind: f"tsam/tsam-{kind}" for kind in KINDS}
WEIGHTS = {"sd": "tsam/shapes-tsam", "pixart": "tsam/shapes-tsam-pixart"}
BLOCKS = {kind: f"tsam/tsam-{kind}" for kind in MODULAR}
REPOSITORIES = [*CODE.values(), *WEIGHTS.values(), *BLOCKS.values()]
SHORT = {"num_inference_steps": 2, "refinement_iterations": 1}


def publish(home, *arguments, **where):
    return python(home, ROOT / "hub" / "publish.py", *arguments, **where)


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """What a dry run writes and prints, without a token and a network."""
    home = tmp_path_factory.mktemp("dry")
    status, printed, errors = publish(home, "tsam", "--dry-run", "--output", "out")
    assert status == 0, errors
    return home / "out", printed


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub to which everything was published twice."""
    with hub_server() as server:
        for _ in range(2):
            status, printed, errors = publish(tmp_path_factory.mktemp("up"), "tsam", url=server.url, HF_TOKEN="secret")
            assert status == 0 and all(f"{server.url}/{name} is up" in printed for name in REPOSITORIES), errors
        yield server


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(text, changes):
    for pattern, new in changes.items():
        text, found = re.subn(pattern, lambda match: new, text)  # noqa: B023
        assert found, pattern
    return text


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_point_at_official_weights_and_draw_in_a_fresh_process_as_the_installed_ones(hub, tmp_path, kind):
    """Only the weights' name is another: a saved tiny model's folder."""
    family = BUILDS[kind]
    model = tmp_path / "model"
    getattr(diffusers, family.classic)(**family.components).save_pretrained(model)
    name, index = BLOCKS[kind], "modular_model_index.json"
    published = hub.repositories[name]
    entries = json.loads(published.files[index])
    places = {value[2]["pretrained_model_name_or_path"] for value in entries.values() if isinstance(value, list)}
    assert len(places) == 1 and f"base_model: {next(iter(places))}\n" in published.files["README.md"].decode()
    moved = published.files[index].replace(next(iter(places)).encode(), str(model).encode())
    hub.repositories["tsam/moved"] = Repository("tsam/moved", {**published.files, index: moved})
    (code,) = re.findall(r"```python\n(.*?)```", published.files["README.md"].decode(), re.DOTALL)
    call = {**family.call, "num_inference_steps": 2}
    code = changed(
        code, {re.escape(name): "tsam/moved", r"\*\*call,": f"**call, **{call},", "cuda": "cpu", "float16": "float32"}
    )
    untrusted = """
from diffusers import ModularPipeline
try:
    ModularPipeline.from_pretrained("tsam/moved", workflow="text2image")
except ValueError as error:
    assert "trust_remote_code=True" in str(error)
else:
    raise AssertionError("ran code that is not trusted")
"""
    run_fresh(tmp_path, NOTHING_INSTALLED + untrusted + code, url=hub.url)
    ours = family.tsam().get_workflow("text2image").init_pipeline(str(model))
    ours.load_components(dtype=torch.float32)
    options = {"preset": "light", "generator": torch.Generator().manual_seed(0)}
    expected = ours(prompt="a black car and a white clock", **options, **call, output="images")[0]
    assert np.array_equal(np.array(Image.open(tmp_path / "car_and_clock.png")), np.array(expected))


def test_a_dry_run_writes_the_repositories_and_lists_them(dry):
    folder, printed = dry
    listed = re.findall(r"^ *([\d,]+)  (\S+)$", printed, re.MULTILINE)
    assert {name: int(size.replace(",", "")) for size, name in listed} == {
        name: len(data) for name, data in files_of(folder).items()
    }
    for name, kind in KINDS.items():
        code = {file: (ROOT / file).read_bytes() for file in (*SHARED, kind.file, "LICENSE")}
        shipped = {file: data for file, data in files_of(MODELS[name]).items() if file != "model_index.json"}
        written = files_of(folder / CODE[name])
        assert code.items() <= written.items() and written.keys() - code == {"README.md", "pipeline.py", "tsam.png"}
        written = files_of(folder / WEIGHTS[name])
        assert (code | shipped).items() <= written.items()
        assert written.keys() - code - shipped.keys() == {"README.md", "model_index.json", "tsam.png"}
    for name in BLOCKS.values():
        written = files_of(folder / name)
        code = {file: (ROOT / file).read_bytes() for file in (*SHARED, "modular_tsam.py", "LICENSE")}
        assert code.items() <= written.items()
        assert written.keys() - code == {"README.md", "modular_config.json", "modular_model_index.json"}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_the_hub_understands_the_card_and_its_links_are_ours(dry, name):
    card = ModelCard.load(dry[0] / name / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("diffusers", "text-to-image")
    assert card.data.license == "apache-2.0" and "arxiv:2411.15236" in card.data.tags
    assert ("](tsam.png)" in card.text) != (name in BLOCKS.values()) and "$" not in card.text
    assert set(re.findall(r"https://huggingface.co/([\w-]+/[\w-]+)", card.text)) <= set(REPOSITORIES)


@pytest.mark.parametrize(
    "arguments, token, message",
    [
        (["my.org", "--dry-run"], "", "ORG is 'my.org', but diffusers loads no code from names with a dot"),
        (["tsam", "--dry-run", "--output", "."], "", "--output is '.': File exists. Pass a new folder."),
        (["tsam", "--dry-run", "--output", "/proc/out"], "", "--output is '/proc/out': "),
        (["tsam"], "", "no token found. You must provide a token or be logged in to Hugging Face with `hf auth login`"),
        (["tsam"], "wrong", "Invalid user token."),
        (["google"], "secret", "ORG is 'google', neither you nor an organization of yours. Pass one of ada, tsam."),
        (["ada"], "secret", "ada/tsam-pixart exists, and its 1 files are not T-SAM's. Rename it on the Hub first."),
    ],
)
def test_what_cannot_be_published_says_so_before_anything_is_uploaded(tmp_path, arguments, token, message):
    with hub_server() as hub:
        theirs = hub.repositories["ada/tsam-pixart"] = Repository("ada/tsam-pixart", {"notes.txt": b"mine"})
        status, _, errors = publish(tmp_path, *arguments, url=hub.url, HF_TOKEN=token)
        assert status == 2 and message in errors and len(errors.splitlines()) == 1, errors
        assert list(hub.repositories.values()) == [theirs] and not theirs.commits


def test_what_is_published_is_what_the_dry_run_wrote_and_again_changes_nothing(hub, dry):
    for name in REPOSITORIES:
        assert hub.repositories[name].files == files_of(dry[0] / name)
        assert hub.repositories[name].commits == 1


def test_the_code_of_every_card_draws_the_installed_classes_picture(hub, tmp_path, monkeypatch):
    """In a fresh process with nothing installed and nothing downloaded, as pasted but for size."""
    theirs = NOTHING_INSTALLED + "import os\n"
    drawn = [*CODE.values(), *WEIGHTS.values()]
    for name in drawn:
        kind = next(kind for kind in KINDS if name in (CODE[kind], WEIGHTS[kind]))
        (code,) = re.findall(r"```python\n(.*?)```", hub.repositories[name].files["README.md"].decode(), re.DOTALL)
        if name == WEIGHTS[kind]:
            code = changed(code, {"num_inference_steps=25": "num_inference_steps=2, refinement_iterations=1"})
            ours = {f'"{name}", trust_remote_code=True': repr(str(MODELS[kind]))}
        else:
            model = {r'"\S+/(stable-diffusion-v1-5|PixArt-XL-2-1024-MS)"': repr(str(MODELS[kind]))}
            small = {"generator=generator": f"generator=generator, **{SHORT | ARGUMENTS[kind]}"}
            code = changed(code, model | small | {"cuda": "cpu", "float16": "float32"})
            ours = {f'custom_pipeline="{name}",': "", "trust_remote_code=True,": ""}
        ours |= {"from diffusers import": f"from diffusers_tsam import {FAMILIES[kind].pipeline} as"}
        for side in ("theirs", "ours"):
            (tmp_path / side / name).mkdir(parents=True)
        theirs += f"os.chdir({str(tmp_path / 'theirs' / name)!r})\n{code}"
        monkeypatch.chdir(tmp_path / "ours" / name)
        exec(changed(code, ours), {})
    run_fresh(tmp_path / "home", theirs, url=hub.url)
    for name in drawn:
        (picture,) = (tmp_path / "theirs" / name).glob("*.png")
        expected = np.array(Image.open(tmp_path / "ours" / name / picture.name))
        assert expected.shape == (128, 128, 3) and np.array_equal(np.array(Image.open(picture)), expected)


PUSH = """
import diffusers_tsam
from diffusers import DiffusionPipeline

for kind, (ours, weights, folder) in {cases!r}.items():
    ours = getattr(diffusers_tsam, ours)
    ours.from_pretrained(folder).push_to_hub("tsam/pushed-" + kind)
    stock = DiffusionPipeline.from_pretrained("tsam/pushed-" + kind)
    assert type(stock).__module__.startswith("diffusers."), type(stock)
    code = {{"custom_pipeline": "tsam/tsam-" + kind, "trust_remote_code": True}}
    assert type(DiffusionPipeline.from_pretrained("tsam/pushed-" + kind, **code)).__name__ == ours.__name__
    for name in ("tsam/pushed-" + kind, weights):
        assert type(ours.from_pretrained(name)) is ours
    try:
        DiffusionPipeline.from_pretrained(weights)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("ran code that is not trusted")
"""


def test_a_pushed_pipeline_is_ordinary_and_code_that_is_not_trusted_does_not_run(hub, tmp_path):
    cases = {kind: (FAMILIES[kind].pipeline, WEIGHTS[kind], str(MODELS[kind])) for kind in KINDS}
    run_fresh(tmp_path, PUSH.format(cases=cases), url=hub.url, HF_TOKEN="secret")
    for kind in KINDS:
        pushed = hub.repositories[f"tsam/pushed-{kind}"].files
        assert json.loads(pushed["model_index.json"])["_class_name"] == FAMILIES[kind].stock
        assert not [file for file in pushed if file.endswith(".py")]


ALONE = """
import torch
from diffusers import DiffusionPipeline

for kind, (file, model, call) in {cases!r}.items():
    pipe = DiffusionPipeline.from_pretrained(model, custom_pipeline=file, trust_remote_code=True)
    torch.save(pipe("a red cube", generator=torch.Generator().manual_seed(0), **call).images, kind + ".pt")
"""


def test_each_pipeline_in_a_single_file_draws_the_packages_bits(tmp_path):
    single_file, cases = runpy.run_path(str(ROOT / "hub" / "single_file.py"))["single_file"], {}
    for kind in KINDS:
        (tmp_path / KINDS[kind].file).write_text(single_file(kind))
        assert not get_relative_imports(tmp_path / KINDS[kind].file)
        cases[kind] = KINDS[kind].file, str(MODELS[kind]), SHORT | ARGUMENTS[kind] | {"output_type": "latent"}
    run_fresh(tmp_path, NOTHING_INSTALLED + ALONE.format(cases=cases))
    for kind, (_, model, call) in cases.items():
        pipe = KINDS[kind].tsam.from_pretrained(model)
        expected = pipe("a red cube", generator=torch.Generator().manual_seed(0), **call).images
        assert torch.equal(torch.load(tmp_path / f"{kind}.pt"), expected)

"""Publishing to a Hub of our own on the loopback, and loading from it as users do."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_tsam import PixArtAlphaTSAMPipeline, StableDiffusionTSAMPipeline
from diffusers_tsam.shapes import ARGUMENTS, MODELS, TUNED
from hub_server import Repository, hub_server
from kinds import KINDS, make
from test_loading import CALL, draw


ROOT = Path(__file__).parent.parent
CODE = {"sd": "tsam/tsam-sd", "pixart": "tsam/tsam-pixart"}
WEIGHTS = {"sd": "tsam/shapes-tsam", "pixart": "tsam/shapes-tsam-pixart"}
REPOSITORIES = [*CODE.values(), *WEIGHTS.values()]
CLOSED = "http://127.0.0.1:9"  # nobody listens there


def start(arguments, home, endpoint=CLOSED, **environment):
    """A Python of its own that takes the server for the Hub, with `home` for all that is kept."""
    environment = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """(exit status, what it printed, its errors)"""
    printed, errors = process.communicate(timeout=300)
    return process.returncode, printed, errors


def publish(home, *arguments, **environment):
    return finish(start([ROOT / "hub" / "publish.py", *arguments], home, **environment))


def run(process):
    status, _, errors = finish(process)
    assert status == 0, errors


@pytest.fixture
def hub():
    with hub_server() as server:
        server.add_user("secret", "ada", ["tsam"])
        server.add_user("reading", "bob", ["tsam"], role="read")
        yield server


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """What a dry run writes and prints, without a token and a network."""
    home = tmp_path_factory.mktemp("dry")
    status, printed, errors = publish(home, "tsam", "--dry-run", "--output", "out")
    assert status == 0, errors
    return home / "out", printed


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """A server, and what a command said and left there: refused, broken off half-way, gone through, and again."""
    home, results = tmp_path_factory.mktemp("life"), []
    with hub_server() as server:
        server.add_user("secret", "ada", ["tsam"])
        foreign = server.repositories[WEIGHTS["pixart"]] = Repository(WEIGHTS["pixart"])
        foreign.commit({**foreign.files, "notes.txt": b"mine"})

        def again(*arguments):
            server.log.clear()
            result = publish(home, "tsam", *arguments, endpoint=server.url, HF_TOKEN="secret")
            kept = {name: list(repository.commits.values()) for name, repository in server.repositories.items()}
            results.append((*result, kept, list(server.log)))

        again()
        server.failures[f"POST /api/models/{WEIGHTS['sd']}/commit"] = (403, "not today")
        again("--overwrite")
        server.failures.clear()
        again("--overwrite")
        again()
        yield server, results


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_writes_the_repositories_and_lists_them(written):
    folder, printed = written
    assert sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/*")) == sorted(REPOSITORIES)
    for name in REPOSITORIES:
        files = files_of(folder / name)
        assert f"{name}: {len(files)} files, {sum(map(len, files.values())):,} bytes" in printed
        for path, data in files.items():
            assert re.search(rf"^ *{len(data):,}  {re.escape(path)}$", printed, re.MULTILINE)
    for kind, name in WEIGHTS.items():
        shipped = files_of(MODELS[kind])
        del shipped["model_index.json"]
        assert shipped.items() <= files_of(folder / name).items()


def test_a_dry_run_does_not_write_where_something_is(tmp_path):
    (tmp_path / "out").mkdir()
    status, _, errors = publish(tmp_path, "tsam", "--dry-run", "--output", "out")
    assert status == 2 and "'out', which exists already. Pass" in errors


@pytest.mark.parametrize("name", REPOSITORIES)
def test_the_front_matter_is_what_the_hub_reads(written, name):
    data = ModelCard.load(written[0] / name / "README.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("diffusers", "text-to-image", "apache-2.0")
    family = {"sd": "stable-diffusion", "pixart": "pixart-alpha"}[kind_of(name)]
    tags = ["diffusers", "custom-pipeline", "text-to-image", "training-free", family, "arxiv:2411.15236"]
    assert data.tags == tags
    assert data.base_model == {
        CODE["sd"]: "stable-diffusion-v1-5/stable-diffusion-v1-5",
        CODE["pixart"]: "PixArt-alpha/PixArt-XL-2-1024-MS",
    }.get(name)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_card_says_what_the_readme_says(written, name):
    text = ModelCard.load(written[0] / name / "README.md").text
    readme = (ROOT / "README.md").read_text()
    prose = text.replace(code_of(text), "")
    numbers = re.findall(r"\d+\.\d+ ± \d+\.\d+ %|\d+ of \d+", prose)
    assert len(numbers) == 5
    for number in numbers:
        assert number in readme, number
    assert "Measured and not:" in prose and "](tsam.png)" in prose
    linked = set(re.findall(r"https://huggingface.co/([\w-]+/[\w-]+)", prose))
    assert linked <= set(REPOSITORIES) and "$" not in text
    assert len([line for line in code_of(text).splitlines() if line.strip()]) <= 12


def test_a_repository_that_is_not_ours_is_left_alone(life):
    (status, _, errors, kept, log), *_ = life[1]
    assert status == 2 and list(kept) == [WEIGHTS["pixart"]] and {method for method, _ in log} == {"GET"}
    assert (
        f"{WEIGHTS['pixart']} exists and is not ours: it holds 1 files but no attention_processors.py and no" in errors
    )
    assert errors.rstrip().endswith("Rename it, or pass --overwrite to put ours beside and over them.")


def test_a_publication_broken_off_says_what_is_up_and_goes_on(life):
    status, _, errors, kept, _ = life[1][1]
    assert status == 1
    assert f"{CODE['sd']}, {CODE['pixart']} are up, but {WEIGHTS['sd']}, {WEIGHTS['pixart']} are not" in errors
    assert "not today" in errors and "It is safe to run the same command again" in errors
    assert [list(commits[-1]) for commits in kept.values() if len(commits) == 1] == [[".gitattributes"]]
    status, printed, errors, kept, _ = life[1][2]
    assert status == 0, errors
    assert {name: len(commits) for name, commits in kept.items()} == {
        **dict.fromkeys(REPOSITORIES, 2),  # the Hub's own first one, and one with everything
        WEIGHTS["pixart"]: 3,
    }
    assert all(f"{life[0].url}/{name}" in printed.splitlines() for name in REPOSITORIES)


def test_what_is_published_is_what_the_dry_run_wrote(life, written):
    for name, repository in life[0].repositories.items():
        if name in REPOSITORIES:
            given = {".gitattributes"} | ({"notes.txt"} if name == WEIGHTS["pixart"] else set())
            files = {path: data for path, data in repository.files.items() if path not in given}
            assert files == files_of(written[0] / name)
    assert life[0].repositories[WEIGHTS["pixart"]].files["notes.txt"] == b"mine"


def test_publishing_again_changes_nothing(life):
    status, _, errors, kept, log = life[1][3]
    assert status == 0, errors
    assert kept == life[1][2][3]
    assert not [path for method, path in log if method == "PUT" or "/commit/" in path]


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        (["my.org"], {}, "'my.org/tsam-sd' has a dot, and diffusers loads no code from such a repository. Pass an ORG"),
        (["a/b"], {}, "'a/b/tsam-sd'. Use `repo_type` argument if needed. Pass the name of a user or an organization"),
        (["tsam"], {"HF_TOKEN": ""}, "there is no token. Run `hf auth login`"),
        (
            ["tsam", "--token", "wrong"],
            {},
            "nothing was uploaded: the token is not valid (Invalid user token.). Create",
        ),
        (["tsam"], {"HF_TOKEN": "reading"}, "the token may only read, but has to write. Create another"),
        (["google"], {}, "'google' is neither you nor an organization of yours. Publish to one of ada, tsam."),
        (["tsam"], {"endpoint": CLOSED}, "nothing was uploaded: ConnectError"),
        (["tsam", "--private"], {}, "tsam/tsam-sd is public, which --private does not change. Do so in its settings"),
        (["ada"], {}, "nothing was uploaded: the token may not do this (403 Forbidden: no more of these."),
    ],
)
def test_what_cannot_be_published_says_so_before_anything_is_uploaded(hub, tmp_path, arguments, environment, message):
    hub.repositories[CODE["sd"]] = Repository(CODE["sd"])
    hub.failures["POST /api/repos/create"] = (403, "no more of these")
    environment = {"endpoint": hub.url, "HF_TOKEN": "secret", **environment}
    status, printed, errors = publish(tmp_path, *arguments, **environment)
    assert status == 2 and message in errors and len(errors.splitlines()) == 1
    assert list(hub.repositories) == [CODE["sd"]] and len(hub.repositories[CODE["sd"]].commits) == 1 and not hub.lfs


def code_of(text):
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


@pytest.fixture
def one_thread():
    """As in the other processes, so that results are the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kind_of(name):
    return "pixart" if name.endswith("pixart") else "sd"


def own_arguments(kind):
    return {name: value for name, value in ARGUMENTS[kind].items() if name != "guidance_scale"}


def shortened(code, kind):
    """A card's code, for two steps of a model that ships."""
    short = f"num_inference_steps=2, refinement_iterations=1, **{own_arguments(kind)}"
    changes = {
        r'"[\w.-]+/(stable-diffusion-v1-5|PixArt-XL-2-1024-MS)"': repr(str(MODELS[kind])),
        '"cuda"': '"cpu"',
        "float16": "float32",
        r"tsam_steps=\d+": "tsam_steps=1",
        "num_inference_steps=25": "num_inference_steps=2",
        "generator=generator, (?!num)": f"generator=generator, {short}, ",
    }
    for pattern, replacement in changes.items():
        code = re.sub(pattern, lambda found: replacement, code)  # noqa: B023
    return code


def expected_picture(kind, weights, **changes):
    """The installed class's for what the shortened card says, as an array."""
    if weights:
        prompt, seed, settings = "a red cube and a blue sphere", {"sd": 74, "pixart": 0}[kind], TUNED[kind]
        settings = settings | ARGUMENTS[kind]
    else:
        prompt, seed, settings = "a black car and a white clock", 0, {"tsam_steps": 1, "refinement_iterations": 1}
        settings |= own_arguments(kind)
    settings = settings | {"num_inference_steps": 2, **changes}
    pipe = KINDS[kind].tsam.from_pretrained(MODELS[kind])
    pipe.set_progress_bar_config(disable=True)
    return np.array(pipe(prompt, generator=torch.Generator().manual_seed(seed), **settings).images[0])


def test_the_code_of_every_card_draws_the_installed_classes_picture(life, tmp_path, one_thread):
    """In fresh processes with nothing installed and nothing downloaded, as pasted but for size."""
    processes = []
    for k, names in enumerate([[CODE["sd"]], [CODE["pixart"]], list(WEIGHTS.values())]):
        code = ["import os, sys", 'sys.modules["diffusers_tsam"] = None']
        for name in names:
            (tmp_path / name).mkdir(parents=True)
            card = life[0].repositories[name].files["README.md"].decode()
            code += [f"os.chdir({str(tmp_path / name)!r})", shortened(code_of(card), kind_of(name))]
        (tmp_path / f"home-{k}").mkdir()
        processes.append(start(["-c", "\n".join(code)], tmp_path / f"home-{k}", life[0].url))
    for process in processes:
        run(process)
    for name in REPOSITORIES:
        (picture,) = (tmp_path / name).glob("*.png")
        expected = expected_picture(kind_of(name), name in WEIGHTS.values())
        assert expected.shape == (64, 64, 3)
        assert not np.array_equal(expected, expected_picture(kind_of(name), name in WEIGHTS.values(), alpha=0))
        assert np.array_equal(np.array(Image.open(picture)), expected)


PUSH = """
import sys
from diffusers import DiffusionPipeline

sys.modules["diffusers_tsam"] = None
for kind, code in {code!r}.items():
    DiffusionPipeline.from_pretrained(kind, custom_pipeline={folder!r} + code, trust_remote_code=True)
    pipe = DiffusionPipeline.from_pretrained(kind, custom_pipeline=code, trust_remote_code=True)
    pipe.save_pretrained("saved-" + kind, push_to_hub=True, repo_id="tsam/saved-" + kind)
    pipe.push_to_hub("tsam/pushed-" + kind)
"""
LOAD = """
import torch
from diffusers import DiffusionPipeline
from diffusers_tsam import PixArtAlphaTSAMPipeline, StableDiffusionTSAMPipeline, cli

installed = {{"sd": StableDiffusionTSAMPipeline, "pixart": PixArtAlphaTSAMPipeline}}
pipes = {{}}
for kind, code in {code!r}.items():
    load = DiffusionPipeline.from_pretrained
    pipes[kind, "code"] = load(kind, custom_pipeline=code, trust_remote_code=True)
    for name in ("saved", "pushed"):
        pipes[kind, name] = load("tsam/" + name + "-" + kind, trust_remote_code=True)
    pipes[kind, "saved folder"] = load("saved-" + kind, trust_remote_code=True)
    pipes[kind, "installed"] = installed[kind].from_pretrained("tsam/pushed-" + kind)
    assert type(pipes[kind, "installed"]) is installed[kind]
    pipes[kind, "command"], found = cli.load("tsam/pushed-" + kind)  # which it has to find out
    assert found == kind and type(pipes[kind, "command"]) is installed[kind]
    try:
        load("tsam/pushed-" + kind)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("loaded code that is not trusted")
latents = {{}}
for (kind, name), pipe in pipes.items():
    assert type(pipe).__name__ == installed[kind].__name__
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    latents[kind, name] = pipe("a red cube and a blue sphere", generator=generator, **{calls!r}[kind]).images
torch.save(latents, "latents.pt")
"""


def test_what_is_pushed_loads_with_tsam_and_both_pipelines_live_in_one_process(life, written, tmp_path, one_thread):
    expected, calls = {}, {name: CALL | kind.call for name, kind in KINDS.items()}
    for name, kind in KINDS.items():
        make(kind.stock, kind.components).save_pretrained(tmp_path / name)
        expected[name] = draw(kind, kind.tsam.from_pretrained(tmp_path / name))
    code = PUSH.format(code=CODE, folder=f"{written[0]}/")
    run(start(["-c", code], tmp_path, life[0].url, HF_TOKEN="secret"))
    pushed = life[0].repositories["tsam/pushed-sd"].files
    assert {"README.md", "attention_processors.py", "pipeline_tsam_sd.py", "unet/config.json"} <= set(pushed)
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "diffusers_tsam").symlink_to(ROOT)
    code = LOAD.format(code=CODE, calls=calls)
    run(start(["-c", code], tmp_path, life[0].url, PYTHONPATH=str(tmp_path / "packages")))
    latents = torch.load(tmp_path / "latents.pt")
    assert len(latents) == 12
    for (name, _), result in latents.items():
        assert torch.equal(result, expected[name])


@pytest.fixture(params=KINDS)
def tiny(request):
    return KINDS[request.param]


def test_a_saved_pipeline_brings_its_code(tiny, tmp_path):
    pipe = make(tiny.tsam, tiny.components)
    expected = draw(tiny, pipe)
    pipe.save_pretrained(tmp_path / "a")
    pipe.save_pretrained(tmp_path / "a")  # over itself
    for name in (tiny.file, "attention_processors.py"):
        assert (tmp_path / "a" / name).read_bytes() == (ROOT / name).read_bytes()
    trusted = {"trust_remote_code": True}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "a", **trusted)
    assert type(loaded).__name__ == tiny.tsam.__name__ and type(loaded) is not tiny.tsam
    assert torch.equal(draw(tiny, loaded), expected)
    DiffusionPipeline.from_pretrained(tmp_path / "a", **trusted)  # after which the class is another
    loaded.save_pretrained(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert torch.equal(draw(tiny, DiffusionPipeline.from_pretrained(tmp_path / "b", **trusted)), expected)


def test_only_the_named_class_loads_what_was_saved_without_trust(tiny, tmp_path):
    make(tiny.tsam, tiny.components).save_pretrained(tmp_path)
    for trust_remote_code in (False, True):
        assert type(tiny.tsam.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)) is tiny.tsam
    for cls in (DiffusionPipeline, tiny.stock):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            cls.from_pretrained(tmp_path)


class OwnStableDiffusion(StableDiffusionTSAMPipeline):
    pass


class OwnPixArt(PixArtAlphaTSAMPipeline):
    pass


@pytest.mark.parametrize("cls", [OwnStableDiffusion, OwnPixArt])
def test_a_users_subclass_is_saved_as_ever_with_a_warning(cls, tmp_path, warnings_seen):
    kind = next(kind for kind in KINDS.values() if issubclass(cls, kind.tsam))
    make(cls, kind.components).save_pretrained(tmp_path)
    assert f"Load it with `{cls.__name__}.from_pretrained`" in warnings_seen.text
    assert not list(tmp_path.glob("*.py")) and cls.load_config(tmp_path)["_class_name"] == cls.__name__
    assert type(cls.from_pretrained(tmp_path)) is cls

"""The ways to load, share and save, as users do: from a file, with the installed class, and back to stock."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_tsam
from diffusers_tsam import FAMILIES
from diffusers_tsam.shapes import MODELS
from kinds import KINDS, make


ROOT = Path(__file__).parent.parent
SHARED = ("attention_processors.py", "tsam.py", "tsam_arguments.py", "tsam_candidates.py", "tsam_layout.py")
SHARED += ("tsam_pipeline.py",)
CALL = {"num_inference_steps": 2, "refinement_iterations": 1, "output_type": "latent"}
NOTHING_INSTALLED = 'import sys; sys.modules["diffusers_tsam"] = None\n'


def python(home, *arguments, url="http://127.0.0.1:9", **environment):
    """(exit status, output, errors) of a new process that keeps everything in `home` and takes `url` for the Hub.

    Nobody listens at the default. The package is importable, also where it is not installed.
    """
    (home / "packages").mkdir(parents=True, exist_ok=True)
    if not (home / "packages" / "diffusers_tsam").exists():
        (home / "packages" / "diffusers_tsam").symlink_to(ROOT)
    # On busy cores, more threads only wait for each other.
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1", **environment}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "PYTHONPATH": str(home / "packages")}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def run_fresh(home, code, **where):
    status, _, errors = python(home, "-c", code, **where)
    assert status == 0, errors


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the fresh processes, so that results are the same to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What each T-SAM pipeline saves of its tiny model."""
    folders = {name: tmp_path_factory.mktemp("saved") / name for name in KINDS}
    for name, kind in KINDS.items():
        make(kind.tsam, kind.components).save_pretrained(folders[name])
    return folders


@pytest.fixture
def saved(kind, folders):
    return folders[kind.name]


def draw(kind, pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red cube and a blue sphere", generator=generator, **CALL, **kind.call).images


def custom(kind):
    """The arguments that load a pipeline from its file."""
    return {"custom_pipeline": str(ROOT / kind.file), "trust_remote_code": True}


def dtypes_of(pipe):
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    return {(name, key): value.dtype for name, model in models.items() for key, value in model.state_dict().items()}


def test_a_saved_pipeline_is_an_ordinary_folder(kind, saved):
    assert json.loads((saved / "model_index.json").read_text())["_class_name"] == kind.stock.__name__
    assert not list(saved.rglob("*.py"))
    make(kind.stock, kind.components).save_pretrained(saved.parent / "stock")
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (saved, saved.parent / "stock")]
    assert names[0] == names[1]


FRESH = """
import diffusers, torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline

for name, (folder, file, ours, stock, call) in {cases!r}.items():
    stock = getattr(diffusers, stock)
    for cls in (stock, AutoPipelineForText2Image, DiffusionPipeline):
        assert type(cls.from_pretrained(folder)) is stock, cls
    for cls in (stock, AutoPipelineForText2Image, DiffusionPipeline):
        pipe = cls.from_pretrained(folder, custom_pipeline=file, trust_remote_code=True)
        assert type(pipe).__name__ == ours, cls
    pipe.save_pretrained("saved-" + name)
    assert type(DiffusionPipeline.from_pretrained("saved-" + name)) is stock
    pipes = {{"file": pipe, "again": DiffusionPipeline.from_pretrained("saved-" + name, **{again!r}[name])}}
    for which, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        torch.save(pipe("a red cube and a blue sphere", generator=generator, **call).images, which + "-" + name + ".pt")
"""


@pytest.mark.slow
def test_in_a_fresh_process_with_nothing_installed_a_saved_folder_is_stock_and_with_the_files_tsam(folders, tmp_path):
    """The files alone, copied elsewhere, with an empty module cache; both pipelines in one process."""
    for file in (*SHARED, *(kind.file for kind in KINDS.values())):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    cases = {
        name: (str(folders[name]), kind.file, kind.tsam.__name__, kind.stock.__name__, CALL | kind.call)
        for name, kind in KINDS.items()
    }
    again = {name: {"custom_pipeline": kind.file, "trust_remote_code": True} for name, kind in KINDS.items()}
    run_fresh(tmp_path, NOTHING_INSTALLED + FRESH.format(cases=cases, again=again))
    for name, kind in KINDS.items():
        expected = draw(kind, make(kind.tsam, kind.components))
        for which in ("file", "again"):
            assert torch.equal(torch.load(tmp_path / f"{which}-{name}.pt"), expected)


def test_the_installed_class_loads_a_saved_folder(kind, saved):
    pipe = kind.tsam.from_pretrained(saved)
    assert type(pipe) is kind.tsam
    assert torch.equal(draw(kind, pipe), draw(kind, make(kind.tsam, kind.components)))


# What was saved before this was so: the code lies beside the weights, and the index names it.
OLD_HELPER = """
class TSAMPipelineMixin:
    old = True
"""
OLD_PIPELINE = """
from diffusers import {stock}

from .attention_processors import TSAMPipelineMixin


class {pipeline}(TSAMPipelineMixin, {stock}):
    pass
"""
LOAD_OLD = """
import diffusers, diffusers_tsam
from diffusers import DiffusionPipeline

for folder, ours, stock in {cases!r}:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    assert type(pipe).__name__ == ours and pipe.old
    ours = getattr(diffusers_tsam, ours)
    assert type(ours.from_pretrained(folder)) is ours
    assert type(ours.from_pretrained(folder, trust_remote_code=True)) is ours
    for cls in (DiffusionPipeline, getattr(diffusers, stock)):
        try:
            cls.from_pretrained(folder)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error)
        else:
            raise AssertionError("ran code that is not trusted")
"""


@pytest.mark.slow
def test_what_the_previous_version_saved_loads_as_its_own_code_or_as_the_installed_class(folders, tmp_path):
    for name, family in FAMILIES.items():
        old = tmp_path / name
        make(KINDS[name].stock, KINDS[name].components).save_pretrained(old)
        index = json.loads((old / "model_index.json").read_text())
        index |= {"_class_name": [family.module, family.pipeline]}
        (old / "model_index.json").write_text(json.dumps(index))
        (old / f"{family.module}.py").write_text(OLD_PIPELINE.format(**family._asdict()))
        (old / "attention_processors.py").write_text(OLD_HELPER)
    cases = [(str(tmp_path / name), family.pipeline, family.stock) for name, family in FAMILIES.items()]
    run_fresh(tmp_path / "home", LOAD_OLD.format(cases=cases))


def test_both_custom_pipelines_live_in_one_process(folders):
    pipes = {name: DiffusionPipeline.from_pretrained(folders[name], **custom(kind)) for name, kind in KINDS.items()}
    for name, kind in KINDS.items():
        assert type(pipes[name]).__name__ == kind.tsam.__name__ and type(pipes[name]) is not kind.tsam
        assert torch.equal(draw(kind, pipes[name]), draw(kind, make(kind.tsam, kind.components)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_shares_the_components_and_their_dtype(kind, saved, dtype):
    stock = kind.stock.from_pretrained(saved, dtype=dtype)
    pipe = kind.tsam.from_pipe(stock)
    assert type(pipe) is kind.tsam
    assert all(pipe.components[name] is component for name, component in stock.components.items())
    assert pipe.components[kind.denoiser].dtype == pipe.text_encoder.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(draw(kind, pipe), draw(kind, make(kind.tsam, kind.components)))
    back = kind.stock.from_pipe(pipe, dtype=dtype)
    assert back.components[kind.denoiser] is stock.components[kind.denoiser] and type(back) is kind.stock


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
def test_from_pipe_casts_nothing_unless_it_is_told_to(kind, saved):
    stock = kind.stock.from_pretrained(saved, dtype=torch.bfloat16)
    stock.vae.float()
    mixed = dtypes_of(stock)
    assert {torch.float32, torch.bfloat16} <= set(mixed.values())
    pipe = kind.tsam.from_pipe(stock)
    assert dtypes_of(pipe) == mixed and dtypes_of(stock) == mixed
    for name in ("dtype", "torch_dtype"):
        told = kind.tsam.from_pipe(pipe, **{name: torch.bfloat16})
        assert {dtype for dtype in dtypes_of(told).values() if dtype.is_floating_point} == {torch.bfloat16}
        told.vae.float()


def test_from_pipe_leaves_a_layerwise_cast_denoiser_as_it_is(kind, saved):
    stock = kind.stock.from_pretrained(saved)
    stock.components[kind.denoiser].enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    mixed = dtypes_of(stock)
    assert {torch.float32, torch.float8_e4m3fn} <= set(mixed.values())
    pipe = kind.tsam.from_pipe(stock)
    assert dtypes_of(pipe) == mixed
    assert draw(kind, pipe).isfinite().all() and dtypes_of(pipe) == mixed


def test_from_pipe_takes_the_custom_pipeline_too(kind, saved):
    stock = kind.stock.from_pretrained(saved)
    pipe = DiffusionPipeline.from_pipe(stock, **custom(kind), dtype=torch.float32)
    assert torch.equal(draw(kind, pipe), draw(kind, make(kind.tsam, kind.components)))


def test_the_installed_package_is_this_checkout():
    installed = Path(diffusers_tsam.__file__).parent
    files = [
        *ROOT.glob("*.py"),
        *ROOT.glob("shapes/*.py"),
        *(path for folder in MODELS for path in (ROOT / "shapes" / folder).rglob("*.*")),
    ]
    for path in files:
        copy = installed / path.relative_to(ROOT)
        assert copy.is_file() and copy.read_bytes() == path.read_bytes(), f"{path.name}: install again"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PixArtSigma"):
        diffusers_tsam.PixArtSigma  # noqa: B018

"""The three ways to load, as users do, for both pipelines."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import diffusers_tsam
from diffusers_tsam.shapes import MODELS
from kinds import KINDS, make


ROOT = Path(__file__).parent.parent
CALL = {"num_inference_steps": 2, "refinement_iterations": 1, "output_type": "latent"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def saved(kind, tmp_path_factory):
    """The folder of the tiny model."""
    path = tmp_path_factory.mktemp("saved")
    make(kind.stock, kind.components).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def expected(kind, saved):
    return draw(kind, kind.tsam.from_pretrained(saved))


def draw(kind, pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red cube and a blue sphere", generator=generator, **CALL, **kind.call).images


def custom(kind):
    """The arguments that load a pipeline from its file."""
    return {"custom_pipeline": str(ROOT / kind.file), "trust_remote_code": True}


def test_custom_pipeline_loads_from_the_file(kind, saved, expected):
    pipe = DiffusionPipeline.from_pretrained(saved, **custom(kind))
    assert type(pipe).__name__ == kind.tsam.__name__ and type(pipe) is not kind.tsam
    assert torch.equal(draw(kind, pipe), expected)


def test_custom_pipeline_loads_in_a_fresh_process_with_nothing_installed(kind, saved, expected, tmp_path):
    """The file and its helper alone, copied elsewhere, with an empty module cache and without this package."""
    for name in (kind.file, "attention_processors.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    code = f"""
import sys, torch
sys.modules["diffusers_tsam"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({saved!r}, custom_pipeline={kind.file!r}, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipe("a red cube and a blue sphere", generator=generator, **{CALL | kind.call!r}).images
torch.save(images, "images.pt")
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    environment["OMP_NUM_THREADS"] = "1"  # on busy cores, more only wait for each other
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=1e-3, atol=1e-3)


def test_both_custom_pipelines_live_in_one_process(tmp_path):
    pipes = {}
    for name, kind in KINDS.items():
        make(kind.stock, kind.components).save_pretrained(tmp_path / name)
        pipes[name] = DiffusionPipeline.from_pretrained(tmp_path / name, **custom(kind))
    for name, kind in KINDS.items():
        assert torch.equal(draw(kind, pipes[name]), draw(kind, kind.tsam.from_pretrained(tmp_path / name)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_shares_the_components_and_their_dtype(kind, saved, expected, dtype):
    stock = kind.stock.from_pretrained(saved, dtype=dtype)
    pipe = kind.tsam.from_pipe(stock)
    assert all(pipe.components[name] is component for name, component in stock.components.items())
    assert pipe.components[kind.denoiser].dtype == pipe.text_encoder.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(draw(kind, pipe), expected)
    back = kind.stock.from_pipe(pipe, dtype=dtype)
    assert back.components[kind.denoiser] is stock.components[kind.denoiser] and type(back) is kind.stock


def test_from_pipe_takes_the_custom_pipeline_too(kind, saved, expected):
    stock = kind.stock.from_pretrained(saved)
    pipe = DiffusionPipeline.from_pipe(stock, **custom(kind), dtype=torch.float32)
    assert torch.equal(draw(kind, pipe), expected)


def test_a_saved_pipeline_loads_with_the_class(kind, saved, expected, tmp_path):
    kind.tsam.from_pretrained(saved).save_pretrained(tmp_path)
    assert torch.equal(draw(kind, kind.tsam.from_pretrained(tmp_path)), expected)


def test_the_installed_package_is_this_checkout():
    installed = Path(diffusers_tsam.__file__).parent
    files = [kind.file for kind in KINDS.values()]
    for name in ("__init__.py", "attention_processors.py", *files, "cli.py", "shapes/scenes.py"):
        assert (installed / name).read_bytes() == (ROOT / name).read_bytes(), f"{name}: install again"
    for path in (path for name in MODELS for path in (ROOT / "shapes" / name).rglob("*.*")):
        assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PixArtSigma"):
        diffusers_tsam.PixArtSigma  # noqa: B018

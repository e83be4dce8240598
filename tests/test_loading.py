"""The three ways to load, as users do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import diffusers_tsam
from diffusers_tsam import StableDiffusionTSAMPipeline


ROOT = Path(__file__).parent.parent
CALL = {"num_inference_steps": 2, "refinement_iterations": 1, "output_type": "latent"}


def draw(pipe, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red cube and a blue sphere", generator=torch.Generator().manual_seed(0), **CALL, **kwargs).images


@pytest.fixture(scope="module")
def expected(folder):
    return draw(StableDiffusionTSAMPipeline.from_pretrained(folder))


def test_custom_pipeline_loads_from_the_file(folder, expected):
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(ROOT / "pipeline_tsam_sd.py"), trust_remote_code=True
    )
    assert type(pipe).__name__ == "StableDiffusionTSAMPipeline"
    assert torch.equal(draw(pipe), expected)


def test_custom_pipeline_loads_in_a_fresh_process_with_nothing_installed(folder, expected, tmp_path):
    """The file and its helper alone, copied elsewhere, with an empty module cache and without this package."""
    for name in ("pipeline_tsam_sd.py", "attention_processors.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    code = f"""
import sys, torch
sys.modules["diffusers_tsam"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({folder!r}, custom_pipeline="pipeline_tsam_sd.py", trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
images = pipe("a red cube and a blue sphere", generator=generator, **{CALL!r}).images
torch.save(images, "images.pt")
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_shares_the_components_and_their_dtype(folder, expected, dtype):
    stock = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe = StableDiffusionTSAMPipeline.from_pipe(stock)
    assert pipe.unet is stock.unet and pipe.unet.dtype == pipe.text_encoder.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(draw(pipe), expected)
    back = StableDiffusionPipeline.from_pipe(pipe, dtype=dtype)
    assert back.unet is stock.unet and type(back) is StableDiffusionPipeline


def test_from_pipe_takes_the_custom_pipeline_too(folder, expected):
    stock = StableDiffusionPipeline.from_pretrained(folder)
    pipe = DiffusionPipeline.from_pipe(
        stock, custom_pipeline=str(ROOT / "pipeline_tsam_sd.py"), trust_remote_code=True, dtype=torch.float32
    )
    assert torch.equal(draw(pipe), expected)


def test_a_saved_pipeline_loads_as_stock_and_with_the_class(folder, expected, tmp_path):
    StableDiffusionTSAMPipeline.from_pretrained(folder).save_pretrained(tmp_path)
    assert torch.equal(draw(StableDiffusionTSAMPipeline.from_pretrained(tmp_path)), expected)
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusionPipeline


def test_the_installed_package_is_this_checkout():
    installed = Path(diffusers_tsam.__file__).parent
    for name in ("__init__.py", "attention_processors.py", "pipeline_tsam_sd.py", "cli.py", "shapes/scenes.py"):
        assert (installed / name).read_bytes() == (ROOT / name).read_bytes(), f"{name}: install again"
    for path in (ROOT / "shapes" / "sd").rglob("*.*"):
        assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes()


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PixArtSigma"):
        diffusers_tsam.PixArtSigma  # noqa: B018

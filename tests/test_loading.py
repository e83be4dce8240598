"""The ways to load, share and save, as users do: from a file, with the installed class, and back to stock."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_imports

import diffusers_tsam
from diffusers_tsam.modular_tsam import CODE
from diffusers_tsam.shapes import MODELS
from kinds import BLOCKS, KINDS, PROMPT, denoiser_of, kind_of, make


ROOT = Path(__file__).parent.parent
CALL, LITTLE = {"num_inference_steps": 2, "output_type": "latent"}, {"refinement_iterations": 1}
NOTHING_INSTALLED = 'import sys; sys.modules["diffusers_tsam"] = None\n'


def run_fresh(home, code, url="http://127.0.0.1:9", **environment):
    """Run code in a new process that keeps everything in `home` and takes `url` for the Hub.

    Nobody listens at the default. The package is importable, also where it is not installed.
    """
    (home / "packages").mkdir(parents=True, exist_ok=True)
    (home / "packages" / "diffusers_tsam").symlink_to(ROOT)
    # On busy cores, more threads only wait for each other.
    environment |= {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": url, "PYTHONPATH": str(home / "packages")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


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


def draw(pipe, **settings):
    """Two steps, with these settings of T-SAM, if it is T-SAM."""
    pipe.set_progress_bar_config(disable=True)
    call = CALL | kind_of(pipe).call | settings
    return pipe("a red cube and a blue sphere", generator=torch.Generator().manual_seed(0), **call).images


@functools.cache
def drawn(kind):
    """What a pipeline that was not loaded draws."""
    return draw(make(kind.tsam, kind.components), **LITTLE)


def custom(kind):
    """The arguments that load a pipeline from its file."""
    return {"custom_pipeline": str(ROOT / kind.file), "trust_remote_code": True}


def dtypes_of(pipe):
    models = {name: model for name, model in pipe.components.items() if isinstance(model, torch.nn.Module)}
    return {(name, key): value.dtype for name, model in models.items() for key, value in model.state_dict().items()}


def test_a_saved_pipeline_is_an_ordinary_folder(kind, saved, tmp_path):
    assert json.loads((saved / "model_index.json").read_text())["_class_name"] == kind.stock.__name__
    make(kind.stock, kind.components).save_pretrained(tmp_path)
    ours, theirs = ({path.relative_to(folder) for path in folder.rglob("*")} for folder in (saved, tmp_path))
    assert ours == theirs and not [path for path in ours if path.suffix == ".py"]


FRESH = """
import diffusers, torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, ModularPipelineBlocks

for folder, file, ours, stock, call in cases:
    stock = getattr(diffusers, stock)
    loaders = stock, AutoPipelineForText2Image, DiffusionPipeline
    assert all(type(cls.from_pretrained(folder)) is stock for cls in loaders)
    code = {"custom_pipeline": file, "trust_remote_code": True}
    for cls in loaders:
        pipe = cls.from_pretrained(folder, **code)
        assert type(pipe).__name__ == ours, cls
    pipe.save_pretrained("saved")
    assert type(DiffusionPipeline.from_pretrained("saved")) is stock
    for which, pipe in (("loaded", pipe), ("again", DiffusionPipeline.from_pretrained("saved", **code))):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe("a red cube and a blue sphere", generator=generator, **call).images
        torch.save(images, f"{which}-{file}.pt")

for code, weights, call in blocks:
    try:
        ModularPipelineBlocks.from_pretrained(code)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("ran code that is not trusted")
    made = ModularPipelineBlocks.from_pretrained(code, trust_remote_code=True)
    pipe = made.get_workflow("text2image").init_pipeline(weights)
    pipe.load_components(dtype=torch.float32)
    state = pipe(generator=torch.Generator().manual_seed(0), **call)
    torch.save([state.latents, state.losses], f"{code}.pt")
"""


@pytest.mark.slow
def test_in_a_fresh_process_with_nothing_installed_a_saved_folder_is_stock_and_with_our_code_tsam(folders, tmp_path):
    """The files alone, copied elsewhere, and the code that blocks save, with an empty module cache."""
    cases, blocks, states = [], [], []
    for name, kind in KINDS.items():
        for file in (kind.file, *(f"{module}.py" for module in get_relative_imports(ROOT / kind.file))):
            (tmp_path / file).write_bytes((ROOT / file).read_bytes())
        classes = kind.tsam.__name__, kind.stock.__name__
        cases.append((str(folders[name]), kind.file, *classes, CALL | LITTLE | kind.call))
    for name, kind in BLOCKS.items():
        pipe, code, weights = make(kind.tsam, kind.components), tmp_path / f"{name}-code", str(tmp_path / name)
        pipe.save_pretrained(weights, overwrite_modular_index=True)
        pipe.blocks.save_pretrained(code)
        assert {path.name for path in code.iterdir()} == {*CODE, "modular_config.json"}
        blocks.append((str(code), weights, CALL | kind.call | {"prompt": PROMPT}))
        states.append(pipe(generator=torch.Generator().manual_seed(0), **blocks[-1][-1]))
    run_fresh(tmp_path, f"{NOTHING_INSTALLED}cases, blocks = {cases!r}, {blocks!r}\n{FRESH}")
    for kind in KINDS.values():
        for which in ("loaded", "again"):
            assert torch.equal(torch.load(tmp_path / f"{which}-{kind.file}.pt"), drawn(kind))
    for (code, *_), state in zip(blocks, states):  # another process rounds otherwise
        torch.testing.assert_close(torch.load(f"{code}.pt"), [state.latents, state.losses], rtol=1e-4, atol=1e-3)


def test_both_custom_pipelines_and_the_installed_classes_live_in_one_process(folders):
    pipes = {}
    for name, kind in KINDS.items():
        stock = kind.stock.from_pretrained(folders[name])
        files = (
            DiffusionPipeline.from_pretrained(folders[name], **custom(kind)),
            DiffusionPipeline.from_pipe(stock, **custom(kind), dtype=torch.float32),
        )
        assert all(type(pipe).__name__ == kind.tsam.__name__ and type(pipe) is not kind.tsam for pipe in files)
        pipes[name] = *files, kind.tsam.from_pretrained(folders[name])
        assert type(pipes[name][-1]) is kind.tsam
    assert all(torch.equal(draw(pipe, **LITTLE), drawn(kind)) for name, kind in KINDS.items() for pipe in pipes[name])


CASTS = torch.float8_e4m3fn, torch.float32  # stored and computed in
# The dtype that a stock pipeline is loaded in, what then is done to it, and how many dtypes its weights have
WEIGHTS = {
    "float32": (torch.float32, lambda pipe: None, 1),
    "bfloat16": (torch.bfloat16, lambda pipe: None, 1),
    "mixed": (torch.bfloat16, lambda pipe: pipe.vae.float(), 2),
    "cast by layers": (torch.float32, lambda pipe: denoiser_of(pipe).enable_layerwise_casting(*CASTS), 2),
}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_from_stock_and_back_the_components_are_shared_as_they_are_and_stock_draws_the_same(kind, saved, weights):
    dtype, change, number = WEIGHTS[weights]
    stock = kind.stock.from_pretrained(saved, dtype=dtype)
    change(stock)
    theirs, found = draw(stock), dtypes_of(stock)
    assert len({dtype for dtype in found.values() if dtype.is_floating_point}) == number
    there = kind.tsam.from_pipe(stock)
    assert type(there) is kind.tsam
    assert all(there.components[name] is component for name, component in stock.components.items())
    ours = draw(there, **LITTLE)
    assert ours.isfinite().all() and not torch.allclose(ours, theirs, rtol=0.05, atol=0.05)
    assert torch.equal(draw(there, tsam_steps=0), theirs)
    assert dtypes_of(there) == dtypes_of(stock) == found
    back = kind.stock.from_pipe(there, dtype=dtype)  # stock alone would make it float32
    assert type(back) is kind.stock and denoiser_of(back) is denoiser_of(stock)
    assert torch.equal(draw(back), theirs) or weights == "cast by layers"  # which stock undoes


@pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_from_pipe_casts_where_it_is_told_to(kind, saved, name):
    told = kind.tsam.from_pipe(kind.stock.from_pretrained(saved), **{name: torch.bfloat16})
    assert {dtype for dtype in dtypes_of(told).values() if dtype.is_floating_point} == {torch.bfloat16}


def test_the_installed_package_is_this_checkout():
    installed = Path(diffusers_tsam.__file__).parent
    shipped = [path for folder in MODELS for path in (ROOT / "shapes" / folder).rglob("*.*")]
    for path in (*ROOT.glob("*.py"), *ROOT.glob("shapes/*.py"), *shipped):
        copy = installed / path.relative_to(ROOT)
        assert copy.is_file() and copy.read_bytes() == path.read_bytes(), f"{path.name}: install again"


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PixArtSigma"):
        diffusers_tsam.PixArtSigma  # noqa: B018


@pytest.mark.parametrize("kind", ["sd", "sdxl-pipeline"], indirect=True)
@pytest.mark.parametrize("auto", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_diffusers_auto_pipelines_take_ours_as_they_take_stocks(kind, pipe, stock, auto):
    ours, theirs = auto.from_pipe(pipe), auto.from_pipe(stock)
    assert type(ours) is type(theirs)
    assert ours.components["unet"] is pipe.unet and ours.components["vae"] is pipe.vae

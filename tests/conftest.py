"""Tests run offline, on tiny random models built here and on the trained model that ships."""

import importlib.util
import logging
import os
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core already; more threads only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="tsam-modules-")  # read when diffusers is imported
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "benchmarks")]

if importlib.util.find_spec("diffusers_tsam") is None:  # an uninstalled checkout, whatever its folder's name
    spec = importlib.util.spec_from_file_location(
        "diffusers_tsam", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["diffusers_tsam"] = module
    spec.loader.exec_module(module)

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402

from kinds import ALL, KINDS, make  # noqa: E402


@pytest.fixture(autouse=True)
def as_at_the_start():
    """Every test has the same seed, and says no less than the one before: benchmarks make diffusers silent."""
    torch.manual_seed(0)
    verbosity = diffusers_logging.get_verbosity()
    yield
    diffusers_logging.set_verbosity(verbosity)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny Stable Diffusion, saved."""
    path = tmp_path_factory.mktemp("model")
    make(KINDS["sd"].stock, KINDS["sd"].components).save_pretrained(path)
    return str(path)


@pytest.fixture(params=KINDS)
def kind(request):
    """Which pipeline is tested: the first two, unless a module is of one alone; with `every`, blocks as well."""
    return ALL[request.param]


@pytest.fixture
def stock(kind):
    return make(kind.stock, kind.components)


@pytest.fixture
def pipe(kind):
    return make(kind.tsam, kind.components)


@pytest.fixture
def own(kind):
    """A pipeline of its own components, for what changes them."""
    return make(kind.tsam, kind.build())


@pytest.fixture
def warnings_seen(caplog, monkeypatch):
    """What is logged below diffusers, whose logger keeps it from pytest."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    return caplog

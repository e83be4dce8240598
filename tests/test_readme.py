"""The README's own words are run."""

import inspect
import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

import diffusers_tsam
from diffusers_tsam.evaluation.__main__ import arguments
from diffusers_tsam.shapes import ARGUMENTS, MODELS


ROOT = Path(__file__).parent.parent
FOLDERS = "docs", "benchmarks", "shapes", "hub", "app", "evaluation"
PAGES = [ROOT / "README.md", *(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))]
PAGES = [page for page in PAGES if page.name not in ("code.md", "weights.md")]  # which are filled in first


@pytest.mark.slow
@pytest.mark.parametrize("page, kind", [("README.md", "sd"), ("docs/pixart.md", "pixart")])
def test_the_pasted_lines_draw_a_picture_with_the_shipped_model(page, kind, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    code = re.sub(r'"[^"]+/[^"]+"', repr(str(MODELS[kind])), code, count=1)
    code = code.replace('"cuda"', '"cpu"').replace("float16", "float32")
    own = {name: value for name, value in ARGUMENTS[kind].items() if name != "guidance_scale"}
    own["num_inference_steps"] = 4
    code = code.replace('"a black car and a white clock"', f'"a red cube and a blue sphere", **{own}')
    file = tmp_path / re.search(r'custom_pipeline="([^"]+)"', code)[1]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(runpy.run_path(str(ROOT / "hub" / "single_file.py"))["single_file"](kind))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    (picture,) = tmp_path.glob("*.png")
    assert picture.stat().st_size > 1000 and picture.name in code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_of_the_repository_exists(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(#[\w-]+)?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor in {"#" + re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, anchor


def test_the_tests_and_functions_that_the_documents_name_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"`((?:test_|Test|\.\.\.)[\w.]+)`", (ROOT / "docs" / "compatibility.md").read_text())
    assert len(names) > 20
    for name in names:
        assert (ROOT / "tests" / name).exists() or name.strip(".") in tests, name
    code = (ROOT / "tsam.py").read_text() + (ROOT / "attention_processors.py").read_text()
    names = re.findall(r"^\|[^|]*\| `(?:\w+\.)?(\w+)` \|", (ROOT / "docs" / "method.md").read_text(), re.MULTILINE)
    assert len(names) >= 8 and all(f"def {name}(" in code for name in names)


@pytest.mark.parametrize("column, pipeline", [(0, "StableDiffusionTSAMPipeline"), (1, "PixArtAlphaTSAMPipeline")])
def test_the_defaults_in_the_table_of_arguments_are_those_of_the_code(column, pipeline):
    parameters = inspect.signature(getattr(diffusers_tsam, pipeline).__call__).parameters
    page = (ROOT / "docs" / "arguments.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]+?) \| ([^|]+?) \|", page, re.MULTILINE)
    table = {name: defaults[column] for name, *defaults in rows if defaults[column] != "-"}
    ours = list(parameters)[list(parameters).index("tsam_steps") :]
    assert set(ours) - {"kwargs"} == set(table)
    numbers = set(ours) - {"kwargs", "preset"}
    assert {name: str(parameters[name].default) for name in numbers} == {name: table[name] for name in numbers}


def test_the_commands_that_measure_are_those_of_the_results():
    (code,) = re.findall(r"```bash\n(E=.*?)```", (ROOT / "docs" / "contributing.md").read_text(), re.DOTALL)
    code = code.replace('"python -m diffusers_tsam.evaluation"', "echo").replace("python ", ": ")
    lines = subprocess.run(["bash", "-euc", code], capture_output=True, text=True, check=True).stdout.splitlines()
    runs = [arguments().parse_args(line.split()) for line in lines if line.startswith("generate")]
    results = ROOT / "benchmarks" / "results" / "evaluation"
    assert sorted(ROOT / run.output for run in runs) == sorted(results.iterdir())
    for run in runs:
        drawn = json.loads((ROOT / run.output / "settings.json").read_text())
        assert set(run.methods) == set(drawn["methods"])
        assert (run.model, run.prompts, run.seeds) == (drawn["model"], drawn["prompt_set"], drawn["seeds"])

"""The README's own words are run."""

import re
from pathlib import Path

import diffusers_tsam
from diffusers_tsam.shapes import MODELS


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_pasted_lines_draw_a_picture_with_the_shipped_model(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    code = code.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(MODELS["sd"]))
    code = code.replace('"cuda"', '"cpu"').replace("float16", "float32")
    code = code.replace("a black car and a white clock", "a red cube and a blue sphere")
    for name in ("pipeline_tsam_sd.py", "attention_processors.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "car_and_clock.png").stat().st_size > 1000


def test_every_link_to_a_file_of_the_repository_exists():
    for target in re.findall(r"\]\(([^)#:]+?)\)", README):
        assert (ROOT / target).exists(), target


def test_the_defaults_in_the_readme_are_those_of_the_code():
    import inspect

    parameters = inspect.signature(diffusers_tsam.StableDiffusionTSAMPipeline.__call__).parameters
    table = dict(re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]+?) \|", README, re.MULTILINE))
    ours = list(parameters)[list(parameters).index("tsam_steps") :]
    assert set(ours) - {"kwargs"} == set(table)
    for name in ("alpha", "gamma", "refinement_iterations", "attention_resolution"):
        assert float(table[name]) == parameters[name].default

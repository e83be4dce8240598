"""The evaluation's runs that the benchmarks report, and their pictures as rows."""

import json
from pathlib import Path

from diffusers_tsam.evaluation.runs import Run


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SMALL = {"sink": "SD with a sink", "sd": "SD", "pixart": "PixArt-α", "sd3": "SD 3"}  # the small models, in order
WORDS = {2: "two", 3: "three"}  # numbers of solids


def read(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def runs_of(form):
    """{one of SMALL: its `Run`} of the judged ones whose folders are of a form such as "starts-{}-2"."""
    folders = {model: RESULTS / "evaluation" / form.format(model) for model in SMALL}
    return {model: Run(folder) for model, folder in folders.items() if (folder / "score-judge.json").is_file()}


def by_solids(form, of):
    """{number of solids: {one of SMALL: `of` its run}} of a form such as "starts-{}-{}"."""
    return {n: {model: of(run) for model, run in runs_of(form.format("{}", n)).items()} for n in WORDS}


def of_run(run):
    """A row a picture of a scored `Run`: what the judge saw, what was kept, its setting (a method), its caption, and
    whether it is right, counted."""
    drawn = {(row["method"], row["prompt"], row["seed"]): row for row in run.rows("drawn")}
    rows = []
    for row in run.rows("score-judge"):
        own = drawn[row["method"], row["prompt"], row["seed"]]
        names = {"setting": run.methods[row["method"]], "caption": run.prompts[row["prompt"]].text}
        rows.append({**own, **row, **names, "right": bool(row["counted"])})
    return rows

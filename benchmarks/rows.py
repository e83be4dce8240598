"""The evaluation's runs that the benchmarks report, and their pictures as rows."""

from pathlib import Path

from diffusers_tsam.evaluation.runs import Run


RESULTS = Path(__file__).parent / "results"
SMALL = {"sink": "SD with a sink", "sd": "SD", "pixart": "PixArt-α", "sd3": "SD 3"}  # the small models, in order


def runs_of(form):
    """{one of SMALL: its `Run`} of the judged ones whose folders are of a form such as "starts-{}-2"."""
    folders = {model: RESULTS / "evaluation" / form.format(model) for model in SMALL}
    return {model: Run(folder) for model, folder in folders.items() if (folder / "score-judge.json").is_file()}


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

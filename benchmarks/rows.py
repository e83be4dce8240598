"""Pictures of the evaluation's runs as rows, and numbers that several benchmarks make of them."""

import json
from pathlib import Path

import numpy as np


RESULTS = Path(__file__).parent / "results"
SMALL = {"sink": "SD with a sink", "sd": "SD", "pixart": "PixArt-α", "sd3": "SD 3"}  # the small models, in order


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


def auc(lower, higher):
    """The probability that one of `higher` is above one of `lower`, ties half: the area under the ROC curve."""
    above = np.subtract.outer(higher, lower)
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def rounded(found):
    """What JSON keeps of it, numbers to four places."""
    return json.loads(json.dumps(found, default=float), parse_float=lambda number: round(float(number), 4))

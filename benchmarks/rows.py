"""Pictures as rows: read, judged, and compared with stock's of the same prompts and seeds.

A row is a picture: its setting (a method of the evaluation, as "tsam:preset=light"), caption, seed, and what the judge
saw. results/*.jsonl hold rows of before the evaluation drew everything, results/evaluation/ its runs.
"""

import json
from pathlib import Path

import numpy as np

from diffusers_tsam.evaluation.report import interval as interval_of_means
from diffusers_tsam.shapes.judge import verdict
from diffusers_tsam.shapes.scenes import words_of_solids


RESULTS = Path(__file__).parent / "results"
SMALL = {"sink": "SD with a sink", "sd": "SD", "pixart": "PixArt-α", "sd3": "SD 3"}  # the small models, in order


def solids_of(caption):
    """The (colour, solid) that a caption asks for."""
    words = caption.split()
    return [(words[colour], words[noun]) for colour, noun in words_of_solids(caption)]


def judged(row):
    """A row with the judge's verdict. Right: counted, where solids were; else every solid is there in its colour."""
    found = verdict(solids_of(row["caption"]), map(tuple, row["seen"]), row.get("count"))
    return row | found | {"right": found.get("counted", found["present"])}


def of_run(run):
    """The rows of a scored `Run`, with what was kept of its pictures."""
    common = {"pipeline": run.settings["kind"], "model": run.settings["model"]}
    common["steps"] = run.settings["arguments"]["num_inference_steps"]
    drawn = {(row["method"], row["prompt"], row["seed"]): row for row in run.rows("drawn")}
    rows = []
    for row in run.rows("score-judge"):
        caption, setting = run.prompts[row["prompt"]].text, run.methods[row["method"]]
        own = drawn[row["method"], row["prompt"], row["seed"]]
        rows.append(judged({**common, **own, **row, "setting": setting, "caption": caption}))
        rows[-1]["solids"] = len(solids_of(caption))
    return rows


def interval(values, clusters):
    """Mean and half-width of its 95 % interval, with one cluster a prompt."""
    return interval_of_means([np.mean([v for v, c in zip(values, clusters) if c == k]) for k in sorted(set(clusters))])


def share(rows, key):
    """In how many of the rows `key` holds, in words."""
    mean, half = interval([row[key] for row in rows], [row["caption"] for row in rows])
    return f"{100 * mean:.1f} ± {100 * half:.1f} %"


def paired(rows, name, base="stock"):
    """(row, the row of the same picture with setting `base`) for every row with setting `name` that has one."""
    theirs = {(row["caption"], row["seed"]): row for row in rows if row["setting"] == base}
    own = ((row, theirs.get((row["caption"], row["seed"]))) for row in rows if row["setting"] == name)
    return [(row, other) for row, other in own if other]


def gain(pairs):
    """`interval` of how many more pictures are right than with the other setting of `paired`."""
    return interval([row["right"] - other["right"] for row, other in pairs], [row["caption"] for row, _ in pairs])


def points(pairs):
    """The same in words."""
    return "{:+.1f} ± {:.1f}".format(*(100 * number for number in gain(pairs)))


def settings_of(rows):
    """Their settings, stock first, the others by how many pictures are right."""
    right = {}
    for row in rows:
        right.setdefault(row["setting"], []).append(row["right"])
    return sorted(right, key=lambda name: (name != "stock", -sum(right[name]) / len(right[name])))


COMPARED = ["setting (pictures)", "right", "points over stock", "fixes", "keeps"]


def compared(rows, name, words):
    """A setting's cells: how many pictures are right, and what it makes of stock's wrong and right ones."""
    pairs = paired(rows, name)
    cells = [f"{words} ({len(pairs)})", share([row for row, _ in pairs], "right")]
    if name == "stock":
        return [*cells, "", "", ""]
    parts = [[row["right"] for row, stock in pairs if stock["right"] == before] for before in (False, True)]
    shares = [f"{100 * sum(some) / len(some):.0f} % of {len(some)}" if some else "-" for some in parts]
    return [*cells, points(pairs), *shares]


def auc(lower, higher):
    """The probability that one of `higher` is above one of `lower`, ties half: the area under the ROC curve."""
    above = np.subtract.outer(higher, lower)
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def rounded(found):
    """What JSON keeps of it, numbers to four places."""
    return json.loads(json.dumps(found, default=float), parse_float=lambda number: round(float(number), 4))

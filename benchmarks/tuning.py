"""Which constants and settings the presets have: tables of runs with one thing changed at a time, on tuning prompts."""

import numpy as np
from rows import SMALL, by_solids, of_run
from variants import STEPS, VARIANTS

from diffusers_tsam.evaluation.report import Scores, auc, interval, markdown


FAST, LIGHT, TOLD = "tsam:preset=fast", "tsam:preset=light", "objective=benchmarks/variants.py:told_pairs"
CHANGED = {  # what is changed of `fast`: in words
    "": "`fast`",
    "objective=benchmarks/variants.py:place_1": "μ = 1 in place of ¼",
    "objective=benchmarks/variants.py:related_1": "λ = 1 in place of ½",
    "objective=benchmarks/variants.py:exponent_1": "w's exponent 1 in place of 2",
    "objective=benchmarks/variants.py:apc": "R by the average-product correction",
    "relative_step=0.025": "relative step 0.025 in place of 0.05",
    "relative_step=0.1": "relative step 0.1",
    "tsam_steps=10:refinement_steps=0+4+8": "updates in the first 40 % of the steps in place of 20 %",
    "tsam_steps=1:refinement_steps=0:refinement_iterations=19": "all updates before the first step",
}


def gains(scores, change):
    """Of each prompt, what a change of `fast`, or LIGHT, adds to stock."""
    method = change if change == LIGHT else f"{FAST}:{change}".rstrip(":")
    if scores.run.settings["model"] in ("pixart", "sd3"):  # whose `fast` makes three updates less of 25 steps
        method = method.replace("iterations=19", "iterations=16")
    return scores.gains(scores.run.methods.index(method), "counted")


def area(rows, loss, step=5):
    """How well a loss tells wrong pictures: the area under the ROC curve."""
    at = [[row["starts"][loss][STEPS.index(step)] for row in rows if row["right"] == right] for right in (True, False)]
    return auc(*at)


def tables():
    """Points over stock of every change, all models together, and how well each loss tells wrong pictures."""
    found = by_solids("tuning-{}-{}", Scores)
    head = ["changed", *(f"{n} solids ({', '.join(SMALL[m] for m in own)})" for n, own in found.items()), "together"]
    rows = []
    for change, words in {LIGHT: "`light`", **CHANGED, TOLD: "R told: a solid and its colour, no other words"}.items():
        each = [np.concatenate([gains(scores, change) for scores in own.values()]) for own in found.values()]
        numbers = map(interval, [*each, np.concatenate(each)])
        rows.append([words, *(f"{100 * mean:+.1f} ± {100 * half:.1f}" for mean, half in numbers)])
    means = [  # a row a model, a column a change
        [100 * np.mean([gains(own[model], change) for own in found.values()]) for change in CHANGED]
        for model in found[2]
    ]
    said = (
        f"The best of these for each model would gain {np.mean([max(own) for own in means]):.1f} points in the mean,"
        f" where `fast` gains {np.mean([own[0] for own in means]):.1f}: an upper bound of what tuning per model adds,"
        " picked on these pictures."
    )
    watched = by_solids("watched-{}-{}", of_run).items()
    watched = {f"{SMALL[m]}, {n} ({len(rows)})": rows for n, own in watched for m, rows in own.items()}
    areas = [[name, *(f"{area(rows, name):.2f}" for rows in watched.values())] for name in VARIANTS]
    areas = markdown(["area under the ROC curve after 5 of 25 steps", *watched], areas)
    return f"{markdown(head, rows)}\n\n{said}\n\n{areas}"

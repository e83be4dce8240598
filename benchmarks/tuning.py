"""Which constants and settings the presets have: one changed at a time, on tuning prompts.

python benchmarks/tuning.py draw sd3 --solids 2   # pictures, into runs/tuning-sd3-2, five minutes on a core
python benchmarks/tuning.py watch sd3 --solids 2  # stock's pictures and their losses, into runs/watched-sd3-2
python benchmarks/tuning.py keep runs/...         # a run's numbers, into results/tuning.json
"""

import argparse
import functools
import json

import numpy as np
from rows import RESULTS, SMALL, auc, of_run
from starts import FAST, STEPS, WATCHED, draw, losses_of
from variants import VARIANTS

from diffusers_tsam.evaluation.report import interval, markdown
from diffusers_tsam.evaluation.runs import Run


FILE = RESULTS / "tuning.json"
LIGHT = "tsam:preset=light"
LAW = "objective=benchmarks/variants.py:"
CHANGED = {  # what is changed of `fast`: in words
    "": "`fast`",
    f"{LAW}place_1": "μ = 1 in place of ¼",
    f"{LAW}related_1": "λ = 1 in place of ½",
    f"{LAW}exponent_1": "w's exponent 1 in place of 2",
    f"{LAW}apc": "R by the average-product correction",
    "relative_step=0.025": "relative step 0.025 in place of 0.05",
    "relative_step=0.1": "relative step 0.1",
    "tsam_steps=10:refinement_steps=0+4+8": "updates in the first 40 % of the steps in place of 20 %",
    "tsam_steps=1:refinement_steps=0:refinement_iterations={all}": "all updates before the first step",
}


def method_of(change, model):
    """A change of `fast` as a method. {all}: as many updates, less one, as `fast` makes of 25 steps."""
    return ":".join([FAST, *filter(None, [change])]).format(all=16 if model in ("pixart", "sd3") else 19)


def methods_of(model):
    return ["stock", LIGHT, *(method_of(change, model) for change in CHANGED)]


def watched(model, prompts):
    kept = {"keep": functools.partial(losses_of, losses=VARIANTS), "output_attentions": True}
    return draw("watched", model, [f"{WATCHED}:gamma=1"], prompts, **kept)


def keep(run):
    """{"right": {method: [right, a picture each]}}, and of watched ones {"areas": {loss: [after STEPS]}}."""
    rows, right = of_run(run), {}
    for row in sorted(rows, key=lambda row: (row["prompt"], row["seed"])):
        right.setdefault(row["setting"], []).append(int(row["right"]))
    if "starts" not in rows[0]:
        return {"right": {name.removeprefix(FAST).lstrip(":"): own for name, own in right.items()}}
    wrong = np.array([not row["right"] for row in rows])
    losses = {name: np.array([row["starts"][name] for row in rows]).T for name in rows[0]["starts"]}
    areas = {name: [round(auc(at[~wrong], at[wrong]), 3) for at in of_steps] for name, of_steps in losses.items()}
    return {"areas": areas, "pictures": len(rows)}


def gains(found, model, solids, name):
    """Of each prompt, what a change of `fast`, or LIGHT, adds to stock."""
    right = found[solids][model]["right"]
    own = right[name if name == LIGHT else method_of(name, model).removeprefix(FAST).lstrip(":")]
    return [a - b for a, b in zip(own, right["stock"])]


def tables():
    """Points over stock of every change, all models together, and how well each loss tells wrong pictures."""
    found = json.loads(FILE.read_text(encoding="utf-8"))
    cells = {solids: [m for m in SMALL if "right" in of.get(m, {})] for solids, of in found.items()}
    head = ["changed", *(f"{n} solids ({', '.join(SMALL[m] for m in own)})" for n, own in cells.items()), "together"]
    rows = []
    for name, words in {LIGHT: "`light`", **CHANGED}.items():
        each = [[x for model in own for x in gains(found, model, n, name)] for n, own in cells.items()]
        each.append(sum(each, []))
        numbers = map(interval, each)
        rows.append([words, *(f"{100 * mean:+.1f} ± {100 * half:.1f}" for mean, half in numbers)])
    models = dict.fromkeys(model for own in cells.values() for model in own)

    def mean(model, name):
        return 100 * np.mean(sum((gains(found, model, n, name) for n, own in cells.items() if model in own), []))

    best = np.mean([max(mean(model, name) for name in CHANGED) for model in models])
    said = (
        f"The best of these for each model would gain {best:.1f} points in the mean, where `fast` gains"
        f" {np.mean([mean(model, '') for model in models]):.1f}: an upper bound of what tuning per model adds,"
        " picked on these pictures."
    )
    columns = [(n, m) for n, of in found.items() for m in SMALL if "areas" in of.get(m, {})]
    areas = [[name, *(f"{found[n][m]['areas'][name][STEPS.index(5)]:.2f}" for n, m in columns)] for name in VARIANTS]
    titles = (f"{SMALL[m]}, {n} ({found[n][m]['pictures']})" for n, m in columns)
    areas = markdown(["area under the ROC curve after 5 of 25 steps", *titles], areas)
    return f"{markdown(head, rows)}\n\n{said}\n\n{areas}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("draw", "watch", "keep"))
    parser.add_argument("what", nargs="+", help="draw, watch: models; keep: folders")
    parser.add_argument("--solids", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=24)
    args = parser.parse_args()
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for what in args.what:
        if args.command == "keep":
            run = Run(what)
            solids = run.settings["prompt_set"].split(":")[1]
            found.setdefault(solids, {}).setdefault(run.settings["model"], {}).update(keep(run))
        else:
            prompts = f"shapes:{args.solids}:tune:{args.prompts}"
            watching = args.command == "watch"
            print(watched(what, prompts) if watching else draw("tuning", what, methods_of(what), prompts))
    if args.command == "keep":
        FILE.write_text(json.dumps(dict(sorted(found.items())), separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Whether choosing the start pays: pictures of several starts a prompt, with the losses that each had on its way.

    python benchmarks/starts.py draw sd3       # into runs/starts-sd3-2, about ten minutes on a core
    python benchmarks/starts.py keep runs/...  # a drawn run's numbers, into results/starts.json
    python benchmarks/starts.py figure         # docs/starts.png and the tables, from results/starts.json

A prompt's pictures of all starts are drawn to the end, unguided (and watched: α = 0) and by `preset="fast"`, so that
the best of N is known for every N, loss and step: its share right is the mean over all choices of N of the starts.
"""

import argparse
import json
from math import comb
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rows import RESULTS, SMALL, auc, interval, of_run

from diffusers_tsam.evaluation.baselines import BASELINES, told
from diffusers_tsam.evaluation.generate import generate
from diffusers_tsam.evaluation.report import markdown
from diffusers_tsam.evaluation.runs import Run
from diffusers_tsam.evaluation.score import score
from diffusers_tsam.figures import GREY, INK, save
from diffusers_tsam.tsam import OBJECTIVES, Syntax


ROOT = Path(__file__).resolve().parent.parent
FILE = RESULTS / "starts.json"
STEPS = (1, 5, 10)  # after how many of 25 steps starts are compared: one, a fifth, two fifths
OF = 25
WATCHED = f"tsam:alpha=0:objective=contrast:tsam_steps={STEPS[-1]}:refinement_steps=none"
FAST = "tsam:preset=fast"
PEERS = {"syngen": {}, "conform": {"sharpness": None}}  # told the words
LOSSES = ("contrast", "relation", "attainable", *PEERS)
COST_OF_FAST = 1.42  # of a plain picture, by operations: README
NUMBERS = (2, 4, 8)


def losses_of(pipe, prompts, output):
    """What is kept of a watched picture: {loss: its values at STEPS}."""
    if output.losses.shape[1] != STEPS[-1]:
        return [{}] * len(prompts)
    kept = []
    for prompt, seen in zip(prompts, output.attentions):
        maps = seen["maps"][[step - 1 for step in STEPS]]
        many = len(STEPS)
        t, r = (seen[name].expand(many, -1, -1) for name in ("text_attention", "relation"))
        text = Syntax(t, t, torch.ones(many, t.shape[1], dtype=torch.bool), [seen["tokens"]] * many, r)
        known = OBJECTIVES | {
            name: told(BASELINES[name].loss, [prompt] * many, **given) for name, given in PEERS.items()
        }
        kept.append({"starts": {name: [round(x, 4) for x in known[name](maps, text).tolist()] for name in LOSSES}})
    return kept


def draw(model, solids, prompts, seeds):
    folder = ROOT / "runs" / f"starts-{model}-{solids}"
    common = {"steps": OF, "batch": 10, "keep": losses_of, "output_attentions": True}
    generate(model, [WATCHED, FAST], f"shapes:{solids}:test:{prompts}", seeds, folder, **common)
    score(folder, ["judge"])
    return folder


def keep(folder):
    """Of a run, a list a prompt: for each seed what was right, and the losses."""
    rows, prompts = of_run(Run(folder)), {}
    for row in rows:
        own = prompts.setdefault(row["caption"], {}).setdefault(row["seed"], {})
        own["fast" if row["setting"] == FAST else "stock"] = bool(row["right"])
        own |= row.get("starts", {})
    return [[own[seed] for seed in sorted(own)] for own in prompts.values()]


def best_of(number, order, right):
    """The expected share right of the first in `order` among `number` starts of all."""
    total = len(order)
    return sum(comb(total - 1 - rank, number - 1) * right[k] for rank, k in enumerate(order)) / comb(total, number)


def chosen(prompts, number, by, step, drawn="stock"):
    """Percent right and half of the interval over prompts. by: one of LOSSES, "chance", or "judge": the bound."""
    shares = []
    for starts in prompts:
        right = [start[drawn] for start in starts]
        if by == "chance":
            shares.append(np.mean(right))
            continue
        keys = [not own for own in right] if by == "judge" else [start[by][STEPS.index(step)] for start in starts]
        shares.append(best_of(number, np.argsort(keys, kind="stable"), right))
    return tuple(100 * x for x in interval(shares, range(len(shares))))


def tables(found):
    """The area under the ROC curve of every loss and step, and who is right by what, as Markdown."""
    head, rows = ["area under the ROC curve, after 1, 5, 10 of 25 steps", *found], []
    for loss in LOSSES:
        cells = []
        for prompts in found.values():
            right = np.array([start["stock"] for starts in prompts for start in starts])
            own = np.array([start[loss] for starts in prompts for start in starts]).T
            cells.append(", ".join(f"{auc(of_step[right], of_step[~right]):.2f}" for of_step in own))
        rows.append([loss, *cells])
    areas, rows = markdown(head, rows), []

    def row(name, cost, *how):
        cells = ("{:.1f} ± {:.1f}".format(*chosen(prompts, *how)) for prompts in found.values())
        rows.append([name, f"{cost:.1f}x", *cells])

    row("stock", 1, 1, "chance", 5)
    row("guidance alone, `fast`", COST_OF_FAST, 1, "chance", 5, "fast")
    for number in NUMBERS:
        for step in STEPS:
            row(f"best of {number} by our loss after {step} steps", 1 + number * step / OF, number, "contrast", step)
        for peer in PEERS:
            row(f"by {peer}'s, words given, after 5", 1 + number * 5 / OF, number, peer, 5)
        row(f"best of {number} after 5, then `fast`", COST_OF_FAST + number * 5 / OF, number, "contrast", 5, "fast")
        row(f"best of {number} drawn to the end, chosen by the judge: the bound", number, number, "judge", 5)
    return f"{areas}\n\n{markdown(['counted right, %', 'cost', *found], rows)}"


def figure(found):
    fig = Figure((3.6 * len(found), 3.8), dpi=110, layout="constrained", facecolor="white")
    curves = (("best of 2, 4, 8 starts", "stock", 1, "#1f6fb4"), ("the same, then fast", "fast", COST_OF_FAST, INK))
    for axes, (name, prompts) in zip(fig.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items()):
        for label, drawn, cost, colour in curves:
            points = [(cost, chosen(prompts, 1, "chance", 5, drawn)[0])]
            points += [(cost + n * 5 / OF, chosen(prompts, n, "contrast", 5, drawn)[0]) for n in NUMBERS]
            axes.plot(*zip(*points), "o-", color=colour, label=label)
        bound = [(n, chosen(prompts, n, "judge", 5)[0]) for n in (1, 2)]
        axes.plot(*zip(*bound), ":", color=GREY, label="drawn to the end, an oracle picks")
        axes.set(title=name, xlabel="cost, plain pictures' operations")
        axes.spines[["top", "right"]].set_visible(False)
    fig.axes[0].set_ylabel("counted right, %")
    fig.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    save(fig, ROOT / "docs" / "starts.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("draw", "keep", "figure"))
    parser.add_argument("what", nargs="*", help="draw: models; keep: folders")
    parser.add_argument("--solids", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    if args.command == "draw":
        for model in args.what:
            print(draw(model, args.solids, args.prompts, args.seeds))
    elif args.command == "keep":
        for folder in args.what:
            found[SMALL[Run(folder).settings["model"]]] = keep(folder)
        FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    else:
        print(tables(found))
        figure(found)


if __name__ == "__main__":
    main()

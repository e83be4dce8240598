"""Whether choosing the start pays: pictures of several starts a prompt, with the losses that each had on its way.

    python benchmarks/starts.py draw sd3       # into runs/starts-sd3-2, about ten minutes on a core
    python benchmarks/starts.py keep runs/...  # a drawn run's numbers, into results/starts.json
    python benchmarks/starts.py figure         # docs/starts.png, from results/starts.json

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
from rows import RESULTS, SMALL, auc, of_run

from diffusers_tsam.evaluation.baselines import BASELINES, told
from diffusers_tsam.evaluation.generate import generate
from diffusers_tsam.evaluation.report import interval, markdown
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
WORDS = {"2": "two", "3": "three"}
LOSSES = ("contrast", "relation", "attainable", *PEERS)
NUMBERS = (2, 4, 8)
ARCHITECTURES = {"pixart": ("operations", "pixart"), "sd3": ("modular", "sd3")}  # in cost.json; the others are SD


def losses_of(pipe, prompts, output, losses=None):
    """What is kept of a watched picture: {loss: its values at STEPS}. losses: {name: objective}; LOSSES if None."""
    if output.losses.shape[1] != STEPS[-1]:
        return [{}] * len(prompts)
    kept = []
    for prompt, seen in zip(prompts, output.attentions):
        maps = seen["maps"][[step - 1 for step in STEPS]]
        many = len(STEPS)
        t, r = (seen[name].expand(many, -1, -1) for name in ("text_attention", "relation"))
        text = Syntax(t, t, torch.ones(many, t.shape[1], dtype=torch.bool), [seen["tokens"]] * many, r)
        peers = {name: told(BASELINES[name].loss, [prompt] * many, **given) for name, given in PEERS.items()}
        known = losses or {name: (OBJECTIVES | peers)[name] for name in LOSSES}
        kept.append({"starts": {name: [round(x, 4) for x in own(maps, text).tolist()] for name, own in known.items()}})
    return kept


def cost_of_fast(model):
    """Of a plain picture, by operations of the published architecture."""
    part, kind = ARCHITECTURES.get(model, ("operations", "sd"))
    found = json.loads((RESULTS / "cost.json").read_text(encoding="utf-8"))[part][kind]
    return 1 + found["passes"]["fast"] * found["guided_pass_flop"] / found["plain_step_flop"] / found["steps"]


def draw(name, model, methods, prompts, seeds=1, **more):
    """A judged run of `prompts`, in the folder runs/NAME-MODEL-SOLIDS."""
    folder = ROOT / "runs" / f"{name}-{model}-{prompts.split(':')[1]}"
    generate(model, methods, prompts, seeds, folder, steps=OF, batch=10, **more)
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
    return tuple(100 * x for x in interval(shares))


def tables(found):
    """The area under the ROC curve of every loss and step, and who is right by what, as Markdown."""
    names = [SMALL[model] for model in found]
    head, rows = ["area under the ROC curve, after 1, 5, 10 of 25 steps", *names], []
    for loss in LOSSES:
        cells = []
        for prompts in found.values():
            right = np.array([start["stock"] for starts in prompts for start in starts])
            own = np.array([start[loss] for starts in prompts for start in starts]).T
            cells.append(", ".join(f"{auc(of_step[right], of_step[~right]):.2f}" for of_step in own))
        rows.append([loss, *cells])
    areas, rows = markdown(head, rows), []
    fast = sorted(map(cost_of_fast, found))

    def row(name, cost, *how, costs=(0,)):
        cells = ("{:.1f} ± {:.1f}".format(*chosen(prompts, *how)) for prompts in found.values())
        costs = dict.fromkeys(f"{cost + more:.1f}" for more in costs)
        rows.append([name, f"{' to '.join(costs)}x", *cells])

    row("stock", 1, 1, "chance", 5)
    row("guidance alone, `fast`", 0, 1, "chance", 5, "fast", costs=(fast[0], fast[-1]))
    for number in numbers_of(found):
        for step in STEPS:
            row(f"best of {number} by our loss after {step} steps", 1 + number * step / OF, number, "contrast", step)
        for peer in PEERS:
            row(f"by {peer}'s, words given, after 5", 1 + number * 5 / OF, number, peer, 5)
        then = (fast[0], fast[-1])
        row(f"best of {number} after 5, then `fast`", number * 5 / OF, number, "contrast", 5, "fast", costs=then)
        row(f"best of {number} drawn to the end, chosen by the judge: the bound", number, number, "judge", 5)
    return f"{areas}\n\n{markdown(['counted right, %', 'cost', *names], rows)}"


def numbers_of(found):
    """Of how many starts the best is known on every model."""
    least = min(len(starts) for prompts in found.values() for starts in prompts)
    return [number for number in NUMBERS if number <= least]


def figure(all_found):
    columns = max(map(len, all_found.values()))
    fig = Figure((3.4 * columns, 3.4 * len(all_found)), dpi=110, layout="constrained", facecolor="white")
    panels = fig.subplots(len(all_found), columns, sharey=True, squeeze=False)
    for line, (solids, found) in zip(panels, all_found.items()):
        for axes, (model, prompts) in zip(line, found.items()):
            fast = cost_of_fast(model)
            for label, drawn, cost, colour in (
                ("best of 2, 4, 8 starts", "stock", 1, "#1f6fb4"),
                ("the same, then fast", "fast", fast, INK),
            ):
                points = [(cost, chosen(prompts, 1, "chance", 5, drawn)[0])]
                points += [(cost + n * 5 / OF, chosen(prompts, n, "contrast", 5, drawn)[0]) for n in numbers_of(found)]
                axes.plot(*zip(*points), "o-", color=colour, label=label)
            bound = [(n, chosen(prompts, n, "judge", 5)[0]) for n in (1, 2)]
            axes.plot(*zip(*bound), ":", color=GREY, label="drawn to the end, an oracle picks")
            axes.set(title=f"{SMALL[model]}, {WORDS[solids]} solids", xlabel="cost, plain pictures' operations")
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("counted right, %")
        for axes in line[len(found) :]:
            axes.remove()
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
            kept = {"keep": losses_of, "output_attentions": True}
            prompts = f"shapes:{args.solids}:test:{args.prompts}"
            print(draw("starts", model, [WATCHED, FAST], prompts, args.seeds, **kept))
    elif args.command == "keep":
        for folder in args.what:
            run = Run(folder)
            solids = run.settings["prompt_set"].split(":")[1]
            found.setdefault(solids, {})[run.settings["model"]] = keep(folder)
        found = {n: {name: found[n][name] for name in SMALL if name in found[n]} for n in sorted(found)}
        FILE.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    else:
        figure(found)


if __name__ == "__main__":
    main()

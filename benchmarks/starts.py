"""Whether choosing the start pays: tables and docs/starts.png of several starts a prompt, with their losses.

A prompt's pictures of all starts are drawn to the end, unguided (and watched: α = 0) and by `preset="fast"`, so that
the best of N is known for every N, loss and step: its share right is the mean over all choices of N of the starts.
"""

from math import comb

import numpy as np
from matplotlib.figure import Figure
from rows import SMALL, WORDS, of_run, read
from variants import PEERS, STEPS

from diffusers_tsam.evaluation.report import BLUE, auc, interval, markdown
from diffusers_tsam.figures import GREY, INK


OF = 25
LOSSES = ("contrast", "relation", "attainable", *PEERS)
NUMBERS = (2, 4, 8)
ARCHITECTURES = {"pixart": ("operations", "pixart"), "sd3": ("modular", "sd3")}  # in cost.json; the others are SD


def cost_of(found, preset):
    """What a picture costs beside a plain one, by operations. found: an architecture's in cost.json."""
    return 1 + found["passes"][preset] * found["guided_pass_flop"] / found["plain_step_flop"] / found["steps"]


def cost_of_fast(model):
    """Of a small model, by its published architecture."""
    part, kind = ARCHITECTURES.get(model, ("operations", "sd"))
    return cost_of(read("cost.json")[part][kind], "fast")


def starts_of(run):
    """A list a prompt: for each seed what was right, drawn by stock and by `fast`, and the losses."""
    prompts = {}
    for row in of_run(run):
        own = prompts.setdefault(row["caption"], {}).setdefault(row["seed"], {})
        own["fast" if row["setting"] == "tsam:preset=fast" else "stock"] = row["right"]
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

    def row(name, cost, number, by, step=5, drawn="stock"):
        cells = ("{:.1f} ± {:.1f}".format(*chosen(prompts, number, by, step, drawn)) for prompts in found.values())
        each = (fast[0], fast[-1]) if drawn == "fast" else (1,)  # a picture after the choice
        costs = dict.fromkeys(f"{cost + more:.1f}" for more in each)
        rows.append([name, f"{' to '.join(costs)}x", *cells])

    row("stock", 0, 1, "chance")
    row("guidance alone, `fast`", 0, 1, "chance", drawn="fast")
    for number in numbers_of(found):
        for step in STEPS:
            row(f"best of {number} by our loss after {step} steps", number * step / OF, number, "contrast", step)
        for peer in PEERS:
            row(f"by {peer}'s, words given, after 5", number * 5 / OF, number, peer)
        row(f"best of {number} after 5, then `fast`", number * 5 / OF, number, "contrast", drawn="fast")
        row(f"best of {number} drawn to the end, chosen by the judge: the bound", number - 1, number, "judge")
    return f"{areas}\n\n{markdown(['counted right, %', 'cost', *names], rows)}"


def numbers_of(found):
    """Of how many starts the best is known on every model."""
    least = min(len(starts) for prompts in found.values() for starts in prompts)
    return [number for number in NUMBERS if number <= least]


def figure(all_found):
    fig = Figure((3.4 * len(SMALL), 3.4 * len(all_found)), dpi=110, layout="constrained", facecolor="white")
    panels = fig.subplots(len(all_found), len(SMALL), sharey=True)
    for line, (solids, found) in zip(panels, all_found.items()):
        for axes, (model, prompts) in zip(line, found.items()):
            ways = (
                ("best of 2, 4, 8 starts", "stock", 1, BLUE),
                ("the same, then fast", "fast", cost_of_fast(model), INK),
            )
            for label, drawn, cost, colour in ways:
                points = [(cost, chosen(prompts, 1, "chance", 5, drawn)[0])]
                points += [(cost + n * 5 / OF, chosen(prompts, n, "contrast", 5, drawn)[0]) for n in numbers_of(found)]
                axes.plot(*zip(*points), "o-", color=colour, label=label)
            bound = [(n, chosen(prompts, n, "judge", 5)[0]) for n in (1, 2)]
            axes.plot(*zip(*bound), ":", color=GREY, label="drawn to the end, an oracle picks")
            axes.set(title=f"{SMALL[model]}, {WORDS[solids]} solids", xlabel="cost, plain pictures' operations")
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("counted right, %")
    fig.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return fig

"""How much T-SAM gains for how many guided passes: the picture docs/passes.png.

    python benchmarks/passes.py results/alignment.jsonl --output docs/passes.png

From the lines that `alignment.py` wrote, for settings that differ in where the updates are. Lines over a picture are
95 % intervals over prompts, paired with stock.
"""

import argparse
import json
from pathlib import Path

from alignment import gain, paired
from matplotlib.figure import Figure


NAMES = {"sd": "Stable Diffusion", "pixart": "PixArt-α"}
PASS = {"sd": 0.524, "pixart": 0.692}  # of a plain step's operations on the published architecture, `cost.py`
LABELS = {"tuned": "fast", "tuned,schedule=paper": "paper's schedule"}
OTHER_ALPHA = {"color": "#d98032", "marker": "D", "linewidth": 0, "label": "a larger α"}
INK, GREY, BLUE = "#222222", "#777777", "#1f6fb4"


def gains(rows, pipeline, solids):
    """(passes, gain over stock and its half-width in points, pictures, setting), by passes."""
    rows = [row for row in rows if row["pipeline"] == pipeline and row["solids"] == solids]
    result = []
    for name in sorted({row["setting"] for row in rows} - {"stock"}):
        pairs = paired(rows, name, "stock")
        mean, half = gain(pairs)
        result.append((pairs[0][0]["updates"], 100 * mean, 100 * half, len(pairs), name))
    return sorted(result)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--solids", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/passes.png"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    kinds = [kind for kind in NAMES if any(row["pipeline"] == kind for row in rows)]
    fig = Figure((5.2 * len(kinds), 3.6), dpi=120, layout="constrained")
    for axes, kind in zip(fig.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds):
        steps = next(row["steps"] for row in rows if row["pipeline"] == kind)
        points = gains(rows, kind, args.solids)
        for number, mean, half, pictures, name in points:
            cells = (
                name,
                str(number),
                f"{1 + PASS[kind] * number / steps:.2f}x",
                f"{mean:+.1f} ± {half:.1f}",
                str(pictures),
            )
            print(f"| {NAMES[kind]} |", " | ".join(cells), "|")
            if name in LABELS:
                side = -1 if number == points[-1][0] else 1
                look = {"textcoords": "offset points", "ha": "right" if side < 0 else "left", "color": INK}
                axes.annotate(LABELS[name], (number, mean), (5 * side, 7 if mean > 0 else -15), **look)
        axes.axhline(0, color=GREY, linewidth=0.8)
        for changed, look in ((False, {"color": BLUE, "marker": "o", "linewidth": 1.5}), (True, OTHER_ALPHA)):
            some = [(0, 0.0, 0.0, 0, "stock")] * (not changed) + [p for p in points if ("alpha=" in p[-1]) == changed]
            if some:
                passes, means, halves, *_ = zip(*some)
                axes.errorbar(passes, means, halves, capsize=3, elinewidth=0.8, **look)
        axes.set_title(f"the small {NAMES[kind]}", color=INK)
        axes.set_xlabel(f"guided passes of a picture of {steps} steps", color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        if any("alpha=" in point[-1] for point in points):
            axes.legend(frameon=False, loc="lower right", labelcolor=INK)
    fig.axes[0].set_ylabel("more pictures right than stock, points", color=INK)
    fig.savefig(args.output)


if __name__ == "__main__":
    main()

"""Why the contrast objective works, in three pictures of the small PixArt-α: docs/contrast.png, and its numbers.

    python benchmarks/contrast.py  # about ten minutes on a core without benchmarks/results/contrast.json

T beside R of one prompt; the loss of pictures that end right and wrong, over the steps; a doubled solid and its maps.
"""

import json

import numpy as np
from matplotlib.figure import Figure
from rows import RESULTS, ROOT, read

from diffusers_tsam import PixArtAlphaTSAMPipeline
from diffusers_tsam.comparing import compare
from diffusers_tsam.evaluation.report import BLUE, RED, auc
from diffusers_tsam.figures import GREY, INK, draw_map, draw_picture, draw_table, save
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.shapes.judge import Judge, count, verdict
from diffusers_tsam.shapes.scenes import prompts


CALL = ARGUMENTS["pixart"] | {"num_inference_steps": 25}
CURVES = {"right": BLUE, "wrong": RED}
OBJECTIVES = ("relation", "contrast")


def measure(pipe, number):
    """Rows of prompts of three solids: what is counted, and the contrast's loss per step, without and with guidance."""
    judge, rows = Judge.from_pretrained(), []
    for seed, (caption, wanted) in enumerate(prompts(3, "tune", number, 0)):
        pair = compare(pipe, caption, seed, pipe.settings(preset="fast"), **CALL)
        pictures = [drawn.picture for drawn in pair]
        for name, picture, seen, drawn in zip(("stock", "T-SAM"), pictures, judge.read(pictures), pair):
            found = verdict(wanted, seen, count(picture)[0])
            row = {"prompt": caption, "seed": seed, "name": name, "losses": [round(x, 4) for x in drawn.losses]}
            rows.append(row | {key: found[key] for key in ("counted", "double")})
    return rows


def figure(pipe, rows):
    fig = Figure((14, 11), dpi=110, layout="constrained", facecolor="white")
    upper, lower = fig.subfigures(2, 1, height_ratios=(1, 1.15))
    text, relation, curves = upper.subplots(1, 3)
    for example in (row for row in rows if row["name"] == "stock" and row["double"]):
        pairs = {}
        for objective in OBJECTIVES:
            settings = pipe.settings(preset="fast", objective=objective, gamma=1.0)
            pairs[objective] = compare(pipe, example["prompt"], example["seed"], settings, **CALL)
        without, with_place = (count(pairs[objective][1].picture)[0] for objective in OBJECTIVES)
        if without > with_place:  # the place term's own doing
            break
    stock, seen = pairs["contrast"][0], pairs["contrast"][1].attentions
    for axes, name, key in ((text, "T: shares of attention", "text_attention"), (relation, "R: lift", "relation")):
        draw_table(axes, seen[key], seen["tokens"])
        axes.set_title(name, size=13, color=INK)
    for label, colour in CURVES.items():
        own = [row["losses"] for row in rows if row["name"] == "stock" and row["counted"] == (label == "right")]
        curves.plot(np.mean(own, 0), color=colour, label=f"stock, {label} ({len(own)})")
    guided = [row["losses"] for row in rows if row["name"] == "T-SAM"]
    curves.plot(np.mean(guided, 0), color=INK, linestyle="--", label=f"T-SAM ({len(guided)})")
    curves.set(xlabel="step", ylabel="contrast loss", title="Right and wrong pictures")
    curves.spines[["top", "right"]].set_visible(False)
    curves.legend(frameon=False)
    drawn = [("stock", stock), *((f"T-SAM, {name}", pairs[name][1]) for name in OBJECTIVES)]
    words = [k for k, word in enumerate(seen["tokens"]) if word.strip("▁ ") not in ("a", "an", "and")]
    grid = lower.subplots(len(drawn), 1 + len(words))
    lower.suptitle(f"“{example['prompt']}”, seed {example['seed']}, maps of step 5", color=GREY)
    for row, (name, one) in zip(grid, drawn):
        draw_picture(row[0], one.picture)
        row[0].set_title(name, size=10, color=INK)
        for axes, word in zip(row[1:], words):
            attention = one.attentions["maps"][4, word]
            draw_map(axes, attention, float(attention.max()), one.picture)
            axes.set_title(seen["tokens"][word], size=9, color=INK)
    save(fig, ROOT / "docs" / "contrast.png")


def main():
    pipe = PixArtAlphaTSAMPipeline.from_pretrained(MODELS["pixart"])
    if not (RESULTS / "contrast.json").exists():
        (RESULTS / "contrast.json").write_text(json.dumps(measure(pipe, 80), indent=0) + "\n", encoding="utf-8")
    rows = read("contrast.json")
    stock = [row for row in rows if row["name"] == "stock"]
    for step in (0, 4, 9):
        split = [[row["losses"][step] for row in stock if row["counted"] == right] for right in (True, False)]
        print(f"step {step + 1}: the area under the ROC curve is {auc(*split):.2f}")
    figure(pipe, rows)


if __name__ == "__main__":
    main()

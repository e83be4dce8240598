"""Is a solid where it was asked for? Stock, layout, and T-SAM with layout from the same latents, read by the judge.

    python benchmarks/layout.py --setting "tuned,objective=none" tuned "tuned,region_weight=0"

Every prompt's solids get quarters of the picture at random, no two the same. One JSON line a picture goes to --output
(a stopped run goes on where it was), the table to the terminal; `report.py` makes the documents' table of the lines
that are committed. Intervals are 95 %, over prompts.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from alignment import PROMPT_SEED, RESULTS, draw, interval, parse_setting, solids_of
from diffusers.utils import logging

import diffusers_tsam
from diffusers_tsam import FAMILIES
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.shapes.scenes import prompts


QUARTERS = [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.5) for x in (0.0, 0.5)]


def regions_of(captions, seed=PROMPT_SEED):
    """{caption: {"red cube": one of QUARTERS, ...}}, drawn in the captions' order."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for caption in captions:
        solids = [" ".join(solid) for solid in solids_of(caption)]
        quarters = rng.permutation(len(QUARTERS))[: len(solids)].tolist()
        chosen[caption] = {solid: QUARTERS[k] for solid, k in zip(solids, quarters)}
    return chosen


def read(path):
    return [judged(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def judged(row):
    """A picture's line with the shares of its solids that are seen, and that are seen where they were asked for."""
    places = {f"{colour} {solid}": (x, y) for colour, solid, x, y in row["places"]}
    seen = [name in places for name in row["regions"]]
    placed = [name in places and inside(places[name], box) for name, box in row["regions"].items()]
    return row | {"seen": np.mean(seen), "placed": np.mean(placed), "all": all(placed)}


def inside(place, box):
    return all(start <= at < end for at, start, end in zip(place, box[:2], box[2:]))


def table(rows, names, label=str):
    """Markdown table of rows as `judged` makes them."""
    lines = ["| setting (pictures) | solids where asked | all of a picture's | solids drawn |", "|---|---|---|---|"]
    for name in names:
        own = [row for row in rows if row["setting"] == name]
        cells = []
        for key in ("placed", "all", "seen"):
            mean, half = interval([row[key] for row in own], [row["caption"] for row in own])
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f} %")
        lines.append(f"| {label(name)} ({len(own)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="sd", choices=tuple(FAMILIES))
    parser.add_argument("--split", default="test", choices=("tune", "test"))
    parser.add_argument("--solids", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--setting", nargs="+", default=["tuned"], help="as those of alignment.py, with region_weight")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "layout.jsonl")
    args = parser.parse_args()

    logging.disable_progress_bar()
    pipe = getattr(diffusers_tsam, FAMILIES[args.pipeline].pipeline).from_pretrained(MODELS[args.pipeline])
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.from_pretrained()
    wanted = regions_of([caption for caption, _ in prompts(args.solids, args.split, args.prompts, PROMPT_SEED)])

    args.output.parent.mkdir(parents=True, exist_ok=True)
    run = {"pipeline": args.pipeline, "split": args.split, "solids": args.solids, "steps": args.steps}
    rows = [row for row in read(args.output) if run.items() <= row.items() and row["caption"] in wanted]
    names = ["stock", *(name for name in args.setting if name != "stock")]
    with args.output.open("a") as file, torch.no_grad():
        for name in names:
            had = {row["caption"] for row in rows if row["setting"] == name}
            todo, started = [caption for caption in wanted if caption not in had], time.time()
            for first in range(0, len(todo), args.batch):
                captions = todo[first : first + args.batch]
                setting = {**ARGUMENTS[args.pipeline], **parse_setting(name, args.pipeline)}
                setting["regions"] = [wanted[caption] for caption in captions]
                images, losses = draw(pipe, [(caption, 0) for caption in captions], setting, args.steps)
                for caption, places, loss in zip(captions, judge.locate(images), losses):
                    row = {
                        **run,
                        "setting": name,
                        "caption": caption,
                        "regions": wanted[caption],
                        "places": sorted([*pair, *place] for pair, place in places.items()),
                        "updates": len(loss),
                    }
                    file.write(json.dumps(row) + "\n")
                    rows.append(judged(row))
                file.flush()
            if todo:
                print(f"{name}: {len(todo)} pictures, {(time.time() - started) / len(todo):.2f} s each", flush=True)
    print(table(rows, names))


if __name__ == "__main__":
    main()

"""Does T-SAM help? Stock and other settings' pictures from the same latents, read by the judge.

    python benchmarks/alignment.py --solids 3 --prompts 100 --seeds 3 --setting tuned conform,alpha=4

Prompts come from pairs of coloured solids that training never showed together: `tune` to choose settings on, `test` to
report. One JSON line a picture goes to --output (a stopped run goes on where it was), the table to the terminal;
`report.py` makes the documents' tables of the lines that are committed. Intervals are 95 %, over prompts (each prompt's
seeds are one cluster), paired for the difference.
"""

import argparse
import functools
import json
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging

import diffusers_tsam
from diffusers_tsam import FAMILIES
from diffusers_tsam.evaluation.baselines import attend_and_excite_loss, conform_loss, syngen_loss, told
from diffusers_tsam.evaluation.report import interval as interval_of_means
from diffusers_tsam.shapes import ARGUMENTS, MODELS, TUNED
from diffusers_tsam.shapes.judge import Judge, verdict
from diffusers_tsam.shapes.scenes import prompts, words_of_solids


RESULTS = Path(__file__).parent / "results"
PROMPT_SEED = 1  # others than the tests draw, and than an earlier report looked at
PEERS = {  # losses that are told the words; without a number those whose maps suit these models
    "attend_and_excite": functools.partial(attend_and_excite_loss, sharpness=None),
    "attend_and_excite_100": attend_and_excite_loss,
    "conform": functools.partial(conform_loss, sharpness=None),
    "conform_100": conform_loss,
    "syngen": syngen_loss,
}
TUPLES, WORDS = ("refinement_steps", "attention_layers"), ("objective", "schedule")
INTEGERS = ("tsam_steps", "refinement_iterations")


def parse_setting(text, pipeline="sd"):
    """The arguments of one of FAMILIES.

    text: "stock"; "paper" (the pipeline's defaults); "tuned"; one of PEERS, with the tuned schedule; or any of these
    and others changed, as "tuned,alpha=2,refinement_steps=0+2+4,attention_layers=10+18"; refinement_steps may be none.
    """
    name, *changes = text.split(",")
    if "=" in name:
        name, changes = "paper", [name, *changes]
    named = {"stock": {"tsam_steps": 0}, "paper": {}, "tuned": TUNED[pipeline]}
    peers = {peer: {"schedule": "fast", "objective": told(loss)} for peer, loss in PEERS.items()}
    setting = dict({**named, **peers}[name])
    for part in changes:
        key, value = part.split("=")
        if key in TUPLES:
            setting[key] = () if value == "none" else tuple(map(int, value.split("+")))
        elif value == "none":
            setting[key] = None
        else:
            setting[key] = value if key in WORDS else int(value) if key in INTEGERS else float(value)
    return setting


def generators_of(jobs):
    """A generator for every (caption, seed)."""
    return [torch.Generator().manual_seed(zlib.crc32(f"{caption} {seed}".encode())) for caption, seed in jobs]


def draw(pipe, jobs, setting, steps):
    """Pictures of (caption, seed) jobs, each from its own seed's latents, and T-SAM's losses."""
    output = pipe(
        [caption for caption, _ in jobs],
        num_inference_steps=steps,
        generator=generators_of(jobs),
        output_type="np",
        **setting,
    )
    return (output.images * 255).round().astype(np.uint8), output.losses


def solids_of(caption):
    """The (colour, solid) that a caption asks for."""
    words = caption.split()
    return [(words[colour], words[noun]) for colour, noun in words_of_solids(caption)]


def judged(row):
    """A picture's line with the judge's verdict."""
    return row | verdict(solids_of(row["caption"]), map(tuple, row["seen"]))


def load(path):
    """The judged lines of a file, none where there is no such file."""
    return [judged(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def interval(values, clusters):
    """Mean and half-width of its 95 % interval, with one cluster a prompt."""
    return interval_of_means([np.mean([v for v, c in zip(values, clusters) if c == k]) for k in sorted(set(clusters))])


def paired(rows, name, base):
    """(row, the row of the same picture with setting `base`) for every row with setting `name` that has one."""
    theirs = {(row["caption"], row["seed"]): row for row in rows if row["setting"] == base}
    own = ((row, theirs.get((row["caption"], row["seed"]))) for row in rows if row["setting"] == name)
    return [(row, other) for row, other in own if other]


def gain(pairs):
    """`interval` of how many more pictures are right than with the other setting of `paired`."""
    return interval([row["present"] - other["present"] for row, other in pairs], [row["caption"] for row, _ in pairs])


def table(rows, names):
    """Markdown table of rows (dicts as in the JSON lines); the others are compared with the first setting."""
    lines = ["| setting | right | difference | every object | a swap |", "|---|---|---|---|---|"]
    for name in names:
        pairs = paired(rows, name, names[0])
        own = [row for row, _ in pairs]
        clusters = [row["caption"] for row in own]
        cells = []
        for key in ("present", "objects", "swap"):
            mean, half = interval([row[key] for row in own], clusters)
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f} %")
        mean, half = gain(pairs)
        difference = "" if name == names[0] else f"{100 * mean:+.1f} ± {100 * half:.1f}"
        lines.append(f"| {name} ({len(own)}) | {cells[0]} | {difference} | {cells[1]} | {cells[2]} |")
    return "\n".join(lines)


def confusion(rows, names, label=str):
    """Markdown table: what became of the solids that were asked for, and how many came unasked a picture."""
    fates = ("drawn", "in another colour", "as another solid", "absent")
    lines = ["| setting | " + " | ".join(fates) + " | unasked |", "|---|" + "---|" * (len(fates) + 1)]
    for name in names:
        counts, extra, own = Counter(), 0, [row for row in rows if row["setting"] == name]
        for row in own:
            wanted = set(solids_of(row["caption"]))
            seen = {tuple(pair) for pair in row["seen"]}
            for colour, solid in wanted:
                if (colour, solid) in seen:
                    counts["drawn"] += 1
                elif any(solid == other for _, other in seen):
                    counts["in another colour"] += 1
                elif any(colour == other for other, _ in seen - wanted):
                    counts["as another solid"] += 1
                else:
                    counts["absent"] += 1
            extra += len({solid for _, solid in seen} - {solid for _, solid in wanted})
        cells = [f"{100 * counts[fate] / counts.total():.1f} %" for fate in fates]
        lines.append(f"| {label(name)} | " + " | ".join(cells) + f" | {extra / len(own):.2f} |")
    return "\n".join(lines)


def draw_missing(path, run, names, jobs, size, draw_some):
    """The judged rows of (caption, seed) jobs by settings: those that `path` has, and what is drawn and added to it.

    run: what all rows have in common. draw_some(name, jobs): pictures and losses of at most `size` jobs.
    """
    judge, rows = Judge.from_pretrained(), []
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [row for row in load(path) if run.items() <= row.items() and row.get("model") == run.get("model")]
    with path.open("a") as file:
        for name in names:
            had = {(row["caption"], row["seed"]): row for row in done if row["setting"] == name}
            rows += [had[job] for job in jobs if job in had]
            todo, started = [job for job in jobs if job not in had], time.time()
            for first in range(0, len(todo), size):
                batch = todo[first : first + size]
                images, losses = draw_some(name, batch)
                for (caption, seed), seen, loss in zip(batch, judge.read(images), losses):
                    ends = (loss[[0, -1]] if len(loss) else loss).tolist()
                    row = {**run, "setting": name, "caption": caption, "seed": seed, "seen": sorted(map(list, seen))}
                    row |= {"updates": len(loss), "loss": [round(x, 3) for x in ends]}
                    file.write(json.dumps(row) + "\n")
                    rows.append(judged(row))
                file.flush()
            if todo:
                print(f"{name}: {len(todo)} pictures, {(time.time() - started) / len(todo):.2f} s each", flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="sd", choices=tuple(FAMILIES))
    parser.add_argument("--model", type=Path, help="folder of another model of the shapes world")
    parser.add_argument("--split", default="test", choices=("tune", "test", "train"))
    parser.add_argument("--solids", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--prompts", type=int, default=70)
    parser.add_argument("--seeds", type=int, default=6, help="pictures a prompt")
    parser.add_argument("--setting", nargs="+", default=["paper"], help='"tuned", "paper,alpha=2,objective=l1_full"')
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="faster after a minute")
    parser.add_argument("--output", type=Path, default=RESULTS / "alignment.jsonl")
    args = parser.parse_args()

    logging.disable_progress_bar()
    family = FAMILIES[args.pipeline]
    pipe = getattr(diffusers_tsam, family.pipeline).from_pretrained(
        args.model or MODELS[args.pipeline], dtype=getattr(torch, args.dtype)
    )
    pipe.to(args.device).set_progress_bar_config(disable=True)
    if args.compile:
        getattr(pipe, family.denoiser).compile()
    wanted = prompts(args.solids, args.split, args.prompts, PROMPT_SEED)
    jobs = [(caption, seed) for seed in range(args.seeds) for caption, _ in wanted]

    run = {"pipeline": args.pipeline, "split": args.split, "steps": args.steps, "solids": args.solids}
    if args.model:
        run["model"] = args.model.name

    def draw_some(name, batch):
        setting = {**ARGUMENTS[args.pipeline], **parse_setting(name, args.pipeline)}
        return draw(pipe, batch, setting, args.steps)

    names = ["stock", *(name for name in args.setting if name != "stock")]
    rows = draw_missing(args.output, run, names, jobs, args.batch, draw_some)
    print(table(rows, names), confusion(rows, names), sep="\n\n")


if __name__ == "__main__":
    main()

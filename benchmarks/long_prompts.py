"""Does T-SAM help where a prompt has several sentences, or is longer than the text encoder's window?

    python benchmarks/long_prompts.py --pipeline sd --prompts 60
    python benchmarks/long_prompts.py --cost

Captions are of the words that the small models know, which have no full stop: their sentences end with a comma, which
training never showed. `sentences`: "a red cube , a blue sphere , a green ring". `filled`: behind each solid as many
random words of no solid ("of the next to and ...") as make the caption two of the small CLIP's windows. One JSON line a
picture goes to --output (a stopped run goes on where it was); `report.py` makes the documents' tables. --cost: time and
memory of the loss and its gradient, without a network, by the number of tokens.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from alignment import PROMPT_SEED, RESULTS, draw, judged, load, parse_setting
from cost import PeakMemory
from diffusers.utils import logging

import diffusers_tsam
from diffusers_tsam import FAMILIES, LatentAlignment, TextSelfAttention
from diffusers_tsam.shapes import ARGUMENTS, MODELS
from diffusers_tsam.shapes.judge import Judge
from diffusers_tsam.shapes.scenes import phrase, prompts


FILLERS = "and with the next to of a".split()
SENTENCE = 15  # tokens of a filled one: two of them fit the small CLIP's window
LONG = {"max_sequence_length": 90}
SETTINGS = {  # of each form of caption: name, of alignment.py's settings, and more
    "sentences": [("stock", "stock", {}), ("tuned", "tuned", {})],
    "filled": [("stock, cut", "stock", {}), ("stock", "stock", LONG), ("tuned", "tuned", LONG)],
}
ROOM = 75  # tokens of one of CLIP's windows


def caption_of(solids, form, rng):
    """Sentences of one solid each, to which `filled` adds words."""
    sentences = [phrase(*solid) for solid in solids]
    if form == "filled":
        number = SENTENCE - 4  # beside three words and a comma
        sentences = [f"{sentence} {' '.join(rng.choice(FILLERS, number))}" for sentence in sentences]
    return " , ".join(sentences)


def cost(lengths=(75, 150, 300, 600), repeats=20):
    """Milliseconds and peak bytes of the loss and its gradient with respect to the maps: of windows, and of as many
    tokens in one window, by their number."""
    found = {}
    for tokens in lengths:
        for name, window in (("windows", ROOM), ("one window", tokens)):
            attention = torch.rand(1, tokens, window)
            content = torch.ones(1, tokens, dtype=torch.bool)
            alignment = LatentAlignment(TextSelfAttention(attention, content, [["word"] * tokens]), 1.0, 2.0)
            maps = torch.rand(1, tokens, 16, 16, requires_grad=True)
            memory, times = PeakMemory(type("Nothing", (), {"components": {}})), []
            with memory:
                torch.autograd.grad(alignment.loss_of(maps).sum(), maps)
            for _ in range(repeats):
                started = time.process_time()
                torch.autograd.grad(alignment.loss_of(maps).sum(), maps)
                times.append(time.process_time() - started)
            found.setdefault(name, {})[tokens] = {
                "ms": round(1e3 * sorted(times)[repeats // 2], 2),
                "bytes": memory.peak,
            }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default="sd", choices=tuple(FAMILIES))
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--forms", nargs="+", default=list(SETTINGS), choices=tuple(SETTINGS))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "long_prompts.jsonl")
    args = parser.parse_args()
    if args.cost:
        (RESULTS / "long_prompts_cost.json").write_text(json.dumps(cost(), indent=1) + "\n")
        return

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipe = getattr(diffusers_tsam, FAMILIES[args.pipeline].pipeline).from_pretrained(MODELS[args.pipeline])
    pipe.set_progress_bar_config(disable=True)
    judge = Judge.from_pretrained()
    run = {"pipeline": args.pipeline, "split": "test", "steps": args.steps, "solids": 3}
    rows = [row for row in load(args.output) if run.items() <= row.items()]
    with args.output.open("a") as file, torch.no_grad():
        for form in args.forms:
            rng = np.random.default_rng(PROMPT_SEED)
            captions = [caption_of(solids, form, rng) for _, solids in prompts(3, "test", args.prompts, PROMPT_SEED)]
            for name, setting, more in SETTINGS[form]:
                had = {row["caption"] for row in rows if row["setting"] == name}
                todo, started = [caption for caption in captions if caption not in had], time.time()
                for first in range(0, len(todo), args.batch):
                    batch = todo[first : first + args.batch]
                    given = {**ARGUMENTS[args.pipeline], **parse_setting(setting, args.pipeline), **more}
                    images, losses = draw(pipe, [(caption, 0) for caption in batch], given, args.steps)
                    for caption, seen, loss in zip(batch, judge.read(images), losses):
                        row = {**run, "form": form, "setting": name, "caption": caption, "seed": 0}
                        row |= {"seen": sorted(map(list, seen)), "updates": len(loss)}
                        file.write(json.dumps(row) + "\n")
                        rows.append(judged(row))
                    file.flush()
                own = [row["present"] for row in rows if row["setting"] == name and row["form"] == form]
                seconds = (time.time() - started) / max(len(todo), 1)
                print(f"{form}, {name}: {np.mean(own):.1%} of {len(own)} right, {seconds:.2f} s each", flush=True)


if __name__ == "__main__":
    main()

"""Does T-SAM help a joint-attention transformer? The small SD3's pictures, stock and guided, read by the judge.

    python benchmarks/joint.py --prompts 24 --seeds 2 --setting light,attention_keys=all fast,relative_step=0.02

Settings are a schedule and changed arguments; pictures, verdicts and intervals are `alignment.py`'s. One JSON line a
picture goes to --output, and a stopped run goes on where it was.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from alignment import PROMPT_SEED, RESULTS, confusion, draw, draw_missing, parse_setting, table
from diffusers import ClassifierFreeGuidance
from diffusers.utils import logging

from diffusers_tsam import StableDiffusion3TSAMBlocks
from diffusers_tsam.shapes import JOINT_MODEL
from diffusers_tsam.shapes.scenes import prompts
from diffusers_tsam.shapes.train import SD3_TOKENS


BASE = {"objective": "attainable", "gamma": 4.0, "relative_step": 0.05}  # as the small PixArt-α's


def anywhere(maps, text):
    """A control: an objective that moves as far, but to where chance says."""
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
    return (maps * noise.to(maps)).sum((1, 2, 3))


def parse(text):
    """The arguments of "stock", or of a schedule and changes, as "light,attention_layers=2+4,attention_keys=all";
    objective=anywhere is the control."""
    schedule, *changes = text.split(",")
    if schedule == "stock":
        return {"tsam_steps": 0}
    own = {key: value for key, value in (change.split("=") for change in changes) if key == "attention_keys"}
    others = [change for change in changes if not change.startswith("attention_keys")]
    arguments = {**BASE, "schedule": schedule, **own, **parse_setting(",".join(["paper", *others]))}
    return arguments | ({"objective": anywhere} if arguments["objective"] == "anywhere" else {})


def load_pipeline(model, guidance_scale):
    """A function with the call of our classic pipelines."""
    pipe = StableDiffusion3TSAMBlocks().get_workflow("text2image").init_pipeline(str(model))
    pipe.load_components(dtype=torch.float32)
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance_scale))
    pipe.set_progress_bar_config(disable=True)

    def call(captions, **arguments):
        state = pipe(prompt=captions, negative_prompt="", max_sequence_length=SD3_TOKENS, **arguments)
        return SimpleNamespace(images=state.get("images"), losses=state.get("losses"))

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=JOINT_MODEL, help="folder of another small SD3")
    parser.add_argument("--split", default="tune", choices=("tune", "test", "train"))
    parser.add_argument("--solids", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2, help="pictures a prompt")
    parser.add_argument("--setting", nargs="+", default=["light"])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--output", type=Path, default=RESULTS / "joint.jsonl")
    args = parser.parse_args()

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    pipe = load_pipeline(args.model, args.guidance_scale)
    wanted = prompts(args.solids, args.split, args.prompts, PROMPT_SEED)
    jobs = [(caption, seed) for seed in range(args.seeds) for caption, _ in wanted]
    run = {"split": args.split, "solids": args.solids, "steps": args.steps, "guidance_scale": args.guidance_scale}
    names = ["stock", *args.setting]
    draw_some = lambda name, batch: draw(pipe, batch, parse(name), args.steps)  # noqa: E731
    rows = draw_missing(args.output, run, names, jobs, args.batch, draw_some)
    print(table(rows, names), confusion(rows, names), sep="\n\n")


if __name__ == "__main__":
    main()

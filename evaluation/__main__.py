"""`python -m diffusers_tsam.evaluation`: generate, score, report, sweep."""

import argparse
import re
import sys
from itertools import product
from pathlib import Path

from ..cli import INTERRUPTED


def numbers(text):
    return [float(part) for part in text.split(",")]


def words(text):
    return text.split(",")


def arguments():
    parser = argparse.ArgumentParser("python -m diffusers_tsam.evaluation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def drawing(command):
        add = command.add_argument
        add("--model", required=True, help="a folder or Hub id, or sd, sink, pixart or sd3, which ship")
        sets = "objects, animals-objects, animals, a file, or shapes (quarters, sentences, filled):SOLIDS:SPLIT:NUMBER"
        add("--prompts", required=True, help=sets)
        add("--seeds", type=int, default=1, help="pictures a prompt and method (1)")
        add("--output", required=True, help="the run's folder, which goes on where it was stopped")
        add("--steps", type=int, default=50, help="denoising steps (50)")
        add("--guidance-scale", type=float, help="the pipeline's own")
        add("--batch", type=int, default=8, help="pictures at once on a device, free to change (8)")
        add("--dtype", choices=("float32", "float16", "bfloat16"), help="float32 on a cpu, else float16")
        add("--parser", help="a spaCy model, for prompts that no template fits")
        add("--format", choices=("png", "jpg", "webp"), default="png", help="of the pictures (png)")

    def scoring(command):
        add = command.add_argument
        add("--metrics", type=words, default=["clip"], help="clip, caption, tifa, judge, joined by commas (clip)")
        add("--questions", help="TIFA's question file")
        add("--clip", help="a CLIP (openai/clip-vit-base-patch16)")
        add("--blip", help="a BLIP that captions (Salesforce/blip-image-captioning-base)")
        add("--vqa", help="a BLIP that answers (Salesforce/blip-vqa-base)")
        add("--sentences", help="finds the nearest choice, or none (sentence-transformers/all-mpnet-base-v2)")
        add("--score-batch", type=int, default=32, help="pictures at once (32)")

    command = commands.add_parser("generate", help="draw prompts by methods, on one process or many")
    drawing(command)
    methods = 'stock, tsam, conform, "tsam:alpha=20:objective=my.py:function", ... joined by commas'
    command.add_argument("--methods", type=words, default=["stock", "tsam"], help=methods)
    command.add_argument("--keep", help="what to keep of every picture: my.py:function of (pipeline, prompts, output)")
    command = commands.add_parser("score", help="score a run's pictures")
    command.add_argument("run")
    scoring(command)
    command = commands.add_parser("report", help="a run's tables and pictures, as Markdown and HTML")
    command.add_argument("run")
    command = commands.add_parser("sweep", help="alpha x gamma on tuning prompts, then the best on others")
    drawing(command)
    scoring(command)
    add = command.add_argument
    add("--report-prompts", required=True, help="other prompts, which the best setting and stock are reported on")
    add("--alphas", type=numbers, default=[5.0, 10.0, 20.0, 40.0], help="joined by commas (5,10,20,40)")
    add("--gammas", type=numbers, default=[1.0, 2.0, 4.0], help="joined by commas (1,2,4)")
    add("--presets", type=words, default=["paper"], help="joined by commas (paper)")
    add("--objectives", type=words, default=["l1"], help="joined by commas (l1)")
    return parser


def draw(args, **changes):
    from .generate import generate

    names = ("model", "methods", "prompts", "seeds", "output", "steps", "guidance_scale", "batch", "dtype", "parser")
    given = {name: getattr(args, name, None) for name in (*names, "format", "keep")}
    return generate(**given | changes)


def rate(args, folder):
    from .score import score

    names = ("questions", "clip", "blip", "vqa", "sentences", "score_batch")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if given.get("sentences") == "none":
        given["sentences"] = None
    return score(folder, args.metrics, **given)


def sweep(args):
    """Tune on one set of prompts, report the best setting on another."""
    from . import prompts
    from .report import COLUMNS, Scores, report
    from .runs import processes
    from .score import check

    check(args.metrics, args.questions, args.score_batch)
    tuning, reported = ({p.text for p in prompts.load(spec)} for spec in (args.prompts, args.report_prompts))
    if tuning & reported:
        raise ValueError(
            f"{len(tuning & reported)} prompts are in both sets, the first of them {min(tuning & reported)!r}."
            " Tune on others than you report."
        )
    grid = product(args.objectives, args.presets, args.alphas, args.gammas)
    methods = [f"tsam:objective={o}:preset={s}:alpha={a:g}:gamma={g:g}" for o, s, a, g in grid]
    output = Path(args.output)
    scores = Scores(rate(args, draw(args, methods=["stock", *methods], output=output / "tune").folder))
    key = next(key for key, column in COLUMNS.items() if key in scores.values and column.metric == args.metrics[0])
    best = max(methods, key=lambda name: scores.gain(scores.run.methods.index(name), key)[0])
    run = draw(args, methods=["stock", best], prompts=args.report_prompts, output=output / "test")
    run = rate(args, run.folder)
    texts = [report(folder) for folder in (output / "tune", run.folder) if processes().is_main_process]
    return said(
        f"The best on {args.prompts} by {COLUMNS[key].title}: {best}. On {args.report_prompts}:", "", *texts[1:]
    )


def said(*lines):
    """The lines, in the main process only."""
    from .runs import processes

    return lines if processes().is_main_process else ()


def run(args):
    """The lines that a command prints."""
    from .baselines import unbound

    if args.command == "generate":
        drawn = draw(args)
        return said(f"{drawn.folder}: drawn", *unbound(drawn.methods, drawn.prompts))
    if args.command == "score":
        return said(f"{rate(args, args.run).folder}: scored")
    if args.command == "sweep":
        return sweep(args)
    from .report import report

    return [report(args.run), str(Path(args.run) / "report.html")]


def main(argv=None):
    parser = arguments()
    args = parser.parse_args(argv)
    try:
        print(*run(args), sep="\n")
    except ModuleNotFoundError as error:
        sys.exit(f"evaluation: {error.name} is missing. Install diffusers-tsam[eval], and [eval_spacy] for --parser.")
    except KeyboardInterrupt:
        print("evaluation: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (OSError, ValueError) as error:
        flags = vars(args)
        said = re.sub(r"`(\w+)`", lambda m: f"--{m[1].replace('_', '-')}" if m[1] in flags else m[0], str(error))
        sys.exit(f"evaluation: {said}")


if __name__ == "__main__":
    main()

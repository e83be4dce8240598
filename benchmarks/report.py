"""Make the documents' tables and pictures, and the model cards' sentences, of what was measured.

    python benchmarks/report.py           # from benchmarks/results/ into README.md, RESULTS.md and docs/
    python benchmarks/report.py --check   # only say what would change

A document has a pair of comments, `<!-- name -->` and `<!-- /name -->`, round every part that is made here. The
headline is of the evaluation's counted runs, results/evaluation/MODEL-SOLIDS-counted.
"""

import argparse
import json
import re
import sys

import mechanism
import numpy as np
import starts
import tuning
from matplotlib.figure import Figure
from rows import RESULTS, ROOT, SMALL, WORDS, by_solids, of_run, read, runs_of

from diffusers_tsam import FAMILIES, MODULAR
from diffusers_tsam.evaluation.report import BLUE, Scores, interval, markdown, table_of
from diffusers_tsam.figures import GREY, save
from diffusers_tsam.tsam_arguments import PRESETS, T5_PRESETS


DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE = {"sd": "Stable Diffusion 1.5", "pixart": "PixArt-XL-2, its text encoder apart"}
PEERS = {"attend_and_excite": "Attend-and-Excite", "conform": "CONFORM", "syngen": "SynGen", "focus": "FOCUS"}
OURS = {f"tsam:preset={name}": f'T-SAM, `preset="{name}"`' for name in ("fast", "light")}
OURS["tsam"] = 'T-SAM, `preset="paper"`'
BEST_PEER = "the best peer of these pictures, told the words"
DOTS = {"stock": GREY, "tsam:preset=light": "#7fb2de", "tsam:preset=fast": BLUE, BEST_PEER: mechanism.ORANGE}
WRONG = {"double": "a solid too many", "touching": "touching", "missing": "a solid missing", "swap": "a swap"}
COLUMNS_OF = {  # of four solids, of prompts with regions, and of long ones
    "four": ("counted", "missing", "swap"),
    "layout": ("counted", "placed", "all_placed", "missing"),
    "sentences": ("counted", "double", "missing"),
    "filled": ("counted", "double", "missing"),
}


def parsed(setting):
    """A method's name, and its arguments as they are written."""
    name, *changes = setting.split(":")
    return name, dict(change.split("=") for change in changes)


def described(setting):
    """A method of the evaluation in words."""
    name, given = parsed(setting)
    if name == "stock":
        return "stock"
    if name in PEERS:
        first = f"{PEERS[name]}'s loss, words given"
    else:
        first = f"`{given.pop('objective', PRESETS[given.get('preset', 'paper')].objective)}`"
    order = sorted(given.keys() - {"gamma", "sharpness"}, key=lambda key: (key != "preset", key))
    return ", ".join([first, *(f"{key.replace('alpha', 'α').replace('_', ' ')} {given[key]}" for key in order)])


# ----------------------------------------------------------------------------------------------------------------------
# The headline: counted runs


def measured():
    """Counted runs' `Scores` and the starts, both `by_solids`, and {model: rows} of how the sink works."""
    models = {name: of_run(run) for name, run in sorted(runs_of("mechanism-{}").items())}
    return by_solids("{}-{}-counted", Scores), by_solids("starts-{}-{}", starts.starts_of), models


def drawn(scores, name):
    """How many of a method's pictures were counted."""
    methods = scores.run.methods
    return int(np.isfinite(scores.values["counted"][methods.index(name)]).sum()) if name in methods else 0


def percent(scores, name, key="counted", of=Scores.of):
    """Percent of a method's pictures in which `key` holds, or its points over stock, and half of the interval."""
    return tuple(100 * x for x in of(scores, scores.run.methods.index(name), key))


def share(scores, name, key="counted"):
    """The same in words."""
    return "{:.1f} ± {:.1f} %".format(*percent(scores, name, key))


def gain(scores, name):
    """Points over stock in words, and of how many pictures where these are fewer than stock's."""
    own = drawn(scores, name)
    words = "{:+.1f} ± {:.1f}".format(*percent(scores, name, of=Scores.gain)) if own else ""
    return words + f" of {own}" * (0 < own < drawn(scores, "stock"))


def best_peer(scores):
    """Of the methods that are told the words, the one that gains most; None where none was drawn."""
    peers = [name for name in scores.run.methods if parsed(name)[0] in PEERS and drawn(scores, name)]
    return max(peers, key=lambda name: percent(scores, name, of=Scores.gain), default=None)


def named(name):
    """A peer's name and preset."""
    loss, given = parsed(name)
    return f"{PEERS[loss]}, {given.get('preset', 'paper')}"


def counted_table(counted):
    """The headline: a row a method, a column a model: counted right, in points over stock."""
    models, rows = [name for name in SMALL if any(name in runs for runs in counted.values())], []

    def row(name, runs, of):
        return [name, *(of(runs[model]) if model in runs else "" for model in models)]

    def of_peer(scores):
        name = best_peer(scores)
        return f"{gain(scores, name)} ({named(name)})" if name else ""

    for solids, runs in counted.items():
        rows.append(row(f"stock, {WORDS[solids]} solids", runs, lambda scores: share(scores, "stock")))
        rows += [row(own, runs, lambda scores, name=name: gain(scores, name)) for name, own in OURS.items()]
        rows.append(row(BEST_PEER, runs, of_peer))
    return markdown(["counted right", *map(SMALL.get, models)], rows)


def overall_sentence(counted):
    """What one setting adds to stock over the pictures of all models, two and three solids: ours, and the best peer."""
    cells = [scores for runs in counted.values() for scores in runs.values()]
    gains = {
        name: np.concatenate([scores.gains(scores.run.methods.index(name), "counted") for scores in cells])
        for name in cells[0].run.methods
        if all(drawn(scores, name) for scores in cells)
    }
    best = max((name for name in gains if parsed(name)[0] in PEERS), key=lambda name: gains[name].mean())
    words = {name: own.removeprefix("T-SAM, ") for name, own in OURS.items()}
    words |= {best: f"the best peer at one preset, {named(best)},"}
    each = {own: gains[name] for name, own in words.items()}
    each |= {'`preset="fast"` over that peer': gains["tsam:preset=fast"] - gains[best]}
    said = ("{} {:+.1f} ± {:.1f}".format(own, *(100 * x for x in interval(of))) for own, of in each.items())
    pictures = sum(drawn(scores, "stock") for scores in cells)
    return f"Over all {pictures} pictures, points over stock: {'; '.join(said)}."


def counted_tables(runs):
    """Every method of every model: how many pictures are right, and what it makes of stock's wrong and right ones."""
    tables, head = [], ["setting (pictures)", "right", "points over stock", "fixes", "keeps", *WRONG.values()]
    for model, scores in runs.items():
        right, lines = scores.values["counted"], {}
        for method, name in enumerate(scores.run.methods):
            if drawn(scores, name):
                words = OURS.get(name) or described(name).replace(", relative step 0.05", "")
                parts = [right[method][np.isfinite(right[method]) & (right[scores.stock] == k)] for k in (0, 1)]
                parts = [f"{100 * part.mean():.0f} % of {part.size}" if part.size else "-" for part in parts]
                parts = [gain(scores, name), *parts] if method != scores.stock else [""] * 3
                shares = [share(scores, name, key) for key in ("counted", *WRONG)]
                line = [f"{words} ({drawn(scores, name)})", shares[0], *parts, *shares[1:]]
                lines[method != scores.stock, -np.nanmean(right[method]), method] = line
        tables.append(f"The small {SMALL[model]}:\n\n" + markdown(head, [lines[key] for key in sorted(lines)]))
    return "\n\n".join(tables)


def counted_figure(counted):
    """The headline as a picture: dots with 95 % intervals, by model, of two and of three solids."""
    fig = Figure((11, 4), dpi=120, layout="constrained", facecolor="white")
    for axes, (solids, runs) in zip(fig.subplots(1, 2, sharey=True), counted.items()):
        for offset, (name, colour) in enumerate(DOTS.items()):
            found = [percent(scores, best_peer(scores) if name == BEST_PEER else name) for scores in runs.values()]
            at, label = np.arange(len(found)) + (offset - 1.5) * 0.14, OURS.get(name, name).replace("`", "")
            axes.errorbar(at, *np.array(found).reshape(-1, 2).T, fmt="o", capsize=3, color=colour, label=label)
        axes.set_xticks(range(len(runs)), [SMALL[name] for name in runs])
        axes.set(title=f"{WORDS[solids]} solids", ylim=(0, 108), yticks=range(0, 101, 20))
        axes.spines[["top", "right"]].set_visible(False)
    fig.axes[0].set_ylabel("counted right, %")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return fig


def card_sentence(scores, name="tsam:preset=fast"):
    """What a model's card says of its counted run of two solids."""
    return (
        f"two solids were right in {share(scores, name)} of {drawn(scores, name)} pictures with T-SAM"
        f' (`preset="fast"`), in {share(scores, "stock")} with stock: {gain(scores, name)} points.'
    )


# ----------------------------------------------------------------------------------------------------------------------
# Costs, the mechanism, presets


def operations_table(part, names):
    rows = []
    for kind, found in read("cost.json")[part].items():
        plain, guided = found["plain_step_flop"], found["guided_pass_flop"]
        cells = [names[kind], f"{guided / 1e9:.0f} of {plain / 1e9:.0f} GFLOP, {guided / plain:.2f}x"]
        cells += [f"{starts.cost_of(found, name):.2f}x ({n} passes)" for name, n in found["passes"].items()]
        rows.append([*cells, f"{found['guided_peak_bytes'] / found['plain_peak_bytes']:.2f}x"])
    head = ["", "a guided pass beside a plain step", *(f'a picture, `"{name}"`' for name in found["passes"])]
    return markdown([*head, "peak memory beside plain"], rows)


def cost_table(part, head, names, words):
    """A row a model, a column a number of cost.json's `part`, each in `words`."""
    found = read("cost.json")[part]
    rows = [[names[kind], *map(words, own.values())] for kind, own in found.items()]
    return markdown([head, *next(iter(found.values()))], rows)


def overhead_sentence():
    found = read("cost.json")["overhead"]
    return (
        f"{found['call']} ms once a call and {found['update']} ms an update, {100 * found['share']:.2g} % of a plain"
        f" step's {found['plain step'] / 1e3:.1f} s (on one core of a CPU, float32)"
    )


def mechanism_table(models):
    """What embeddings, T and maps say of who belongs to whom, a row a model."""
    found = {f"{SMALL[name]} ({len(rows)})": mechanism.numbers_of(rows) for name, rows in models.items()}
    head = ["model (pictures)", *next(iter(found.values()))]
    return markdown(head, [[name, *own.values()] for name, own in found.items()])


def overlap_table(models):
    """Fig. 4: the two solids' maps, and a solid's with its own and the other's colour, in right and wrong pictures."""
    pairs = {"objects": "two solids", "bound": "a solid and its colour", "unbound": "a solid and the other's colour"}
    columns = [(kind, which) for kind in pairs for which in ("right", "missing" if kind == "objects" else "swap")]
    rows = [[SMALL[name], *(mechanism.similarity_when(own, *of) for of in columns)] for name, own in models.items()]
    titles = (f"{pairs[kind]}, {WRONG.get(which, which)}" for kind, which in columns)
    return markdown(["C at 40 % of the steps", *titles], rows)


def sink_sentence(runs, sink="sink", control="sd", ours="tsam:preset=fast"):
    """What the documents say of the model with a sink that ships, beside the one without. runs: of two solids."""

    def said(model, setting):
        right, swap = (share(runs[model], setting, key) for key in ("counted", "swap"))
        return f"{right} of {drawn(runs[model], setting)} pictures right", swap

    (stock, swapped), (guided, mended), (without, few) = said(sink, "stock"), said(sink, ours), said(control, "stock")
    return (
        f"stock gets two solids in {stock}, and T-SAM in {guided} ({gain(runs[sink], ours)} points); colours are"
        f" swapped in {swapped} and in {mended}. Without a sink, stock has {without} and {few} swapped."
    )


def mechanism_figure(models, runs):
    """Fig. 2 and 6, with the shares of right pictures in `runs`, of two solids."""
    methods = {"stock": "stock", "T-SAM": "tsam:preset=fast"}
    right = {label: {name: percent(runs[name], own) for name in models} for label, own in methods.items()}
    return mechanism.picture(models, "sink", right)


def presets_table():
    """What each preset of the arguments means."""

    def cells(preset):
        size = f"α = {preset.alpha:g}" if preset.relative_step is None else f"relative step {preset.relative_step:g}"
        gamma = "-" if preset.objective == "contrast" else f"{preset.gamma:g}"
        *first, last = [str(percent) for percent in preset.refined] or [""]
        more = f"{preset.iterations} % of the steps' number at {', '.join(first)} and {last} %" if last else "none"
        return [f"`{preset.objective}`", size, gamma, f"the first {preset.guided} %", more]

    rows = []
    for name, preset in PRESETS.items():
        of_t5 = [] if T5_PRESETS[name] == preset else [[f'`"{name}"`, all others', *cells(T5_PRESETS[name])]]
        rows += [[f'`"{name}"`' + ", Stable Diffusion and SDXL" * bool(of_t5), *cells(preset)], *of_t5]
    return markdown(["preset", "objective", "size of an update", "γ", "guided steps", "extra updates"], rows)


def parts(counted, chosen, models):
    """{name: Markdown} of everything that a document may hold, of what was `measured`."""
    found = {
        "operations": operations_table("operations", TABLE),
        "modular": operations_table("modular", {kind: blocks.name for kind, blocks in MODULAR.items()}),
        "overhead": overhead_sentence(),
        "launches": cost_table(
            "launches", "calls of operators", TABLE, lambda n: f"{n['calls']}, {n['kernels']} kernels"
        ),
        "small": cost_table("small", "seconds", SMALL, "{}x".format),
        "presets": presets_table(),
        "counted": counted_table(counted),
        "overall": overall_sentence(counted),
        "tuning": tuning.tables(),
        "mechanism": mechanism_table(models),
        "overlap": overlap_table(models),
        "sink-sentence": sink_sentence(counted[2]),
        **{f"counted-{solids}": counted_tables(runs) for solids, runs in counted.items()},
        **{f"starts-{solids}": starts.tables(of_models) for solids, of_models in chosen.items()},
    }
    for form, keys in COLUMNS_OF.items():
        runs = runs_of(f"{form}-{{}}").values()
        found |= {run.folder.name: markdown(*table_of(Scores(run), keys)) for run in runs}
    return found


def filled(text, found):
    """A document with its parts as they are now."""

    def fill(match):
        if match[1] not in found:
            raise ValueError(f"No part is called {match[1]!r}; there are {', '.join(found)}.")
        return f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def outputs(counted, chosen, models):
    """{path: text} of every document and of the cards' sentences, of what was `measured`."""
    found = parts(counted, chosen, models)
    texts = {path: filled(path.read_text(encoding="utf-8"), found) for path in DOCUMENTS}
    cards = {kind: card_sentence(scores) for kind, scores in counted[2].items() if kind in FAMILIES}
    return texts | {RESULTS / "summary.json": json.dumps({"card": cards}, indent=1, ensure_ascii=False) + "\n"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything would change")
    args = parser.parse_args()
    counted, chosen, models = measured()
    made = outputs(counted, chosen, models)
    changed = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    print(*(path.relative_to(ROOT) for path in changed), sep="\n")
    if args.check:
        sys.exit(bool(changed))
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    figures = {"mechanism": mechanism_figure(models, counted[2]), "starts": starts.figure(chosen)}
    for name, figure in (figures | {"counted": counted_figure(counted)}).items():
        save(figure, ROOT / "docs" / f"{name}.png")


if __name__ == "__main__":
    main()

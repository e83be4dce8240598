"""Make the documents' tables and pictures, and the model cards' sentences, of what was measured.

    python benchmarks/report.py           # from benchmarks/results/ into README.md, RESULTS.md and docs/
    python benchmarks/report.py --check   # only say what would change

A document has a pair of comments, `<!-- name -->` and `<!-- /name -->`, round every part that is made here.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import layout
import mechanism
from alignment import RESULTS, confusion, gain, interval, load, paired, parse_setting
from matplotlib.figure import Figure

from diffusers_tsam import FAMILIES, MODULAR
from diffusers_tsam.evaluation.report import Scores, markdown, table_of
from diffusers_tsam.evaluation.runs import Run
from diffusers_tsam.shapes import TUNED


ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "RESULTS.md", ROOT / "docs" / "evaluation.md"]
TABLE = {"sd": "Stable Diffusion 1.5", "pixart": "PixArt-XL-2, its text encoder apart"}
INK, GREY, BLUE = "#222222", "#777777", "#1f6fb4"


def read(name):
    return json.loads((RESULTS / name).read_text())


def described(setting):
    """A setting of `alignment.py` in words."""
    name, *changes = setting.split(",")
    if name == "stock":
        return "stock"
    given = dict(part.split("=") for part in ([name, *changes] if "=" in name else changes))
    peers = {"attend_and_excite": "Attend-and-Excite's loss", "conform": "CONFORM's loss", "syngen": "SynGen's loss"}
    first = f"{peers[name]}, tokens given" if name in peers else f"`{given.pop('objective', 'l1')}`"
    words = {"alpha": "α", "relative_step": "relative step", "schedule": "schedule"}
    order = sorted(set(given) - {"gamma"}, key=lambda key: (key != "schedule", key))  # γ is the same for all
    return ", ".join([first, *(f"{words.get(key, key)} {given[key]}" for key in order)])


def percent(values, clusters):
    mean, half = interval(values, clusters)
    return f"{100 * mean:.1f} ± {100 * half:.1f} %"


def share(rows, key):
    """In how many of the rows `key` holds, in words."""
    return percent([row[key] for row in rows], [row["caption"] for row in rows])


def chosen(rows, kind, solids, steps=25):
    return [row for row in rows if (row["pipeline"], row["solids"], row["steps"]) == (kind, solids, steps)]


def settings_of(rows):
    """Their settings, stock first, the others by how many pictures are right."""
    right = {}
    for row in rows:
        right.setdefault(row["setting"], []).append(row["present"])
    return sorted(right, key=lambda name: (name != "stock", -sum(right[name]) / len(right[name])))


def compared(rows, name, words):
    """A setting's cells: how many pictures are right, and what it makes of stock's wrong and right ones."""
    pairs = paired(rows, name, "stock")
    own, captions = [row for row, _ in pairs], [row["caption"] for row, _ in pairs]
    cells = [f"{words} ({len(own)})", percent([row["present"] for row in own], captions)]
    if name == "stock":
        return [*cells, "", "", ""]
    mean, half = gain(pairs)
    fixed = [row["present"] for row, stock in pairs if not stock["present"]]
    kept = [row["present"] for row, stock in pairs if stock["present"]]
    cells += [f"{100 * mean:+.1f} ± {100 * half:.1f}"]
    return cells + [f"{100 * sum(some) / len(some):.0f} % of {len(some)}" if some else "-" for some in (fixed, kept)]


COMPARED = ["setting (pictures)", "right", "points over stock", "fixes", "keeps"]


def alignment_table(rows, kind):
    """Settings of one pipeline, compared with stock."""
    table = []
    cost = read("cost.json")["operations"][kind]
    ratio = cost["guided_pass_flop"] / cost["plain_step_flop"]
    for name in settings_of(rows):
        own = next(row for row in rows if row["setting"] == name)
        passes = 1 + ratio * own["updates"] / own["steps"]
        table.append([*compared(rows, name, described(name)), "1x" if name == "stock" else f"{passes:.2f}x"])
    return markdown([*COMPARED, "operations"], table)


def joint_table(rows, split, solids):
    """The small SD3's, whose settings are changes of the small PixArt-α's."""
    rows = [row for row in rows if (row["split"], row["solids"]) == (split, solids)]
    names = {name: name if name == "stock" else f"`{name.replace(',', ', ')}`" for name in settings_of(rows)}
    return markdown(COMPARED, [compared(rows, name, words) for name, words in names.items()])


def tuning_table(rows, kind):
    """What each setting did on tuning pictures: stock's wrong ones and a part of its right ones."""
    stock = {(r["caption"], r["seed"]): r for r in rows if r["pipeline"] == kind and r["setting"] == "stock"}
    wrong = 1 - sum(row["present"] for row in stock.values()) / len(stock)
    table = []
    for name in {row["setting"]: None for row in rows if row["pipeline"] == kind and row["setting"] != "stock"}:
        own = [row for row in rows if row["pipeline"] == kind and row["setting"] == name]
        parts = [[r["present"] for r in own if stock[r["caption"], r["seed"]]["present"] == right] for right in (0, 1)]
        if not all(parts):
            continue
        fixes, keeps = (sum(part) / len(part) for part in parts)
        error = sum(
            share**2 * max(p * (1 - p), 0.25 / len(part)) / len(part)
            for share, p, part in ((wrong, fixes, parts[0]), (1 - wrong, keeps, parts[1]))
        )
        points = 100 * (wrong * fixes - (1 - wrong) * (1 - keeps))
        counts = [f"{100 * p:.0f} % of {len(part)}" for p, part in ((fixes, parts[0]), (keeps, parts[1]))]
        table.append((points, [name, str(own[0]["updates"]), *counts, f"{points:+.1f} ± {100 * error**0.5:.1f}"]))
    table = [cells for _, cells in sorted(table, key=lambda row: -row[0])]
    head = [f"setting (stock: {100 * (1 - wrong):.1f} % of {len(stock)} right)", "passes", "fixes", "keeps"]
    return markdown([*head, "gain ± one standard error"], table)


def operations_table(part, names):
    rows = []
    for kind, found in read("cost.json")[part].items():
        plain, guided = found["plain_step_flop"], found["guided_pass_flop"]
        cells = [names[kind], f"{guided / 1e9:.0f} of {plain / 1e9:.0f} GFLOP, {guided / plain:.2f}x"]
        cells += [f"{1 + n * guided / plain / found['steps']:.2f}x ({n} passes)" for n in found["passes"].values()]
        rows.append([*cells, f"{found['guided_peak_bytes'] / found['plain_peak_bytes']:.2f}x"])
    head = ["", "a guided pass beside a plain step", *(f'a picture, `"{name}"`' for name in found["passes"])]
    return markdown([*head, "peak memory beside plain"], rows)


def loss_sentence():
    cost = read("cost.json")
    return ", ".join(f"{ms} ms at {n}" for n, ms in cost["loss"].items()) + " tokens"


def anatomy_tables():
    found = read("anatomy.json")
    kinds = list(next(iter(found["rows_of_t"].values())))
    rows = [[gamma, *(f"{100 * row[kind]:.0f} %" for kind in kinds)] for gamma, row in found["rows_of_t"].items()]
    tables = [markdown(["a noun's row of T, γ", *kinds], rows)]
    steps = list(found["similarity"])
    rows = [
        [
            step,
            *(" / ".join(f"{value:.2f}" for value in found["similarity"][step][kind].values()) for kind in kinds[:-1]),
        ]
        for step in steps
    ]
    tables.append(markdown(["mean C at step, right / the one wrong picture", *kinds[:-1]], rows))
    rows = [[name, *(f"{100 * row[s]:.2f} %" for s in steps)] for name, row in found["relative_update"].items()]
    tables.append(markdown([f"one update, α = {found['alpha']:g}, γ = {found['gamma']:g}: size at step", *steps], rows))
    about = f"{found['stock_right']} of {found['prompts']} stock pictures were right; {found['steps']} steps."
    return "\n\n".join([*tables, about])


def card_sentence(rows, kind):
    """What a model card says of the small model: stock, and the setting that it ships with."""
    rows = chosen(rows, kind, 3)
    own = next(name for name in settings_of(rows) if parse_setting(name, kind) == TUNED[kind])
    pairs = paired(rows, own, "stock")
    (mean, half), captions = gain(pairs), [row["caption"] for row, _ in pairs]
    right = [percent([pair[k]["present"] for pair in pairs], captions) for k in (0, 1)]
    return (
        f"three solids were right in {right[0]} of {len(pairs)} pictures with T-SAM ({described(own)}), in {right[1]}"
        f" with stock: {100 * mean:+.1f} ± {100 * half:.1f} points."
    )


def laid_out(setting):
    """A setting of `layout.py` in words."""
    name, *changes = setting.split(",")
    if name == "stock":
        return "stock"
    given = dict(part.split("=") for part in changes)
    first = "layout alone" if given.pop("objective", "") == "none" else "T-SAM with layout"
    words = {"region_weight": "weight", "relative_step": "relative step"}
    return ", ".join([first, *(f"{words.get(key, key)} {value}" for key, value in given.items())])


def layout_table(rows, kind):
    own = [row for row in rows if row["pipeline"] == kind]
    return layout.table(own, list(dict.fromkeys(row["setting"] for row in own)), laid_out)


def long_prompts_table(rows, kind):
    """How many pictures of several sentences are right, by the form of the captions."""
    names = {"stock, cut": "stock, cut off behind a window", "stock": "stock", "tuned": "T-SAM"}
    table = []
    for form in ("sentences", "filled"):
        own = [row for row in rows if row["pipeline"] == kind and row["form"] == form]
        for name in dict.fromkeys(row["setting"] for row in own):
            pairs = paired(own, name, name)
            captions, cells = [row["caption"] for row, _ in pairs], [form, f"{names[name]} ({len(pairs)})"]
            cells += [percent([row[key] for row, _ in pairs], captions) for key in ("present", "objects")]
            compared = paired(own, name, "stock") if name == "tuned" else []
            table.append([*cells, "{:+.1f} ± {:.1f}".format(*(100 * x for x in gain(compared))) if compared else ""])
    return markdown(["captions", "setting (pictures)", "right", "every solid", "points over stock"], table)


def long_prompts_cost():
    """Of the loss and its gradient, without a network."""
    found = read("long_prompts_cost.json")
    rows = [
        [
            tokens,
            *(f"{each['ms']} ms, {each['bytes'] / 1e6:.2f} MB" for each in (found[name][tokens] for name in found)),
        ]
        for tokens in found["windows"]
    ]
    return markdown(["tokens", "in windows of 75", "in one window"], rows)


SINK_SETTINGS = {  # of `alignment.py`
    "stock": "stock",
    "T-SAM": "objective=attainable,gamma=4,schedule=light,relative_step=0.05",
}


def by_model(rows):
    """{model: its lines}; of `alignment.py` those without a name are of the small Stable Diffusion."""
    return {
        name: [row for row in rows if row.get("model", "sd") == name]
        for name in dict.fromkeys(row.get("model", "sd") for row in rows)
    }


def sink_rows():
    """What was measured of models with attention sinks: {model: mechanism's lines}, {model: alignment's lines}."""
    models = by_model(load(RESULTS / "mechanism.jsonl"))
    pictures = by_model(load(RESULTS / "sink.jsonl"))
    order = sorted(models, key=lambda name: mechanism.sink_of(models[name]))
    return {name: models[name] for name in order}, pictures


def mechanism_table(models):
    """What embeddings, T and maps say of who belongs to whom, a row a model."""
    found = {name: mechanism.numbers_of(rows) for name, rows in models.items()}
    head = list(next(iter(found.values())))
    return markdown(["model (pictures)", *head], [[f"{n} ({len(models[n])})", *found[n].values()] for n in models])


def overlap_table(models):
    """Fig. 4: the two solids' maps, and a solid's with its own and the other's colour, in right and wrong pictures."""
    pairs = {"objects": "two solids", "bound": "a solid and its colour", "unbound": "a solid and the other's colour"}
    columns = [
        (kind, which) for kind in pairs for which in ("right", "a solid missing" if kind == "objects" else "a swap")
    ]
    rows = [
        [name, *(mechanism.similarity_when(own, kind, which) for kind, which in columns)]
        for name, own in models.items()
    ]
    return markdown(["C at 40 % of the steps", *(f"{pairs[kind]}, {which}" for kind, which in columns)], rows)


def sink_table(models, pictures, solids):
    """Pictures of models with a sink by setting, and what becomes of the solids."""
    rows = []
    for model in models:
        own = [row for row in pictures.get(model, []) if row["solids"] == solids]
        for name in settings_of(own):
            pairs = paired(own, name, "stock")
            mine, captions = [row for row, _ in pairs], [row["caption"] for row, _ in pairs]
            mean, half = gain(pairs)
            points = "" if name == "stock" else f"{100 * mean:+.1f} ± {100 * half:.1f}"
            cells = [share(mine, "present"), points]
            cells += [percent([not row["objects"] for row in mine], captions)]
            cells += [share(mine, "swap")]
            rows.append([f"{model}, {described(name)} ({len(mine)})", *cells])
    return markdown(["setting (pictures)", "right", "points over stock", "a solid missing", "a swap"], rows)


def sink_sentence(pictures, model="sink0.99", control="sink0.25"):
    """What the README says of the model with a sink that ships."""
    own, without = ([row for row in pictures[name] if row["solids"] == 2] for name in (model, control))
    pairs = paired(own, SINK_SETTINGS["T-SAM"], "stock")
    mean, half = gain(pairs)
    ours, stock = zip(*pairs)
    control = [row for row in without if row["setting"] == "stock"]
    return (
        f"two solids are right in {share(stock, 'present')} of {len(pairs)} pictures with stock and in"
        f" {share(ours, 'present')} with T-SAM ({100 * mean:+.1f} ± {100 * half:.1f} points); colours are swapped in"
        f" {share(stock, 'swap')} and in {share(ours, 'swap')}. Trained alike but without a sink, stock has"
        f" {share(control, 'present')} right and {share(control, 'swap')} swapped."
    )


def mechanism_figure(models, pictures):
    right = {label: {} for label in SINK_SETTINGS}
    for label, name in SINK_SETTINGS.items():
        for model in models:
            own = [row for row in pictures.get(model, []) if (row["setting"], row["solids"]) == (name, 2)]
            if own:
                mean, half = interval([row["present"] for row in own], [row["caption"] for row in own])
                right[label][model] = 100 * mean, 100 * half
    sinks = {name: rows for name, rows in models.items() if name != "sd"}  # all of one recipe
    return mechanism.picture(sinks, "sink0.99", right)


def gains_figure(rows, solids=3):
    """Points over stock by setting, a panel a pipeline, with 95 % intervals."""
    fig = Figure((9, 3.6), dpi=120, layout="constrained")
    for axes, (kind, family) in zip(fig.subplots(1, len(FAMILIES), sharex=True), FAMILIES.items()):
        own = chosen(rows, kind, solids)
        names = [name for name in reversed(settings_of(own)) if name != "stock"]
        for y, name in enumerate(names):
            mean, half = gain(paired(own, name, "stock"))
            ours = not name.startswith(("attend", "conform", "syngen"))
            axes.errorbar(100 * mean, y, xerr=100 * half, fmt="o", capsize=3, color=BLUE if ours else GREY)
        axes.set_yticks(
            range(len(names)), [described(name).replace("`", "").replace(", ", "\n", 1) for name in names], size=7
        )
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set_title(f"the small {family.name}", color=INK, size=11)
        axes.set_xlabel("right pictures over stock, points, 95 %", color=INK, size=9)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def parts():
    """{name: Markdown} of everything that a document may hold."""
    rows, tuning = load(RESULTS / "alignment.jsonl"), load(RESULTS / "tuning.jsonl")
    found = {"operations": operations_table("operations", TABLE), "loss": loss_sentence(), "anatomy": anatomy_tables()}
    found["long-cost"] = long_prompts_cost()
    models, pictures = sink_rows()
    found["mechanism"], found["overlap"] = mechanism_table(models), overlap_table(models)
    found["sink-sentence"] = sink_sentence(pictures)
    narrow, rules = load(RESULTS / "narrow.jsonl"), load(RESULTS / "rules.jsonl")
    for solids in (2, 3):
        found[f"narrow-{solids}"] = alignment_table(chosen(narrow, "sd", solids), "sd")
        found[f"sinks-{solids}"] = sink_table(models, pictures, solids)
    found["modular"] = operations_table("modular", {kind: blocks.name for kind, blocks in MODULAR.items()})
    joint = load(RESULTS / "joint.jsonl")
    for split, solids in {(row["split"], row["solids"]) for row in joint}:
        found[f"joint-{split}-{solids}"] = joint_table(joint, split, solids)
    for kind in FAMILIES:
        for solids, steps in sorted({(row["solids"], row["steps"]) for row in rows if row["pipeline"] == kind}):
            own, longer = chosen(rows, kind, solids, steps), "" if steps == 25 else f"-{steps}-steps"
            found[f"alignment-{kind}-{solids}{longer}"] = alignment_table(own, kind)
            found[f"fates-{kind}-{solids}{longer}"] = confusion(own, settings_of(own), described)
        found[f"tuning-{kind}"] = tuning_table(tuning, kind)
        own = [row for row in rules if row["pipeline"] == kind]
        found[f"rules-{kind}"] = markdown(COMPARED, [compared(own, name, name) for name in settings_of(own)])
        for name in ("layout", "layout_tuning"):
            found[f"{name.replace('_', '-')}-{kind}"] = layout_table(layout.read(RESULTS / f"{name}.jsonl"), kind)
        found[f"long-{kind}"] = long_prompts_table(load(RESULTS / "long_prompts.jsonl"), kind)
    for run in (RESULTS / "evaluation").iterdir():
        found[f"evaluation-{run.name}"] = markdown(*table_of(Scores(Run(run))))
    return found


def filled(text, found):
    """A document with its parts as they are now."""

    def fill(match):
        if match[1] not in found:
            raise ValueError(f"No part is called {match[1]!r}; there are {', '.join(found)}.")
        return f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- /{match[1]} -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- /\1 -->", fill, text, flags=re.DOTALL)


def outputs():
    """{path: text} of every document and of the cards' sentences."""
    found, rows = parts(), load(RESULTS / "alignment.jsonl")
    cards = {"card": {kind: card_sentence(rows, kind) for kind in FAMILIES}}
    texts = {path: filled(path.read_text(), found) for path in DOCUMENTS}
    return texts | {RESULTS / "summary.json": json.dumps(cards, indent=1, ensure_ascii=False) + "\n"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if anything would change")
    args = parser.parse_args()
    made = outputs()
    changed = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
    print(*(path.relative_to(ROOT) for path in changed), sep="\n")
    if args.check:
        sys.exit(bool(changed))
    for path, text in made.items():
        path.write_text(text)
    gains_figure(load(RESULTS / "alignment.jsonl")).savefig(ROOT / "docs" / "gains.png")
    mechanism_figure(*sink_rows()).savefig(ROOT / "docs" / "mechanism.png")


if __name__ == "__main__":
    main()

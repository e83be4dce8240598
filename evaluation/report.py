"""Reports a run: tables, charts, a sweep's heat maps and a sheet of pictures, as Markdown and as one HTML page.

    python -m diffusers_tsam.evaluation report runs/sd15

Intervals are 95 %, one cluster per prompt; differences are between pictures of the same prompt and seed.
"""

import base64
import html
import io
import math
import textwrap
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from ..figures import GREY, INK, NEAREST, TEXT, draw_picture, save
from .baselines import unbound
from .runs import Run, opened, whole, write


BLUE, RED = "#1f6fb4", "#b4421f"
MAP = "RdBu"
MAX_COLUMNS = 7  # methods on a sheet
SIDE = 256  # pixels of a sheet's pictures
LABEL = 40  # characters per line


class Column(NamedTuple):
    """A number of a metric: its title, its factor, its decimals, and whether more is better."""

    metric: str
    title: str
    factor: float = 1
    decimals: int = 3
    better: bool = True


NUMBER = Column("", "")
COLUMNS = {
    "clip_full": Column("clip", "CLIP-I, full prompt"),
    "clip_min": Column("clip", "CLIP-I, minimum object"),
    "clip_text": Column("caption", "CLIP-T"),
    "tifa": Column("tifa", "TIFA"),
    "soft_tifa": Column("tifa", "soft TIFA"),
    "counted": Column("judge", "right, %", 100, 1),
    "right": Column("judge", "every solid in its colour, %", 100, 1),
    "double": Column("judge", "right but for a double, %", 100, 1, False),
    "touching": Column("judge", "right but touching, %", 100, 1, False),
    "missing": Column("judge", "an object missing, %", 100, 1, False),
    "swap": Column("judge", "a swap, %", 100, 1, False),
    "placed": Column("judge", "solids where asked, %", 100, 1),
    "all_placed": Column("judge", "all where asked, %", 100, 1),
}
STYLE = """body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1,h2{line-height:1.2}table{border-collapse:collapse;font-size:14px;margin:1rem 0;display:block;overflow-x:auto}
th,td{padding:.35rem .7rem;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}
th{border-bottom:2px solid #222}img{max-width:100%;height:auto}p{color:#555}"""


def interval(means):
    """Mean of clusters' means, and half its 95 % interval."""
    means = np.asarray(means, dtype=float)
    half = 1.96 * means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return (means.mean() if len(means) else math.nan), half


def auc(lower, higher):
    """The probability that one of `higher` is above one of `lower`, ties half: the area under the ROC curve."""
    above = np.subtract.outer(higher, lower)
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def ratio_interval(parts, wholes):
    """Σ parts / Σ wholes of clusters, and half its linearised 95 % interval."""
    parts, wholes = parts[wholes > 0], wholes[wholes > 0]
    ratio, n = parts.sum() / wholes.sum(), len(parts)
    residual = ((parts - ratio * wholes) ** 2).sum() * n / max(n - 1, 1)
    return ratio, 1.96 * math.sqrt(residual) / wholes.sum() if n > 1 else math.nan


def per_prompt(values, clusters):
    """Mean of values (prompts, seeds) over a cluster: all seeds and prompts of one text."""
    there = np.isfinite(values)
    numbers = np.bincount(clusters, there.sum(-1))
    sums = np.bincount(clusters, np.where(there, values, 0).sum(-1, dtype=float))
    return sums[numbers > 0] / numbers[numbers > 0]


def in_words(mean, half, column=NUMBER, sign="", missing=""):
    """A number with its interval, if there are two prompts; `missing` if there is no number."""
    factor, digits = column.factor, column.decimals
    if not math.isfinite(mean):
        return missing
    interval = f" ± {factor * half:.{digits}f}" if math.isfinite(half) else ""
    return f"{factor * mean:{sign}.{digits}f}{interval}"


class Scores:
    """All scored numbers of a run: `values`, {key of COLUMNS: (methods, prompts, seeds)}."""

    def __init__(self, run):
        self.run, self.values = run, {}
        for metric in dict.fromkeys(column.metric for column in COLUMNS.values()):
            keys = [key for key, column in COLUMNS.items() if column.metric == metric]
            tables = run.table(f"score-{metric}", *keys)
            self.values |= {key: table for key, table in tables.items() if np.isfinite(table).any()}
        if not self.values:
            raise ValueError(f"{str(run.folder)!r} has no scores yet. Run `score` on it first.")
        self.stock = run.methods.index("stock") if "stock" in run.methods else None

    def of(self, method, key):
        """Mean and half its interval."""
        return interval(per_prompt(self.values[key][method], self.run.clusters))

    def gains(self, method, key):
        """Each prompt's difference from stock, over pictures that both have."""
        return per_prompt(self.values[key][method] - self.values[key][self.stock], self.run.clusters)

    def gain(self, method, key):
        """Difference from stock and half its interval."""
        return interval(self.gains(method, key))


def table_of(scores, keys=None):
    """(head, rows): all methods' means, and their differences from stock. keys: of `scores.values`, all if None."""
    keys = scores.values if keys is None else keys
    run, counts = scores.run, np.isfinite(next(iter(scores.values.values()))).sum((1, 2))
    drawn = run.done("drawn").any((1, 2))
    compared = scores.stock is not None and len(run.methods) > 1
    head, rows = ["method (pictures)"], []
    for key in keys:
        head += [COLUMNS[key].title, *(["over stock"] if compared else [])]
    for method, name in enumerate(run.methods):
        cells, missing = [f"{name} ({counts[method]})"], f"not {'scored' if drawn[method] else 'drawn'} yet"
        for key, column in ((key, COLUMNS[key]) for key in keys):
            cells.append(in_words(*scores.of(method, key), column, missing=missing))
            if compared:
                own = method == scores.stock
                cells.append("" if own else in_words(*scores.gain(method, key), column, "+", "no pair with stock yet"))
        rows.append(cells)
    return head, rows


def type_rates(run):
    """{question type: [(accuracy, half its interval) per method]} of TIFA's answers. Fig. 7."""
    counts = {}
    for row in run.rows("score-tifa"):
        for name, both in row["types"].items():
            counts.setdefault(name, np.zeros((len(run.methods), 2, len(run.prompts))))
            counts[name][row["method"], :, run.clusters[row["prompt"]]] += both
    return {
        name: [ratio_interval(*own) if own[1].any() else (math.nan, math.nan) for own in found]
        for name, found in sorted(counts.items())
    }


def types_figure(run, rates):
    """Accuracy by question type, a bar per method. Fig. 7."""
    fig = Figure((max(8, 1.3 * len(rates)), 4), dpi=120, layout="constrained")
    axes, width = fig.subplots(), 0.8 / len(run.methods)
    for method, name in enumerate(run.methods):
        found = [rates[kind][method] for kind in rates]
        at = np.arange(len(rates)) + (method - (len(run.methods) - 1) / 2) * width
        axes.bar(at, [x for x, _ in found], width, yerr=[half for _, half in found], capsize=2, label=name)
    axes.set_xticks(range(len(rates)), list(rates), rotation=30, ha="right")
    axes.set_ylabel("TIFA accuracy", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    fig.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return fig


def gains_figure(scores):
    """Differences from stock with intervals, a panel per number."""
    names = [name for k, name in enumerate(scores.run.methods) if k != scores.stock]
    panels = len(scores.values)
    fig = Figure((3 + 2.6 * panels, 1.2 + 0.35 * len(names)), dpi=120, layout="constrained")
    for axes, key in zip(fig.subplots(1, panels, sharey=True, squeeze=False)[0], scores.values):
        column = COLUMNS[key]
        for y, name in enumerate(reversed(names)):
            mean, half = (column.factor * x for x in scores.gain(scores.run.methods.index(name), key))
            clear = abs(mean) > half
            colour = GREY if not clear else BLUE if (mean > 0) == column.better else RED
            axes.errorbar(mean, y, xerr=half, fmt="o", capsize=3, color=colour)
        axes.axvline(0, color=GREY, linewidth=0.8)
        labels = [textwrap.fill(name.replace(":", " "), LABEL) for name in reversed(names)]
        axes.set_yticks(range(len(names)), labels, size=8)
        axes.set_xlabel(f"{column.title}, over stock", color=INK, size=9)
        axes.spines[["top", "right"]].set_visible(False)
    return fig


def grids(run):
    """{all other arguments in words: {(alpha, gamma): method}} for methods in a sweep."""
    found = {}
    for method, arguments in enumerate(run.settings["methods"].values()):
        if {"alpha", "gamma"} <= set(arguments):
            rest = {key: value for key, value in arguments.items() if key not in ("alpha", "gamma")}
            words = ", ".join(f"{key} {value}" for key, value in sorted(rest.items())) or "the paper's"
            found.setdefault(words, {})[arguments["alpha"], arguments["gamma"]] = method
    return {words: grid for words, grid in found.items() if len(grid) > 3}


def sweep_figure(scores, key):
    """Gains over stock by alpha and gamma: heat maps by all other arguments, in one scale. Tables B and C."""
    column, found = COLUMNS[key], grids(scores.run)
    gains = {
        words: {at: [column.factor * x for x in scores.gain(method, key)] for at, method in grid.items()}
        for words, grid in found.items()
    }
    most = max((abs(mean) for grid in gains.values() for mean, _ in grid.values() if mean == mean), default=1) or 1
    fig = Figure((0.8 + 4.2 * len(gains), 3.8), dpi=120, layout="constrained")
    for axes, (words, grid) in zip(fig.subplots(1, len(gains), squeeze=False)[0], gains.items()):
        alphas, gammas = (sorted({at[k] for at in grid}) for k in (0, 1))
        values = np.array([[grid.get((alpha, gamma), [math.nan] * 2) for gamma in gammas] for alpha in alphas])
        axes.imshow(values[..., 0], MAP if column.better else f"{MAP}_r", vmin=-most, vmax=most, aspect="auto")
        for (y, x), mean in np.ndenumerate(values[..., 0]):
            if mean == mean:
                text = in_words(mean, values[y, x, 1], column._replace(factor=1), "+").replace(" ± ", "\n± ")
                axes.text(x, y, text, ha="center", va="center", size=9, color="white" if abs(mean) > most / 2 else INK)
        axes.set_xticks(range(len(gammas)), [f"{gamma:g}" for gamma in gammas])
        axes.set_yticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        axes.set(xlabel="γ", ylabel="α")
        axes.set_title(words, size=10)
        axes.spines[:].set_visible(False)
    fig.suptitle(f"{column.title}, over stock", size=12, color=INK)
    return fig


def sheet_figure(run, prompts=3, seeds=2):
    """The first prompts' pictures, not selected: methods in columns, seeds in rows."""
    methods = range(min(len(run.methods), MAX_COLUMNS))
    rows = [(prompt, seed) for prompt in range(min(prompts, run.shape[1])) for seed in range(min(seeds, run.shape[2]))]
    fig = Figure((1.7 * len(methods) + 0.6, 1.75 * len(rows) + 0.8), dpi=120, layout="constrained", facecolor="white")
    panels = fig.subplots(len(rows), len(methods), squeeze=False)
    for (prompt, seed), line in zip(rows, panels):
        for method, axes in zip(methods, line):
            path = run.picture(method, prompt, seed)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if whole(path):
                picture = opened(path)
                draw_picture(axes, picture if max(picture.size) <= NEAREST else picture.resize((SIDE, SIDE)))
        line[0].set_ylabel(f"seed {seed}", size=8, color=GREY)
        if seed == 0:
            line[0].set_title(run.prompts[prompt].text, loc="left", size=9, weight="bold", **TEXT)
    for method, axes in zip(methods, panels[-1]):
        axes.set_xlabel(run.methods[method].replace(":", "\n"), size=8, **TEXT)
    return fig


def markdown(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def hypertext(head, rows):
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def about(run):
    """A run's settings in a few sentences."""
    settings, planned = run.settings, math.prod(run.shape)
    drawn = int(run.done("drawn").sum())
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    sentences = (
        f"Model {settings['model']} (revision {settings['revision']}), {settings['scheduler']}, {settings['dtype']}, "
        f"{settings['arguments']['num_inference_steps']} steps. Prompts: {settings['prompt_set']}, {run.shape[1]} of "
        f"them, {run.shape[2]} seeds; {drawn} of {planned} pictures drawn. {versions}. Intervals are 95 %, over "
        "prompts; differences from stock are of the same prompts and seeds."
    )
    return " ".join([sentences, *unbound(run.methods, run.prompts)])


def report(folder):
    """Write report.md and report.html with their pictures into a run's folder; returns the Markdown."""
    run = Run(folder)
    scores = Scores(run)
    keys = list(scores.values)
    parts, pictures = [("Scores", table_of(scores))], {}
    if scores.stock is not None and len(run.methods) > 1:
        pictures["gains"] = "Differences from stock", gains_figure(scores)
    rates = type_rates(run)
    if rates:
        head = ["question type", *run.methods]
        rows = [[kind, *(in_words(*own, missing="not answered yet") for own in found)] for kind, found in rates.items()]
        parts.append(("TIFA by question type", (head, rows)))
        pictures["types"] = "TIFA by question type", types_figure(run, rates)
    if scores.stock is not None and grids(run):
        pictures["sweep"] = "Sweep", sweep_figure(scores, keys[0])
    pictures["sheet"] = "The first prompts' pictures", sheet_figure(run)
    lines, page = ["# Report", about(run)], [f"<h1>{html.escape(run.folder.name)}</h1><p>{html.escape(about(run))}</p>"]
    for title, (head, rows) in parts:
        lines += [f"## {title}", markdown(head, rows)]
        page += [f"<h2>{title}</h2>", hypertext(head, rows)]
    for name, (title, figure) in pictures.items():
        data = io.BytesIO()
        save(figure, data)
        (run.folder / f"{name}.png").write_bytes(data.getvalue())
        lines += [f"## {title}", f"![{title}]({name}.png)"]
        inlined = base64.b64encode(data.getvalue()).decode()
        page += [f"<h2>{title}</h2>", f'<img alt="{title}" src="data:image/png;base64,{inlined}">']
    text = "\n\n".join(lines) + "\n"
    write(run.folder / "report.md", text)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(run.folder.name)}</title>'
    write(run.folder / "report.html", f"{head}<style>{STYLE}</style>" + "\n".join(page) + "</html>\n")
    return text

"""The paper's mechanism on a small model: what the embeddings, T and the maps say of who belongs to whom.

Over tuning prompts of two coloured solids, stock's pictures. Pairs of words: "bound" (a solid and its own colour),
"unbound" (a solid and the other's colour), "objects" (the two solids). With --keep benchmarks/mechanism.py:kept the
evaluation keeps of every picture and pair the cosine similarity of their embeddings, T between them, and the cosine
similarity C of their maps at the first step, at 40 % and at the last (1, 21 and 50 of 50 in the paper), and the whole
matrices of its prompt. `report.py` makes Section 4's numbers and figures of them.
"""

import json
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

from diffusers_tsam.evaluation.report import BLUE, auc, interval
from diffusers_tsam.figures import draw_table
from diffusers_tsam.shapes.scenes import words_of_solids
from diffusers_tsam.tsam import cosine_similarity, smooth


MOMENTS = (0.0, 0.4, 1.0)  # of the denoising steps
RESAMPLES = 500  # of the prompts, for intervals
ORANGE, GREY = "#c8553d", "#999999"
COLOURS = {"unbound": ORANGE, "bound": BLUE}


def pairs_of(words):
    """Pairs (i, j), i > j, of two things' words [(colour, noun), (colour, noun)] by kind."""
    (colour_1, noun_1), (colour_2, noun_2) = words
    return {
        "bound": [(noun_1, colour_1), (noun_2, colour_2)],
        "unbound": [(noun_2, colour_1), (colour_2, noun_1)],
        "objects": [(noun_2, noun_1)],
    }


@torch.no_grad()
def kept(pipe, prompts, output):
    """For every picture a dict as described above."""
    captions = [prompt.text for prompt in prompts]
    text = pipe.get_text_self_attention(captions)
    embeddings = pipe.encode_prompt(captions, pipe.device, 1, False)[0]
    found = []
    for image, (caption, attention) in enumerate(zip(captions, output.attentions)):
        own, maps = text.content[image], attention["maps"]
        alike = cosine_similarity(embeddings[image, : len(own)][own.to(embeddings.device)][None].float())[0]
        syntax, moments = attention["text_attention"], [round(moment * (len(maps) - 1)) for moment in MOMENTS]
        similar = cosine_similarity(smooth(maps[moments]).flatten(2))
        pairs = [
            {"kind": kind, "embeddings": alike[i, j], "syntax": syntax[i, j], "maps": similar[:, i, j].tolist()}
            for kind, some in pairs_of(words_of_solids(caption)).items()
            for i, j in some
        ]
        matrices = {"words": caption.split(), "embeddings": alike.tolist(), "syntax": syntax.tolist()}
        bos = text.attention[image][own, 0].mean()  # what the tokens give to the first
        text_of_all = json.dumps({"matrices": matrices, "bos": bos, "pairs": pairs}, default=float)
        found.append(json.loads(text_of_all, parse_float=lambda number: round(float(number), 4)))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# What the lines say


def separable(pairs, key):
    """How well `key` tells bound from unbound pairs: the area under the curve, 0.5 for not at all, 1 for always."""
    bound, unbound = (np.array([pair[key] for pair in pairs if pair["kind"] == kind]) for kind in ("bound", "unbound"))
    return auc(unbound, bound)


def correlation(pairs, moment):
    """Of the embeddings' similarity with that of the maps, over pairs of all kinds."""
    return np.corrcoef([pair["embeddings"] for pair in pairs], [pair["maps"][moment] for pair in pairs])[0, 1]


def with_interval(rows, statistic):
    """statistic(pairs of rows) and its 95 % interval, by resampling prompts: (value, low, high)."""
    prompts_of = {}
    for row in rows:
        prompts_of.setdefault(row["caption"], []).extend(row["pairs"])
    clusters, rng = list(prompts_of.values()), np.random.default_rng(0)
    values = [
        statistic([pair for k in rng.integers(0, len(clusters), len(clusters)) for pair in clusters[k]])
        for _ in range(RESAMPLES)
    ]
    return statistic(sum(clusters, [])), *np.percentile(values, (2.5, 97.5))


def sink_of(rows):
    """What <bos> takes of a token's attention, the mean over one model's lines."""
    return np.mean([row["bos"] for row in rows])


def numbers_of(rows):
    """{what: text} of a model's lines: Fig. 6b, 2b, 6a, 2a and 5."""
    statistics = {
        "the embeddings tell bound pairs": partial(separable, key="embeddings"),
        "T tells them": partial(separable, key="syntax"),
    }
    for moment, share in enumerate(MOMENTS):
        statistics[f"embeddings with maps, at {100 * share:.0f} %"] = partial(correlation, moment=moment)
    found = {name: "{:.2f} ({:.2f} to {:.2f})".format(*with_interval(rows, of)) for name, of in statistics.items()}
    return {"<bos> takes": f"{100 * sink_of(rows):.0f} %"} | found


def similarity_when(rows, kind, which, moment=1):
    """Fig. 4: mean C of a kind of pairs in the pictures of a verdict of the judge's, in words."""
    chosen = [row["pairs"] for row in rows if row[which]]
    means = [np.mean([pair["maps"][moment] for pair in pairs if pair["kind"] == kind]) for pairs in chosen]
    return "{:.2f} ± {:.2f} ({})".format(*interval(means), len(means)) if means else "-"


def picture(models, shown, right):
    """Fig. 2b, 2c and 6a of the model `shown`, and how both and the pictures change with the sink: a matplotlib Figure.

    models: {name: its lines}. right: {setting: {name: (share, half of its 95 % interval)}} of right pictures.
    """
    fig = Figure((15, 8), dpi=100, layout="constrained", facecolor="white")
    (left, middle, above), (told, drawn, below) = fig.subplots(2, 3, width_ratios=(1, 1, 0.85))
    pairs = [pair for row in models[shown] for pair in row["pairs"]]
    share = f"<bos> takes {100 * sink_of(models[shown]):.0f} %"
    matrices, of_embeddings = models[shown][0]["matrices"], "cosine similarity of embeddings"
    for axes, table, key, name in ((left, above, "embeddings", of_embeddings), (middle, below, "syntax", "T, γ = 1")):
        values = [[pair[key] for pair in pairs if pair["kind"] == kind] for kind in COLOURS]
        bins = np.linspace(min(map(min, values)), max(map(max, values)), 30)
        for (kind, colour), some in zip(COLOURS.items(), values):
            axes.hist(some, bins, alpha=0.7, color=colour, label=f"{kind} pairs")
        axes.set(xlabel=name, ylabel="pairs of a colour and a solid", title=share)
        draw_table(table, matrices[key], matrices["words"])
        table.set_title(f"{name}\n{share}")
    names = sorted(models, key=lambda name: sink_of(models[name]))
    ticks = range(len(names)), [f"{100 * sink_of(models[name]):.0f} %" for name in names]
    for key, name, colour in (("syntax", "T", BLUE), ("embeddings", "embeddings", ORANGE)):
        found = [with_interval(models[model], partial(separable, key=key)) for model in names]
        middles, low, high = map(np.array, zip(*found))
        told.errorbar(ticks[0], middles, (middles - low, high - middles), fmt="o-", capsize=3, color=colour, label=name)
    told.axhline(0.5, color=GREY, linewidth=0.8)
    told.set(ylabel="area under the curve", title="how well bound pairs are told from unbound")
    for (setting, of_models), colour in zip(right.items(), (GREY, BLUE)):
        shares, halves = zip(*map(of_models.get, names))
        drawn.errorbar(ticks[0], shares, halves, fmt="o-", capsize=3, color=colour, label=setting)
    drawn.set(ylabel="right pictures, two solids, %", title="pictures", ylim=(0, 102))
    for axes in (told, drawn):
        axes.set_xticks(*ticks)
        axes.margins(x=0.2)
        axes.set_xlabel("what <bos> takes of a word's attention")
    for axes in (left, middle, told, drawn):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    for letter, axes in zip("abcdef", fig.axes):
        axes.set_title(letter, loc="left", weight="bold")
    return fig

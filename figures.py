"""Draws what T-SAM sees: where each word looks, and T beside S. Used by the command and examples."""

import math
import textwrap
import warnings

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image


OUTLINES = ("#00e5ff", "#ffe100", "#ff5fd2", "#7dff6a")  # for regions, in turn
INK, GREY, HEAT, TABLE = "#222222", "#777777", "inferno", "GnBu"
MAX_WORDS, WORDS_A_LINE = 14, 7  # two readable lines of maps
WIDTH, PICTURE, TABLES = 14, 3, 4.6  # inches: the figure, a picture's side, the tables' height
COLUMN, LINE = 2.2, 0.3  # inches: a sheet's column, a title's line
LONGEST = 200  # characters of a prompt
DPI = 120
OPACITY = 0.65  # a map's, over its picture
NEAREST = 128  # pixels: smaller pictures are shown as squares
TEXT = {"color": INK, "parse_math": False}  # a prompt's $ is no formula
SMALL = TEXT | {"color": GREY}


def figure(prompt, words, rows, tables, footer="", regions=()):
    """Pictures with each word's cross-attention above tables of the words: a matplotlib `Figure`, for `save`.

    words: s strings. rows: (name, caption, PIL image, maps (s, H, W)); a word's maps share one scale. tables: (name,
    lower triangular matrix (s, s)). footer: a line below. regions: (box (x0, y0, x1, y1) in fractions of the picture or
    mask (h, w), indices of its words), outlined in the pictures and in these words' maps.
    """
    outlines = [(outline, OUTLINES[k % len(OUTLINES)], own) for k, (outline, own) in enumerate(regions)]
    shown = words[:MAX_WORDS]
    lines = math.ceil(len(shown) / WORDS_A_LINE)
    columns = max(math.ceil(len(shown) / lines), 3)  # so that a map is no larger than the picture
    scales = [max(float(maps[i].max()) for *_, maps in rows) for i in range(len(shown))]
    fig = blank(prompt, WIDTH, len(rows) * (PICTURE + 0.6) + TABLES + 0.6)
    *parts, below = fig.subfigures(len(rows) + 1, height_ratios=[PICTURE + 0.6] * len(rows) + [TABLES])
    for part, (name, caption, picture, maps) in zip(parts, rows):
        left, right = part.subfigures(1, 2, width_ratios=(PICTURE, WIDTH - PICTURE))
        left.suptitle(name, x=0.03, ha="left", size=13, weight="bold", **TEXT)
        right.suptitle(caption, x=0.01, ha="left", size=11, **SMALL)
        axes = left.subplots()
        draw_picture(axes, picture)
        for outline, colour, _ in outlines:
            draw_outline(axes, outline, colour, picture)
        panels = right.subplots(lines, columns, squeeze=False).ravel()
        for i, axes in enumerate(panels):
            if i < len(shown):
                draw_map(axes, maps[i], scales[i], picture)
                axes.set_title(shown[i], size=11, pad=3, **TEXT)
                for outline, colour, own in outlines:
                    if i in own:
                        draw_outline(axes, outline, colour, picture)
            else:
                axes.remove()
    for axes, (name, values) in zip(below.subplots(1, len(tables), squeeze=False)[0], tables):
        draw_table(axes, values, shown)
        axes.set_title(name, size=13, weight="bold", pad=8, **TEXT)
    if len(words) > len(shown):
        footer = f"the first {len(shown)} of {len(words)} words · {footer}"
    fig.supxlabel(textwrap.fill(footer, 190), size=9, **SMALL)
    return fig


def sheet(prompt, columns, rows, footer=""):
    """Pictures alone: a `Figure`, for `save`. columns: their names. rows: (name, captions, PIL images)."""
    width = max(COLUMN * len(columns), WIDTH / 2)
    fig = blank(prompt, width, len(rows) * (COLUMN + 0.8) + 1.2)
    for (name, captions, pictures), line in zip(rows, fig.subplots(len(rows), len(columns), squeeze=False)):
        line[0].set_ylabel(name, size=13, weight="bold", **TEXT)
        for axes, column, caption, picture in zip(line, columns, captions, pictures):
            draw_picture(axes, picture)
            axes.set_title(column, size=11, pad=3, **TEXT)
            axes.set_xlabel(textwrap.fill(caption, 28), size=9, **SMALL)
    fig.supxlabel(textwrap.fill(footer, int(190 * width / WIDTH)), size=9, **SMALL)
    return fig


def blank(prompt, width, height):
    """An empty figure with a title; higher if the title takes several lines."""
    title = " ".join(prompt.split())
    title = f"“{title}”" if len(title) <= LONGEST else f"“{title[:LONGEST]} …”"
    title = textwrap.fill(title, int((90 if prompt.isascii() else 45) * width / WIDTH))
    size = (width, height + LINE * title.count("\n"))
    fig = Figure(size, dpi=DPI, layout="constrained", facecolor="white")
    fig.get_layout_engine().set(h_pad=0.1)
    fig.suptitle(title, size=17, weight="bold", **TEXT)
    return fig


def draw_picture(axes, picture, **look):
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes.imshow(picture, interpolation="nearest" if max(picture.size) <= NEAREST else "bilinear", **look)


def draw_map(axes, attention, scale, picture):
    """Draw a word's map (H, W) over its picture in grey; `scale` is the brightest."""
    extent = draw_picture(axes, picture.convert("L"), cmap="gray", vmin=0, vmax=255).get_extent()
    axes.imshow(
        np.asarray(attention), HEAT, vmin=0, vmax=scale or 1, alpha=OPACITY, extent=extent, interpolation="bilinear"
    )


def draw_outline(axes, region, colour, picture):
    """Draw a box's or mask's border."""
    width, height = picture.size
    if len(region) == 4 and np.ndim(region) == 1:
        x0, y0, x1, y1 = (at * side for at, side in zip(region, (width, height) * 2))
        axes.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2))
    else:
        mask = np.pad(np.asarray(region, dtype=float), 1)  # closed at the border
        down, across = ((np.arange(side) - 0.5) / (side - 2) for side in mask.shape)
        axes.contour(across * width - 0.5, down * height - 0.5, mask, [0.5], colors=colour, linewidths=2)
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def enlarged(picture, side):
    """Enlarge a picture until its longer side has that many pixels; a small one to squares."""
    factor = max(math.ceil(side / max(picture.size)), 1)
    look = Image.Resampling.NEAREST if max(picture.size) <= NEAREST else Image.Resampling.BICUBIC
    return picture.resize([factor * pixels for pixels in picture.size], look) if factor > 1 else picture


def overlaid(attention, scale, picture):
    """What `draw_map` draws, as a PIL image of the picture's size."""
    heat = Image.fromarray(np.asarray(attention, dtype=np.float32) / (scale or 1))
    heat = np.asarray(heat.resize(picture.size, Image.Resampling.BILINEAR)).clip(0, 1)
    heat = Image.fromarray(matplotlib.colormaps[HEAT](heat, bytes=True)).convert("RGB")
    return Image.blend(picture.convert("L").convert("RGB"), heat, OPACITY)


def draw_table(axes, values, words):
    """Draw the lower triangle of T or S with its numbers, for the given words: rows look at columns."""
    values, n = np.asarray(values), len(words)
    axes.imshow(np.ma.masked_array(values[:n, :n], ~np.tri(n, dtype=bool)), cmap=TABLE, vmin=0, vmax=1)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    look = {"size": 10 if n <= WORDS_A_LINE else 9, **TEXT}
    axes.set_xticks(range(n), words, rotation=45, ha="right", rotation_mode="anchor", **look)
    axes.set_yticks(range(n), words, **look)
    for i, j in zip(*np.tril_indices(n)):
        look = {"size": min(11, 80 / n), "ha": "center", "va": "center"}  # so that ".25" fits a cell
        number = f"{values[i, j]:.2f}".replace("0.", ".", 1)
        axes.text(j, i, number, color="white" if values[i, j] > 0.55 else INK, **look)


def save(fig, path):
    """Write a figure, cropped to its content; signs that the font lacks become boxes, without warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently does not support")
        fig.savefig(path, bbox_inches="tight", pad_inches=0.2)

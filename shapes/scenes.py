"""Scenes of one to three shaded solids on a grey background, with their captions.

Sprites are rendered once, so that tens of thousands of scenes take seconds. Training shows every colour on every solid;
`split_of` fixes which *pairs* of coloured solids it never shows together.
"""

import functools
import math
import zlib
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
from PIL import Image, ImageDraw

from . import COLOURS, SOLIDS


SIZE = 128  # pixels of a picture's side
GRID = 16  # latent positions of a picture's side
SUPERSAMPLING = 4  # sprites are drawn this much larger, then reduced
SPRITE_SIZES = (40, 46, 52)  # pixels
MAX_SOLIDS = 3
SPLITS = ("train", "tune", "test")
MAX_TRIES = 100_000  # to find different prompts
PAIRS = tuple(product(COLOURS, SOLIDS))  # every coloured solid, in the order of the judge's outputs
FACES = (0.25, 0.0, -0.25)  # how much lighter than its colour a solid's light, plain and dark faces are
BACKGROUNDS = (115, 155)  # darkest and lightest grey: every face of black and of white stands out


@dataclass(frozen=True)
class Scene:
    """One picture. solids: (colour, solid) in the caption's order; masks: (MAX_SOLIDS, GRID, GRID) coverage 0 to 1."""

    caption: str
    solids: tuple
    image: np.ndarray  # (SIZE, SIZE, 3) uint8
    masks: np.ndarray


def phrase(colour, solid):
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {solid}"


def caption_of(solids, joiner="and"):
    """Caption of one to three (colour, solid) in order, e.g. 'a red cube and a blue sphere'."""
    return f" {joiner} ".join(phrase(*solid) for solid in solids)


def split_of(solids):
    """'train', 'tune' or 'test'. A fifth of all pairs of coloured solids never meet in a training scene: half of them
    are for tuning, half for reporting. Three solids belong to a held-out split if any two of them do and none belongs
    to the other."""
    buckets = set()
    for pair in combinations(sorted(solids), 2):
        bucket = zlib.crc32(repr(pair).encode()) % 10
        buckets.add({0: "tune", 1: "test"}.get(bucket, "train"))
    held_out = buckets - {"train"}
    if len(held_out) == 2:
        return "none"
    return held_out.pop() if held_out else "train"


def random_solids(rng, count, split="train"):
    """`count` (colour, solid) with different colours and different solids, from `split`."""
    while True:
        colours = rng.permutation(list(COLOURS))[:count].tolist()
        names = rng.permutation(SOLIDS)[:count].tolist()
        solids = tuple(zip(colours, names))
        if count == 1 or split_of(solids) == split:
            return solids


def prompts(count, split, number, seed=0):
    """`number` different prompts of `count` solids from a split: list of (caption, solids).

    ValueError if there are fewer: the held-out splits of two solids have about 80 each.
    """
    if split not in SPLITS or not 1 <= count <= len(SOLIDS):
        known = f"the splits are {', '.join(SPLITS)}, of 1 to {len(SOLIDS)} solids"
        raise ValueError(f"`split` is {split!r} of {count} solids, but {known}. Ask for one of these.")
    rng = np.random.default_rng(seed)
    found = {}
    for _ in range(MAX_TRIES):
        if len(found) == number:
            return list(found.values())
        solids = random_solids(rng, count, split)
        found.setdefault(tuple(sorted(solids)), (caption_of(solids), solids))
    raise ValueError(f"`number` is {number}, but only {len(found)} prompts were found in {split!r}. Ask for fewer.")


def faces(colour):
    """A colour's light, plain and dark faces, RGB 0 to 255: mixed with white or black."""
    return [
        tuple(round(c + ((255 if factor > 0 else 0) - c) * abs(factor)) for c in COLOURS[colour]) for factor in FACES
    ]


@functools.cache
def sprite(solid, colour, size):
    """One solid, (size, size, 4) float32 RGBA in 0 to 1, with a light, a plain and a dark face."""
    n = size * SUPERSAMPLING
    image = Image.new("RGBA", (n, n))
    draw = ImageDraw.Draw(image)
    light, plain, dark = (face + (255,) for face in faces(colour))

    def p(*points):
        return [(x * n, y * n) for x, y in points]

    if solid == "cube":
        draw.polygon(p((0.5, 0.0), (0.95, 0.25), (0.5, 0.5), (0.05, 0.25)), fill=light)
        draw.polygon(p((0.05, 0.25), (0.5, 0.5), (0.5, 1.0), (0.05, 0.75)), fill=plain)
        draw.polygon(p((0.95, 0.25), (0.5, 0.5), (0.5, 1.0), (0.95, 0.75)), fill=dark)
    elif solid == "sphere":
        draw.ellipse(p((0.02, 0.02), (0.98, 0.98)), fill=dark)
        draw.ellipse(p((0.04, 0.03), (0.88, 0.87)), fill=plain)
        draw.ellipse(p((0.22, 0.16), (0.5, 0.44)), fill=light)
    elif solid == "cone":
        draw.ellipse(p((0.05, 0.72), (0.95, 1.0)), fill=plain)
        draw.polygon(p((0.5, 0.0), (0.05, 0.86), (0.5, 0.9)), fill=light)
        draw.polygon(p((0.5, 0.0), (0.95, 0.86), (0.5, 0.9)), fill=dark)
    elif solid == "cylinder":
        draw.ellipse(p((0.15, 0.74), (0.85, 1.0)), fill=plain)
        draw.rectangle(p((0.15, 0.13), (0.85, 0.87)), fill=plain)
        draw.rectangle(p((0.6, 0.13), (0.85, 0.87)), fill=dark)
        draw.ellipse(p((0.15, 0.0), (0.85, 0.26)), fill=light)
    elif solid == "ring":
        draw.ellipse(p((0.02, 0.02), (0.98, 0.98)), fill=plain)
        draw.pieslice(p((0.02, 0.02), (0.98, 0.98)), 0, 120, fill=dark)
        draw.pieslice(p((0.02, 0.02), (0.98, 0.98)), 180, 280, fill=light)
        draw.ellipse(p((0.27, 0.27), (0.73, 0.73)), fill=(0, 0, 0, 0))
    elif solid == "star":
        points = []
        for k in range(10):
            radius, angle = (0.52 if k % 2 == 0 else 0.22), math.pi * k / 5
            points.append((0.5 + radius * math.sin(angle), 0.52 - radius * math.cos(angle)))
        for k in range(10):
            draw.polygon(p((0.5, 0.52), points[k], points[(k + 1) % 10]), fill=light if k % 2 else plain)
    else:
        raise ValueError(f"No solid is called {solid!r}; there are {SOLIDS}.")
    small = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.float32) / 255
    return small


def draw_scene(rng, solids):
    """Draw (colour, solid) pairs in random places without overlap: image (SIZE, SIZE, 3) uint8, masks."""
    while True:
        sizes = rng.choice(SPRITE_SIZES, len(solids))
        corners = [rng.integers(2, SIZE - size - 1, 2) for size in sizes]
        centres = [corner + size / 2 for corner, size in zip(corners, sizes)]
        gaps = (
            np.abs(centres[a] - centres[b]).max() - (sizes[a] + sizes[b]) / 2
            for a, b in combinations(range(len(solids)), 2)
        )
        if all(gap >= 2 for gap in gaps):
            break
    image = np.full((SIZE, SIZE, 3), rng.integers(*BACKGROUNDS), dtype=np.float32) / 255
    masks = np.zeros((MAX_SOLIDS, GRID, GRID), dtype=np.float32)
    cell = SIZE // GRID
    for index, ((colour, solid), size, (y, x)) in enumerate(zip(solids, sizes, corners)):
        rgba = sprite(solid, colour, int(size))
        alpha = rgba[..., 3:]
        patch = image[y : y + size, x : x + size]
        patch *= 1 - alpha
        patch += alpha * rgba[..., :3]
        coverage = np.zeros((SIZE, SIZE), dtype=np.float32)
        coverage[y : y + size, x : x + size] = alpha[..., 0]
        masks[index] = coverage.reshape(GRID, cell, GRID, cell).mean((1, 3))
    return np.round(image * 255).astype(np.uint8), masks


def random_scene(rng, split="train"):
    """A random scene: one, two or three solids (3 : 5 : 2), joined by 'and' or 'with'."""
    count = int(rng.choice((1, 2, 3), p=(0.3, 0.5, 0.2)))
    solids = random_solids(rng, count, split)
    joiner = "with" if count == 2 and rng.random() < 0.3 else "and"
    image, masks = draw_scene(rng, solids)
    return Scene(caption_of(solids, joiner), solids, image, masks)


def words_of_solids(caption):
    """Positions of each solid's colour and noun among the caption's words: list of (colour, noun)."""
    return [(k - 1, k) for k, word in enumerate(caption.split()) if word in SOLIDS]


def solids_of(caption):
    """The (colour, solid) that a caption asks for."""
    words = caption.split()
    return [(words[colour], words[solid]) for colour, solid in words_of_solids(caption)]

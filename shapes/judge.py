"""Reads a picture of the shapes world: which coloured solids are in it, how many there are and where."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy import ndimage
from torch import nn

from .scenes import COLOURS, PAIRS, faces


WEIGHTS = Path(__file__).with_name("judge.safetensors")
FRAGMENT = 200  # pixels: a solid has at least so many; the smallest drawn has 481
NECK = 2  # pixels eroded from every side, to split solids that touch
WIDE_NECK, LARGE = 5, 500  # the same if each part has one colour and more pixels than a misread face
SQUARE = np.ones((3, 3))  # includes diagonals
CELL = 16  # pixels: the side of the area that a judge's logit reads


class Component(NamedTuple):
    """A connected part of a picture: its number of pixels, and its box (x0, y0, x1, y1), the ends excluded."""

    pixels: int
    box: tuple


def parts(mask, neck):
    """The connected parts of a mask (H, W), a mask each, cut at necks of at most 2 * neck pixels."""
    cores, number = ndimage.label(ndimage.binary_erosion(mask, SQUARE, neck), SQUARE)
    whole = np.where(cores, cores, ndimage.grey_dilation(cores, (2 * neck + 1,) * 2) * mask)  # no core loses a pixel
    return [whole == k for k in range(1, number + 1)]


def components(picture):
    """The `Component`s of a picture (PIL or (H, W, 3) uint8), solids and fragments.

    A pixel belongs to the nearest of the background (the border's median) and the colours' faces. Colours and necks
    separate solids that touch.
    """
    pixels = np.asarray(picture, dtype=np.float32)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    shades = np.array([np.median(border, 0), *(face for colour in COLOURS for face in faces(colour))])
    nearest = np.square(pixels[:, :, None] - shades).sum(-1).argmin(-1)
    colours, found = (nearest + 2) // 3, []  # 0 is the background, and every colour has three faces
    for part in parts(colours > 0, NECK):
        most = np.flatnonzero(np.bincount(colours[part]) >= LARGE)
        own = [side for colour in most for side in parts(part & (colours == colour), WIDE_NECK)]
        large = [side for side in own if side.sum() >= LARGE]
        found += large if len(large) > 1 else [part]
    places = [np.argwhere(mask)[:, ::-1] for mask in found]  # x, y
    return [Component(len(at), (*at.min(0).tolist(), *(at.max(0) + 1).tolist())) for at in places]


def count(picture):
    """How many solids and how many fragments a picture shows."""
    whole = [component.pixels >= FRAGMENT for component in components(picture)]
    return sum(whole), len(whole) - sum(whole)


class Judge(nn.Module):
    """Five convolutions over the picture at half its size, one logit per (colour, solid), max-pooled over space."""

    def __init__(self, width=32):
        super().__init__()
        layers, channels = [], 3
        for out, stride in ((width, 2), (2 * width, 2), (4 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        self.body = nn.Sequential(*layers)
        self.head = nn.Conv2d(channels, len(PAIRS), 3, 1, 1)

    def forward(self, images):
        """images (B, 3, H, W) in -1 to 1 -> logits (B, 48), ordered as `scenes.PAIRS`."""
        return self.logits(images).amax((2, 3))

    def logits(self, images):
        """Logits at every place, (B, 48, H / CELL, W / CELL)."""
        return self.head(self.body(F.avg_pool2d(images, 2)))

    def look(self, images):
        """`logits` of pictures (PIL or a (B, H, W, 3) uint8 array)."""
        batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return self.logits(batch.permute(0, 3, 1, 2).float() / 127.5 - 1)

    @classmethod
    def from_pretrained(cls, path=WEIGHTS):
        judge = cls()
        judge.load_state_dict(load_file(path))
        return judge.eval()

    @torch.no_grad()
    def read(self, images):
        """Pictures (PIL or a (B, H, W, 3) uint8 array) -> for each, the set of (colour, solid) seen in it."""
        return [set(places) for places in self.locate(images)]

    @torch.no_grad()
    def locate(self, images):
        """Like `read`, {(colour, solid): (x, y)}: its most certain place, in fractions of the picture."""
        logits = self.look(images)
        height, width = logits.shape[2:]
        highest, place = logits.flatten(2).max(-1)
        found = []
        for seen, places in zip(highest > 0, place.tolist()):
            cells = {PAIRS[k]: divmod(places[k], width) for k in seen.nonzero().flatten().tolist()}
            found.append({pair: ((x + 0.5) / width, (y + 0.5) / height) for pair, (y, x) in cells.items()})
        return found

    @torch.no_grad()
    def solids(self, images):
        """Like `read`, [(colour, solid, (x, y))], each once for every component that looks most like it.

        The place is the component's middle, or that of `locate` for a seen solid without a component.
        """
        found = []
        for image, logits, places in zip(images, self.look(images), self.locate(images)):
            height, width = np.asarray(image).shape[:2]
            solids = {pair: [] for pair in places}
            for pixels, (x0, y0, x1, y1) in components(image):
                if places and pixels >= FRAGMENT:
                    here = logits[:, y0 // CELL : -(-y1 // CELL), x0 // CELL : -(-x1 // CELL)].amax((1, 2))
                    most = max(places, key=lambda pair: here[PAIRS.index(pair)])
                    solids[most].append(((x0 + x1) / 2 / width, (y0 + y1) / 2 / height))
            found.append([(*pair, at) for pair, own in solids.items() for at in own or [places[pair]]])
        return found


def verdict(wanted, seen, count=None):
    """How a picture answers its prompt. wanted, seen: iterables of (colour, solid); count: how many solids it shows.

    correct: every solid is there in its colour and nothing else is; objects: every solid is there in any colour;
    missing: one is not; swap: some wanted solid appears in a colour that the prompt gives to another solid, and not
    in its own. With a count, counted: correct, with as many solids as asked; double: correct, but more; touching:
    correct, but fewer, because some touch.
    """
    wanted, seen = set(wanted), set(seen)
    colours = {colour for colour, _ in wanted}
    objects = {solid for _, solid in wanted} <= {solid for _, solid in seen}
    swap = any(
        (colour, solid) not in seen and any((other, solid) in seen for other in colours - {colour})
        for colour, solid in wanted
    )
    correct = wanted == seen
    found = {"correct": correct, "present": wanted <= seen, "objects": objects, "missing": not objects, "swap": swap}
    if count is not None:
        more = count - len(wanted)
        found |= {"counted": correct and more == 0, "double": correct and more > 0, "touching": correct and more < 0}
    return found

"""Reads a picture of the shapes world: which coloured solids are in it."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from .scenes import PAIRS


WEIGHTS = Path(__file__).with_name("judge.safetensors")


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
        """The same at every place, (B, 48, H / 16, W / 16)."""
        return self.head(self.body(F.avg_pool2d(images, 2)))

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
        """As `read`, {(colour, solid): (x, y)}: where it is seen most surely, in fractions of the picture."""
        batch = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        logits = self.logits(batch.permute(0, 3, 1, 2).float() / 127.5 - 1)
        height, width = logits.shape[2:]
        highest, place = logits.flatten(2).max(-1)
        found = []
        for seen, places in zip(highest > 0, place.tolist()):
            cells = {PAIRS[k]: divmod(places[k], width) for k in seen.nonzero().flatten().tolist()}
            found.append({pair: ((x + 0.5) / width, (y + 0.5) / height) for pair, (y, x) in cells.items()})
        return found


def verdict(wanted, seen):
    """How a picture answers its prompt. wanted, seen: iterables of (colour, solid).

    correct: every solid is there in its colour and nothing else is; objects: every solid is there, whatever its colour;
    swap: some wanted solid appears in a colour that the prompt gives to another solid, and not in its own.
    """
    wanted, seen = set(wanted), set(seen)
    colours = {colour for colour, _ in wanted}
    solids_seen = {solid for _, solid in seen}
    swap = any(
        (colour, solid) not in seen and any((other, solid) in seen for other in colours - {colour})
        for colour, solid in wanted
    )
    return {
        "correct": wanted == seen,
        "present": wanted <= seen,
        "objects": {solid for _, solid in wanted} <= solids_seen,
        "swap": swap,
    }

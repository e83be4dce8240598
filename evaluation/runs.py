"""A run is one folder: its settings, prompts and pictures, and JSON lines of what was drawn and scored.

Every process appends to a file of its own, which it locks, so that lines never interleave. It writes a picture beside
its place, moves it there and then writes its line, so that what a killed process leaves half-written never counts as
done.
"""

import hashlib
import json
import os
import re
from collections import Counter
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from filelock import FileLock, Timeout
from PIL import Image

from .prompts import Prompt, json_of, lines_of, text_of


ENDS = (b"IEND\xaeB`\x82", b"\xff\xd9")  # PNG's and JPEG's
PATIENCE = timedelta(days=7)  # how long finished processes wait for others


def processes():
    """The launcher's processes, which share the work."""
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def digest(content):
    """What tells files from others in a run's settings."""
    return hashlib.sha256(content).hexdigest()[:16]


def folder_of(method):
    """The name of a method's folder of pictures."""
    return re.sub(r"[^\w.=+-]", "_", method)


class Run:
    """settings: what its pictures have in common, `methods`, {name: arguments}, and the number of `seeds`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "settings.json"
        self.settings = json_of(path) if path.is_file() else {}
        if "methods" not in self.settings:  # another program's
            raise ValueError(f"{str(folder)!r} is no run, since it has no settings.json of one. Run `generate` first.")
        self.prompts = [Prompt(**entry) for entry in lines_of(self.folder / "prompts.jsonl")]
        texts = [prompt.text for prompt in self.prompts]
        self.clusters = np.unique(texts, return_inverse=True)[1]  # a prompt's number among the different texts
        self.methods = list(self.settings["methods"])
        self.shape = len(self.methods), len(self.prompts), self.settings["seeds"]

    @classmethod
    def create(cls, folder, settings, prompts):
        """The run with these settings, which may add methods and seeds to a folder, but must change nothing else."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        prompts = json.loads(json.dumps([prompt._asdict() for prompt in prompts]))  # as they are read again
        settings = json.loads(json.dumps(settings))
        new = not (folder / "settings.json").is_file()
        if not new:
            run = cls(folder)
            had, methods = run.settings, run.settings["methods"] | settings["methods"]
            differing = sorted(
                {key for key in had | settings if key not in ("methods", "seeds") and had.get(key) != settings.get(key)}
                | {name for name in had["methods"] if methods[name] != had["methods"][name]}
            )
            if not differing and prompts != [prompt._asdict() for prompt in run.prompts]:
                differing = ["prompts"]
            if differing:
                old, new = ({**s, **s["methods"], "prompts": "others"}.get(differing[0]) for s in (had, settings))
                raise ValueError(
                    f"{str(folder)!r} was drawn with other settings: {', '.join(differing)}. The first of these was"
                    f" {old!r} and is now {new!r}. Choose another folder."
                )
            settings = had | {"methods": methods, "seeds": max(had["seeds"], settings["seeds"])}
        folders = Counter(map(folder_of, settings["methods"]))
        shared = [name for name in settings["methods"] if folders[folder_of(name)] > 1]
        if shared:
            raise ValueError(
                f"The methods {' and '.join(shared)} would share a folder of pictures. Rename their files."
            )
        if new:
            path, lines = folder / "prompts.jsonl", "".join(f"{json.dumps(prompt)}\n" for prompt in prompts)
            if path.exists() and text_of(path) != lines:  # a user's
                raise ValueError(
                    f"{str(folder)!r} has other prompts in prompts.jsonl, but no run. Choose another folder."
                )
            write(path, lines)
        write(folder / "settings.json", json.dumps(settings, indent=1) + "\n")
        return cls(folder)

    def picture(self, method, prompt, seed):
        """A picture's path; method, prompt and seed are numbers."""
        place = f"{folder_of(self.methods[method])}/{prompt:05}/{seed:03}.{self.settings['format']}"
        return self.folder / "pictures" / place

    def rows(self, kind):
        """The lines of every process, as dicts that number their method, prompt and seed. A last line that a killed
        process cut off is skipped."""
        number = {name: k for k, name in enumerate(self.methods)}
        for path in sorted(self.folder.glob(f"{kind}-*.jsonl")):
            with path.open(encoding="utf-8") as file:
                for k, line in enumerate(file, 1):
                    if line.endswith("\n"):
                        row = json_of(f"{path}, line {k}", line)
                        row["method"] = number[row["method"]]
                        yield row

    def table(self, kind, *keys):
        """The lines' values, {key: float32 (methods, prompts, seeds)}, NaN if a line or its value is missing."""
        tables = {key: np.full(self.shape, np.nan, dtype=np.float32) for key in keys}
        for row in self.rows(kind):
            at = row["method"], row["prompt"], row["seed"]
            for key, values in tables.items():
                if row.get(key) is not None:
                    values[at] = row[key]
        return tables

    def done(self, kind):
        """Which pictures have a line, bool (methods, prompts, seeds)."""
        done = np.zeros(self.shape, dtype=bool)
        for row in self.rows(kind):
            done[row["method"], row["prompt"], row["seed"]] = True
        return done

    def present(self):
        """Which pictures exist and are whole, bool (methods, prompts, seeds)."""
        present, end = np.zeros(self.shape, dtype=bool), f".{self.settings['format']}"
        for method in range(len(self.methods)):
            above = self.picture(method, 0, 0).parent.parent
            for entry in os.scandir(above) if above.is_dir() else ():
                if not entry.name.isdecimal() or int(entry.name) >= self.shape[1]:  # such as a file manager's
                    continue
                for name in os.listdir(entry):
                    seed = name.removesuffix(end)
                    if name.endswith(end) and seed.isdecimal() and int(seed) < self.shape[2]:
                        present[method, int(entry.name), int(seed)] = whole(os.path.join(entry, name))
        return present

    @contextmanager
    def writer(self, kind, process):
        """A function that appends rows, with their method's name, and writes them to the file before it returns.
        ValueError if another command's writer has the same file."""
        path = self.folder / f"{kind}-{process}.jsonl"
        try:
            lock = locked(path).acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"Another command is writing {str(path)!r}. Wait until it ends, and run this again."
            ) from error
        with lock, path.open("a", encoding="utf-8") as file:
            with path.open("rb+") as before:  # cut off a killed process's text after its last whole line
                before.truncate(_whole(before))

            def append(rows):
                file.write("".join(json.dumps(row | {"method": self.methods[row["method"]]}) + "\n" for row in rows))
                file.flush()

            yield append


def whole(path):
    """Whether a picture exists and ends as its format does: a crash may leave it empty, cut off or full of zeros."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(8), file.seek(0, os.SEEK_END)
            file.seek(max(size - 8, 0))
            end = file.read()
    except FileNotFoundError:
        return False
    if start[:4] == b"RIFF":  # WebP states its size at the start
        return int.from_bytes(start[4:], "little") + 8 == size
    return end.endswith(ENDS)


def opened(path):
    """Open a picture. ValueError that names a broken one's file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{str(path)!r} is no picture: {error}. Remove it, and run `generate` with the same arguments, which draws"
            " it again."
        ) from error


def locked(path):
    """A file's lock, which ends with its process, even if that is killed."""
    return FileLock(path.with_name(f".{path.name}.lock"))


def _whole(file, chunk=1 << 16):
    """The bytes of a file up to its last newline."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - chunk, 0)
        file.seek(start)
        last = file.read(end - start).rfind(b"\n")
        if last >= 0:
            return start + last + 1
        end = start
    return 0


def write(path, text):
    """Write all or nothing."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def save(picture, path):
    """Save a PIL picture, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")  # its suffix gives the format
    picture.save(part)
    os.replace(part, path)

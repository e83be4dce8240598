"""Sets of prompts, and which of a prompt's words belong together, because methods other than T-SAM need to be told.

A thing is a noun with its modifiers: the spans (first character, one past the last) of its words in the prompt, noun
last. Structured prompts show their things by their template; in others a spaCy parser finds them.
"""

import csv
import io
import json
import logging
import re
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..shapes import scenes


logger = logging.getLogger(__name__)

# The words of Attend-and-Excite's evaluation prompts (Chefer et al. 2023, App. A)
ANIMALS = "cat dog bird bear lion horse elephant monkey frog turtle rabbit mouse".split()
OBJECTS = "backpack glasses crown suitcase chair balloon bow car bowl bench clock apple".split()
COLOURS = "red orange yellow green blue purple pink brown gray black white".split()
SETS = ("objects", "animals-objects", "animals")
COLOURED = 0.75  # share of coloured objects in "animals-objects"
SHAPES_SEED = 1
FORMS = ("shapes", "quarters", "sentences", "filled")  # prompts of the shapes world
QUARTERS = [(x, y, x + 0.5, y + 0.5) for y in (0.0, 0.5) for x in (0.0, 0.5)]
TEXT_KEYS = ("prompt", "caption", "prompts", "captions")  # names of an entry's or column's text, any case
PLAIN = ("", ".txt")  # suffixes of files with one prompt per line
FILLERS, FILLED = "and with the next to of a".split(), 11  # tokens: two sentences fit the small CLIP's window

MODIFIERS = {"amod", "nmod", "compound", "npadvmod", "advmod", "acomp"}  # dependencies; Rassin et al. 2023
NOUNS, VERBS = {"NOUN", "PROPN"}, {"AUX", "VERB"}

JOINT = re.compile(r"( and | with )", re.IGNORECASE)
WORD = r"[^\W\d_][\w'-]*"
PHRASE = re.compile(rf"(?:an?|the) (?:({WORD}) )?({WORD})\.?", re.IGNORECASE)
MAX_SKIPPED = 4  # characters of a prompt that a tokenizer may write differently


class Prompt(NamedTuple):
    """id: its name in its set, a string. things: a list of things, each a list of spans; empty if none are known.
    regions: {phrase: box}, a call's places for phrases."""

    id: str
    text: str
    things: list
    regions: dict | None = None


def structured(name, seed=0):
    """The texts of one of SETS: every pair of words once, colours drawn from `seed`.

    Attend-and-Excite drew its colours once: for its exact prompts pass its file, a prompt a line.
    """
    rng = np.random.default_rng(seed)

    def coloured(noun):
        return scenes.phrase(str(rng.choice(COLOURS)), noun)

    def plain(noun):
        return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"

    if name == "objects":
        return [f"{coloured(one)} and {coloured(other)}" for one, other in combinations(OBJECTS, 2)]
    if name == "animals":
        return [f"{plain(one)} and {plain(other)}" for one, other in combinations(ANIMALS, 2)]
    return [
        f"{plain(animal)} and {coloured(thing)}" if rng.random() < COLOURED else f"{plain(animal)} with {plain(thing)}"
        for animal, thing in product(ANIMALS, OBJECTS)
    ]


def of_shapes(form, solids, split, number):
    """(text, regions) of prompts of coloured solids, in one of FORMS.

    quarters: asks for each solid in another quarter of the picture. sentences: "a red cube , a blue sphere", because
    the small models know no full stop. filled: adds filler words after each solid, so that two make a long prompt.
    """
    rng = np.random.default_rng(SHAPES_SEED)
    for text, wanted in scenes.prompts(solids, split, number, SHAPES_SEED):
        regions, sentences = None, [scenes.phrase(*solid) for solid in wanted]
        if form == "quarters":
            chosen = rng.permutation(len(QUARTERS)).tolist()
            regions = {" ".join(solid): QUARTERS[k] for solid, k in zip(wanted, chosen)}
        if form == "filled":
            sentences = [f"{sentence} {' '.join(rng.choice(FILLERS, FILLED))}" for sentence in sentences]
        yield " , ".join(sentences) if form in ("sentences", "filled") else text, regions


def phrases(text):
    """Split a prompt at "and" and "with"."""
    return JOINT.split(text)[::2]


def things_of_template(text):
    """The things of "a [colour] [object] and a [colour] [object]", with one phrase or more; none in other prompts."""
    things, start = [], 0
    for k, part in enumerate(JOINT.split(text.rstrip())):
        if k % 2 == 0:
            match = PHRASE.fullmatch(part)
            if not match:
                return []
            things.append([tuple(start + x for x in match.span(g)) for g in (1, 2) if match[g]])
        start += len(part)
    return things


def things_of_doc(doc):
    """Every noun with its modifiers in a spaCy `Doc` (or span), but no noun without any.

    As in Rassin et al. 2023, these also count: modifiers of modifiers, words joined to them by "and", and what a verb
    says of the noun: "a dog that is red", "the dog is red".
    """
    things = []
    for noun in doc:
        if noun.pos_ not in NOUNS or noun.dep_ in MODIFIERS:
            continue
        found = [child for child in noun.children if child.dep_ in MODIFIERS]
        verbs = [child for child in noun.children if child.dep_ == "relcl"]
        if noun.dep_ in ("nsubj", "nsubjpass") and noun.head.pos_ == "AUX":
            verbs.append(noun.head)
        found += [child for verb in verbs for child in verb.children if child.dep_ in MODIFIERS]
        for word in found:  # it grows
            found += [c for c in word.children if c.dep_ in MODIFIERS | {"conj"} and c not in found]
        found = sorted((word for word in found if word.pos_ not in VERBS), key=lambda word: word.i)
        if found:
            things.append([(word.idx, word.idx + len(word)) for word in [*found, noun]])
    return things


def positions_of(things, text, tokens):
    """Things as their words' token positions, counted from the prompt's first content token.

    tokens: the content tokens' texts, as in a pipeline's `Syntax`. A word of several tokens has several positions;
    a thing that the encoder's window cuts off is left out.
    """
    text, end, owners = text.lower(), 0, {}
    for position, token in enumerate(tokens):
        token = token.strip().lower()
        start = text.find(token, end) if token else -1
        if start >= 0 and len(text[end:start].replace(" ", "")) <= MAX_SKIPPED:
            end = start + len(token)
            owners[position] = range(start, end)
    found = []
    for thing in things:
        words = [[p for p, own in owners.items() if own.start < last and first < own.stop] for first, last in thing]
        if all(words):
            found.append(words)
    return found


def text_of(path):
    """A file's text without byte order mark. ValueError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not in UTF-8 ({error.reason} at byte {error.start}). Save it in UTF-8:"
            f" iconv -f UTF-16 -t UTF-8 {path}, for instance, or LATIN1 in place of UTF-16."
        ) from error


def json_of(path, text=None):
    """Parse a JSON file, or its `text`. ValueError that names the file."""
    try:
        return json.loads(text_of(path) if text is None else text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error


def lines_of(path):
    """Parse each line of a JSON lines file. ValueError that names the file and the line."""
    lines = enumerate(text_of(path).split("\n"), 1)
    return [json_of(f"{path}, line {number}", line) for number, line in lines if line.strip()]


def named(entries, path, of=""):
    """(name, text, regions) of a file's entries: strings, or dicts with one of TEXT_KEYS."""
    for k, entry in enumerate(entries):
        entry = {"prompt": entry} if isinstance(entry, str) else entry
        keys = [key for key in entry if str(key).lower() in TEXT_KEYS] if isinstance(entry, dict) else []
        text = entry[keys[0]] if keys else None
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{str(path)!r} has an entry without a prompt, {entry!r}. Pass strings, or name the text 'prompt' or"
                " 'caption'."
            )
        yield entry.get("id", f"{of}{k}"), text, entry.get("regions")


def of_json(found, path, chosen):
    """`named` for a JSON file: a list of entries, one entry, or a dictionary of lists, where one may be `chosen`."""
    if isinstance(found, dict) and any(isinstance(found.get(key), str) for key in TEXT_KEYS):
        found = [found]
    if isinstance(found, list) and not chosen:
        return list(named(found, path))
    if not isinstance(found, dict) or not all(isinstance(part, list) for part in found.values()):
        raise ValueError(f"{str(path)!r} has to be a list of prompts, or a dictionary of such lists.")
    if chosen and chosen not in found:
        raise ValueError(f"{str(path)!r} has no list {chosen!r}, but {', '.join(map(repr, found))}.")
    lists = {chosen: found[chosen]} if chosen else found
    return [entry for name, part in lists.items() for entry in named(part, path, f"{name}-")]


def of_file(path, chosen=""):
    """(name, text, regions) of a file's prompts. Its suffix and a text file's first character tell the format."""
    end, text = Path(path).suffix.lower(), text_of(path)
    if chosen and text.lstrip()[:1] != "{":
        raise ValueError(f"Prompts are '{path}:{chosen}', but {str(path)!r} is no dictionary of lists.")
    if end in (".csv", ".tsv"):
        table = csv.DictReader(io.StringIO(text), delimiter="," if end == ".csv" else "\t", strict=True)
        try:
            return list(named(table, path))
        except csv.Error as error:
            raise ValueError(f"{str(path)!r} is no table at line {table.reader.line_num}: {error}.") from error
    if end in (".jsonl", ".ndjson"):
        return list(named(lines_of(path), path))
    if end == ".json" or (end in PLAIN and text.lstrip()[:1] in ("{", "[")):
        why = "" if end == ".json" else f", read as JSON since it begins with {text.lstrip()[0]}"
        return of_json(json_of(f"{path}{why}", text), path, chosen)
    if end not in PLAIN:
        raise ValueError(
            f"Prompts are {str(path)!r}, but {end} is not read. Pass .txt (a prompt a line), .json, .jsonl, .csv or"
            " .tsv."
        )
    return list(named((line.strip() for line in text.split("\n") if line.strip()), path))


def load(spec, parser=None):
    """The `Prompt`s that `spec` names, each once: one of SETS, "FORM:SOLIDS:SPLIT:NUMBER" with one of FORMS, a file, or
    "FILE:LIST" for one list of a file's dictionary.

    parser: a spaCy model's name, for prompts that no template fits.
    """
    file, _, chosen = (spec, "", "") if Path(spec).is_file() else spec.rpartition(":")
    if spec in SETS:
        found = [(k, text, None) for k, text in enumerate(structured(spec))]
    elif spec.partition(":")[0] in FORMS:
        try:
            form, solids, split, number = spec.split(":")
            found = [(k, *both) for k, both in enumerate(of_shapes(form, int(solids), split, int(number)))]
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"Prompts are {spec!r}: {reason}. Pass shapes:2:test:40, for instance.") from error
    elif file and Path(file).is_file():
        found = of_file(file, chosen)
    else:
        raise ValueError(
            f"Prompts are {spec!r}, which is no file and none of {', '.join(SETS)} and shapes:SOLIDS:SPLIT:NUMBER."
        )
    if not found:
        raise ValueError(f"Prompts are {spec!r}, in which there are none.")
    things = {text: things_of_template(text) for _, text, _ in found}
    if parser is not None:
        import spacy

        free = [text for text, spans in things.items() if not spans]
        things |= {text: things_of_doc(doc) for text, doc in zip(free, spacy.load(parser).pipe(free))}
    once = {}
    for name, text, regions in found:
        once.setdefault((text, repr(regions)), Prompt(str(name), text, things[text], regions))
    if repeated := len(found) - len(once):
        logger.warning(f"{repeated} of {len(found)} prompts of {spec!r} repeat others, and are drawn once.")
    return list(once.values())

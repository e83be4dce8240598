"""Write each pipeline as one file, as diffusers' examples/community takes it, into build/community:

    python hub/single_file.py

diffusers copies that file alone, from there and from the mirror that `custom_pipeline="pipeline_tsam_sd"` reads.
"""

import ast
import sys
import textwrap
from collections import Counter
from pathlib import Path

from diffusers_tsam import FAMILIES, VARIANTS


ROOT = Path(__file__).resolve().parent.parent
PIPELINES = FAMILIES | VARIANTS
# What pipelines import, each behind what it imports itself.
SHARED = (
    "tsam_arguments",
    "tsam_layout",
    "tsam",
    "attention_processors",
    "tsam_candidates",
    "tsam_pipeline",
    "tsam_sd",
)
SHARED += ("tsam_pixart",)
WIDTH = 119  # of diffusers' lines
HEAD = """
{files} of T-SAM for diffusers in one file, written by its hub/single_file.py: change those, not this.

Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with the
License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0. Unless required by
applicable law or agreed to in writing, software distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language
governing permissions and limitations under the License.
"""


def comment(text):
    """The text as comments; its paragraphs are wrapped anew where that makes a line too long."""
    paragraphs = [
        textwrap.fill(paragraph, WIDTH - 2) if max(map(len, paragraph.splitlines())) > WIDTH - 2 else paragraph
        for paragraph in text.strip().split("\n\n")
    ]
    return textwrap.indent("\n\n".join(paragraphs), "# ", lambda line: True).replace("# \n", "#\n")


def split(source, imports):
    """A module's docstring and its code without imports; those that are not relative are added to {module: names}."""
    tree, lines = ast.parse(source), source.splitlines()
    first = next(i for i, node in enumerate(tree.body[1:], 1) if not isinstance(node, (ast.Import, ast.ImportFrom)))
    for node in tree.body[1:first]:
        if isinstance(node, ast.Import):
            imports.update({f"import {ast.unparse(alias)}": set() for alias in node.names})
        elif node.level == 0:
            imports.setdefault(f"from {node.module} import ", set()).update(map(ast.unparse, node.names))
    return ast.get_docstring(tree), "\n".join(lines[tree.body[first - 1].end_lineno :]).strip()


def import_block(imports):
    """The statements, those of Python's own modules first."""
    groups = ([], [])
    for start, names in sorted(imports.items(), key=lambda item: (item[0].startswith("from"), item[0].lower())):
        line = start + ", ".join(sorted(names))
        if len(line) > WIDTH:
            line = f"{start}({''.join(f'{chr(10)}    {name},' for name in sorted(names))}\n)"
        groups[start.split()[1].split(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(group) for group in groups)


def single_file(kind):
    """The text of a pipeline with all that it imports from beside it."""
    own, imports = f"{PIPELINES[kind].module}.py", {}
    source = (ROOT / own).read_text(encoding="utf-8")
    files = (*(f"{name}.py" for name in SHARED if f"from .{name} import" in source), own)
    modules = [split((ROOT / file).read_text(encoding="utf-8"), imports) for file in files]
    names = Counter(
        name
        for _, code in modules
        for node in ast.parse(code).body
        for name in {getattr(node, "name", None), *(ast.unparse(target) for target in getattr(node, "targets", []))}
    )
    if twice := [name for name, number in names.items() if name and number > 1]:
        raise SystemExit(f"{', '.join(twice)} would be defined twice in one file. Rename one in {' or '.join(files)}.")
    head = comment(HEAD.format(files=", ".join(files)))
    blocks = [f'{head}\n\n"""{modules[-1][0]}\n"""\n\n{import_block(imports)}']
    blocks += [f"{comment(doc)}\n\n\n{code}" for doc, code in modules[:-1]] + [modules[-1][1]]
    return "\n\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    folder = ROOT / "build" / "community"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, family in PIPELINES.items():
        (folder / f"{family.module}.py").write_text(single_file(kind), encoding="utf-8")
        print((folder / f"{family.module}.py").relative_to(ROOT))

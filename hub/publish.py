"""Publish T-SAM on the Hugging Face Hub: each pipeline's code, each small model with that code, and modular blocks.

    python hub/publish.py ORG --dry-run
    hf auth login && python hub/publish.py ORG

A dry run writes and lists the eight repositories, and needs no token and no network.
"""

import argparse
import json
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from string import Template

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from single_file import ROOT, single_file

import diffusers_tsam
from diffusers_tsam import FAMILIES, MODULAR
from diffusers_tsam.shapes import ARGUMENTS, TUNED


FACTS = {  # what the cards say beside what FAMILIES does
    "sd": {"weights": "shapes-tsam", "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "seed": 74},
    "pixart": {"weights": "shapes-tsam-pixart", "base_model": "PixArt-alpha/PixArt-XL-2-1024-MS", "seed": 0},
}

WEIGHTS_OF = {  # the official ones that blocks point at
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd3": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
    "anima": "circlestone-labs/Anima-Base-v1.0-Diffusers",
}


def measured(kind):
    """What the benchmarks found on a small model, in a card's words."""
    path = ROOT / "benchmarks" / "results" / "summary.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("card", {}) if path.is_file() else {}
    return found.get(kind, "How often T-SAM helps it was not measured.")


def build_blocks(folder, org, kind):
    """Write blocks, and where the text-to-image workflow finds its components; nothing is loaded for it."""
    blocks = getattr(diffusers_tsam, MODULAR[kind].blocks)()
    blocks.save_pretrained(folder)
    pipe = blocks.get_workflow("text2image").init_pipeline()
    pipe.save_config(folder)
    index = json.loads((folder / pipe.config_name).read_text())
    for name in pipe.pretrained_component_names:
        index[name][2] |= {"pretrained_model_name_or_path": WEIGHTS_OF[kind], "subfolder": name}
    (folder / pipe.config_name).write_text(json.dumps(index, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", folder)
    note = "Experimental: which layers to read, and how, is a guess." if MODULAR[kind].experimental else ""
    values = MODULAR[kind]._asdict() | {"org": org, "kind": kind, "base_model": WEIGHTS_OF[kind], "note": note}
    write_card(folder, "blocks", values)


def build(folder, org, kind, card):
    """Write the repository of a kind of model whose card is "code" or "weights"."""
    family, name = FAMILIES[kind], "pipeline.py"  # which diffusers looks for where there is nothing but code
    if card == "weights":
        name = f"{family.module}.py"
        shutil.copytree(ROOT / "shapes" / kind, folder)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = [family.module, family.pipeline]  # code beside the weights, which loads with trust
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(single_file(kind), encoding="utf-8")
    for file in ("LICENSE", "docs/tsam.png"):
        shutil.copy(ROOT / file, folder)
    tuned = ", ".join(f"{name}={value!r}" for name, value in (TUNED[kind] | ARGUMENTS[kind]).items()).replace("'", '"')
    values = family._asdict() | FACTS[kind] | {"org": org, "kind": kind, "tuned": tuned, "measured": measured(kind)}
    write_card(folder, card, values)


def write_card(folder, card, values):
    text = Template((ROOT / "hub" / f"{card}.md").read_text(encoding="utf-8")).substitute(values)
    (folder / "README.md").write_text(text, encoding="utf-8")


def build_space(folder):
    """Write the demo as a Space: the files of app/, and the package beside."""
    unused = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "app", folder, ignore=unused)
    for room in ("app", "shapes"):
        shutil.copytree(ROOT / room, folder / "diffusers_tsam" / room, ignore=unused)
    for file in (*ROOT.glob("*.py"), ROOT / "LICENSE"):
        shutil.copy(file, folder / "diffusers_tsam")


def check(api, org, repositories, repo_type):
    """Refuse what is not ours to write to, before anything is uploaded."""
    user = api.whoami()
    own = [user["name"], *(group["name"] for group in user.get("orgs", []))]
    if org not in own:
        raise ValueError(f"ORG is {org!r}, neither you nor an organization of yours. Pass one of {', '.join(own)}.")
    ours = {"pipeline.py", "modular_tsam.py", *(f"{family.module}.py" for family in FAMILIES.values())}
    ours.add("diffusers_tsam/tsam.py")  # of the demo
    for name in repositories:
        exists = api.repo_exists(name, repo_type=repo_type)
        files = set(api.list_repo_files(name, repo_type=repo_type)) - {".gitattributes"} if exists else set()
        if files and not files & ours:
            raise ValueError(f"{name} exists, and its {len(files)} files are not T-SAM's. Rename it on the Hub first.")


def prepare(org, folder):
    """Make the new folder. ValueError for a wrong ORG, which could lead out of it."""
    if not org:
        raise ValueError("ORG is empty. Pass a user or an organization.")
    if "." in org or "/" in org:
        raise ValueError(f"ORG is {org!r}, but diffusers loads no code from names with a dot or a second slash.")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"--output is {str(folder)!r}: {error.strerror}. Pass a new folder.") from None


def publish(org, folder, space=False, dry_run=False, private=False):
    """Build, list and upload the repositories, or the demo alone, as ORG/tsam-demo."""
    repo_type = "space" if space else "model"
    if space:
        repositories = {f"{org}/tsam-demo": build_space}
    else:
        repositories = {f"{org}/tsam-{k}": partial(build, org=org, kind=k, card="code") for k in FAMILIES}
        for k in FAMILIES:
            repositories[f"{org}/{FACTS[k]['weights']}"] = partial(build, org=org, kind=k, card="weights")
        repositories |= {f"{org}/tsam-{k}": partial(build_blocks, org=org, kind=k) for k in MODULAR}
    api = HfApi()
    if not dry_run:
        check(api, org, repositories, repo_type)
    for name, write in repositories.items():
        write(folder / name)
        for file in sorted(path for path in (folder / name).rglob("*") if path.is_file()):
            print(f"{file.stat().st_size:>12,}  {file.relative_to(folder).as_posix()}")
    for name in () if dry_run else repositories:
        sdk = "gradio" if space else None
        url = api.create_repo(name, repo_type=repo_type, space_sdk=sdk, private=private or None, exist_ok=True)
        message = "T-SAM for diffusers"
        api.upload_folder(repo_id=name, repo_type=repo_type, folder_path=folder / name, commit_message=message)
        print(f"{url} is up")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("org", metavar="ORG", help="user or organization on the Hub that will own the repositories")
    parser.add_argument("--dry-run", action="store_true", help="only write and list what would be uploaded")
    parser.add_argument("--output", metavar="FOLDER", help="new folder to write to (default: a temporary one)")
    parser.add_argument("--private", action="store_true", help="create private repositories")
    parser.add_argument("--space", action="store_true", help="publish the demo, as a Space, instead of these")
    args = parser.parse_args()
    folder = Path(args.output or Path(tempfile.mkdtemp(), "hub"))
    try:
        prepare(args.org, folder)
        publish(args.org, folder, args.space, args.dry_run, args.private)
    except (HTTPError, OSError, ValueError) as error:
        again = "" if isinstance(error, ValueError) else f" ({type(error).__name__}) What is up stays; run it again."
        sys.stderr.write(f"publish.py: error: {' '.join(str(error).split())}{again}\n")
        raise SystemExit(2) from None
    print(f"The repositories are in {folder}.{' Nothing was uploaded.' * args.dry_run}")

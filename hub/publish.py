"""Publish T-SAM on the Hugging Face Hub: a repository of code for each pipeline, one with weights for each small model.

    python hub/publish.py ORG --dry-run  # writes the four repositories into a folder; needs no token and no network
    hf auth login
    python hub/publish.py ORG

All that can be checked is checked before anything is uploaded, and a repository is uploaded in one commit. Run again,
it uploads only what has changed.
"""

import argparse
import shutil
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from string import Template

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from shapes import ARGUMENTS, MODELS, TUNED  # noqa: E402


HELPER = "attention_processors.py"
TOKENS = "https://huggingface.co/settings/tokens"
FAILURES = (HTTPError, OSError, ValueError)  # of a request; ValueError where the Hub finds fault with a card


@dataclass(frozen=True)
class Pipeline:
    """What the two repositories of a pipeline are made of, and what their cards say."""

    code: str  # the repository of code
    weights: str  # the one with weights
    file: str
    class_name: str
    stock: str
    name: str
    large: str  # the model of `base_model`
    base_model: str
    tag: str
    settings: dict  # of the call in the code's card
    seed: int  # of the one in the weights'
    minutes: int  # of training
    parts: str
    measured: str  # of T-SAM on the small model


PIPELINES = {
    "sd": Pipeline(
        code="tsam-sd",
        weights="shapes-tsam",
        file="pipeline_tsam_sd.py",
        class_name="StableDiffusionTSAMPipeline",
        stock="StableDiffusionPipeline",
        name="Stable Diffusion",
        large="Stable Diffusion 1.5",
        base_model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        tag="stable-diffusion",
        settings={"tsam_steps": 25, "alpha": 10.0, "gamma": 2.0},
        seed=74,
        minutes=70,
        parts="a UNet of 4.3 M parameters, a CLIP text encoder of 0.7 M and a VAE",
        measured="three solids were right in 88.1 ± 3.8 % of 420 pictures with settings tuned for it, in 80.2 ± 5.2 %"
        " with stock; with the paper's settings, which are the defaults, in 51.4 ± 7.6 % of 210, where stock had"
        " 80.5 ± 7.1 %.",
    ),
    "pixart": Pipeline(
        code="tsam-pixart",
        weights="shapes-tsam-pixart",
        file="pipeline_tsam_pixart.py",
        class_name="PixArtAlphaTSAMPipeline",
        stock="PixArtAlphaPipeline",
        name="PixArt-α",
        large="PixArt-α",
        base_model="PixArt-alpha/PixArt-XL-2-1024-MS",
        tag="pixart-alpha",
        settings={"alpha": 15.0, "gamma": 4.0},
        seed=0,
        minutes=100,
        parts="a transformer of 20 blocks and 5.5 M parameters, a T5 text encoder of 0.5 M, and the VAE of the small"
        " Stable Diffusion",
        measured="no gain could be measured: three solids were right in 82.9 ± 5.4 % of 210 pictures with settings"
        " tuned for it, in 83.8 ± 5.6 % with stock; with the paper's settings, which are the defaults, in"
        " 60.0 ± 12.2 % of 105, where stock had 82.9 ± 7.7 %.",
    ),
}


def fail(message, code=2):
    print(f"publish.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def card(kind, org, weights):
    """The model card of a repository."""
    pipeline = PIPELINES[kind]
    repo_id = f"{org}/{pipeline.weights if weights else pipeline.code}"
    tags = ["diffusers", "custom-pipeline", "text-to-image", "training-free", pipeline.tag, "arxiv:2411.15236"]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="apache-2.0",
        base_model=None if weights else pipeline.base_model,  # the small models were trained from scratch
        tags=tags,
    )
    settings = TUNED[kind] | ARGUMENTS[kind] if weights else pipeline.settings
    settings = ", ".join(f"{name}={value!r}" for name, value in settings.items()).replace("'", '"')
    if weights:
        measured = f"on this model, {pipeline.measured} Nothing was measured on large models."
    else:
        measured = (
            f"this was not run on the real weights of {pipeline.large}, only on their published architecture without"
            f" weights, and on a [small {pipeline.name}](https://huggingface.co/{org}/{pipeline.weights}) trained for"
            f" it. There, {pipeline.measured}"
        )
    template = Template((ROOT / "hub" / ("weights.md" if weights else "code.md")).read_text(encoding="utf-8"))
    fields = vars(pipeline) | {"org": org, "repo_id": repo_id, "settings": settings, "measured": measured}
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{template.substitute(fields)}")


def build(folder, org, kind, weights):
    """Write a repository into a new folder."""
    from attention_processors import add_code  # torch takes a second

    pipeline = PIPELINES[kind]
    if weights:
        shutil.copytree(MODELS[kind], folder)
        add_code(folder / "model_index.json", ROOT / pipeline.file, pipeline.class_name)
    else:
        folder.mkdir(parents=True)
        shutil.copy(ROOT / pipeline.file, folder)
        shutil.copy(ROOT / HELPER, folder)
        # diffusers looks for a pipeline.py. From a local folder it copies only what that imports itself, and runs it in
        # one module for all folders, where a second name would be a second pipeline.
        (folder / "pipeline.py").write_text(
            f"from .{Path(HELPER).stem} import TextSelfAttention  # noqa: F401\n"
            f"from .{Path(pipeline.file).stem} import {pipeline.class_name} as Pipeline  # noqa: F401\n"
        )
    shutil.copy(ROOT / "docs" / "tsam.png", folder)
    shutil.copy(ROOT / "LICENSE", folder)
    card(kind, org, weights).save(folder / "README.md")


def check_name(repo_id):
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        fail(f"{error} Pass the name of a user or an organization on the Hub.")
    if "." in repo_id:  # diffusers makes a module's name of it
        fail(f"{repo_id!r} has a dot, and diffusers loads no code from such a repository. Pass an ORG without one.")


def check(api, org, repositories, private, overwrite):
    """Whether everything can be uploaded, as far as the Hub tells before; changes nothing there."""
    try:
        user = api.whoami()
        role = user.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            fail(f"the token may only read, but has to write. Create another at {TOKENS}.")
        own = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
        if org not in own:
            fail(f"{org!r} is neither you nor an organization of yours. Publish to one of {', '.join(own)}.")
        for repo_id, (kind, _) in repositories.items():
            try:
                info = api.model_info(repo_id)
            except RepositoryNotFoundError:
                continue
            files = {file.rfilename for file in info.siblings} - {".gitattributes"}
            missing = sorted({PIPELINES[kind].file, HELPER} - files)
            if files and missing and not overwrite:
                fail(
                    f"{repo_id} exists and is not ours: it holds {len(files)} files but no {' and no '.join(missing)}."
                    " Rename it, or pass --overwrite to put ours beside and over them."
                )
            if private and not info.private:
                fail(f"{repo_id} is public, which --private does not change. Do so in its settings, or leave it out.")
    except LocalTokenNotFoundError:
        fail(f"there is no token. Run `hf auth login`, set HF_TOKEN or pass --token, with one from {TOKENS}.")
    except FAILURES as error:
        fail(f"nothing was uploaded: {reason(error)}")


def reason(error):
    """A failed request in words, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the token is not valid ({error}). Create one that may write at {TOKENS}."
    if status == 403:
        return f"the token may not do this ({error}). Create one that may write to ORG at {TOKENS}."
    return f"{type(error).__name__}: {error}"


def upload(api, folder, repositories, private):
    """Create the repositories that are not there, then fill each with one commit."""
    up, left = [], list(repositories)
    try:
        for repo_id in repositories:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
        for repo_id in repositories:
            # `upload_folder` may take several commits
            files = {path.relative_to(folder / repo_id).as_posix(): path for path in files_of(folder / repo_id)}
            operations = [CommitOperationAdd(name, path) for name, path in files.items()]
            print(api.create_commit(repo_id, operations, commit_message="T-SAM for diffusers").repo_url, flush=True)
            up.append(left.pop(0))
    except FAILURES as error:
        if not up:
            fail(f"nothing was uploaded: {reason(error)}")
        fail(
            f"{', '.join(up)} are up, but {', '.join(left)} are not: {reason(error)} It is safe to run the same command"
            " again: what is up already stays as it is.",
            code=1,
        )


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("org", metavar="ORG", help="user or organization on the Hub that will own the repositories")
    parser.add_argument("--dry-run", action="store_true", help="only write and list what would be uploaded")
    parser.add_argument("--output", metavar="FOLDER", help="new folder to write to (default: a temporary one)")
    parser.add_argument("--private", action="store_true", help="create private repositories")
    parser.add_argument("--overwrite", action="store_true", help="also write into repositories that hold other files")
    parser.add_argument("--token", help="that may write to ORG (default: that of `hf auth login` or HF_TOKEN)")
    args = parser.parse_args(argv)

    repositories = {f"{args.org}/{pipeline.code}": (kind, False) for kind, pipeline in PIPELINES.items()}
    repositories |= {f"{args.org}/{pipeline.weights}": (kind, True) for kind, pipeline in PIPELINES.items()}
    for repo_id in repositories:
        check_name(repo_id)
    if args.output and Path(args.output).exists():
        fail(f"--output is {args.output!r}, which exists already. Pass the name of a new folder.")
    api = HfApi(token=args.token)
    if not args.dry_run:
        check(api, args.org, repositories, args.private, args.overwrite)

    kept = args.output or (args.dry_run and tempfile.mkdtemp(prefix="tsam-hub-"))
    with nullcontext(kept) if kept else tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for repo_id, (kind, weights) in repositories.items():
            build(folder / repo_id, args.org, kind, weights)
            files = files_of(folder / repo_id)
            print(f"{repo_id}: {len(files)} files, {sum(file.stat().st_size for file in files):,} bytes")
            for file in files:
                print(f"{file.stat().st_size:>12,}  {file.relative_to(folder / repo_id)}")
        if args.dry_run:
            print(f"Nothing was uploaded. The repositories are in {folder}")
        else:
            upload(api, folder, repositories, args.private)


if __name__ == "__main__":
    main()

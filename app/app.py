"""The demo: one prompt drawn without and with T-SAM, from the same noise, and why the pictures differ.

    tsam-demo                                  # on the models that ship
    tsam-demo --models ~/models --hub          # and on saved pipelines, and what the Hub has

On the Hugging Face Hub this file is a Space's `app.py`, beside the package.
"""

import argparse
import hashlib
import json
import logging
import math
import queue
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlencode


if find_spec("spaces"):  # Hugging Face's, on machines that lend a GPU by the call; before torch is imported
    from spaces import GPU
else:
    GPU = lambda function: function  # noqa: E731

import gradio as gr
import pandas as pd
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from starlette.middleware import Middleware

import diffusers_tsam
from diffusers_tsam import FAMILIES, cli, figures
from diffusers_tsam.shapes import MODELS
from diffusers_tsam.tsam import OBJECTIVES, SCHEDULES, check_alignment


FIELDS = ("model", "prompt", "seed", "steps", "schedule", "objective", "alpha", "relative_step", "gamma")
FIELDS += ("guidance_scale",)  # what a page sends, a link holds and a drawing needs, in this order
WHOLE = ("seed", "steps")
LIMITS = {"seed": (0, 2**32 - 1), "steps": (1, 100), "guidance_scale": (1, 30)}
MAX_PROMPT, MAX_WAITING, MAX_LOADED = 300, 20, 2  # characters, drawings in the queue, models in memory
MAX_SIDE = 1024  # pixels of a picture, whose size is always the model's default, one at a time
MAX_UPLOAD = 1  # bytes: this page takes no files
SHOWN = 512  # pixels at least of a picture on the page
KEPT = 3600  # seconds that a result stays on the server
BREAKS = (
    0.35  # how far off stock's latents' norm may be at the end: from there, pictures of both small models are broken
)
BLANK = "#8a8f98"
COLORS = {"stock": "#8a8f98", "T-SAM": "#e8590c"}
SHIPPED = {f"{FAMILIES[kind].name} (ships here)": kind for kind in MODELS}
EXAMPLES = (  # seeds picked: stock forgets or confuses something that T-SAM draws
    ("sd", "a red cube and a blue sphere", 74),
    ("sd", "a green cube and a purple ring and a red star", 1),
    ("pixart", "a green cube and a purple ring and a red star", 1),
)
FILES = {"Stock picture": "stock.png", "T-SAM picture": "tsam.png", "Numbers (JSON)": "tsam.json"}
HELP = {
    "schedule": "Where the updates are: “light” costs least, “paper” most.",
    "objective": "How S, of the maps, is compared with T, of the text.",
    "alpha": "Size of an update. Too much breaks the picture. Empty where a relative step is given.",
    "relative_step": "Instead of alpha: the first update as a share of the input's norm, such as 0.05.",
    "gamma": "More keeps only the strongest bonds between words.",
    "guidance_scale": "How closely to follow the prompt.",
}
HEADER = """<h1>T-SAM</h1><p>Text-to-image models forget objects and swap colours. T-SAM reads out of the text encoder which
words belong together, and holds the picture's attention to it. Below: one prompt, one seed, without it and with it.</p>"""
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none that is fetched
THEME = gr.themes.Base(primary_hue="orange", neutral_hue="slate", radius_size="md", **FONTS)
# The browser itself refuses to ask anyone else.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
WORK = tempfile.TemporaryDirectory(prefix="tsam-demo-")
logger = logging.getLogger(__name__)


# ----------------------------------------------------------------------------------------------------------------------
# Models


class Models:
    """What pages may draw with: the models that ship, saved pipelines in `folders`, and, with `hub`, Hub ids.

    A page's name of a model is looked up and never taken for a path. ValueError where it is not there.
    """

    def __init__(self, folders=(), hub=False, device=None):
        self.hub, self.device = hub, device
        self.roots = [Path(folder).expanduser().resolve() for folder in folders]
        for root in self.roots:
            if not root.is_dir():
                raise ValueError(f"--models is {str(root)!r}, which is no folder.")
        self.loaded, self.lock = OrderedDict(), threading.Lock()

    def offered(self):
        """{name: folder}, those of each root and its folders that are saved pipelines, no link leading elsewhere."""
        found = {name: Path(MODELS[kind]) for name, kind in SHIPPED.items()}
        for root in self.roots:
            for index in sorted([*root.glob("model_index.json"), *root.glob("*/model_index.json")]):
                if index.resolve().is_relative_to(root):
                    found[index.parent.relative_to(root.parent).as_posix()] = index.parent.resolve()
        return found

    def source(self, name):
        """A folder or a Hub id."""
        offered = self.offered()
        if name in offered:
            return offered[name]
        if self.hub and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)) and not Path(name).exists():
            return name
        also = " or type a Hub id such as owner/name" if self.hub else ""
        raise ValueError(f"There is no model {str(name)[:100]!r} here. Choose one of the list{also}.")

    def defaults(self, name):
        """SETTINGS of a model that need not be loaded."""
        source = self.source(name)
        try:
            local = isinstance(source, Path)
            kind = cli.kind_of(source / "model_index.json" if local else hf_hub_download(source, "model_index.json"))
        except (OSError, ValueError) as error:
            raise ValueError(f"The model {name!r} cannot be loaded: {error}".replace(str(source), name)) from error
        return cli.settings_of(getattr(diffusers_tsam, FAMILIES[kind].pipeline), kind, name in SHIPPED)

    def load(self, name):
        """A pipeline, and its VAE's `colours_of`; the MAX_LOADED last ones are kept."""
        source = self.source(name)
        with self.lock:
            if source not in self.loaded:
                try:
                    pipe, kind = cli.load(source, device=self.device)
                except ValueError as error:
                    reason = str(error.__cause__ or error).replace(str(source), name)
                    raise ValueError(f"The model {name!r} cannot be loaded: {reason}") from error
                size = getattr(pipe, FAMILIES[kind].denoiser).config.sample_size
                side = max(size if isinstance(size, (list, tuple)) else [size or 0]) * pipe.vae_scale_factor
                if side > MAX_SIDE:
                    raise ValueError(f"The model {name!r} draws {side} pixels, but {MAX_SIDE} is the limit here.")
                pipe.set_progress_bar_config(disable=True)
                self.loaded[source] = pipe, colours_of(pipe.vae)
                while len(self.loaded) > MAX_LOADED:
                    self.loaded.popitem(last=False)
            self.loaded.move_to_end(source)
            return self.loaded[source]


# ----------------------------------------------------------------------------------------------------------------------
# Drawing


class Result(NamedTuple):
    """A drawing. settings: values of FIELDS; pair: of `cli.Drawn`, stock first; seen: what the judge of the small models
    reads; strain: the norm of T-SAM's last latents as a multiple of stock's."""

    settings: dict
    pair: tuple
    seen: list | None
    strain: float


class Stop:
    """A session's wish to end its drawing; a file, since a lent GPU draws in another process."""

    def __init__(self, request):
        self.name = hashlib.sha256(str(request.session_hash).encode()).hexdigest()
        self.file = Path(WORK.name, f"{self.name}.stop")

    def set(self):
        self.file.touch()

    def clear(self):
        self.file.unlink(missing_ok=True)

    def is_set(self):
        return self.file.exists()


@torch.no_grad()
def colours_of(vae, side=8, samples=16):
    """The linear map of latents, and 1, to colours from 0 to 1 that is nearest to what the VAE decodes: (C + 1, 3)."""
    noise = torch.randn(samples, vae.config.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    coarse = torch.nn.functional.interpolate(noise[..., : side // 4, : side // 4], size=(side, side), mode="bilinear")
    latents = torch.cat([noise, 1.5 * coarse])
    decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype), return_dict=False)[0]
    pictures = torch.nn.functional.adaptive_avg_pool2d(decoded.float().cpu() / 2 + 0.5, side)
    inputs, outputs = (x.movedim(1, -1).flatten(0, 2) for x in (latents, pictures))
    return torch.linalg.lstsq(torch.nn.functional.pad(inputs, (0, 1), value=1.0), outputs).solution


def preview(latents, colours):
    """A rough picture of latents (C, h, w), which costs next to nothing."""
    pixels = torch.nn.functional.pad(latents.float().cpu().movedim(0, -1), (0, 1), value=1.0) @ colours
    picture = Image.fromarray((255 * pixels.nan_to_num().clamp(0, 1)).byte().numpy())
    return picture.resize([math.ceil(SHOWN / max(picture.size)) * side for side in picture.size])


def wrong(models, values):
    """{field: what to do about it} for the `values` of FIELDS that cannot be drawn."""
    found = {}
    prompt = values["prompt"] if isinstance(values["prompt"], str) else ""
    if not prompt.strip():
        found["prompt"] = "Write what to draw: two words or more, such as “a red cube and a blue sphere”."
    elif len(prompt.split()) < 2:
        found["prompt"] = "T-SAM aligns words with each other. Write two or more."
    elif len(prompt) > MAX_PROMPT:
        found["prompt"] = f"The prompt has {len(prompt)} characters, but at most {MAX_PROMPT} are drawn. Shorten it."
    elif any("\ud800" <= sign <= "\udfff" for sign in prompt):
        found["prompt"] = "The prompt is not in UTF-8. Write it again."
    try:
        models.source(values["model"])
    except ValueError as error:
        found["model"] = str(error)
    for name, (low, high) in LIMITS.items():
        value = values[name]
        number = isinstance(value, (int, float)) and math.isfinite(value) and (name not in WHOLE or value == int(value))
        if not number or not low <= value <= high:
            kind = "a whole number" if name in WHOLE else "a number"
            found[name] = f"{name.replace('_', ' ').capitalize()} has to be {kind} from {low} to {high}."
    if values["schedule"] not in SCHEDULES:
        found["schedule"] = f"Choose one of {', '.join(SCHEDULES)}."
    if (values["alpha"] is None) == (values["relative_step"] is None):
        found["alpha"] = "Give either alpha or a relative step, and leave the other one empty."
    try:
        check_alignment(values["alpha"] or 0.0, values["gamma"], values["objective"], values["relative_step"])
    except (TypeError, ValueError) as error:
        found.setdefault(re.match(r"`(\w+)`", str(error))[1], str(error).replace("`", ""))
    return found


def drawing(models, values, stop):
    """Draw, and hand over a (picture's name, step, preview, loss) for every step, then the `Result` if nothing has
    stopped it."""
    pipe, colours = models.load(values["model"])
    settings = models.defaults(values["model"]) | {name: values[name] for name in FIELDS[4:]}
    settings |= {"num_inference_steps": int(values["steps"]), "alpha": values["alpha"] or 0.0}
    events, norms = queue.SimpleQueue(), {}

    def on_step(pipe, name, step, latents, loss):
        norms[name] = latents.float().norm().item()
        events.put((name, step, preview(latents[0], colours), loss))
        if stop.is_set():
            pipe._interrupt = True

    def work():
        try:
            events.put([cli.compare(pipe, values["prompt"], int(values["seed"]), on_step, **settings)])
        except Exception as error:  # is raised where the page waits
            events.put([error])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        while isinstance(event := events.get(), tuple):
            yield event
    finally:
        if thread.is_alive():
            stop.set()  # the page has gone
        thread.join()
        stop.clear()
    (pair,) = event
    if isinstance(pair, Exception):
        raise pair
    if pair is not None:
        seen = cli.judged([drawn.picture for drawn in pair]) if values["model"] in SHIPPED else None
        yield Result(values, pair, seen, norms["T-SAM"] / norms["stock"])


# ----------------------------------------------------------------------------------------------------------------------
# What the page shows


def note(text, kind="note"):
    """A line above the pictures: kind is "note", "warning" or "error"."""
    return f'<p class="tsam-{kind}" role="{"alert" if kind == "error" else "status"}">{escape(text)}</p>'


def captions(left="", right=""):
    sides = zip(("Stock", "T-SAM"), (left, right))
    return '<div class="tsam-captions">' + "".join(f"<p><b>{n}</b> {escape(text)}</p>" for n, text in sides) + "</div>"


def curve_of(losses):
    """losses: {picture's name: a loss per step}."""
    rows = [(step + 1, loss, name) for name in losses for step, loss in enumerate(losses[name])]
    return pd.DataFrame(rows, columns=["step", "loss", "picture"])


def played(models, values, stop):
    """What the page shows while it draws: (status, pictures, captions, curve, result)."""
    same = gr.skip()
    for message in wrong(models, values).values():
        yield note(message, "error"), same, same, same, None
        return
    steps, losses = int(values["steps"]), {"stock": [], "T-SAM": []}
    shown = dict.fromkeys(losses, Image.new("RGB", (SHOWN, SHOWN), BLANK))
    event = None
    try:
        yield note("Loading the model …"), same, captions(), same, None
        for event in drawing(models, values, stop):
            if not isinstance(event, Result):
                name, step, shown[name], loss = event
                losses[name].append(loss)
                text = f"{name}: step {step + 1} of {steps}, loss {loss:.3f}"
                bar = f'<progress max="{2 * steps}" value="{sum(map(len, losses.values()))}">{text}</progress>'
                yield note(text) + bar, tuple(shown.values()), same, curve_of(losses), None
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        yield note(str(error).replace("`", ""), "error"), same, same, same, None
        return
    except Exception as error:
        logger.exception("A drawing failed.")
        text = f"The drawing failed ({type(error).__name__}); the server's log says where. Try other settings."
        yield note(text, "error"), same, same, same, None
        return
    if not isinstance(event, Result):
        yield note("Stopped. “Draw” starts again from the first step."), same, same, same, None
        return
    yield note_of(event), pictures_of(event), captions_of(event), curve_of(losses), event


def note_of(result):
    stock, tsam = result.pair
    last = tsam.guided[-1]
    text = f"Loss after the {len(tsam.guided)} guided steps: stock {stock.losses[last]:.3f}, T-SAM {tsam.losses[last]:.3f}."
    if abs(math.log(result.strain)) < math.log(BREAKS):
        return note(text)
    name = "alpha" if result.settings["relative_step"] is None else "relative step"
    remedy = f"{text} The updates were too large for this model, and the picture is probably broken: halve {name}."
    return note(remedy, "warning")


def pictures_of(result):
    return tuple(figures.enlarged(drawn.picture, SHOWN) for drawn in result.pair)


def captions_of(result):
    return captions(*(f"the judge sees: {seen}" for seen in result.seen or ()))


def table(title, words, matrix):
    """T or S, lower triangular, as a heat map that can be read aloud: rows look at columns."""
    rows = ""
    for word, values in zip(words, matrix.tolist()):
        cells = values[: rows.count("<tr>") + 1]
        cells = [f'<td style="--value: {value:.0%}">{value:.2f}</td>'.replace(">0.", ">.") for value in cells]
        rows += f'<tr><th scope="row">{escape(word)}</th>{"".join(cells)}</tr>'
    head = "".join(f'<th scope="col"><span>{escape(word)}</span></th>' for word in words)
    table = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<figure><figcaption>{title}</figcaption><div tabindex="0" role="group">{table}</div></figure>'


def look(result, word, step):
    """Where a word looks at a step, over both pictures; T, and S of both, at this step."""
    if result is None:
        return gr.skip(), gr.skip(), gr.skip()
    word, step = word or 0, int(step) - 1
    maps = [drawn.attentions["maps"][step][word] for drawn in result.pair]
    scale = max(float(each.max()) for each in maps)
    shown = [figures.overlaid(each, scale, picture) for each, picture in zip(maps, pictures_of(result))]
    words, target = result.pair[1].attentions["tokens"], result.pair[1].attentions["text_attention"]
    tables = [table("T: what the text encoder reads", words, target)]
    for name, drawn in zip(("Stock", "T-SAM"), result.pair):
        tables.append(table(f"S: {name}, step {step + 1}", words, drawn.attentions["similarity"][step]))
    return *shown, f'<div class="tsam-tables">{"".join(tables)}</div>'


def saved(result, folder):
    """Paths of FILES, written to the folder."""
    folder.mkdir(exist_ok=True)
    for name, drawn in zip(FILES.values(), result.pair):
        drawn.picture.save(folder / name)
    paths = [folder / name for name in FILES.values()]
    paths[-1].write_text(json.dumps(numbers(result)), encoding="utf-8")
    return paths


def numbers(result):
    """A drawing as JSON: settings, words, T, and every step's loss and S of both pictures."""
    stock, tsam = ({"losses": d.losses, "similarity": d.attentions["similarity"].tolist()} for d in result.pair)
    if result.seen:
        stock["judge"], tsam["judge"] = result.seen
    attentions = result.pair[1].attentions
    words = {"words": attentions["tokens"], "text_attention": attentions["text_attention"].tolist()}
    return {**result.settings, **words, "guided_steps": result.pair[1].guided, "stock": stock, "tsam": tsam}


def link(settings):
    """The address, beside the page's, that has these settings."""
    return "?" + urlencode({name: settings[name] for name in FIELDS if settings[name] is not None})


def linked(models, query):
    """The values of FIELDS that an address asks for, and what is wrong with them, in words."""
    kind = next(iter(SHIPPED))
    model, problem = query.get("model", kind), ""
    try:
        values = fields_of(models, model)
    except ValueError as error:
        values, problem = fields_of(models, kind), str(error)
    if {"alpha", "relative_step"} & query.keys():
        values["alpha"] = values["relative_step"] = None
    for name in query.keys() & set(FIELDS[1:]):
        try:
            values[name] = query[name] if isinstance(values[name], str) else float(query[name])
        except ValueError:
            problem = f"The link has {name}={query[name][:100]}, which is no number."
    return values, problem or next(iter(wrong(models, values).values() if query else ()), "")


def fields_of(models, model, prompt=EXAMPLES[0][1], seed=EXAMPLES[0][2]):
    """The values of FIELDS that a model's defaults are."""
    settings = models.defaults(model)
    if settings["relative_step"] is not None:
        settings["alpha"] = None
    return {"model": model, "prompt": prompt, "seed": seed, "steps": 50} | {name: settings[name] for name in FIELDS[4:]}


# ----------------------------------------------------------------------------------------------------------------------
# The page


def build(models):
    """The page, a `gr.Blocks` for `serve`."""
    first, _ = linked(models, {})
    with gr.Blocks(title="T-SAM", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        result = gr.State(time_to_live=KEPT)
        gr.HTML(HEADER)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(first["prompt"], label="Prompt", info="Two words or more.", lines=2, max_lines=4)
                model = gr.Dropdown(
                    list(models.offered()), value=first["model"], label="Model", allow_custom_value=models.hub
                )
                with gr.Row():
                    seed = gr.Number(first["seed"], label="Seed", precision=0, min_width=100)
                    steps = gr.Number(first["steps"], label="Steps", precision=0, min_width=100)
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=120, scale=3)
                    halt = gr.Button("Stop", min_width=80, scale=1)
                with gr.Accordion("Advanced", open=False):
                    widgets = {
                        "schedule": gr.Dropdown(list(SCHEDULES), value=first["schedule"]),
                        "objective": gr.Dropdown(list(OBJECTIVES), value=first["objective"]),
                    }
                    for name in FIELDS[6:]:
                        widgets[name] = gr.Number(first[name])
                    for name, widget in widgets.items():
                        widget.label, widget.info = name.replace("_", " ").capitalize(), HELP[name]
                examples = gr.Dataset(
                    components=[gr.Textbox(visible=False), gr.Number(visible=False), gr.Textbox(visible=False)],
                    headers=["Prompt", "Seed", "Model"],
                    samples=[[text, number, FAMILIES[kind].name] for kind, text, number in EXAMPLES],
                    label="Examples, with picked seeds",
                    type="index",
                )
            with gr.Column(scale=3, min_width=300):
                status = gr.HTML(note("“Draw” shows both pictures here, from the same noise."), elem_id="tsam-status")
                blank = Image.new("RGB", (SHOWN, SHOWN), BLANK)
                pictures = gr.ImageSlider((blank, blank), label="Stock and T-SAM", format="png", max_height=SHOWN)
                caption = gr.HTML(captions())
                curve = gr.LinePlot(
                    curve_of({}), x="step", y="loss", color="picture", color_map=COLORS, height=200, label="Loss"
                )
        with gr.Column(visible=False) as details:
            gr.HTML("<h2>What each word looks at</h2>")
            word = gr.Radio([], label="Word", type="value")
            step = gr.Slider(1, 2, 1, step=1, label="Denoising step")
            with gr.Row():
                left = gr.Image(label="Stock", format="png", interactive=False, min_width=240)
                right = gr.Image(label="T-SAM", format="png", interactive=False, min_width=240)
            gr.HTML("<h2>Syntax and maps: T beside S</h2>")
            tables = gr.HTML()
            with gr.Row():
                saves = [gr.DownloadButton(label, min_width=140) for label in FILES]
            address = gr.HTML()

        fields = [model, prompt, seed, steps, *widgets.values()]

        def check(request: gr.Request, *values):
            Stop(request).clear()
            found = wrong(models, dict(zip(FIELDS, values)))
            return [gr.validate(name not in found, found.get(name, "")) for name in FIELDS]

        @GPU
        def draw(request: gr.Request, *values):
            yield from played(models, dict(zip(FIELDS, values)), Stop(request))

        def stop(request: gr.Request):
            Stop(request).set()

        def leave(request: gr.Request):
            Stop(request).set()
            shutil.rmtree(Path(WORK.name, Stop(request).name), ignore_errors=True)

        def show(result, request: gr.Request):
            if result is None:
                return {details: gr.Column(visible=False)}
            stock, tsam = (drawn.attentions for drawn in result.pair)
            last = tsam["maps"][result.pair[1].guided[-1]] - stock["maps"][result.pair[1].guided[-1]]
            number = int(last.abs().sum((1, 2)).argmax())  # the word that T-SAM has moved most
            at = result.pair[1].guided[-1] + 1
            shown = dict(zip((left, right, tables), look(result, number, at)))
            folder = Path(WORK.name, Stop(request).name)
            files = dict(zip(saves, saved(result, folder)))
            return (
                shown
                | files
                | {
                    details: gr.Column(visible=True),
                    word: gr.Radio(list(zip(tsam["tokens"], range(len(tsam["tokens"])))), value=number),
                    step: gr.Slider(
                        maximum=len(tsam["steps"]), value=at, info=f"The first {len(result.pair[1].guided)} are guided."
                    ),
                    address: f'<a href="{escape(link(result.settings))}">A link to these settings</a>',
                }
            )

        def choose(name):
            """A model's own defaults."""
            try:
                values = fields_of(models, name)
            except ValueError as error:
                return {status: note(str(error), "error")}
            return {status: "", **{field: values[key] for key, field in widgets.items()}}

        def pick(index):
            kind, text, number = EXAMPLES[index]
            return list(fields_of(models, next(n for n in SHIPPED if SHIPPED[n] == kind), text, number).values())

        def open_link(request: gr.Request):
            values, problem = linked(models, dict(request.query_params))
            return {**dict(zip(fields, values.values())), **({status: note(problem, "error")} if problem else {})}

        hidden = {"api_visibility": "private", "show_progress": "hidden"}
        now = {**hidden, "queue": False}
        drawn = gr.on(
            [go.click, prompt.submit],
            draw,
            fields,
            [status, pictures, caption, curve, result],
            validator=check,
            concurrency_limit=1,
            show_progress_on=[status],
            api_visibility="private",
        )
        drawn.then(show, result, [details, word, step, left, right, tables, address, *saves], **hidden)
        halt.click(stop, **now)
        gr.on(
            [word.input, step.input],
            look,
            [result, word, step],
            [left, right, tables],
            trigger_mode="always_last",
            **hidden,
        )
        model.input(choose, model, [status, *widgets.values()], **hidden)
        examples.click(pick, examples, fields, **hidden)
        page.load(open_link, None, [*fields, status], **hidden)
        page.unload(leave)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=8)


class Policy:
    """Tells browsers to ask nobody else for anything, and other sites to keep out of it."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with if scope["type"] == "http" else send)


def serve(page, **where):
    """`launch` with this page's looks and limits; `where` are arguments of it."""
    looks = {"theme": THEME, "css_paths": Path(__file__).with_name("style.css"), "footer_links": []}
    limits = {"share": False, "max_file_size": MAX_UPLOAD, "ssr_mode": False, "show_error": False, "mcp_server": False}
    return page.launch(app_kwargs={"middleware": [Middleware(Policy)]}, **looks, **limits, **where)


def main(argv=None):
    parser = argparse.ArgumentParser("tsam-demo", description="A page that draws prompts without and with T-SAM.")
    parser.add_argument(
        "--models", nargs="+", default=(), metavar="FOLDER", help="offer the saved pipelines in it, too"
    )
    parser.add_argument("--hub", action="store_true", help="let pages name any model of the Hub, which is downloaded")
    parser.add_argument("--host", help="address to listen at (127.0.0.1: nobody but this machine)")
    parser.add_argument("--port", type=int, help="port to listen at (7860, or the next that is free)")
    parser.add_argument("--device", help="where to run, such as cpu or cuda:1 (cuda if there is one)")
    args = parser.parse_args(argv)
    try:
        models = Models(args.models, args.hub, args.device)
        models.load(next(iter(SHIPPED)))  # before the first page asks
    except ValueError as error:
        parser.error(str(error))
    serve(build(models), server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()

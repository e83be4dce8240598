"""The demo: one prompt drawn without and with T-SAM, from the same noise, and why the pictures differ.

    tsam-demo                            # with the models that ship
    tsam-demo --models ~/models --hub    # and with saved pipelines, and what the Hub has

On the Hugging Face Hub this file, beside the package, is a Space's `app.py`.
"""

import argparse
import hashlib
import io
import json
import logging
import math
import shutil
import tempfile
import time
from html import escape
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode


if find_spec("spaces"):  # Hugging Face's, where a GPU is lent by the call; before torch is imported
    from spaces import GPU
else:
    GPU = lambda function: function  # noqa: E731

try:
    import gradio as gr
except ImportError as error:
    raise SystemExit('The demo needs Gradio: pip install "diffusers-tsam[demo]"') from error
from PIL import Image
from starlette.middleware import Middleware

from diffusers_tsam import cli, figures
from diffusers_tsam.app import drawing
from diffusers_tsam.app.drawing import CHOICES, FIELDS, LIMITS, SETTINGS, SHIPPED, Models, fields_of, wrong
from diffusers_tsam.shapes import WORDS


EXAMPLES = (  # model, seed, prompt; picked: stock forgets or confuses what T-SAM draws
    ("sd", 74, "a red cube and a blue sphere"),
    ("sd", 1378786346, "a green cube and a purple sphere and a blue star"),
    ("pixart", 675187397, "a yellow star and an orange cube and a white cylinder"),
)
HEADER = """<h1>T-SAM</h1><p>Text-to-image models forget objects and swap colours. T-SAM reads out of the text encoder
which words belong together, and holds the picture's attention to it. Here: one prompt from the same noise, without it
and with it.</p>"""
FINISHED = (
    "An example that was picked, drawn by the small Stable Diffusion: “a red cube and a blue sphere”. Stock forgot the"
    " blue sphere and drew two red cubes, one unasked; T-SAM drew both. “Draw” shows yours here."
)
HELP = {
    "preset": "Gives the settings below it: “light” costs least, “paper” most.",
    "objective": "How maps are compared with the text; “relation” for prompts such as “two cats”.",
    "alpha": "Size of an update. Too much breaks the picture. Empty where a relative step is given.",
    "relative_step": "Instead of alpha: the first update as a share of the input's norm, such as 0.05.",
    "gamma": "More keeps only the strongest bonds between words. Of no use to “contrast” and “relation”.",
    "guidance_scale": "How closely to follow the prompt.",
    "negative_prompt": "What not to draw.",
    "regions": "Where words of the prompt are to be: left, top, right, bottom in fractions of the picture, a line each,"
    " such as “a red cube=0,0,0.5,1”.",
}
NAMES = {"stock": "Stock", "T-SAM": "T-SAM"}  # of the two pictures, as `Step` has them and as they are shown
EVERY = -1  # in place of a word
HIDDEN = gr.update(visible=False)
COUNTS = {"seed": "Seed", "steps": "Steps"}, {"seeds": "Number of seeds", "starts": "Starts to choose from"}
FILES = {"Stock picture": "stock.png", "T-SAM picture": "tsam.png", "Numbers (JSON)": "tsam.json"}
MAX_WAITING = 20  # drawings in the queue
MAX_UPLOAD = 1  # bytes: the page takes no files
KEPT = 3600  # seconds that the server keeps a result
SHOWN = 512  # pixels at least of a picture on the page
BLANK = Image.new("RGB", (64, 64), "#8a8f98")  # before it is drawn
REFRESH = 0.2  # seconds at least between two previews
FULLSCREEN = ["fullscreen"]  # the only one of Gradio's buttons on a picture; another shares it
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none is fetched
THEME = gr.themes.Base(primary_hue="orange", neutral_hue="slate", radius_size="md", **FONTS)
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"  # the browser itself asks nobody else
WORK = tempfile.TemporaryDirectory(prefix="tsam-demo-")
logger = logging.getLogger(__name__)


class Session:
    """What belongs to one open page: its files, and its wish to draw, a file too, since a lent GPU draws in another
    process. A page that has left keeps neither."""

    def __init__(self, request):
        name = hashlib.sha256(str(request.session_hash).encode()).hexdigest()
        self.folder, self.flag = Path(WORK.name, name), Path(WORK.name, f"{name}.draws")

    def stop(self):
        self.flag.unlink(missing_ok=True)

    def go_on(self):
        self.flag.touch()


# ----------------------------------------------------------------------------------------------------------------------
# What is shown


def note(text, kind="note"):
    """A line above the pictures. kind: "note", "warning" or "error"."""
    return f'<p class="tsam-{kind}" role="{"alert" if kind == "error" else "status"}">{escape(text)}</p>'


def captioned(picture, name, seed, seen=None):
    """A picture as a gallery takes it. seen: what the judge sees."""
    return figures.enlarged(picture, SHOWN), f"{NAMES[name]}, seed {seed}" + (f": {seen}" if seen else "")


def curve(losses, steps):
    """The loss in every step, of both pictures. losses: {"stock" and "T-SAM": numbers}."""
    top = max((loss for each in losses.values() for loss in each if math.isfinite(loss)), default=0) or 1
    lines = ""
    for name, each in losses.items():
        points = [(100 * i / max(steps - 1, 1), 30 - 30 * loss / top) for i, loss in enumerate(each)]
        points = " ".join(f"{x:.2f},{y:.2f}" for x, y in points if math.isfinite(y))
        lines += f'<polyline class="tsam-{name.lower()}" points="{points}"/>'
    names = "".join(f'<span class="tsam-{name.lower()}">{name}</span>' for name in losses)
    scale = f"0 to {top:.2f}, steps 1 to {steps}" if any(losses.values()) else "while it is drawn"
    svg = f'<svg viewBox="0 0 100 30" preserveAspectRatio="none" role="img" aria-label="Loss curves">{lines}</svg>'
    return f'<figure class="tsam-curve"><figcaption>Loss <small>{scale}</small> {names}</figcaption>{svg}</figure>'


def table(title, words, matrix):
    """T or S, lower triangular, as a heat map that can be read aloud: rows look at columns."""
    rows = ""
    for i, (word, values) in enumerate(zip(words, matrix.tolist())):
        cells = (f'<td style="--value: {value:.0%}">{value:.2f}</td>' for value in values[: i + 1])
        rows += f'<tr><th scope="row">{escape(word)}</th>{"".join(cells)}</tr>'
    head = "".join(f'<th scope="col"><span>{escape(word)}</span></th>' for word in words)
    body = f"<table><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody></table>"
    body = f'<div tabindex="0" role="group" aria-label="{title}">{body}</div>'
    return f"<figure><figcaption>{title}</figcaption>{body}</figure>"


def summary(result):
    """What a drawing has come to, and whether its updates were too large."""
    losses, guided = [drawn.losses for drawn in result.pair], result.pair[1].guided
    before, after = (each[guided[-1]] for each in losses)
    text = f"Loss of seed {result.settings['seed']} after the guided steps, {len(guided)}: stock {before:.3f},"
    text = f"{text} T-SAM {after:.3f}."
    text = f"{result.said} {text}".lstrip()
    if result.moved < drawing.BREAKS:
        return note(text)
    far = f"The first step moved the latents by {result.moved:.1f} times their norm, which breaks pictures"
    return note(f"{far}: halve alpha. {text}", "warning")


def parts_of(result):
    """The parts of the page that say what one drawing has come to."""
    losses = dict(zip(NAMES, (drawn.losses for drawn in result.pair)))
    return {"status": summary(result), "losses": curve(losses, result.settings["steps"]), "result": result}


def look(result, word, step):
    """Where a word looks in a step, over both pictures, or the figure of `EVERY` word; T, and S of both then."""
    if result is None:
        return [gr.skip()] * 4
    index, seen = int(step) - 1, [drawn.attentions for drawn in result.pair]
    maps = [each["maps"][index] for each in seen]
    both = seen[1] | {"similarity": [each["similarity"][index] for each in seen]}
    words, tables = seen[1]["tokens"], cli.tables_of(SimpleNamespace(**result.settings), both)
    if word == EVERY:
        captions = [f"loss {drawn.losses[index]:.3f}" for drawn in result.pair]
        rows = [*zip(NAMES.values(), captions, (drawn.picture for drawn in result.pair), maps)]
        footer = f"maps and S at step {step}, one scale a word · seed {result.settings['seed']}"
        regions, file = seen[1].get("regions", ()), io.BytesIO()
        figures.save(figures.figure(result.settings["prompt"], words, rows, tables, footer, regions), file)
        return [HIDDEN, HIDDEN, gr.update(value=Image.open(file), visible=True), ""]
    scale = max(float(each[word or 0].max()) for each in maps)
    pictures = [figures.enlarged(drawn.picture, SHOWN) for drawn in result.pair]
    shown = [figures.overlaid(each[word or 0], scale, picture) for each, picture in zip(maps, pictures)]
    tables = "".join(table(title, words, values) for title, values in tables)
    tables = f'<h2>Which words belong together</h2><div class="tsam-tables">{tables}</div>'
    return [*(gr.update(value=each, visible=True) for each in shown), HIDDEN, tables]


def numbers(result):
    """A drawing as JSON: settings, words, T, and of both pictures every step's loss and S."""
    names, seen = ("stock", "tsam"), result.pair[1].attentions
    pair = {
        n: {"losses": d.losses, "similarity": d.attentions["similarity"].tolist()} for n, d in zip(names, result.pair)
    }
    for name, solids in zip(names, result.seen or ()):
        pair[name]["judge"] = solids
    words = {"words": seen["tokens"], "text_attention": seen["text_attention"].tolist()}
    return {**result.settings, **words, "guided_steps": result.pair[1].guided, **pair}


def save(result, folder):
    """Write FILES; their paths."""
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in FILES.values()]
    for path, drawn in zip(paths, result.pair):
        drawn.picture.save(path)
    paths[-1].write_text(json.dumps(numbers(result)), encoding="utf-8")
    return paths


def link(values):
    """The part of an address that has these settings."""
    return "?" + urlencode({name: values[name] for name in FIELDS if values[name] not in (None, "")})


def linked(models, query):
    """The values of FIELDS that an address asks for, and what is wrong with them, in words."""
    kind, seed, prompt = EXAMPLES[0]
    usual, problem = next(name for name in SHIPPED if SHIPPED[name] == kind), ""
    preset = {"preset": query["preset"]} if query.get("preset") in CHOICES["preset"] else {}
    try:
        values = fields_of(models, query.get("model", usual), prompt, seed, **preset)
    except ValueError as error:
        values, problem = fields_of(models, usual, prompt, seed, **preset), str(error)
    first = dict(values)
    if query.keys() & {"alpha", "relative_step"}:
        values |= {"alpha": None, "relative_step": None}
    for name in query.keys() & set(FIELDS[1:]):
        try:
            values[name] = query[name] if isinstance(values[name], str) else float(query[name])
        except ValueError:
            problem = f"The link's {name} is {query[name][:100]!r}, which is no number."
    wrongs = wrong(models, values)
    values |= {name: first[name] for name in wrongs.keys() & LIMITS.keys()}  # the fields cannot hold every number
    return values, problem or next(iter(wrongs.values()), "")


def live(models, values, stopped):
    """What the page shows from “Draw” on, by its parts' names, again and again."""
    results, last = [], 0.0
    try:
        for problem in wrong(models, values).values():
            raise ValueError(problem)
        steps, number, done = int(values["steps"]), int(values["seeds"]), 0
        losses = {name: [] for name in NAMES}
        text = note("Choosing among starts …" if values["starts"] > 1 else "Starting …")
        yield {"status": text, "losses": curve(losses, steps), "result": None, "starts": HIDDEN}
        shown = {(name, column): (BLANK, NAMES[name]) for name in NAMES for column in range(number)}
        for event in drawing.draw(models, values, stopped):
            if isinstance(event, drawing.Starts):
                ranked = [f"seed {seed}: {loss:.3f}" for seed, loss in event.ranked]
                ranked[0] += ", best"
                row = gr.update(value=list(zip(event.pictures, ranked)), columns=len(ranked), visible=True)
                yield {"starts": row, "row": event}
                continue
            column = len(results)
            if isinstance(event, drawing.Result):
                seen, losses = event.seen or (None, None), {name: [] for name in NAMES}
                for name, drawn, solids in zip(NAMES, event.pair, seen):
                    shown[name, column] = captioned(drawn.picture, name, event.settings["seed"], solids)
                results.append(event)
                said = parts_of(event)
            else:
                done += 1
                losses[event.name].append(event.loss)
                shown[event.name, column] = captioned(event.preview, event.name, event.seed)
                if time.monotonic() - last < REFRESH:
                    continue
                last, text = time.monotonic(), f"{NAMES[event.name]}: step {event.step + 1}, loss {event.loss:.3f}"
                bar = f'<progress max="{2 * steps * number}" value="{done}">{text}</progress>'
                said = {"status": note(text) + bar, "losses": curve(losses, steps)}
            sheet = gr.update(value=list(shown.values()), columns=max(number, 2))
            yield said | {"pictures": sheet, "results": results + [None] * (number - len(results))}
        if len(results) == number:
            yield parts_of(results[0])
        else:
            yield {"status": note("Stopped. “Draw” starts again from the first step."), "result": None}
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        yield {"status": note(str(error).replace("`", ""), "error"), "result": None}
    except Exception as error:
        logger.exception("A drawing failed.")
        text = f"The drawing failed, {type(error).__name__}; the server's log says where. Try other settings."
        yield {"status": note(text, "error"), "result": None}


# ----------------------------------------------------------------------------------------------------------------------
# The page


def build(models):
    """The page, a `gr.Blocks` for `serve`."""
    first, _ = linked(models, {})
    with gr.Blocks(title="T-SAM", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        row, results, result = (gr.State(time_to_live=KEPT) for _ in range(3))
        gr.HTML(HEADER)
        examples = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[prompt] for _, _, prompt in EXAMPLES],
            label="Examples, with seeds that were picked",
            type="index",
        )
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                known = f"Two words or more. The models that ship know {', '.join(WORDS)}."
                prompt = gr.Textbox(first["prompt"], label="Prompt", info=known, lines=1, max_lines=4)
                names = list(models.offered())
                model = gr.Dropdown(names, value=first["model"], label="Model", allow_custom_value=models.hub)
                counts = {}
                for labels in COUNTS:
                    with gr.Row():
                        for name, label in labels.items():
                            counts[name] = gr.Number(first[name], label=label, precision=0, min_width=100)
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=120, scale=3)
                    halt = gr.Button("Stop", min_width=80, scale=1)
                with gr.Accordion("Advanced", open=False) as advanced:
                    settings = {}
                    for name, info in HELP.items():
                        looks = {"label": name.replace("_", " ").capitalize(), "info": info, "value": first[name]}
                        choices = {"choices": list(CHOICES[name])} if name in CHOICES else {}
                        text = name in ("negative_prompt", "regions")
                        lines = {"lines": 2} if name == "regions" else {}  # of one, Enter would submit
                        kind = gr.Dropdown if choices else gr.Textbox if text else gr.Number
                        settings[name] = kind(**looks, **choices, **lines)
            with gr.Column(scale=3, min_width=300):
                status = gr.HTML(note(FINISHED), elem_id="tsam-status")
                with Image.open(Path(__file__).with_name("example.png")) as both:
                    boxes = ((0, 0, 128, 128), (128, 0, 256, 128))
                    example = [both.convert("RGB").crop(box) for box in boxes]
                grid = {"interactive": False, "allow_preview": False, "format": "png", "buttons": FULLSCREEN}
                grid |= {"object_fit": "contain", "elem_classes": "tsam-gallery"}
                pictures = gr.Gallery(
                    [captioned(picture, name, EXAMPLES[0][1]) for picture, name in zip(example, NAMES)],
                    label="Stock and T-SAM",
                    **grid,
                )
                starts = gr.Gallery(label="Starts, best first: click one to draw it", visible=False, **grid)
                losses = gr.HTML(curve({"stock": [], "T-SAM": []}, first["steps"]))
        with gr.Column(visible=False) as details:
            gr.HTML("<h2>What each word looks at</h2>")
            word = gr.Radio([], label="Word")
            step = gr.Slider(1, 2, 1, step=1, label="Denoising step")
            with gr.Row():
                over = {"format": "png", "interactive": False, "height": 380, "min_width": 240, "buttons": FULLSCREEN}
                maps = [gr.Image(label=name, **over) for name in NAMES.values()]
            every = gr.Image(label="Every word", visible=False, **over | {"height": None})
            tables = gr.HTML()
            with gr.Row():
                saves = [gr.DownloadButton(label, min_width=140) for label in FILES]
            address = gr.HTML()
        fields = [model, prompt, *counts.values(), *settings.values()]
        parts = {"status": status, "pictures": pictures, "losses": losses, "results": results, "result": result}
        choice = {"starts": starts, "row": row}
        panels = [*maps, every, tables]

        def check(request: gr.Request, *values):
            Session(request).go_on()
            found = wrong(models, dict(zip(FIELDS, values)))
            return [gr.validate(name not in found, found.get(name, "")) for name in FIELDS]

        @GPU
        def drawn(values, flag):
            yield from live(models, values, lambda: not flag.exists())

        def start(request: gr.Request, *values):
            for shown in drawn(dict(zip(FIELDS, values)), Session(request).flag):
                yield {(parts | choice)[name]: value for name, value in shown.items()}

        def ready(row, request: gr.Request):  # on the click, so that “Stop” also stops what waits in the queue
            Session(request).go_on()
            return gr.validate(True, "")

        def again(row, request: gr.Request, event: gr.SelectData):
            if row is None:  # after KEPT
                yield {status: note("These starts are no longer kept. “Draw” makes them again.", "error")}
                return
            values = row.settings | drawing.ONE_START | {"seed": row.ranked[event.index][0]}
            for shown in drawn(values, Session(request).flag):
                yield {parts[name]: value for name, value in shown.items() if name in parts}

        def turn(results, event: gr.SelectData):
            """Show the drawing that a picture is of."""
            turned = results and results[event.index % len(results)]  # None: not drawn
            return {parts[name]: value for name, value in (parts_of(turned) if turned else {}).items()}

        def show(result, request: gr.Request):
            if result is None:
                return {details: gr.Column(visible=False)}
            seen, guided = [drawn.attentions for drawn in result.pair], result.pair[1].guided
            change = seen[1]["maps"][guided[-1]] - seen[0]["maps"][guided[-1]]
            chosen, at = int(change.abs().sum((1, 2)).argmax()), guided[-1] + 1  # the word that changed most
            words, number = [(text, index) for index, text in enumerate(seen[1]["tokens"])], len(seen[1]["steps"])
            words.append(("every word", EVERY))
            span = {"maximum": max(number, 2), "visible": number > 1}  # one step leaves nothing to choose
            return {
                details: gr.Column(visible=True),
                word: gr.Radio(words, value=chosen),
                step: gr.Slider(value=at, info=f"Guided: the first {len(guided)}.", **span),
                address: f'<a href="{escape(link(result.settings))}">A link to this drawing’s settings</a>',
                **dict(zip(panels, look(result, chosen, at))),
                **dict(zip(saves, save(result, Session(request).folder))),
            }

        defaults = {name: (counts | settings)[name] for name in ("steps", *SETTINGS, "guidance_scale")}

        def choose(name):
            try:
                values = fields_of(models, name, "", 0)
            except ValueError as error:
                return {status: note(str(error), "error")}
            return {field: values[name] for name, field in defaults.items()}

        def give(name, preset):
            try:
                values = fields_of(models, name, "", 0, preset=preset)
            except ValueError:  # which “Draw” says
                return {}
            return {settings[name]: values[name] for name in SETTINGS}

        def pick(index):
            kind, number, text = EXAMPLES[index]
            name = next(name for name in SHIPPED if SHIPPED[name] == kind)
            return list(fields_of(models, name, text, number).values())

        def follow(request: gr.Request):
            query = dict(request.query_params)
            values, problem = linked(models, query)
            said = {status: note(problem, "error")} if problem else {}
            opened = {advanced: gr.Accordion(open=True)} if query.keys() & settings.keys() else {}
            return {**dict(zip(fields, values.values())), **said, **opened}

        def stop(request: gr.Request):
            Session(request).stop()

        def leave(request: gr.Request):
            Session(request).stop()
            shutil.rmtree(Session(request).folder, ignore_errors=True)

        quiet = {"api_visibility": "private", "show_progress": "hidden"}
        one = {"concurrency_limit": 1, "concurrency_id": "drawing"}  # two at once would each take twice as long
        one |= {"show_progress_on": [status], "api_visibility": "private"}
        showing = [result, [details, word, step, *panels, address, *saves]]
        go_on = gr.on(
            [go.click, prompt.submit], start, fields, [*parts.values(), *choice.values()], validator=check, **one
        )
        go_on.then(show, *showing, **quiet)
        starts.select(again, row, [*parts.values()], validator=ready, **one).then(show, *showing, **quiet)
        pictures.select(turn, results, [*parts.values()], **quiet).then(show, *showing, **quiet)
        halt.click(stop, queue=False, **quiet)
        newest = {"trigger_mode": "always_last", **quiet}
        gr.on([word.input, step.input], look, [result, word, step], panels, **newest)
        model.input(choose, model, [status, *defaults.values()], **quiet)
        preset = settings["preset"]
        preset.input(give, [model, preset], [settings[name] for name in SETTINGS], **quiet)
        examples.click(pick, examples, fields, **quiet)
        page.load(follow, None, [*fields, status, advanced], **quiet)
        page.unload(leave)
    return page.queue(max_size=MAX_WAITING, default_concurrency_limit=8)


class Policy:
    """Adds POLICY to every answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def serve(page, **where):
    """`launch` with this page's looks and limits. where: other arguments of it."""
    looks = {"theme": THEME, "css_paths": Path(__file__).with_name("style.css"), "footer_links": []}
    limits = {"share": False, "mcp_server": False, "ssr_mode": False, "max_file_size": MAX_UPLOAD}
    return page.launch(app_kwargs={"middleware": [Middleware(Policy)]}, **looks, **limits, **where)


def main(argv=None):
    parser = argparse.ArgumentParser("tsam-demo", description="A page that draws prompts without and with T-SAM.")
    parser.add_argument(
        "--models", nargs="+", default=(), metavar="FOLDER", help="offer the saved pipelines in it, too"
    )
    parser.add_argument("--hub", action="store_true", help="let pages name any model of the Hub, which is downloaded")
    parser.add_argument("--host", help="address to listen at (127.0.0.1, which only this machine reaches)")
    parser.add_argument("--port", type=int, help="port to listen at (7860, or the next that is free)")
    parser.add_argument("--device", help="where to run, such as cpu or cuda:1 (cuda if there is one)")
    args = parser.parse_args(argv)
    try:
        models = Models(args.models, args.hub, args.device)
        models.load(next(iter(SHIPPED)))  # before the first page asks
        serve(build(models), server_name=args.host, server_port=args.port)
    except (OSError, OverflowError, ValueError) as error:  # the first two for a port
        parser.error(str(error))


if __name__ == "__main__":
    main()

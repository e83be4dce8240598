"""The demo end to end: the real page on the loopback, in headless Chromium. What is drawn and said is held by
test_app.py; here is what only a browser shows.

Screenshots go to the folder that TSAM_SCREENSHOTS names, or to pytest's; docs/demo.png is one of them:

    TSAM_SCREENSHOTS=shots pytest tests/test_app_browser.py -k panel && cp shots/demo.png docs
"""

import base64
import json
import os
import shutil
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlencode, urlsplit
from urllib.request import Request, urlopen

import pytest


pytest.importorskip("gradio.blocks", reason="the page needs gradio: pip install '.[demo]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium: pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

from diffusers_tsam.app import app  # noqa: E402
from diffusers_tsam.app.drawing import SHIPPED, Models  # noqa: E402


pytestmark = pytest.mark.slow
SD, PIXART, SINK = SHIPPED
PAIR, STARTS = "Stock and T-SAM", "Starts, best first: click one to draw it"
SOLIDS = "a red cube and a blue sphere"
WAIT = 60  # seconds at most for anything
WIDE, NARROW, UP_TO_MAPS = 1280, 390, 1500  # pixels


@pytest.fixture(scope="module")
def server(folder):
    """The address of the page, which also offers the tiny model."""
    models = Models([folder], device="cpu")
    models.load(SD)
    page = app.build(models)
    _, address, _ = app.serve(page, prevent_thread_lock=True, quiet=True, server_port=None)
    yield address.rstrip("/")
    page.close(verbose=False)


@pytest.fixture(scope="module")
def tiny(folder):
    """A link to the tiny model."""
    return lambda **settings: "?" + urlencode({"model": Path(folder).name, "prompt": SOLIDS, "steps": 2} | settings)


class Browser:
    """One headless Chromium, and how a visitor uses the page."""

    def __init__(self, server):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver, self.server = webdriver.Chrome(options, webdriver.ChromeService(DRIVER)), server
        self.resize(WIDE)

    def resize(self, width, dark=False):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width == NARROW}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def until(self, condition, what):
        """Wait, through errors where the page has replaced what was looked at."""
        return WebDriverWait(self.driver, WAIT, 0.1, [Exception]).until(lambda _: condition(), what)

    def open(self, query=""):
        self.driver.get(f"{self.server}/{query}")
        prompt = parse_qs(query.lstrip("?")).get("prompt", [app.EXAMPLES[0][2]])
        self.until(lambda: self.button("Draw") and self.value("Prompt") == prompt[0], "the page")
        return self

    def all(self, selector, by=By.CSS_SELECTOR):
        return self.driver.find_elements(by, selector)

    def text(self, selector):
        return self.all(selector)[0].text

    def button(self, name):
        return next(each for each in self.all("button") if name in each.text and each.is_displayed())

    def label(self, label):
        return self.all(f'//label[.//span[normalize-space(text())="{label}"]]', By.XPATH)[0]

    def field(self, label):
        xpath = f'//label[.//span[normalize-space(text())="{label}"]]//*[self::input or self::textarea]'
        return self.all(f'{xpath} | //input[@aria-label="{label}"]', By.XPATH)[0]

    def value(self, label):
        return self.field(label).get_attribute("value")

    def write(self, label, text):
        field = self.field(label)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE, str(text), *([] if label == "Prompt" else [Keys.TAB]))

    def draw(self):
        self.button("Draw").click()

    def status(self, part):
        return self.until(lambda: (text := self.text("#tsam-status")) and part in text and text, part)

    def drawn(self):
        self.status("after the guided steps")
        self.until(lambda: len(self.sources("Stock", "T-SAM")) == 2, "the maps")

    def images(self, label):
        path = f'//label[normalize-space()="{label}"]/ancestor::div[contains(@class, "block")][1]//img'
        return [image for image in self.all(path, By.XPATH) if image.is_displayed()]

    def sources(self, *labels):
        """Addresses of the pictures shown, by their components' labels."""
        return [image.get_attribute("src") for label in labels for image in self.images(label)]

    def captions(self, label):
        return [image.get_attribute("alt") for image in self.images(label)]

    def save(self, path, height=None):
        """Write a screenshot; the page's width."""
        script = "let page = document.documentElement; return [page.scrollWidth, page.scrollHeight]"
        width, whole = self.driver.execute_script(script)
        clip = {"x": 0, "y": 0, "scale": 1, "width": width, "height": height or whole}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(found["data"]))
        return width


@pytest.fixture(scope="module")
def browser(server):
    browser = Browser(server)
    yield browser
    browser.driver.quit()


other = pytest.fixture(scope="module")(browser.__wrapped__)  # another visitor's


def test_a_prompt_is_drawn_and_every_panel_follows(browser, tmp_path):
    browser.open("?prompt=a+red+cube&steps=25&seed=74")
    assert not any(title.is_displayed() for title in browser.all("h2"))  # nothing empty before the first drawing
    blank = browser.sources(PAIR)
    browser.write("Prompt", SOLIDS)
    browser.field("Prompt").send_keys(Keys.ENTER)
    browser.status("T-SAM: step")  # live
    browser.until(lambda: browser.sources(PAIR)[1] != blank[1], "a preview")
    browser.drawn()

    assert [image.get_property("naturalWidth") for image in browser.images(PAIR)] == [512, 512]
    assert len({*browser.sources(PAIR)}) == 2
    assert browser.captions(PAIR) == ["Stock, seed 74: 2 red cubes", "T-SAM, seed 74: blue sphere, red cube"]
    assert [len(line.get_attribute("points").split()) for line in browser.all(".tsam-curve polyline")] == [25, 25]
    words = browser.all("fieldset label")
    assert [word.text for word in words] == [*SOLIDS.split(), "every word"]

    screenshots = Path(os.environ.get("TSAM_SCREENSHOTS") or tmp_path)
    screenshots.mkdir(parents=True, exist_ok=True)
    browser.save(screenshots / "demo.png", UP_TO_MAPS)
    for what, choose in (
        ("the word's maps", next(each for each in browser.all("fieldset label input") if not each.is_selected()).click),
        ("the second step's maps", lambda: browser.all('input[type="range"]')[0].send_keys(Keys.ARROW_RIGHT)),
    ):
        before = browser.sources("Stock", "T-SAM")
        choose()
        browser.until(lambda: not {*before} & {*browser.sources("Stock", "T-SAM")}, what)  # noqa: B023
    assert len(browser.all(".tsam-tables table")) == 4
    words[-1].click()
    browser.until(lambda: browser.sources("Every word") and not browser.sources("Stock", "T-SAM"), "the figure")

    folder = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.driver.execute_cdp_cmd("Page.setDownloadBehavior", folder)
    browser.button("Numbers (JSON)").click()
    numbers = browser.until(lambda: json.loads((tmp_path / "tsam.json").read_text()), "the download")
    assert numbers["prompt"] == SOLIDS and len(numbers["tsam"]["losses"]) == 25

    for width, dark in ((WIDE, False), (WIDE, True), (NARROW, False), (NARROW, True)):
        browser.resize(width, dark)
        time.sleep(0.5)
        assert browser.save(screenshots / f"{width}-{'dark' if dark else 'light'}.png") <= width
    browser.resize(WIDE)

    address = next(each.get_attribute("href") for each in browser.all("a") if "link" in each.text)
    assert address.startswith(browser.server)
    browser.open("?" + urlsplit(address).query)
    assert [browser.value(name) for name in ("Seed", "Steps")] == ["74", "25"]


def test_a_wrong_link_is_told_of_and_wrong_input_at_its_field_where_it_can_be_repaired(browser, tiny):
    browser.open("?model=/etc/passwd&prompt=a+red+cube").status("There is no model '/etc/passwd' here")
    assert browser.value("Model") == SD
    browser.open(tiny())
    wrong = {"Prompt": ("cube", "Write two or more"), "Steps": (500, "from 1 to 100")}
    wrong["Starts to choose from"] = (9, "from 1 to 8")
    for label, (value, _) in wrong.items():
        browser.write(label, value)
    browser.draw()
    for label, (_, says) in wrong.items():
        browser.until(lambda: says in browser.label(label).text, says)  # noqa: B023
    assert "Traceback" not in browser.text("body") and "step" not in browser.text("#tsam-status")
    for label in wrong:
        browser.write(label, "a red cube" if label == "Prompt" else 1)
    browser.draw()
    browser.drawn()
    assert not any(says in browser.label(label).text for label, (_, says) in wrong.items())


def test_stop_stops_and_one_who_waits_in_the_queue_gets_a_turn_when_the_other_leaves(browser, other, tiny):
    browser.open(f"?{urlencode({'prompt': SOLIDS})}&steps=100&preset=paper").draw()
    browser.status("T-SAM: step")
    browser.button("Stop").click()
    browser.status("Stopped")
    browser.draw()
    browser.status("T-SAM: step")
    other.open(tiny()).draw()
    other.until(lambda: "queue: 1/1" in other.text("body"), "its place")
    assert "step" not in other.text("#tsam-status")
    browser.driver.get("about:blank")  # whose drawing ends then
    other.drawn()


def test_an_example_and_a_preset_bring_their_settings(browser):
    browser.open().button(app.EXAMPLES[2][2]).click()
    browser.until(lambda: browser.value("Model") == PIXART, "the example's model")
    assert browser.value("Seed") == str(app.EXAMPLES[2][1])
    browser.button("Advanced").click()
    browser.until(lambda: browser.value("Relative step") == "0.05", "what was tuned for it")
    assert (browser.value("Alpha"), browser.value("Objective")) == ("", "contrast")
    browser.field("Regions").send_keys("a line", Keys.ENTER, "and another")
    assert browser.value("Regions") == "a line\nand another"
    browser.field("Preset").click()
    next(each for each in browser.all('[role="option"]') if each.text.strip("✓ ") == "paper").click()
    browser.until(lambda: browser.value("Alpha") == "15", "what the preset says")
    assert (browser.value("Relative step"), browser.value("Objective")) == ("", "l1")


def test_a_click_on_a_sheet_turns_to_that_seed_and_one_on_a_start_draws_it(browser, tiny):
    browser.open(tiny(seed=3, seeds=2, starts=3)).draw()
    browser.drawn()
    ranked = [int(caption.split()[1].rstrip(":")) for caption in browser.captions(STARTS)]
    assert browser.captions(PAIR) == [f"{name}, seed {seed}" for name in ("Stock", "T-SAM") for seed in ranked[:2]]
    assert sorted(ranked) == [3, 4, 5]
    browser.images(PAIR)[3].click()
    browser.status(f"Loss of seed {ranked[1]} ")
    browser.images(STARTS)[2].click()
    browser.status(f"Loss of seed {ranked[2]} ")
    assert browser.captions(PAIR) == [f"{name}, seed {ranked[2]}" for name in ("Stock", "T-SAM")]
    assert len(browser.images(STARTS)) == 3 and browser.value("Seed") == "3"


def test_every_control_has_a_name_and_nothing_is_asked_of_anyone_else(browser, tiny):
    browser.driver.get("about:blank")
    browser.driver.get_log("browser")  # what the page before said when it was left
    browser.open(tiny()).draw()
    browser.drawn()
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = {"button", "textbox", "spinbutton", "slider", "radio", "combobox", "listbox", "link", "checkbox"}
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    found = [(role, name.strip()) for role, name in roles if role in controls]
    nameless = [role for role, name in found if not name]
    frames = browser.all("button > .image-frame")  # Gradio's own, round the two maps, to which it gives no name
    assert len(found) > 15 and len(frames) == 2 and nameless == ["button"] * len(frames)

    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    local = (browser.server, "data:", "blob:", "about:")
    assert len(asked) > 10 and not [address for address in asked if not address.startswith(local)]
    assert not [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]


def test_the_server_gives_out_no_files_and_takes_none(server):
    for path in ("/etc/passwd", "app/app.py", "../../../../etc/passwd", "setup.cfg"):
        with pytest.raises(HTTPError, match="40[34]"):
            urlopen(f"{server}/gradio_api/file={path}")
    part = b'Content-Disposition: form-data; name="files"; filename="a.txt"'
    body = b"\r\n".join((b"--x", part, b"", b"a" * 1000, b"--x--", b""))
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(HTTPError, match="413"):
        urlopen(Request(f"{server}/gradio_api/upload", body, headers))

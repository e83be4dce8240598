"""The demo end to end: the real page on the loopback, in headless Chromium.

Screenshots go to the folder that TSAM_SCREENSHOTS names, or to pytest's; docs/demo.png is one of them:

    TSAM_SCREENSHOTS=shots pytest tests/test_app_browser.py -k panel && cp shots/demo.png docs
"""

import base64
import io
import json
import os
import shutil
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("gradio.blocks", reason="the page needs gradio: pip install '.[demo]'")
webdriver = pytest.importorskip("selenium.webdriver", reason="the browser is driven by selenium: pip install selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no chromium and chromedriver: apt-get install chromium chromium-driver", allow_module_level=True)

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

from diffusers_tsam.app import app  # noqa: E402
from diffusers_tsam.app.drawing import SHIPPED, Models  # noqa: E402


pytestmark = pytest.mark.slow
SD, PIXART, SINK = SHIPPED
STARTS = "Starts, best first: click one to draw it"
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
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except Exception as error:  # the page has replaced what was looked at
                what = f"{what} ({type(error).__name__})"
            time.sleep(0.1)
        raise AssertionError(f"waited in vain for {what}; the page says {self.text('body')[:2000]!r}")

    def open(self, query=""):
        self.driver.get(f"{self.server}/{query}")
        wanted = {name: values[0] for name, values in parse_qs(query.lstrip("?")).items()}
        self.until(lambda: self.button("Draw"), "the page")
        if "prompt" in wanted:
            self.until(lambda: self.value("Prompt") == wanted["prompt"], "the link's settings")
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

    def status(self, *parts):
        return self.until(lambda: (t := self.text("#tsam-status")) and any(p in t for p in parts) and t, parts)

    def drawn(self):
        text = self.status("after the guided steps")
        self.until(lambda: len(self.sources("Stock", "T-SAM")) == 2, "the maps")
        return text

    def sources(self, *labels):
        """Addresses of the pictures shown, by their components' labels."""
        return [image.get_attribute("src") for label in labels for image in self.images(label)]

    def images(self, label):
        path = f'//label[normalize-space()="{label}"]/ancestor::div[contains(@class, "block")][1]//img'
        return [image for image in self.all(path, By.XPATH) if image.is_displayed()]

    def captions(self, label):
        return [image.get_attribute("alt") for image in self.images(label)]

    def word(self, text):
        next(each for each in self.all("fieldset label") if each.text == text).click()

    def download(self, name, folder):
        """The bytes of the file that a button gives."""
        self.driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
        self.button(name).click()
        path = folder / app.FILES[name]
        self.until(path.exists, path.name)
        return path.read_bytes()

    def sides(self):
        """Width and height of the page."""
        return self.driver.execute_script("let e = document.documentElement; return [e.scrollWidth, e.scrollHeight]")

    def save(self, path, height=None):
        width, whole = self.sides()
        clip = {"x": 0, "y": 0, "scale": 1, "width": width, "height": height or whole}
        found = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
        path.write_bytes(base64.b64decode(found["data"]))


@pytest.fixture(scope="module")
def chromium(server):
    browsers = []

    def start():
        browsers.append(Browser(server))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.driver.quit()


@pytest.fixture(scope="module")
def browser(chromium):
    return chromium()


def pixels(address):
    with urlopen(address) as answer:
        return np.asarray(Image.open(answer).convert("RGB"), dtype=float)


def test_a_prompt_is_drawn_and_every_panel_follows(browser, tmp_path):
    browser.open("?prompt=a+red+cube&steps=25&seed=74")
    assert not any(title.is_displayed() for title in browser.all("h2"))  # nothing empty before the first drawing
    blank = browser.sources("Stock and T-SAM")
    browser.write("Prompt", "a red cube and a blue sphere")
    browser.field("Prompt").send_keys(Keys.ENTER)
    browser.status("T-SAM: step")  # live
    browser.until(lambda: browser.sources("Stock and T-SAM")[1] != blank[1], "a preview")
    assert "stock" in browser.drawn()

    stock, tsam = map(pixels, browser.sources("Stock and T-SAM"))
    assert stock.shape == tsam.shape == (512, 512, 3) and min(stock.std(), tsam.std()) > 5
    assert np.abs(stock - tsam).max() > 20
    assert [len(line.get_attribute("points").split()) for line in browser.all(".tsam-curve polyline")] == [25, 25]
    expected = ["Stock, seed 74: 2 red cubes", "T-SAM, seed 74: blue sphere, red cube"]
    assert browser.captions("Stock and T-SAM") == expected
    words = [label.text for label in browser.all("fieldset label")]
    assert words == [*"a red cube and a blue sphere".split(), "every word"]

    screenshots = Path(os.environ.get("TSAM_SCREENSHOTS") or tmp_path)
    screenshots.mkdir(parents=True, exist_ok=True)
    browser.save(screenshots / "demo.png", UP_TO_MAPS)
    chosen = browser.sources("Stock", "T-SAM")
    next(each for each in browser.all("fieldset label input") if not each.is_selected()).click()
    browser.until(lambda: not set(chosen) & set(browser.sources("Stock", "T-SAM")), "the word's maps")
    first = browser.sources("Stock", "T-SAM")
    browser.all('input[type="range"]')[0].send_keys(Keys.ARROW_RIGHT)
    browser.until(lambda: not set(first) & set(browser.sources("Stock", "T-SAM")), "the second step's maps")
    assert len(browser.all(".tsam-tables table")) == 4
    browser.word("every word")
    browser.until(lambda: browser.sources("Every word") and not browser.sources("Stock", "T-SAM"), "the figure")

    with Image.open(io.BytesIO(browser.download("T-SAM picture", tmp_path))) as picture:
        assert picture.size == (128, 128)
    numbers = json.loads(browser.download("Numbers (JSON)", tmp_path))
    assert numbers["prompt"] == "a red cube and a blue sphere" and len(numbers["tsam"]["losses"]) == 25

    for width, dark in ((WIDE, False), (WIDE, True), (NARROW, False), (NARROW, True)):
        browser.resize(width, dark)
        time.sleep(0.5)
        assert browser.sides()[0] <= width
        browser.save(screenshots / f"{width}-{'dark' if dark else 'light'}.png")
    browser.resize(WIDE)

    address = next(each.get_attribute("href") for each in browser.all("a") if "link" in each.text)
    assert address.startswith(browser.server)
    browser.open("?" + urlsplit(address).query)
    assert [browser.value(name) for name in ("Seed", "Steps")] == ["74", "25"]


@pytest.mark.parametrize(
    "label, text, says",
    [
        ("Prompt", "", "two words or more"),
        ("Prompt", "cube", "Write two or more"),
        ("Steps", "500", "from 1 to 100"),
        ("Starts to choose from", "9", "from 1 to 8"),
    ],
)
def test_wrong_input_is_told_of_at_its_field_and_can_be_repaired(label, text, says, browser):
    browser.open("?prompt=a+red+cube&steps=2")
    browser.write(label, text)
    browser.draw()
    browser.until(lambda: says in browser.label(label).text, says)
    assert "Traceback" not in browser.text("body") and "step" not in browser.text("#tsam-status")
    browser.write(label, "a red cube" if label == "Prompt" else 1)
    browser.draw()
    browser.drawn()
    assert says not in browser.label(label).text.replace("Two words or more.", "")


@pytest.mark.parametrize(
    "query, says",
    [("?model=/etc/passwd", "There is no model '/etc/passwd' here"), ("?steps=x", "which is no number")],
)
def test_a_link_that_asks_for_what_cannot_be_is_told_of(query, says, browser):
    browser.open(query).status(says)
    assert browser.value("Model") == SD


def test_stop_stops(browser):
    browser.open("?prompt=a+red+cube+and+a+blue+sphere&steps=100&preset=paper").draw()
    browser.status("T-SAM: step")
    browser.button("Stop").click()
    browser.status("Stopped")
    browser.write("Steps", 2)
    browser.draw()
    browser.drawn()


def test_another_page_sees_its_place_in_the_queue_and_gets_its_turn(browser, chromium):
    other = chromium()
    other.open("?prompt=a+blue+ring&steps=2")
    browser.open("?prompt=a+red+cube+and+a+blue+sphere&steps=100").draw()
    browser.status("T-SAM: step")
    other.draw()
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
    browser.field("Preset").click()
    next(each for each in browser.all('[role="option"]') if each.text.strip("✓ ") == "paper").click()
    browser.until(lambda: browser.value("Alpha") == "15", "what the preset says")
    assert (browser.value("Relative step"), browser.value("Objective")) == ("", "l1")


def test_a_click_on_a_sheet_turns_to_that_seed_and_one_on_a_start_draws_it(browser):
    browser.open("?prompt=a+red+cube+and+a+blue+sphere&steps=2&seed=3&seeds=2&starts=3").draw()
    assert browser.drawn()
    ranked = [int(caption.split()[1].rstrip(":")) for caption in browser.captions(STARTS)]
    sheet = browser.captions("Stock and T-SAM")
    expected = [f"{name}, seed {seed}" for name in ("Stock", "T-SAM") for seed in ranked[:2]]
    assert [caption.partition(":")[0] for caption in sheet] == expected and sorted(ranked) == [3, 4, 5]
    browser.images("Stock and T-SAM")[3].click()
    browser.status(f"Loss of seed {ranked[1]} ")
    browser.images(STARTS)[2].click()
    browser.status(f"Loss of seed {ranked[2]} ")
    assert [caption.partition(":")[0] for caption in browser.captions("Stock and T-SAM")] == [
        f"{name}, seed {ranked[2]}" for name in ("Stock", "T-SAM")
    ]
    assert len(browser.images(STARTS)) == 3 and browser.value("Seed") == "3"


def test_every_control_has_a_name_and_an_alpha_that_breaks_the_picture_is_warned_of(browser):
    browser.open("?prompt=a+red+cube&steps=1&alpha=9000").draw()
    assert "halve alpha" in browser.drawn()
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = {"button", "textbox", "spinbutton", "slider", "radio", "combobox", "listbox", "link", "checkbox"}
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    found = [(role, name.strip()) for role, name in roles if role in controls]
    nameless = [role for role, name in found if not name]
    frames = browser.all("button > .image-frame")  # Gradio's own, round the two maps, to which it gives no name
    assert len(found) > 15 and len(frames) == 2 and nameless == ["button"] * len(frames)


def test_nothing_is_asked_of_anyone_else(browser):
    browser.driver.get("about:blank")
    browser.driver.get_log("browser")  # what the page before said when it was left
    browser.open("?prompt=a+red+cube&steps=1").draw()
    browser.drawn()
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    local = (browser.server, "data:", "blob:", "about:")
    assert len(asked) > 10 and not [address for address in asked if not address.startswith(local)]
    assert not [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.parametrize("path", ["/etc/passwd", "app/app.py", "../../../../etc/passwd", "setup.cfg"])
def test_the_server_gives_out_no_files_and_takes_none(path, server):
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{server}/gradio_api/file={path}")
    assert refused.value.code in (403, 404)
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n%b\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"{server}/gradio_api/upload", body % (b"a" * 1000), headers))
    assert refused.value.code == 413

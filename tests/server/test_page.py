"""The page at `/` in headless Chromium. Without Chromium, these tests are skipped.

Screenshots go to the folder in TWOTOWER_SCREENSHOTS, else to pytest's temporary folder.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from twotower import model_loading
from twotower.recipes import page_trace
from twotower.server import page

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
DIALOGUE = "User: I need a flight to Paris.\nAssistant:"
KEY = "a-key-of-this-test"
SECONDS = 60  # time limit of any change on the page

needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium; on Debian: sudo apt-get install chromium chromium-driver"
)


# --- helpers ----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(**environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Runs `twotower serve` with the bundled model on a free port; yields its address and process."""
    command = [sys.executable, "-m", "twotower", "serve", "--port", "0", "--threads", "1", "--dtype", "float32"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"http://[\d.]+:\d+", line):
                break
        else:
            raise AssertionError(f"the server ended with {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that the log does not fill the pipe
        yield found[0], process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as (address, _):
        yield address


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """The folder for screenshots."""
    folder = Path(os.environ.get("TWOTOWER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Browser:
    """A browser window and the actions of a user."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def window(self, width: int, height: int, scheme: str = "light", motion: str = "reduce") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": motion}
        media = [{"name": name, "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})

    def open(self, address: str) -> None:
        self.driver.get(address)
        self.until(lambda: self.all("#examples button"))

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        """The text in the document, also of hidden elements."""
        return str(self.one(selector).get_property("textContent"))

    def type(self, selector: str, text: str) -> None:
        field = self.one(selector)
        field.clear()
        field.send_keys(text)

    def choose(self, selector: str, value: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.one(selector)).select_by_value(value)

    def press(self, *keys: str) -> None:
        """Sends keys to the element with the focus."""
        from selenium.webdriver.common.keys import Keys

        self.driver.switch_to.active_element.send_keys(*[getattr(Keys, key) for key in keys])

    def until(self, true: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, SECONDS, poll_frequency=0.1).until(lambda _: true())

    def run(self) -> str:
        """Submits the form, waits for the end and returns the status line or the error."""
        self.one("#run").click()
        self.until(lambda: not self.one("#stop").is_displayed())
        return self.one("#status").text or self.one("#error").text

    def shot(self, path: Path) -> None:
        """Takes a screenshot of the whole page."""
        size = "return [innerWidth, document.documentElement.scrollHeight]"
        width, height = self.driver.execute_script(size)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        options = {"captureBeyondViewport": True, "clip": clip}
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd("Page.captureScreenshot", options)["data"]))

    def complaints(self) -> list[str]:
        """Console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] != "INFO"]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    chromium.driver.get("about:blank")
    chromium.window(1280, 900)
    chromium.complaints()
    return chromium


def ask(server: str, **fields: Any) -> str:
    """The body of the API's response."""
    body = json.dumps(fields).encode()
    request = urllib.request.Request(f"{server}/v1/completions", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return str(answer.read().decode())


def answer_of(server: str, **fields: Any) -> tuple[str, int]:
    """The API's text and its number of tokens."""
    answer = json.loads(ask(server, **fields))
    return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]


# --- in the browser ---------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("mode", ["diffusion", "verified"])
def test_a_comparison(browser: Browser, server: str, shots: Path, mode: str) -> None:
    fields = {"prompt": DIALOGUE, "max_tokens": 40, "temperature": 0.7, "seed": 5}
    blocks = {"threshold": 0.9, "block_size": 8}
    browser.open(server)
    browser.choose("#mode", mode)
    for field, value in (fields | blocks).items():
        browser.type(f"#{field}", str(value))
    said = browser.run()

    text, count = answer_of(server, mode=mode, **fields, **blocks)
    ar, _ = answer_of(server, mode="ar", **fields)
    assert browser.text("#panel-mode .whole") == text
    assert browser.text("#panel-ar .whole") == ar
    assert f"{count} tokens in" in said
    assert "× as many tokens per second" in said
    assert (text == ar) == ("The texts are identical" in said)
    assert browser.text("#panel-mode .tokens") == str(count)
    assert len(browser.all(".heatmap td")) == count
    assert not browser.all(".heatmap td.later")

    slider = browser.one("#clock")
    slider.click()
    browser.press("HOME")
    assert float(slider.get_property("value")) == 0
    assert "pass 0 of" in slider.get_attribute("aria-valuetext")
    assert browser.text("#panel-mode .whole") == ""
    assert len(browser.all(".heatmap td.later")) == count
    browser.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT")
    assert 0 < float(slider.get_property("value")) < float(slider.get_attribute("max"))
    assert 0 < len(browser.all(".heatmap td.later")) < count
    assert float(browser.text("#panel-mode .time").split()[0]) > 0
    browser.shot(shots / f"race-{mode}.png")
    if mode == "verified":  # a draft appears before the context tower accepts a part of it
        browser.press("HOME")
        said = []
        for _ in range(6):
            browser.press("ARROW_RIGHT")
            said.append(browser.text("#panel-mode .step"))
        drafted = [
            int(found[1]) for line in said if (found := re.match(r"draft \d+: (\d+) of \d+ tokens drafted", line))
        ]
        assert max(drafted) > 0
        assert any("accepted, one added by the context tower" in line for line in said)
    browser.press("END")
    assert browser.text("#panel-mode .whole") == text

    browser.one(".heatmap td").click()
    browser.press("ARROW_RIGHT")
    assert re.search(r"position|from the context tower", browser.text("#heatmap-detail"))
    assert "confidence" in browser.text("#heatmap-detail")
    assert not browser.complaints()


@needs_browser
def test_replay(browser: Browser, server: str) -> None:
    browser.window(1280, 900, motion="no-preference")
    browser.open(server)
    browser.run()
    assert browser.one("#play").text == "Pause"  # starts by itself unless the user prefers reduced motion
    value = partial(browser.one("#clock").get_property, "value")
    before = float(value())
    browser.until(lambda: float(value()) != before)
    browser.one("#play").click()
    browser.choose("#speed", "1")
    browser.one("#play").click()
    browser.until(lambda: browser.one("#play").text == "Play")
    assert float(value()) == pytest.approx(float(browser.one("#clock").get_attribute("max")))
    assert not browser.complaints()


@needs_browser
def test_stop(browser: Browser, server: str) -> None:
    browser.open(server)
    browser.type("#max_tokens", "3000")
    browser.driver.execute_script("document.getElementById('run').click(); document.getElementById('stop').click()")
    browser.until(lambda: browser.one("#run").is_enabled())
    assert browser.one("#status").text == "Stopped."
    assert "tokens in" in browser.run()
    assert not browser.complaints()


@needs_browser
def test_every_mode_and_example(browser: Browser, server: str) -> None:
    browser.open(server)
    for mode in ("ar", "mock_ar", "auto", "verified", "diffusion"):
        browser.choose("#mode", mode)
        assert "tokens in" in browser.run()
        assert browser.one("#panel-ar").is_displayed() == (mode != "ar")
    for example in browser.all("#examples button")[:1]:
        example.click()
        browser.choose("#mode", "verified")
        assert "The texts are identical" in browser.run()
    assert not browser.complaints()


@needs_browser
@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_code_snippets_run(browser: Browser, server: str) -> None:
    browser.open(server)
    prompt = "User: It's \"here\",\nisn't it?\nAssistant:"
    browser.type("#prompt", prompt)
    browser.type("#max_tokens", "12")
    text, _ = answer_of(server, prompt=prompt, max_tokens=12, temperature=0, seed=1, mode="verified", threshold=0.8)

    shown = browser.text("#code")
    out = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True, timeout=SECONDS)
    assert json.loads(out.stdout)["choices"][0]["text"] == text
    browser.one("#copy").click()
    browser.until(lambda: browser.one("#copy").text == "Copied")
    browser.one("#show-python").click()
    shown = browser.text("#code")
    out = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True, timeout=SECONDS)
    assert out.stdout == text + "\n"


@needs_browser
def test_how_it_works_by_keyboard(browser: Browser, server: str, shots: Path) -> None:
    trace = json.loads((page.FOLDER / "how.json").read_text("utf-8"))
    browser.open(f"{server}/#how")
    browser.until(lambda: browser.all("#how .cells"))
    titles = [browser.one("#how .explanation h3").text]
    while browser.one("#how-next").is_enabled():
        browser.press("ARROW_RIGHT")
        titles.append(browser.one("#how .explanation h3").text)
        assert len(browser.one("#how .words").text) > 40
        if titles[-1].startswith("Pass 4"):
            browser.shot(shots / "how.png")
    assert len(set(titles)) == len(titles) > len(trace["passes"]) + 5
    words = [text.strip() or "␣" for text in (token.replace("\n", "↵") for token in trace["block"])]
    assert [cell.text for cell in browser.all("#how .cell .what")] == words
    assert f"K/V of {len(trace['context']) + len(words)} tokens" in browser.text("#how .towers")
    browser.press("ARROW_LEFT")
    assert browser.one("#how .explanation h3").text == titles[-2]
    browser.press("HOME")
    assert browser.one("#how .explanation h3").text == titles[0]
    assert not browser.complaints()


@needs_browser
def test_how_it_works_needs_no_server(browser: Browser) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

    files = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=page.FOLDER))
    threading.Thread(target=files.serve_forever, daemon=True).start()
    try:
        browser.open(f"http://127.0.0.1:{files.server_port}/#how")
        browser.until(lambda: browser.all("#how .cells"))
        browser.press("END")
        assert "passes" in browser.one("#how .explanation h3").text
        browser.one('a[href="#try"]').click()
        assert "no twotower server behind this page" in browser.one("#error").text
    finally:
        files.shutdown()
        files.server_close()


@needs_browser
def test_error_messages(browser: Browser, shots: Path) -> None:
    with serving(TWOTOWER_API_KEYS=KEY) as (server, process):
        browser.open(server)
        browser.until(lambda: browser.one("#key").is_displayed())
        assert "API key" in browser.one("#error").text
        browser.type("#key", KEY)
        browser.press("TAB")
        browser.until(lambda: "Serving" in browser.text("#served"))
        assert not browser.one("#error").is_displayed()
        assert "tokens in" in browser.run()
        assert "$TWOTOWER_API_KEY" in browser.text("#code")
        assert KEY not in browser.text("#code")

        browser.type("#threshold", "3")
        assert browser.run() == "Threshold is 3; it should be less than or equal to 1."
        assert browser.one("#threshold").get_attribute("aria-invalid") == "true"
        assert browser.driver.switch_to.active_element.get_attribute("id") == "threshold"
        browser.shot(shots / "error.png")
        browser.type("#threshold", "0.8")
        browser.type("#max_tokens", "1000000")
        assert "max_tokens is 1000000, together longer than" in browser.run()
        browser.type("#max_tokens", "16")
        browser.type("#prompt", "x")
        assert "tokens in" in browser.run()
        process.send_signal(signal.SIGTERM)
        process.wait(SECONDS)
        browser.type("#prompt", "y")
        assert "cannot be reached" in browser.run()
        assert browser.one("#run").is_enabled()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(browser: Browser, server: str, shots: Path, scheme: str) -> None:
    fits = "return document.documentElement.scrollWidth <= innerWidth"
    browser.window(360, 740, scheme)
    browser.open(server)
    assert browser.driver.execute_script(fits)
    browser.all("#examples button")[1].click()
    browser.run()
    browser.one("#clock").send_keys("")
    browser.press("HOME", "ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT")
    assert browser.driver.execute_script(fits)
    browser.shot(shots / f"phone-{scheme}.png")
    browser.one('a[href="#how"]').click()
    browser.until(lambda: browser.all("#how .cells"))
    for _ in range(11):
        browser.one("#how-next").click()
        assert browser.driver.execute_script(fits)
    browser.shot(shots / f"phone-how-{scheme}.png")
    ground = browser.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", ground))) / 3
    assert (light > 128) == (scheme == "light")
    assert not browser.complaints()


@needs_browser
def test_keyboard_navigation(browser: Browser, server: str) -> None:
    """Tab reaches every control; the focused element has a label and a visible outline."""
    browser.open(server)
    browser.run()
    browser.driver.execute_script("document.querySelector('.skip').focus()")
    seen = []
    name = """const e = document.activeElement;
      const label = e.labels?.[0]?.textContent || e.getAttribute('aria-label') || e.textContent;
      const shown = getComputedStyle(e);
      return [e.id || e.tagName, label.trim(), shown.outlineStyle];"""
    for _ in range(40):
        browser.press("TAB")
        where, label, outline = browser.driver.execute_script(name)
        if where == "BODY":
            break
        assert label, where
        assert outline != "none", where
        seen.append(where)
    wanted = {"prompt", "mode", "threshold", "block_size", "draft_steps", "max_tokens", "temperature", "seed", "run",
              "clock", "play", "back", "forward", "speed", "TD", "show-curl", "show-python", "copy"}  # fmt: skip
    assert wanted <= set(seen)


# --- without a browser ------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_other_hosts() -> None:
    for file in page.FOLDER.iterdir():
        if file.suffix in page.MEDIA_TYPES:
            text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"(https?:)?//[a-z]+\.[a-z]", text), file.name
            assert not re.search(r"<script(?![^>]*\bsrc=)|\son[a-z]+=\"", text), file.name


def test_the_recording_matches_the_model() -> None:
    kept = json.loads((page.FOLDER / "how.json").read_text("utf-8"))
    made = page_trace.record(
        model_loading.load_model(model_loading.source_of("bundled/small"), dtype="float32"), page_trace.PROMPT
    )
    assert _without_numbers(made) == _without_numbers(kept)
    assert _numbers(made) == pytest.approx(_numbers(kept), rel=0.02, abs=0.01)


def _numbers(of: Any) -> list[float]:
    match of:
        case dict():
            return [number for value in of.values() for number in _numbers(value)]
        case list():
            return [number for value in of for number in _numbers(value)]
        case float():
            return [of]
    return []


def _without_numbers(of: Any) -> Any:
    match of:
        case dict():
            return {name: _without_numbers(value) for name, value in of.items()}
        case list():
            return [_without_numbers(value) for value in of]
        case float():
            return None
    return of


@pytest.mark.parametrize("mode", ["diffusion", "verified", "auto"])
def test_stream_denoising_has_every_token(server: str, mode: str) -> None:
    fields = {"prompt": DIALOGUE, "max_tokens": 40, "temperature": 0, "seed": 1, "mode": mode}
    stream = ask(server, **fields, stream=True, stream_denoising=True, stream_options={"include_usage": True})
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    committed = [chunk["committed"] for chunk in chunks if "committed" in chunk]
    texts = [text for block in committed for text in block["texts"] if text != "<eos>"]
    assert "".join(texts) == answer_of(server, **fields)[0] if mode != "auto" else texts
    assert [block["start"] for block in committed] == [
        sum(len(b["tokens"]) for b in committed[:i]) for i in range(len(committed))
    ]
    assert sum(len(block["tokens"]) for block in committed) == chunks[-1]["usage"]["completion_tokens"]
    for block in committed:
        assert len(block["tokens"]) == len(block["texts"]) == len(block["committed_at"]) == len(block["confidence"])

"""
A real browser without a window, for the tests of pages: chromedriver speaks WebDriver over HTTP,
and the standard library is all that it takes to answer.

    with browser(width=390) as b:                skips the test where there is no Chromium
        b.open(path)
        b.run("return document.title")           what the script returns, as Python has it
        b.hover("#token-3")                      the pointer moves there
        b.screenshot(path)

Sources   W3C's WebDriver; Chromium's mobileEmulation, which takes a page's viewport seriously
"""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the name that WebDriver gives an element's id

# What a reader would miss: pictures without pixels, tables without rows, text beyond the edge.
LOOK = """
const all = (what) => [...document.querySelectorAll(what)];
return {
  pictures: all('figure > img').map(x => [x.alt, x.naturalWidth, x.getBoundingClientRect().width]),
  drawings: all('figure > svg').map(x => x.getBoundingClientRect().width),
  tables: all('table').map(x => [x.rows.length, x.rows[0].cells.length]),
  sections: all('h2').map(x => x.textContent),
  wide: document.documentElement.scrollWidth, window: window.innerWidth,
  fetched: performance.getEntriesByType('resource').map(x => x.name)
                      .filter(x => !x.startsWith('data:'))
};
"""


class Browser:
    """A session of chromedriver at `url`."""

    def __init__(self, url):
        self.url = url

    def ask(self, path, given=None, method="POST"):
        body = None if given is None else json.dumps(given).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, body, headers, method=method), timeout=60
        ) as answer:
            return json.load(answer)["value"]

    def open(self, path):
        self.ask("/url", dict(url=Path(path).resolve().as_uri()))

    def run(self, script, *args):
        return self.ask("/execute/sync", dict(script=script, args=args))

    def look(self):
        return self.run(LOOK)

    def find(self, selector):
        return self.ask("/element", {"using": "css selector", "value": selector})[ELEMENT]

    def hover(self, selector):
        where = dict(type="pointerMove", duration=0, x=0, y=0)
        where["origin"] = {ELEMENT: self.find(selector)}
        self.ask("/actions", dict(actions=[dict(type="pointer", id="mouse", actions=[where])]))

    def click(self, selector):
        self.ask(f"/element/{self.find(selector)}/click", {})

    def screenshot(self, path):
        Path(path).write_bytes(base64.b64decode(self.ask("/screenshot", method="GET")))


def settings(chromium, folder, width, height, mobile):
    """What chromedriver is asked for. A phone has three of its dots to each of the page's."""
    options = dict(binary=chromium, args=[*QUIET, f"--user-data-dir={folder}"])
    if mobile:
        screen = dict(width=width, height=height, pixelRatio=3, mobile=True, touch=True)
        options["mobileEmulation"] = dict(deviceMetrics=screen)
    else:
        options["args"].append(f"--window-size={width},{height}")
    return dict(capabilities=dict(alwaysMatch={"goog:chromeOptions": options}))


@contextlib.contextmanager
def browser(folder, width=1200, height=900, mobile=False):
    """folder: an empty place for what a browser keeps. Ends with the process that it started."""
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    driver = shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium with chromedriver is installed")
    with subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            said = iter(process.stdout.readline, "")
            port = next(m[1] for line in said if (m := re.search(r"on port (\d+)\.", line)))
            b = Browser(f"http://localhost:{port}")
            asked = settings(chromium, folder, width, height, mobile)
            session = b.ask("/session", asked)["sessionId"]
            b.url += f"/session/{session}"
            try:
                yield b
            finally:
                b.ask("", method="DELETE")
        finally:
            process.terminate()

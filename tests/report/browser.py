"""A headless Chromium, spoken to over a pipe (the DevTools protocol), with nothing to install beside it.

Also makes pictures of a page by hand:

    python -m tests.report.browser reports/report.html docs/report.png --width 1280 --dark
    python -m tests.report.browser reports/report.html docs/memory.png --section Memory
"""

import argparse
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip
_DRAWN = "document.documentElement?.dataset.charts === 'drawn'"

_BOX = """(() => {
    const found = [...document.querySelectorAll('section')].find(
        section => section.querySelector('h2').textContent === TITLE);
    const box = found?.getBoundingClientRect();
    return box && [box.left + scrollX, box.top + scrollY, box.width, box.height];
})()"""


def find_chromium() -> str | None:
    """The browser's program; None where none is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One tab. `problems` are errors of the console, exceptions, and requests that went out."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, os.fdopen(answers, "rb", buffering=0)
        self._buffer, self._number, self._session = b"", 0, ""
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Asks and waits for the answer; what happens meanwhile is looked at."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, f"{method}: {found['error']}"
                result: dict[str, Any] = found["result"]
                return result
            self._look(found)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            more = self._answers.read(1 << 16)
            assert more, "the browser has ended"
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _look(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(str(details.get("exception", details)))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(str([argument.get("value") for argument in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "about:")):
                self.problems.append(f"a request went out to {url}")

    def open(self, page: Path, *, width: int, dark: bool = False) -> None:
        """Loads the page at `width` CSS pixels and waits until its charts are drawn."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self._resize(width, 900)
        self.call("Page.navigate", url=page.resolve().as_uri())
        for _ in range(600):
            if self.evaluate(_DRAWN):
                return
            time.sleep(0.1)
        raise AssertionError(f"the charts were not drawn; {self.problems}")

    def _resize(self, width: int, height: int) -> None:
        mobile = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=mobile,
        )  # fmt: skip

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path, *, width: int, height: int | None = None) -> None:
        """A picture of the page from its top, all of it where no height is given."""
        whole = int(self.evaluate("document.documentElement.scrollHeight"))
        self._capture(path, [0, 0, width, height or whole])

    def picture_of(self, path: Path, section: str) -> None:
        """A picture of the page's section with that heading."""
        box = self.evaluate(_BOX.replace("TITLE", json.dumps(section)))
        assert box is not None, f"no section is called {section}"
        self._capture(path, box)

    def _capture(self, path: Path, box: list[float]) -> None:
        """box: left, top, width and height on the page."""
        clip = {**dict(zip(("x", "y", "width", "height"), box, strict=True)), "scale": 1}
        found = self.call(
            "Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh Chromium, ended on the way out."""
    program = find_chromium()
    assert program is not None, "no Chromium is installed"
    to_child, requests = os.pipe()
    answers, from_child = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, *_FLAGS, f"--user-data-dir={profile}"]
        # the browser reads from 3 and writes to 4
        script = f'exec "$0" "$@" 3<&{to_child} 4>&{from_child}'
        process = subprocess.Popen(
            ["bash", "-c", script, *command],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        try:
            yield Browser(requests, answers)
        finally:
            os.close(requests)
            process.terminate()
            process.wait(timeout=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, help="of the picture; all of the page by default")
    parser.add_argument("--section", help="the one to show, by its heading")
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    with browser() as tab:
        tab.open(args.page, width=args.width, dark=args.dark)
        if args.section is None:
            tab.picture(args.picture, width=args.width, height=args.height)
        else:
            tab.picture_of(args.picture, args.section)
        for problem in tab.problems:
            print(problem)


if __name__ == "__main__":
    main()

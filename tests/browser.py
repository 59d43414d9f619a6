"""Chromium without a window, driven over its DevTools protocol: JSON through two pipes, so no library is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW_TO = f"none of {', '.join(NAMES)} is installed: tests/install_chromium.sh installs what Debian has"
DEADLINE = 90.0  # seconds for one answer, on a machine that does other things as well
LOOK = """({
    title: document.title,
    images: [...document.images].map(image => [image.alt, image.complete, image.naturalWidth, image.naturalHeight]),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    outside: [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')).filter(
        e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5).map(e => e.tagName),
    height: document.documentElement.scrollHeight,
})"""


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Look:
    """What a page is, once it has loaded."""

    title: str
    images: list[tuple[str, bool, int, int]]  # alternative text, decoded, natural width and height
    overflow: int  # pixels to which the page is wider than the window
    outside: list[str]  # elements that reach beyond the right edge
    height: int
    problems: list[str]  # errors on the console, exceptions, violations of the page's policy
    requests: list[str]  # addresses that the page asked for, data: left out


class Browser:
    """A context manager; `open` visits one page after another."""

    def __init__(self, profile: Path):
        program = chromium()
        if program is None:
            raise FileNotFoundError(HOW_TO)
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--disable-background-networking"]
        script = f'exec "$@" 3<&{to_child} 4>&{from_child}'  # where Chromium looks for the pipes
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", program, *options],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._buffer, self._number, self.events = b"", 0, []
        target = self._ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._out)  # Chromium ends with its pipe
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def open(self, page: Path, *, width: int = 1000, height: int = 900, scheme: str = "light") -> Look:
        """Loads the page in a window of so many pixels and looks at it."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.ask("Emulation.setEmulatedMedia", media)
        self.events.clear()
        self.ask("Page.navigate", {"url": page.resolve().as_uri()})
        self._wait_for("Page.loadEventFired")
        found = self.ask("Runtime.evaluate", {"expression": LOOK, "returnByValue": True})["result"]["value"]
        return Look(**found, problems=self._problems(), requests=self._requests())

    def screenshot(self) -> bytes:
        """The visible part, as PNG."""
        return base64.b64decode(self.ask("Page.captureScreenshot", {"format": "png"})["data"])

    def ask(self, method: str, parameters: dict | None = None) -> dict:
        return self._ask(method, parameters or {}, self._session)

    def _ask(self, method: str, parameters: dict, session: str = "") -> dict:
        self._number += 1
        number, message = self._number, {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        end = time.monotonic() + DEADLINE
        while True:
            answer = self._message(end)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _wait_for(self, method: str) -> None:
        end = time.monotonic() + DEADLINE
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._message(end))

    def _message(self, end: float) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            more = os.read(self._in, 1 << 20) if ready else b""
            if not more:
                raise TimeoutError(f"Chromium did not answer (it ended with {self._process.poll()})")
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _problems(self) -> list[str]:
        found = []
        for event in self.events:
            method, what = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(str(what["exceptionDetails"].get("text")))
            elif method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
                found.append(str(what["args"]))
            elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
                found.append(what["entry"]["text"])
            elif method == "Network.loadingFailed":
                found.append(str(what.get("errorText")))
        return found

    def _requests(self) -> list[str]:
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in asked if not address.startswith("data:")]

"""A headless Chromium for tests, spoken to over its DevTools pipe: nothing but the browser is needed, and no network.

with Browser() as browser:
    page = browser.open(path, width=375, dark=True)
    page.run("document.title")
    page.press("Enter")
    assert page.complaints == [] and page.requests == [path.as_uri()]
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

TIMEOUT = 60.0
"""Seconds for one answer; a busy machine starts a browser slowly."""


def executable() -> str | None:
    """The Chromium of this machine, or the one that MOERGE_CHROMIUM names."""
    names = (os.environ.get("MOERGE_CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are none of the numbers that Chromium reads from and writes to, 3 and 4."""
    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 50) for end in low]
    for end in low:
        os.close(end)
    return high[0], high[1]


class Browser:
    """A running browser; use it in a `with` statement."""

    def __init__(self) -> None:
        path = executable()
        assert path is not None, "look at executable() first"
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self._write = _pipe()
        self._read, to_write = _pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={self._profile.name}"]
        command = ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{to_write}', "bash", path, *flags]
        self._process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._last, self.events = b"", 0, list[dict[str, Any]]()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self.call("Browser.close")
            self._process.wait(TIMEOUT)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """One DevTools command and its result; events that come meanwhile are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(TIMEOUT)
            assert answer is not None, f"the browser did not answer {method}"
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, None if there is none in time."""
        until = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                return None
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, script: bool = True) -> Page:
        """A file in a new page that is loaded and painted."""
        return Page(self, path, width, height, dark, script)


class Page:
    """A page: what it asked for, what it complained about, and ways to use it."""

    def __init__(self, browser: Browser, path: Path, width: int, height: int, dark: bool, script: bool) -> None:
        self._browser = browser
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        phone = width < 600
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        if not script:
            self.call("Emulation.setScriptExecutionDisabled", value=True)
        self.call("Page.navigate", url=path.resolve().as_uri())
        self._wait("Page.loadEventFired")

    def call(self, method: str, **parameters: Any) -> Any:
        """A DevTools command to this page."""
        return self._browser.call(method, self._session, **parameters)

    def _mine(self, *methods: str) -> list[dict[str, Any]]:
        events = self._browser.events
        return [e["params"] for e in events if e.get("sessionId") == self._session and e["method"] in methods]

    def _wait(self, method: str) -> None:
        until = time.monotonic() + TIMEOUT
        while not self._mine(method):
            message = self._browser.receive(max(0.0, until - time.monotonic()))
            assert message is not None, f"{method} did not happen"
            self._browser.events.append(message)

    @property
    def requests(self) -> list[str]:
        """The addresses of everything that was asked for."""
        return [event["request"]["url"] for event in self._mine("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """Messages on the console, uncaught errors, and what the browser itself logged."""
        self.run("0")
        console = [str(event["args"]) for event in self._mine("Runtime.consoleAPICalled")]
        errors = [event["exceptionDetails"]["text"] for event in self._mine("Runtime.exceptionThrown")]
        return console + errors + [event["entry"]["text"] for event in self._mine("Log.entryAdded")]

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key: "Enter", "Tab" or " "."""
        codes = {"Enter": 13, "Tab": 9, " ": 32}
        about: dict[str, Any] = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key != "Tab" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **about, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, x: float, y: float) -> None:
        """Press and release the left button."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path, *, whole: bool = True) -> None:
        """A screenshot of the whole page or of the window, as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        """Close the page."""
        self.call("Page.close")

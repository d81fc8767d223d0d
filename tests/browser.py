"""A headless Chromium for the tests of the report page, spoken to over a pair of pipes; nothing to install but it.

The protocol is the browser's own (DevTools): one JSON object per message, ended by a zero byte.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import selectors
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
    "--force-color-profile=srgb",
)  # fmt: skip
KEYS = {
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
    "Enter": 13,
    "Home": 36,
    "End": 35,
}


def find() -> str | None:
    """The installed browser, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def _as_three_and_four(reading: int, writing: int) -> None:
    """Where the browser expects its pipes; first out of the way, for they may lie there the wrong way round."""
    high = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (reading, writing)]
    os.dup2(high[0], 3)
    os.dup2(high[1], 4)


class Browser:
    """One page of a headless browser; use it as a context.

    Attributes:
        complaints: what the page has written to the console as a warning or an error, and uncaught exceptions.
        requests: addresses that the page has asked for, `data:` ones left out.
    """

    def __init__(self, executable: str, profile: Path) -> None:
        read_theirs, write_ours = os.pipe()
        read_ours, write_theirs = os.pipe()
        self._to, self._from = write_ours, read_ours
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._number = 0
        self._rest = b""
        command = [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            command,
            pass_fds=(3, 4),
            preexec_fn=partial(_as_three_and_four, read_theirs, write_theirs),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_theirs)
        os.close(write_theirs)
        self._session: str | None = None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise AssertionError(f"{method}: {answer['error']}")
                return answer["result"]
            self._note(answer)

    def _receive(self, seconds: float = 60.0) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self._from, selectors.EVENT_READ)
            while b"\0" not in self._rest:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"the browser has not answered within {seconds:g} s")
                data = os.read(self._from, 1 << 16)
                if not data:
                    raise AssertionError(f"the browser has ended with {self._process.wait()}")
                self._rest += data
        first, self._rest = self._rest.split(b"\0", 1)
        return json.loads(first)

    def _note(self, event: dict[str, Any]) -> None:
        kind, content = event.get("method"), event.get("params", {})
        if kind == "Runtime.consoleAPICalled" and content["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(content["args"]))
        elif kind == "Runtime.exceptionThrown":
            self.complaints.append(str(content["exceptionDetails"]))
        elif kind == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
            self.complaints.append(str(content["entry"]))
        elif kind == "Network.requestWillBeSent" and not content["request"]["url"].startswith("data:"):
            self.requests.append(content["request"]["url"])

    def open(self, path: Path) -> None:
        """Load a file and wait until it and its pictures are there."""
        self.requests.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        for _ in range(600):
            if self.run("document.readyState === 'complete' && location.href !== 'about:blank'"):
                return
            time.sleep(0.05)
        raise AssertionError("the page has not finished loading")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def key(self, name: str, *, shift: bool = False) -> None:
        """Press a key, as a keyboard would."""
        text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
        code = KEYS.get(name, ord(name[0].upper()))
        for kind in ("keyDown" if text else "rawKeyDown", "keyUp"):
            extra = {"text": text} if kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=code,
                modifiers=8 if shift else 0, **extra,
            )  # fmt: skip

    def click(self, selector: str) -> None:
        """Click the middle of an element with the mouse, after scrolling it into view."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def middle(self, selector: str) -> tuple[float, float]:
        """Where an element's middle is in the window, after scrolling it there."""
        found = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        return found[0], found[1]

    def drag(self, selector: str, across: float, down: float) -> None:
        """Drag from an element's middle with the mouse."""
        x, y = self.middle(selector)
        for kind, left, top in (
            ("mousePressed", x, y), ("mouseMoved", x + across / 2, y + down / 2),
            ("mouseMoved", x + across, y + down), ("mouseReleased", x + across, y + down),
        ):  # fmt: skip
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=left, y=top, button="left", buttons=1, clickCount=1
            )

    def window(self, width: int, height: int, *, phone: bool = False) -> None:
        """Size of the window in pixels, or of a phone's screen."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=phone,
            deviceScaleFactor=2 if phone else 1,
        )  # fmt: skip

    def dark(self, on: bool) -> None:
        """What the system prefers."""
        value = "dark" if on else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Write what the window shows, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))

"""A headless Chromium that is told what to do over two pipes, and the page of a server in it.

Needs no package: messages are JSON, each ended by a zero byte, on descriptors 3 and 4 (the DevTools
protocol).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_memllm.text.chat import ChatTemplate
from support.engine import GatedRuntime
from support.server import Served, serving_small
from support.small_model import ScriptedRuntime, byte_tokenizer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE = 60.0  # seconds for one answer, on a machine that does other work
_FLAGS = (
    "--headless",
    "--no-sandbox",  # a container's root has no other way; the page is our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)
# Keys that do something by themselves: their number, and the text that they write.
_KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Space": (32, " "),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
Message = dict[str, Any]


def find_browser() -> str:
    """Return the path of a browser, or skip the test that needs one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(NAMES)} is installed")
    return found


class Browser:
    """A running browser. Every message that is no answer is kept in `events`."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._rest = b""
        self._last = 0
        self.events: list[Message] = []

    def call(self, method: str, session: str | None = None, **values: Any) -> Message:
        """Send a command and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": values}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return dict(answer["result"])

    def wait_for(self, method: str, session: str) -> Message:
        """Return the first event of a kind, which may have come already."""
        while True:
            for event in self.events:
                if event.get("method") == method and event.get("sessionId") == session:
                    return event
            self.receive()

    def receive(self) -> Message:
        """Return the next message; events are kept as well."""
        end = time.monotonic() + _PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            came = os.read(self._back, 1 << 16)
            if not came:
                raise EOFError("the browser has ended")
            self._rest += came
        first, _, self._rest = self._rest.partition(b"\0")
        message: Message = json.loads(first)
        if "id" not in message:
            self.events.append(message)
        return message

    def open(
        self, place: Path | str, *, width: int = 1200, dark: bool = False, script: bool = True
    ) -> Page:
        """Open a file or an address in a fresh tab, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        page = Page(self, found["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[theme])
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        page.call("Emulation.setDeviceMetricsOverride", **shape)
        page.call("Emulation.setScriptExecutionDisabled", value=not script)
        page.call("Page.navigate", url=place if isinstance(place, str) else place.as_uri())
        self.wait_for("Page.loadEventFired", page.session)
        return page


class Page:
    """One tab of a browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self.session = session

    def call(self, method: str, **values: Any) -> Message:
        """Send a command to this tab."""
        return self._browser.call(method, self.session, **values)

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript; the test fails if it throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """Move the mouse to a place of what is seen."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key that is no letter, as ArrowRight; the browser does what it does by itself."""
        code, text = _KEYS.get(key, (0, ""))
        what = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        if key == "Space":
            what["key"] = " "
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **what)
        self.call("Input.dispatchKeyEvent", type="keyUp", **what)

    def complaints(self) -> list[str]:
        """Return what the console holds: errors, warnings, exceptions, and what was refused."""
        self.evaluate("0")  # all that was said before is here then
        mine = [each for each in self._browser.events if each.get("sessionId") == self.session]
        return [
            json.dumps(each["params"])
            for each in mine
            if each["method"] in {"Runtime.exceptionThrown", "Log.entryAdded"}
            or each["method"] == "Runtime.consoleAPICalled"
        ]

    def requests(self) -> list[str]:
        """Return the addresses of all that was asked for."""
        return [
            each["params"]["request"]["url"]
            for each in self._browser.events
            if each.get("sessionId") == self.session
            and each["method"] == "Network.requestWillBeSent"
        ]

    def screenshot(self, path: Path) -> None:
        """Store a picture of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def running_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with a profile of its own; whatever happens, it has ended afterwards."""
    command = find_browser()
    to_read, to_write = map(_high, os.pipe())
    back_read, back_write = map(_high, os.pipe())
    silent = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (1, 2)]
    wired = [(os.POSIX_SPAWN_DUP2, to_read, 3), (os.POSIX_SPAWN_DUP2, back_write, 4)]
    arguments = [command, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = os.posix_spawn(
        command, arguments, os.environ, file_actions=[*silent, *wired], setpgroup=0
    )
    for fd in (to_read, back_write):
        os.close(fd)
    try:
        yield Browser(to_write, back_read)
    finally:
        for fd in (to_write, back_read):
            os.close(fd)
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _high(fd: int) -> int:
    """Move a descriptor above those that the browser expects its pipes on."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


READY = "document.body.classList.contains('ready')"
WORDS = ".entry > .words [data-word]"


class SpellingRuntime(GatedRuntime):
    """Wants letters only, so that each token is a word."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: Exception | None = None  # what every step fails with

    def step(self, *given: Any, **more: Any) -> Any:
        if self.broken is not None:
            raise self.broken
        logits = super().step(*given, **more).copy()
        letters = byte_tokenizer().encode("abcdefghijklmnop", special=False)
        logits[..., np.delete(np.arange(logits.shape[-1]), letters)] = -1e3
        return logits


def visit(browser: Browser, served: Served, expected: str = READY, **options: object) -> Page:
    page = browser.open(f"{served.url}/", **options)
    until(page, expected)
    return page


def reload(page: Page, entries: int) -> None:
    """Reload the page, and wait until it shows so many texts."""
    page.evaluate("window.before = true")
    page.call("Page.reload")
    shown = f"{READY} && document.querySelectorAll('.entry').length === {entries}"
    until(page, f"!window.before && document.body && {shown}")


def until(page: Page, expression: str) -> None:
    limit = time.monotonic() + 120  # others may need the machine
    while not _holds(page, expression):
        assert time.monotonic() < limit, (expression, page.complaints())
        time.sleep(0.02)


def _holds(page: Page, expression: str) -> bool:
    try:
        return bool(page.evaluate(expression))
    except AssertionError as error:
        if "navigated" in str(error):  # asked while one page gave way to the next: not yet
            return False
        raise


def click(page: Page, selector: str, number: int = 0) -> None:
    page.evaluate(f"document.querySelectorAll({json.dumps(selector)})[{number}].click()")


def texts(page: Page, selector: str) -> list[str]:
    found = f"[...document.querySelectorAll({json.dumps(selector)})]"
    return list(page.evaluate(f"{found}.map((each) => each.textContent)"))


def fill(page: Page, name: str, value: str) -> None:
    page.evaluate(
        f"(x => {{ x.value = {json.dumps(value)}; x.dispatchEvent(new Event('input', "
        f"{{bubbles: true}})) }})(document.querySelector('[name={name}]'))"
    )


def ask(page: Page, text: str, *, mode: str = "complete", tokens: int = 12) -> None:
    """Type a text and send it as a person does, with the Enter key."""
    click(page, f"[name=mode][value={mode}]")
    fill(page, "max_tokens", str(tokens))
    page.evaluate("document.getElementById('prompt').focus()")
    page.call("Input.insertText", text=text)
    page.press("Enter")


def written(page: Page, entries: int = 1) -> None:
    """Wait until so many texts have come to their end."""
    until(
        page,
        f"document.querySelectorAll('.entry').length === {entries} && "
        "!document.querySelector('[aria-busy]')",
    )


@contextmanager
def replying(browser: Browser, folder: Path, reply: str, template: ChatTemplate) -> Iterator[Page]:
    """The page, where a model has written a reply; prompts of the template have two tokens."""
    script = byte_tokenizer().encode(reply, special=False)
    runtime = ScriptedRuntime(script, prompt_length=2)
    with serving_small(folder, runtime, template=template) as served:
        page = visit(browser, served)
        fill(page, "temperature", "0")
        ask(page, "?", mode="chat", tokens=len(script))
        written(page)
        yield page
        assert page.complaints() == []

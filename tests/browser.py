"""A real browser for tests: Debian's Chromium through ChromeDriver, spoken to in plain WebDriver over HTTP.

Neither is a dependency of the project: `require_browser()` skips a test where they are not installed, or fails it
(tests/tools.py).
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from tenacity import retry, retry_if_exception_type, stop_after_attempt

from tests.tools import require

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The name that WebDriver gives to references to elements."""

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--hide-scrollbars",
    "--lang=en-GB",
)

KEYS = {"tab": "\ue004", "enter": "\ue007", "escape": "\ue00c", "right": "\ue014", "down": "\ue015", "end": "\ue010"}


def require_browser() -> None:
    require("chromium", "chromedriver")


class Browser:
    """One window. Everything raises AssertionError with what the browser said."""

    def __init__(self, base: str, session: str, client: httpx.Client) -> None:
        self._base = f"{base}/session/{session}"
        self._client = client

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._client.request(method, self._base + path, json=body)
        value = answer.json()["value"]
        assert answer.status_code == 200, f"{method} {path}: {value}"
        return value

    def cdp(self, command: str, **parameters: Any) -> Any:
        """A command of Chromium's own."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """The body of a function, here and now; what it returns, promises included."""
        wrapped = f"return (async function() {{ {script} }}).apply(null, arguments)"
        return self._ask("POST", "/execute/sync", {"script": wrapped, "args": list(arguments)})

    def text(self, selector: str) -> str:
        text: str = self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector)
        return text

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self._element(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._ask("POST", f"/element/{self._element(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys of the keyboard, to whatever has the focus."""
        strokes = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._ask("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": strokes}]})

    def _element(self, selector: str) -> str:
        found = self._ask("POST", "/element", {"using": "css selector", "value": selector})
        reference: str = found[ELEMENT]
        return reference

    def wait(self, condition: Callable[[], Any], what: str, timeout_s: float = 15.0) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (result := condition()):
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}; {self.text('#state')!r}"
            time.sleep(0.03)
        return result

    def size(self, width: int, height: int, *, ratio: float = 1.0, mobile: bool = False) -> None:
        """The page lays itself out anew a frame after the command: it has when this returns."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=ratio, mobile=mobile
        )
        self.wait(lambda: self.run("return innerWidth") == width, f"a width of {width}")

    def width(self) -> int:
        """Of all there is to see, in CSS pixels. What the page draws for a new size comes a frame after it: wait."""
        width: int = self.run("return document.documentElement.scrollWidth")
        return width

    def prefer(self, **features: str) -> None:
        """Media features: `prefer(prefers_color_scheme="dark")`."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.cdp("Emulation.setEmulatedMedia", features=given)

    def screenshot(self, path: Path, height: int | None = None) -> None:
        """The page from its top, as far as `height` or whole."""
        whole = self.run("return [document.documentElement.clientWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": whole[0], "height": min(whole[1], height or whole[1]), "scale": 1}
        shot = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """What the console has said since the last call."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Chromium, and its driver, for as long as the context lasts."""
    require_browser()
    with (
        tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profiles,
        httpx.Client(timeout=60, trust_env=False) as client,
    ):
        driver, port = _drive()
        base = f"http://127.0.0.1:{port}"
        try:
            session = _open_window(client, base, Path(profiles))
            yield Browser(base, session, client)
            client.delete(f"{base}/session/{session}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            assert driver.stdout is not None
            driver.stdout.close()


class NoWindow(Exception):
    """Chromium has not started; chromedriver says why."""


@retry(retry=retry_if_exception_type(NoWindow), stop=stop_after_attempt(3), reraise=True)
def _open_window(client: httpx.Client, base: str, profiles: Path) -> str:
    """The session's id."""
    profile = tempfile.mkdtemp(dir=profiles)
    options = {"args": [*FLAGS, f"--user-data-dir={profile}"], "binary": shutil.which("chromium")}
    wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    answer = client.post(f"{base}/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
    if "sessionId" not in answer:
        raise NoWindow(answer)
    session: str = answer["sessionId"]
    return session


class PortTaken(Exception):
    """chromedriver takes a port that is free in IPv6, and ends where a connection of IPv4 has it."""


@retry(retry=retry_if_exception_type(PortTaken), stop=stop_after_attempt(20), reraise=True)
def _drive() -> tuple[subprocess.Popen[bytes], int]:
    """A chromedriver in a process group of its own, and where it listens."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0", "--log-level=SEVERE"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert driver.stdout is not None
    said = b""
    for line in driver.stdout:
        said += line
        if found := re.search(rb"started successfully on port (\d+)", line):
            return driver, int(found[1])
    driver.wait()
    driver.stdout.close()
    if b"IPv4 port not available" in said:
        raise PortTaken(said.decode())
    raise AssertionError(f"chromedriver has ended: {said.decode()}")

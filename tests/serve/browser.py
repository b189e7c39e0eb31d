"""A headless Chromium, driven through chromedriver's HTTP protocol (W3C WebDriver)."""

from __future__ import annotations

import base64
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of a reference


class Browser:
    """One window."""

    def __init__(self, client: httpx.Client, session: str) -> None:
        self._client = client
        self._session = session

    def open(self, url: str) -> None:
        self._do("POST", "url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script in the page returns."""
        return self._do("POST", "execute/sync", {"script": script, "args": []})

    def wait_for(self, script: str) -> None:
        """Until the expression is true in the page, at most as long as the session's script timeout."""
        wait = f"const done = arguments[0]; const look = () => ({script}) ? done(true) : setTimeout(look, 10); look();"
        self._do("POST", "execute/async", {"script": wait, "args": []})

    def click(self, selector: str) -> None:
        self._do("POST", f"element/{self._find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        self._do("POST", f"element/{self._find(selector)}/value", {"text": text})

    def press(self, key: str) -> str:
        """A key, and which element has the focus afterwards: its id, or else its tag."""
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self._do("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": keys}]})
        return self.run("return document.activeElement.id || document.activeElement.tagName")

    def text(self, selector: str) -> str:
        """As a person sees it."""
        return self._do("GET", f"element/{self._find(selector)}/text")

    def errors(self) -> list[str]:
        """What the console has to say that is bad: errors of scripts, and what the content security policy refused."""
        return [entry["message"] for entry in self._do("POST", "se/log", {"type": "browser"}) if entry["level"] == "SEVERE"]

    def resize(self, width: int, height: int) -> None:
        """The page's own size, which may be narrower than a window can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._do("POST", "goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def dark(self) -> None:
        """As on a machine that is set to dark colours."""
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        self._do("POST", "goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._do("GET", "screenshot")))

    def _find(self, selector: str) -> str:
        return self._do("POST", "element", {"using": "css selector", "value": selector})[ELEMENT]

    def _do(self, method: str, command: str, body: dict[str, Any] | None = None) -> Any:
        response = self._client.request(method, f"/session/{self._session}/{command}", json=body)
        assert response.status_code == 200, response.text
        return response.json()["value"]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Chromium with a fresh profile in this folder."""
    assert DRIVER
    process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        port = next(line.split()[-1].strip(".") for line in process.stdout if "started successfully on port" in line)
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", f"--user-data-dir={folder}"]
        wanted = {"browserName": "chrome", "goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            made = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in made, made
            try:
                yield Browser(client, made["sessionId"])
            finally:
                client.delete(f"/session/{made['sessionId']}")
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()

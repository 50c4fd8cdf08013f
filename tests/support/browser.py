"""A real Chromium without a network, driven by Selenium."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
"""Debian's packages `chromium` and `chromium-driver`; None where they are missing."""


class Browser:
    """One tab."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.command("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        self.command("Network.emulateNetworkConditions", offline)

    def command(self, name: str, arguments: dict[str, Any]) -> Any:
        """A command of the DevTools protocol."""
        return self._driver.execute_cdp_cmd(name, arguments)

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size."""
        self.size(width, height)
        self.scheme(dark)
        self._driver.get(path.as_uri())

    def size(self, width: int, height: int = 900, scale: float = 1) -> None:
        """Of the window, in CSS pixels; `scale` device pixels make one."""
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.command("Emulation.setDeviceMetricsOverride", size)
        self.settle()

    def scheme(self, dark: bool) -> None:
        """What the page is told that the reader prefers."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", {"features": [feature]})
        self.settle()

    def settle(self) -> None:
        """Wait until the page has drawn what the last change asks for."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))"
        self._driver.execute_async_script(frames.replace("arguments[0]", "arguments[arguments.length - 1]"))

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        return self._driver.execute_script(f"return {expression}")

    def run(self, statements: str) -> None:
        """JavaScript."""
        self._driver.execute_script(statements)
        self.settle()

    def console(self) -> list[str]:
        """What the page has complained about since the last call."""
        return [entry["message"] for entry in self._driver.get_log("browser")]

    def requests(self) -> list[str]:
        """What the page has asked for since the last call, as URLs without their data."""
        messages = [json.loads(entry["message"])["message"] for entry in self._driver.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"][:200] for params in sent]

    def picture(self, path: Path, *, scale: float = 1, height: int | None = None) -> None:
        """A PNG of the whole page, or of so much of its top."""
        width = self.value("document.documentElement.clientWidth")
        full = self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height or full, "scale": scale}
        shot = self.command("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it is printed."""
        printed = self.command("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
        path.write_bytes(base64.b64decode(printed["data"]))


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Chromium for the length of the block."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (
        "--headless=new",
        "--no-sandbox",  # containers have no user namespaces to build it from
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=ChromeService(executable_path=str(DRIVER)))
    try:
        driver.set_page_load_timeout(30)
        driver.set_script_timeout(10)
        yield Browser(driver)
    finally:
        driver.quit()

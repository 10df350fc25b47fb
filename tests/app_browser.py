"""The app as its own process, and a real browser that looks at it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
PATIENCE = 60.0  # s


def missing() -> str | None:
    """What the tests lack here; None where all is there."""
    if CHROMIUM is None or DRIVER is None:
        return "no Chromium with its chromedriver is installed"
    lacking = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(lacking)}" if lacking else None


@contextlib.contextmanager
def open_app(root: Path, *args: str) -> Iterator[str]:
    """`python -m rlhf.app` in a folder, on a free port. Gives its address."""
    command = [sys.executable, "-m", "rlhf.app", "--port", "0", *args]
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        address = process.stderr.readline().strip()
        assert address.startswith("http://"), address + process.stderr.read()
        # what it prints later must not fill the pipe
        reader = threading.Thread(target=process.stderr.read, daemon=True)
        reader.start()
        yield address
        assert process.poll() is None, "it has ended"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


class Browser:
    """A browser with one page. Every wait ends after PATIENCE, with what the page shows."""

    def __init__(self, driver: Any):
        self.driver = driver

    def get(self, address: str) -> None:
        self.driver.get(address)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def count(self, selector: str) -> int:
        return len(self.driver.find_elements("css selector", selector))

    def text(self, selector: str = "body") -> str:
        """The text of the first such element; "" where there is none, or it is just replaced."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return str(self.driver.execute_script(script, selector))

    def wait_for(self, selector: str, patience: float = PATIENCE) -> None:
        deadline = time.time() + patience
        while not self.count(selector):
            assert time.time() < deadline, f"no {selector}: {self.text()}"
            time.sleep(0.1)

    def wait_for_text(self, text: str, selector: str = "body") -> None:
        deadline = time.time() + PATIENCE
        while text not in self.text(selector):
            assert time.time() < deadline, f"{text!r} is not in {self.text(selector)!r}"
            time.sleep(0.05)

    def points(self) -> int:
        """The number of points of the first line of the first plot."""
        script = (
            "const plot = document.querySelector('#runs-plots .js-plotly-plot');"
            "return plot?.data?.length ? plot.data[0].x.length : 0"
        )
        return int(self.driver.execute_script(script))

    def wait_for_points(self, least: int) -> int:
        deadline = time.time() + PATIENCE
        while (points := self.points()) < least:
            assert time.time() < deadline, f"{points} points: {self.text()}"
            time.sleep(0.1)
        return points

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def type_into(self, selector: str, text: str) -> None:
        field = self.find(selector)
        field.clear()
        field.send_keys(text)

    def open_tab(self, name: str) -> None:
        self.wait_for("button[role=tab]")
        tabs = self.driver.find_elements("css selector", "button[role=tab]")
        next(tab for tab in tabs if tab.text == name).click()

    def click_cell(self, start: str, number: int = 0) -> None:
        """Click a cell of the table of runs, and wait until the row is chosen or no longer is."""
        script = "return document.querySelector('#runs-chosen').innerText"
        before = self.driver.execute_script(script)
        cells = self.driver.find_elements("css selector", "#runs-table [role=gridcell]")
        [cell for cell in cells if cell.text.startswith(start)][number].click()
        deadline = time.time() + PATIENCE
        while self.driver.execute_script(script) == before:
            assert time.time() < deadline, "the click chose nothing"
            time.sleep(0.1)

    def foreign_requests(self) -> list[str]:
        """Addresses on other machines that the browser has asked for."""
        found = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                url = message["params"].get("request", message["params"])["url"]
                found.add(url)
        own = ("http://127.0.0.1:", "data:", "blob:", "about:")
        return sorted(url for url in found if not url.startswith(own))

    def errors(self) -> list[str]:
        """What the browser calls an error."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def picture(self, file: Path, height: int) -> None:
        """Write a PNG of the page, as wide as the window."""
        width = self.driver.execute_script("return window.innerWidth")
        self.resize(width, height)
        time.sleep(1)
        self.driver.save_screenshot(str(file))

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page in pixels; below 500 it is a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


@contextlib.contextmanager
def chromium(width: int = 1400, height: int = 1000) -> Iterator[Browser]:
    """A browser with a page of this size in pixels."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        browser = Browser(driver)
        browser.resize(width, height)
        yield browser
    finally:
        driver.quit()

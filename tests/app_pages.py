"""What the tests of chat and arena share: the page in its own process, and a headless Chromium."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app_browser import chromium
from helpers import REPO, SMALL, train

BOX = ":is(textarea, input)"
WEB = ("http", "https", "ws", "wss")


@contextlib.contextmanager
def serving(folder: Path, root: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The page. Gives: its process and its address.

    Args: folder: the current one.  root: folder in it with the runs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(REPO),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.app", "--port", str(port), root],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(lambda: is_open(port), 60)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def browsing(url: str, width: int = 1400) -> Iterator[Any]:
    """A headless Chromium that shows the Chat tab. Gives its driver."""
    with chromium(width, 1400) as browser:
        browser.driver.set_script_timeout(30)
        browser.get(url)
        open_tab(browser.driver, "Chat")
        yield browser.driver


def wait_for(look: Callable[[], Any], seconds: float = 60) -> Any:
    """What `look` returns, once it is true. What changes while it is looked at is no error."""
    deadline = time.monotonic() + seconds
    error: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if found := look():
                return found
        except AssertionError:
            raise
        except Exception as problem:
            error = problem
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s") from error


def by_id(driver: Any, name: str, inside: str = "") -> Any:
    """The element with an id, or the first one of a CSS selector in it."""
    return driver.find_element("css selector", f"#{name} {inside}".strip())


def text_of(driver: Any, name: str) -> str:
    text: str = by_id(driver, name).text
    return text


def value_of(driver: Any, name: str) -> str:
    """The text of a text box."""
    return str(by_id(driver, name, BOX).get_property("value"))


def write(driver: Any, name: str, text: str) -> None:
    """Type into a text box, in place of what it holds."""
    from selenium.webdriver.common.keys import Keys

    box = by_id(driver, name, BOX)
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE)
    box.send_keys(text)


def open_tab(driver: Any, name: str) -> None:
    wait_for(lambda: driver.find_element("xpath", f"//button[@role='tab'][.='{name}']")).click()


def make_runs(folder: Path) -> None:
    """A small pipeline: an SFT policy, a reward model and a PPO policy."""
    folder.mkdir()
    done = train(*[one for one in SMALL if "eval_rows" not in one], "data.eval_rows=24", cwd=folder)
    assert done.returncode == 0, done.stderr


def choose(driver: Any, name: str, option: str) -> None:
    """Choose the first option of a dropdown that begins with a text."""
    wait_for(lambda: by_id(driver, name, "input")).click()  # also where it has just been unfolded
    path = f"//div[@id='{name}']//li[@role='option'][starts-with(@aria-label, '{option}')]"
    wait_for(lambda: driver.find_element("xpath", path)).click()


def resources(driver: Any) -> set[str]:
    """Where a page has loaded anything from: scheme, host and port."""
    names = driver.execute_script("return performance.getEntries().map(entry => entry.name)")
    return {"/".join(name.split("/")[:3]) for name in names if name.split(":")[0] in WEB}

"""The tab of chat in a real browser: streamed responses, rewards, colours, hostile text."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
from app_browser import missing
from app_pages import (
    BOX,
    browsing,
    by_id,
    choose,
    make_runs,
    resources,
    serving,
    text_of,
    value_of,
    wait_for,
    write,
)

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing() or "")]

HOSTILE = (
    "<script>document.title='bad'</script><img src=x onerror=document.title='bad'> & &lt; "
    "**bold** [a](http://bad.example) ${1+1} {{2*3}} $x$"
)
TOTAL = re.compile(r"KL ([+-]\d+\.\d+) nats over (\d+) tokens?")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """Number of its process, and its address."""
    folder = tmp_path_factory.mktemp("chat")
    make_runs(folder / "runs")
    with serving(folder, "runs") as (process, url):
        yield process.pid, url


@pytest.fixture
def browser(page: tuple[int, str]) -> Iterator[Any]:
    with browsing(page[1]) as driver:
        wait_until_ready(driver)
        yield driver


def wait_until_ready(driver: Any) -> None:
    """Until the newest policy is chosen."""
    wait_for(lambda: "ppo-tiny" in text_of(driver, "chat-policies"))


def messages(driver: Any, number: int = 1) -> list[str]:
    selector = f"#chat-policy-{number} .message-content"
    return [one.text for one in driver.find_elements("css selector", selector)]


def send(driver: Any, text: str, answers: int = 1, number: int = 1) -> None:
    """Send a message; wait until a policy has `answers` measured responses."""
    write(driver, "chat-message", text)
    by_id(driver, "chat-send").click()
    wait_for(lambda: done(driver, number) == answers)


def done(driver: Any, number: int = 1) -> int:
    """Responses that were measured; 0 while one is being written."""
    if "Colours" not in text_of(driver, "chat-note"):
        return 0
    return len(driver.find_elements("css selector", f"#chat-details-{number} .answer"))


def press(driver: Any, label: str, number: int = 1, which: int = -1) -> None:
    """Click a button of a conversation."""
    selector = f"#chat-policy-{number} button[aria-label='{label}']"
    driver.find_elements("css selector", selector)[which].click()


def test_a_turn_has_a_reward_and_coloured_tokens(browser: Any, page: tuple[int, str]) -> None:
    browser.find_element("xpath", "//button[contains(., 'Rewards, reference')]").click()
    choose(browser, "chat-rewards", "rm-tiny")
    send(browser, "How do I look after my rose?")
    asked, answer = messages(browser)
    assert asked == "How do I look after my rose?" and answer
    details = text_of(browser, "chat-details-1")
    assert re.search(r"reward [+-]\d+\.\d\d \(rm-tiny", details)
    total = TOTAL.search(details)
    assert total, details
    tokens = browser.find_elements("css selector", "#chat-details-1 .tokens span")
    numbers = [float(one.get_attribute("title").split()[0]) for one in tokens]
    assert len(numbers) == int(total[2])
    assert sum(numbers) == pytest.approx(float(total[1]), abs=0.02)
    strong = max(range(len(numbers)), key=lambda i: abs(numbers[i]))
    red, green = "220, 38, 38", "22, 163, 74"
    background = tokens[strong].value_of_css_property("background-color")
    assert (red if numbers[strong] > 0 else green) in background
    assert resources(browser) == {page[1]}


def test_hostile_text_is_shown_as_text(browser: Any) -> None:
    send(browser, HOSTILE)
    assert messages(browser)[0] == HOSTILE
    assert not browser.find_elements("css selector", "#chat-policy-1 .message-content :is(a, b)")
    write_policy(browser, HOSTILE)
    by_id(browser, "chat-clear").click()
    wait_for(lambda: not messages(browser))
    write(browser, "chat-message", "Hi")
    by_id(browser, "chat-send").click()
    wait_for(lambda: HOSTILE in text_of(browser, "chat-note"))  # no such model
    assert browser.title == "rlhf"
    assert not browser.find_elements("css selector", "img[src='x'], a[href*='bad.example']")


def write_policy(driver: Any, text: str) -> None:
    """Choose another policy by typing."""
    from selenium.webdriver.common.keys import Keys

    by_id(driver, "chat-policies", BOX).send_keys(text, Keys.ENTER)
    wait_for(lambda: text in text_of(driver, "chat-policies"))


def undone(driver: Any) -> bool:
    """Whether the only exchange is undone; a click that comes before the end of an update is not
    heard."""
    if messages(driver):
        press(driver, "Undo")
        time.sleep(0.5)
    return not messages(driver)


def edit_box(driver: Any) -> Any:
    """The box in which the first message is edited; None where the click came too early."""
    press(driver, "Edit", which=0)
    time.sleep(0.5)  # the rest of an update would close it
    return next(iter(driver.find_elements("css selector", "#chat-policy-1 textarea")), None)


def test_retry_edit_and_undo(browser: Any) -> None:
    send(browser, "One? and <b>?")
    send(browser, "Two?", answers=2)
    before = messages(browser)
    press(browser, "Retry")
    wait_for(lambda: done(browser) == 2 and messages(browser)[3] != before[3])
    assert messages(browser)[:3] == before[:3]
    box = wait_for(lambda: edit_box(browser))
    box.send_keys(" Three <i>?")
    press(browser, "Submit")
    wait_for(lambda: done(browser) == 1)
    assert messages(browser)[0] == "One? and <b>? Three <i>?" and len(messages(browser)) == 2
    wait_for(lambda: undone(browser))
    assert value_of(browser, "chat-message") == "One? and <b>? Three <i>?"


def test_a_long_response_can_be_stopped(browser: Any) -> None:
    browser.find_element("xpath", "//button[contains(., 'Rewards, reference')]").click()
    wait_for(lambda: by_id(browser, "chat-seed").is_displayed())
    browser.find_element("css selector", "input[aria-label='max_new_tokens']").send_keys("0")
    stopped = False
    for _ in range(6):  # one may end by itself before the click
        by_id(browser, "chat-clear").click()  # or it would have little room in the context
        wait_for(lambda: not messages(browser))
        write(browser, "chat-message", "Tell me all.")
        by_id(browser, "chat-send").click()
        wait_for(lambda: len(messages(browser)) == 2 and messages(browser)[-1])
        by_id(browser, "chat-stop").click()
        wait_for(lambda: done(browser) == 1)
        stopped = "stopped" in text_of(browser, "chat-details-1")
        if stopped:
            break
    assert stopped


def test_policies_side_by_side_and_two_browsers_share_the_models(
    browser: Any, page: tuple[int, str]
) -> None:
    choose(browser, "chat-policies", "sft-tiny")
    with browsing(page[1]) as other:
        wait_until_ready(other)
        for driver in (browser, other):
            write(driver, "chat-message", f"Hello from {'one' if driver is browser else 'two'}")
        for driver in (browser, other):
            by_id(driver, "chat-send").click()
        wait_for(lambda: done(browser, 2) == 1 and done(other) == 1)
        assert messages(browser, 1)[0] == messages(browser, 2)[0] == "Hello from one"
        assert messages(other)[0] == "Hello from two" and len(messages(other)) == 2
        assert not other.find_elements("css selector", "#chat-policy-2")
    children = subprocess.run(
        ["ps", "--ppid", str(page[0]), "-o", "args="], capture_output=True, text=True
    ).stdout.splitlines()
    assert len([line for line in children if "rlhf.app.model_process" in line]) == 1

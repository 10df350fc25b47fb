"""The tab of arena in a real browser: votes by keys and mouse, training on them, a server that is
killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from app_browser import missing
from app_pages import (
    browsing,
    by_id,
    make_runs,
    open_tab,
    resources,
    serving,
    text_of,
    value_of,
    wait_for,
    write,
)

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(missing()), reason=missing() or "")]

BUTTONS = {"1": "arena-a", "2": "arena-b", "3": "arena-tie", "4": "arena-bad"}
ROOT = "my runs"  # a folder whose name must be quoted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arena")
    make_runs(folder / ROOT)
    return folder


def votes_in(folder: Path) -> list[dict[str, Any]]:
    files = [folder / ROOT / name for name in ("votes.jsonl", "votes-undecided.jsonl")]
    return [
        json.loads(line)
        for file in files
        if file.exists()
        for line in file.read_text().splitlines()
    ]


def press(driver: Any, key: str) -> None:
    """Press a key while nothing has the focus."""
    driver.execute_script("document.activeElement.blur()")
    driver.find_element("css selector", "body").send_keys(key)


def is_open(driver: Any) -> bool:
    return bool(by_id(driver, "arena-a").is_enabled())


def next_prompt(driver: Any, by_key: bool = False) -> None:
    if by_key:
        press(driver, "n")
    else:
        by_id(driver, "arena-next").click()
    wait_for(lambda: is_open(driver))


def vote(driver: Any, key: str, by_key: bool) -> None:
    if by_key:
        press(driver, key)
    else:
        by_id(driver, BUTTONS[key]).click()
    wait_for(lambda: "written to" in text_of(driver, "arena-note") and not is_open(driver))


def open_arena(driver: Any, annotator: str) -> None:
    open_tab(driver, "Arena")
    wait_for(lambda: value_of(driver, "arena-policy-2").startswith("sft-tiny"))
    write(driver, "arena-name", annotator)


def test_twenty_votes_train_a_reward_model(folder: Path, tmp_path: Path) -> None:
    keys = "12123121421212121212"
    with serving(folder, ROOT) as (_, url), browsing(url) as driver:
        open_arena(driver, "Ann <b>")
        for i, key in enumerate(keys):
            next_prompt(driver, by_key=i % 2 == 1)
            if i == 0:
                not_while_typing(driver, folder)
            assert "tiny" not in text_of(driver, "arena-note"), "the names are hidden"
            vote(driver, key, by_key=i % 2 == 0)
            note = text_of(driver, "arena-note")
            assert re.search(r"A was (ppo|sft)-tiny\S*, B was (ppo|sft)-tiny", note)
        wait_for(lambda: "95 % interval" in text_of(driver, "arena-standing"))
        standing = text_of(driver, "arena-standing")
        driver.find_element("xpath", "//button[contains(., 'Train on these')]").click()
        wait_for(lambda: by_id(driver, "arena-train").is_displayed())
        by_id(driver, "arena-train").click()
        command = wait_for(lambda: value_of(driver, "arena-command"))
        assert resources(driver) == {url}
    rows = votes_in(folder)
    assert len(rows) == 20 and {row["annotator"] for row in rows} == {"Ann <b>"}
    choices = [{"1": "A", "2": "B", "3": "tie", "4": "both bad"}[key] for key in keys]
    assert sorted(row["vote"] for row in rows) == sorted(choices)
    assert {tuple(row["policies"]) for row in rows} > {tuple(rows[0]["policies"])}, "random order"
    wins = sum(
        row["policies"]["AB".index(row["vote"])].startswith("ppo")
        for row in rows
        if row["vote"] in "AB"
    )
    assert f"{wins} wins" in standing and "1 tie, 1 both bad" in standing
    trains(command, folder)


def not_while_typing(driver: Any, folder: Path) -> None:
    """Keys are text in a text box, not votes; and with Ctrl they are the browser's."""
    write(driver, "arena-typed", "1234n")
    press(driver, "5")
    assert value_of(driver, "arena-typed") == "1234n"
    assert is_open(driver) and not votes_in(folder)


def trains(command: str, folder: Path) -> None:
    """A command as it is pasted, with fewer steps, trains a reward model."""
    assert f"{ROOT}/votes.jsonl" in command and command.startswith("python ")
    few = "rm.max_steps=2 wandb.mode=disabled deploy.threads=1"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        f"{command} {few}",
        shell=True,
        cwd=folder,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (path.parent for path in folder.glob("outputs/rm-*/summary.json"))
    assert (run / "model" / "model.safetensors").exists()
    report = json.loads((run / "data.json").read_text())[0]
    assert report["rows"] >= 12 and not report["skipped"]


def test_two_browsers_and_a_server_that_is_killed_lose_no_vote(
    folder: Path, tmp_path: Path
) -> None:
    def votes_of(*names: str) -> int:
        return sum(row["annotator"] in names for row in votes_in(folder))

    with (
        serving(folder, ROOT) as (process, url),
        browsing(url) as one,
        browsing(url) as two,
    ):
        for driver, name in ((one, "one"), (two, "two")):
            open_arena(driver, name)
        for _ in range(3):
            both_next(one, two)
            for driver in (one, two):
                press(driver, "1")
            for driver in (one, two):
                wait_for(lambda driver=driver: "written to" in text_of(driver, "arena-note"))
        assert votes_of("one") == votes_of("two") == 3
        both_next(one, two)
        for driver in (one, two):
            press(driver, "2")
        process.send_signal(signal.SIGKILL)  # in the middle of these votes
        process.wait()
    assert 6 <= votes_of("one", "two") <= 8
    with serving(folder, ROOT) as (_, url), browsing(url) as driver:
        open_arena(driver, "three")
        next_prompt(driver)
        vote(driver, "2", by_key=True)
    assert votes_of("three") == 1 and votes_of("one", "two") >= 6


def both_next(one: Any, two: Any) -> None:
    """The next prompt in two browsers at once."""
    for driver in (one, two):
        by_id(driver, "arena-next").click()
    for driver in (one, two):
        wait_for(lambda driver=driver: is_open(driver))


def test_a_script_as_a_typed_prompt_is_text(folder: Path, tmp_path: Path) -> None:
    text = "<script>document.title='bad'</script><img src=x onerror=document.title='bad'> ${1}"
    with serving(folder, ROOT) as (_, url), browsing(url, width=390) as driver:
        open_arena(driver, text)
        driver.find_element("css selector", "#arena-source input[value='typed']").click()
        write(driver, "arena-typed", text)
        next_prompt(driver)
        assert value_of(driver, "arena-prompt") == text
        vote(driver, "3", by_key=True)
        assert driver.title == "rlhf"
        assert not driver.find_elements("css selector", "img[src='x']")
    (row,) = (row for row in votes_in(folder) if row["annotator"] == text[:80])
    assert row["prompt"] == [{"role": "user", "content": text}] and row["vote"] == "tie"

"""The Runs and Data tabs in a real browser: a live curve, hostile texts, a deleted run, two
browsers, 500 runs; and that nothing leaves this machine."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_browser import Browser, chromium, missing, open_app
from helpers import SMALL, running
from written_runs import HOSTILE, write_run, write_sweep

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with chromium() as one:
        yield one


def test_a_live_curve_grows_while_a_tiny_stage_trains(tmp_path: Path, browser: Browser) -> None:
    steps = ["sft.max_steps=4000", "sft.epochs=9999", "sft.batch_size=8"]
    small = [one for one in SMALL if "sft.max_steps" not in one]
    with open_app(tmp_path) as address:
        browser.get(address)
        browser.wait_for_text("No runs yet")
        parent, run = running("stage=sft", *small, *steps, cwd=tmp_path)
        try:
            browser.wait_for_text("running", "#runs-table")
            first = browser.wait_for_points(1)
            browser.wait_for_points(first + 5)
            assert "min" in (text := browser.text("#runs-table")) or " s" in text, "time left"
            assert "/4,000" in browser.text("#runs-table")
            assert "which also resumes it" in browser.text("#runs-details")
        finally:
            parent.terminate()
            parent.communicate(timeout=60)
        browser.wait_for_text("stopped", "#runs-table")
        browser.click_cell("sft-")
        browser.wait_for_text("Resume it", "#runs-details")
    assert browser.foreign_requests() == [] and (run / "progress.json").exists()


def test_hostile_texts_are_text(tmp_path: Path, browser: Browser) -> None:
    run = write_run(tmp_path)
    file = run / "summary.json"
    summary = json.loads(file.read_text())
    other = write_run(tmp_path, "seed=2") / "summary.json"
    link = '<a href="https://example.org">${document.title="js"}{{value}}</a><img src=x onerror=1>'
    summary["settings"]["actor.path"] = summary["settings"]["actor.name"] = HOSTILE + link
    file.write_text(json.dumps(summary))
    with open_app(tmp_path) as address:
        browser.get(address)
        browser.wait_for_text("ppo-", "#runs-table")
        browser.click_cell("ppo-")
        browser.click_cell("ppo-", 1)
        browser.wait_for_points(2)
        for place in ("#runs-table", "#runs-legend"):
            browser.wait_for_text("<img src=x", place)
        script = "document.querySelectorAll('#runs-details details').forEach(d => d.open = true)"
        browser.driver.execute_script(script)
        browser.wait_for_text("<script>", "#runs-details")
        assert "<img src=x" in browser.text("#runs-details")
        assert browser.driver.title == "rlhf"
        linked = browser.driver.execute_script("return [...document.links].map(a => a.href)")
        assert not [one for one in linked if "127.0.0.1" not in one]
        assert browser.count("img[src=x]") == 0 and browser.foreign_requests() == []
    assert other.exists()


def test_a_deleted_run_and_two_browsers(tmp_path: Path, browser: Browser) -> None:
    folder = write_sweep(tmp_path)
    with open_app(tmp_path) as address, chromium(390, 800) as phone:
        for one in (browser, phone):
            one.get(address)
            one.wait_for_text("ppo-", "#runs-table")
        browser.click_cell("ppo-")
        browser.click_cell("ppo-", 1)
        phone.click_cell("ppo-", 1)
        browser.wait_for_points(12)
        phone.wait_for_points(12)
        assert browser.count("#runs-details details") == 2
        assert phone.count("#runs-details details") == 1, "each has its own choice"
        width = phone.driver.execute_script("return document.documentElement.scrollWidth")
        assert width <= 390, "the page does not scroll to the side"
        name = phone.text("#runs-details summary").split(":")[0]
        shutil.rmtree(tmp_path / "outputs" / name)
        phone.wait_for_text("no longer there", "#runs-note")
        time.sleep(5)  # looks at the runs that follow
        assert "no longer there" in phone.text("#runs-note")
        deadline = time.time() + 20
        while browser.count("#runs-details details") != 1:
            assert time.time() < deadline
            time.sleep(0.2)
        browser.click_cell("ppo-", 3)
        browser.wait_for_points(12)
        assert browser.errors() == [] and phone.errors() == []
    assert folder.exists()


def test_the_page_with_500_runs(tmp_path: Path, browser: Browser) -> None:
    run = write_run(tmp_path)
    for i in range(499):
        copy = run.with_name(f"ppo-tiny-{i:08x}")
        shutil.copytree(run, copy)
        summary = json.loads((copy / "summary.json").read_text())
        (copy / "summary.json").write_text(json.dumps(summary | {"id": copy.name}))
    started = time.time()
    with open_app(tmp_path) as address:
        ready = time.time() - started
        seconds = []
        for _ in range(3):
            start = time.time()
            browser.get(address)
            browser.wait_for_text("ppo-", "#runs-table")
            seconds.append(time.time() - start)
        print(f"ready after {ready:.1f} s; pages with 500 runs after", seconds)
        assert min(seconds) < 5, "on a machine that also runs other tests"


def test_the_page_of_data(tmp_path: Path, browser: Browser) -> None:
    rows = [
        {"prompt": f"p{i} {HOSTILE}", "chosen": f"yes {HOSTILE} {i}", "rejected": "no"}
        for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open_app(tmp_path) as address:
        browser.get(address)
        browser.open_tab("Data")
        browser.type_into("#data-source input", "jsonl\n")
        browser.type_into(
            "#data-settings :is(input, textarea)", "data.sources.mine.path=pairs.jsonl"
        )
        browser.click("#data-start")
        browser.wait_for("#data-page iframe", 120)
        browser.driver.switch_to.frame(browser.find("#data-page iframe"))
        browser.wait_for_text("in the loss")
        assert browser.count(".t.loss") > 5 and "<script>" in browser.text("body")
        assert "title='run'" in browser.text("body").replace("document.", "")
        browser.driver.switch_to.default_content()
        assert browser.driver.title == "rlhf" and browser.foreign_requests() == []

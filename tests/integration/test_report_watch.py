"""python -m rlhf.report --watch: the page follows the runs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from written_runs import write_run

# as the command, but for the time between two looks
WATCH = (
    "import sys; from rlhf import report; from rlhf.base.interrupts import run_interruptible;"
    "report.WATCH_SECONDS = 1; sys.exit(run_interruptible(report.main))"
)


def test_the_page_is_written_anew_when_a_run_has_changed(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path, f"seed={seed}", finished=False) for seed in (1, 2))
    page = tmp_path / "report.html"
    watching = subprocess.Popen(
        [sys.executable, "-c", WATCH, "--watch"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )

    def wait_until(done: Callable[[], bool]) -> None:
        deadline = time.time() + 60
        while not done():
            assert time.time() < deadline and watching.poll() is None
            time.sleep(0.05)

    def text() -> str:
        return page.read_text() if page.exists() else ""

    try:
        wait_until(lambda: '<meta http-equiv="refresh" content="1">' in text())
        written = page.stat().st_mtime_ns
        time.sleep(2.5)
        assert page.stat().st_mtime_ns == written, "nothing has changed"
        with open(first / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": 13, "objective/scores": 77.125}) + "\n")
        wait_until(lambda: "77.125" in text())
        shutil.rmtree(second)
        wait_until(lambda: second.name not in text())
        shutil.rmtree(tmp_path / "outputs")
        time.sleep(2.5)
        assert watching.poll() is None, "runs may come again"
        write_run(tmp_path, "seed=3")
        wait_until(lambda: "finished" in text())
    finally:
        watching.send_signal(signal.SIGINT)
        _, stderr = watching.communicate(timeout=60)
    assert watching.returncode == 0 and "no run there" in stderr and "Traceback" not in stderr
    assert "refresh" not in text().split("<script")[0], "what stays does not reload itself"


def test_without_runs_it_ends_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlhf.report", "--watch"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "no run there" in done.stderr

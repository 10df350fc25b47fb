"""Warnings about training that goes wrong reach the console and W&B."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, composed, read_offline_run
from written_runs import write_run

from rlhf.config.loading import save_config
from rlhf.reporting.tables import print_runs
from rlhf.rl.monitor import Monitor
from rlhf.runs.directory import WARNINGS, read_warnings, write_json

ALERT = """
import sys, os
from pathlib import Path
from rlhf.config.loading import load_config
from rlhf.training.tracker import Tracker
cfg = load_config(Path(sys.argv[1]) / "config.yaml")
tracker = Tracker(cfg, Path(sys.argv[1]), 1, [])
tracker.alert("KL blow-up", "raise rl.kl.coef")
tracker.log(1, {"x": 1.0})
tracker.close({})
"""


def test_a_warning_reaches_the_console_and_wandb(tmp_path: Path) -> None:
    run = tmp_path / "ppo-x"
    run.mkdir()
    cfg = composed("stage=ppo", "wandb.mode=offline")
    save_config(cfg, run / "config.yaml")
    done = subprocess.run(
        [sys.executable, "-c", ALERT, str(run)],
        cwd=REPO,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "KL blow-up: raise rl.kl.coef" in done.stderr, done.stderr
    records = [json.loads(line) for line in read_offline_run(run).splitlines()]
    assert any(
        "KL blow-up" in json.dumps(record) for record in records if record["type"] == "alert"
    )


def test_the_table_at_the_end_says_that_the_kl_blew_up_and_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run, monitor = write_run(tmp_path), Monitor(lambda title, text: None)
    for kl in (2.0, 88.0):
        row = {"kl": kl, "kl_per_token": kl / 20, "kl_coef": 0.05, "eos_rate": 1.0, "scores": 0.5}
        monitor.check({f"objective/{key}": value for key, value in row.items()})
    assert read_warnings(run) == [], "a run of an earlier version has none"
    write_json(run / WARNINGS, list(monitor.alerted.values()))
    print_runs([run], 1.0)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    line = "warning: KL blow-up at rollout 2: objective/kl is 88.0 nats per response, before 2.0: "
    assert line + "raise rl.kl.coef or lower rl.lr" in text

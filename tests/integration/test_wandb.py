"""A W&B server that is up, or down at the start, in the middle or at the end: training continues
and nothing is lost. Against a local stand-in server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import SMALL, lines, metrics, running, runs_in, summary, train
from wandb_server import Server

BIN = Path(sys.executable).parent
SFT = [
    "stage=sft",
    *(arg for arg in SMALL if not arg.startswith("wandb")),
    "sft.max_steps=12",
    "sft.epochs=100",
    "sft.batch_size=8",
]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as one:
        yield one


def steps_at(server: Server, run: Path) -> list[int]:
    """Steps of the run that arrived, in order, those of a table of samples left out."""
    return [row["step"] for row in server.history((run / "wandb_id").read_text()) if "loss" in row]


@pytest.mark.full
def test_a_run_that_is_killed_goes_on_in_the_same_wandb_run(server: Server, tmp_path: Path) -> None:
    more = [
        *SFT,
        "checkpoint.every_steps=2",
        "experiment_name=study",
        "wandb.tags=[mine]",
        "wandb.notes=try it",
    ]
    parent, run = running(*more, cwd=tmp_path, until=5, env=os.environ | server.environment)
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=60)
    done = train(*more, cwd=tmp_path, **server.environment)
    assert done.returncode == 0, done.stderr
    assert (
        sorted(set(steps_at(server, run))) == list(range(1, 13))
        and len(server.runs) == 1
        and not server.unknown
    )
    (about,) = server.runs.values()
    assert (about["groupName"], about["jobType"], about["displayName"], about["notes"]) == (
        "study",
        "sft",
        run.name,
        "try it",
    )
    assert {"mine", "tiny", "sandbox"} <= set(about["tags"])
    config = json.loads(about["config"])
    assert config["sft"]["value"]["batch_size"] == 8 and config["seed"]["value"] == 1
    loss = {
        row["step"]: row["loss"]
        for row in server.history((run / "wandb_id").read_text())
        if "loss" in row
    }
    assert loss == pytest.approx({row["step"]: row["loss"] for row in metrics(run)})


@pytest.mark.full
def test_dead_at_the_start_it_is_written_down_and_sent_later(tmp_path: Path) -> None:
    dead = Server().start()
    dead.stop()  # a port where nobody listens
    done = train(*SFT, cwd=tmp_path, **dead.environment)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)["sft"]
    assert len(metrics(run)) == 12
    with dead:
        (offline,) = (run / "wandb").glob("offline-run-*")
        environment = os.environ | dead.environment
        sent = subprocess.run(
            [BIN / "wandb", "sync", str(offline)],
            cwd=run,  # it leaves a folder there
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert sent.returncode == 0, sent.stderr
        assert steps_at(dead, run) == list(range(1, 13))


@pytest.mark.full
def test_dead_in_the_middle_it_catches_up(server: Server, tmp_path: Path) -> None:
    environment = os.environ | server.environment
    parent, run = running(*SFT, "sft.max_steps=40", cwd=tmp_path, until=3, env=environment)
    server.stop()
    while lines(run / "metrics.jsonl") < 40 and parent.poll() is None:
        time.sleep(0.05)
    assert lines(run / "metrics.jsonl") == 40, "training does not wait for it"
    server.start()
    said = parent.communicate(timeout=120)[1]
    assert parent.returncode == 0, said
    assert steps_at(server, run) == list(range(1, 41))


@pytest.mark.full
def test_dead_at_the_end_the_run_ends_all_the_same(server: Server, tmp_path: Path) -> None:
    """It waits for a minute at most; what was not sent lies in the run's directory."""
    parent, run = running(
        *SFT, "sft.max_steps=40", cwd=tmp_path, until=3, env=os.environ | server.environment
    )
    server.stop()
    said = parent.communicate(timeout=180)[1]
    assert parent.returncode == 0 and summary(run)["status"] == "finished", said
    assert len((run / "samples.jsonl").read_text().splitlines()) == 16
    (online,) = (run / "wandb").glob("run-*")
    with server:
        environment = os.environ | server.environment
        sent = subprocess.run(
            [BIN / "wandb", "sync", str(online)],
            cwd=run,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert sent.returncode == 0, sent.stderr
        assert sorted(set(steps_at(server, run))) == list(range(1, 41))


def test_the_dashboard_is_saved_with_the_metrics_that_runs_have(server: Server) -> None:
    command = [sys.executable, "-m", "rlhf.dashboard", "--entity", "me"]
    environment = os.environ | server.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "rlhf" in done.stdout, done.stderr
    (view,) = server.views
    for metric in (
        "objective/scores",
        "objective/kl",
        "loss/policy_avg",
        "tokens/response_mean",
        "completions",
    ):
        assert metric in json.dumps(view)
    server.stop()
    failed = subprocess.run(
        command,
        env=environment | {"WANDB_API_KEY": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        failed.returncode == 1
        and failed.stderr.startswith("error: ")
        and "wandb login" in failed.stderr
    )

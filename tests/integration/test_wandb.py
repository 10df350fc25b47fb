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
import wandb
from helpers import SMALL, composed, lines, metrics, running, runs_in, summary, train
from wandb_server import Server

from rlhf.config.choices import WandbMode
from rlhf.training.wandb_run import mode_asked_for, start_wandb, wandb_id

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


@pytest.mark.parametrize("given", ["", "offline", "disabled"])
def test_the_environment_can_keep_a_run_off_the_server(
    given: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where there is a key and the server answers."""
    ours = {"WANDB_PROJECT": "mine", "WANDB_NAME": "a", "WANDB_RUN_ID": "b"}
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in (server.environment | ours | {"WANDB_MODE": given}).items():
        if value:
            monkeypatch.setenv(name, value)
    cfg = composed("stage=sft")
    with caplog.at_level("INFO", logger="rlhf"):
        run = start_wandb(cfg, tmp_path)
        wandb.finish()
        wandb.teardown()
    assert bool(run) == (given != "disabled")
    assert bool(server.runs) == (given == "") == bool(list(tmp_path.glob("wandb/run-*")))
    assert bool(list(tmp_path.glob("wandb/offline-run-*"))) == (given == "offline")
    assert cfg.wandb.project == "mine"
    if run:
        assert (run.name, run.id) == (tmp_path.name, wandb_id(tmp_path))
        assert "W&B: WANDB_NAME, WANDB_RUN_ID of the environment: not used" in caplog.text
    assert (f"as WANDB_MODE={given} is in the environment" in caplog.text) == (given != "")


def test_a_home_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B keeps its files in the run's directory, and the tables arrive."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set here does not stay
        monkeypatch.delenv(name)
    run = start_wandb(composed("stage=sft", "wandb.mode=offline"), tmp_path)
    assert run
    run.log({"step": 1, "completions": wandb.Table(columns=["response"], data=[["yes"]])})
    wandb.finish()
    wandb.teardown()
    (kept,) = tmp_path.glob("wandb/offline-run-*")
    assert list(kept.rglob("*.table.json")), "the table"


def test_an_explicit_mode_counts_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert mode_asked_for(composed("wandb.mode=online")) == WandbMode.online
    assert mode_asked_for(composed("wandb.mode=auto")) == WandbMode.disabled
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # the old name
    assert mode_asked_for(composed("wandb.mode=auto")) == WandbMode.offline


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

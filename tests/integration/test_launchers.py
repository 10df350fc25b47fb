"""Runs of several processes: started by hand, by DeepSpeed's launcher, interrupted, failing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, SMALL, composed, metrics, runs_in, train

from rlhf.config.loading import save_config
from rlhf.runs import environment, launch
from rlhf.runs.directory import config_for_stage

SFT = ["stage=sft", *SMALL, "deploy.zero_stage=3", "sft.adam_eps=1e-5"]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT in one process."""
    root = tmp_path_factory.mktemp("one_node")
    done = train(*SFT, cwd=root)
    assert done.returncode == 0, done.stderr
    return runs_in(root)["sft"][0]


def same_losses(one: Path, two: Path) -> None:
    rows, others = metrics(one), metrics(two)
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert len(rows) == 3


@pytest.mark.full
def test_two_nodes_started_by_hand_are_one_run(one_node: Path, tmp_path: Path) -> None:
    """The same command on both, each with its number; the second one comes first, and waits."""
    nodes = [*SFT, "deploy.nodes=2", f"deploy.master=127.0.0.1:{environment.free_port()}"]
    command = [sys.executable, str(REPO / "train.py"), *nodes]
    second = subprocess.Popen(
        [*command, "deploy.node_rank=1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    time.sleep(2)
    first = train(*nodes, "deploy.node_rank=0", cwd=tmp_path)
    said = second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + said
    assert said.startswith("sft: node 1 of 2")
    (run,) = runs_in(tmp_path)["sft"]
    assert run.name == one_node.name  # where it ran is not part of a run's identity
    same_losses(one_node, run)
    assert (
        train(*nodes, "deploy.node_rank=1", cwd=tmp_path).returncode == 0
    )  # finished: nothing to wait for


@pytest.mark.full
def test_deepspeeds_launcher_starts_the_same_run(one_node: Path, tmp_path: Path) -> None:
    """The command for a hostfile, on two "nodes" that are both this machine; without ssh each gets
    its number as an argument."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    overrides = [
        *SFT,
        "deploy.nodes=2",
        f"deploy.hostfile={hostfile}",
        f"deploy.master=127.0.0.1:{environment.free_port()}",
    ]
    cfg = composed(*overrides, f"root={tmp_path}")
    run = tmp_path / "sft-by-launcher"
    run.mkdir()
    own = config_for_stage(cfg, "sft", {})
    save_config(own, run / "config.yaml")
    command = launch.launcher_command(run, own)
    at = command.index("--no_local_rank")
    nodes = [
        subprocess.Popen(
            [*command[:at], "--no_ssh", f"--node_rank={rank}", *command[at:]],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    same_losses(one_node, run)


def test_a_worker_that_dies_takes_the_others_along(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPO / "train.py"),
        "stage=sft",
        "wandb.mode=disabled",
        "deploy.processes_per_node=2",
        "deploy.threads=1",
    ]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not [*tmp_path.glob("outputs/sft-*/metrics.jsonl")] and time.time() < deadline:
        time.sleep(0.1)
    workers = workers_of(tmp_path)
    assert sorted(workers.values()) == ["0", "1"]
    killed = time.time()
    os.kill(next(pid for pid, rank in workers.items() if rank == "1"), signal.SIGKILL)
    said = parent.communicate(timeout=60)[1]
    seconds = time.time() - killed
    print(f"ended {seconds:.1f} s after the death of a worker")
    assert parent.returncode == 1 and seconds < 15 and not workers_of(tmp_path)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "sft failed, rank 1: killed by SIGKILL (out of memory?)" in line and "train.log" in line


@pytest.mark.full
def test_an_interrupted_run_starts_anew_and_keeps_what_was(tmp_path: Path) -> None:
    """SIGKILL of the parent takes the worker along; the same command then finishes the run."""
    command = [
        sys.executable,
        str(REPO / "train.py"),
        "stage=sft",
        "wandb.mode=disabled",
        "deploy.threads=1",
    ]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    log = None
    for _ in range(600):
        log = next(tmp_path.glob("outputs/sft-*/metrics.jsonl"), None)
        if log and len(log.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    assert log
    parent.kill()
    parent.wait()
    deadline = time.time() + 10
    while workers_of(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    assert not workers_of(tmp_path), "the worker outlived its parent"
    run = log.parent
    before = log.read_text()
    stopped = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (run / "attempts" / "1" / "metrics.jsonl").exists() and log.exists() and log.read_text():
            break
        time.sleep(0.1)
    assert (run / "attempts" / "1" / "metrics.jsonl").read_text() == before
    # a second owner is refused while the first one works
    second = train("stage=sft", "wandb.mode=disabled", "deploy.threads=1", cwd=tmp_path)
    assert (
        second.returncode == 2
        and f"pid {stopped.pid}" in second.stderr
        and "being trained by another process" in second.stderr
    )
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(20) == 130
    assert not workers_of(tmp_path)


def test_a_failing_worker_is_one_line_with_rank_cause_and_log(tmp_path: Path) -> None:
    done = train("stage=sft", *SMALL, "data.max_prompt_tokens=1", cwd=tmp_path)
    assert done.returncode == 2, "the user's mistake"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    [error] = errors
    assert re.fullmatch(
        r"error: sft: no rows to train on: 0 demonstrations \(\d+ skipped: prompt too long\): "
        "raise data.max_prompt_tokens",
        error,
    )
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    assert not (run / "summary.json").exists()


@pytest.mark.full
def test_a_bug_in_a_worker_is_one_line_with_rank_cause_and_log(tmp_path: Path) -> None:
    """A bug is put into the worker's stage when python starts."""
    broken = """
import sys
if "rlhf.worker" in sys.orig_argv:
    with open("started", "a") as file:
        print(sys.orig_argv[-1], file=file)
    from rlhf.data import tokenized
    def demonstrations(*args, **settings):
        raise ValueError("a bug")
    tokenized.demonstrations = demonstrations
"""
    (tmp_path / "sitecustomize.py").write_text(broken)
    path = os.pathsep.join([str(tmp_path), str(REPO)])
    done = train("stage=sft", *SMALL, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1, "not the user's mistake"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert "sft failed, rank 0: ValueError: a bug" in errors[0] and "train.log" in errors[0]
    (run,) = (tmp_path / "outputs").iterdir()
    assert "Traceback" in (run / "train.log").read_text()
    assert not (run / "summary.json").exists()
    assert (tmp_path / "started").read_text() == "-\n", "one worker, which imported before its turn"


def test_no_worker_is_left_by_a_command_that_has_nothing_to_train(tmp_path: Path) -> None:
    done = train("stage=sft", "data=jsonl", "data.sources.mine.path=no.jsonl", cwd=tmp_path)
    assert done.returncode == 2 and "no.jsonl" in done.stderr
    assert not workers_of(tmp_path)


def workers_of(root: Path) -> dict[int, str]:
    """Process numbers and ranks of the workers started in `root`."""
    found = {}
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if b"rlhf.worker" in (proc / "cmdline").read_bytes() and os.readlink(
                proc / "cwd"
            ) == str(root):
                environment = dict(
                    entry.split("=", 1)
                    for entry in (proc / "environ").read_bytes().decode().split("\0")
                    if "=" in entry
                )
                found[int(proc.name)] = environment["RANK"]
        except OSError:
            continue
    return found


@pytest.mark.full
def test_nodes_of_different_runs_refuse_each_other(tmp_path: Path) -> None:
    nodes = [*SFT, "deploy.nodes=2", f"deploy.master=127.0.0.1:{environment.free_port()}"]
    command = [sys.executable, str(REPO / "train.py"), *nodes]
    second = subprocess.Popen(
        [*command, "deploy.node_rank=1", "seed=5"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    first = train(*nodes, "deploy.node_rank=0", cwd=tmp_path)
    assert "the processes do not agree on the run" in first.stderr and first.returncode == 1
    assert second.wait(60) == 1
    refused = train("-m", *nodes, "deploy.node_rank=1", cwd=tmp_path)
    assert refused.returncode == 2 and "use deploy.hostfile" in refused.stderr

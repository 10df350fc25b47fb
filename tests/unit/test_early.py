"""Workers that import before their turn: what they load, when they are used, and that they end."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPO, composed

from rlhf.cli import parser, will_train
from rlhf.runs import early
from rlhf.runs.directory import config_for_stage
from rlhf.runs.environment import work_of_others
from rlhf.worker import BEFORE_TORCH


@pytest.fixture(autouse=True)
def none_left() -> Iterator[None]:
    """No worker outlives a test."""
    with early.none_left():
        yield
    assert not early.waiting.workers


def wait_until_gone(pid: int) -> None:
    """Wait until a process that is not a child of this one has ended."""
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, "it outlives the process that has started it"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def let_import(*modules: str) -> None:
    """Send the first line, as `prepare` does; torch would take seconds."""
    early.tell([{"environment": {}, "modules": modules, "announce": False}])
    early.waiting.stage = "sft"


def test_nothing_that_reads_the_environment_is_imported_before_it_is_known() -> None:
    code = (
        f"import sys, importlib; [importlib.import_module(m) for m in {BEFORE_TORCH}]; "
        "import rlhf.worker; sys.exit(any(m in sys.modules for m in "
        "('torch', 'transformers', 'deepspeed', 'wandb')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


PARENT = """
import time
from rlhf.runs import early
early.begin()
if {prepared}:
    early.tell([{{"environment": {{}}, "modules": ["json"], "announce": False}}])
print(early.waiting.workers[0].pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_worker_ends_with_the_process_that_has_started_it(
    prepared: bool, number: signal.Signals
) -> None:
    code = PARENT.format(prepared=prepared)
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as one:
        assert one.stdout
        worker = int(one.stdout.readline())
        assert is_alive(worker)
        one.send_signal(number)
    wait_until_gone(worker)


def test_a_worker_ends_where_its_standard_input_ends() -> None:
    """On systems that do not end it with its parent."""
    early.begin()
    [worker] = early.waiting.workers
    let_import("json")
    assert worker.stdin
    worker.stdin.close()
    assert worker.wait(20) == 0
    early.waiting.workers = []


def test_workers_run_what_they_are_prepared_for_in_an_equal_environment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = config_for_stage(composed("stage=sft", "deploy.threads=1"), "sft", {})
    assert early.take(tmp_path, sft) == {}, "none has been started"
    # 1. another stage, place, or environment than it was prepared for
    others = [
        (config_for_stage(composed("stage=rm", "deploy.threads=1"), "rm", {}), {}),
        (config_for_stage(composed("deploy.processes_per_node=2"), "sft", {}), {}),
        (sft, {"CUDA_VISIBLE_DEVICES": "3"}),
        (sft, {"PYTHONPATH": "/elsewhere"}),
    ]
    for cfg, changed in others:
        early.begin()
        [worker] = early.waiting.workers
        let_import("json")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changed.items():
                patch.setenv(name, value)
            assert early.take(tmp_path, cfg) == {}
        assert worker.returncode == -signal.SIGKILL, "it is not left behind"
    # 2. one that has died
    early.begin()
    let_import("json")
    early.waiting.workers[0].kill()
    early.waiting.workers[0].wait()
    assert early.take(tmp_path, sft) == {}
    # 3. one that fits runs; here it fails, as the directory has no configuration
    early.begin()
    [worker] = early.waiting.workers
    let_import("json")
    assert early.take(tmp_path, sft) == {"rank 0": worker}
    assert early.waiting.workers == []
    assert worker.wait(60) == 1
    assert "config.yaml" in (tmp_path / "error-rank0.txt").read_text()


def test_each_process_of_a_node_is_prepared_and_none_of_several_nodes() -> None:
    early.begin()
    early.prepare(composed("deploy.processes_per_node=2", "deploy.threads=1"), "sft", is_next=True)
    first, second = early.waiting.workers
    early.prepare(composed("deploy.processes_per_node=2", "deploy.threads=1"), "sft", is_next=True)
    assert early.waiting.workers == [first, second], "they are prepared once"
    early.end()
    early.begin()
    [worker] = early.waiting.workers
    cfg = composed("deploy.nodes=2", "deploy.node_rank=0", "deploy.master=localhost:1")
    early.prepare(cfg, "sft", is_next=True)
    assert early.waiting.workers == [] and worker.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], True),
        (["stage=sft", "seed=2"], True),
        (["stage=sft", "plan=true"], False),
        (["stage=inspect"], False),
        (["--cfg", "job"], False),
        (["-c", "job"], False),
        (["--info"], False),
    ],
)
def test_commands_that_only_print_start_no_worker(words: list[str], expected: bool) -> None:
    args: argparse.Namespace = parser().parse_known_intermixed_args(words)[0]
    assert will_train(args) is expected


def test_the_work_of_others_is_without_our_own() -> None:
    """One process of ours that never sleeps."""
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as spin:
        assert spin.stdout
        spin.stdout.readline()
        everything, others = work_of_others([]), work_of_others([spin.pid])
        time.sleep(0.5)
        used = (work_of_others([]) - everything) - (work_of_others([spin.pid]) - others)
        spin.kill()
    ticks = float(os.sysconf("SC_CLK_TCK"))
    assert used > 5 / ticks, "its work counts where it is not named"

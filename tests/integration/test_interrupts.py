"""Ctrl-C ends every command with a line and exit code 130, whatever it is doing."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import REPO, SLOW, SMALL, Demo, command, running

from rlhf.base import interrupts
from rlhf.run import trains_anew
from rlhf.runs.command import Command
from rlhf.runs.continuing import how_to_continue, say_how_to_continue
from rlhf.runs.gpus import SWEEP_BEGAN
from rlhf.runs.identity import run_dir_for

Moment = Callable[[str], bool]  # of the output so far
STARTED = 0.5  # seconds in which Python itself starts; before, it ends with a traceback


def seconds(number: float) -> Moment:
    """That long after the start."""
    began = time.time()
    return lambda said: time.time() - began > number


def said_so(text: str) -> Moment:
    return lambda said: text in said


def interrupt(command: list[str], folder: Path, moment: Moment) -> tuple[int, str]:
    """Send SIGINT to the group of a command, as a terminal does, at a moment.

    Returns: exit code and what it printed to stderr.
    """
    log = folder / "stderr.txt"
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
        )
    deadline = time.time() + 120
    while not moment(log.read_text()) and process.poll() is None:
        assert time.time() < deadline, log.read_text()
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # it is done already
        os.killpg(process.pid, signal.SIGINT)
    return process.wait(120), log.read_text()


def check(code: int, said: str) -> str:
    """The last line of a command that was interrupted."""
    assert code == 130, said
    for word in ("Traceback", "Exception ignored", "KeyboardInterrupt"):
        assert word not in said, said
    last = said.splitlines()[-1]
    assert last.startswith("Interrupted"), said
    return last


TRAIN = [str(REPO / "train.py"), *SMALL]
AGAIN = "Interrupted before the first checkpoint: the same command starts {} again."


@pytest.mark.parametrize(
    "text, line",
    [
        ("sft: outputs", AGAIN.format("sft")),
        pytest.param("rm: plan", AGAIN.format("rm"), marks=pytest.mark.full),
    ],
)
def test_without_a_checkpoint_the_same_command_starts_the_stage_again(
    text: str, line: str, tmp_path: Path
) -> None:
    assert check(*interrupt(TRAIN, tmp_path, said_so(text))) == line


def run_of(command: Command, stage: str, at: float, is_finished: bool) -> None:
    """Leave what a run has that began, and perhaps ended, at a time."""
    directory = run_dir_for(command, stage)
    directory.mkdir(parents=True, exist_ok=True)
    for name in ["config.yaml"] + ["summary.json"] * is_finished:
        (directory / name).write_text('{"status": "finished"}')
        os.utime(directory / name, (at, at))


def test_with_fresh_the_runs_of_before_are_not_those_of_this_command(tmp_path: Path) -> None:
    fresh = command("fresh=true", f"root={tmp_path}")
    before, started = time.time() - 500, time.time() - 100

    def line(stage: str) -> str:
        return how_to_continue(fresh, stage, started)

    assert line("sft") == "Interrupted before sft began: the same command starts it."
    for stage in ("sft", "rm", "ppo"):
        run_of(fresh, stage, before, is_finished=True)
    assert line("sft") == "Interrupted before sft began: the same command starts it."
    rest = "stage=ppo fresh=true."
    assert line("rm") == f"Interrupted before rm began: add stage=rm fresh=true, then {rest}"
    run_of(fresh, "sft", time.time(), is_finished=True)
    assert (
        line("sft") == f"Interrupted after sft was finished: add stage=rm fresh=true, then {rest}"
    )
    (run_dir_for(fresh, "rm") / "summary.json").unlink()
    run_of(fresh, "rm", time.time(), is_finished=False)
    again = "the same command without fresh=true"
    where = "Interrupted before the first checkpoint"
    assert line("rm") == f"{where}: {again} starts rm again; then add {rest}"
    run_of(fresh, "ppo", time.time(), is_finished=True)
    assert line("ppo") == f"Interrupted after ppo was finished: {again} prints its results."


def test_in_a_sweep_fresh_does_not_train_the_run_of_another_job_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, now = command("stage=sft", "fresh=true", f"root={tmp_path}"), time.time()
    directory = run_dir_for(fresh, "sft")
    run_of(fresh, "sft", now, is_finished=True)
    assert trains_anew(fresh, directory), "no sweep"
    monkeypatch.setenv(SWEEP_BEGAN, str(now - 100))
    assert not trains_anew(fresh, directory)
    run_of(fresh, "sft", now - 500, is_finished=True)  # before the sweep
    assert trains_anew(fresh, directory)
    assert not trains_anew(command("stage=sft", f"root={tmp_path}"), directory)


def test_with_fresh_a_stage_that_began_is_gone_on_with_without_it(tmp_path: Path) -> None:
    small, started = command("stage=sft", "fresh=true", f"root={tmp_path}"), time.time()
    run_of(small, "sft", started, is_finished=False)
    line = "first checkpoint: the same command without fresh=true starts sft again.$"
    with pytest.raises(KeyboardInterrupt, match=line), say_how_to_continue(small, "sft", started):
        raise KeyboardInterrupt


def test_a_library_that_raises_its_own_error_at_an_interrupt_changes_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = command("stage=sft", f"root={tmp_path}")
    with pytest.raises(ValueError), say_how_to_continue(small, "sft", 0.0):
        raise ValueError
    monkeypatch.setattr(interrupts, "_heard", [signal.SIGINT])
    stopped = pytest.raises(KeyboardInterrupt, match=AGAIN.format("sft"))
    with stopped, say_how_to_continue(small, "sft", 0.0):
        raise ValueError


@pytest.mark.parametrize(
    "command",
    [
        TRAIN,
        pytest.param([str(REPO / "chat.py")], marks=pytest.mark.full),
        pytest.param(["-m", "rlhf.report"], marks=pytest.mark.full),
        pytest.param(["-m", "rlhf.dashboard"], marks=pytest.mark.full),
    ],
)
def test_while_a_command_imports_its_modules(command: list[str], tmp_path: Path) -> None:
    code, said = interrupt(command, tmp_path, seconds(STARTED))
    if code not in (0, 1, 2):  # it had nothing to do, and has said so
        check(code, said)


def test_with_a_checkpoint_the_same_command_resumes(tmp_path: Path) -> None:
    long = [*SLOW, "sft.max_steps=400"]
    parent, run = running(*long, cwd=tmp_path, start_new_session=True)
    os.killpg(parent.pid, signal.SIGINT)
    last = check(parent.wait(120), parent.stderr.read())
    steps = [int(path.name[5:]) for path in (run / "checkpoints").iterdir()]
    assert last == f"Interrupted: the same command resumes sft after step {max(steps)}."


@pytest.mark.full
def test_a_function_that_is_tried_ends_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "import sys, time\n"
        "def slow(completions):\n"
        "    print('now', file=sys.stderr, flush=True)\n"
        "    time.sleep(300)\n"
    )
    command = [*TRAIN, "rl.rewards.mine.function=my_rewards:slow"]
    check(*interrupt(command, tmp_path, said_so("now")))


@pytest.mark.full
@pytest.mark.parametrize("wait", [STARTED, 1, 1.5, 2, 3, 4, 6, 8, 11, 15, 20, 30])
@pytest.mark.parametrize("kind", ["pipeline", "sweep", "inspect"])
def test_many_moments(kind: str, wait: float, tmp_path: Path) -> None:
    more = {"pipeline": [], "sweep": ["-m", "seed=1,2"], "inspect": ["stage=inspect"]}[kind]
    code, said = interrupt([*TRAIN, *more], tmp_path, seconds(wait))
    if code:
        check(code, said)


@pytest.mark.full
@pytest.mark.parametrize("wait", [STARTED, 1, 2, 3, 5])
def test_chat_that_loads_a_model(demo: Demo, wait: float, tmp_path: Path) -> None:
    command = [str(REPO / "chat.py"), "--path", str(demo.sft), "--prompt", "Hello"]
    code, said = interrupt(command, tmp_path, seconds(wait))
    if code:
        assert code == 130 and "Traceback" not in said, said

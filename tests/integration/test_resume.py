"""A run that dies goes on where it was, bit for bit: real processes, real kills."""

from __future__ import annotations

import functools
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, SLOW, command, lines, metrics, running, runs_in, summary, train
from worker_runs import begin, kill_when, prepare, rows_of, same, work

from rlhf.runs.directory import find_checkpoints, read_summary, write_json
from rlhf.runs.identity import run_dir_for

TEN_STEPS = [
    "sft.max_steps=10",
    "rm.max_steps=10",
    "sft.batch_size=8",
    "rm.batch_size=8",
    "checkpoint.every_steps=5",
]


# all that PPO remembers: coefficient, scale, average, random streams, best policy,
# warnings
MEMORY = [
    "rl.max_steps=4",
    "rl.batch_size=8",
    "rl.kl.controller=adaptive",
    "rl.kl.horizon=100",
    "rl.scale_score=true",
    "rl.ema=0.5",
    "rl.critic.warmup_rollouts=1",
    "rl.ptx.coef=0.1",
    "rl.evaluation.every=2",
    "rollout.log_responses=2",
    "checkpoint.every_steps=2",
]


def make(
    root: Path, name: str, stage: str, inputs: dict[str, str], processes: int, zero: int, *more: str
) -> Path:
    given, options = (inputs, MEMORY) if stage == "ppo" else ({}, [])
    return prepare(
        root,
        name,
        stage,
        given,
        [*TEN_STEPS, *options, *more],
        processes_per_node=processes,
        zero_stage=zero,
        micro_batch=3,
    )


def has_steps(run: Path, number: int) -> bool:
    return lines(run / "metrics.jsonl") >= number


@pytest.mark.full  # the quick tests kill PPO while it saves
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_killed_run_goes_on_bit_for_bit(
    inputs: dict[str, str], tmp_path: Path, stage: str, processes: int
) -> None:
    """10 steps = 5 + kill -9 + 5 (PPO: 4 rollouts = 2 + 2), between two checkpoints, with ZeRO 0, 2
    and 3. Undisturbed runs are done by the same processes, and so are resumed ones."""
    whole, killed = (
        [make(tmp_path, f"{name}{zero}", stage, inputs, processes, zero) for zero in (0, 2, 3)]
        for name in ("whole", "killed")
    )
    work(whole, processes)
    at, saved = (3, 2) if stage == "ppo" else (7, 5)
    for run in killed:
        kill_when(run, processes, functools.partial(has_steps, run, at))
        assert [about["step"] for _, about in find_checkpoints(run)[0]] == [saved]
    work(killed, processes)
    for one, other in zip(whole, killed):
        same(one, other)


@pytest.mark.full
@pytest.mark.parametrize(
    "more",
    [
        [
            "actor.lora.rank=4",
            "actor.lora.embeddings=true",
            "reward.lora.rank=4",
        ],
        ["deploy.precision=bf16", "deploy.offload.optimizer=true"],
        ["deploy.precision=autocast", "rl.kl.controller=linear", "rl.target_kl=0.01"],
    ],
    ids=["adapters", "bf16", "autocast"],
)
def test_a_killed_run_with_other_weights_goes_on(
    inputs: dict[str, str], tmp_path: Path, more: list[str]
) -> None:
    whole, killed = (
        make(tmp_path, name, "ppo", inputs, 1, 2, *more) for name in ("whole", "killed")
    )
    work([whole], 1)
    kill_when(killed, 1, lambda: lines(killed / "metrics.jsonl") >= 3)
    work([killed], 1)
    same(whole, killed)


@pytest.fixture(scope="module")
def whole(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PPO that nobody disturbs, with a checkpoint after each rollout."""
    run = make(
        tmp_path_factory.mktemp("whole"), "whole", "ppo", inputs, 1, 0, "checkpoint.every_steps=1"
    )
    work([run], 1)
    return run


def rollout_seconds(run: Path) -> float:
    return metrics(run)[2]["timing_s/rollout"]


FULL = pytest.mark.full


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("in the rollout", marks=FULL),
        pytest.param("in training", marks=FULL),
        "while saving",
    ],
)
def test_ppo_killed_at_any_moment_goes_on(
    inputs: dict[str, str], whole: Path, tmp_path: Path, moment: str
) -> None:
    run = make(tmp_path, "killed", "ppo", inputs, 1, 0, "checkpoint.every_steps=1")
    log, saved = run / "metrics.jsonl", run / "checkpoints"
    if moment == "while saving":
        kill_when(run, 1, lambda: lines(log) >= 2 and (saved / "step-2.tmp").exists())
        assert not (saved / "step-2").exists() and (saved / "step-1").exists()
    else:
        wait = rollout_seconds(whole) * (0.5 if moment == "in the rollout" else 1.3)
        kill_when(run, 1, lambda: (saved / "step-2").exists() and (time.sleep(wait) or True))
        assert lines(log) == 2, "the third rollout was not finished"
    work([run], 1)
    same(whole, run)


@pytest.mark.full
def test_ten_kills_at_random_moments(inputs: dict[str, str], whole: Path, tmp_path: Path) -> None:
    run = make(tmp_path, "killed", "ppo", inputs, 1, 0, "checkpoint.every_steps=1")
    moments, kills, started = random.Random(5), 0, time.time()
    while kills < 10:
        workers = begin(["-m", "rlhf.worker", run], 1)
        before = lines(run / "metrics.jsonl")
        deadline = time.time() + moments.uniform(1.0, 6.0)
        while time.time() < deadline and workers[0].poll() is None:
            time.sleep(0.01)
            if lines(run / "metrics.jsonl") > before + 1:
                break
        if workers[0].poll() is not None:  # it was done: begin again, killed differently
            assert workers[0].returncode == 0
            same(whole, run)
            for path in [path for path in run.iterdir() if path.name != "config.yaml"]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            continue
        workers[0].kill()
        workers[0].wait()
        kills += 1
    work([run], 1)
    same(whole, run)
    print(f"10 kills, {time.time() - started:.0f} s")


def test_sigterm_saves_and_the_same_command_goes_on_or_is_refused_elsewhere(tmp_path: Path) -> None:
    long = [*SLOW, "sft.max_steps=400", "checkpoint.every_steps=null"]
    parent, run = running(*long, cwd=tmp_path)
    second = train(*long, cwd=tmp_path)  # one run, one owner
    assert (
        second.returncode == 2
        and f"pid {parent.pid} on" in second.stderr
        and "being trained by another process" in second.stderr
    )
    parent.send_signal(signal.SIGTERM)
    said = parent.communicate(timeout=60)[1]
    assert (
        parent.returncode == 130
        and "stopped after step" in said
        and "run the same command to resume" in said
    ), said
    step = find_checkpoints(run)[0][0][1]["step"]
    assert lines(run / "metrics.jsonl") == step < 400
    refused = train(*long, "deploy.processes_per_node=2", cwd=tmp_path)
    assert (
        refused.returncode == 2
        and "made with deploy.processes_per_node=1, not deploy.processes_per_node=2: resume it "
        "with deploy.processes_per_node=1"
        in refused.stderr
    )
    assert "fresh=true" in refused.stderr
    done = train(*long, cwd=tmp_path)
    assert done.returncode == 0 and f"resuming after step {step} of 400" in done.stderr, done.stderr
    assert [row["step"] for row in metrics(run)] == list(range(1, 401))
    assert not (run / "checkpoints").exists(), (
        "a finished run keeps its models, not its optimizer states"
    )


@pytest.mark.full
def test_a_terminal_that_is_closed_saves_a_checkpoint(tmp_path: Path) -> None:
    long = [*SLOW, "sft.max_steps=400", "checkpoint.every_steps=null"]
    # a suite under nohup ignores the signal, and commands inherit that
    heard = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    parent, run = running(*long, cwd=tmp_path, preexec_fn=heard)
    parent.stderr.close()  # as when the terminal is gone: writing to it fails
    time.sleep(0.5)  # the progress bar has tried
    parent.send_signal(signal.SIGHUP)
    parent.wait(60)
    [(checkpoint, _)], incomplete = find_checkpoints(run)
    assert 1 < lines(run / "metrics.jsonl") == int(checkpoint.name[5:]) < 400 and not incomplete


def test_ctrl_c_saves_a_checkpoint_also_when_nobody_reads_the_output(tmp_path: Path) -> None:
    """As with `2>&1 | tee log`: Ctrl-C ends tee too."""
    long = [*SLOW, "sft.max_steps=400", "checkpoint.every_steps=null"]
    parent, run = running(*long, cwd=tmp_path)
    parent.stderr.close()
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60) == 130
    [(checkpoint, _)], incomplete = find_checkpoints(run)
    assert lines(run / "metrics.jsonl") == int(checkpoint.name[5:]) < 400 and not incomplete


@pytest.mark.full
def test_a_finished_run_that_is_trained_again_keeps_the_old_attempt(tmp_path: Path) -> None:
    for more in ([], ["fresh=true"]):
        done = train(*SLOW, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)["sft"]
    assert (run / "attempts" / "1" / "summary.json").exists()
    assert rows_of(run, "metrics.jsonl") == rows_of(run / "attempts" / "1", "metrics.jsonl")


@pytest.mark.full
def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    parent, run = running(*SLOW, cwd=tmp_path)
    parent.send_signal(signal.SIGINT)
    time.sleep(0.01)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=20)
    assert parent.returncode == 130 and not (run / "summary.json").exists()


@pytest.mark.full
def test_an_upstream_run_of_another_process_is_waited_for_and_taken_over(tmp_path: Path) -> None:
    """Two pipelines at the same moment with the same SFT run: one trains it and is killed, the
    other one takes over and finishes."""
    pipeline = [arg for arg in SLOW if arg != "stage=sft"]
    first, run = running(*pipeline, cwd=tmp_path, until=5)
    second = subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *pipeline, "rl.kl.coef=0.1"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, deadline = "", time.time() + 60
    while "waiting for" not in said and time.time() < deadline:
        said += (
            os.read(second.stderr.fileno(), 65536).decode()
            if select.select([second.stderr], [], [], 0.05)[0]
            else ""
        )
        time.sleep(0.01)
    assert (
        f"waiting for 0 s: {run.relative_to(tmp_path)} is being trained by another process "
        f"(pid {first.pid} on" in said
    ), said
    first.kill()
    first.wait()
    said += second.communicate(timeout=300)[1]
    assert second.returncode == 0 and "resuming after step" in said, said
    runs = runs_in(tmp_path)
    assert (len(runs["sft"]), len(runs["rm"]), len(runs["ppo"])) == (1, 1, 1)
    assert {summary(ppo)["parents"]["sft"] for ppo in runs["ppo"]} == {
        summary(runs["sft"][0])["id"]
    }


def test_a_run_that_another_process_finishes_meanwhile_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look whether it is finished and the lock."""
    from rlhf import run

    mine = command("stage=sft", f"root={tmp_path}")
    home = run_dir_for(mine, "sft")
    home.mkdir(parents=True)
    monkeypatch.setattr(
        run,
        "make_plan",
        lambda *_: write_json(home / "summary.json", {"parents": {}, "id": "theirs"}),
    )
    monkeypatch.setattr(run, "one_line_summary", str)
    assert run.run_stage(mine, "sft", is_parent=True) == home
    assert (
        read_summary(home) == {"parents": {}, "id": "theirs"} and not (home / "attempts").exists()
    )

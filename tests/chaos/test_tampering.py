"""Files of runs are deleted, cut in half, emptied, or have a flipped bit. The command then gives
the same result as ever, or ends before it trains with a line that names the file."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chaos_runs import SHORT, copy_of
from helpers import REPO, runs_in, train
from safetensors.torch import load_file

pytestmark = pytest.mark.full

PPO = [*SHORT, "stage=ppo", "rl.max_steps=3", "rl.evaluation.every=1", "wandb.mode=offline"]


def delete(file: Path) -> None:
    file.unlink()


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def to_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def to_pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


DAMAGES = (delete, halve, empty, flip)
Damage = Callable[[Path], None]
# of a run that was killed after its second rollout
LOGS = ("metrics.jsonl", "samples.jsonl", "wandb_id", "parents.json", "env.json", "data.json")
CHECKPOINT = ("checkpoint.json", "SHA256SUMS", "rank-0.pt", "actor/mp_rank_00_model_states.pt")
DELETED = ("config.yaml", "train.log", "rollouts.jsonl", ".owner")
WRITTEN = ("metrics.jsonl", "train.log", "curves.png", "ds_actor.json", "attempts")
OF_AN_INTERRUPTED_RUN = [
    *itertools.product(LOGS, DAMAGES),
    *itertools.product((f"checkpoints/step-2/{name}" for name in CHECKPOINT), DAMAGES),
    *itertools.product(DELETED, [delete]),
    *itertools.product(WRITTEN, [to_folder, to_pipe]),
]
# of the finished run that PPO starts from
OF_A_PARENT = [
    *itertools.product(("summary.json", "model/model.safetensors", "model/config.json"), DAMAGES),
    *itertools.product(("model/tokenizer.json", "model/SHA256SUMS"), DAMAGES),
    *itertools.product(("config.yaml", "result.json"), [delete, flip]),
    *itertools.product(("model/config.json", "summary.json"), [to_folder, to_pipe]),
]


def names(case: object) -> str:
    return case.__name__ if callable(case) else str(case).replace("/", ":")


def result_of(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    [run] = runs_in(folder)["ppo"]
    metrics = json.loads((run / "summary.json").read_text())["metrics"]
    return metrics, load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PPO that nobody disturbed."""
    folder = copy_of(parents, tmp_path_factory.mktemp("whole") / "root")
    done = train(*PPO, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PPO that was killed between its second and its third rollout."""
    folder = copy_of(parents, tmp_path_factory.mktemp("killed") / "root")
    command = [sys.executable, str(REPO / "train.py"), *PPO]
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not list(folder.glob("outputs/ppo-*/checkpoints/step-2")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2)  # its worker ends with it
    return folder


def check_outcome(done: subprocess.CompletedProcess[str], file: str, folder: Path, whole: Path):
    """The same result; or a line that names the file, and nothing was trained."""
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode == 0:
        (metrics, weights), (others, tensors) = result_of(whole), result_of(folder)
        assert metrics == others and weights.keys() == tensors.keys()
        assert all(torch.equal(weights[name], tensors[name]) for name in weights)
        return
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and errors and any(file in line for line in errors), done.stderr
    assert "rollout 3" not in done.stderr


def run_damaged(
    given: Path, stage: str, file: str, damage: Damage, folder: Path
) -> subprocess.CompletedProcess[str]:
    """PPO in a copy of a folder in which a file of the stage's run is damaged."""
    [run] = runs_in(copy_of(given, folder))[stage]
    damage(run / file)
    return train(*PPO, cwd=folder)


@pytest.mark.parametrize("file, damage", OF_AN_INTERRUPTED_RUN, ids=names)
def test_an_interrupted_run(
    file: str, damage: Damage, killed: Path, whole: Path, tmp_path: Path
) -> None:
    done = run_damaged(killed, "ppo", file, damage, tmp_path / "root")
    check_outcome(done, Path(file).name, tmp_path / "root", whole)
    if file.startswith("checkpoints/"):
        assert done.returncode == 0 and "step-2" in done.stderr, done.stderr
        assert "incomplete" in done.stderr or "damaged" in done.stderr, done.stderr


@pytest.mark.parametrize("file, damage", OF_A_PARENT, ids=names)
def test_a_parent_run(
    file: str, damage: Damage, parents: Path, whole: Path, tmp_path: Path
) -> None:
    done = run_damaged(parents, "sft", file, damage, tmp_path / "root")
    if done.returncode == 2 and damage is delete and file == "summary.json":
        assert "ppo needs a trained policy: not in" in done.stderr  # the run counts as unfinished
        return
    check_outcome(done, Path(file).name, tmp_path / "root", whole)
    if file.startswith("model/") and "SHA256SUMS" not in file:
        assert done.returncode == 2

"""Checkpoints that are torn, not finite, without room on the disk, or from other kernels."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from helpers import REPO, SLOW, composed, metrics, running, summary, train

from rlhf.base.errors import UserError
from rlhf.config.choices import Precision
from rlhf.config.deployment import placement
from rlhf.distributed.engine import build_engine, read_data_only
from rlhf.models.loading import load_policy
from rlhf.runs.directory import find_checkpoints
from rlhf.sampling.cpu import kernels
from rlhf.training import checkpoint


@pytest.mark.full
def test_a_torn_checkpoint_is_left_out_and_a_full_disk_leaves_the_one_before(
    tmp_path: Path,
) -> None:
    parent, run = running(*SLOW, cwd=tmp_path, until=7)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    (newest, _), (before, about) = find_checkpoints(run)[0]
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    limit = largest.stat().st_size // 2
    # files larger than that cannot be written any more: the next checkpoint fails half-way
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    done = subprocess.run(
        [sys.executable, str(REPO / "train.py"), *SLOW],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        **full,
    )
    assert done.returncode == 1 and f"{newest.name} is incomplete: skipped" in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "is the disk full?" in line and line.endswith(
        f"the last good checkpoint is {before.relative_to(tmp_path)}"
    ), line
    assert [a["step"] for _, a in find_checkpoints(run)[0]] == [about["step"]]
    done = train(*SLOW, cwd=tmp_path)
    assert done.returncode == 0 and f"resuming after step {about['step']} of 30" in done.stderr
    assert [row["step"] for row in metrics(run)] == list(range(1, 31)) and summary(run)[
        "status"
    ] == "finished"


def test_what_is_not_finite_is_named_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    done = train(
        *SLOW, "sft.lr=1e30", "sft.warmup_steps=10", "checkpoint.every_steps=1", cwd=tmp_path
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        done.returncode == 1
        and "that is not finite is" in line
        and "lower the learning rate" in line
    )
    assert "hf.model" in line or "hf.lm_head" in line


def test_placement_names_all_that_bits_depend_on() -> None:
    assert placement(composed("deploy.threads=2")) == {
        "deploy.processes_per_node": 1,
        "deploy.nodes": 1,
        "deploy.zero_stage": 0,
        "deploy.device": "cpu",
        "deploy.offload.optimizer": False,
        "deploy.threads": 2,
    }


def checkpoints_of(run: Path) -> checkpoint.Checkpoints:
    """Of an engine that has a thousand bytes to keep."""

    def write(directory: Path, tag: str, **_: object) -> None:
        (directory / tag).mkdir()
        (directory / tag / "weights").write_bytes(b"x" * 1000)

    engine = SimpleNamespace(
        device=torch.device("cpu"),
        save_checkpoint=write,
        load_checkpoint=lambda *_, **__: ("there", {}),
    )
    before = signal.getsignal(signal.SIGTERM)
    saving = checkpoint.Checkpoints(
        composed("checkpoint.every_steps=1", "checkpoint.keep=2"),
        run,
        9,
        {"actor": engine},
        {"a": {"n": 1}},
    )
    signal.signal(signal.SIGTERM, before)
    return saving


def test_going_on_with_other_kernels_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saving = checkpoints_of(tmp_path)
    for before, now in (
        (True, True),
        (True, False),
        (False, True),
        (None, True),
    ):  # None: nothing was sampled
        monkeypatch.setattr(kernels, "loaded", before)
        saving.save(1)
        monkeypatch.setattr(kernels, "loaded", now)
        caplog.clear()
        with caplog.at_level("WARNING", logger="rlhf"):
            assert saving.resume() == 1
        assert ("last digits will differ" in caplog.text) == (before is not None and before != now)


def test_without_room_on_the_disk_a_checkpoint_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = checkpoints_of(tmp_path)
    saving.after(1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=500))
    saving.after(2)
    assert [about["step"] for _, about in find_checkpoints(tmp_path)[0]] == [1] and len(
        [*(tmp_path / "checkpoints").iterdir()]
    ) == 1
    (tmp_path / "stop").touch()  # as on several nodes
    with pytest.raises(checkpoint.Stopped, match="stopped after step 3 of 9; it has no checkpoint"):
        saving.after(3)
    monkeypatch.undo()
    for step in (4, 5):
        with pytest.raises(
            checkpoint.Stopped, match=f"after step {step} of 9; run the same command to resume"
        ):
            saving.after(step)
    assert [about["step"] for _, about in find_checkpoints(tmp_path)[0]] == [5, 4]


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip_a_byte, lambda file: file.write_bytes(bytes(file.stat().st_size))]
)
@pytest.mark.parametrize("file", ["actor/weights", "rank-0.pt", "checkpoint.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: Callable[[Path], object]
) -> None:
    saving = checkpoints_of(tmp_path)
    saving.save(1)
    saving.save(2)
    damage(tmp_path / "checkpoints" / "step-2" / file)
    with caplog.at_level("WARNING", logger="rlhf"):
        assert saving.resume() == 1
    assert "step-2" in caplog.text
    assert ("is incomplete: skipped" in caplog.text) != ("the one before it is used" in caplog.text)
    damage(tmp_path / "checkpoints" / "step-1" / file)
    caplog.clear()
    with caplog.at_level("WARNING", logger="rlhf"):
        assert saving.resume() == 0
    assert "step-1" in caplog.text
    saving.save(3)  # the damaged ones are dropped with the next one that is written
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


class Bomb:
    """What a foreign pickle may hold: code that runs when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("file", ["rank-0.pt", "actor/mp_rank_00_model_states.pt"])
def test_no_code_in_a_checkpoint_is_run(
    one_process: None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saving = checkpoints_of(tmp_path)
    load = partial(load_policy, "builtin:tiny", tokenizer, Precision.fp32)
    saving.engines = {"actor": build_engine(load, composed("stage=ppo"), "actor", tmp_path)}
    saving.save(1)
    directory = tmp_path / "checkpoints" / "step-1"
    torch.save({"module": Bomb()}, directory / file)
    with pytest.raises(UserError, match=f"{file}: it is no file of tensors .* no code"):
        saving._load(directory)
    assert not (tmp_path / "exploded").exists()


class SavedByName:
    """As python 3.11.2 saves what `kind` has under `name`, an Enum's member for instance."""

    def __init__(self, kind: type, name: str):
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[object, tuple[type, str]]:
        return getattr, (self.kind, self.name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_zero_stage_is_read_as_each_python_saves_it(tmp_path: Path, stage: int) -> None:
    member = ZeroStageEnum(stage)
    for saved in (member, SavedByName(ZeroStageEnum, member.name)):
        torch.save({"zero_stage": saved}, tmp_path / "state.pt")
        assert read_data_only(str(tmp_path / "state.pt")) == {"zero_stage": member}


@pytest.mark.parametrize(
    "kind, name", [(ZeroStageEnum, "mro"), (ZeroStageEnum, "__class__"), (LossScaler, "backward")]
)
def test_nothing_else_is_taken_from_a_class(tmp_path: Path, kind: type, name: str) -> None:
    torch.save(SavedByName(kind, name), tmp_path / "state.pt")
    with pytest.raises(UserError, match="no file of tensors and numbers"):
        read_data_only(str(tmp_path / "state.pt"))

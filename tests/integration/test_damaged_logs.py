"""Log files of a run that are shortened, deleted or garbage: the run goes on and says so."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from helpers import SLOW, running, summary, train

from rlhf.reporting.curves import plot_run
from rlhf.runs.history import read_lines
from rlhf.training.tracker import cut_back
from rlhf.training.wandb_run import wandb_id


@pytest.mark.full
def test_a_run_whose_metrics_were_halved_goes_on_and_ends(tmp_path: Path) -> None:
    command = [*SLOW, "wandb.mode=offline"]
    parent, run = running(*command, cwd=tmp_path)
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=300)
    metrics = run / "metrics.jsonl"
    metrics.write_bytes(b"\xff" + metrics.read_bytes()[1 : metrics.stat().st_size // 2])
    (run / "wandb_id").write_bytes(b"\xff not an id")
    done = train(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "metrics.jsonl: " in done.stderr and " bytes that this run had written" in done.stderr
    assert "wandb_id: " in done.stderr and "is no id of a W&B run" in done.stderr
    assert summary(run)["status"] == "finished"
    rows = [json.loads(line) for line in metrics.read_bytes().splitlines()[1:]]  # whole lines only
    assert rows[-1]["step"] == 30 and (run / "curves.png").exists()


@pytest.mark.parametrize(
    "content, size, left",
    [
        (b"one\ntwo\n", 4, b"one\n"),  # written later
        (b"one\ntwo\n", 8, b"one\ntwo\n"),
        (b"one\ntw", 20, b"one\n"),  # shortened within a line
        (b"", 20, b""),
        (b"no line", 20, b""),
    ],
)
def test_a_file_is_cut_to_a_checkpoint_and_never_filled_up(
    content: bytes, size: int, left: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(content)
    cut_back(file, size)
    assert file.read_bytes() == left


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    cut_back(tmp_path / "samples.jsonl", 20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff", b"../../x", b"abc\ndef", b"a" * 10**6])
def test_an_id_that_is_none_is_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_bytes(content)
    new = wandb_id(tmp_path)
    assert len(new) == 12 and wandb_id(tmp_path) == new


def test_damaged_rows_are_skipped(tmp_path: Path) -> None:
    damaged = b'{"step": 1}\n\xff\x00\n3\nnull\n' + b"[" * 100_000 + b'\n{"step": 2}\n{"st'
    (tmp_path / "metrics.jsonl").write_bytes(damaged)
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]


def test_a_run_without_rows_has_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    plot_run(tmp_path, "ppo", {})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]

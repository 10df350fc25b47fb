"""The command `train.py stage=inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import known_file
from helpers import train

# -------------------------------------------------------------------------------------- the command


def test_the_command_looks_anew_each_time(tmp_path: Path) -> None:
    command = [
        "stage=inspect",
        "data=jsonl",
        "data.sources.mine.path=pairs.jsonl",
        "deploy=single_gpu",
    ]  # needs none
    done = train(*command, cwd=tmp_path)
    assert (
        done.returncode == 2
        and "pairs.jsonl: no such file" in done.stderr
        and "Traceback" not in done.stderr
    )
    known_file(tmp_path / "pairs.jsonl")
    done = train(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("outputs/inspect-*/report.html")
    assert (
        str(page.relative_to(tmp_path)) in done.stdout
        and "mine/train" in done.stdout
        and "unreadable rows of mine/train: 1" in done.stdout
    )
    result = json.loads((page.parent / "result.json").read_text())
    assert result["metrics"]["sources"][0]["rows"] == 60
    assert {path.name for path in page.parent.iterdir()} == {
        ".owner", "config.yaml", "data.json", "report.html", "result.json", "train.log"
    }  # fmt: skip


def test_planning_says_that_it_fits(tmp_path: Path) -> None:
    done = train("stage=inspect", "data=rm_static", "plan=true", cwd=tmp_path)
    assert done.returncode == 0 and "fits" in done.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, expected",
    [
        (["actor.path=/nowhere"], "actor.path=/nowhere: no model there"),
        (["data=jsonl"], "data.sources.mine.path has no value"),
    ],
)
def test_bad_input_gets_one_line(args: list[str], expected: str, tmp_path: Path) -> None:
    done = train("stage=inspect", *args, cwd=tmp_path)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr

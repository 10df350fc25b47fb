"""stage=inspect: the reward functions must pass the reference answers of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_files import jsonl
from helpers import composed

from rlhf.runs.checks import check_inputs
from rlhf.stages import inspect

FUNCTIONS = """
def right(completions, answer):
    return [float(one == wanted) for one, wanted in zip(completions, answer)]

def broken(completions, **columns):
    # it misses thousands separators
    return [float(one.split()[-1].isdigit()) for one in completions]
"""


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "checks_of_mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "question": f"What is <{n}> times 100?",
            "answer": f"#### {n},000" if n % 4 == 0 else f"#### {n}",
        }
        for n in range(60)
    ]
    return str(jsonl(tmp_path / "sums.jsonl", rows))


def config(path: str, *functions: str) -> Any:
    given = [f"rl.rewards.{name}.function=checks_of_mine:{name}" for name in functions]
    mine = ["stage=inspect", "data=jsonl", f"data.sources.mine.path='{path}'"]
    return composed(*mine, "data.shares=[0,0,1]", "rl.rewards.model=null", *given)


def test_a_broken_verifier_is_found_before_training(rewards: str, tmp_path: Path) -> None:
    cfg = config(rewards, "broken")
    assert check_inputs(cfg) == []
    result = inspect.run(cfg, tmp_path)
    [check] = result["references"]
    assert 0 < check["failed"] < check["rows"] == result["stages"]["ppo"]["rows"]
    assert check["answer"].endswith(",000") and check["score"] == 0
    [line] = [line for line in result["verdicts"] if line.startswith("reward broken: ")]
    assert f"{check['failed']} of {check['rows']} reference answers" in line
    assert "times 100?'; if it checks answers" in line
    page = (tmp_path / "report.html").read_text()
    assert "Reward functions on the reference answers" in page and "What is &lt;" in page


def test_one_that_passes_all_answers_has_no_warning(rewards: str, tmp_path: Path) -> None:
    result = inspect.run(config(rewards, "right"), tmp_path)
    assert result["references"][0]["failed"] == 0
    assert not [line for line in result["verdicts"] if line.startswith("reward ")]


def test_without_functions_nothing_is_tried(rewards: str, tmp_path: Path) -> None:
    assert inspect.run(config(rewards), tmp_path)["references"] == []
    assert "Reward functions" not in (tmp_path / "report.html").read_text()


def test_a_function_that_is_not_there_gets_one_line(rewards: str) -> None:
    [line] = check_inputs(config(rewards, "missing"))
    assert line.startswith(
        "rl.rewards.missing.function=checks_of_mine:missing: there is no missing"
    )

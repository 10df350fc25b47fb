"""stage=inspect: the reward functions must pass the reference answers of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_files import jsonl
from helpers import composed
from reward_server import running

from rlhf.evaluation import reference_answers
from rlhf.runs.checks import check_inputs
from rlhf.stages import inspect

FUNCTIONS = """
def right(completions, answer):
    return [float(one == wanted) for one, wanted in zip(completions, answer)]

def broken(completions, **columns):
    # it misses thousands separators
    return [float(one.split()[-1].isdigit()) for one in completions]

def varied(prompts, completions, completion_ids):
    assert all(isinstance(one, list) for one in prompts + completions)
    return [1.0 if len(set(ids)) / len(ids) > 0.1 else 0.0 for ids in completion_ids]
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


def config(path: str, *functions: str, given: Sequence[str] = ()) -> Any:
    """Args: functions: of checks_of_mine.py. given: further keys."""
    keys = ["stage=inspect", "data=jsonl", f"data.sources.mine.path='{path}'"]
    keys += ["data.shares=[0,0,1]", "rl.rewards.model=null"]
    keys += [f"rl.rewards.{name}.function=checks_of_mine:{name}" for name in functions]
    return composed(*keys, *given)


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


def test_the_reference_is_in_the_column_that_a_verifier_names(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is <{n}> + 1?", "target": str(n + 1)} for n in range(40)]
    path = str(jsonl(tmp_path / "targets.jsonl", rows))
    verifier = "rl.rewards.number={function: 'rlhf.verifiers:number', kwargs: {column: target}}"
    [check] = inspect.run(config(path, given=[verifier]), tmp_path)["references"]
    assert check["rows"] > 20 and check["failed"] == check["not_applicable"] == 0


def test_a_reward_url_is_asked_too_and_a_judge_is_not(rewards: str, tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("Grade this: {completion}")
    with running(tmp_path) as server:
        url = f"rl.rewards.far.url={server.url}"
        judge = f"rl.rewards.judge.judge={{endpoint: '{server.endpoint}', model: m, rubric: r.txt}}"
        [check] = inspect.run(config(rewards, given=[url, judge]), tmp_path)["references"]
        assert check["reward"] == "far" and check["rows"] > 20
        assert all("query" in request["body"] for request in server.requests)


def test_a_call_whose_rows_all_lack_the_column_has_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_answers, "CALL", 1)
    rows = [{"prompt": f"{n} + 1?", "answer": str(n + 1), "goal": str(n + 1)} for n in range(8)]
    rows += [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(8)]
    path = str(jsonl(tmp_path / "some.jsonl", rows))
    by_goal = "{function: 'rlhf.verifiers:number', kwargs: {column: goal}}"
    with running(tmp_path) as server:
        far = f"{{url: '{server.url}', kwargs: {{column: goal}}}}"
        given = [f"rl.rewards.number={by_goal}", f"rl.rewards.far={far}"]
        checks = inspect.run(config(path, given=given), tmp_path)["references"]
        labels = [request["body"]["labels"] for request in server.requests]
    [of_number] = [check for check in checks if check["reward"] == "number"]
    assert 0 < of_number["not_applicable"] < of_number["rows"] and of_number["failed"] == 0
    assert labels.count([None]) == of_number["not_applicable"]


def test_functions_get_messages_and_token_ids_as_in_training(rewards: str, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n} + 1?"}],
            "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
        }
        for n in range(40)
    ]
    path = str(jsonl(tmp_path / "of_verl.jsonl", rows))
    [check] = inspect.run(config(path, "varied"), tmp_path)["references"]
    assert check["rows"] > 20 and check["failed"] == 0

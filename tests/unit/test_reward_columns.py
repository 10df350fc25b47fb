"""The columns of a row that a reward function gets by the names of its parameters."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import Record, jsonl
from format_rows import message, read_row, source
from prepared_data import config

from rlhf.base.errors import UserError
from rlhf.config.choices import Template
from rlhf.data.records import Prompt, Turn
from rlhf.data.sources import load_sources
from rlhf.rl import rewards
from rlhf.rl.rewards import Source, columns_for

ROW = {"answer": 7, "level": "hard"}
WHERE = "rewards.mine: the function"


def asked(**columns: Any) -> Prompt:
    return Prompt([Turn("user", "3 + 4?")], json.dumps(columns) if columns else "")


def got(function: Callable[..., Any]) -> dict[str, Any]:
    return columns_for(function, asked(**ROW), WHERE)


def decorated(function: Callable[..., float], keep_name: bool) -> Callable[..., float]:
    def call(*args: Any, **named: Any) -> float:
        return function(*args, **named)

    return functools.wraps(function)(call) if keep_name else call


def two(turns: list[Turn], response: str) -> float:
    return 0.0


def reference(turns: list[Turn], response: str, answer: int) -> float:
    return float(response == str(answer))


class Judge:
    def __call__(self, turns: list[Turn], response: str, *, level: str) -> float:
        return float(level == "hard")


@pytest.mark.parametrize(
    "function, columns",
    [
        (two, []),
        (lambda turns, answer: 0.0, []),  # the response, whatever its name
        (reference, ["answer"]),
        (lambda turns, response, *, level: 0.0, ["level"]),
        (lambda turns, response, level, answer: 0.0, ["answer", "level"]),
        (lambda turns, response, **columns: 0.0, ["answer", "level"]),
        (lambda turns, response, level, **others: 0.0, ["answer", "level"]),
        (lambda turns, *rest, answer: 0.0, ["answer"]),
        (lambda *args, **columns: 0.0, ["answer", "level"]),
        (lambda turns, answer, /, **columns: 0.0, ["answer", "level"]),
        (lambda turns, response, answer=0, unit="m": 0.0, ["answer"]),
        (decorated(reference, keep_name=True), ["answer"]),
        (decorated(reference, keep_name=False), ["answer", "level"]),
        (functools.partial(reference, answer=3), ["answer"]),
        (Judge(), ["level"]),
        (math.hypot, []),  # in C, without a signature
        (max, []),
    ],
)
def test_further_parameters_get_the_columns_of_their_names(
    function: Callable[..., Any], columns: list[str]
) -> None:
    assert got(function) == {name: ROW[name] for name in columns}


def test_the_function_is_called_with_them() -> None:
    score = functools.partial(rewards.call, Source("mine", function=reference), asked(**ROW))
    assert (score("7"), score("8")) == (1.0, 0.0)


@pytest.mark.parametrize(
    "function, columns, line",
    [
        (
            lambda turns, response, truth: 0.0,
            ROW,
            f"{WHERE} has a parameter truth, and a row has no such column (it has answer, level): "
            "give it a default value, or add the column to the data",
        ),
        (
            lambda turns, response, *, truth, **columns: 0.0,
            {},
            f"{WHERE} has a parameter truth, and a row has no such column (it has none): "
            "give it a default value, or add the column to the data",
        ),
        (
            lambda turns, answer, **columns: 0.0,
            ROW,
            f"{WHERE} has a parameter answer for the turns or the response, and the rows have a "
            "column of this name: rename the parameter",
        ),
    ],
)
def test_columns_that_a_function_cannot_get_stop_the_run(
    function: Callable[..., Any], columns: Record, line: str
) -> None:
    with pytest.raises(UserError) as raised:
        columns_for(function, asked(**columns), WHERE)
    assert str(raised.value) == line
    with pytest.raises(UserError) as raised:  # before a model is loaded
        rewards.check_columns({"mine": function}, [asked(**columns)])
    assert str(raised.value) == line


# --- which columns a row has


@pytest.mark.parametrize(
    "row, columns",
    [
        # GSM8K: the one answer is the response for SFT and the reference for a function
        ({"question": "3 + 4?", "answer": "It is #### 7"}, {"answer": "It is #### 7"}),
        ({"question": "3 + 4?", "answer": 7}, {"answer": 7}),
        ({"instruction": "3 + 4?", "output": "7", "level": 1}, {"output": "7", "level": 1}),
        ({"prompt": "3 + 4?", "chosen": "7", "rejected": "8", "level": 1}, {"level": 1}),
        ({"prompt": "3 + 4?"}, {}),
        (
            {
                "data_source": "sums",
                "prompt": [message("user", "3 + 4?")],
                "reward_model": {"style": "rule", "ground_truth": "7"},
            },
            {"data_source": "sums", "reward_model": {"style": "rule", "ground_truth": "7"}},
        ),
        (
            {"messages": [message("user", "3 + 4?"), message("assistant", "7")], "id": 4},
            {"id": 4},
        ),
    ],
)
@pytest.mark.parametrize("style", [Template.hh, Template.tokenizer])
def test_columns_are_those_beside_the_conversation(
    row: Record, columns: Record, style: Template
) -> None:
    pair = read_row(row, source(), style)
    assert json.loads(pair.columns or "{}") == columns


@pytest.mark.usefixtures("cache")
def test_columns_reach_the_prompts_of_training_and_of_evaluation(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": f"{n} + 1?", "sum": n + 1} for n in range(60)])
    data = load_sources(config(mine=file))
    given = [Prompt([Turn(**turn) for turn in row["prompt"]], row["columns"]) for row in data.ppo]
    assert len(given) > 40 and data.eval_prompts
    for prompt in [*given, *data.eval_prompts]:
        number = int(prompt.turns[0].text.split()[0])
        assert json.loads(prompt.columns) == {"sum": number + 1}


def test_none_is_no_score() -> None:
    with pytest.raises(UserError, match="the function failed on the response 'x': TypeError"):
        rewards.call(Source("mine", function=lambda turns, response: None), asked(), "x")


def test_a_function_that_cannot_take_turns_and_response_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short_rewards.py").write_text("def one(turns):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"key: one must take the prompt's turns and the response"):
        rewards.load_function("short_rewards:one", "key")

"""The columns of a row that a reward function gets by the names of its parameters."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import Record, jsonl
from format_rows import message, read_row, source
from helpers import composed
from prepared_data import config

from rlhf.base.errors import UserError
from rlhf.config.choices import Template
from rlhf.config.stage_nodes import RewardSource
from rlhf.data.records import Dataset, Demonstration, Prompt, Turn
from rlhf.data.sources import load_sources
from rlhf.rl import functions
from rlhf.rl.functions import columns_for, score, try_functions

CFG = composed("stage=ppo")
CFG.rl.rewards = {"mine": RewardSource(function="mine:score")}
ROW = {"answer": 7, "level": "hard"}
WHERE = "rl.rewards.mine.function=mine:score"


def asked(**columns: Any) -> Prompt:
    return Prompt([Turn("user", "3 + 4?")], json.dumps(columns) if columns else "")


def held_out(prompts: list[Prompt], answers: Sequence[Demonstration] = ()) -> Dataset:
    """Data without rows to train on."""
    return Dataset(None, None, None, list(answers), [], prompts)


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
    assert [score(reference, asked(**ROW), text, WHERE) for text in ("7", "8")] == [1.0, 0.0]


@pytest.mark.parametrize(
    "function, columns, line",
    [
        (
            lambda turns, response, truth: 0.0,
            ROW,
            f"{WHERE}: the function has a parameter truth, and a row has no such column (it "
            "has answer, level): give it a default value, or add the column to the data",
        ),
        (
            lambda turns, response, *, truth, **columns: 0.0,
            {},
            f"{WHERE}: the function has a parameter truth, and a row has no such column (it "
            "has none): give it a default value, or add the column to the data",
        ),
        (
            lambda turns, answer, **columns: 0.0,
            ROW,
            f"{WHERE}: the function has a parameter answer for the turns or the response, "
            "and the rows have a column of this name: rename the parameter",
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
        try_functions(CFG, {"mine": function}, held_out([asked(**columns)]))
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


# --- what a function does on rows


def no_score(turns: list[Turn], response: str) -> None:
    """Forgets to return."""


def several_scores(turns: list[Turn], response: str) -> Any:
    return torch.tensor([1.0, 2.0])


def leaves(turns: list[Turn], response: str) -> float:
    sys.exit("no key")


def reads_json(turns: list[Turn], response: str) -> float:
    return float(json.loads(response)["score"])  # raises in the standard library


def line_of(function: Callable[..., Any]) -> int:
    return function.__code__.co_firstlineno


@pytest.mark.parametrize(
    "function, line",
    [
        (
            no_score,
            f"returned None for the response 'x', not a finite number ({__file__}:{{first}})",
        ),
        (
            several_scores,
            "returned tensor([1., 2.]) for the response 'x', not a finite number "
            f"({__file__}:{{first}})",
        ),
        (leaves, f"failed on the response 'x': SystemExit: no key ({__file__}:{{second}})"),
        (
            reads_json,
            "failed on the response 'x': JSONDecodeError: Expecting value: line 1 column 1 "
            f"(char 0) ({__file__}:{{second}})",
        ),
    ],
)
def test_what_a_function_did_is_one_line_with_file_and_line(
    function: Callable[..., Any], line: str
) -> None:
    with pytest.raises(UserError) as raised:
        score(function, asked(), "x", WHERE)
    first = line_of(function)
    assert str(raised.value) == f"{WHERE}: the function " + line.format(
        first=first, second=first + 1
    )


def test_functions_are_tried_on_a_few_rows_with_their_answers() -> None:
    """Spread over all rows, as each source may have other ones."""
    calls = []

    def function(turns: list[Turn], response: str) -> float:
        calls.append((turns[0].text, response))
        return 0.0

    prompts = [Prompt([Turn("user", str(n))]) for n in range(11)]
    answers = [Demonstration(prompts[n].turns, f"is {n}") for n in range(4)]
    assert try_functions(CFG, {"mine": function}, held_out(prompts, answers)) == 4
    assert calls == [("0", "is 0"), ("3", "is 3"), ("6", "Yes."), ("9", "Yes.")]
    assert try_functions(CFG, {"mine": function}, held_out([])) == 0


def test_the_row_on_which_a_function_fails_is_named() -> None:
    def fails(turns: list[Turn], response: str) -> float:
        return 1 / int(turns[0].text)

    prompts = [Prompt([Turn("user", text)]) for text in ("1", "0")]
    with pytest.raises(UserError) as raised:
        try_functions(CFG, {"mine": fails}, held_out(prompts))
    assert str(raised.value) == (
        f"{WHERE}: held-out prompt '0': the function failed on the response 'Yes.': "
        f"ZeroDivisionError: division by zero ({__file__}:{line_of(fails) + 1})"
    )


def test_a_function_that_cannot_take_turns_and_response_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short_rewards.py").write_text("def one(turns):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"key: one must take the prompt's turns and the response"):
        functions.load_function("short_rewards:one", "key")

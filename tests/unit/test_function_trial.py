"""Before training each reward function is tried on a few real rows, in its real process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.errors import UserError
from rlhf.data.load import table_of
from rlhf.data.records import Dataset, Demonstration, Pair, Prompt, Turn
from rlhf.rewards.batch import make_batch
from rlhf.rewards.process import RewardProcess, Spec
from rlhf.rewards.trial import JUDGE, token_ids, try_functions

MODULE = """
def maths_only(completions, task, **kwargs):
    return [1.0 if t == "maths" else None for t in task]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return float(solution_str == ground_truth)

def on_the_second_prompt(completions):
    assert "no" not in completions
    return [1.0] * len(completions)

def varied(completion_ids):
    return [len(set(ids)) / len(ids) for ids in completion_ids]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


def held_out(rows: Sequence[dict[str, Any]], answers: Sequence[str] = ()) -> Dataset:
    prompts = [Prompt([Turn("user", str(i))], json.dumps(row)) for i, row in enumerate(rows)]
    demonstrations = [Demonstration(p.turns, text) for p, text in zip(prompts, answers)]
    return Dataset(None, None, None, demonstrations, [], prompts)


@pytest.fixture
def process(request: pytest.FixtureRequest) -> Iterator[RewardProcess]:
    running = RewardProcess({f: Spec(f"rl.rewards.{f}", f"mine:{f}") for f in request.param})
    yield running
    running.close()


@pytest.mark.parametrize("process", [["maths_only", "compute_score"]], indirect=True)
def test_a_column_that_no_row_has_stops_the_run(
    process: RewardProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError) as raised:
        try_functions(process, held_out([{"level": 1}, {"hint": "x"}]))
    assert str(raised.value) == (
        "rl.rewards.maths_only: the function has a parameter task, and no row of online RL "
        "or of the evaluation has such a column (they have hint, level): give it a default value, "
        "or add the column to the data"
    )
    with pytest.raises(UserError) as raised:
        try_functions(process, held_out([{"task": "maths"}]))
    assert str(raised.value) == (
        "rl.rewards.compute_score: a function of verl's kind compares with a ground truth, and the "
        "rows have no column ground_truth, reward_model or answer: add one to the data"
    )
    with caplog.at_level("INFO", "rlhf"):
        assert try_functions(process, held_out([{"task": "maths"}, {"answer": "4"}])) == 2
    assert (
        "rl.rewards.maths_only: 1 held-out row without a column task: the function gets None there"
        in caplog.messages
    )


@pytest.mark.parametrize("process", [["on_the_second_prompt"]], indirect=True)
def test_functions_are_tried_on_a_few_rows_with_their_answers(process: RewardProcess) -> None:
    """Spread over all rows, as each source may have other ones."""
    rows: list[dict[str, Any]] = [{}] * 11
    assert try_functions(process, held_out(rows, ["ok", "no", "ok", "ok"])) == 4
    assert try_functions(process, held_out([])) == 0
    with pytest.raises(UserError, match="prompt '3': the function failed on the completion 'no'"):
        try_functions(process, held_out(rows, ["ok", "ok", "ok", "no"]))


def mixed(held_out_rows: Sequence[dict[str, Any]], training_row: dict[str, Any]) -> Dataset:
    """Data whose prompts of online RL are a row with columns, and one without."""
    columns = ["", json.dumps(training_row)]
    pairs = [Pair([Turn("user", f"{i}?")], "", None, columns=c) for i, c in enumerate(columns)]
    return dataclasses.replace(held_out(held_out_rows), ppo=table_of(pairs))


def test_a_call_gets_the_columns_that_only_other_rows_of_the_data_have(tmp_path: Path) -> None:
    """In data of several sources all rows of a call may lack a column."""
    (tmp_path / "rubric.txt").write_text("{completion} or {ground_truth}?")
    nowhere = {"endpoint": "http://127.0.0.1:9/v1", "model": "m", "rubric": "rubric.txt"}
    specs = {
        "mine": Spec("mine", "mine:maths_only"),
        "number": Spec("number", "rlhf.verifiers:number"),
        "judge": Spec("judge", JUDGE, {**nowhere, "column": "goal", "cache": str(tmp_path)}),
    }
    process = RewardProcess(specs)
    try:
        row = {"task": "maths", "answer": "4", "goal": "four"}
        assert try_functions(process, mixed([{}] * 3, row)) == 3
        rows = [Prompt([Turn("user", "Hi")], text) for text in ("", json.dumps({"level": 1}))]
        batch = make_batch(rows, ["4", "4"], [[7]] * 2, {}, columns=process.columns)
        scores = [found.scores for found in process.score(batch).values()]
        assert scores == [[None, None]] * len(specs)
        assert batch.columns["level"] == [None, 1]
    finally:
        process.close()


def test_a_reference_that_no_row_of_the_data_has_stops_the_run() -> None:
    process = RewardProcess({"number": Spec("rl.rewards.number", "rlhf.verifiers:number")})
    try:
        with pytest.raises(UserError) as raised:
            try_functions(process, mixed([{}] * 3, {"level": 1}))
    finally:
        process.close()
    assert "no column ground_truth or answer or reward_model (they have level)" in str(raised.value)


@pytest.mark.parametrize("process", [["varied"]], indirect=True)
def test_a_response_that_is_tried_has_token_ids(process: RewardProcess, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [{}] * 3
    assert try_functions(process, held_out(rows, ["no no", " "])) == 3
    assert try_functions(process, held_out(rows, ["no no", " "]), tokenizer) == 3
    assert token_ids(["a b a", " "], None) == [[0, 1, 0], [2]]
    of_policy = token_ids(["My cat", ""], tokenizer)
    assert len(of_policy[0]) > 1 and all(ids[-1] == tokenizer.eos_token_id for ids in of_policy)

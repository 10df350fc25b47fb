"""Reward functions on the reference answers: what is counted, and what is reported."""

from __future__ import annotations

import json

import pytest

from rlhf.data.load import table_of
from rlhf.data.records import Pair, Prompt, Turn
from rlhf.evaluation import reference_answers
from rlhf.evaluation.reference_answers import check_of, reference_in, verdicts_on_references
from rlhf.verifiers import REFERENCES

PROMPTS = [Prompt([Turn("user", f"{n} + 1")]) for n in range(4)]
ANSWERS = ["1", "2", "3", "4"]


def test_answers_that_do_not_pass_are_counted_and_the_first_is_an_example() -> None:
    check = check_of("number", PROMPTS, ANSWERS, [1.0, 0.5, None, 0.0])
    assert check == {
        "reward": "number",
        "rows": 4,
        "not_applicable": 1,
        "without_score": "3",
        "failed": 2,
        "score": 0.5,
        "prompt": "1 + 1",
        "answer": "2",
    }
    assert verdicts_on_references([check]) == [
        "reward number: it does not apply to 1 of 4 reference answers (None), the first one '3': "
        "these rows have no score from it",
        "reward number: 2 of 3 reference answers (67%) score less than 1, the first one 0.5: '2' "
        "to '1 + 1'; if it checks answers, repair it or the data before training",
    ]


def test_a_function_that_passes_all_has_no_line() -> None:
    check = check_of("number", PROMPTS, ANSWERS, [1.0, 2.0, 1.0, 1.0])
    assert check["failed"] == 0 and "prompt" not in check
    assert verdicts_on_references([check]) == []


def test_a_function_that_applies_to_nothing_is_named() -> None:
    [line] = verdicts_on_references([check_of("math", PROMPTS, ANSWERS, [None] * 4)])
    assert line.startswith("reward math: it applies to none of 4 reference answers (None)")


@pytest.mark.parametrize(
    "columns, reference",
    [
        ({"answer": "So #### 7"}, "So #### 7"),
        ({"answer": 7, "ground_truth": "8"}, "8"),
        ({"reward_model": {"ground_truth": "9", "style": "rule"}}, "9"),
        ({"answer": 0}, "0"),
        ({"answer": ["7", "seven"]}, "7"),
        ({"ground_truth": {"ground_truth": [7, 8]}}, "7"),
        ({"ground_truth": [], "answer": {"text": "six"}, "reward_model": {"ground_truth": 9}}, "9"),
        ({"answer": {"text": "six"}}, ""),
        ({"level": "hard"}, ""),
        ({}, ""),
    ],
)
def test_the_reference_of_a_row_without_an_answer_is_in_a_column(
    columns: dict[str, object], reference: str
) -> None:
    text = json.dumps(columns) if columns else ""
    assert reference_in(Prompt([Turn("user", "?")], text), REFERENCES) == reference


def test_the_rows_are_spread_over_all_that_have_a_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference_answers, "MOST_ROWS", 5)
    turns = [[Turn("user", str(n))] for n in range(12)]
    pairs = [Pair(one, "", None, columns=f'{{"answer": "{n}"}}') for n, one in enumerate(turns)]
    pairs[6] = Pair(turns[6], "six", None)
    pairs[9] = Pair(turns[9], "", None)
    prompts, answers = reference_answers.reference_answers(table_of(pairs), REFERENCES)
    assert answers == ["0", "3", "six"]
    assert [prompt.turns[-1].text for prompt in prompts] == ["0", "3", "6"]


def test_prompts_that_are_messages_stay_messages() -> None:
    turns = [Turn("user", "6 + 1?")]
    pairs = [Pair(turns, "7", None, is_messages=True), Pair([Turn("user", "Hi")], "Hello", None)]
    prompts, _ = reference_answers.reference_answers(table_of(pairs), REFERENCES)
    assert [prompt.is_messages for prompt in prompts] == [True, False]

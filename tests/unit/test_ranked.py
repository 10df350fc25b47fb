"""Ranked responses: the pairs of a row, where they go, and how they are counted."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_files import Record, jsonl
from format_rows import assistant, message, source, user
from prepared_data import assert_apart, assert_counts_add_up, config, questions_of

from rlhf.base.errors import UserError
from rlhf.config.choices import Format
from rlhf.config.schema import Source
from rlhf.data.formats.fields import detect_format
from rlhf.data.formats.rows import Skip, read_pairs
from rlhf.data.load import summarize
from rlhf.data.records import Pair
from rlhf.data.sources import load_sources

pytestmark = pytest.mark.usefixtures("cache")


def ranked(responses: list[Any], **numbers: list[Any]) -> Record:
    return {"prompt": "q", "responses": responses, **numbers}


def found(row: Record, **fields: Any) -> list[tuple[str, str | None]]:
    return [(pair.chosen, pair.rejected) for pair in read_pairs(row, source("ranked", **fields))]


# --- the pairs of a row


def test_each_response_is_chosen_over_each_worse_one() -> None:
    row = ranked(["c", "a", "b"], ranks=[3, 1, 2])
    assert found(row) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert found(ranked(["c", "a", "b"], scores=[-1, 9.5, 2])) == found(row)


@pytest.mark.parametrize("seed", range(20))
def test_the_pairs_are_those_of_all_comparisons(seed: int) -> None:
    """Against a loop over all ordered pairs: K (K - 1) / 2 of them where there is no tie."""
    draw = random.Random(seed)
    scores = [draw.choice([0, 1, 2, 3.5]) for _ in range(draw.randint(2, 9))]
    texts = [f"response {i}" for i in range(len(scores))]
    expected = {(a, b) for a, x in zip(texts, scores) for b, y in zip(texts, scores) if x > y}
    row = ranked(texts, scores=scores)
    if not expected:
        with pytest.raises(Skip, match="tie"):
            found(row)
        return
    pairs = found(row)
    assert set(pairs) == expected and len(pairs) == len(expected)
    assert scores[texts.index(pairs[0][0])] == max(scores), "the first pair has the best one"
    assert found(ranked(texts, ranks=[-score for score in scores])) == pairs


def test_ties_equal_and_empty_responses_make_no_pair() -> None:
    assert found(ranked(["a", "b", "c"], ranks=[1, 1, 2])) == [("a", "c"), ("b", "c")]
    assert found(ranked(["a", " a\n", "c"], ranks=[1, 2, 3])) == [("a", "c"), (" a", "c")]
    assert found(ranked(["a", "", None, [], "b"], ranks=[1, 2, 3, 4, 5])) == [("a", "b")]
    for row, reason in (
        (ranked(["a", "b"], scores=[2, 2.0]), "tie"),
        (ranked(["a", "a"], scores=[2, 1]), "tie"),
        (ranked(["a", " "], scores=[2, 1]), "fewer than two responses"),
        (ranked(["a"], scores=[2]), "fewer than two responses"),
    ):
        with pytest.raises(Skip, match=reason):
            found(row)


def test_responses_are_texts_messages_or_conversations() -> None:
    turns = [message("user", "q")]
    responses = ["a", message("assistant", "b"), [*turns, message("assistant", "c")]]
    row = {"prompt": turns, "responses": responses, "ranks": [1, 2, 3], "system": "Rhyme."}
    first, *_, last = read_pairs(row, source())
    assert first.prompt[-1] == user("q") and first.prompt[0].role == "system"
    assert (first.chosen, last.chosen, last.rejected) == ("a", "b", "c")
    dialogue = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    row = {"prompt": dialogue, "responses": [" x", " y"], "ranks": [2, 1]}
    assert read_pairs(row, source()) == [Pair([user("a"), assistant("b"), user("c")], "y", "x")]


def test_nectar_and_ultrafeedback() -> None:
    """A star leads to all entries of a list."""
    nectar = {
        "prompt": "\n\nHuman: q\n\nAssistant: ",
        "answers": [
            {"answer": "b", "model": "m", "rank": 2.0},
            {"answer": "a", "model": "n", "rank": 1.0},
        ],
        "turns": 1,
        "num_responses": 2,
    }
    columns = {"responses": "answers.*.answer", "ranks": "answers.*.rank"}
    assert read_pairs(nectar, source(columns=columns)) == [Pair([user("q")], "a", "b")]
    ultrafeedback = {
        "instruction": "q",
        "completions": [
            {"response": "a", "overall_score": 6.5, "annotations": {}},
            {"response": "b", "overall_score": 7},
        ],
    }
    columns = {
        "prompt": "instruction",
        "responses": "completions.*.response",
        "scores": "completions.*.overall_score",
    }
    assert read_pairs(ultrafeedback, source(columns=columns)) == [Pair([user("q")], "b", "a")]
    with pytest.raises(ValueError, match=r"completions.\*.response: a string has no \*"):
        read_pairs(ultrafeedback | {"completions": "x"}, source("ranked", columns=columns))


@pytest.mark.parametrize(
    "row, problem",
    [
        (ranked(["a", "b"]), "ranks and scores are empty"),
        (ranked(["a", "b"], ranks=[1]), "ranks: 1 for 2 responses"),
        (ranked(["a", "b"], ranks="1, 2"), "ranks: a string for 2 responses"),
        (ranked(["a", "b"], scores=[1, None]), "scores.1 is empty, not a number"),
        (ranked(["a", "b"], scores=[1, float("nan")]), "scores.1 is nan, not a number"),
        (ranked(["a", {"x": 1}], ranks=[1, 2]), "responses.1.0: unknown role None"),
        (ranked("ab", ranks=[1, 2]), "responses is a string, not a list"),
        (ranked([], ranks=[]), "responses is empty"),
        (
            ranked(["a", "b"], ranks=[1, 2], scores=[1, 2]),
            r"ranks \(1 is the best\) and scores contradict each other",
        ),
    ],
)
def test_rows_that_cannot_be_read(row: Record, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        found(row)


def test_ranks_and_scores_that_agree_are_read_together() -> None:
    row = ranked(["a", "b", "c"], ranks=[1, 2, 3], scores=[9, 9, 1])
    assert len(found(row)) == 3


def test_detection_needs_numbers() -> None:
    """Responses alone are no ranking: they may be those of a prompt for online RL."""
    assert detect_format(["prompt", "responses"]) == Format.prompts
    assert detect_format(["question", "responses", "scores"]) == Format.ranked


# --- the stages


def lists(count: int, k: int = 4) -> list[Record]:
    texts = [f"response {i}" for i in range(k)]
    return [
        {"prompt": f"Question {n}?", "responses": texts, "scores": list(range(k))}
        for n in range(count)
    ]


def test_pairs_go_to_the_reward_model_and_the_best_response_to_sft(tmp_path: Path) -> None:
    data = load_sources(config(mine=jsonl(tmp_path / "a.jsonl", lists(200))))
    assert_counts_add_up(data)
    assert_apart(data)
    (report,) = data.report
    assert (report["rows"], report["copies"], report["skipped"]) == (200, 0, {})
    pairs = len(data.rm) + len(data.eval_rm)
    assert report["further"] == pairs * 5 // 6
    assert set(Counter(questions_of(data.rm)).values()) == {6}, "all pairs of a prompt"
    for table in (data.sft, data.ppo):
        assert set(Counter(questions_of(table)).values()) == {1}
    assert set(data.sft["chosen"]) == {"response 3"}
    assert {d.response for d in data.eval_sft} == {"response 3"}
    assert len(data.eval_rm) == 6 * len(data.eval_sft) == 6 * len(data.eval_prompts)
    said = f"mine/train: 200 rows and {report['further']} further pairs of ranked responses: sft"
    assert summarize(data).startswith(said)


def test_a_source_for_sft_only_has_each_prompt_once(tmp_path: Path) -> None:
    path = str(jsonl(tmp_path / "a.jsonl", lists(50)))
    data = load_sources(config(mine=Source(path=path, sft_only=True)))
    assert_counts_add_up(data)
    assert len(data.sft) + len(data.eval_sft) == 50 and len(data.rm) == len(data.ppo) == 0


def test_a_best_response_that_is_second_elsewhere_is_still_learnt(tmp_path: Path) -> None:
    """Two rows of a prompt: (b, c) is a further pair of the first, and the first of the second."""
    two = [
        {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]},
        {"prompt": "q", "responses": ["b", "c"], "ranks": [1, 2]},
    ]
    rows = [{**row, "prompt": f"q {i}"} for i in range(40) for row in two]
    path = str(jsonl(tmp_path / "a.jsonl", rows))
    data = load_sources(config(mine=Source(path=path, sft_only=True)))
    assert Counter(data.sft["chosen"]) == {letter: len(data.sft) // 2 for letter in "ab"}
    assert data.report[0]["skipped"]["duplicate row"] == 40


def test_a_bad_row_between_ranked_ones_has_its_own_line(tmp_path: Path) -> None:
    rows = lists(60)
    rows[4] = {"prompt": "q", "responses": ["a", "b"], "scores": [1]}
    rows[7]["scores"] = [1, 1, 1, 1]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = load_sources(config(mine=path))
    (report,) = data.report
    problem = f"data.sources.mine: line 5 of {path}: scores: 1 for 2 responses"
    assert report["first_unreadable"] == problem
    assert (report["skipped"]["tie"], report["skipped"]["unreadable"]) == (1, 1)
    assert report["rows"] == 60
    assert_counts_add_up(data)


def test_a_format_without_numbers_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "q", "responses": ["a", "b"]}])
    with pytest.raises(UserError, match="needs a column ranks or scores; there are prompt, resp"):
        load_sources(config(mine=Source(path=str(path), format=Format.ranked)))

"""Rows that cannot be read, and what is said about them."""

from __future__ import annotations

from typing import Any

import pytest
from format_rows import message, read_row, scored, source

GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    "format, row, expected",
    [
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": True},
            "chosen is true or false, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"rejected": {"text": "c"}},
            "rejected is an object, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"rejected": float("nan")},
            "rejected is nan, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": {"text": "a"}},
            "prompt is an object, not a string",
        ),
        ("prompt_chosen_rejected", GOOD | {"prompt": b"a"}, "prompt is a bytes, not a string"),
        ("prompt_chosen_rejected", {"prompt": "a"}, "no field chosen"),
        ("prompt_chosen_rejected", {"chosen": "a"}, "no field prompt"),
        ("prompt_chosen_rejected", GOOD | {"prompt": None}, "prompt is empty"),
        ("prompt_chosen_rejected", GOOD | {"prompt": []}, "prompt is empty"),
        ("prompt_chosen_rejected", GOOD | {"prompt": " "}, "the prompt has no user's turn"),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": "\n\nHuman: \n\nAssistant:"},
            "the prompt has no user's turn",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": "Assistant:"},
            "the prompt has no user's turn",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": [message("system", "a")]},
            "the prompt has no user's turn",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": "\n\nHuman: a\n\nAssistant: b"},
            "the prompt ends with the assistant's turn, not with the user's",
        ),
        ("prompt_chosen_rejected", GOOD | {"prompt": ["a"]}, "prompt.0 is a string, not a message"),
        (
            "prompt_chosen_rejected",
            GOOD | {"prompt": [message("user", None)]},
            "prompt.0.content is empty, not a string",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message("user", [{"type": "text"}])]},
            "chosen.0.content.0 is a part without text",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message("tool", "x")]},
            "chosen ends with a tool or the call of one; only `messages` may",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message("moderator", "x")]},
            "chosen.0: unknown role moderator; known are user, human, assistant, gpt, model",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message({}, "x")]},
            "chosen.0: unknown role {}; ",
        ),  # type: ignore[arg-type]
        (
            "chosen_rejected",
            {"chosen": "yes", "rejected": "no"},
            "chosen is not a dialogue: it does not begin with Human: or USER:",
        ),
        ("chosen_rejected", {"chosen": "USER: a ASSISTANT: b"}, "no field rejected"),
        (
            "chosen_rejected",
            {"chosen": "ASSISTANT: b", "rejected": "ASSISTANT: c"},
            "the prompt has no user's turn",
        ),
        (
            "chosen_rejected",
            {"chosen": "USER: a ASSISTANT: b", "rejected": "USER: x ASSISTANT: c"},
            "chosen and rejected differ before the last answer",
        ),
        ("scored_answers", scored("5", 1), "score_a is a string, not a number"),
        ("scored_answers", scored(1, None), "score_b is empty"),
        ("scored_answers", scored(1, True), "score_b is true or false, not a number"),
        ("scored_answers", scored(float("nan"), 1), "score_a is nan, not a number"),
        ("scored_answers", {"prompt": "q"}, "no field answer_a"),
        ("scored_answers", scored(1, 2) | {"answer_b": {}}, "answer_b is an object, not a string"),
        (
            "prompt_chosen_rejected",
            {"prompt": "q 1", "chosen": [message("user", "q 2"), message("assistant", "b")]},
            "the turns of chosen before its last answer are not the prompt",
        ),
        (
            "prompt_chosen_rejected",
            GOOD | {"chosen": [message("user", [{"type": "image_url"}])]},
            "chosen.0.content.0 is image_url, not a part of type text",
        ),
        (
            "instruction",
            {"instruction": "a", "output": "b", "history": ["c"]},
            "history.0 is not [question, answer]",
        ),
        (
            "messages",
            {
                "system": "Be short.",
                "messages": [message("system", "Be long."), message("user", "a")],
            },
            "system is not the system's turn of the conversation",
        ),
        ("instruction", {"instruction": "a"}, "no field output"),
        (
            "instruction",
            {"instruction": "a", "input": 1, "output": "b"},
            "input is a number, not a string",
        ),
        ("instruction", {"instruction": "", "output": "b"}, "the prompt has no user's turn"),
        ("messages", {"messages": "a"}, "messages is a string, not a list of messages"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": [{"role": "user"}]}, "messages.0 has no content"),
        (
            "messages",
            {"messages": [{"from": "human", "value": 1}]},
            "messages.0.value is a number, not a string",
        ),
        (
            "messages",
            {"messages": [message("user", "a"), message("system", "b")]},
            "the last message is the system's, not the assistant's",
        ),
        ("messages", {"messages": [message("assistant", "a")]}, "the prompt has no user's turn"),
        ("text", {"text": "a"}, "format text has no prompts and answers"),
        (
            None,
            {"question": "a", "reply": "b"},
            "no format fits the columns question, reply: give format and columns",
        ),
    ],
)
def test_rows_that_cannot_be_read_say_why(
    format: str | None, row: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError) as error:
        read_row(row, source(format))
    assert str(error.value).startswith(expected)


def test_a_ratio_of_negative_scores_is_refused() -> None:
    with pytest.raises(
        ValueError, match="scores -1 and 1: min_score_ratio needs scores that are not negative"
    ):
        read_row(scored(-1, 1), source("scored_answers", min_score_ratio=2))

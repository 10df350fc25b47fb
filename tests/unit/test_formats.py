"""Data formats: what is read from a row, the paths of its columns, and detection from columns."""

from __future__ import annotations

from typing import Any

import pytest
from format_rows import assistant, message, read_row, scored, source, user
from helpers import composed
from public_sets import shp

from rlhf.config.choices import WORLDS, Format
from rlhf.config.schema import Source
from rlhf.data.formats import fields as formats
from rlhf.data.formats.fields import check_columns, detect_format, field
from rlhf.data.formats.rows import Skip, read_text
from rlhf.data.records import Pair, Turn


def read(format: str, row: dict[str, Any], **fields: Any) -> Pair | str:
    """The pair of a row, or why it is left out."""
    try:
        return read_row(row, source(format, **fields))
    except Skip as reason:
        return str(reason)


# --- formats


CONVERSATION = [user("a"), assistant("b"), user("c")]


@pytest.mark.parametrize(
    "prompt, turns",
    [
        ("  What is it?\n", [user("What is it?")]),
        ("What does\n\nHuman: mean?", [user("What does\n\nHuman: mean?")]),
        ("The USER: asks the ASSISTANT: what?", [user("The USER: asks the ASSISTANT: what?")]),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", CONVERSATION),
        ("\n\nHuman: quote:\n\nHuman: b\n\nAssistant:", [user("quote:"), user("b")]),
        (
            "\n\nHuman: Is Assistant: a word? Human: Yes? \n\nAssistant:",
            [user("Is Assistant: a word? Human: Yes?")],
        ),
        ("\n\nHuman: Is Assistant: a word?", [user("Is Assistant: a word?")]),
        (
            "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ",
            [user("a"), assistant("b"), user("c")],
        ),
        (" Human: a b Assistant:", [user("a b")]),
        (" Human: a Assistant: b Human: c Assistant:", [user("a"), assistant("b"), user("c")]),
        (" Human: a\n Assistant: b\n Human: c\n Assistant: ", CONVERSATION),
        ("Human: What is an Assistant: mark?\nAssistant:", [user("What is an Assistant: mark?")]),
        ("USER: the Human: and the Assistant: ASSISTANT:", [user("the Human: and the Assistant:")]),
        ("ASSISTANT: Welcome! USER: Hi ASSISTANT:", [assistant("Welcome!"), user("Hi")]),
        (
            [message("system", " Be brief. "), message("user", " a\n")],
            [Turn("system", "Be brief."), user("a")],
        ),
        (
            [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            CONVERSATION,
        ),
    ],
)
def test_prompts(prompt: Any, turns: list[Turn]) -> None:
    assert read("prompt_chosen_rejected", {"prompt": prompt, "chosen": "x"}) == Pair(
        turns, "x", None
    )


@pytest.mark.parametrize(
    "answer, expected",
    [
        (" yes\n", " yes"),
        ("    y = x\n    return y\n", "    y = x\n    return y"),
        ("\n\n  a\n", "  a"),
        (42, "42"),
        (0.5, "0.5"),
        ("Assistant: yes", "yes"),
        ("I, the Assistant: yes", "I, the Assistant: yes"),
        ("\n\nHuman: I quote", "Human: I quote"),
        ("yes [1] (no)", "yes [1] (no)"),
        ([message("assistant", "yes")], "yes"),
        (
            [
                message("user", "a"),
                message("assistant", " yes "),
            ],
            " yes",
        ),
        (
            [message("assistant", [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}])],
            "yes",
        ),
        ([message("assistant", "yes"), message("user", "thanks")], "empty answer"),
        ("", "empty answer"),
        (None, "empty answer"),
        ([], "empty answer"),
    ],
)
def test_answers(answer: Any, expected: str) -> None:
    found = read("prompt_chosen_rejected", {"prompt": "a", "chosen": answer, "rejected": "other"})
    assert found == (
        expected if expected == "empty answer" else Pair([user("a")], expected, "other")
    )


def test_a_second_answer_may_be_missing_but_not_empty() -> None:
    row = {"prompt": "a", "chosen": "b"}
    for missing in ({}, {"rejected": None}, {"rejected": []}):
        assert read("prompt_chosen_rejected", row | missing) == Pair([user("a")], "b", None)
    assert read("prompt_chosen_rejected", row | {"rejected": " "}) == "empty answer"
    assert read("prompt_chosen_rejected", row | {"rejected": "b "}) == "chosen equals rejected"


@pytest.mark.parametrize("name", ["response", "completion", "answer", "output"])
def test_the_one_answer_has_several_names(name: str) -> None:
    row = {"prompt": "a", name: "b"}
    assert detect_format(row) == Format.prompt_chosen_rejected
    check_columns(list(row), source("prompt_chosen_rejected"))
    assert read_row(row, source()) == Pair([user("a")], "b", None), (
        "the format is told from the row where none is given"
    )
    assert read_row(row | {"chosen": "c"}, source()).chosen == "c", "its own name comes first"


def test_whole_dialogues_as_strings_and_as_messages() -> None:
    strings = {
        "chosen": "USER: a ASSISTANT: b USER: c ASSISTANT: yes",
        "rejected": "USER: a ASSISTANT: b USER: c ASSISTANT: no",
    }
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    messages = {
        "chosen": [*turns, message("assistant", "yes")],
        "rejected": [*turns, message("assistant", "no")],
    }
    expected = Pair([user("a"), assistant("b"), user("c")], "yes", "no")
    assert read("chosen_rejected", strings) == read("chosen_rejected", messages) == expected
    assert read("chosen_rejected", messages | {"rejected": turns}) == "empty answer"
    assert (
        read("chosen_rejected", messages | {"rejected": messages["chosen"]})
        == "chosen equals rejected"
    )


@pytest.mark.parametrize(
    "a, b, ratio, expected",
    [
        (1, 2, 1, "second"),
        (2.5, 2, 1, "first"),
        (-1, -2, 1, "first"),
        (2, 2.0, 1, "tie"),
        (0, 0, 2, "tie"),
        (3, 2, 2, "scores too close"),
        (2, 3, 1.5, "second"),
        (4, 2, 2, "first"),
        (0, 1, 9, "second"),
    ],
)
def test_the_higher_score_is_chosen_if_it_is_high_enough(
    a: float, b: float, ratio: float, expected: str
) -> None:
    found = read("scored_answers", scored(a, b), min_score_ratio=ratio)
    assert (found.chosen if isinstance(found, Pair) else found) == expected
    assert isinstance(found, str) or {found.chosen, found.rejected} == {"first", "second"}


def test_the_score_ratio_of_shp_is_a_setting() -> None:
    row = shp(("Yes.", "No."), (12, 8))
    assert read_row(row, composed("data=shp").data.sources["shp"]).chosen == "Yes."
    with pytest.raises(Skip, match="scores too close"):
        read_row(
            row, composed("data=shp", "data.sources.shp.min_score_ratio=2").data.sources["shp"]
        )


def test_marks_of_citations_go_only_where_there_are_quotes() -> None:
    row = scored(2, 1) | {"answer_a": "x[1] is y[2, 3] (z).", "answer_b": "x[1]"}
    assert read("scored_answers", row) == Pair([user("q")], "x[1] is y[2, 3] (z).", "x[1]")
    assert read("scored_answers", row | {"quotes_a": {"title": ["t"]}, "quotes_b": []}) == Pair(
        [user("q")], "x is y (z).", "x[1]"
    )


def test_instructions() -> None:
    row = {"instruction": " Translate. ", "input": " Hallo ", "output": " Hello "}
    assert read("instruction", row) == Pair([user("Translate.\n\nHallo")], " Hello", None)
    for nothing in ("", " ", None):
        assert read("instruction", row | {"input": nothing}) == Pair(
            [user("Translate.")], " Hello", None
        )
    assert read("instruction", {"instruction": "Human: Translate.", "output": "Hello"}) == Pair(
        [user("Human: Translate.")], "Hello", None
    )
    assert read("instruction", row | {"output": " "}) == "empty answer"


def test_conversations() -> None:
    turns = [
        message("system", "Be kind."),
        message("user", "a"),
        message("assistant", "b"),
        message("user", "c"),
    ]
    expected = Pair([Turn("system", "Be kind."), user("a"), assistant("b"), user("c")], " d", None)
    assert read("messages", {"messages": [*turns, message("assistant", " d ")]}) == expected
    assert read("messages", {"messages": [*turns, message("assistant", "")]}) == "empty answer"
    named = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert read("messages", {"conversations": named}) == Pair([user("a")], "b", None)


def test_plain_text_is_read_as_it_is() -> None:
    assert read_text({"text": " a\n\nHuman: b\n"}, source("text")) == " a\n\nHuman: b\n"
    assert read_text({"page": {"body": "a"}}, source("text", columns={"text": "page.body"})) == "a"
    for nothing in ({"text": " \n"}, {"text": None}):
        with pytest.raises(Skip, match="empty text"):
            read_text(nothing, source("text"))
    with pytest.raises(ValueError, match="text is a number, not a string"):
        read_text({"text": 3}, source("text"))


# --- fields, columns


@pytest.mark.parametrize(
    "path, expected",
    [
        ("plain", "x"),
        ("question.full_text", "why"),
        ("passages.1.text", "two"),
        ("answers.0", "a"),
        ("answers", ["a"]),
        ("with.dots", "y"),
        ("passages.7.text", None),
        ("none.0.text", None),
        ("empty.0", None),
        ("empty", None),
        ("question.nothing", None),
        ("nothing", None),
        ("passages.0.text.deeper", "passages.0.text.deeper: a string has no deeper"),
        ("passages.first", "passages.first: a list has no first"),
    ],
)
def test_paths_of_columns(path: str, expected: Any) -> None:
    row = {
        "plain": "x",
        "question": {"full_text": "why", "nothing": None},
        "passages": [{"text": "one"}, {"text": "two"}],
        "answers": ["a"],
        "with.dots": "y",
        "none": None,
        "empty": [],
    }
    try:
        assert field(row, source(columns={"chosen": path}), "chosen") == expected
    except ValueError as error:
        assert str(error) == expected


@pytest.mark.parametrize(
    "columns, expected",
    [
        (["prompt", "response", "chosen", "rejected"], "prompt_chosen_rejected"),
        (["prompt", "chosen"], "prompt_chosen_rejected"),
        (["prompt", "completion"], "prompt_chosen_rejected"),
        (["prompt", "completion", "label"], None),
        (["chosen", "rejected"], "chosen_rejected"),
        (["chosen", "rejected", "score_chosen", "score_rejected", "messages"], "chosen_rejected"),
        (["prompt", "answer_a", "answer_b", "score_a", "score_b"], "scored_answers"),
        (["prompt", "prompt_id", "messages"], "messages"),
        (["id", "conversations"], "messages"),
        (["instruction", "output"], "instruction"),
        (["instruction", "input", "output", "text", "prompt"], "instruction"),
        (["text", "meta"], "text"),
        (["prompt"], "prompts"),
        (["data_source", "prompt", "ability", "reward_model", "extra_info"], "prompts"),
        (["question", "answer"], "prompt_chosen_rejected"),
        (["question"], None),
        (["chosen"], None),
        (["question", "reply"], None),
        ([], None),
    ],
)
def test_formats_are_told_from_the_columns(columns: list[str], expected: str | None) -> None:
    assert detect_format(columns) == (Format[expected] if expected else None)


def test_a_detected_format_has_its_columns() -> None:
    for format, (required, optional) in formats.FIELDS.items():
        if format not in WORLDS:
            required = [*required, "ranks"] if format == Format.ranked else required
            for columns in (required, required + optional):
                assert detect_format(columns) == format
                check_columns(columns, source(format.name))


@pytest.mark.parametrize(
    "columns, one, expected",
    [
        (
            ["prompt", "b"],
            source("prompt_chosen_rejected"),
            "format prompt_chosen_rejected needs the columns chosen; there are prompt, b",
        ),
        (
            ["a"],
            source("instruction"),
            "format instruction needs the columns instruction, output; there are a",
        ),
        (
            ["prompt", "b"],
            source("prompt_chosen_rejected", columns={"chosen": "c.0"}),
            "needs the columns c.0; there are prompt, b",
        ),
        (
            ["prompt", "chosen"],
            source("prompt_chosen_rejected", columns={"rejected": "c"}),
            "needs the columns c; there are prompt, chosen",
        ),
        (
            ["text"],
            source("text", columns={"txt": "text"}),
            "format text has no field txt, only text",
        ),
    ],
)
def test_columns_that_are_missing_are_named_with_those_there_are(
    columns: list[str], one: Source, expected: str
) -> None:
    with pytest.raises(ValueError) as error:
        check_columns(columns, one)
    assert expected in str(error.value)

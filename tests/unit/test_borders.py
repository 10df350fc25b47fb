"""What users' data bring: nothing of it is dropped, or taken for something else, in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from format_rows import assistant, message, read_row, source, user
from prepared_data import config

from rlhf.base.errors import UserError
from rlhf.config.choices import Format
from rlhf.config.schema import Source
from rlhf.config.validation import check_used
from rlhf.data import load, tokenized
from rlhf.data.formats.fields import unread_columns
from rlhf.data.load import table_of
from rlhf.data.records import Pair, Turn
from rlhf.data.sources import load_sources

pytestmark = pytest.mark.usefixtures("cache")


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def summary(**sources: Source) -> str:
    return load.summarize(load_sources(config(**sources)))


# --- what comes before the question


def test_system_and_history_come_before_the_question() -> None:
    row = {"instruction": "c", "output": "d", "system": " Rhyme. ", "history": [["a", "b"]]}
    turns = [Turn("system", "Rhyme."), user("a"), assistant("b"), user("c")]
    assert read_row(row, source()) == Pair(turns, "d", None)
    conversation = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    read = read_row({"system": "Rhyme.", "conversations": conversation}, source())
    assert read == Pair([Turn("system", "Rhyme."), user("a")], "b", None)
    same = [message("system", "Rhyme."), message("user", "a")]
    read = read_row({"system": "Rhyme.", "prompt": same, "chosen": "b"}, source())
    assert read.prompt == [Turn("system", "Rhyme."), user("a")], "it is there only once"


def test_a_column_that_another_field_has_is_not_read_twice() -> None:
    row = {"history": "How?", "human_ref_A": "So."}
    mapped = source(
        "prompt_chosen_rejected", columns={"prompt": "history", "chosen": "human_ref_A"}
    )
    assert read_row(row, mapped) == Pair([user("How?")], "So.", None)


@pytest.mark.parametrize("role, known", [("developer", "system"), ("model", "assistant")])
def test_other_names_of_the_roles(role: str, known: str) -> None:
    turns = [message("user", "a"), message(role, "b"), message("user", "c")]
    read = read_row({"prompt": turns, "chosen": "d"}, source())
    assert read.prompt == [user("a"), Turn(known, "b"), user("c")]


def test_a_whole_dialogue_beside_its_prompt_is_its_last_answer() -> None:
    prompt = "\n\nHuman: q\n\nAssistant:"
    row = {"prompt": prompt, "chosen": f"{prompt} a", "rejected": f"{prompt} b"}
    assert read_row(row, source()) == Pair([user("q")], "a", "b")
    other = row | {"chosen": "\n\nHuman: r\n\nAssistant: a"}
    with pytest.raises(
        ValueError, match="turns of chosen before its last answer are not the prompt"
    ):
        read_row(other, source())


def test_history_is_read_only_where_the_format_has_it() -> None:
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    row = {"conversations": talk, "history": "imported 2024"}
    assert read_row(row, source()) == Pair([user("a")], "b", None)
    assert unread_columns([row], source("messages")) == ["history"]


def test_two_system_turns_contradict_each_other() -> None:
    row = {
        "prompt": "q",
        "system": "Short.",
        "chosen": "a",
        "history": [message("system", "Long."), message("user", "b"), message("assistant", "c")],
    }
    with pytest.raises(ValueError, match="the prompt begins with two system turns"):
        read_row(row, source())


def test_the_format_is_that_of_all_first_lines(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p 0"},
        *({"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(1, 200)),
    ]
    data = load_sources(config(mine=Source(path=write(tmp_path / "a.jsonl", rows))))
    assert len(data.rm) > 50 and len(data.sft) > 20


# --- what is not read


def test_columns_and_parts_of_messages_that_nobody_reads_are_named(tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "weight": 0, "reasoning_content": "hm"},
    ]
    rows = [{"id": i, "messages": talk, "tools": "[]", "score": None} for i in range(3)]
    unread = ["id", "messages[].name", "messages[].reasoning_content", "tools"]
    assert unread_columns(rows, source("messages")) == unread
    talks = [
        {
            "system": f"No. {i}",
            "tools": "[]",
            "messages": [message("user", f"q {i}"), message("assistant", "a")],
        }
        for i in range(40)
    ]
    path = write(tmp_path / "talks.jsonl", talks)
    line = "  columns not read, except by reward functions: tools"
    assert line in summary(mine=Source(path=path)).splitlines()


def test_reasons_of_unreadable_rows_are_counted(tmp_path: Path) -> None:
    good = [{"prompt": f"q {i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w"}}]}
    back = message("tool", "7")
    tools = [{"prompt": [message("user", f"t {i}"), call, back], "chosen": "a"} for i in range(3)]
    other = [
        {"prompt": f"q {i}", "chosen": [message("user", f"r {i}"), message("assistant", "a")]}
        for i in range(2)
    ]
    lines = summary(
        mine=Source(path=write(tmp_path / "a.jsonl", good + tools + other))
    ).splitlines()
    assert lines[0].endswith("skipped: 5 unreadable")
    assert lines[2:] == [
        f"  3 unreadable, the first: line 41 of {tmp_path}/a.jsonl: messages of or for tools need"
        " data.template=tokenizer",
        f"  2 unreadable, the first: line 44 of {tmp_path}/a.jsonl: the turns of chosen before its"
        " last answer are not the prompt",
    ]


def test_answers_marked_good_or_bad_are_refused_with_what_to_do(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": i % 2 == 0} for i in range(4)]
    with pytest.raises(UserError, match=r"\(KTO\).* for SFT keep the good ones and remove"):
        load_sources(config(mine=Source(path=write(tmp_path / "kto.jsonl", rows))))


# --- prompts without answers


@pytest.mark.parametrize(
    "row",
    [
        lambda i: {"prompt": f"q {i}"},
        lambda i: {"messages": [message("user", f"q {i}")]},
        lambda i: {"prompt": [message("user", f"q {i}")], "reward_model": {"ground_truth": "1"}},
    ],
    ids=["prompt", "messages", "verl"],
)
def test_prompts_without_answers_are_for_online_rl(tmp_path: Path, row: Any) -> None:
    path = write(tmp_path / "prompts.jsonl", [row(i) for i in range(200)])
    data = load_sources(config(mine=Source(path=path)))
    assert (len(data.sft), len(data.rm), len(data.eval_sft), len(data.eval_rm)) == (0, 0, 0, 0)
    assert len(data.ppo) + len(data.eval_prompts) == 200 and data.eval_prompts


def test_a_prompt_that_another_source_answers_is_not_in_two_parts(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q {i}", "chosen": "a", "rejected": "b"} for i in range(200)]
    prompts = [{"prompt": f"q {i}"} for i in range(200)]
    data = load_sources(
        config(
            pairs=Source(path=write(tmp_path / "pairs.jsonl", pairs)),
            prompts=Source(path=write(tmp_path / "prompts.jsonl", prompts)),
        )
    )
    texts = [
        {turn["text"] for row in part for turn in row["prompt"]}
        for part in (data.sft, data.rm, data.ppo)
    ]
    texts.append({prompt.turns[-1].text for prompt in data.eval_prompts})
    assert sum(map(len, texts)) == len(set.union(*texts)) == 200


def test_demonstrations_without_pairs_leave_nothing_to_the_reward_model(tmp_path: Path) -> None:
    rows = [
        {"messages": [message("user", f"q {i}"), message("assistant", "a")]} for i in range(500)
    ]
    data = load_sources(config(mine=Source(path=write(tmp_path / "talks.jsonl", rows))))
    (report,) = data.report
    assert not report["skipped"] and len(data.rm) == 0
    # 2 + 4 of 10 parts, and 4 of 10
    assert len(data.sft) / (len(data.sft) + len(data.ppo)) == pytest.approx(0.6, abs=0.08)


def test_prompts_without_an_answer_are_no_demonstrations(tmp_path: Path) -> None:
    rows = [
        {"messages": [message("user", f"q {i}"), *[message("assistant", "a")] * (i % 2)]}
        for i in range(200)
    ]
    one = Source(path=write(tmp_path / "talks.jsonl", rows), sft_only=True)
    data = load_sources(config(mine=one))
    assert set(data.sft["chosen"]) == {"a"} and len(data.ppo) == 0
    assert data.report[0]["skipped"]["no answer"] + len(data.sft) + data.report[0]["eval"] == 200


def test_a_share_may_be_0(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q {i}", "chosen": "a", "rejected": "b"} for i in range(200)]
    data_config = config(mine=Source(path=write(tmp_path / "pairs.jsonl", pairs)))
    data_config.shares = [0, 1, 0]
    data = load_sources(data_config)
    assert (len(data.sft), len(data.ppo)) == (0, 0) and len(data.rm) > 150


# --- settings of a source


def test_a_file_is_evaluated_on_another_file(tmp_path: Path) -> None:
    train = [{"prompt": f"q {i}", "chosen": "a"} for i in range(40)]
    held_out = [{"prompt": f"h {i}", "chosen": "a"} for i in range(5)]
    one = Source(
        path=write(tmp_path / "a.jsonl", train), eval_split=write(tmp_path / "b.jsonl", held_out)
    )
    data = load_sources(config(mine=one))
    asked = sorted(prompt.turns[-1].text for prompt in data.eval_prompts)
    assert asked == [f"h {i}" for i in range(5)]


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"eval_split": "test"},
            "eval_split=test: no such file; .* is another file, folder or pattern",
        ),
        ({"split": "validation"}, "split=validation: .* is a file; it has none"),
        ({"config": "en"}, "config=en: .* is a file; it has none"),
    ],
)
def test_settings_that_a_file_does_not_have_are_refused(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a"}])
    with pytest.raises(UserError, match=rf"data\.sources\.mine\.{said}"):
        load_sources(config(mine=Source(path=path, **settings)))


def test_prompts_that_lose_their_first_turns_are_counted(tokenizer: Any) -> None:
    long = [Turn("system", "Rhyme."), user("a " * 60), assistant("b"), user("c")]
    table = table_of([Pair(long, "d", None), Pair([user("c")], "d", None)])
    rows = tokenized.demonstrations(tokenizer, table, 40, 10)
    assert str(rows) == "2 demonstrations (1 lost their first turns)"
    assert "Rhyme." in tokenizer.decode(rows[0][0]) and "a a" not in tokenizer.decode(rows[0][0])


TEXT, PROMPT, PAIR = {"text": "t"}, {"prompt": "q"}, {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    "row, format, settings, said",
    [
        (PAIR, "prompt_chosen_rejected", {"min_score_ratio": 2.0}, "min_score_ratio=2.0"),
        (TEXT, "text", {"weight": 0.5}, "weight=0.5"),
        (TEXT, "text", {"sft_only": True}, "sft_only=true"),
        (TEXT, "text", {"eval_split": __file__}, f"eval_split={__file__}"),
        (PROMPT, "prompts", {"sft_only": True}, "sft_only=true"),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "detected"])
def test_keys_that_a_format_does_not_use_are_refused(
    tmp_path: Path, row: Any, format: str, settings: dict[str, Any], said: str, given: bool
) -> None:
    one = Source(path=write(tmp_path / "a.jsonl", [row]), **settings)
    line = f"data.sources.mine.{said}: format={format} does not use it; leave it out"
    if given:
        one.format = Format[format]
        assert list(check_used("mine", one)) == [line]
    with pytest.raises(UserError) as error:
        load_sources(config(mine=one))
    assert str(error.value) == line


def test_every_key_of_a_source_is_used_or_refused() -> None:
    """The built-in data have none; a weight of prompts that only repeats them has no effect."""
    values = {
        "columns": {"prompt": "a"},
        "config": "en",
        "split": "dev",
        "eval_split": "dev",
        "weight": 2.0,
        "rows": 3,
        "sft_only": True,
        "system_prompt": "Be brief.",
        "min_score_ratio": 2.0,
    }
    sandbox = Source(path="builtin:sandbox", format=Format.sandbox, **values)
    assert [line.split("=")[0].split(".")[-1] for line in check_used("s", sandbox)] == list(values)
    assert {"path", "format", *values} == {field.name for field in dataclasses.fields(Source)}
    used = {key: value for key, value in values.items() if key != "columns"}
    assert not list(check_used("s", Source(path="x", format=Format.scored_answers, **used)))
    (line,) = check_used("s", Source(path="x", format=Format.prompts, weight=2.0))
    assert line.startswith("data.sources.s.weight=2: online RL takes each prompt once; leave it")
    assert not list(check_used("s", Source(path="x", format=Format.prompts, weight=0.5)))

"""Layouts of rows that people bring: what is read of them, and the lines that are printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import Record, jsonl
from dialogues import own
from format_rows import assistant, message, source, user
from prepared_data import config

from rlhf.base.errors import UserError
from rlhf.config.choices import Template
from rlhf.data import encoding, template, tokenized
from rlhf.data.formats.rows import Skip, read_pairs
from rlhf.data.load import summarize
from rlhf.data.records import Dataset, Pair, Turn
from rlhf.data.sources import load_sources
from rlhf.models.loading import load_tokenizer

pytestmark = pytest.mark.usefixtures("cache")

SILENT = (  # writes neither tools nor calls
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALKATIVE = (
    "{% if tools %}{{ '<tools>' + (tools | tojson) + '</tools>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls %}{{ '<call>' + (call.function | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
OSLO = {"name": "weather", "arguments": {"city": "Oslo"}}


def one(row: Record, style: Template = Template.hh) -> Pair:
    [pair] = read_pairs(row, source(), style)
    return pair


def loaded(file: Path, style: Template = Template.hh) -> Dataset:
    cfg = config(mine=file)
    cfg.template = style
    return load_sources(cfg)


def said(file: Path, style: Template = Template.hh) -> list[str]:
    return summarize(loaded(file, style)).splitlines()


def calls_of(pair: Pair, place: int) -> Any:
    """The calls of a turn of the prompt; -1: of the answer."""
    turn = pair.prompt[place] if place >= 0 else Turn("assistant", pair.chosen, pair.calls)
    return template.message_of(turn).get("tool_calls")


# --- tools


def test_sharegpt_with_a_call_and_an_observation() -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Cold in Oslo?"},
            {"from": "function_call", "value": json.dumps(OSLO)},
            {"from": "observation", "value": '{"degrees": -7}'},
            {"from": "gpt", "value": "Yes."},
        ],
        "tools": json.dumps([WEATHER]),
        "system": "Be brief.",
    }
    pair = one(row, Template.tokenizer)
    roles = [turn.role for turn in pair.prompt]
    assert roles == ["tools", "system", "user", "assistant", "tool"] and pair.chosen == "Yes."
    assert calls_of(pair, 3) == [{"type": "function", "function": OSLO}]
    with pytest.raises(ValueError, match="^messages of or for tools need data.template=tokenizer$"):
        one(row)


def test_openai_calls_with_arguments_in_a_string() -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    row = {
        "messages": [
            message("developer", "Be brief."),
            message("user", "Cold in Oslo?"),
            message("assistant", None) | {"tool_calls": [call]},
            message("tool", "-7") | {"tool_call_id": "call_1"},
            message(
                "assistant", [{"type": "text", "text": "Yes, "}, {"type": "text", "text": "-7."}]
            ),
        ],
        "tools": [WEATHER],
    }
    pair = one(row, Template.tokenizer)
    assert pair.prompt[1] == Turn("system", "Be brief.")
    assert calls_of(pair, 3) == [{"id": "call_1", "type": "function", "function": OSLO}]
    assert template.message_of(pair.prompt[4])["tool_call_id"] == "call_1"
    assert pair.chosen == "Yes, -7."


def test_a_conversation_that_ends_with_a_call(tmp_path: Path) -> None:
    """As xLAM's, with the calls as a list in a string, after renaming its columns."""
    calls = [{"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
    row = {
        "tools": json.dumps([WEATHER["function"]]),
        "messages": [
            message("user", "Cold in Oslo or Rome?"),
            {"role": "assistant", "tool_calls": calls},
        ],
    }
    pair = one(row, Template.tokenizer)
    assert pair.chosen == ""
    assert calls_of(pair, -1) == [{"type": "function", "function": call} for call in calls]
    tokenizer = own(tmp_path, TALKATIVE)
    [ids] = encoding.encode_responses(tokenizer, [""], 999, [pair.prompt], [pair.calls])
    written = "".join(f"<call>{json.dumps(call)}" for call in calls)
    assert tokenizer.decode(ids) == written + "<|im_end|>"


@pytest.mark.parametrize(
    "chat_template, problem",
    [(TALKATIVE, ""), (SILENT, "the chat template does not write messages of tools")],
)
@pytest.mark.parametrize("part", ["tools", "call", "result"])
def test_each_part_of_tools_must_be_written(
    tmp_path: Path, chat_template: str, problem: str, part: str
) -> None:
    call = Turn("assistant", "", json.dumps({"tool_calls": [{"function": OSLO}]}))
    turns = {
        "tools": [Turn("tools", json.dumps([WEATHER])), user("Cold?")],
        "call": [user("Cold?"), call, user("And now?")],
        "result": [user("Cold?"), Turn("tool", "minus 7")],
    }[part]
    tokenizer = own(tmp_path, chat_template)
    expected = "" if part == "result" else problem  # both write any role
    assert template.problem_of_tools(tokenizer, turns) == expected
    assert template.problem_of_tools(tokenizer, [user("Cold?"), assistant("Yes.")]) == ""


def test_the_column_tools_alone_is_named_or_read(tmp_path: Path) -> None:
    rows = [
        {
            "tools": json.dumps([WEATHER]),
            "messages": [message("user", f"q {n}"), message("assistant", "a")],
        }
        for n in range(40)
    ]
    file = jsonl(tmp_path / "a.jsonl", rows)
    line = "  columns not read, except by reward functions: tools"
    assert said(file)[1:] == [line, "  tools are read with data.template=tokenizer"]
    assert said(file, Template.tokenizer)[1:] == []
    table = loaded(file, Template.tokenizer).sft
    done = tokenized.demonstrations(own(tmp_path / "own", SILENT), table, 999, 999)
    reason = "the chat template does not write messages of tools"
    assert str(done) == f"0 demonstrations ({len(table)} skipped: {reason})"


# --- answers and prompts


def test_numbers_as_answers_in_a_csv(tmp_path: Path) -> None:
    lines = [f"How much is {n} + 1?,{n + 1},easy" for n in range(60)]
    file = tmp_path / "sums.csv"
    file.write_text("question,answer,level\n" + "\n".join(lines) + "\n")
    data = loaded(file)
    line = "  columns not read, except by reward functions: level"
    assert summarize(data).splitlines()[1:] == [line]
    for row in data.sft:
        number = int(row["prompt"][0]["text"].split()[3])
        assert row["chosen"] == str(number + 1)
    assert json.loads(data.ppo[0]["columns"]).keys() == {"answer", "level"}


def test_prompts_with_a_ground_truth(tmp_path: Path) -> None:
    rows = [
        {
            "data_source": "sums",
            "prompt": [message("user", f"{n} + 1?")],
            "reward_model": {"style": "rule", "ground_truth": str(n + 1)},
            "extra_info": {"index": n},
        }
        for n in range(60)
    ]
    data = loaded(jsonl(tmp_path / "a.jsonl", rows))
    first, line = summarize(data).splitlines()
    assert (
        first == f"mine/train: 60 rows: sft 0, rm 0, ppo {len(data.ppo)}, eval {60 - len(data.ppo)}"
    )
    assert line == (
        "  columns not read, except by reward functions: data_source, reward_model, extra_info"
    )
    for row in data.ppo:
        number = int(row["prompt"][0]["text"].split()[0])
        assert json.loads(row["columns"])["reward_model"]["ground_truth"] == str(number + 1)


def test_completions_of_raw_text_keep_their_white_space() -> None:
    row = {"prompt": "SUBREDDIT: r/x\nPOST: long\nTL;DR:", "completion": "   short\n"}
    assert one(row, Template.none) == Pair([user(row["prompt"])], "   short\n", None)
    assert one(row).chosen == "   short", "the indentation stays in each style"
    tokenizer = load_tokenizer("builtin:tiny", Template.none)
    [ids] = encoding.encode_responses(tokenizer, ["   short\n"], 99, [[user("x")]])
    assert tokenizer.decode(ids) == "   short\n" + tokenizer.eos_token


def test_prompts_as_messages_are_not_raw_text() -> None:
    row = {"prompt": [message("user", "q")], "chosen": "a"}
    line = "^prompt is a list, not a string: data.template=none has no roles$"
    with pytest.raises(ValueError, match=line):
        one(row, Template.none)


def test_ranked_answers_of_a_dialogue() -> None:
    """Nectar: the prompt is a dialogue in one string, the answers are objects with a rank."""
    answers = [{"answer": f"a {n}", "model": "m", "rank": float(n)} for n in (2, 1, 3)]
    row: Record = {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": answers, "turns": 1}
    columns = {"responses": "answers.*.answer", "ranks": "answers.*.rank"}
    found = read_pairs(row, source("ranked", columns=columns))
    assert [(pair.chosen, pair.rejected) for pair in found] == [
        ("a 1", "a 2"),
        ("a 1", "a 3"),
        ("a 2", "a 3"),
    ]
    assert all(pair.prompt == [user("q")] for pair in found)


def test_answers_marked_good_or_bad(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}", "completion": "a", "label": n % 2 == 0} for n in range(9)]
    file = jsonl(tmp_path / "kto.jsonl", rows)
    with pytest.raises(UserError) as raised:
        loaded(file)
    assert str(raised.value) == (
        f"data.sources.mine: {file} has prompt, completion, label (KTO): single answers that are "
        "good or bad, which no stage trains on; for SFT keep the good ones and remove the column "
        "label, or make pairs of them"
    )


# --- what comes before the question


@pytest.mark.parametrize(
    "row, line",
    [
        (
            {"system": "Short.", "prompt": [message("system", "Long."), message("user", "q")]},
            "system is not the system's turn of the conversation",
        ),
        (
            {"system": "Short.", "history": [message("system", "Long.")], "prompt": "q"},
            "the prompt begins with two system turns",
        ),
        (
            {"history": "before", "prompt": "q"},
            "history is a string, not a list of [question, answer]",
        ),
        ({"history": [["a"]], "prompt": "q"}, "history.0 is not [question, answer]"),
        (
            {"prompt": "q", "chosen": [message("user", "other"), message("assistant", "a")]},
            "the turns of chosen before its last answer are not the prompt",
        ),
        (
            {"prompt": [message("user", [{"type": "image", "url": "x"}])]},
            "prompt.0.content.0 is image, not a part of type text",
        ),
    ],
)
def test_rows_that_contradict_themselves(row: Record, line: str) -> None:
    with pytest.raises(ValueError) as raised:
        one({"chosen": "a", **row})
    assert str(raised.value) == line and not isinstance(raised.value, Skip)


def test_a_very_long_system_turn_is_not_cut() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    turns = [Turn("system", "Speak French. " * 50), user("One?"), assistant("Un."), user("Two?")]
    assert encoding.fit_prompts(tokenizer, [turns], 60) == [(None, True)]
    [whole] = encoding.encode_prompts(tokenizer, [[turns[0], turns[-1]]], 9999)
    assert whole is not None
    assert encoding.fit_prompts(tokenizer, [turns], len(whole)) == [(whole, True)]


# --- files


def test_line_ends_and_byte_order_mark_of_windows(tmp_path: Path) -> None:
    rows = [{"prompt": f"q {n}\r\nnext", "chosen": "a\r\nb", "rejected": "c"} for n in range(20)]
    file = tmp_path / "windows.jsonl"
    text = "\r\n".join(json.dumps(row) for row in rows) + "\r\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = loaded(file)
    assert data.report[0]["skipped"] == {} and data.report[0]["rows"] == 20
    csv = tmp_path / "windows.csv"
    csv.write_bytes(b"\xef\xbb\xbfprompt,chosen,rejected\r\n" + b"q,a,b\r\nr,a,b\r\ns,a,b\r\n")
    assert loaded(csv).report[0]["skipped"] == {}


def test_a_broken_line_in_the_second_shard_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = [{"prompt": f"q {n}", "chosen": "a", "rejected": "b"} for n in range(40)]
    jsonl(folder / "part-0.jsonl", rows[:20])
    second = jsonl(folder / "part-1.jsonl", rows[20:])
    lines = second.read_text().splitlines()
    lines[4] = lines[4][:-3]
    second.write_text("\n".join(lines) + "\n")
    (folder / "README.md").write_text("About.")
    first, *others = said(folder)
    assert first.startswith("mine/train: 40 rows: sft ") and first.endswith(
        "; skipped: 1 unreadable"
    )
    assert others[:2] == ["  files: part-0.jsonl, part-1.jsonl", "  not read: README.md"]
    assert others[2].startswith(
        f"  first unreadable row: data.sources.mine: line 5 of {second}: not JSON ("
    )


# --- every answer of a conversation


def test_every_answer_of_a_conversation_is_a_demonstration(tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                message(role, f"{role} {turn} of {n}")
                for turn in range(3)
                for role in ("user", "assistant")
            ]
        }
        for n in range(30)
    ]
    table = loaded(jsonl(tmp_path / "a.jsonl", rows)).sft
    tokenizer = load_tokenizer("builtin:tiny")
    done = tokenized.demonstrations(tokenizer, table, 999, 999, every_answer=True)
    assert len(done) == 3 * len(table)
    number = table[0]["prompt"][0]["text"].split()[-1]
    shown = [tuple(tokenizer.decode(ids) for ids in row) for row in done[:3]]
    for turn, (prompt, answer) in enumerate(shown):
        assert answer == f" assistant {turn} of {number}{tokenizer.eos_token}"
        assert prompt.endswith(f"\n\nHuman: user {turn} of {number}\n\nAssistant:")
        assert prompt.count("Human:") == turn + 1

"""Conversations with tools, raw text, and the loss on every answer of a conversation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import jsonl
from dialogues import own
from helpers import composed

from rlhf.base.errors import UserError
from rlhf.config.choices import Format, Precision, Template
from rlhf.config.schema import Source
from rlhf.data import encoding, template, tokenized
from rlhf.data.formats.rows import parse_line, read_pairs
from rlhf.data.load import load_data
from rlhf.data.records import Dataset, Demonstration, Pair, SourceReport, Turn
from rlhf.data.template_check import check_template, first_rows
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.runs.checks import check_inputs
from rlhf.training.likelihood import response_nll_stats

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = (  # as Qwen's
    "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for tool in tools %}"
    "{{ ' ' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls %}{{ '<call>' + call.function.name + ' ' +"
    " (call.function.arguments | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_TOOLS = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
READ_CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it cold in Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": '{"degrees": -7}', "name": "weather"},
    {"role": "assistant", "content": "Yes, -7 degrees."},
]
TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four!"},
]


def talk(messages: list[dict[str, Any]], style: Template = Template.tokenizer) -> Pair:
    row: dict[str, Any] = {"messages": messages, "tools": TOOLS}
    [pair] = read_pairs(row, Source(path="x", format=Format.messages), style)
    return pair


def for_sft(file: Path, style: str) -> Dataset:
    """The data of a file, all for SFT."""
    cfg = composed("data=jsonl", f"data.sources.mine.path={file}", f"data.template={style}")
    cfg.data.shares, cfg.data.eval_share = [1, 0, 0], 1e-9
    return load_data(cfg.data)


@pytest.fixture
def tokenizer_with(tmp_path: Path) -> Callable[[str], Any]:
    return lambda chat_template: own(tmp_path / "own", chat_template)


# --- tools


def test_tools_become_turns_that_only_a_models_own_template_reads() -> None:
    pair = talk(TALK)
    assert [turn.role for turn in pair.prompt] == ["tools", "user", "assistant", "tool"]
    assert json.loads(pair.prompt[0].text) == TOOLS
    called = template.message_of(pair.prompt[2])
    assert called["content"] == "" and called["tool_calls"] == [READ_CALL]
    assert (pair.chosen, pair.calls) == ("Yes, -7 degrees.", "")
    with pytest.raises(ValueError, match=r"messages of or for tools need data.template=tokenizer"):
        talk(TALK, Template.chatml)
    assert talk([TALK[0], TALK[3]], Template.chatml).prompt == [Turn("user", "Is it cold in Oslo?")]


def test_sharegpt_has_calls_and_results_as_roles_of_their_own() -> None:
    given = [
        {"from": "human", "value": "Is it cold in Oslo?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": '{"degrees": -7}'},
        {"from": "gpt", "value": "Yes, -7 degrees."},
    ]
    row: dict[str, Any] = {"conversations": given, "tools": json.dumps(TOOLS)}
    [pair] = read_pairs(row, Source(path="x"), Template.tokenizer)
    assert template.message_of(pair.prompt[2])["tool_calls"] == [{"type": "function"} | READ_CALL]
    texts = [json.dumps(TOOLS), "Is it cold in Oslo?", "", '{"degrees": -7}']
    assert [turn.text for turn in pair.prompt] == texts


def test_a_conversation_with_tools_is_trained_on_as_its_template_writes_it(
    tokenizer_with: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_with(WITH_TOOLS)
    messages = [dict(message) for message in TALK]
    messages[1] = {"role": "assistant", "content": "", "tool_calls": [READ_CALL]}
    for n in (2, 4):  # ends with the call, and with the answer
        pair = talk(TALK[:n])
        demonstration = Demonstration(pair.prompt, pair.chosen, pair.calls)
        [(prompt, response)] = encoding.encode_demonstrations(tokenizer, [demonstration], 999, 999)
        whole = tokenizer.apply_chat_template(messages[:n], tools=TOOLS, tokenize=False)
        assert tokenizer.decode(prompt + response) + "\n" == whole
        assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response) == "Yes, -7 degrees.<|im_end|>"


@pytest.mark.parametrize(
    "chat_template, why",
    [
        (CHATML, "the chat template does not write messages of tools"),
        (NO_TOOLS, "the chat template refuses messages of tools"),
        (WITH_TOOLS, ""),
    ],
)
def test_a_template_that_cannot_express_tools_skips_the_row(
    tmp_path: Path, tokenizer_with: Callable[[str], Any], chat_template: str, why: str
) -> None:
    tokenizer = tokenizer_with(chat_template)
    plain = {"messages": [{"role": "user", "content": "Hi"}, TALK[3]]}
    file = jsonl(tmp_path / "talks.jsonl", [{"messages": TALK, "tools": TOOLS}, plain])
    table = for_sft(file, "tokenizer").sft
    done = tokenized.demonstrations(tokenizer, table, 999, 999)
    assert len(done) == (1 if why else 2) and done.reasons == ({why: 1} if why else {})
    assert str(done) == (f"1 demonstrations (1 skipped: {why})" if why else "2 demonstrations")
    prompts = [[Turn(**turn) for turn in row["prompt"]] for row in table]
    fitted = encoding.encode_prompts(tokenizer, prompts, 999)
    assert sum(ids is None for ids in fitted) == (1 if why else 0)


def test_a_tool_that_is_only_named_is_looked_for_by_its_name(
    tokenizer_with: Callable[[str], Any],
) -> None:
    turns = [Turn("tools", json.dumps([{"function": "weather"}, {"name": 7}])), Turn("user", "?")]
    assert template.problem_of_tools(tokenizer_with(WITH_TOOLS), turns) == ""
    wrong = "the chat template does not write messages of tools"
    assert template.problem_of_tools(tokenizer_with(CHATML), turns) == wrong


def test_a_cut_conversation_keeps_its_tools(tokenizer_with: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_with(WITH_TOOLS)
    turns = [*talk(TALK).prompt, Turn("assistant", "Yes."), Turn("user", "And in Rome?")]
    [alone] = encoding.encode_prompts(tokenizer, [[turns[0], turns[-1]]], 999)
    assert alone is not None
    assert encoding.encode_prompts(tokenizer, [turns], len(alone) + 5) == [alone]


def test_a_call_that_names_no_function_is_unreadable() -> None:
    broken = [TALK[0], {"role": "assistant", "tool_calls": [{"arguments": "{}"}]}]
    with pytest.raises(ValueError, match=r"messages.1: a call of a tool needs the name"):
        talk(broken)
    with pytest.raises(ValueError, match=r"messages.1: tool_calls is a string, not a list"):
        talk([TALK[0], {"role": "assistant", "tool_calls": "weather"}])


@pytest.mark.parametrize("arguments", ["not json {", "[1, 2]", 5])
def test_arguments_of_a_call_are_an_object(arguments: Any) -> None:
    called = {"function": {"name": "weather", "arguments": arguments}}
    with pytest.raises(ValueError, match=r"messages.1: the arguments of weather are no JSON obj"):
        talk([TALK[0], {"role": "assistant", "tool_calls": [called]}])
    for nothing in ("", "{}", None):
        called["function"]["arguments"] = nothing
        pair = talk([TALK[0], {"role": "assistant", "tool_calls": [called]}])
        assert json.loads(pair.calls)["tool_calls"][0]["function"]["arguments"] == {}


def test_definitions_of_tools_are_objects() -> None:
    row: dict[str, Any] = {"messages": [TALK[0], TALK[3]], "tools": ["hammer"]}
    with pytest.raises(ValueError, match=r"tools.0 is a string, not an object"):
        read_pairs(row, Source(path="x"), Template.tokenizer)


def test_a_key_that_is_there_twice_is_unreadable() -> None:
    assert parse_line('{"a": {"b": 1}, "c": 2}') == {"a": {"b": 1}, "c": 2}
    with pytest.raises(ValueError, match="^the key b is there twice"):
        parse_line('{"a": [{"b": 1, "c": 2, "b": 3}]}')


# --- raw text


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_raw_text_needs_a_prompt(prompt: str) -> None:
    for row in ({"prompt": prompt, "response": "a"}, {"prompt": prompt}):
        with pytest.raises(ValueError, match="^prompt is empty$"):
            read_pairs(row, Source(path="x"), Template.none)


def test_raw_prompts_may_stand_alone() -> None:
    [pair] = read_pairs({"prompt": "<u> 2 + 2?", "truth": "4"}, Source(path="x"), Template.none)
    assert pair.prompt == [Turn("user", "<u> 2 + 2?")] and not pair.chosen
    assert json.loads(pair.columns) == {"truth": "4"}


def test_raw_text_is_kept_as_it_is() -> None:
    question, answer = "\n\nHuman: Sum it.\nTL;DR:", "  a cat \n"
    row: dict[str, Any] = {"prompt": question, "completion": answer}
    [pair] = read_pairs(row, Source(path="x"), Template.none)
    assert pair == Pair([Turn("user", question)], answer, None)
    tokenizer = load_tokenizer("builtin:tiny", Template.none)
    [(prompt, response)] = encoding.encode_demonstrations(
        tokenizer, [Demonstration(pair.prompt, pair.chosen)], 999, 999
    )
    bos = tokenizer.bos_token if prompt[0] == tokenizer.bos_token_id else ""
    assert tokenizer.decode(prompt) == bos + question
    assert tokenizer.decode(response) == answer + tokenizer.eos_token
    assert template.stop_strings(tokenizer) == []
    assert encoding.decode_response(tokenizer, response) == "  a cat"


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": [TURNS[0]], "chosen": "a"}, "prompt is a list, not a string"),
        ({"messages": []}, "template=none reads format prompt_chosen_rejected or prompts, not mes"),
        ({"prompt": "q", "chosen": "a", "system": "s"}, "has no roles, so nowhere to write system"),
    ],
)
def test_raw_text_has_no_roles(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_pairs(row, Source(path="x"), Template.none)


# --- the loss on every answer


def test_every_answer_is_a_demonstration_with_the_turns_before_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("builtin:tiny", Template.chatml)
    table = for_sft(jsonl(tmp_path / "talks.jsonl", [{"messages": TURNS}]), "chatml").sft
    last = tokenized.demonstrations(tokenizer, table, 99, 99)
    every = tokenized.demonstrations(tokenizer, table, 99, 99, every_answer=True)
    assert (len(last), len(every)) == (1, 2) and every[1] == last[0]
    shown = tuple(tokenizer.decode(ids) for ids in every[0])
    question = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    assert shown == (question, "Two.<|im_end|>")


def test_the_loss_on_every_answer_is_that_of_one_pass_over_the_conversation() -> None:
    """Against one forward pass over all turns with a mask on the answers and their EOS."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("builtin:tiny", Template.chatml)
    policy = load_policy("builtin:tiny", tokenizer, Precision.fp32)
    turns = [Turn(message["role"], message["content"]) for message in TURNS]
    rows = [
        (
            encoding.encode_prompts(tokenizer, [turns[:n]], 99)[0] or [],
            encoding.encode_response(tokenizer, turns[n].text, True),
        )
        for n in (1, 3)
    ]
    loss, _, _ = response_nll_stats(policy, rows, tokenizer.pad_token_id)
    (first_prompt, first), (second_prompt, second) = rows
    whole = torch.tensor([second_prompt + second])
    logprobs = policy.hf(whole).logits[0, :-1].float().log_softmax(-1)
    at = logprobs.gather(1, whole[0, 1:, None])[:, 0]
    begin = len(first_prompt)
    assert second_prompt[: begin + len(first)] == first_prompt + first
    places = [*range(begin, begin + len(first)), *range(len(second_prompt), whole.shape[1])]
    expected = -sum(float(at[place - 1]) for place in places)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


# --- the check of the first rows


def test_first_rows_of_each_source_are_checked() -> None:
    def report(sft: int | None) -> SourceReport:
        one = SourceReport(source="a", split="train", rows=99, skipped={})
        if sft is not None:
            one["sft"] = sft
        return one

    reports = [report(20), report(None), report(2), report(30)]
    assert list(first_rows(reports, "sft")) == [*range(8), 20, 21, *range(22, 30)]


def test_training_on_another_text_than_the_templates_is_refused(
    tmp_path: Path, tokenizer_with: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_with(CHATML)
    data = for_sft(jsonl(tmp_path / "talks.jsonl", [{"messages": TURNS}]), "tokenizer")
    check_template(tokenizer, data.sft, data.report, "sft")
    encode = encoding.encode_responses

    def with_a_question_mark(tokenizer: Any, answers: list[str], *rest: Any) -> list[list[int]]:
        return encode(tokenizer, [text + "?" for text in answers], *rest)

    monkeypatch.setattr(encoding, "encode_responses", with_a_question_mark)
    with pytest.raises(UserError) as raised:
        check_template(tokenizer, data.sft, data.report, "sft")
    line = str(raised.value)
    assert "Four!?<|im_end|>" in line and "instead of" in line
    assert line.endswith("choose another data.template (hh, chatml, llama3 or none)")


def test_a_missing_chat_template_is_found_before_anything_starts() -> None:
    cfg = composed("stage=sft", "data.template=tokenizer")
    [line] = check_inputs(cfg)
    assert line == (
        "actor.path=builtin:tiny: it has no chat template, which data.template=tokenizer needs: "
        "choose data.template=hh, chatml, llama3 or none"
    )


# --- where a score is read


def test_a_dialogue_ends_where_its_score_is_read(tokenizer_with: Callable[[str], Any]) -> None:
    turns = [Turn("user", "One?"), Turn("assistant", "Two.")]
    for style in (Template.hh, Template.chatml, Template.llama3, Template.none):
        tokenizer = load_tokenizer("builtin:tiny", style)
        assert template.after_eos(tokenizer) == []
        assert template.render(tokenizer, turns).endswith(f"Two.{tokenizer.eos_token}")
    tokenizer = tokenizer_with(CHATML)
    before = template.render_prompt(tokenizer, turns[:1])
    assert tokenizer.decode(template.after_eos(tokenizer)) == "\n"
    template.end_at_eos(tokenizer)
    assert template.after_eos(tokenizer) == []
    assert template.render_prompt(tokenizer, turns[:1]) == before
    asked = [template.message_of(turn) for turn in turns]
    ids = tokenizer(tokenizer.apply_chat_template(asked, tokenize=False)).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.apply_chat_template(asked[:1], tokenize=False).endswith("One?<|im_end|>\n")

"""data.template=tokenizer: the template that a model brings."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from dialogues import (
    ANSWERS,
    DIALOGUES,
    ENDS,
    LATER,
    STYLES,
    USER,
    check_dialogue,
    each_family,
    own,
)
from helpers import composed
from tokenizer_families import FAMILIES

from rlhf.config.choices import Template
from rlhf.data import encoding, template
from rlhf.data.records import Demonstration, Pair, Turn
from rlhf.models.loading import load_tokenizer
from rlhf.training.setup import open_inputs

SMOL = (  # begins with a system's turn of its own
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ "
    "'<|im_start|>system\nHelp!<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' +"
    " '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # strips, has nothing to add for an answer, and a space in front of EOS
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no "
    "system here') }}"
    "{% elif message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'].strip() "
    "+ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI = (  # a second end mark behind the whole dialogue
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)
QWEN = (  # the last answer has room for thoughts
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if loop.last and message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@each_family
@pytest.mark.parametrize(
    "chat_template, separator, space, end",
    [
        (SMOL, "", "", "<|im_end|>"),
        (LLAMA2, " ", " ", None),
        (PHI, "", "", "<|im_end|>"),
        (QWEN, "<think>\n\n</think>\n\n", "", "<|im_end|>"),
    ],
    ids=["smol", "llama2", "phi", "qwen"],
)
def test_a_models_own_template(
    tmp_path: Path, family: str, chat_template: str, separator: str, space: str, end: str | None
) -> None:
    tokenizer = own(tmp_path / "base", chat_template, family)
    assert tokenizer.chat_template == chat_template
    assert tokenizer.eos_token == (
        end or FAMILIES[family]().eos_token
    ) and tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    for turns in DIALOGUES[: 2 if chat_template is LLAMA2 else 4]:
        for answer in ANSWERS:
            check_dialogue(tokenizer, turns, answer, separator, space)
    assert template.stop_strings(tokenizer) == []
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"), Template.tokenizer)
    assert (
        encoding.same_tokens(tokenizer, again)
        and again.special_tokens_map == tokenizer.special_tokens_map
    )


@pytest.mark.parametrize(
    "chat_template, problem",
    [
        (None, "has no chat template"),
        (
            SMOL.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"),
            "does not render a dialogue as its prompt and then",
        ),
        (SMOL.replace("<|im_end|>", ""), "does not end an answer with a special token"),
        (
            QWEN.replace("loop.last and", "loop.length > 2 and loop.last and"),
            "the first answer of a dialogue unlike",
        ),
        (SMOL + "{{ 1 // 0 }}", "refuses the turns"),  # errors of Python are no TemplateError
        (SMOL + "{{ none + 1 }}", "refuses the turns"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused_in_one_line(
    tmp_path: Path, chat_template: str | None, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        own(tmp_path, chat_template)  # type: ignore[arg-type]
    line = str(caught.value)
    assert (
        line.startswith("data.template=tokenizer: ")
        and str(tmp_path) in line
        and "choose" in line
        and "chatml" in line
    )
    assert "\n" not in line


def test_turns_that_a_template_refuses_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"refuses the turns system, user \(no system here\): choose data.template=hh",
    ):
        template.render_prompt(own(tmp_path, LLAMA2), DIALOGUES[2])


def test_a_template_that_writes_the_date_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own(tmp_path, "{{ '<|im_start|>' + strftime_now('%d %b %Y') }}" + SMOL).save_pretrained(
        tmp_path
    )
    overrides = [f"root={tmp_path}", "data.sandbox.demonstrations=64", "data.sandbox.pairs=64"]
    for style in (Template.tokenizer, Template.chatml):
        caplog.clear()
        cfg = composed("stage=sft", f"data.template={style.name}", *overrides)
        with caplog.at_level("WARNING", logger="rlhf"):
            tokenizer, _ = open_inputs(cfg, tmp_path, str(tmp_path), references=False)
        today = time.strftime("%d %b %Y")
        dated = style is Template.tokenizer
        assert (today in template.render_prompt(tokenizer, [USER])) == dated
        assert (f"the template of {tmp_path} writes today's date" in caplog.text) == dated


def test_any_style_can_replace_a_models_own_template(tmp_path: Path) -> None:
    own(tmp_path, SMOL).save_pretrained(tmp_path)
    for style in STYLES:
        tokenizer = load_tokenizer(str(tmp_path), style)
        assert (
            "Help!" not in template.render_prompt(tokenizer, [USER])
            and "<tool>" in tokenizer.all_special_tokens
        )
        assert tokenizer.eos_token == ENDS.get(
            style, "<|im_end|>"
        )  # hh keeps the one that the model has


THINK = QWEN.replace(
    "loop.last and message.role == 'assistant'",
    "loop.last and message.role == 'assistant' and '</think>' not in message.content",
)


@pytest.mark.parametrize(
    "answer", ["Two.", "<think>\n1 and 1.\n</think>\n\nTwo.", "<think>\n\n</think>\n\nTwo."]
)
def test_a_models_own_template_writes_the_whole_row(tmp_path: Path, answer: str) -> None:
    """Token for token what apply_chat_template gives: an answer's own thoughts stand there once."""
    tokenizer = own(tmp_path / "thinking", THINK)
    turns = [Turn("system", "Think."), Turn("user", "How much is 1 + 1?")]
    demonstration = [Demonstration(turns, answer)]
    [(prompt, response)] = encoding.encode_demonstrations(tokenizer, demonstration, 99, 99)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    messages.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
    assert prompt + response == tokenizer(whole, add_special_tokens=False).input_ids
    assert tokenizer.decode(prompt + response).count("<think>") == 1
    [row] = encoding.encode_pairs(tokenizer, [Pair(turns, answer, "No.")], 99, 99)
    assert row[:2] == (prompt, response)


def test_tokenizers_whose_answers_alone_differ_are_told_apart(tmp_path: Path) -> None:
    thinking = own(tmp_path / "thinking", QWEN)
    plain = own(tmp_path / "plain", QWEN.replace("<think>\n\n</think>\n\n", ""))
    assert template.render_prompt(thinking, LATER) == template.render_prompt(plain, LATER)
    assert not encoding.same_tokens(thinking, plain)

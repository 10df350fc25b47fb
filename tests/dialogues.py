"""Dialogues, tokenizers with a template, and what must agree about a rendered dialogue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizer_families import FAMILIES

from rlhf.config.choices import Template
from rlhf.data import encoding, template
from rlhf.data.records import Demonstration, Pair, Turn
from rlhf.models.loading import load_tokenizer

ANSWERS = ["Water it.", "(yes) - it's 3.14!", "First line.\n\n  Second line", "Zwölf – ☃ 日本", "a"]
USER = Turn("user", "How do I keep a fern alive?")
LATER = [USER, Turn("assistant", "Water it."), Turn("user", "Is that\n\nall?")]
DIALOGUES = [
    [USER],
    LATER,
    [Turn("system", "Be brief."), USER],
    [Turn("system", "Be brief."), *LATER],
]
STYLES = [Template.hh, Template.chatml, Template.llama3]
ENDS = {Template.chatml: "<|im_end|>", Template.llama3: "<|eot_id|>"}  # hh: the tokenizer's own
each_pair = pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
each_family = pytest.mark.parametrize("family", FAMILIES)


def own(directory: Path, chat_template: str, family: str = "opt") -> Any:
    """A tokenizer with a chat template of its own, as `data.template=tokenizer` loads it."""
    tokenizer = FAMILIES[family]()
    tokenizer.chat_template = chat_template
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", "<tool>"]})
    tokenizer.save_pretrained(directory)
    return load_tokenizer(str(directory), Template.tokenizer)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def messages(turns: list[Turn], *answer: str) -> list[dict[str, str]]:
    return [
        {"role": turn.role, "content": turn.text}
        for turn in [*turns, *(Turn("assistant", text) for text in answer)]
    ]


def check_dialogue(
    tokenizer: Any, turns: list[Turn], answer: str, separator: str, space: str = ""
) -> tuple[list[int], list[int]]:
    """Training, sampling, transformers and decoding agree. Returns: ids of prompt and answer."""
    eos = tokenizer.eos_token
    prompt = template.render_prompt(tokenizer, turns)
    whole = tokenizer.apply_chat_template(messages(turns, answer), tokenize=False)
    assert whole.startswith(prompt + separator + answer + space + eos)

    [(prompt_ids, answer_ids)] = encoding.encode_demonstrations(
        tokenizer, [Demonstration(turns, answer)], 999, 999
    )
    assert (
        prompt_ids
        == encode(tokenizer, prompt)
        == encoding.encode_prompts(tokenizer, [turns], 999)[0]
    )
    assert prompt_ids == tokenizer.apply_chat_template(
        messages(turns), add_generation_prompt=True, return_dict=False
    )  # so does vLLM
    assert (
        answer_ids[-1] == tokenizer.eos_token_id and answer_ids.count(tokenizer.eos_token_id) == 1
    )
    [(prompt, chosen, rejected)] = encoding.encode_pairs(
        tokenizer, [Pair(turns, answer, "no")], 999, 999
    )
    assert (prompt, chosen) == (prompt_ids, answer_ids) and rejected[-1] == tokenizer.eos_token_id

    # a sampled answer is text for a moment, where a reward model has another tokenizer
    text = encoding.decode_response(tokenizer, answer_ids)
    assert text == encoding.decode_response(tokenizer, answer_ids[:-1]) == answer
    assert encoding.encode_response(tokenizer, text, True) == answer_ids
    unended = encoding.encode_response(tokenizer, text, False)
    assert unended == answer_ids[: len(unended)] and tokenizer.eos_token_id not in unended
    return prompt_ids, answer_ids

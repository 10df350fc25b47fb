"""Loaded tokenizers: pad and end tokens, where they come from, and the context they must fit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from families import EOS, PAD, VOCABULARY
from helpers import REPO
from tokenizer_families import byte_level
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from rlhf.config.choices import Template
from rlhf.data import encoding
from rlhf.data.records import Turn
from rlhf.models.loading import check_context, load_tokenizer, location


def test_the_builtin_tokenizer_has_a_pad_token_that_is_not_eos(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (
        PAD,
        EOS,
        VOCABULARY,
    )


def saved(path: Path, special: dict[str, str | None], more: Sequence[str] = ()) -> Path:
    """A byte-level tokenizer with these special tokens, the way model authors ship theirs."""
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    bare.add_special_tokens(
        {"extra_special_tokens": [*dict.fromkeys([*filter(None, special.values()), *more])]}
    )
    for name, token in special.items():
        setattr(bare, name, token)
    bare.save_pretrained(path)
    return path


CHATML = ("<|im_start|>", "<|im_end|>")
OWN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% if m.role == 'tool' %}<|tool_pad|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PADS: dict[str, tuple[dict[str, str | None], Sequence[str], Template, str]] = {
    # name: special tokens, more of them, data.template, the pad token
    "gpt2": (
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        (),
        Template.hh,
        "<|pad|>",
    ),
    "smollm2": (
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
        },
        ("<repo_name>",),
        Template.chatml,
        "<|endoftext|>",
    ),
    "smollm2 base": (
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        (*CHATML, "<repo_name>"),
        Template.chatml,
        "<|endoftext|>",
    ),
    "llama2": (
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        (),
        Template.hh,
        "<unk>",
    ),
    "llama3": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ("<|reserved_special_token_0|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        Template.hh,
        "<|reserved_special_token_0|>",
    ),
    "llama3.1": (
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
        Template.llama3,
        "<|finetune_right_pad_id|>",
    ),
    "qwen": (
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<|im_start|>", "<|vision_pad|>"),
        Template.chatml,
        "<|endoftext|>",
    ),
    "qwen as hh": (
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        (*CHATML, "<|vision_pad|>"),
        Template.hh,
        "<|vision_pad|>",
    ),
    "pad is a mark": (
        {"eos_token": "</s>", "pad_token": "<|im_start|>", "unk_token": "<unk>"},
        CHATML,
        Template.chatml,
        "<unk>",
    ),
    "pad is the end mark": (
        {"eos_token": "</s>", "pad_token": "<|im_end|>"},
        CHATML,
        Template.chatml,
        "</s>",
    ),
    "its own template may write it": (
        {"eos_token": "<|im_end|>", "pad_token": "<|tool_pad|>", "unk_token": "<unk>"},
        ("<|im_start|>",),
        Template.tokenizer,
        "<unk>",
    ),
    "no other token": ({"eos_token": "</s>", "pad_token": "</s>"}, (), Template.hh, "<|pad|>"),
}


@pytest.mark.parametrize("name", PADS)
def test_the_pad_token_is_one_that_the_template_never_writes(tmp_path: Path, name: str) -> None:
    """It is a token of the vocabulary where there is an unused one; and stays in later stages."""
    special, more, style, expected = PADS[name]
    path = saved(tmp_path / "model", special, more)
    if style is Template.tokenizer:
        (path / "chat_template.jinja").write_text(OWN)
    before = AutoTokenizer.from_pretrained(path).get_vocab()
    loaded = load_tokenizer(str(path), style)
    assert loaded.pad_token == expected
    assert ("<|pad|>" in loaded.get_vocab()) == (expected == "<|pad|>")
    added = {"<|pad|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"}
    assert set(loaded.get_vocab()) - set(before) <= {*added, "<|eot_id|>"}
    turns = [Turn("user", "One?"), Turn("assistant", "Two."), Turn("user", "Three?")]
    (prompt,) = encoding.encode_prompts(loaded, [turns], 999)
    (response,) = encoding.encode_responses(loaded, ["Four."], 999, [turns])
    assert prompt and loaded.pad_token_id not in prompt + response
    loaded.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"), style)
    assert again.pad_token == expected and again.get_vocab() == loaded.get_vocab()


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    changed = AutoTokenizer.from_pretrained(location("builtin:tiny"))
    changed.eos_token = None
    changed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS"):
        load_tokenizer(str(tmp_path))


def test_locations() -> None:
    assert location("builtin:tiny") == str(REPO / "rlhf" / "assets" / "tiny")
    assert location("~/x") == os.path.expanduser("~/x")
    assert location("facebook/opt-125m") == "facebook/opt-125m"


def test_sequences_longer_than_the_context_are_refused_with_the_numbers() -> None:
    context = AutoConfig.from_pretrained(location("builtin:tiny")).max_position_embeddings
    check_context("builtin:tiny", context - 64, 64)
    with pytest.raises(
        ValueError,
        match=rf"={context - 63} \+ rollout.max_new_tokens=64 is more than the {context} ",
    ):
        check_context("builtin:tiny", context - 63, 64, "rollout.max_new_tokens")

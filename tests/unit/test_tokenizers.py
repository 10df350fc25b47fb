"""Loaded tokenizers: pad and end tokens, where they come from, and the context they must fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from families import EOS, PAD, VOCABULARY
from helpers import REPO
from transformers import AutoConfig, AutoTokenizer

from rlhf.models.loading import check_context, load_tokenizer, location


def test_the_builtin_tokenizer_has_a_pad_token_that_is_not_eos(tokenizer: Any) -> None:
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, len(tokenizer)) == (
        PAD,
        EOS,
        VOCABULARY,
    )


@pytest.mark.parametrize("pad_token", [None, "</s>"])
def test_a_pad_token_that_is_missing_or_is_eos_is_replaced(
    tmp_path: Path, pad_token: str | None
) -> None:
    changed = AutoTokenizer.from_pretrained(location("builtin:tiny"))
    changed.pad_token = pad_token
    changed.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id not in (None, loaded.eos_token_id) and len(loaded) == VOCABULARY + 1
    assert loaded.eos_token_id == EOS


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

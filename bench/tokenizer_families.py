"""Tokenizers as model families have them, trained on a few sentences; tests use them too."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

TEXT = [
    "How do I keep a fern alive through the winter? Water it once a week, and keep it away from "
    "the heater.",
    "My neighbour's dog barks at night; what can I say to her? Say that you like the dog, and "
    "that you like sleep too.",
    "A violin needs a dry room, a clean cloth and new strings: user, assistant, system.\n\n\n",
    "Is 3.14 enough? For a garden pond it is. It's fine, don't worry (really).\n\n\n",
    "The answer is short. The question is long, and the question comes first.\n\n",
]


LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# ------------------------------------------------------------------------------- tokenizer families


def byte_level(split: Any = None) -> Tokenizer:
    """Byte-level BPE with the words of GPT-2, or of another pattern."""
    bpe = Tokenizer(tokenizer_models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split:
        words = pre_tokenizers.Split(Regex(split), "isolated")
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    return bpe


def begin_with(bpe: Tokenizer, bos: str) -> None:
    """Put BOS in front of each text."""
    bpe.add_special_tokens([AddedToken(bos, special=True, normalized=False)])
    bpe.post_processor = processors.TemplateProcessing(
        f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
    )


def gpt2() -> Any:
    """No BOS, no pad token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def opt() -> Any:
    """Begins with </s>, which is its EOS too."""
    bpe = byte_level()
    begin_with(bpe, "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="</s>", eos_token="</s>", pad_token="<pad>"
    )


def sentencepiece(marks: list[str], bos: str, prefix: bool) -> Tokenizer:
    """SentencePiece's BPE: a space is a letter, and unknown letters fall back to bytes.

    Args: marks: special tokens, the first ids.  prefix: each text gets a space in front.
    """
    learnt = Tokenizer(tokenizer_models.BPE())
    scheme = "always" if prefix else "never"
    learnt.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    learnt.train_from_iterator(TEXT * 3, trainers.BpeTrainer(vocab_size=300))
    state = json.loads(learnt.to_str())["model"]
    vocabulary = [*marks, *(f"<0x{i:02X}>" for i in range(256)), *state["vocab"]]
    merges = [tuple(pair) for pair in state["merges"]]
    ids = {token: i for i, token in enumerate(vocabulary)}
    bpe = Tokenizer(
        tokenizer_models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    space = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    bpe.add_special_tokens(
        [AddedToken(mark, special=True, normalized=False) for mark in marks if mark != bos]
    )
    begin_with(bpe, bos)
    return bpe


def llama2() -> Any:
    """SentencePiece with a space in front of each text."""
    bpe = sentencepiece(["<unk>", "<s>", "</s>"], "<s>", prefix=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gemma() -> Any:
    """SentencePiece with nothing in front of a text, and marks of turns."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    bpe = sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", *turns], "<bos>", prefix=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )


def qwen2() -> Any:
    """Byte-level BPE of composed letters, with the marks of ChatML and no BOS."""
    bpe = byte_level(LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}"))
    bpe.normalizer = normalizers.NFC()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def qwen3() -> Any:
    """The same with marks of thoughts, which are text."""
    tokenizer = qwen2()
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def smollm2() -> Any:
    """The marks of ChatML are BOS and EOS, EOS is the pad token, the end of a text is unknown."""
    bpe = byte_level()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
    )


def llama3() -> Any:
    """Byte-level BPE with longer words, the marks of its own style, and the end mark as pad
    token."""
    bpe = byte_level(LLAMA3_WORDS)
    begin_with(bpe, "<|begin_of_text|>")
    bpe.add_special_tokens(
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    )
    marks = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|eot_id|>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **marks)


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "opt": opt,
    "llama2": llama2,
    "llama3": llama3,
}

"""Four styles on four families of tokenizers: training, sampling and transformers agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dialogues import (
    ANSWERS,
    DIALOGUES,
    ENDS,
    LATER,
    USER,
    check_dialogue,
    each_family,
    each_pair,
    encode,
)
from families import save_base
from tokenizer_families import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.choices import Precision, Template
from rlhf.data import encoding, template
from rlhf.data.records import Pair, Turn
from rlhf.models.loading import load_policy, load_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a family's tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    for family, build in FAMILIES.items():
        build().save_pretrained(root / family)
    return lambda family: str(root / family)


# --- the three styles


def test_how_each_style_reads(saved: Callable[[str], str]) -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Hi"),
        Turn("assistant", "Yes?"),
        Turn("user", "Bye"),
    ]
    later = template.render_prompt(
        load_tokenizer(saved("gpt2"), Template.hh), turns[1:] + turns[:2]
    )
    assert later.startswith("\n\nHuman: Hi") and "\n\nHuman: Bye\n\nBe brief.\n\nHuman:" in later
    wanted = {
        Template.hh: "Be brief.\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant:",
        Template.chatml: "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n",
        Template.llama3: (
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    }
    for family, bos in {
        "gpt2": "",
        "opt": "</s>",
        "llama2": "<s>",
        "llama3": "<|begin_of_text|>",
    }.items():
        for style, text in wanted.items():
            tokenizer = load_tokenizer(saved(family), style)
            begins = bos or "<|endoftext|>" * (
                style is Template.llama3
            )  # that style always has one
            assert template.render_prompt(tokenizer, turns) == begins + text


@each_family
@each_pair
def test_trained_on_is_what_is_sampled(
    saved: Callable[[str], str], family: str, style: Template
) -> None:
    tokenizer = load_tokenizer(saved(family), style)
    # GPT-2 joins the newlines that end llama3's prompt with those of an answer
    one_go = not (family in ("gpt2", "opt") and style is Template.llama3)
    agreed = True
    for turns in DIALOGUES:
        for answer in ANSWERS:
            separator = " " if style is Template.hh else ""
            prompt_ids, answer_ids = check_dialogue(tokenizer, turns, answer, separator)
            text = (
                template.render_prompt(tokenizer, turns) + separator + answer + tokenizer.eos_token
            )
            agreed &= prompt_ids + answer_ids == encode(tokenizer, text)
            later = template.render_prompt(tokenizer, [*turns, Turn("assistant", answer), USER])
            between = {
                Template.hh: "",
                Template.chatml: "<|im_end|>\n",
                Template.llama3: "<|eot_id|>",
            }[style]
            start = template.render_prompt(tokenizer, turns) + separator + answer + between
            assert later.startswith(start) and later[len(start) :].startswith(("\n\nHuman: ", "<|"))
    assert agreed == one_go


@each_family
@each_pair
def test_special_tokens(saved: Callable[[str], str], family: str, style: Template) -> None:
    plain = AutoTokenizer.from_pretrained(saved(family))
    tokenizer = load_tokenizer(saved(family), style)
    assert tokenizer.eos_token == ENDS.get(style, plain.eos_token)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, None}) == 3
    for mark in {Template.hh: [], Template.chatml: ["<|im_start|>", "<|im_end|>"]}.get(
        style, ["<|start_header_id|>", "<|end_header_id|>"]
    ):
        assert (
            len(encode(tokenizer, mark)) == 1
            and tokenizer.decode(encode(tokenizer, mark), skip_special_tokens=True) == ""
        )
    assert plain.get_vocab().items() <= tokenizer.get_vocab().items()
    if family == "llama3" and style is Template.llama3:  # it brings all marks
        assert tokenizer.get_vocab() == plain.get_vocab()
        assert tokenizer.pad_token == plain.eos_token, "its own was the new EOS"
    assert template.stop_strings(tokenizer) == (["\n\nHuman:"] if style is Template.hh else [])


@each_family
@each_pair
def test_installing_again_and_saving_change_nothing(
    saved: Callable[[str], str], tmp_path: Path, family: str, style: Template
) -> None:
    tokenizer = load_tokenizer(saved(family), style)
    tokenizer.save_pretrained(tmp_path / "once")
    template.install_chat_template(tokenizer, style)
    tokenizer.save_pretrained(tmp_path / "twice")
    load_tokenizer(str(tmp_path / "twice"), style).save_pretrained(
        tmp_path / "loaded"
    )  # as PPO does
    for name in ("tokenizer.json", "chat_template.jinja"):
        texts = {(tmp_path / times / name).read_text() for times in ("once", "twice", "loaded")}
        assert len(texts) == 1
    for times in ("once", "loaded"):  # what others load
        again = AutoTokenizer.from_pretrained(tmp_path / times)
        assert (
            again.chat_template == tokenizer.chat_template
            and again.special_tokens_map == tokenizer.special_tokens_map
        )
        assert encoding.same_tokens(tokenizer, again) and template.stop_strings(
            again
        ) == template.stop_strings(tokenizer)
    assert encoding.same_tokens(
        tokenizer, load_tokenizer(str(tmp_path / "once"), Template.tokenizer)
    )  # now it is its own


def test_llama3_strips_as_the_original_does(saved: Callable[[str], str]) -> None:
    tokenizer = load_tokenizer(saved("llama3"), Template.llama3)
    assert template.render_prompt(tokenizer, [Turn("user", " Hi\n")]) == template.render_prompt(
        tokenizer, [Turn("user", "Hi")]
    )


def test_tokenizers_with_other_templates_are_told_apart(saved: Callable[[str], str]) -> None:
    one, two = (
        load_tokenizer(saved("llama3"), style) for style in (Template.chatml, Template.llama3)
    )
    assert not encoding.same_tokens(one, two)


@each_family
@each_pair
def test_long_prompts_lose_their_first_exchange_and_long_answers_their_end(
    saved: Callable[[str], str], family: str, style: Template
) -> None:
    tokenizer = load_tokenizer(saved(family), style)
    system = Turn("system", "Be brief.")
    turns = [system, *LATER]
    [whole], [last] = (
        encoding.encode_prompts(tokenizer, [turns], 999),
        encoding.encode_prompts(tokenizer, [[system, LATER[-1]]], 999),
    )
    assert encoding.encode_prompts(tokenizer, [turns], len(whole) - 1) == [last]
    assert encoding.encode_prompts(tokenizer, [turns], len(last)) == [last]
    assert encoding.encode_prompts(tokenizer, [turns], len(last) - 1) == [None]
    [ids] = encoding.encode_responses(tokenizer, ["Water it once a week."], 999)
    for limit in range(1, len(ids) + 1):
        assert encoding.encode_responses(tokenizer, ["Water it once a week."], limit) == [
            ids[:limit]
        ]
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_pairs_without_a_second_answer_are_left_out(saved: Callable[[str], str]) -> None:
    tokenizer = load_tokenizer(saved("gpt2"), Template.chatml)
    rows = encoding.encode_pairs(
        tokenizer, [Pair([USER], "x", None), Pair([USER], "x", "y")], 99, 99
    )
    assert [
        tokenizer.decode(prompt + rejected).endswith("\ny<|im_end|>")
        for prompt, _, rejected in rows
    ] == [True]


def test_the_embedding_grows_with_the_marks(saved: Callable[[str], str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved("gpt2"), Template.chatml)
    size = len(AutoTokenizer.from_pretrained(saved("gpt2")))
    save_base(tmp_path / "base", "llama", vocabulary=size)
    policy = load_policy(str(tmp_path / "base"), tokenizer, Precision.fp32)
    assert (
        policy.hf.get_input_embeddings().num_embeddings == len(tokenizer) == size + 2
    )  # two marks; the pad token is GPT-2's EOS
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_input_embeddings().weight
    assert torch.equal(policy.hf.get_input_embeddings().weight[:size], before)


@each_pair
def test_a_response_that_is_sent_back_begins_with_one_space_at_most(style: Template) -> None:
    """The text of a response of hh may begin with the space that its template writes."""
    tokenizer = load_tokenizer("builtin:tiny", style)
    texts = {
        template.render_prompt(tokenizer, [USER, Turn("assistant", text), USER])
        for text in ("Water it.", " Water it.")
    }
    assert style is Template.chatml or len(texts) == 1
    assert style is not Template.hh or "Assistant: Water it.\n\nHuman:" in texts.pop()

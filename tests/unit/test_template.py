"""Four styles on four families of tokenizers: training, sampling and transformers agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save_base
from tokenizer_families import FAMILIES
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config.choices import Precision, Template
from rlhf.data import template
from rlhf.data.records import Demonstration, Pair, Turn
from rlhf.models.loading import load_policy, load_tokenizer

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a family's tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    for family, build in FAMILIES.items():
        build().save_pretrained(root / family)
    return lambda family: str(root / family)


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

    [(prompt_ids, answer_ids)] = template.encode_demonstrations(
        tokenizer, [Demonstration(turns, answer)], 999, 999
    )
    assert (
        prompt_ids
        == encode(tokenizer, prompt)
        == template.encode_prompts(tokenizer, [turns], 999)[0]
    )
    assert prompt_ids == tokenizer.apply_chat_template(
        messages(turns), add_generation_prompt=True, return_dict=False
    )  # so does vLLM
    assert (
        answer_ids[-1] == tokenizer.eos_token_id and answer_ids.count(tokenizer.eos_token_id) == 1
    )
    [(prompt, chosen, rejected)] = template.encode_pairs(
        tokenizer, [Pair(turns, answer, "no")], 999, 999
    )
    assert (prompt, chosen) == (prompt_ids, answer_ids) and rejected[-1] == tokenizer.eos_token_id

    # a sampled answer is text for a moment, where a reward model has another tokenizer
    text = template.decode_response(tokenizer, answer_ids)
    assert text == template.decode_response(tokenizer, answer_ids[:-1]) == answer
    assert template.encode_response(tokenizer, text, True) == answer_ids
    unended = template.encode_response(tokenizer, text, False)
    assert unended == answer_ids[: len(unended)] and tokenizer.eos_token_id not in unended
    return prompt_ids, answer_ids


# --- the three styles


def test_how_each_style_reads(saved: Callable[[str], str]) -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "Hi"),
        Turn("assistant", "Yes?"),
        Turn("user", "Bye"),
    ]
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
    # llama2 puts a space in front of each text; GPT-2 joins the newlines that end llama3's prompt
    one_go = not (family == "llama2" or (family in ("gpt2", "opt") and style is Template.llama3))
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
    if (
        family == "llama3" and style is Template.llama3
    ):  # it brings all marks; only its pad token was the new EOS
        assert set(tokenizer.get_vocab()) - set(plain.get_vocab()) == {"<|pad|>"}
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
        assert template.same_tokens(tokenizer, again) and template.stop_strings(
            again
        ) == template.stop_strings(tokenizer)
    assert template.same_tokens(
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
    assert not template.same_tokens(one, two)


def test_tokenizers_whose_answers_alone_differ_are_told_apart(tmp_path: Path) -> None:
    thinking = own(tmp_path / "thinking", QWEN)
    plain = own(tmp_path / "plain", QWEN.replace("<think>\n\n</think>\n\n", ""))
    assert template.render_prompt(thinking, LATER) == template.render_prompt(plain, LATER)
    assert not template.same_tokens(thinking, plain)


@each_family
@each_pair
def test_long_prompts_lose_their_first_exchange_and_long_answers_their_end(
    saved: Callable[[str], str], family: str, style: Template
) -> None:
    tokenizer = load_tokenizer(saved(family), style)
    system = Turn("system", "Be brief.")
    turns = [system, *LATER]
    [whole], [last] = (
        template.encode_prompts(tokenizer, [turns], 999),
        template.encode_prompts(tokenizer, [[system, LATER[-1]]], 999),
    )
    assert template.encode_prompts(tokenizer, [turns], len(whole) - 1) == [last]
    assert template.encode_prompts(tokenizer, [turns], len(last)) == [last]
    assert template.encode_prompts(tokenizer, [turns], len(last) - 1) == [None]
    [ids] = template.encode_responses(tokenizer, ["Water it once a week."], 999)
    for limit in range(1, len(ids) + 1):
        assert template.encode_responses(tokenizer, ["Water it once a week."], limit) == [
            ids[:limit]
        ]
    assert ids.index(tokenizer.eos_token_id) == len(ids) - 1


def test_pairs_without_a_second_answer_are_left_out(saved: Callable[[str], str]) -> None:
    tokenizer = load_tokenizer(saved("gpt2"), Template.chatml)
    rows = template.encode_pairs(
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
        policy.hf.get_input_embeddings().num_embeddings == len(tokenizer) == size + 3
    )  # two marks and the pad token
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base").get_input_embeddings().weight
    assert torch.equal(policy.hf.get_input_embeddings().weight[:size], before)


# --- the model's own template

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
        template.same_tokens(tokenizer, again)
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

"""The one place that renders turns as text and tokens, and owns the roles, the end mark (EOS) and the stop strings.

`data.template` chooses one of four styles, which is saved as the tokenizer's chat template: transformers, vLLM and chat.py then
render a prompt as training did.

    hh         "\\n\\nHuman: {question}\\n\\nAssistant:" and then " {answer}" and the tokenizer's own EOS, as Anthropic's HH data
    chatml     "<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n" and then "{answer}<|im_end|>"
    llama3     the same with <|start_header_id|>user<|end_header_id|>\\n\\n and <|eot_id|>, behind BOS
    tokenizer  what the model brings

Prompt and answer are tokenised one by one, so no token crosses the boundary, and an answer that is sampled behind a prompt is
made of the tokens that training showed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.config.choices import Template
from rlhf.data.records import Demonstration, Pair, Turn

USER, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of the style hh

_TEMPLATES = {
    Template.hh: (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '\n\nHuman: ' + message.content }}"
        "{% elif message.role == 'assistant' %}{{ '\n\nAssistant: ' + message.content }}"
        "{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% else %}{{ message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    ),
    Template.chatml: (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    Template.llama3: (
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
}
_MARKS = {  # special tokens; the last one ends a turn
    Template.chatml: ["<|im_start|>", "<|im_end|>"],
    Template.llama3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
_PROBE = [
    Turn("user", "One?"),
    Turn("assistant", "Two."),
    Turn("user", "Three?"),
]  # no system's turn: some templates refuse it
_PROBE_ANSWER = "Four."


# ------------------------------------------------------------------------------------------------------------------- the template


def install_chat_template(tokenizer: Any, style: Template) -> None:
    """Make a style the tokenizer's chat template and its end mark the EOS, and add the special tokens that the vocabulary lacks.
    Doing it twice changes nothing. Raises: ValueError when the model's own template is missing or cannot be trained with."""
    if style is Template.tokenizer:
        tokenizer.eos_token = _own_end_mark(tokenizer)
        return
    if style in _MARKS:
        *others, end = _MARKS[style]
        tokenizer.add_special_tokens(
            {"eos_token": end, "extra_special_tokens": others}, replace_extra_special_tokens=False
        )
    if style is Template.llama3 and tokenizer.bos_token is None:
        tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    # the other styles begin with BOS only where the tokenizer itself puts one in front of a text
    bos = tokenizer.bos_token_id
    begins = style is Template.llama3 or (bos is not None and tokenizer("a").input_ids[0] == bos)
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + _TEMPLATES[style]


def stop_strings(tokenizer: Any) -> list[str]:
    """Texts at which an answer is over though it has no EOS: the mark of a user's turn, where the template writes it as plain text."""
    return [USER] if USER in render_prompt(tokenizer, _PROBE) else []


def render_prompt(tokenizer: Any, turns: list[Turn]) -> str:
    """The text that the assistant's answer follows. Raises: ValueError when a model's own template refuses such turns."""
    return _render(tokenizer, turns, True)


def _render(tokenizer: Any, turns: list[Turn], for_answer: bool) -> str:
    from jinja2 import TemplateError

    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=for_answer
        )
    except (
        TemplateError
    ) as error:  # for instance: it knows no system's turn, or wants roles to alternate
        roles = ", ".join(turn.role for turn in turns)
        raise _unfit(
            tokenizer, f"refuses the turns {roles} ({' '.join(str(error).split())})"
        ) from None


def _unfit(tokenizer: Any, problem: str) -> ValueError:
    wanted = "choose data.template=hh, chatml or llama3"
    return ValueError(
        f"data.template=tokenizer: the chat template of {tokenizer.name_or_path} {problem}: {wanted}"
    )


def _around_answer(tokenizer: Any, turns: list[Turn] = _PROBE) -> tuple[str, str]:
    """What the template writes between a prompt and its answer, and behind the answer (there EOS, at least).
    Raises: ValueError when the whole dialogue does not begin with the prompt."""
    prompt = render_prompt(tokenizer, turns)
    whole = _render(tokenizer, [*turns, Turn("assistant", _PROBE_ANSWER)], False)
    before, found, behind = whole.removeprefix(prompt).partition(_PROBE_ANSWER)
    if not whole.startswith(prompt) or not found:
        raise _unfit(tokenizer, "does not render a dialogue as its prompt and then the answer")
    return before, behind


def _own_end_mark(tokenizer: Any) -> str:
    """The special token with which a model's own template ends an answer. Raises: ValueError when there is none."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"data.template=tokenizer: {tokenizer.name_or_path} has no chat template: choose hh, chatml or llama3"
        )
    before, behind = _around_answer(tokenizer)
    if _around_answer(tokenizer, _PROBE[-1:]) != (before, behind):
        raise _unfit(tokenizer, "renders the first answer of a dialogue unlike the later ones")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [
        token for token in special if behind.lstrip().startswith(token)
    ]  # Llama 2 has a space in front of it
    if not ends:
        raise _unfit(
            tokenizer, f"does not end an answer with a special token (but with {behind[:40]!r})"
        )
    return max(ends, key=len)


# --------------------------------------------------------------------------------------------------------------------- the tokens


def encode_prompts(
    tokenizer: Any, prompts: Sequence[list[Turn]], max_tokens: int
) -> list[list[int] | None]:
    """Token ids of each prompt. One that is too long loses its first turns, always keeping a user's turn in front;
    None when its last turn alone has more than `max_tokens`."""
    if not prompts:
        return []
    encoded = tokenizer(
        [render_prompt(tokenizer, turns) for turns in prompts], add_special_tokens=False
    ).input_ids
    return [
        ids if len(ids) <= max_tokens else _shorten(tokenizer, turns, max_tokens)
        for turns, ids in zip(prompts, encoded)
    ]


def _shorten(tokenizer: Any, turns: list[Turn], max_tokens: int) -> list[int] | None:
    for first in range(1, len(turns)):
        if turns[first].role == "user":
            ids = tokenizer(
                render_prompt(tokenizer, turns[first:]), add_special_tokens=False
            ).input_ids
            if len(ids) <= max_tokens:
                return ids
    return None


def encode_responses(tokenizer: Any, answers: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each answer with its EOS; an answer that is too long is cut and carries none."""
    if not answers:
        return []
    before, space = _frame(tokenizer)
    encoded = tokenizer(
        [before + text.strip() + space for text in answers], add_special_tokens=False
    ).input_ids
    return [(ids + [tokenizer.eos_token_id])[:max_tokens] for ids in encoded]


def encode_response(tokenizer: Any, answer: str, ended: bool) -> list[int]:
    """Token ids of one sampled answer, with EOS if it ended."""
    before, space = _frame(tokenizer)
    ids = tokenizer(before + answer.strip() + space * ended, add_special_tokens=False).input_ids
    return ids + [tokenizer.eos_token_id] * ended


def _frame(tokenizer: Any) -> tuple[str, str]:
    """The text between prompt and answer, and that between answer and EOS."""
    before, behind = _around_answer(tokenizer)
    return before, behind.partition(tokenizer.eos_token)[0]


def content(tokenizer: Any) -> str:
    """All that decides which tokens a tokenizer makes of turns, in one text."""
    rules = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else str(sorted(tokenizer.get_vocab().items()))
    )
    return f"{rules}\n{tokenizer.chat_template}\n{tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.pad_token}"


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of the same turns: the same vocabulary, special tokens and template."""
    probe = [
        Turn("user", "A tokenizer's probe: 3.14 café\n  two spaces"),
        Turn("assistant", "Yes - it's one."),
        Turn("user", "Thanks!"),
    ]

    def made_by(tokenizer: Any) -> Any:
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return (
            tokenizer.get_vocab(),
            special,
            encode_prompts(tokenizer, [probe], 10**9),
            encode_response(tokenizer, "So.", True),
        )

    return made_by(one) == made_by(other)


def encode_demonstrations(
    tokenizer: Any, demonstrations: Sequence[Demonstration], max_prompt: int, max_response: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer; demonstrations with a prompt that is too long are left out."""
    prompts = encode_prompts(tokenizer, [d.prompt for d in demonstrations], max_prompt)
    answers = encode_responses(tokenizer, [d.response for d in demonstrations], max_response)
    return [(prompt, answer) for prompt, answer in zip(prompts, answers) if prompt is not None]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[Pair], max_prompt: int, max_response: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids of prompt, chosen and rejected; pairs with a prompt that is too long or without a second answer are left out."""
    pairs = [pair for pair in pairs if pair.rejected is not None]
    prompts = encode_prompts(tokenizer, [pair.prompt for pair in pairs], max_prompt)
    chosen = encode_responses(tokenizer, [pair.chosen for pair in pairs], max_response)
    rejected = encode_responses(tokenizer, [pair.rejected or "" for pair in pairs], max_response)
    return [(prompt, c, r) for prompt, c, r in zip(prompts, chosen, rejected) if prompt is not None]


def decode_response(tokenizer: Any, ids: list[int]) -> str:
    """The text of an answer, without EOS and what the template writes in front of it."""
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return text.removeprefix(_frame(tokenizer)[0].strip()).strip()

"""The one place that renders turns as text and tokens, and owns the roles, the end mark and the stop strings.

The template is the dialogue format of Anthropic's HH data. It is saved as the tokenizer's chat template, so that transformers
renders the same tokens: "\\n\\nHuman: {question}\\n\\nAssistant:" and then " {answer}" and EOS. A prompt ends with a colon and an
answer begins with a space, so no token crosses the boundary when the two are tokenised one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data.records import Demonstration, Pair, Turn

USER, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
STOP_STRINGS = [USER]  # an answer that goes on as the user has ended

_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '\n\nHuman: ' + message.content }}"
    "{% elif message.role == 'assistant' %}{{ '\n\nAssistant: ' + message.content }}"
    "{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% else %}{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)


def install(tokenizer: Any) -> None:
    """Make the template the tokenizer's own; it starts with BOS where the tokenizer itself adds one to a text."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + _TEMPLATE


def render_prompt(tokenizer: Any, turns: list[Turn]) -> str:
    """The text that the assistant's answer follows."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode_prompts(tokenizer: Any, prompts: Sequence[list[Turn]], max_tokens: int) -> list[list[int] | None]:
    """Token ids of each prompt. One that is too long loses its first turns, always keeping a user's turn in front;
    None when its last turn alone has more than `max_tokens`."""
    if not prompts:
        return []
    encoded = tokenizer([render_prompt(tokenizer, turns) for turns in prompts], add_special_tokens=False).input_ids
    return [ids if len(ids) <= max_tokens else _shorten(tokenizer, turns, max_tokens) for turns, ids in zip(prompts, encoded)]


def _shorten(tokenizer: Any, turns: list[Turn], max_tokens: int) -> list[int] | None:
    for first in range(1, len(turns)):
        if turns[first].role == "user":
            ids = tokenizer(render_prompt(tokenizer, turns[first:]), add_special_tokens=False).input_ids
            if len(ids) <= max_tokens:
                return ids
    return None


def encode_responses(tokenizer: Any, answers: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each answer with its EOS; an answer that is too long is cut and carries none."""
    if not answers:
        return []
    encoded = tokenizer([" " + text.strip() for text in answers], add_special_tokens=False).input_ids
    return [(ids + [tokenizer.eos_token_id])[:max_tokens] for ids in encoded]


def encode_response(tokenizer: Any, answer: str, ended: bool) -> list[int]:
    """Token ids of one sampled answer, with EOS if it ended."""
    ids = tokenizer(" " + answer.strip(), add_special_tokens=False).input_ids
    return ids + [tokenizer.eos_token_id] * ended


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of the same turns: the same vocabulary, special tokens and template."""
    probe = [Turn("user", "A tokenizer's probe: 3.14 café\n  two spaces"), Turn("assistant", "Yes - it's one."), Turn("user", "Thanks!")]

    def content(tokenizer: Any) -> Any:
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        return tokenizer.get_vocab(), special, encode_prompts(tokenizer, [probe], 10**9)

    return content(one) == content(other)


def encode_demonstrations(
    tokenizer: Any, demonstrations: Sequence[Demonstration], max_prompt: int, max_response: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer; demonstrations with a prompt that is too long are left out."""
    prompts = encode_prompts(tokenizer, [d.prompt for d in demonstrations], max_prompt)
    answers = encode_responses(tokenizer, [d.response for d in demonstrations], max_response)
    return [(prompt, answer) for prompt, answer in zip(prompts, answers) if prompt is not None]


def encode_pairs(tokenizer: Any, pairs: Sequence[Pair], max_prompt: int, max_response: int) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt + chosen and of prompt + rejected; pairs with a prompt that is too long are left out."""
    prompts = encode_prompts(tokenizer, [pair.prompt for pair in pairs], max_prompt)
    chosen = encode_responses(tokenizer, [pair.chosen for pair in pairs], max_response)
    rejected = encode_responses(tokenizer, [pair.rejected for pair in pairs], max_response)
    return [(prompt + c, prompt + r) for prompt, c, r in zip(prompts, chosen, rejected) if prompt is not None]


def decode_response(tokenizer: Any, ids: list[int]) -> str:
    """The text of an answer, without EOS and the space in front of it."""
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def parse_dialogue(text: str) -> list[Turn]:
    """Turns of a dialogue string "\\n\\nHuman: ... \\n\\nAssistant: ..."; a trailing empty assistant's turn is left out.
    Raises: ValueError when it has no user's turn."""
    turns = []
    rest = text
    while rest:
        starts = [(rest.find(mark), mark) for mark in (USER, ASSISTANT) if rest.find(mark) >= 0]
        if not starts:
            break
        at, mark = min(starts)
        rest = rest[at + len(mark) :]
        end = min((i for i in (rest.find(USER), rest.find(ASSISTANT)) if i >= 0), default=len(rest))
        turns.append(Turn("user" if mark == USER else "assistant", rest[:end].strip()))
        rest = rest[end:]
    if turns and turns[-1].role == "assistant" and not turns[-1].text:
        turns.pop()
    if not any(turn.role == "user" for turn in turns):
        raise ValueError(f"no '\\n\\nHuman:' turn in {text[:80]!r}")
    return turns

"""The one place that renders turns as text and tokens, and owns the roles, the end mark and the stop strings.

The template is the dialogue format of Anthropic's HH data. It is saved as the tokenizer's chat template, so that transformers
renders the same tokens: "\\n\\nHuman: {question}\\n\\nAssistant:" and then " {answer}" and EOS. A prompt ends with a colon and an
answer begins with a space, so no token crosses the boundary when the two are tokenised one by one.
"""

from __future__ import annotations

from typing import Any

from rlhf.data.records import Turn

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


def encode_prompt(tokenizer: Any, turns: list[Turn], max_tokens: int) -> list[int] | None:
    """Token ids of a prompt. One that is too long loses its first turns, always keeping a user's turn in front;
    None when the last turn alone has more than `max_tokens`."""
    for first in range(len(turns)):
        if first and turns[first].role != "user":
            continue
        ids = tokenizer(render_prompt(tokenizer, turns[first:]), add_special_tokens=False).input_ids
        if len(ids) <= max_tokens:
            return ids
    return None


def encode_response(tokenizer: Any, text: str, max_tokens: int) -> list[int]:
    """Token ids of an answer with its EOS; an answer that is too long is cut and carries none."""
    ids = tokenizer(" " + text.strip(), add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    return ids[:max_tokens]


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

"""Render turns as text: chat templates, roles, the end token (EOS), stop strings.

No other module does. `data.template` chooses one of five styles, which is saved as the tokenizer's
chat template: transformers, vLLM and chat.py then render a prompt as training did.

    hh         "\\n\\nHuman: {question}\\n\\nAssistant:", then " {answer}" and the tokenizer's own
               EOS, as in Anthropic's HH data
    chatml     "<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n", then
               "{answer}<|im_end|>"
    llama3     BOS, then the same with <|start_header_id|>user<|end_header_id|>\\n\\n, <|eot_id|>
    tokenizer  the template that the model brings
    none       "{question}{answer}" and EOS: raw text, for prompts that need no roles
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.config.choices import Template
from rlhf.data.records import Turn, uses_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of the style hh

TEMPLATES = {
    Template.hh: (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '\n\nHuman: ' + message.content | trim }}"
        "{% elif message.role == 'assistant' %}"
        "{{ '\n\nAssistant: ' + (message.content if loop.last else message.content | trim) }}"
        "{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% else %}{{ ('' if loop.first else '\n\n') + message.content }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
    ),
    Template.chatml: (
        # the line break begins a turn, so a dialogue ends with its EOS: where scores are read
        "{% for message in messages %}"
        "{{ ('' if loop.first else '\n') + '<|im_start|>' + message.role + '\n' + message.content"
        " + '<|im_end|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
    ),
    Template.llama3: (
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n'"
        " + (message.content if message.role == 'assistant' and loop.last"
        " else message.content | trim) + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    Template.none: (
        "{% for message in messages %}"
        "{{ message.content }}"
        "{% if loop.last and message.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
_MARKS = {  # special tokens; the last one ends a turn
    Template.chatml: ["<|im_start|>", "<|im_end|>"],
    Template.llama3: ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
# without a system turn, which some templates refuse
_PROBE = [Turn("user", "One?"), Turn("assistant", "Two."), Turn("user", "Three?")]
_PROBE_ANSWER = "Four."


# --- the template


def install_chat_template(tokenizer: PreTrainedTokenizerBase, style: Template) -> None:
    """Make `style` the tokenizer's chat template, and the token that ends its turns the EOS.

    Special tokens that the vocabulary lacks are added. Doing it twice changes nothing.

    Raises: UserError when the model's own template is missing or cannot be used for training.
    """
    if style is Template.tokenizer:
        tokenizer.eos_token = _end_token_of_model(tokenizer)
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
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + TEMPLATES[style]


def warn_of_date(tokenizers: Iterable[PreTrainedTokenizerBase]) -> None:
    """Warn where a template writes today's date into a prompt, as those of Llama 3.2 and SmolLM3.

    Results of two days then differ; a line for the first such tokenizer.
    """
    for tokenizer in tokenizers:
        if "strftime_now" in str(tokenizer.chat_template):
            log.warning(
                f"data.template=tokenizer: the template of {tokenizer.name_or_path} writes today's "
                "date into prompts; tokenized data keep the date of their first day. hh, chatml "
                "and llama3 write none"
            )
            return


def stop_strings(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that end a response without EOS: the mark of a user's turn, where it is plain text."""
    return [USER] if USER in render_prompt(tokenizer, _PROBE) else []


def render_prompt(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> str:
    """The text that the assistant's answer follows.

    Raises: UserError when the model's own template refuses these roles.
    """
    return _render(tokenizer, turns, True)


def render(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> str:
    """The text of a whole conversation. Raises: as render_prompt."""
    return _render(tokenizer, turns, False)


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], for_answer: bool) -> str:
    messages = [message_of(turn) for turn in turns if turn.role != "tools"]
    tools = [json.loads(turn.text) for turn in turns if turn.role == "tools"]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools[0] if tools else None,
            tokenize=False,
            add_generation_prompt=for_answer,
        )
    except Exception as error:  # it has no system turn, wants roles to alternate, divides by 0, ...
        roles = ", ".join(turn.role for turn in turns)
        raise _unfit(
            tokenizer, f"refuses the turns {roles} ({' '.join(str(error).split())})"
        ) from None


def message_of(turn: Turn) -> dict[str, Any]:
    """A turn as transformers' chat templates take it."""
    more = json.loads(turn.more) if turn.more else {}
    return {"role": turn.role, "content": turn.text, **more}


def _unfit(tokenizer: PreTrainedTokenizerBase, problem: str) -> UserError:
    return UserError(
        f"data.template=tokenizer: the chat template of {tokenizer.name_or_path} {problem}:"
        " choose data.template=hh, chatml or llama3"
    )


def _around_answer(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn] = _PROBE
) -> tuple[str, str]:
    """What the template writes between a prompt and its answer, and after the answer (EOS first).

    Raises: UserError when a dialogue does not begin with its prompt.
    """
    prompt = render_prompt(tokenizer, turns)
    dialogue = _render(tokenizer, [*turns, Turn("assistant", _PROBE_ANSWER)], False)
    before, answer, after = dialogue.removeprefix(prompt).partition(_PROBE_ANSWER)
    if not dialogue.startswith(prompt) or not answer:
        raise _unfit(tokenizer, "does not render a dialogue as its prompt and then the answer")
    return before, after


def _end_token_of_model(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token with which the model's own template ends an answer.

    Raises: UserError when there is none.
    """
    if not tokenizer.chat_template:
        raise UserError(
            f"data.template=tokenizer: {tokenizer.name_or_path} has no chat template: choose"
            " data.template=hh, chatml or llama3"
        )
    before, after = _around_answer(tokenizer)
    if _around_answer(tokenizer, _PROBE[-1:]) != (before, after):
        raise _unfit(tokenizer, "renders the first answer of a dialogue unlike the later ones")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Llama 2 has a space in front of it
    ends = [token for token in special if after.lstrip().startswith(token)]
    if not ends:
        raise _unfit(
            tokenizer, f"does not end an answer with a special token (but with {after[:40]!r})"
        )
    return max(ends, key=len)


def written_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the special tokens that the template writes around texts, the EOS among them."""
    dialogue = _render(tokenizer, [*_PROBE, Turn("assistant", _PROBE_ANSWER)], False)
    ids = set(tokenizer(dialogue, add_special_tokens=False).input_ids)
    added = tokenizer.added_tokens_decoder
    return sorted(token for token in ids if token in added and added[token].special)


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, own_eos: str | None) -> None:
    """Give a tokenizer a pad token that its template never writes; one that is good stays.

    The vocabulary keeps its size where it has an unused special token: one named so, the unknown
    token, the end of a text where the template ends answers with another token, or a reserved one.
    Else <|pad|> is added.

    Args: own_eos: the EOS before the template was installed.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    written = tokenizer.convert_ids_to_tokens(written_tokens(tokenizer))
    # a model's own template may write others, around a tool's output or a thought
    free = {
        token
        for token in special
        if token != tokenizer.eos_token
        and token not in written
        and token not in tokenizer.chat_template
    }
    pad = tokenizer.pad_token
    if pad is not None and (pad in free or pad not in special):
        return
    named = [token for token in special if "pad" in token.lower()]
    reserved = [
        token for token in special if re.search("reserved|unused|dummy|extra", token.lower())
    ]
    candidates = [*named, tokenizer.unk_token, own_eos, *reserved]
    chosen = next((token for token in candidates if token in free), "<|pad|>")
    tokenizer.add_special_tokens({"pad_token": chosen})


# --- answers, tools, and the end of a dialogue


def rendered_answer(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], answer: Turn) -> str:
    """What the template writes after a prompt for an answer, up to its EOS.

    Raises: UserError where a dialogue is not its prompt, the answer, and the usual end.
    """
    prompt = render_prompt(tokenizer, turns)
    dialogue = _render(tokenizer, [*turns, answer], False)
    after = _around_answer(tokenizer)[1]
    if not dialogue.startswith(prompt) or not dialogue.endswith(after):
        shown = f"{dialogue[-200:]!r} as its prompt {prompt[-100:]!r}, the answer and {after!r}"
        raise _unfit(tokenizer, f"does not render {shown}")
    return dialogue[len(prompt) : len(dialogue) - len(after)] + frame(tokenizer)[1]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text between prompt and answer, and that between answer and EOS."""
    before, after = _around_answer(tokenizer)
    return before, after.partition(tokenizer.eos_token)[0]


def problem_of_tools(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> str:
    """Why the template cannot express the tools of a conversation; "" where it can, or has none.

    A template that does not know tools either refuses them, or writes nothing of them.
    """
    if not uses_tools(turns):
        return ""
    try:
        *prompt, last = turns
        if last.role == "assistant":
            rendered = render_prompt(tokenizer, prompt) + rendered_answer(tokenizer, prompt, last)
        else:
            rendered = render_prompt(tokenizer, turns)
    except UserError:
        return "the chat template refuses messages of tools"
    needed = [turn.text for turn in turns if turn.role == "tool"]
    for turn in turns:
        parts = json.loads(turn.text) if turn.role == "tools" else []
        parts += message_of(turn).get("tool_calls", [])
        functions = [part.get("function", part) for part in parts]
        needed += [str(f.get("name", "") if isinstance(f, dict) else f) for f in functions]
    # a template may write a text as JSON
    if all(text in rendered or json.dumps(text)[1:-1] in rendered for text in needed):
        return ""
    return "the chat template does not write messages of tools"


def after_eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what the template writes after the EOS of a dialogue's last answer."""
    text = _around_answer(tokenizer)[1].partition(tokenizer.eos_token)[2]
    return tokenizer(text, add_special_tokens=False).input_ids


def end_at_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the template end a dialogue with its EOS, where stage=rm reads scores.

    Other programs read a score at the last token of what the template writes.
    """
    if after_eos(tokenizer):
        tokenizer.chat_template = (
            "{% set dialogue %}" + tokenizer.chat_template + "{% endset %}"
            "{% if messages[-1]['role'] == 'assistant' %}"
            "{{ dialogue.rpartition(eos_token)[0] + eos_token }}"
            "{% else %}{{ dialogue }}{% endif %}"
        )

"""Render turns as text and token ids: chat templates, roles, the end token (EOS), stop strings.

No other module does. `data.template` chooses one of five styles, which is saved as the tokenizer's
chat template: transformers, vLLM and chat.py then render a prompt as training did.

    hh         "\\n\\nHuman: {question}\\n\\nAssistant:", then " {answer}" and the tokenizer's own
               EOS, as in Anthropic's HH data
    chatml     "<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n", then
               "{answer}<|im_end|>"
    llama3     BOS, then the same with <|start_header_id|>user<|end_header_id|>\\n\\n, <|eot_id|>
    tokenizer  the template that the model brings
    none       "{question}{answer}" and EOS: raw text, for prompts that need no roles

Prompt and answer are tokenized separately, so no token crosses the boundary, and a response that is
sampled after a prompt consists of tokens that training showed there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf.base.errors import UserError
from rlhf.config.choices import Template
from rlhf.data.records import Demonstration, Pair, Turn, uses_tools

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BREAK = "\n"
USER, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # of the style hh

_TEMPLATES = {
    Template.hh: (
        "{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '\n\nHuman: ' + message.content | trim }}"
        "{% elif message.role == 'assistant' %}"
        "{{ '\n\nAssistant: ' + (message.content if loop.last else message.content | trim) }}"
        "{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% else %}{{ message.content }}{% endif %}"
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
    tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + _TEMPLATES[style]


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
    from jinja2 import TemplateError

    messages = [message_of(turn) for turn in turns if turn.role != "tools"]
    tools = [json.loads(turn.text) for turn in turns if turn.role == "tools"]
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=tools[0] if tools else None,
            tokenize=False,
            add_generation_prompt=for_answer,
        )
    except TemplateError as error:  # it has no system turn, or wants roles to alternate, ...
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


# --- the tokens


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[Turn]], max_tokens: int
) -> list[list[int] | None]:
    """Token ids of each prompt; None when its last turn alone has more than `max_tokens`, or the
    template cannot express its tools.

    A prompt that is too long loses its first exchanges, so that it still begins with a user's turn.
    The system's turn and the definitions of tools in front of them stay.
    """
    return [ids for ids, _ in fit_prompts(tokenizer, prompts, max_tokens)]


def fit_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[Turn]], max_tokens: int
) -> list[tuple[list[int] | None, bool]]:
    """The same, each with whether the prompt was too long."""
    if not prompts:
        return []
    can_write = [not problem_of_tools(tokenizer, turns) for turns in prompts]
    encoded = tokenizer(
        [render_prompt(tokenizer, turns) if ok else "" for turns, ok in zip(prompts, can_write)],
        add_special_tokens=False,
    ).input_ids
    fitted: list[tuple[list[int] | None, bool]] = []
    for turns, ids, ok in zip(prompts, encoded, can_write):
        if len(ids) <= max_tokens:
            fitted.append((ids if ok else None, False))
        else:
            fitted.append((_shorten(tokenizer, turns, max_tokens), True))
    return fitted


def _shorten(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], max_tokens: int
) -> list[int] | None:
    kept = [turn for turn in turns[:2] if turn.role in ("tools", "system")]
    for first in range(len(kept) + 1, len(turns)):
        if turns[first].role == "user":
            ids = tokenizer(
                render_prompt(tokenizer, kept + turns[first:]), add_special_tokens=False
            ).input_ids
            if len(ids) <= max_tokens:
                return ids
    return None


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[str],
    max_tokens: int,
    prompts: Sequence[list[Turn]] | None = None,
    calls: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each answer and its EOS; an answer that is too long is cut and has no EOS.

    Args:
        prompts: of the answers. A model's own template is given the whole conversation, because it
            may write other things around an answer that has thoughts.
        calls: of tools, in the answers (`Turn.more`); with prompts.
    """
    if not answers:
        return []
    if tokenizer.chat_template.endswith(_TEMPLATES[Template.none]):
        texts = list(answers)  # with the white space at their ends
    elif prompts is None or tokenizer.chat_template.endswith(tuple(_TEMPLATES.values())):
        before, space = _frame(tokenizer)
        texts = [before + text.rstrip() + space for text in answers]
    else:
        rows = zip(prompts, answers, calls or [""] * len(answers))
        texts = [
            _rendered_answer(tokenizer, turns, Turn("assistant", text, more))
            for turns, text, more in rows
        ]
    encoded = encode_continuations(tokenizer, texts)
    return [(ids + [tokenizer.eos_token_id])[:max_tokens] for ids in encoded]


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[list[int]]:
    """Token ids of texts that follow other text.

    SentencePiece tokenizers (Llama 2) put a space in front of what they take for the beginning of a
    text; here there is none.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False).input_ids
    if not puts_space_in_front(tokenizer):
        return encoded
    before = tokenizer(BREAK, add_special_tokens=False).input_ids
    longer = tokenizer([BREAK + text for text in texts], add_special_tokens=False).input_ids
    # as it is where a token would cross the border
    return [
        after[len(before) :] if after[: len(before)] == before else ids
        for ids, after in zip(encoded, longer)
    ]


def puts_space_in_front(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the beginning of a text is tokenized as if a space were in front of it."""
    alone, before, after = (
        tokenizer(text, add_special_tokens=False).input_ids for text in ("a", BREAK, BREAK + "a")
    )
    return after != before + alone


def _rendered_answer(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], answer: Turn) -> str:
    """What the template writes after a prompt for an answer, up to its EOS.

    Raises: UserError where a dialogue is not its prompt, the answer, and the usual end.
    """
    prompt = render_prompt(tokenizer, turns)
    dialogue = _render(tokenizer, [*turns, answer], False)
    after = _around_answer(tokenizer)[1]
    if not dialogue.startswith(prompt) or not dialogue.endswith(after):
        shown = f"{dialogue[-200:]!r} as its prompt {prompt[-100:]!r}, the answer and {after!r}"
        raise _unfit(tokenizer, f"does not render {shown}")
    return dialogue[len(prompt) : len(dialogue) - len(after)] + _frame(tokenizer)[1]


def problem_of_tools(tokenizer: PreTrainedTokenizerBase, turns: list[Turn]) -> str:
    """Why the template cannot express the tools of a conversation; "" where it can, or has none.

    A template that does not know tools either refuses them, or writes nothing of them.
    """
    if not uses_tools(turns):
        return ""
    try:
        *prompt, last = turns
        if last.role == "assistant":
            rendered = render_prompt(tokenizer, prompt) + _rendered_answer(tokenizer, prompt, last)
        else:
            rendered = render_prompt(tokenizer, turns)
    except UserError:
        return "the chat template refuses messages of tools"
    needed = [turn.text for turn in turns if turn.role == "tool"]
    for turn in turns:
        parts = json.loads(turn.text) if turn.role == "tools" else []
        parts += message_of(turn).get("tool_calls", [])
        needed += [part.get("function", part).get("name", "") for part in parts]
    # a template may write a text as JSON
    if all(text in rendered or json.dumps(text)[1:-1] in rendered for text in needed):
        return ""
    return "the chat template does not write messages of tools"


def encode_response(tokenizer: PreTrainedTokenizerBase, answer: str, ended: bool) -> list[int]:
    """Token ids of one sampled response, with EOS if it ended with EOS."""
    before, space = _frame(tokenizer)
    text = before + answer.rstrip() + (space if ended else "")
    [ids] = encode_continuations(tokenizer, [text])
    return [*ids, tokenizer.eos_token_id] if ended else ids


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text between prompt and answer, and that between answer and EOS."""
    before, after = _around_answer(tokenizer)
    return before, after.partition(tokenizer.eos_token)[0]


def after_eos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what the template writes after the EOS of a dialogue's last answer."""
    text = _around_answer(tokenizer)[1].partition(tokenizer.eos_token)[2]
    return tokenizer(text, add_special_tokens=False).input_ids


def end_at_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the template end a dialogue with its EOS, where our reward models are read.

    Other programs read a score at the last token of what the template writes.
    """
    if after_eos(tokenizer):
        tokenizer.chat_template = (
            "{% set dialogue %}" + tokenizer.chat_template + "{% endset %}"
            "{% if messages[-1]['role'] == 'assistant' %}"
            "{{ dialogue.rpartition(eos_token)[0] + eos_token }}"
            "{% else %}{{ dialogue }}{% endif %}"
        )


def content(tokenizer: PreTrainedTokenizerBase) -> str:
    """Everything that decides which tokens a tokenizer makes of turns, as one text."""
    rules = (
        tokenizer.backend_tokenizer.to_str()
        if tokenizer.is_fast
        else str(sorted(tokenizer.get_vocab().items()))
    )
    special = f"{tokenizer.bos_token} {tokenizer.eos_token} {tokenizer.pad_token}"
    return f"{rules}\n{tokenizer.chat_template}\n{special}"


def same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers have the same vocabulary, special tokens and chat template."""
    return _signature(one) == _signature(other)


def _signature(
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[dict[str, int], list[int | None], list[list[int] | None], list[int]]:
    """Vocabulary, special tokens, and what the template makes of a dialogue and of an answer."""
    probe = [
        Turn("user", "A tokenizer's probe: 3.14 café\n  two spaces"),
        Turn("assistant", "Yes - it's one."),
        Turn("user", "Thanks!"),
    ]
    return (
        tokenizer.get_vocab(),
        [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        encode_prompts(tokenizer, [probe], 10**9),
        encode_response(tokenizer, "So.", True),
    )


def encode_demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    max_prompt: int,
    max_response: int,
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer.

    Skipped: prompt too long, or with tools that the template cannot express.
    """
    demonstrations = [
        d
        for d in demonstrations
        if not problem_of_tools(tokenizer, [*d.prompt, Turn("assistant", d.response, d.calls)])
    ]
    prompts = encode_prompts(tokenizer, [d.prompt for d in demonstrations], max_prompt)
    turns = [d.prompt for d in demonstrations]
    texts, calls = [d.response for d in demonstrations], [d.calls for d in demonstrations]
    answers = encode_responses(tokenizer, texts, max_response, turns, calls)
    return [(prompt, answer) for prompt, answer in zip(prompts, answers) if prompt is not None]


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], max_prompt: int, max_response: int
) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids of prompt, chosen, rejected.

    Skipped: prompt too long, no rejected answer, or tools that the template cannot express.
    """
    pairs = [
        pair
        for pair in pairs
        if pair.rejected is not None and not problem_of_tools(tokenizer, pair.prompt)
    ]
    prompts = encode_prompts(tokenizer, [pair.prompt for pair in pairs], max_prompt)
    turns = [pair.prompt for pair in pairs]
    chosen = encode_responses(tokenizer, [pair.chosen for pair in pairs], max_response, turns)
    rejected = encode_responses(
        tokenizer, [pair.rejected or "" for pair in pairs], max_response, turns
    )
    return [(prompt, c, r) for prompt, c, r in zip(prompts, chosen, rejected) if prompt is not None]


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of a response, without EOS and what the template writes in front of it.

    White space in front of it stays, as in the data: code may begin with it.
    """
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if puts_space_in_front(tokenizer):  # and takes one away
        before_ids = tokenizer(BREAK, add_special_tokens=False).input_ids
        longer = tokenizer.decode(before_ids + ids, skip_special_tokens=True)
        text = longer.removeprefix(tokenizer.decode(before_ids))
    text = text.rstrip()
    before = _frame(tokenizer)[0]
    if text.startswith(before):
        return text.removeprefix(before)
    return text.lstrip().removeprefix(before.strip()).lstrip()

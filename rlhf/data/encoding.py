"""Token ids of prompts and answers, and back to text.

Prompt and answer are tokenized separately, so no token crosses the boundary, and a response that is
sampled after a prompt consists of tokens that training showed there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf.config.choices import Template
from rlhf.data import template
from rlhf.data.records import Demonstration, Pair, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LINE_BREAK = "\n"


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
    can_write = [not template.problem_of_tools(tokenizer, turns) for turns in prompts]
    encoded = tokenizer(
        [
            template.render_prompt(tokenizer, turns) if ok else ""
            for turns, ok in zip(prompts, can_write)
        ],
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
                template.render_prompt(tokenizer, kept + turns[first:]), add_special_tokens=False
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
    if tokenizer.chat_template.endswith(template.TEMPLATES[Template.none]):
        texts = list(answers)  # with the white space at their ends
    elif prompts is None or tokenizer.chat_template.endswith(tuple(template.TEMPLATES.values())):
        before, space = template.frame(tokenizer)
        texts = [before + text.rstrip() + space for text in answers]
    else:
        rows = zip(prompts, answers, calls or [""] * len(answers))
        texts = [
            template.rendered_answer(tokenizer, turns, Turn("assistant", text, more))
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
    before = tokenizer(LINE_BREAK, add_special_tokens=False).input_ids
    longer = tokenizer([LINE_BREAK + text for text in texts], add_special_tokens=False).input_ids
    # as it is where a token would cross the border
    return [
        after[len(before) :] if after[: len(before)] == before else ids
        for ids, after in zip(encoded, longer)
    ]


def puts_space_in_front(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the beginning of a text is tokenized as if a space were in front of it."""
    alone, before, after = (
        tokenizer(text, add_special_tokens=False).input_ids
        for text in ("a", LINE_BREAK, LINE_BREAK + "a")
    )
    return after != before + alone


def encode_response(tokenizer: PreTrainedTokenizerBase, answer: str, ended: bool) -> list[int]:
    """Token ids of one sampled response, with EOS if it ended with EOS."""
    before, space = template.frame(tokenizer)
    text = before + answer.rstrip() + (space if ended else "")
    [ids] = encode_continuations(tokenizer, [text])
    return [*ids, tokenizer.eos_token_id] if ended else ids


def to_end(tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: list[int]) -> list[int]:
    """Token ids of prompt and response to the end of what the template writes.

    There a reward model from elsewhere gives its score. Those of stage=rm end at the EOS.
    """
    is_finished = bool(response) and response[-1] == tokenizer.eos_token_id
    return prompt + response + (template.after_eos(tokenizer) if is_finished else [])


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
        if not template.problem_of_tools(
            tokenizer, [*d.prompt, Turn("assistant", d.response, d.calls)]
        )
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
        if pair.rejected is not None and not template.problem_of_tools(tokenizer, pair.prompt)
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
        before_ids = tokenizer(LINE_BREAK, add_special_tokens=False).input_ids
        longer = tokenizer.decode(before_ids + ids, skip_special_tokens=True)
        text = longer.removeprefix(tokenizer.decode(before_ids))
    text = text.rstrip()
    before = template.frame(tokenizer)[0]
    if text.startswith(before):
        return text.removeprefix(before)
    return text.lstrip().removeprefix(before.strip()).lstrip()

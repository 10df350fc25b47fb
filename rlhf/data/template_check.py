"""Check on the first rows of each source that training sees what the chat template writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.data import encoding, template
from rlhf.data.records import SourceReport, Turn
from rlhf.data.splits import Part

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

FIRST = 8  # rows of each source
NO_LIMIT = 10**9  # tokens


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    table: datasets.Dataset,
    report: Sequence[SourceReport],
    part: Part,
    answers: Sequence[str] = ("chosen",),
) -> None:
    """Compare the ids of prompt + answer with those of the template's text of the conversation.

    Args: report: of the sources of `table`.  part: the rows in it.  answers: its columns.
    Raises: UserError with the first difference, where the texts differ. Where only a token would
        cross the border of prompt and answer, the log says so: a sampler sees the border too.
    """
    checked = split = 0
    for i in first_rows(report, part):
        row = table[i]
        turns = [Turn(**turn) for turn in row["prompt"]]
        for name in answers:
            last = Turn("assistant", row[name], row["calls"] if name == "chosen" else "")
            if template.problem_of_tools(tokenizer, [*turns, last]):
                continue
            checked += 1
            split += not is_same(tokenizer, turns, last)
    if split:
        log.info(
            f"{split} of the first {checked} conversations have a token that would cross the "
            "border of prompt and answer; both are tokenized apart, as when the policy responds"
        )


def first_rows(report: Sequence[SourceReport], part: Part) -> Iterator[int]:
    """The numbers of the first rows of each source in the table of a part."""
    start = 0
    for one in report:
        count = one.get(part, 0)
        yield from range(start, start + min(FIRST, count))
        start += count


def is_same(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], answer: Turn) -> bool:
    """Whether training has the ids that the template's text of the whole conversation has.

    Raises: UserError where already the texts differ.
    """
    [prompt] = encoding.encode_prompts(tokenizer, [turns], NO_LIMIT)
    [response] = encoding.encode_responses(
        tokenizer, [answer.text], NO_LIMIT, [turns], [answer.more]
    )
    ours = (prompt or []) + response + template.after_eos(tokenizer)
    whole = template.render(tokenizer, [*turns, answer])
    expected = tokenizer(whole, add_special_tokens=False).input_ids
    if ours == expected:
        return True
    one, other = (tokenizer.decode(ids) for ids in (ours, expected))
    if one != other:
        raise UserError(
            f"data.template: training would see another text than the chat template of "
            f"{tokenizer.name_or_path} writes: {difference(one, other)}; choose another "
            "data.template (hh, chatml, llama3 or none)"
        )
    return False


def difference(one: str, other: str) -> str:
    """Where two texts differ first, with some text around it."""
    pairs = enumerate(zip(one, other))
    at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, at - 20)
    return f"{one[start : at + 40]!r} instead of {other[start : at + 40]!r}"

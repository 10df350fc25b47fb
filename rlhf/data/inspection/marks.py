"""Special tokens and rendered prompts inside the texts of a data set.

A tokenizer reads "</s>" in a text as the token that ends a response, wherever it stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rlhf.config.choices import Template
from rlhf.data.inspection.measuring import SAMPLE

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

# begin a turn in the templates of common models: a prompt with one has been rendered already
RENDERED = (
    "<|im_start|>",
    "<|start_header_id|>",
    "<start_of_turn>",
    "<|user|>",
    "<|system|>",
    "[INST]",
)


class Marks(NamedTuple):
    """Rows of a table with special tokens in their texts, and rows whose prompt is rendered."""

    special: int
    first_special: str  # token and text of the first such row, shortened
    rendered: int
    first_rendered: str


def find_marks(
    tokenizer: PreTrainedTokenizerBase, table: datasets.Dataset, style: Template
) -> Marks:
    """Look for marks in the first rows of a table.

    Args: style: data.template. With `none` prompts may have marks: they are rendered already.
    """
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    counts, first = {"special": 0, "rendered": 0}, {"special": "", "rendered": ""}
    for row in table.select(range(min(SAMPLE, len(table)))):
        turns = [] if style is Template.none else row.get("prompt") or []
        prompt = [turn["text"] for turn in turns]
        answers = [row.get(name) or "" for name in ("chosen", "rejected", "text")]
        for name, marks, texts in (
            ("rendered", RENDERED, prompt),
            ("special", special, [*prompt, *answers]),
        ):
            found = next(((m, text) for text in texts for m in marks if m in text), None)
            if found:
                counts[name] += 1
                first[name] = first[name] or f"{found[0]} in {excerpt(found[1], found[0])!r}"
                break
    return Marks(counts["special"], first["special"], counts["rendered"], first["rendered"])


def excerpt(text: str, mark: str) -> str:
    """The mark with some of the text around it."""
    at = text.index(mark)
    return text[max(0, at - 20) : at + len(mark) + 20]


def verdicts_on_marks(name: str, marks: Marks) -> list[str]:
    """One line for each kind that was found. Args: name: of the source."""
    lines = []
    if marks.rendered:
        lines.append(
            f"prompts of {name} that are rendered already: {marks.rendered:,}, such as "
            f"{marks.first_rendered}: give the messages instead, which data.template renders, or "
            "choose data.template=none"
        )
    if marks.special:
        lines.append(
            f"rows of {name} with special tokens inside their texts: {marks.special:,}, such as "
            f"{marks.first_special}: the model reads them as tokens of its template; remove or "
            "rewrite them"
        )
    return lines

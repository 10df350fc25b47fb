"""Token ids of the records, on disk: one row for each demonstration, pair, prompt or text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np

from rlhf.data import template
from rlhf.data.cache import Columns, cached_map, digest
from rlhf.data.records import Turn

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")
Ids = list[int]


class Rows(Sequence[Row], Generic[Row]):
    """Token ids of a part of the data, read from disk row by row.

    `lengths`: tokens of each row; of a pair, prompt and longer answer.
    `skipped`: number of rows that are not there because their prompt is too long.
    `shortened`: number of rows whose prompt was too long and lost its first turns.
    `truncated`: number of rows with an answer that is too long; it is cut, and carries no EOS.
    """

    def __init__(
        self,
        table: datasets.Dataset,
        read: Callable[[dict[str, Any]], Row],
        kind: str,
        skipped_for: str = "prompt too long",
    ):
        """Args: read: from a row of the table to what `rows[i]` gives.  kind: what a row is."""
        kept = table.data.column("kept").to_numpy(zero_copy_only=False)
        truncated = table.data.column("truncated").to_numpy(zero_copy_only=False)
        # an array: a list would take ten times the memory
        self.lengths: Sequence[int] = table.data.column("length").to_numpy()[kept]
        shortened = table.data.column("shortened").to_numpy(zero_copy_only=False)
        self.skipped, self.truncated = int((~kept).sum()), int(truncated[kept].sum())
        self.shortened = int(shortened[kept].sum())
        self.table = table if kept.all() else table.select(np.flatnonzero(kept))
        self._read = read
        self._kind, self._skipped_for = kind, skipped_for

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return self._read(self.table[i])

    def __str__(self) -> str:
        """For instance '277 demonstrations (2 skipped: prompt too long; 120 truncated)'."""
        notes = []
        if self.skipped:
            notes.append(f"{self.skipped:,} skipped: {self._skipped_for}")
        if self.shortened:
            notes.append(f"{self.shortened:,} lost their first turns")
        if self.truncated:
            notes.append(f"{self.truncated:,} truncated")
        return f"{len(self):,} {self._kind}" + (f" ({'; '.join(notes)})" if notes else "")


def demonstrations(
    tokenizer: PreTrainedTokenizerBase,
    table: datasets.Dataset,
    max_prompt: int,
    max_response: int,
    workers: int | None = None,
) -> Rows[tuple[Ids, Ids]]:
    """Token ids of prompt and chosen answer.

    Args: max_prompt, max_response: in tokens. A demonstration whose prompt is too long is skipped;
        a longer answer is truncated.
    """
    encoded = _encode(tokenizer, table, ["chosen"], max_prompt, max_response, workers)
    return Rows(encoded, lambda row: (row["prompt"], row["chosen"]), "demonstrations")


def pairs(
    tokenizer: PreTrainedTokenizerBase,
    table: datasets.Dataset,
    max_prompt: int,
    max_response: int,
    workers: int | None = None,
) -> Rows[tuple[Ids, Ids, Ids]]:
    """Token ids of prompt, chosen and rejected; limits as for `demonstrations`."""
    columns = ["chosen", "rejected"]
    encoded = _encode(tokenizer, table, columns, max_prompt, max_response, workers)
    return Rows(encoded, lambda row: (row["prompt"], row["chosen"], row["rejected"]), "pairs")


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    table: datasets.Dataset,
    max_prompt: int,
    workers: int | None = None,
) -> Rows[tuple[list[Turn], Ids]]:
    """Turns and token ids of each prompt that is not too long."""

    def read(row: dict[str, Any]) -> tuple[list[Turn], Ids]:
        return [Turn(**turn) for turn in row["turns"]], row["prompt"]

    return Rows(_encode(tokenizer, table, ["turns"], max_prompt, 0, workers), read, "prompts")


def texts(
    tokenizer: PreTrainedTokenizerBase,
    table: datasets.Dataset,
    max_tokens: int,
    workers: int | None = None,
) -> Rows[tuple[Ids, Ids]]:
    """Token ids of plain texts as (first token, the rest): a text predicts all but its first token.

    Args: max_tokens: of a text; the rest of it is cut off. Texts of one token are skipped.
    """
    import datasets

    features = datasets.Features({"ids": datasets.List(datasets.Value("int32")), **_facts()})
    key = digest(
        table._fingerprint,
        template.content(tokenizer),
        str(("text", max_tokens)),
        Path(__file__).read_text(),
    )
    function = partial(_encode_texts, tokenizer=tokenizer, max_tokens=max_tokens)
    encoded = cached_map(table, function, features, key, "tokenizing", workers)
    return Rows(
        encoded, lambda row: (row["ids"][:1], row["ids"][1:]), "texts", "shorter than 2 tokens"
    )


def _facts() -> dict[str, datasets.Value]:
    """What `Rows` needs of each row: is it kept, what was cut, how many tokens has it."""
    import datasets

    boolean, integer = datasets.Value("bool"), datasets.Value("int32")
    return {"kept": boolean, "shortened": boolean, "truncated": boolean, "length": integer}


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    table: datasets.Dataset,
    columns: list[str],
    max_prompt: int,
    max_response: int,
    workers: int | None,
) -> datasets.Dataset:
    """A table with the token ids of the prompts and of some columns; cached.

    Args: columns: of answers; `turns` keeps the prompts as text, too.
    """
    import datasets

    ids, strings = datasets.List(datasets.Value("int32")), datasets.Value("string")
    turns = datasets.List({"role": strings, "text": strings})
    features = {"prompt": ids, **_facts()}
    features |= {name: turns if name == "turns" else ids for name in columns}
    key = digest(
        table._fingerprint,
        template.content(tokenizer),
        str((columns, max_prompt, max_response)),
        Path(__file__).read_text() + Path(template.__file__).read_text(),
    )
    function = partial(
        _encode_batch,
        tokenizer=tokenizer,
        columns=columns,
        max_prompt=max_prompt,
        max_response=max_response,
    )
    features = datasets.Features(features)
    return cached_map(table, function, features, key, "tokenizing", workers)


def _encode_texts(
    batch: Columns, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> dict[str, Any]:
    ids = tokenizer(batch["text"], add_special_tokens=False).input_ids
    return {
        "ids": [row[:max_tokens] for row in ids],
        "kept": [min(len(row), max_tokens) > 1 for row in ids],
        "shortened": [False] * len(ids),
        "truncated": [len(row) > max_tokens for row in ids],
        "length": [min(len(row), max_tokens) for row in ids],
    }


def _encode_batch(
    batch: Columns,
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    max_prompt: int,
    max_response: int,
) -> dict[str, Any]:
    turns = [[Turn(**turn) for turn in prompt] for prompt in batch["prompt"]]
    fitted = template.fit_prompts(tokenizer, turns, max_prompt)
    prompts = [ids for ids, _ in fitted]
    answers = {
        name: template.encode_responses(tokenizer, batch[name], max_response, turns)
        for name in columns
        if name != "turns"
    }
    # of each row its answers: none for a table of prompts
    rows: list[tuple[Ids, ...]] = list(zip(*answers.values())) if answers else [()] * len(turns)
    longest = [max((len(ids) for ids in row), default=0) for row in rows]
    encoded: dict[str, Any] = {
        "prompt": [ids or [] for ids in prompts],
        "kept": [ids is not None for ids in prompts],
        "shortened": [too_long for _, too_long in fitted],
        "truncated": [any(ids[-1] != tokenizer.eos_token_id for ids in row) for row in rows],
        "length": [len(ids or []) + answer for ids, answer in zip(prompts, longest)],
        **answers,
    }
    return encoded | ({"turns": batch["prompt"]} if "turns" in columns else {})

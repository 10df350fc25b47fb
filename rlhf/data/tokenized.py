"""Token ids of the records, on disk: one row for each demonstration, pair, prompt or text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

import numpy as np

from rlhf.data import encoding, template
from rlhf.data.cache import Columns, cached_map, digest
from rlhf.data.records import PAIR_COLUMNS, Pair, Prompt, Turn, record_features

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

KEPT = ("columns", "is_messages")  # of a table of prompts, for reward functions
Row = TypeVar("Row")
Ids = list[int]


class Rows(Sequence[Row], Generic[Row]):
    """Token ids of a part of the data, read from disk row by row.

    `lengths`: tokens of each row; of a pair, prompt and longer answer.
    `skipped`: number of rows that are not there; `reasons`: the same by reason.
    `shortened`: number of rows whose prompt was too long and lost its first turns.
    `truncated`: number of rows with an answer that is too long; it is cut, and carries no EOS.
    """

    def __init__(self, table: datasets.Dataset, read: Callable[[dict[str, Any]], Row], kind: str):
        """Args: read: from a row of the table to what `rows[i]` gives.  kind: what a row is."""
        problems = table.data.column("problem")
        counts = {count["values"]: count["counts"] for count in problems.value_counts().to_pylist()}
        self.reasons: dict[str, int] = {why: n for why, n in counts.items() if why}
        self.skipped = sum(self.reasons.values())
        kept = problems.to_numpy() == ""
        truncated = table.data.column("truncated").to_numpy(zero_copy_only=False)
        # an array: a list would take ten times the memory
        self.lengths: Sequence[int] = table.data.column("length").to_numpy()[kept]
        shortened = table.data.column("shortened").to_numpy(zero_copy_only=False)
        self.truncated = int(truncated[kept].sum())
        self.shortened = int(shortened[kept].sum())
        self.table = table if kept.all() else table.select(np.flatnonzero(kept))
        self._read = read
        self._kind = kind

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
        notes = [f"{count:,} skipped: {why}" for why, count in self.reasons.items()]
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
    every_answer: bool = False,
) -> Rows[tuple[Ids, Ids]]:
    """Token ids of prompt and chosen answer.

    Args:
        max_prompt, max_response: in tokens. A demonstration whose prompt is too long is skipped; a
            longer answer is truncated.
        every_answer: each earlier answer of a conversation is a demonstration too, with the turns
            before it as its prompt: what the policy sees when it answers there.
    """
    if every_answer:
        table = split_answers(table, workers)
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
) -> Rows[tuple[Prompt, Ids]]:
    """Each prompt that is not too long, with its token ids."""

    def read(row: dict[str, Any]) -> tuple[Prompt, Ids]:
        turns = [Turn(**turn) for turn in row["turns"]]
        return Prompt(turns, row["columns"], row["is_messages"]), row["prompt"]

    return Rows(_encode(tokenizer, table, [], max_prompt, 0, workers), read, "prompts")


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
        encoding.content(tokenizer),
        str(("text", max_tokens)),
        Path(__file__).read_text(encoding="utf-8"),
    )
    function = partial(_encode_texts, tokenizer=tokenizer, max_tokens=max_tokens)
    encoded = cached_map(table, function, features, key, "tokenizing", workers)
    return Rows(encoded, lambda row: (row["ids"][:1], row["ids"][1:]), "texts")


def _facts() -> dict[str, datasets.Value]:
    """What `Rows` needs of each row: why it is skipped, what was cut, how many tokens it has."""
    import datasets

    boolean, integer = datasets.Value("bool"), datasets.Value("int32")
    problem = datasets.Value("string")
    return {"problem": problem, "shortened": boolean, "truncated": boolean, "length": integer}


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    table: datasets.Dataset,
    columns: list[str],
    max_prompt: int,
    max_response: int,
    workers: int | None,
) -> datasets.Dataset:
    """A table with the token ids of the prompts and of their answers; cached.

    Args: columns: of answers; without any, the prompts are kept as text, too.
    """
    import datasets

    ids = datasets.List(datasets.Value("int32"))
    features = {"prompt": ids, **_facts(), **dict.fromkeys(columns, ids)}
    if not columns:
        record = record_features()
        features |= {"turns": record["prompt"], **{name: record[name] for name in KEPT}}
    key = digest(
        table._fingerprint,
        encoding.content(tokenizer),
        str((columns, max_prompt, max_response)),
        *(
            Path(file).read_text(encoding="utf-8")
            for file in (__file__, template.__file__, encoding.__file__)
        ),
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
        "problem": [
            "" if min(len(row), max_tokens) > 1 else "shorter than 2 tokens" for row in ids
        ],
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
    problems = [
        problem_of_row(tokenizer, prompt, *answer)
        for prompt, *answer in zip(turns, batch["chosen"], batch["calls"])
    ]
    # these rows are skipped, so any turns will do
    turns = [[Turn("user", "")] if problem else row for row, problem in zip(turns, problems)]
    calls = ["" if problem else more for more, problem in zip(batch["calls"], problems)]
    fitted = encoding.fit_prompts(tokenizer, turns, max_prompt)
    prompts = [ids for ids, _ in fitted]
    answers = {
        name: encoding.encode_responses(
            tokenizer, batch[name], max_response, turns, calls if name == "chosen" else None
        )
        for name in columns
    }
    # of each row its answers: none for a table of prompts
    rows: list[tuple[Ids, ...]] = list(zip(*answers.values())) if answers else [()] * len(turns)
    longest = [max((len(ids) for ids in row), default=0) for row in rows]
    encoded: dict[str, Any] = {
        "prompt": [ids or [] for ids in prompts],
        "problem": [
            problem or ("prompt too long" if ids is None else "")
            for ids, problem in zip(prompts, problems)
        ],
        "shortened": [too_long for _, too_long in fitted],
        "truncated": [any(ids[-1] != tokenizer.eos_token_id for ids in row) for row in rows],
        "length": [len(ids or []) + answer for ids, answer in zip(prompts, longest)],
        **answers,
    }
    if columns:
        return encoded
    return encoded | {"turns": batch["prompt"], **{name: batch[name] for name in KEPT}}


def problem_of_row(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Turn], answer: str, calls: str
) -> str:
    """Why a conversation with tools cannot be written; "" where it can, or has none."""
    turns = [*prompt, Turn("assistant", answer, calls)] if answer or calls else prompt
    return template.problem_of_tools(tokenizer, turns)


def split_answers(table: datasets.Dataset, workers: int | None = None) -> datasets.Dataset:
    """A row for each answer of the conversations, with the turns before it as its prompt."""
    import datasets

    key = digest(table._fingerprint, "every answer", Path(__file__).read_text(encoding="utf-8"))
    features = datasets.Features(record_features())
    return cached_map(table, _split_answers, features, key, "splitting conversations", workers)


def _split_answers(batch: Columns) -> dict[str, Any]:
    columns: Columns = {name: [] for name in PAIR_COLUMNS}
    for prompt, chosen, calls in zip(batch["prompt"], batch["chosen"], batch["calls"]):
        last = {"role": "assistant", "text": chosen, "more": calls}
        turns = [*prompt, last]
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant" and i and (turn["text"] or turn["more"]):
                row = Pair([], turn["text"], None, calls=turn["more"])
                columns["prompt"].append(turns[:i])
                for name in PAIR_COLUMNS[1:]:
                    columns[name].append(getattr(row, name))
    return columns

"""Prompts that are in two parts of the data, counted from the texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from rlhf.data.records import Dataset

if TYPE_CHECKING:
    import datasets


def leakage(data: Dataset) -> tuple[dict[str, int], dict[str, int]]:
    """Shared prompts of each two parts, which must be 0, and the distinct prompts of each part.

    Two prompts are the same when their texts differ in case and spaces only. The hashes that assign
    rows to parts are not used.

    Returns: shared prompts by "sft & rm" and so on; distinct prompts by part.
    """
    hashes = {
        name: _hashes_of(table)
        for name, table in (("sft", data.sft), ("rm", data.rm), ("ppo", data.ppo))
    }
    evaluated = [d.prompt for d in data.eval_sft]
    evaluated += [pair.prompt for pair in data.eval_rm + data.eval_probe]
    evaluated += [prompt.turns for prompt in data.eval_prompts]
    hashes["eval"] = np.unique(
        np.array(
            [_hash_of(map(asdict, prompt)) for prompt in evaluated],
            dtype=np.uint64,
        )
    )
    shared = {
        f"{a} & {b}": len(np.intersect1d(hashes[a], hashes[b], assume_unique=True))
        for a, b in combinations(hashes, 2)
    }
    return shared, {name: len(values) for name, values in hashes.items()}


def _hashes_of(table: datasets.Dataset) -> np.ndarray:
    """Hashes of the distinct prompts of a table, sorted; 8 bytes each, read batch by batch."""
    batches = [
        np.array(
            [_hash_of(prompt) for prompt in batch["prompt"]],
            dtype=np.uint64,
        )
        for batch in table.select_columns(["prompt"]).iter(1000)
    ]
    return np.unique(np.concatenate(batches)) if batches else np.array([], dtype=np.uint64)


def _hash_of(turns: Iterable[Mapping[str, str]]) -> int:
    """Of turns with their role, text and more, as a table has them."""
    text = "\0".join(
        f"{turn['role']}\1{' '.join(turn['text'].lower().split())}\1{turn['more']}"
        for turn in turns
    )
    content = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")

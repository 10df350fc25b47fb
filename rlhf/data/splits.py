"""Assign rows to the stages' splits by a hash of the prompt."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from rlhf.config.schema import Data

Part = Literal["sft", "rm", "ppo", "eval"]
PARTS: tuple[Part, ...] = ("sft", "rm", "ppo", "eval")
SFT, RM, PPO, EVAL = range(4)  # positions in PARTS
FURTHER_PAIR = "further pair of ranked responses"


class RowFacts(NamedTuple):
    """What decides where a row goes: arrays with one value per row of all sources."""

    prompt_hash: np.ndarray  # uint64, of the prompt in lower case with single spaces
    row_hash: np.ndarray  # uint64, of the prompt and its answers
    is_pair: np.ndarray  # bool: it has a rejected answer too
    has_answer: np.ndarray  # bool: it has an answer; else it is a prompt for online RL
    is_further: np.ndarray  # bool: a pair of ranked responses, but not the first of its row
    sft_only: np.ndarray  # bool: its source is for SFT only
    has_eval_split: np.ndarray  # bool: its source has an evaluation split of its own
    held_out: np.ndarray  # bool: it is in that evaluation split
    weight: np.ndarray  # float: how many copies of it; 0.5 keeps every second row
    table: np.ndarray  # int: the number of the table that it comes from


class Split(NamedTuple):
    """Row numbers by part, a row of weight 2 twice; and of skipped rows by reason."""

    parts: dict[Part, np.ndarray]
    skipped: dict[str, np.ndarray]


def split_rows(rows: RowFacts, cfg: Data) -> Split:
    """Which rows go into which part, and which into none.

    A prompt belongs to one part only, which its hash decides. Each row that several rules would
    skip counts under the first of them.
    """
    part = _part_of_prompt(rows, cfg)
    skipped: dict[str, np.ndarray] = {}
    kept = np.ones(len(part), dtype=bool)

    def skip(reason: str, which: np.ndarray) -> None:
        now = np.flatnonzero(which & kept)
        skipped[reason] = np.union1d(skipped.get(reason, now), now)
        kept[now] = False

    evaluated = np.unique(rows.prompt_hash[part == EVAL])
    skip("prompt is held out for evaluation", (part != EVAL) & np.isin(rows.prompt_hash, evaluated))
    skip("duplicate row", kept & ~_first_copies(rows, kept))
    # a source without any pair has no use for the reward model's share: it goes to SFT
    without_pairs = ~np.isin(rows.table, rows.table[rows.is_pair]) & rows.has_answer
    skip("no answer", rows.sft_only & ~rows.has_answer & (part != EVAL))
    for_sft = (rows.sft_only | (without_pairs & (part == RM))) & rows.has_answer & (part != EVAL)
    # SFT learns the best of ranked responses once; online RL takes the prompt once
    for_pairs = ((part == RM) & ~for_sft) | (part == EVAL)
    skip(FURTHER_PAIR, rows.is_further & ~for_pairs)
    skip("no rejected answer", (part == RM) & ~rows.is_pair & ~for_sft)
    elsewhere = np.unique(rows.prompt_hash[kept & ~for_sft & ((part == RM) | (part == PPO))])
    skip(
        "prompt is used by another stage",
        for_sft & (part != SFT) & np.isin(rows.prompt_hash, elsewhere),
    )
    part[for_sft] = SFT
    trained = np.unique(rows.prompt_hash[kept & ((part == SFT) | (part == RM))])
    skip(
        "prompt is used by another stage",
        ~rows.has_answer & (part == PPO) & np.isin(rows.prompt_hash, trained),
    )
    for_ppo = np.flatnonzero(kept & (part == PPO))
    first_with_prompt = np.zeros(len(part), dtype=bool)
    first_with_prompt[for_ppo[np.unique(rows.prompt_hash[for_ppo], return_index=True)[1]]] = True
    skip("duplicate prompt", (part == PPO) & ~first_with_prompt)
    copies = _copies(rows, part)
    skip("weight below 1", copies == 0)

    parts = {name: np.flatnonzero(kept & (part == number)) for number, name in enumerate(PARTS)}
    return Split({name: np.repeat(index, copies[index]) for name, index in parts.items()}, skipped)


def _part_of_prompt(rows: RowFacts, cfg: Data) -> np.ndarray:
    """The part that each row's prompt belongs to, by its hash; rows of evaluation splits: EVAL."""
    place = rows.prompt_hash / 2.0**64  # uniform in [0, 1)
    share = cfg.eval_share
    within = np.where(place < share, place / share, (place - share) / (1 - share))
    a, b, c = cfg.shares
    part = np.select([within < a / (a + b + c), within < (a + b) / (a + b + c)], [SFT, RM], PPO)
    part[~rows.has_answer] = PPO
    part[((place < share) & ~rows.has_eval_split) | rows.held_out] = EVAL
    return part


def _first_copies(rows: RowFacts, kept: np.ndarray) -> np.ndarray:
    """Whether a kept row is the one that stays of its duplicates (bool, one per row).

    A row of a source for all stages comes before the same row of a source for SFT only, and a pair
    with the best response of its row before the same pair without it.
    """
    candidates = np.flatnonzero(kept)
    order = np.lexsort(
        (
            candidates,
            rows.is_further[candidates],
            rows.sft_only[candidates],
            rows.row_hash[candidates],
        )
    )
    candidates = candidates[order]
    first = np.zeros(len(kept), dtype=bool)
    first[candidates[np.unique(rows.row_hash[candidates], return_index=True)[1]]] = True
    return first


def _copies(rows: RowFacts, part: np.ndarray) -> np.ndarray:
    """How many copies of each row its weight makes; the same rows each time.

    PPO takes each prompt once at most, and evaluation ignores weights.
    """
    fraction = (rows.row_hash >> np.uint64(11)) / 2.0**53
    copies = (np.floor(rows.weight) + (fraction < rows.weight % 1)).astype(np.int64)
    copies[part == PPO] = np.minimum(copies[part == PPO], 1)
    copies[part == EVAL] = 1
    return copies

"""Assign rows to the stages' splits by a hash of the prompt."""

from __future__ import annotations

import numpy as np

from rlhf.config.schema import Data

SFT, RM, PPO, EVAL = range(4)  # the parts
PARTS = ("sft", "rm", "ppo", "eval")


def split_rows(
    rows: dict[str, np.ndarray], cfg: Data
) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
    """Which rows go into which part, and which into none.

    Args: rows: of each row `prompt` and `key` (hashes of the prompt, and of all of it), `is_pair`, `sft_only`, `own_eval` (its source
        has a held-out split of its own), `held_out` (it is of such a split), `weight`.
    Returns: row numbers by part, a row of weight 2 twice; row numbers by the reason why they are left out.
    """
    place = rows["prompt"] / 2.0**64  # uniform in [0, 1)
    share = cfg.eval_share
    within = np.where(place < share, place / share, (place - share) / (1 - share))
    a, b, c = cfg.shares
    part = np.select([within < a / (a + b + c), within < (a + b) / (a + b + c)], [SFT, RM], PPO)
    part[((place < share) & ~rows["own_eval"]) | rows["held_out"]] = EVAL

    lost: dict[str, np.ndarray] = {}
    kept = np.ones(len(part), dtype=bool)

    def leave_out(reason: str, which: np.ndarray) -> None:
        lost[reason] = np.flatnonzero(which & kept)
        kept[lost[reason]] = False

    leave_out(
        "prompt is evaluated on",
        (part != EVAL) & np.isin(rows["prompt"], np.unique(rows["prompt"][part == EVAL])),
    )
    candidates = np.flatnonzero(kept)  # the same row for SFT only yields to the one that is for all
    candidates = candidates[
        np.lexsort((candidates, rows["sft_only"][candidates], rows["key"][candidates]))
    ]
    seen_before = kept.copy()
    seen_before[candidates[np.unique(rows["key"][candidates], return_index=True)[1]]] = False
    leave_out("the same row again", seen_before)
    sft_only = rows["sft_only"] & (part != EVAL)
    leave_out("no second answer", (part == RM) & ~rows["is_pair"] & ~sft_only)
    elsewhere = np.unique(rows["prompt"][kept & ~sft_only & ((part == RM) | (part == PPO))])
    leave_out(
        "prompt of another stage", sft_only & (part != SFT) & np.isin(rows["prompt"], elsewhere)
    )
    part[sft_only] = SFT
    first_with_prompt = np.zeros(len(part), dtype=bool)
    for_ppo = np.flatnonzero(kept & (part == PPO))
    first_with_prompt[for_ppo[np.unique(rows["prompt"][for_ppo], return_index=True)[1]]] = True
    leave_out("the same prompt again", (part == PPO) & ~first_with_prompt)

    fraction = (
        rows["key"] >> np.uint64(11)
    ) / 2.0**53  # a part of the rows, the same one each time
    copies = (np.floor(rows["weight"]) + (fraction < rows["weight"] % 1)).astype(np.int64)
    copies[part == PPO] = np.minimum(copies[part == PPO], 1)
    copies[part == EVAL] = 1
    leave_out("by weight", copies == 0)
    chosen = {number: np.flatnonzero(kept & (part == number)) for number in (SFT, RM, PPO, EVAL)}
    return {number: np.repeat(index, copies[index]) for number, index in chosen.items()}, lost

"""What every data source yields: turns of a conversation, and answers to them. Plain text; `template` alone renders it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Turn:
    role: str  # "user", "assistant" or "system"
    text: str


@dataclass(frozen=True)
class Demonstration:
    prompt: list[Turn]
    response: str


@dataclass(frozen=True)
class Pair:
    prompt: list[Turn]
    chosen: str  # the answer that the label prefers
    rejected: str | None  # None where a source has no second answer
    gold_margin: float | None = (
        None  # true reward of chosen minus rejected, where a source knows it
    )
    source: str = ""  # name of its source, where pairs are evaluated


@dataclass(frozen=True)
class Dataset:
    """The data of all stages. No prompt stands in two of sft, rm, ppo and eval_*. What is trained on are tables on disk
    (datasets.Dataset) with the columns prompt (turns), chosen and rejected; what is evaluated on is small."""

    sft: Any
    rm: Any
    ppo: Any  # each prompt once
    eval_sft: list[Demonstration]
    eval_rm: list[Pair]
    eval_prompts: list[list[Turn]]
    eval_probe: list[Pair] = field(
        default_factory=list
    )  # chosen fits its prompt, rejected would fit the opposite one
    gold: Callable[[list[Turn], str], float] | None = (
        None  # true reward of an answer, where it is known
    )
    best_gold: Callable[[list[Turn]], float] | None = (
        None  # true reward of the best answer there is
    )
    texts: Any = None  # plain text, column text: for PPO's pretraining loss
    report: list[dict[str, Any]] = field(
        default_factory=list
    )  # of each source and split: how many rows went where, and why not

"""Rewards whose best policy is known."""

from __future__ import annotations

from typing import Any


def minus_length(turns: list[Any], answer: str) -> float:
    """Best: to say nothing."""
    return -0.2 * len(answer.split())


def thanks(turns: list[Any], answer: str) -> float:
    """A bandit of one arm among many: 1 for an answer that begins with this word, which the SFT policy does in one of eight."""
    return float(answer.startswith("Thanks"))

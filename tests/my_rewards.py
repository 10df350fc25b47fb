"""Rewards whose best policy is known."""

from __future__ import annotations

from typing import Any


def minus_length(turns: list[Any], answer: str) -> float:
    """Best: to say nothing."""
    return -0.2 * len(answer.split())


def thanks(turns: list[Any], answer: str) -> float:
    """A bandit with one good arm among many: 1 for a response that begins with this word, as one in
    eight of the SFT policy's responses does."""
    return float(answer.startswith("Thanks"))

"""Rewards whose best policy is known."""

from __future__ import annotations


def minus_length(completions: list[str]) -> list[float]:
    """Best: to say nothing."""
    return [-0.2 * len(answer.split()) for answer in completions]


def thanks(completions: list[str]) -> list[float]:
    """A bandit with one good arm among many: 1 for a response that begins with this word, as one in
    eight of the SFT policy's responses does."""
    return [float(answer.startswith("Thanks")) for answer in completions]

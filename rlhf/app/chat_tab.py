"""The tab of chat."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def build(roots: Sequence[Path]) -> None:
    """Args: roots: folders with outputs/ and multirun/."""

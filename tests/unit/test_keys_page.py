"""docs/keys.md is what the schema says today."""

from __future__ import annotations

from helpers import REPO

from rlhf.config.reference import reference


def test_the_key_reference_is_current() -> None:
    page = (REPO / "docs" / "keys.md").read_text()
    assert page == reference(), "make it again: python -m rlhf.config.reference > docs/keys.md"

"""What long and many runs take: a sample of bench/load.py, within three times its limits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "bench"))

import load


def check(loads: list[load.Load], share: float) -> None:
    """Args: share: of the default size; the start of a process takes a second at any size."""
    for one in loads:
        assert one.seconds < 3 * (one.most_seconds * share + 1), one
        assert one.most_megabytes is None or (one.megabytes or 0) < one.most_megabytes, one
        assert one.most_page is None or (one.page or 0) < one.most_page, one


@pytest.mark.full
def test_a_long_run_is_reported_and_resumed_in_time(tmp_path: Path) -> None:
    check(load.report_of_long_run(tmp_path, 50_000), 0.05)


def test_many_runs_are_reported_and_listed_in_time(tmp_path: Path) -> None:
    check(load.many_runs(tmp_path, 50), 0.1)


@pytest.mark.full
def test_a_sweep_begins_and_repeats_in_time(tmp_path: Path) -> None:
    start, each = load.sweep(tmp_path, 20)
    check([start], 0.1)
    assert each.seconds < 3 * each.most_seconds

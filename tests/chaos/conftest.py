"""Faults on purpose: kills, damaged files, bad input. `make chaos` runs all of it.

CHAOS_SEED decides which processes are killed and when, CHAOS_KILLS how many.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos_runs import KILLS, SEED, SHORT
from helpers import runs_in, train


def pytest_report_header() -> str:
    return f"chaos: CHAOS_SEED={SEED} CHAOS_KILLS={KILLS}"


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with outputs/ of a policy and of a reward model."""
    folder = tmp_path_factory.mktemp("parents")
    for stage in ("sft", "rm"):
        done = train(*SHORT, f"stage={stage}", "wandb.mode=disabled", cwd=folder)
        assert done.returncode == 0, done.stderr
    assert {*runs_in(folder)} == {"sft", "rm"}
    return folder

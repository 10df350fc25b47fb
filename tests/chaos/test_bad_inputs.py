"""Each bad input ends with exit code 2 and one line, before anything is trained, in little memory.

They share one process, which forks for each of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_data import BAD_ROWS
from bad_files import BadInput, BadRow
from bad_inputs import BAD_INPUTS
from helpers import REPO

HERE = Path(__file__).parent
MIB = 700  # of memory; 250 are those of the libraries
SECONDS = 8  # of the processor, on a slow machine
UNPRINTABLE = "\x1b"

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("alone")
    full = any(item.get_closest_marker("full") for item in request.session.items)
    done = subprocess.run(
        [sys.executable, HERE / "each_alone.py", folder, *(["--full"] if full else [])],
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def child_environment() -> dict[str, str]:
    paths = [str(REPO), os.environ.get("PYTHONPATH", "")]
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "RLHF_ROOT")}
    return plain | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, id=one.name, marks=[pytest.mark.full] if one.full else [])
        for one in BAD_INPUTS
    ],
)
def test_a_bad_input_gets_one_clear_line(results: Results, one: BadInput) -> None:
    result = results[one.name]
    lines = result["stderr"].splitlines()
    assert result["code"] == 2, result
    assert len(lines) == 1 and lines[0].startswith("error: "), result["stderr"][:3000]
    assert len(lines[0]) < 5000 and UNPRINTABLE not in lines[0]
    assert [words for words in one.words if words not in lines[0]] == [], lines[0]
    assert not result["trained"] and not result["stdout"]
    assert result["mib"] < MIB and result["cpu"] < SECONDS, result


@pytest.mark.parametrize("one", BAD_ROWS, ids=[one.name for one in BAD_ROWS])
def test_a_bad_row_is_skipped_and_named(results: Results, one: BadRow) -> None:
    result = results[f"row: {one.name}"]
    assert result["code"] == 0, result["stderr"]
    assert "21 rows" in result["stdout"] and "skipped: 1 unreadable" in result["stdout"]
    assert one.words in result["stdout"] and UNPRINTABLE not in result["stdout"]
    assert len(result["stdout"]) < 2000


def test_names_are_different() -> None:
    names = [one.name for one in (*BAD_INPUTS, *BAD_ROWS)]
    assert len(BAD_INPUTS) >= 120 and len({one.name for one in BAD_INPUTS}) == len(BAD_INPUTS)
    assert len(names) > len(BAD_INPUTS)

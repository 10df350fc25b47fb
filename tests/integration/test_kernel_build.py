"""The kernels for CPUs are compiled once, whichever process starts first.

unit/test_kernels.py tests what happens where they cannot be compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "c++")),
    reason="no C++ compiler: torch's kernels are used",
)

SAY = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from rlhf.sampling.cpu import kernels
assert kernels.loaded is None
print(kernels.load(), kernels.load(), kernels.loaded)
"""


OURS = "True True True"


def load_elsewhere(cache: Path, **env: str | None) -> subprocess.Popen[str]:
    """Another process, with an empty cache folder of its own."""
    given = {
        name: value
        for name, value in (os.environ | {"XDG_CACHE_HOME": str(cache)} | env).items()
        if value is not None
    }
    return subprocess.Popen(
        [sys.executable, "-c", SAY], env=given, stdout=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    return lines


@pytest.mark.full
def test_compiled_once_by_processes_that_start_together(tmp_path: Path) -> None:
    texts = sorted(map(said, [load_elsewhere(tmp_path) for _ in range(2)]), key=len)
    (library,) = (tmp_path / "rlhf").glob("*.so")
    assert texts[0] == [OURS] and texts[1] == [
        f"compiling kernels for sampling on CPU, once on this machine: {library}",
        OURS,
    ]
    assert not list(tmp_path.rglob("*.tmp")) and library.parent.stat().st_mode & 0o077 == 0
    assert said(load_elsewhere(tmp_path, CXX="nonsense")) == [OURS], (
        "what is there needs no compiler"
    )
    os.truncate(library, library.stat().st_size // 2)  # loaded as it is, it would end the process
    assert said(load_elsewhere(tmp_path)) == texts[1], "what is torn is made anew"
    assert said(load_elsewhere(tmp_path)) == [OURS]

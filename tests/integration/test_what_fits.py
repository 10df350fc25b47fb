"""python -m rlhf.planning: what fits on one GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import REPO, composed, register

from rlhf.planning import __main__ as what_fits
from rlhf.planning.formulas import GIB
from rlhf.planning.memory import make_plan


@pytest.fixture(autouse=True, scope="module")
def options() -> None:
    """What `main` does first."""
    register()


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    whole = [sys.executable, "-m", "rlhf.planning", *arguments]
    return subprocess.run(whole, capture_output=True, text=True)


def test_a_row_has_the_peaks_of_the_plans() -> None:
    (row,) = what_fits.rows_of(["opt1.3b"], 24)
    cells = iter(row[1:])
    for stage in what_fits.STAGES:
        for rank in what_fits.RANKS.values():
            cfg = composed(
                f"stage={stage}",
                "actor=opt1.3b",
                "reward=opt1.3b",
                what_fits.FRUGAL,
                f"actor.lora.rank={rank}",
                f"reward.lora.rank={rank}",
                "deploy.gpu_memory_gb=24",
            )
            plan = make_plan(cfg, stage)
            assert next(cells) == (f"{plan.peak / GIB:.1f}" if plan.fits else "-")
    assert row[1] == "-" and row[2] != "-"  # 1.3 billion weights: LoRA alone fits


def test_more_memory_fits_more() -> None:
    small, large = ([*what_fits.rows_of(["qwen2.5-0.5b"], gib)][0] for gib in (6, 80))
    assert small.count("-") > large.count("-") == 0
    assert all(a in ("-", b) for a, b in zip(small[1:], large[1:]))


def test_the_command_prints_the_table() -> None:
    done = command("--gpu-memory-gb", "24", "--models", "smollm2-135m", "opt125m")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [*what_fits.rows_of(["smollm2-135m"], 24)] == [
        line.split() for line in lines if "smollm2" in line
    ]  # whole numbers, though nothing says how wide the terminal is
    assert "does not fit" in lines[-1] and "deploy=small_gpu" in lines[-1]


@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--gpu-memory-gb", "0"], "--gpu-memory-gb 0.0: must be above 0"),
        (["--models", "gpt5"], "invalid choice: 'gpt5'"),
    ],
)
def test_bad_arguments_get_a_line(arguments: list[str], line: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr


@pytest.mark.full
def test_the_table_in_the_docs_is_that_of_the_command() -> None:
    text = (REPO / "docs" / "deployment.md").read_text()
    assert "python -m rlhf.planning --gpu-memory-gb 24" in text
    table = text.split("| 24 GiB |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() or "-" for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) >= 6
    assert [*what_fits.rows_of([row[0] for row in rows], 24)] == rows

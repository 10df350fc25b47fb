"""The benchmarks run, and count what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "bench"))

import quiet
import table
from gpu import WORKS
from random_models import write_random_pairs


def test_needed_operations_by_hand() -> None:
    """Ten weights in the body, three in the head, attention of one: a prompt of 2 tokens and an
    answer of 3."""
    shape = {"body": 10, "head": 3, "attention": 1}
    body, head = 2 * 10 * 5 + 2 * 25, 2 * 3 * 3
    assert table.needed_flops(shape, "generate", [(2, 3)]) == {"all": body + head}
    assert table.needed_flops(shape, "sft", [(2, 3)]) == {"all": 3 * (body + head)}
    assert table.needed_flops(shape, "rm", [(2, 3), (2, 3)]) == {"all": 6 * body}
    ppo = table.needed_flops(shape, "ppo", [(2, 3)])
    assert ppo == {
        "rollout": 3 * body + 2 * head,
        "update": 6 * body + 3 * head,
        "all": 9 * body + 5 * head,
    }


def test_a_sample_counts_if_nobody_else_worked() -> None:
    sample = {"own": 1.9, "foreign": 0.0, "counts": True}
    samples = [sample] * quiet.WARM_UP + [
        sample,
        sample | {"foreign": 0.5},
        sample,
        sample | {"own": 0.3},
        sample | {"counts": False},  # the first of a turn of several
    ]
    assert quiet.quiet_samples({"samples": samples}) == [quiet.WARM_UP, quiet.WARM_UP + 2]
    assert table.middle([1.0, 2.0, 3.0, 4.0, 5.0]) == {
        "median": 3.0,
        "spread": 4 / 2 / 3,
        "iqr": 2.0,
    }


@pytest.mark.full
def test_a_benchmark_runs(tmp_path: Path) -> None:
    """Generation by the product and by transformers, as small as can be."""
    write_random_pairs(tmp_path / "pairs.jsonl")
    command = [sys.executable, str(REPO / "bench" / "run.py"), "generate", "--samples", "1"]
    command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
    command += ["--new", "8", "--batch", "4", "--prompt", "32", "--threads", "1", "--wait", "0"]
    command += ["--turn", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "| product |" in done.stdout and "| transformers |" in done.stdout
    (file,) = (tmp_path / "out").rglob("result.json")
    result = json.loads(file.read_text())
    assert {row["name"] for row in result["rows"]} == {"product", "transformers"}


def bench_gpu(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "bench" / "gpu.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = bench_gpu("all")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("no NVIDIA GPU: nothing is measured")


@pytest.mark.full
def test_what_a_gpu_does_runs_on_a_cpu() -> None:
    """Every work of bench/gpu.py prints its table, with tiny sizes."""
    done = bench_gpu("all", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    tables = {part.split("\n")[0]: part for part in done.stdout.split("\n## ")[1:]}
    assert list(tables) == list(WORKS)
    for name, text in tables.items():
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) >= 4 and len({row.count("|") for row in rows}) == 1, (name, text)
        assert "out of memory" not in text


@pytest.mark.full
def test_the_bodies_of_the_gpu_tests_run_on_a_cpu() -> None:
    command = [sys.executable, "-m", "pytest", str(REPO / "tests" / "gpu")]
    done = subprocess.run(
        command,
        cwd=REPO,
        env=os.environ | {"RLHF_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0 and "skipped" not in done.stdout, done.stdout[-5000:]

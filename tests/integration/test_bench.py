"""The benchmarks run, and count what they say."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO

sys.path.insert(0, str(REPO / "bench"))

import quiet
import table


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
        "rollout": 4 * body + 2 * head,
        "update": 6 * body + 3 * head,
        "all": 10 * body + 5 * head,
    }


def test_a_sample_counts_if_nobody_else_worked() -> None:
    sample = {"own": 1.9, "foreign": 0.0}
    samples = [sample] * quiet.WARM_UP + [
        sample,
        sample | {"foreign": 0.5},
        sample,
        sample | {"own": 0.3},
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
    draw = random.Random(0)
    words = [
        "".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(5000)
    ]  # EOS is one of many tokens
    with (tmp_path / "pairs.jsonl").open("w") as lines:
        for _ in range(200):
            prompt, chosen, rejected = (" ".join(draw.choices(words, k=30)) for _ in range(3))
            texts = {
                name: f"\n\nHuman: {prompt}\n\nAssistant: {answer}"
                for name, answer in (("chosen", chosen), ("rejected", rejected))
            }
            lines.write(json.dumps(texts) + "\n")
    command = [sys.executable, str(REPO / "bench" / "run.py"), "generate", "--samples", "1"]
    command += ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
    command += ["--new", "8", "--batch", "4", "--prompt", "32", "--threads", "1", "--wait", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "| product |" in done.stdout and "| transformers |" in done.stdout
    (file,) = (tmp_path / "out").rglob("result.json")
    result = json.loads(file.read_text())
    assert {row["name"] for row in result["rows"]} == {"product", "transformers"}

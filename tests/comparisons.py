"""Compare two deployments of a run: first tokens, first gradients, and everything later.

A deployment adds the same numbers in another order. Results then differ by rounding, and training
amplifies that, on each processor by another factor. Hence three comparisons (`compare`):

- The first rollout has the same tokens.
- The gradient of the first optimizer step agrees closely: nothing has amplified rounding yet.
- Everything later may differ by a fixed bound, or by ten times what rounding alone changes: that is
  measured with runs whose initial weights are moved to the next float32 number (`last_bits`).
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import metrics
from safetensors.torch import load_file

SMOOTH = "--smooth"  # GELU for ReLU: as with wide clips, rounding must not switch anything
LAST_BITS = ("last_bit_1", "last_bit_2")  # two, because one may come out close by chance
AMPLIFIED = 10  # times the larger of the two: the effect of rounding varies by a small factor


def last_bits(run: Path) -> list[str]:
    """Runs that repeat one from weights that differ in the last bit, as arguments of `work`. They
    lie beside the run, where `compare` finds them."""
    copies = [run.with_name(f"{run.name}-{change}") for change in LAST_BITS]
    for copy in copies:
        shutil.copytree(run, copy)
    return [f"{copy}={change}" for copy, change in zip(copies, LAST_BITS)]


def compare(one: Path, two: Path, what: str) -> None:
    """See the top of this file. Without `last_bits` of `one`, only the fixed bounds apply."""
    compare_first_tokens(one, two, what)
    compare_first_gradients(one, two, what)
    rounded = sorted(one.parent.glob(f"{one.name}-last_bit_*"))
    for numbers, rel, absolute in ((of_steps, 1e-4, 1e-5), (of_the_end, 1e-3, 1e-4)):
        expected, found, others = numbers(one), numbers(two), [numbers(run) for run in rounded]
        assert found.keys() == expected.keys(), what
        for key, value in expected.items():
            by_rounding = max((abs(other[key] - value) for other in others), default=0.0)
            allowed = max(rel * abs(value), absolute, AMPLIFIED * by_rounding)
            assert abs(found[key] - value) <= allowed, (what, key, found[key], value, allowed)
    for part in ("model", "critic", "model_ema", "model_best"):
        assert (one / part).exists() == (two / part).exists(), (what, part)
        if (one / part).exists():
            by_rounding = max((apart(one, run, part) for run in rounded), default=0.0)
            worst, allowed = apart(one, two, part), max(1e-4, AMPLIFIED * by_rounding)
            assert worst <= allowed, (what, part, worst, allowed)
            weights = load_file(two / part / "model.safetensors").values()
            assert not all(torch.equal(w, torch.zeros_like(w)) for w in weights)


def compare_first_tokens(one: Path, two: Path, what: str) -> None:
    """Before training: the same responses, and log-probabilities that differ in the last of their
    five decimals at most."""

    def rows_of(run: Path, name: str) -> list[dict]:
        return [json.loads(line) for line in (run / name).open()] if (run / name).exists() else []

    runs = (one, two)
    before, others = ([row.get("before") for row in rows_of(run, "samples.jsonl")] for run in runs)
    assert before == others, what
    first = [[row for row in rows_of(run, "rollouts.jsonl") if row["step"] == 1] for run in runs]
    for row, other in zip(*first, strict=True):
        assert other["tokens"] == row["tokens"], what
        assert other["logp"] == pytest.approx(row["logp"], abs=2e-5), what


def compare_first_gradients(one: Path, two: Path, what: str) -> None:
    """The whole gradient within 1e-5 of its norm, that of each weight within 1e-4 of its own norm.
    The true gradient of a key's bias is zero, all it has is rounding: hence 1e-7 of the whole."""
    files = sorted(file.name for file in one.glob("first_gradient_*"))
    assert files and files == sorted(file.name for file in two.glob("first_gradient_*")), what
    for file in files:
        gradient, other = load_file(one / file), load_file(two / file)
        assert gradient.keys() == other.keys(), what
        norms = {name: float(g.double().norm()) for name, g in gradient.items()}
        off = {k: float((other[k].double() - g.double()).norm()) for k, g in gradient.items()}
        whole, worst = math.hypot(*norms.values()), math.hypot(*off.values())
        assert worst <= 1e-5 * whole, (what, file, worst, whole)
        for name in gradient:
            assert off[name] <= 1e-4 * norms[name] + 1e-7 * whole, (what, file, name, off[name])


def of_steps(run: Path) -> dict[str, float]:
    """What `compare` looks at in the metrics of the steps."""

    def wanted(key: str) -> bool:
        few = ("objective/scores", "objective/kl", "tokens/response_mean")
        return key in few or "loss" in key or "grad_norm" in key

    rows = metrics(run)
    return {f"step {row['step']} {key}": row[key] for row in rows for key in row if wanted(key)}


def of_the_end(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())["metrics"]


def apart(one: Path, two: Path, part: str) -> float:
    """The largest difference between two weights at the same place."""
    weights, others = (load_file(run / part / "model.safetensors") for run in (one, two))
    assert weights.keys() == others.keys(), part
    return max(float((weights[k].float() - others[k].float()).abs().max()) for k in weights)

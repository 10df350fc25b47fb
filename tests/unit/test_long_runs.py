"""Metrics of long runs: read by column, thinned for a screen, smoothed in linear time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from rlhf.reporting.curves import smooth
from rlhf.runs import metrics
from rlhf.runs.metrics import Points, count_rows, read_metrics, thin
from rlhf.runs.timing import newest_times


def write(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def mixed_rows(count: int) -> list[dict]:
    """Rows of whole numbers, fractions, NaN, and a metric that only some have."""
    rows = []
    for i in range(count):
        row = {"step": i + 1, "a": i / 3, "whole": 2 if i % 2 else 2.5, "nan": float("nan")}
        rows.append(row | ({"eval/a": i * 0.5} if i % 7 == 3 else {}))
    return rows


@pytest.mark.parametrize("damage", ["", '{"step": "text"}\n', "broken\n", '{"a": {"b": 1}}\n'])
def test_blocks_are_read_as_lines_are(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pyarrow and line by line, in blocks of any size; a damaged block is read line by line."""
    file = write(tmp_path / "metrics.jsonl", mixed_rows(300))
    file.write_text(file.read_text() + damage + json.dumps({"step": 999, "a": 1.0}) + "\n")
    plain = read_metrics(file)
    monkeypatch.setattr(metrics, "BLOCK", 2000)
    monkeypatch.setattr(metrics, "LONG", 0)
    fast = read_metrics(file)
    assert len(fast) == len(plain) and fast.damage == plain.damage
    assert bool(plain.damage) == bool(damage)
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(fast.columns[name].rows, column.rows)
        np.testing.assert_array_equal(fast.columns[name].values, column.values)
    assert plain.curve("eval/a").x[:2].tolist() == [4, 11]
    assert plain.pairs("a", "eval/a").x[1] == pytest.approx(10 / 3)
    assert set(read_metrics(file, lambda name: name == "a").columns) == {"step", "a"}
    assert len(plain.curve("none").x) == 0 and count_rows(tmp_path / "none") == 0


@pytest.mark.parametrize("window", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 10, 137])
def test_a_running_mean_is_that_of_its_definition(window: int, count: int) -> None:
    values = np.random.default_rng(0).normal(size=count) * 1e3
    half = window // 2
    expected = [np.mean(values[max(0, i - half) : i + half + 1]) for i in range(count)]
    np.testing.assert_allclose(smooth(values, window), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_one_value_stays_in_the_windows_that_have_it(value: float) -> None:
    values = np.ones(100)
    values[50] = value
    smoothed = smooth(values, 9)
    assert (smoothed[[*range(46), *range(55, 100)]] == 1).all()
    assert not (smoothed[46:55] == 1).any()


def test_a_thinned_curve_keeps_its_extremes_and_its_order() -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    values[[123, 77_777, 5]] = 50, -60, np.nan
    x, y = thin(Points(np.arange(100_000.0), values), 800)
    assert len(x) <= 800 and (np.diff(x) > 0).all()
    assert (y.max(), y.min()) == (50, -60) and np.isfinite(y).all()
    assert x[y.argmax()] == 123 and (x[0], x[-1]) != (0, 0) and x[-1] > 99_000
    short = Points(np.arange(3.0), np.array([1, np.nan, 2]))
    assert thin(short, 3) is short
    assert len(thin(Points(np.arange(9.0), np.full(9, np.nan)), 4).x) == 0


def test_the_newest_times_are_read_from_the_end(tmp_path: Path) -> None:
    file = write(tmp_path / "metrics.jsonl", [{"time": float(i)} for i in range(100_000)])
    times = newest_times(file)
    assert times[-1] == 99_999 and 1000 < len(times) < 99_999
    assert np.diff(times).tolist() == [1.0] * (len(times) - 1)


def test_a_million_values_are_smoothed_and_thinned_at_once() -> None:
    values = np.random.default_rng(0).normal(size=1_000_000)
    started = time.process_time()
    thin(Points(values, smooth(values, 50_000)), 800)
    assert time.process_time() - started < 3

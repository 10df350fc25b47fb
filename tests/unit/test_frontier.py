"""frontier.png of a run whose evaluations lack some of its metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from written_runs import write_run

from rlhf.reporting.curves import held_out_points, plot_run
from rlhf.runs.metrics import read_metrics

FINAL = {"eval/gold_before": 0.5, "eval/gold": 2.0, "eval/kl": 4.0}


@pytest.mark.parametrize(
    "missing, points",
    [
        ("", [(0.0, 0.5), (2.0, 2.0)]),
        ("eval/kl", [(0.0, 0.5)]),
        ("eval/gold_before", [(2.0, 2.0)]),
        ("eval/gold", [(0.0, 0.5)]),
        ("all", []),
    ],
)
def test_the_frontier_has_the_evaluations_that_are_known(
    missing: str, points: list[tuple[float, float]], tmp_path: Path
) -> None:
    """The score is in no evaluation, as where no source applies to the responses."""
    run = write_run(tmp_path)
    final = {name: value for name, value in FINAL.items() if missing not in (name, "all")}
    plot_run(run, "ppo", final)
    assert (run / "frontier.png").read_bytes().startswith(b"\x89PNG")
    rows = read_metrics(run / "metrics.jsonl")
    assert [*zip(*held_out_points(rows, final, "eval/gold"))] == points

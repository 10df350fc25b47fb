"""How a run is measured does not change what it learns, and is no part of its identity."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers import SLOW, running, summary, train
from safetensors.torch import load_file
from worker_runs import prepare, rows_of, work

# how a run is measured: rows, how often, and how responses are sampled meanwhile
FEW = ["data.eval_rows=5"]
MANY = [
    "data.eval_rows=40",
    "rl.evaluation.every=1",
    "rl.evaluation.temperature=0.5",
    "dpo.eval_every=1",
]


def assert_same_training(one: Path, two: Path) -> None:
    """Every bit of all weights, and every logged number but those of evaluations."""
    for part in ("model", "critic"):
        if (one / part).exists():
            weights, others = (load_file(run / part / "model.safetensors") for run in (one, two))
            assert weights.keys() == others.keys()
            assert all(torch.equal(weights[key], others[key]) for key in weights), part
            about, also = (
                json.loads((run / part / "config.json").read_text()) for run in (one, two)
            )
            assert about == also, "the unit of a reward model's scores is in it"
    logs = [
        [
            {key: value for key, value in row.items() if not key.startswith("eval/")}
            for row in rows_of(run, "metrics.jsonl")
        ]
        for run in (one, two)
    ]
    assert logs[0] == logs[1]


@pytest.mark.full
def test_training_does_not_depend_on_how_it_is_measured(tmp_path: Path) -> None:
    runs: dict[str, list[Path]] = {}
    first = {}
    for stage in ("sft", "rm"):
        runs[stage] = [
            prepare(tmp_path, n, stage, {}, o) for n, o in (("few", FEW), ("many", MANY))
        ]
        first[stage] = str(runs[stage][0] / "model")
    dpo = ["dpo.max_steps=3", "dpo.batch_size=8"]
    for stage, more in (("ppo", ["rl.max_steps=3"]), ("dpo", dpo)):
        runs[stage] = [
            prepare(tmp_path, n, stage, first, [*o, *more])
            for n, o in (("few", FEW), ("many", MANY))
        ]
    work([run for pair in runs.values() for run in pair], 1)
    for pair in runs.values():
        assert_same_training(*pair)
    evaluated = ["eval/score" in row for row in rows_of(runs["ppo"][1], "metrics.jsonl")]
    assert evaluated == [True, True, False]


@pytest.mark.full
def test_a_run_resumes_with_other_evaluation_settings_and_says_how_it_was_measured(
    tmp_path: Path,
) -> None:
    parent, run = running(*SLOW, cwd=tmp_path)
    parent.send_signal(signal.SIGTERM)
    parent.communicate(timeout=300)
    assert not (run / "summary.json").exists()
    done = train(*SLOW, "data.eval_rows=8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [run.name]
    assert summary(run)["settings"]["data.eval_rows"] == 8
    again = train(*SLOW, cwd=tmp_path)
    assert "it was evaluated with data.eval_rows=8; stage=eval measures it again" in again.stderr
    assert "it was evaluated" not in train(*SLOW, "data.eval_rows=8", cwd=tmp_path).stderr

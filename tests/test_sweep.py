"""Sweeps: shared upstream stages, failures that stop nothing, results below multirun/."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import SMALL, runs_in, summary, train

SWEEP = "python train.py -m ppo.kl.coef=0.02,0.1 seed=1,2 exp=kl_study"  # as the README has it


@pytest.mark.parametrize("seeds", ["1", pytest.param("1,2", marks=pytest.mark.full)])
def test_ppo_jobs_share_the_sft_and_the_reward_run_of_their_seed(seeds: str, tmp_path: Path) -> None:
    done = train(*SWEEP.replace("1,2", seeds).split()[2:], *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = runs_in(tmp_path)
    n = len(seeds.split(","))
    assert {stage: len(paths) for stage, paths in runs.items()} == {"sft": n, "rm": n, "ppo": 2 * n}
    ids = {stage: {summary(run)["id"] for run in paths} for stage, paths in runs.items()}
    parents = [summary(run)["parents"] for run in runs["ppo"]]
    assert {p["sft"] for p in parents} == ids["sft"] and {p["rm"] for p in parents} == ids["rm"]
    jobs = sorted((tmp_path / "multirun" / "kl_study").iterdir())
    assert len(jobs) == 2 * n
    for job in jobs:
        assert {"overrides.txt", "config.yaml", "summary.json", "metrics.jsonl", "curves.png", "run"} <= {p.name for p in job.iterdir()}
        assert summary(job / "run") == summary(job)
    assert done.stdout.count("ppo.kl.coef=0.02 seed=1") == 1, "one row of the final table per job"


def test_a_failing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    few = [o for o in SMALL if not o.startswith("data.sandbox.dem")]
    done = train("-m", "stage=sft", "data.sandbox.demonstrations=8,64", *few, cwd=tmp_path)
    assert done.returncode == 1
    assert "failed:" in done.stderr and "sft.batch_size=16: there are only 8 demonstrations" in done.stderr
    assert len([run for run in runs_in(tmp_path)["sft"] if (run / "summary.json").exists()]) == 1
    assert "Traceback" not in done.stderr


def test_all_jobs_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    done = train("-m", "stage=sft", "sft.lr=1e-3,0", *SMALL, cwd=tmp_path)
    assert done.returncode == 2 and "sft.lr=0.0: must be above 0" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_jobs_with_long_overrides_keep_folders_of_their_own(tmp_path: Path) -> None:
    """Also where only deploy.* differs, which is no part of the run's name."""
    from rlhf import cli

    run = tmp_path / "outputs" / "sft-tiny-0"
    run.mkdir(parents=True)
    long = ["stage=sft", "data.max_prompt_tokens=40", "data.max_response_tokens=40", "deploy.offload.optimizer=false"]
    for stage in (2, 3):
        cli.collect(tmp_path / "multirun" / "deep", [*long, f"deploy.zero_stage={stage}"], run)
    assert len([*(tmp_path / "multirun" / "deep").iterdir()]) == 2

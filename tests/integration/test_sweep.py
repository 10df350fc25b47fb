"""Sweeps: shared upstream stages, failures that stop nothing, results below multirun/."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, SLOW, SMALL, SWEEP, runs_in, summary, train

from rlhf.runs.directory import find_checkpoints
from rlhf.runs.locks import is_locked


@pytest.mark.full
@pytest.mark.parametrize("seeds", ["1", pytest.param("1,2", marks=pytest.mark.full)])
def test_ppo_jobs_share_the_sft_and_the_reward_run_of_their_seed(
    seeds: str, tmp_path: Path
) -> None:
    done = train(*SWEEP.replace("1,2", seeds).split()[2:], *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = runs_in(tmp_path)
    n = len(seeds.split(","))
    assert {stage: len(paths) for stage, paths in runs.items()} == {"sft": n, "rm": n, "ppo": 2 * n}
    ids = {stage: {summary(run)["id"] for run in paths} for stage, paths in runs.items()}
    parents = [summary(run)["parents"] for run in runs["ppo"]]
    assert {p["sft"] for p in parents} == ids["sft"] and {p["rm"] for p in parents} == ids["rm"]
    jobs = sorted(path for path in (tmp_path / "multirun" / "kl_study").iterdir() if path.is_dir())
    assert len(jobs) == 2 * n
    for job in jobs:
        assert {
            "overrides.txt",
            "config.yaml",
            "summary.json",
            "metrics.jsonl",
            "curves.png",
            "run",
        } <= {p.name for p in job.iterdir()}
        assert summary(job / "run") == summary(job)
    label = "kl.coef=0.02 seed=1" if n > 1 else "kl.coef=0.02"
    assert re.search(rf"{label} +│ finished", done.stdout), "a row of the final table per job"
    assert (tmp_path / "multirun" / "kl_study" / "report.html").exists()


def test_a_failing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    few = [o for o in SMALL if not o.startswith("data.sandbox.dem")]
    done = train("-m", "stage=sft", "data.sandbox.demonstrations=8,64", *few, cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "failed:" in done.stderr
        and "sft.batch_size=16: there are only 8 rows to train on" in done.stderr
    )
    assert len([run for run in runs_in(tmp_path)["sft"] if (run / "summary.json").exists()]) == 1
    assert "Traceback" not in done.stderr


def test_all_jobs_are_checked_before_the_first_starts(tmp_path: Path) -> None:
    done = train("-m", "stage=sft", "sft.lr=1e-3,0", *SMALL, cwd=tmp_path)
    assert done.returncode == 2 and "sft.lr=0.0: must be above 0" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_jobs_with_long_overrides_keep_folders_of_their_own(tmp_path: Path) -> None:
    """Also where only deploy.* differs, which is no part of the run's name."""
    from rlhf.sweep import collect_job

    run = tmp_path / "outputs" / "sft-tiny-0"
    run.mkdir(parents=True)
    long = [
        "stage=sft",
        "data.max_prompt_tokens=40",
        "data.max_response_tokens=40",
        "deploy.offload.optimizer=false",
    ]
    for stage in (2, 3):
        collect_job(tmp_path / "multirun" / "deep", [*long, f"deploy.zero_stage={stage}"], run)
    assert len([*(tmp_path / "multirun" / "deep").iterdir()]) == 2


@pytest.mark.full
def test_jobs_side_by_side_share_upstream_runs_and_a_repeat_runs_what_failed_only(
    tmp_path: Path,
) -> None:
    """Two at once; the job that fails is one whose function is not there yet."""
    own = "~rl.rewards.model", "+rl.rewards={mine: {function: 'mine:f'}}"
    (tmp_path / "mine.py").write_text(  # in a stage, not when it is tried before
        "import os\n"
        "def f(completions):\n"
        "    if 'RANK' in os.environ:\n"
        "        raise KeyError('not yet')\n"
        "    return [0.0] * len(completions)\n"
    )
    sweep = [
        "-m",
        "sweep=seeds",
        "seed=1,2",
        "experiment_name=both",
        "hydra/launcher=parallel",
        *SMALL,
        *own,
    ]
    first = train(*sweep, cwd=tmp_path)
    assert (
        first.returncode == 1
        and first.stderr.count("\nfailed: ") == 2
        and "KeyError: 'not yet'" in first.stderr
    ), first.stderr
    assert [
        path.read_text().count("not yet")
        for path in (tmp_path / "multirun" / "both").glob("*/error.txt")
    ] == [1, 1]
    (tmp_path / "mine.py").write_text(
        "def f(completions):\n    return [len(c) for c in completions]\n"
    )
    second = train(*sweep, cwd=tmp_path)
    assert second.returncode == 0 and second.stderr.count("sft: finished") == 2, second.stderr
    third = train(*sweep, cwd=tmp_path)
    assert (
        third.returncode == 0
        and third.stderr.count("ppo: finished") == 2
        and "multirun/both/report.html" in third.stdout
    )
    assert not [*(tmp_path / "multirun" / "both").glob("*/error.txt")]


@pytest.mark.full
def test_two_sweeps_at_the_same_moment_train_their_upstream_once(tmp_path: Path) -> None:
    upstream = [arg for arg in SLOW if arg != "stage=sft"]
    command = [sys.executable, str(REPO / "train.py"), "-m", *upstream]
    sweeps = [
        subprocess.Popen(
            [*command, f"rl.kl.coef={coef}", f"experiment_name={name}"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, coef in (("one", "0.02"), ("two", "0.2"))
    ]
    said = [sweep.communicate(timeout=300)[1] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    assert sum("waiting for 0 s" in text for text in said) >= 1 and all(
        "is being trained" in t for t in said if "waiting" in t
    )
    runs = runs_in(tmp_path)
    assert (len(runs["sft"]), len(runs["rm"]), len(runs["ppo"])) == (1, 1, 2) and not (
        runs["sft"][0] / "attempts"
    ).exists()
    assert {summary(run)["parents"]["sft"] for run in runs["ppo"]} == {
        summary(runs["sft"][0])["id"]
    }


@pytest.mark.full
@pytest.mark.parametrize("how", ["Ctrl-C", "kill -9 of the sweep"])
def test_jobs_side_by_side_save_when_they_are_stopped(tmp_path: Path, how: str) -> None:
    few = [arg for arg in SLOW if "max_steps=30" not in arg and "every_steps" not in arg]
    command = [
        sys.executable,
        str(REPO / "train.py"),
        "-m",
        *few,
        "sft.max_steps=3000",
        "sft.epochs=2000",
        "seed=1,2",
    ]
    sweep = subprocess.Popen(
        [*command, "hydra/launcher=parallel"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while (
        len([p for p in tmp_path.glob("outputs/sft-*/metrics.jsonl") if p.stat().st_size > 500]) < 2
    ):
        assert time.time() < deadline and sweep.poll() is None
        time.sleep(0.05)
    os.killpg(
        sweep.pid, signal.SIGINT
    ) if how == "Ctrl-C" else sweep.kill()  # a terminal sends it to the whole group
    code = sweep.wait(60)
    runs = [path.parent for path in tmp_path.glob("outputs/sft-*/metrics.jsonl")]
    while (
        not all(find_checkpoints(run)[0] and not is_locked(run) for run in runs)
        and time.time() < deadline
    ):
        time.sleep(0.1)
    assert [len(find_checkpoints(run)[0]) for run in runs] == [1, 1]
    assert code == (130 if how == "Ctrl-C" else -signal.SIGKILL) and not any(
        is_locked(run) for run in runs
    )


def test_a_sweep_of_plans_has_no_report(tmp_path: Path) -> None:
    """Also of those that do not fit. Its folder is where the jobs' root is."""
    too_large = ["actor=opt66b", "deploy.gpu_memory_gb=4", "root=${oc.env:SOMEWHERE}/runs"]
    refused = train(
        *("-m", "stage=sft", "seed=1,2", "plan=true", *too_large),
        cwd=tmp_path,
        SOMEWHERE=str(tmp_path / "far"),
    )
    assert refused.returncode != 0 and "would not fit" in refused.stderr
    assert not [*tmp_path.rglob("error.txt")] and [*tmp_path.iterdir()] == [tmp_path / "far"]
    done = train("-m", "stage=sft", "seed=1,2", "plan=true", cwd=tmp_path)
    assert (
        done.returncode == 0
        and "Traceback" not in done.stderr
        and done.stdout.count("on disk") == 2
    )
    assert not [*(tmp_path / "multirun").glob("*/*")]


def test_a_finished_run_says_what_it_is(tmp_path: Path) -> None:
    done = train("stage=sft", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)["sft"]
    about = summary(run)
    assert (
        about["settings"]["sft.max_steps"] == 3
        and about["versions"]["torch"]
        and about["data"][0]["rows"]
        and about["parents"] == {}
    )
    card = (run / "model" / "README.md").read_text()
    for word in (
        run.name,
        "library_name: transformers",
        "eval/perplexity",
        "sandbox",
        "sft.max_steps: 3",
        about["id"],
        "builtin:tiny",
    ):
        assert word in card, word
    assert json.loads((run / "env.json").read_text())["packages"].keys() <= about["versions"].keys()

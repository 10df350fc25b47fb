"""Runs whose rewards are functions: with one and with two processes, and functions that fail or
hang in the middle of training."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparisons import SMOOTH, compare, last_bits
from data_files import jsonl
from helpers import metrics, runs_in, summary, train
from worker_runs import prepare, rows_of, work

pytestmark = pytest.mark.full

FUNCTIONS = """
import asyncio, time

def has_letter(prompts, completions, letter, **kwargs):
    return [float(c.count(l)) if l else None for c, l in zip(completions, letter)]

async def length(completions, completion_ids):
    await asyncio.sleep(0.01 * len(completions))
    return [-0.1 * len(ids) for ids in completion_ids]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(ground_truth in solution_str)}

def hangs_at_the_second_rollout(completions, trainer_state):
    if trainer_state.global_step == 1 and trainer_state.max_steps == 2:
        time.sleep(600)
    return [float(len(completion)) for completion in completions]

def fails_at_the_second_rollout(completions, trainer_state):
    if trainer_state.global_step == 1:
        raise ValueError("no connection")
    return [float(len(completion)) for completion in completions]
"""
GRPO = ["data=jsonl", "data.shares=[0,0,1]", "rl.rewards.model=null", "rl.max_steps=2"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides that name a file of prompts with columns; my_rewards.py is beside it."""
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    rows = [
        {"prompt": f"Say {n}", "letter": "e" if n % 3 else None, "ground_truth": str(n % 10)}
        for n in range(80)
    ]
    file = jsonl(tmp_path / "prompts.jsonl", rows)
    return [*GRPO, f"data.sources.mine.path={file}"]


def reward(name: str, path: Path, **more: object) -> str:
    settings = "".join(f", {key}: {value}" for key, value in more.items())
    return f"+rl.rewards={{{name}: {{function: '{path}/my_rewards.py:{name}'{settings}}}}}"


def test_functions_give_the_same_with_one_and_two_processes(
    files: list[str], tmp_path: Path
) -> None:
    """TRL's convention with a column and None, one that is async, and verl's."""
    names = ("has_letter", "length", "compute_score")
    given = [*files, *(reward(name, tmp_path) for name in names), "rl.responses_per_prompt=4"]
    given += ["rollout.log_responses=-1"]
    inputs = {"sft": "builtin:tiny"}
    plain = prepare(tmp_path, "plain", "grpo", inputs, given)
    work([SMOOTH, plain, *last_bits(plain)], 1)
    two = prepare(tmp_path, "two", "grpo", inputs, given, processes_per_node=2)
    work([SMOOTH, two], 2)
    compare(plain, two, "functions x 2")
    first = [row for row in rows_of(plain, "rollouts.jsonl") if row["step"] == 1]
    others = [row for row in rows_of(two, "rollouts.jsonl") if row["step"] == 1]
    columns = [f"score_{name}" for name in names]
    for row, other in zip(first, others, strict=True):
        assert [row[name] for name in columns] == [other[name] for name in columns]
        n = int(row["prompt"].split("Say ")[1].split()[0])
        letters = row["response"].count("e") if n % 3 else None
        assert row["score_has_letter"] == letters
        assert row["score_length"] == pytest.approx(-0.1 * len(row["tokens"]))
        assert row["score_compute_score"] == float(str(n % 10) in row["response"])
    logged = metrics(plain)[0]
    share = sum(row["score_has_letter"] is None for row in first) / len(first)
    assert logged["reward/has_letter/none_rate"] == pytest.approx(share)
    assert logged["reward/length/none_rate"] == logged["reward/length/error_rate"] == 0


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "hangs_at_the_second_rollout",
            "first prompt 'Say {n}': the function gave no answer within 2 s (timeout) for 16 "
            "completions",
        ),
        ("fails_at_the_second_rollout", "the function failed: ValueError: no connection"),
    ],
)
def test_what_fails_in_the_middle_of_a_run_ends_it_with_one_line(
    name: str, said: str, files: list[str], tmp_path: Path
) -> None:
    command = ["stage=grpo", "rl.actor=builtin:tiny", *files, "rl.batch_size=16"]
    command += ["rollout.max_new_tokens=4", "wandb.mode=disabled", "deploy.threads=1"]
    done = train(*command, reward(name, tmp_path, timeout=2), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    key = f"error: grpo: rl.rewards.{name}.function={tmp_path}/my_rewards.py:{name}: "
    assert line.startswith(key) and said.split("{n}")[-1] in line
    (run,) = runs_in(tmp_path)["grpo"]
    assert [row["step"] for row in metrics(run)] == [1]


@pytest.mark.parametrize("name", ["hangs_at_the_second_rollout", "fails_at_the_second_rollout"])
def test_with_skip_a_run_goes_on_and_logs_the_share(
    name: str, files: list[str], tmp_path: Path
) -> None:
    command = ["stage=grpo", "rl.actor=builtin:tiny", *files, "rl.batch_size=16"]
    command += ["rollout.max_new_tokens=4", "wandb.mode=disabled", "deploy.threads=1"]
    skip = reward(name, tmp_path, timeout=2, on_error="skip")
    done = train(*command, skip, reward("length", tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("skipped (on_error=skip)") == 1
    (run,) = runs_in(tmp_path)["grpo"]
    rates = [row[f"reward/{name}/error_rate"] for row in metrics(run)]
    assert rates == [0, 1] and "eval/score" in summary(run)["metrics"]

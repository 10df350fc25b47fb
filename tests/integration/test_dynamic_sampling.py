"""Dynamic sampling in short runs with real engines: groups with equal rewards are replaced, a
killed run resumes bit for bit, and the number of processes changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from comparisons import SMOOTH, compare, last_bits
from helpers import lines, metrics, undocumented
from worker_runs import kill_when, prepare, same, work

# Two tokens at a low temperature: the two responses to a prompt are often the same, with one score.
TWINS = [
    "rl.responses_per_prompt=2",
    "rl.batch_size=16",
    "rollout.max_new_tokens=2",
    "rollout.temperature=0.3",
    "rollout.log_responses=-1",
    "rl.overlong_penalty=null",
    "rl.mask_truncated=false",
]


def drawn(run: Path) -> list[float]:
    return [row["rollout/prompts_drawn"] for row in metrics(run)]


def groups_with_equal_scores(run: Path, step: int) -> int:
    log = pandas.read_json(run / "rollouts.jsonl", lines=True)
    scores = log[log.step == step].score.to_numpy().reshape(-1, 2)
    return int((abs(scores[:, 0] - scores[:, 1]) < 1e-6).sum())


def test_groups_with_equal_rewards_are_replaced_and_what_there_is_fills_up(
    inputs: dict[str, str], tmp_path: Path
) -> None:
    """The first rollout samples from the same policy in all three runs."""
    names = {"off": "rl.dynamic_sampling=null", "two": "rl.dynamic_sampling=2"}
    names["many"] = "rl.dynamic_sampling=50"
    runs = {
        name: prepare(tmp_path, name, "dapo", inputs, [*TWINS, setting])
        for name, setting in names.items()
    }
    work(list(runs.values()), 1)
    first = {name: metrics(run)[0] for name, run in runs.items()}
    equal = {name: groups_with_equal_scores(run, 1) for name, run in runs.items()}
    assert equal["off"] > 0, "or this test shows nothing"
    assert first["off"]["frac_reward_zero_std"] == pytest.approx(equal["off"] / 8)
    assert "rollout/scores_drawn" not in first["off"]
    # 8 prompts, then as many as had equal rewards; what differs is kept, then the first ones
    assert drawn(runs["off"])[0] == 8 and drawn(runs["two"])[0] == 8 + equal["off"]
    of_16 = round(first["two"]["frac_reward_zero_std"] * drawn(runs["two"])[0])
    assert equal["two"] == max(0, 8 - (drawn(runs["two"])[0] - of_16))
    assert equal["many"] == 0 and drawn(runs["many"])[0] > 8
    assert undocumented({key for row in metrics(runs["many"]) for key in row}) == []
    # what is kept stands in the order in which it was drawn
    logs = {n: pandas.read_json(run / "rollouts.jsonl", lines=True) for n, run in runs.items()}
    some = {n: log[log.step == 1][["prompt", "response"]].agg(tuple, 1) for n, log in logs.items()}
    kept = [row for row in some["off"] if row in set(some["many"])]
    assert kept == [row for row in some["many"] if row in set(some["off"])] and kept


@pytest.mark.full
def test_a_killed_run_resumes_bit_for_bit(inputs: dict[str, str], tmp_path: Path) -> None:
    """How many prompts were drawn is part of the checkpoint."""
    more = [*TWINS, "rl.dynamic_sampling=4", "rl.max_steps=4", "checkpoint.every_steps=2"]
    whole, killed = (prepare(tmp_path, name, "dapo", inputs, more) for name in ("whole", "killed"))
    work([whole], 1)
    kill_when(killed, 1, lambda: lines(killed / "metrics.jsonl") >= 3)
    work([killed], 1)
    same(whole, killed)
    assert sum(drawn(whole)) > 4 * 8, "prompts were replaced"


@pytest.mark.full
def test_two_processes_draw_the_same_prompts(inputs: dict[str, str], tmp_path: Path) -> None:
    more = [*TWINS, "rl.dynamic_sampling=3"]
    one = prepare(tmp_path, "one", "dapo", inputs, more)
    two = prepare(
        tmp_path, "two", "dapo", inputs, more, processes_per_node=2, zero_stage=2, micro_batch=3
    )
    work([SMOOTH, one, *last_bits(one)], 1)
    work([SMOOTH, two], 2)
    compare(one, two, "dapo")
    assert drawn(one)[0] == drawn(two)[0] > 8


@pytest.mark.full
def test_truncated_responses_are_not_in_the_loss(inputs: dict[str, str], tmp_path: Path) -> None:
    """Without EOS in any response nothing is trained: no loss, and the same weights."""
    more = [*TWINS, "rl.dynamic_sampling=null", "rl.mask_truncated=true", "rl.max_steps=1"]
    run = prepare(tmp_path, "truncated", "dapo", inputs, [*more, "rollout.max_new_tokens=1"])
    work([run], 1)
    (row,) = metrics(run)
    assert row["tokens/truncated_frac"] == 1 and row["policy/grad_norm"] == 0
    assert (
        "all responses truncated at rollout 1" in json.loads((run / "warnings.json").read_text())[0]
    )

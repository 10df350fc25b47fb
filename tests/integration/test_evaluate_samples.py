"""stage=eval with several responses to each prompt: pass rates from the saved responses again."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from data_files import jsonl
from helpers import composed, found, runs_in, summary, train

from rlhf.config.validation import check_config
from rlhf.runs.checks import check_inputs

FUNCTIONS = """
def odd(completions, answer):  # what a policy with random weights sometimes passes
    return [None if a == "7" else float(len(c) % 2) for c, a in zip(completions, answer)]

def half(completions):
    return [0.5] * len(completions)
"""
COMMAND = [
    "stage=eval",
    "data=jsonl",
    "data.sources.mine.path=sums.jsonl",
    "data.eval_share=0.5",
    "data.eval_rows=12",
    "eval.policies=[base]",
    "eval.against=null",
    "eval.rewards.model=null",
    "eval.rewards.odd.function=checks_of_mine:odd",
    "eval.rewards.half.function=checks_of_mine:half",
    "eval.samples=4",
    "eval.by=[level]",
    "eval.prompts=[zh]",
    "eval.best_of=0",
    "eval.save_responses=out.jsonl",
    "rollout.max_new_tokens=6",
    "wandb.mode=disabled",
    "deploy.threads=1",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    levels = ("easy", "<b>hard")
    rows = [
        {"question": f"What is {n} + 1?", "answer": str(n % 9), "level": levels[n % 2]}
        for n in range(40)
    ]
    jsonl(tmp_path / "sums.jsonl", rows)
    (tmp_path / "checks_of_mine.py").write_text(FUNCTIONS)
    return tmp_path


def subsets_that_pass(scores: list[float], k: int) -> float:
    """pass@k by enumeration."""
    subsets = [any(s >= 1 for s in some) for some in itertools.combinations(scores, k)]
    return sum(subsets) / len(subsets)


def check_rates(rates: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Compare the rates of `odd` with those of the saved responses."""
    scores: dict[int, list[float]] = defaultdict(list)
    levels = {}
    for row in saved:
        levels[row["prompt_number"]] = row["columns"]["level"]
        if row["scores"]["odd"] is not None:
            scores[row["prompt_number"]].append(row["scores"]["odd"])
    seen = [rate for rate in rates if (rate["verifier"], rate["measure"]) == ("odd", "pass")]
    assert [(r["k"], r["value"]) for r in seen] == [
        (1, ""), (2, ""), (4, ""), (1, "<b>hard"), (1, "easy")
    ]  # fmt: skip
    for rate in seen:
        groups = [
            subsets_that_pass(some, rate["k"])
            for number, some in scores.items()
            if rate["value"] in ("", levels[number])
        ]
        assert rate["prompts"] == len(groups)
        assert rate["rate"] == pytest.approx(sum(groups) / len(groups))


@pytest.mark.full
def test_rates_and_file_in_one_and_two_processes(folder: Path) -> None:
    done = train(*COMMAND, cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(folder)["eval"]
    about, lines = found(run), (folder / "out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    held_out = [row for row in rows if row["part"] == "held-out"]
    prompts = len(about["answers"])
    assert len(held_out) == 4 * prompts > 12 and about["samples"] == 4
    assert [row["sample"] for row in held_out[:5]] == [0, 1, 2, 3, 0]
    first = held_out[0]
    assert first["messages"] == [{"role": "user", "content": first["prompt"]}]
    assert first["policy"] == "base" and first["response"] != held_out[1]["response"]
    assert first["response"] == about["answers"][0]["answers"]["base"]["completion"]
    assert first["columns"].keys() == {"answer", "level"} and first["scores"]["half"] == 0.5
    assert [row["scores"] for row in rows[4 * prompts :]] == [{}] * 6, "functions know no zh"
    check_rates(about["pass_rates"], held_out)
    assert about["policies"]["base"]["score/odd"] == pytest.approx(
        sum(r["scores"]["odd"] or 0 for r in held_out)
        / sum(r["scores"]["odd"] is not None for r in held_out)
    )
    samples = [json.loads(line) for line in (run / "samples.jsonl").open()]
    assert {row["columns"]["level"] for row in samples if "columns" in row} == {"<b>hard", "easy"}
    metrics = summary(run)["metrics"]
    assert metrics["eval/pass@1"] == metrics["eval/base/pass@1/odd"]
    assert metrics["eval/base/pass@4/half"] == 0 < metrics["eval/base/pass@4/odd"]
    for word in ("pass@4", "base (odd)", "level = <b>hard"):
        assert word in done.stdout
    again = train(*COMMAND, cwd=folder)
    assert "eval.save_responses=out.jsonl: nothing is written" in again.stderr
    two = train(*COMMAND, "fresh=true", "deploy.processes_per_node=2", cwd=folder)
    assert two.returncode == 0, two.stderr
    assert found(run)["pass_rates"] == about["pass_rates"]
    texts = [json.loads(line)["response"] for line in (folder / "out.jsonl").open()]
    assert texts == [row["response"] for row in rows]


def test_an_unknown_column_gets_one_line_before_a_model_is_loaded(folder: Path) -> None:
    done = train(*COMMAND, "eval.by=[difficulty]", cwd=folder)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "eval.by=[difficulty]: the rows of the held-out prompts have no such column; they have "
        "answer, level" in done.stderr
    )


WRONG = [
    (["eval.samples=0"], "eval.samples=0: must be above 0"),
    (
        ["eval.samples=4", "eval.decoding=greedy"],
        "eval.samples=4 with eval.decoding=greedy: all responses to a prompt would be the same",
    ),
    (["eval.by=[level]"], "eval.by=[level]: it divides the pass rates of functions"),
    (
        ["eval.by=[level]", "eval.rewards.server.url=http://localhost:1/score"],
        "eval.by=[level]: it divides the pass rates of functions",
    ),
    (["eval.save_responses=."], "eval.save_responses=.: this is a folder; give a file in it"),
    (["eval.save_responses=out/"], "eval.save_responses=out/: this is a folder"),
    (["eval.save_responses=nowhere/a.jsonl"], "eval.save_responses=nowhere/a.jsonl: there is no"),
]


@pytest.mark.parametrize("overrides, line", WRONG, ids=[line[:40] for _, line in WRONG])
def test_bad_values_get_one_line(overrides: list[str], line: str) -> None:
    cfg = composed("stage=eval", *overrides)
    assert any(one.startswith(line) for one in check_config(cfg) + check_inputs(cfg)), line

"""Commands on the arithmetic world: its verifier is the reward, so no reward model is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import found, runs_in, summary, train

pytestmark = pytest.mark.full

TINY = [
    "data=arithmetic",
    "data.arithmetic.demonstrations=64",
    "data.arithmetic.prompts=64",
    "data.arithmetic.pairs=64",
    "data.eval_rows=16",
    "sft.max_steps=3",
    "rm.max_steps=3",
    "rl.max_steps=2",
    "rl.batch_size=16",
    "rollout.max_new_tokens=16",
    "wandb.mode=disabled",
    "deploy.threads=1",  # other tests run beside it
]


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a short pipeline=grpo data=arithmetic in it."""
    root = tmp_path_factory.mktemp("arithmetic")
    done = train("pipeline=grpo", *TINY, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def test_a_pipeline_needs_no_reward_model_and_logs_the_columns(grpo: Path) -> None:
    runs = runs_in(grpo)
    assert {stage: len(dirs) for stage, dirs in runs.items()} == {"sft": 1, "grpo": 1}
    [run] = runs["grpo"]
    assert run.name.startswith("grpo-tiny-arithmetic")
    for name, count in (("samples.jsonl", 16), ("rollouts.jsonl", 4)):
        rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            numbers = row["prompt"].partition("What is ")[2].partition("?")[0]
            assert row["columns"]["answer"] == str(eval(numbers))
            assert row["columns"]["difficulty"] in ("0 carries", "1 carry")
    metrics = summary(run)["metrics"]
    assert metrics["eval/score"] == metrics["eval/gold"]  # the verifier is the ground truth


def test_harder_problems_evaluate_the_same_runs(grpo: Path) -> None:
    command = ["stage=eval", "pipeline=grpo", *TINY, "eval.prompts=[]", "eval.best_of=0"]
    for more in ([], ["data.arithmetic.harder=true"]):
        done = train(*command, *more, cwd=grpo)
        assert done.returncode == 0, done.stderr
    runs = runs_in(grpo)
    assert len(runs["sft"]) == len(runs["grpo"]) == 1 and len(runs["eval"]) == 2
    assert all("gold" in json.dumps(found(run)) for run in runs["eval"])


def test_a_learned_reward_model_and_dpo_train_on_its_pairs(grpo: Path) -> None:
    for command in (["pipeline=ppo", "experiment=arithmetic_learned"], ["pipeline=dpo"]):
        done = train(*command, *TINY, cwd=grpo)
        assert done.returncode == 0, done.stderr
    runs = runs_in(grpo)
    assert len(runs["sft"]) == len(runs["rm"]) == len(runs["ppo"]) == len(runs["dpo"]) == 1
    assert "eval/accuracy_prompt" in summary(runs["rm"][0])["metrics"]


def test_its_data_can_be_inspected(tmp_path: Path) -> None:
    done = train("stage=inspect", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [run] = runs_in(tmp_path)["inspect"]
    result = json.loads((run / "result.json").read_text())["metrics"]
    assert not any(result["leakage"].values()) and result["stages"]["ppo"]["rows"] == 64

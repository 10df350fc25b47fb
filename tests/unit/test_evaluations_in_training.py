"""Evaluations of online RL: with top-p or top-k they have no KL."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import composed
from rollouts import QUESTIONS, Engines

from rlhf.data.records import Dataset, Prompt, Turn
from rlhf.evaluation.during_training import Evaluations


@pytest.mark.parametrize(
    "setting, has_kl",
    [
        ("rl.evaluation.temperature=0.5", True),
        ("rl.evaluation.top_p=0.9", False),
        ("rl.evaluation.top_k=5", False),
    ],
)
def test_only_samples_of_the_full_distribution_have_a_kl(
    setting: str, has_kl: bool, models_of_ppo: Engines, tmp_path: Path
) -> None:
    cfg = composed("stage=ppo", setting, "rollout.max_new_tokens=4", "data.max_prompt_tokens=48")
    prompts = [Prompt([Turn("user", text)]) for text in QUESTIONS]
    data = Dataset([], [], [], [], [], prompts)
    evaluations = Evaluations(cfg, data, models_of_ppo.models, tmp_path)
    evaluations.remember_start()
    metrics, rows = evaluations.compare(1)
    assert {"eval/score", "eval/score_before", "eval/length"} <= set(metrics)
    for name in ("eval/kl", "eval/objective"):
        assert (name in metrics) == (name.removeprefix("eval/") in evaluations.start) == has_kl
    for row in [*evaluations.start_samples, *rows]:
        assert ("kl" in row) == has_kl and "length" in row
    if has_kl:
        penalty = cfg.rl.kl.coef * metrics["eval/kl"]
        assert metrics["eval/objective"] == metrics["eval/score"] - penalty


def test_the_best_of_another_measure_is_no_best(
    models_of_ppo: Engines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run may be resumed with another rl.evaluation.best_by, whose unit is another one."""

    def evaluations(best_by: str) -> Evaluations:
        cfg = composed("stage=ppo", f"rl.evaluation.best_by={best_by}")
        return Evaluations(cfg, Dataset([], [], [], [], [], []), models_of_ppo.models, tmp_path)

    before = evaluations("score")
    before.best = 7.5
    same, other = evaluations("score"), evaluations("gold")
    same.load_state_dict(before.state_dict())
    with caplog.at_level("INFO", "rlhf"):
        other.load_state_dict(before.state_dict())
    assert (same.best, other.best) == (7.5, -float("inf"))
    assert "rl.evaluation.best_by=gold, before score: model_best/ begins anew" in caplog.text

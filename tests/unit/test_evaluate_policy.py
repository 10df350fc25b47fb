"""An evaluation of a policy with engines: what is measured, and how its responses are sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rollouts import QUESTIONS, Engines

from rlhf.data.records import Dataset, Prompt, Turn
from rlhf.evaluation.policy import before_and_after, evaluate_policy
from rlhf.rewards.process import RewardProcess, Spec
from rlhf.rl.experience import Models
from rlhf.rl.rewards import Rewards, Source
from rlhf.sampling.token_choice import Sampling


def test_an_evaluation_measures_each_kept_prompt_and_repeats_itself(models_of_ppo: Engines) -> None:
    m = models_of_ppo
    texts = ["What does my cat need?", "far too long " * 30, "Hi"]
    prompts = [Prompt([Turn("user", text)]) for text in texts]
    data = Dataset(
        [],
        [],
        [],
        [],
        [],
        prompts,
        gold=lambda turns, answer: float(len(answer)),
        best_gold=lambda turns: 1000.0,
    )
    means, rows = evaluate_policy(m.models, data, 48, 8, Sampling(1.0), 2)
    assert [row["prompt"] for row in rows] == ["What does my cat need?", "Hi"]
    for key in ("length", "eos_rate", "repetition", "score", "kl", "gold", "gold_best"):
        assert means[key] == pytest.approx(sum(row[key] for row in rows) / 2)
    assert set(means) == set(rows[0]) - {"prompt", "completion"} and "score/model" not in means
    assert all(
        row["gold"] == len(row["completion"]) and row["kl"] == pytest.approx(0.0, abs=1e-5)
        for row in rows
    )
    alone, again = evaluate_policy(Models(m.tokenizer, m.actor), data, 48, 8, Sampling(1.0), 1)
    assert again[0]["completion"] == rows[0]["completion"] and not {"score", "kl"} & set(alone)


def test_an_evaluation_has_the_other_columns_of_its_prompts(models_of_ppo: Engines) -> None:
    m = models_of_ppo
    columns = {"answer": "739", "info": {"n": 1}, "solution": "s" * 230}
    prompts = [
        Prompt([Turn("user", "147 + 592?")], json.dumps(columns)),
        Prompt([Turn("user", "?")]),
    ]
    data = Dataset([], [], [], [], [], prompts)
    start = evaluate_policy(m.models, data, 48, 8, Sampling(), 2)
    means, rows = start
    shown = {"answer": "739", "info": {"n": 1}, "solution": "s" * 200 + " ... (30 more characters)"}
    assert rows[0]["columns"] == shown and "columns" not in {*rows[1], *means}
    metrics, compared = before_and_after(start, start)
    assert compared[0]["columns"] == shown and "columns" not in compared[1]
    assert not [name for name in metrics if "columns" in name]


def test_an_evaluation_reports_the_weighted_sum_and_each_of_several_sources(
    models_of_ppo: Engines, tmp_path: Path
) -> None:
    """One source applies to the first prompt only."""
    m = models_of_ppo
    (tmp_path / "parts.py").write_text(
        "def long(prompts, completions):\n"
        "    pairs = zip(prompts, completions)\n"
        "    return [None if p == 'Hi' else float(len(p + c)) for p, c in pairs]\n"
    )
    process = RewardProcess({"long": Spec("rl.rewards.long", f"{tmp_path}/parts.py:long")})
    texts = ["What does my cat need?", "Hi"]
    data = Dataset([], [], [], [], [], [Prompt([Turn("user", text)]) for text in texts])
    sources = [Source("model", 1.0, m.reward), Source("long", -0.5)]
    several = Models(m.tokenizer, m.actor, rewards=Rewards(sources, m.tokenizer, process))
    means, rows = evaluate_policy(several, data, 48, 8, Sampling(), 2)
    alone = Models(m.tokenizer, m.actor, rewards=Rewards(sources[1:], m.tokenizer, process))
    means_alone, rows_alone = evaluate_policy(alone, data, 48, 8, Sampling(), 2)
    process.close()
    _, one = evaluate_policy(m.models, data, 48, 8, Sampling(), 2)
    assert rows[0]["score/long"] == len(rows[0]["prompt"] + rows[0]["completion"])
    assert rows[1]["score/long"] is None and means["score/long"] == rows[0]["score/long"]
    for row, of_model in zip(rows, one):
        assert row["score/model"] == pytest.approx(of_model["score"], abs=1e-5)
        total = row["score/model"] - 0.5 * (row["score/long"] or 0.0)
        assert row["score"] == pytest.approx(total, abs=1e-5)
    for key in ("score", "score/model"):
        assert means[key] == pytest.approx(sum(row[key] for row in rows) / 2)
    assert rows_alone[1]["score"] is None and means_alone["score"] == rows_alone[0]["score"]


def test_an_evaluation_samples_as_it_is_told(models_of_ppo: Engines) -> None:
    m = models_of_ppo
    data = Dataset([], [], [], [], [], [Prompt([Turn("user", text)]) for text in QUESTIONS])
    told = [
        Sampling(greedy=True),
        Sampling(top_k=1),
        Sampling(top_p=1e-6),
        Sampling(temperature=1e-5),
        Sampling(),
    ]
    likeliest, *same, free = (
        [
            row["completion"]
            for row in evaluate_policy(Models(m.tokenizer, m.actor), data, 48, 8, how, 2)[1]
        ]
        for how in told
    )
    assert all(answers == likeliest for answers in same) and free != likeliest


def test_several_responses_to_a_prompt_lie_side_by_side(models_of_ppo: Engines) -> None:
    m = models_of_ppo
    data = Dataset([], [], [], [], [], [Prompt([Turn("user", text)]) for text in QUESTIONS])
    models = Models(m.tokenizer, m.actor)
    _, one = evaluate_policy(models, data, 48, 8, Sampling(), 2)
    means, three = evaluate_policy(models, data, 48, 8, Sampling(n=3), 2)
    assert [row["prompt"] for row in three] == [text for text in QUESTIONS for _ in range(3)]
    assert [row["completion"] for row in three[::3]] == [row["completion"] for row in one]
    assert all(len({row["completion"] for row in three[i : i + 3]}) > 1 for i in (0, 3))
    assert means["length"] == pytest.approx(sum(row["length"] for row in three) / len(three))

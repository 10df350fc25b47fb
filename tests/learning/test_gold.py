"""The promise of the sandbox: PPO closes most of the gap between the SFT model and the best
possible responses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from helpers import Demo, runs_in, summary, train

from rlhf.config.choices import RmLoss
from rlhf.config.loading import load_config
from rlhf.data import encoding
from rlhf.data.load import load_data
from rlhf.evaluation.reward_model import pairwise_accuracy
from rlhf.models.loading import load_scorer, load_tokenizer
from rlhf.stages.rm import compare


def check(sft: Path, rm: Path, ppo: Path) -> dict[str, float]:
    s, r, p = (summary(run)["metrics"] for run in (sft, rm, ppo))
    gap = (p["eval/gold"] - p["eval/gold_before"]) / (p["eval/gold_best"] - p["eval/gold_before"])
    figures = {
        "gap_closed": gap,
        "kl": p["eval/kl"],
        "accuracy": r["eval/accuracy"],
        "prompt": r["eval/accuracy_prompt"],
    }
    figures |= {
        "bayes": r["eval/accuracy_bayes"],
        "sft_eos": s["eval/eos_rate"],
        "score": p["eval/score"] - p["eval/score_before"],
    }
    print({key: round(value, 3) for key, value in figures.items()})
    assert figures["gap_closed"] >= 0.60
    assert figures["kl"] <= 8
    assert figures["accuracy"] >= 0.80
    assert figures["prompt"] >= 0.95
    assert figures["bayes"] >= 0.90
    assert figures["sft_eos"] >= 0.95
    assert figures["score"] > 0
    return figures


def test_gold_target(demo: Demo) -> None:
    check(demo.sft, demo.rm, demo.ppo)


def test_pipeline_time(demo: Demo) -> None:
    """Promised on two cores: under 4 minutes; asserted: 3 x that."""
    print(f"pipeline: {demo.seconds:.0f} s")
    assert demo.seconds < 3 * 240


def test_answers_to_other_prompts_are_worth_less(demo: Demo) -> None:
    """A bug that mixes up prompts must be seen: the gold reward and the reward model both prefer
    the response to a prompt over the response to another one."""
    rows = [json.loads(line) for line in (demo.ppo / "samples.jsonl").read_text().splitlines()]
    data = load_data(load_config(demo.rm / "config.yaml").data)
    assert data.gold is not None
    turns = {prompt.turns[-1].text: prompt.turns for prompt in data.eval_prompts}
    prompts = [turns[row["prompt"]] for row in rows]
    answers = [row["after"] for row in rows]
    shuffled = [random.Random(i).sample(answers, len(answers)) for i in range(4)]
    right = sum(data.gold(p, a) for p, a in zip(prompts, answers)) / len(rows)
    mixed = sum(data.gold(p, a) for others in shuffled for p, a in zip(prompts, others)) / (
        4 * len(rows)
    )
    tokenizer = load_tokenizer(str(demo.rm / "model"))
    scorer = load_scorer(
        str(demo.rm / "model"), tokenizer, load_config(demo.rm / "config.yaml").deploy.precision
    )
    encoded = encoding.encode_prompts(tokenizer, prompts, 256)
    own, *foreign = (
        encoding.encode_responses(tokenizer, some, 256) for some in (answers, *shuffled)
    )
    pairs = [(prompt, a, b) for others in foreign for prompt, a, b in zip(encoded, own, others)]
    with torch.no_grad():
        chosen, rejected, _ = compare(scorer, pairs, tokenizer, RmLoss.sequence)
        better = pairwise_accuracy(chosen, rejected)
    print(
        f"gold {right:.2f}, of responses to other prompts {mixed:.2f}; "
        f"the reward model prefers the right one in {better:.0%}"
    )
    assert mixed < right - 1
    assert better > 0.75  # of a perfect judge 0.94: some of the others are as good


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3])
def test_gold_target_on_more_seeds(seed: int, tmp_path: Path) -> None:
    done = train(f"seed={seed}", "wandb.mode=disabled", "deploy.threads=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    runs = runs_in(tmp_path)
    check(runs["sft"][0], runs["rm"][0], runs["ppo"][0])

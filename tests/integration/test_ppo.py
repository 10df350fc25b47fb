"""PPO's options, each in a run of two or three rollouts with real engines: what it logs, the files
that it leaves, and what it must not do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from helpers import metrics
from safetensors.torch import load_file
from worker_runs import prepare, work

from rlhf.config.choices import KlAppliedTo
from rlhf.config.loading import load_config
from rlhf.config.stage_nodes import DsChat

GOLD = "+rl.rewards={gold: {function: 'rlhf.data.sandbox:gold', weight: 0.5}}"
CASES: dict[str, list[str]] = {
    "plain": ["rl.clip_low=0.2", "rl.critic.value_clip=0.2", "rollout.log_responses=-1"],
    "loss_k2": [
        "rl.kl.applied_to=loss",
        "rl.kl.estimator=k2",
        "rl.kl.coef=0.3",
        "rollout.log_responses=-1",
    ],
    "reward_k3": ["rl.kl.estimator=k3", "rl.max_steps=3", "rollout.log_responses=-1"],
    "linear": ["rl.kl.controller=linear", "rl.kl.final_coef=0.01", "rl.max_steps=3"],
    "adaptive": [
        "rl.kl.controller=adaptive",
        "rl.kl.target=0.5",
        "rl.kl.horizon=100",
        "rl.max_steps=3",
    ],
    "entropy": ["rl.entropy_coef=0.5"],
    "critic_warmup": ["rl.critic.warmup_rollouts=1", "rl.max_steps=3"],
    "target_kl": ["rl.target_kl=1e-9", "rl.epochs=4"],
    "sequence": ["rl.loss_aggregation=sequence"],
    "constant": ["rl.loss_aggregation=constant"],
    "no_value_clip": ["rl.critic.value_clip=null", "rl.whiten_rewards=true", "rl.scale_score=true"],
    "penalties": [
        "rl.length_penalty=0.1",
        "rl.missing_eos_penalty=2",
        "rl.score_clip=1.5",
        "rollout.log_responses=-1",
    ],
    "everything_kept": [
        "rl.ema=0.5",
        "rl.evaluation.every=1",
        "rl.evaluation.best_by=gold",
        "rl.max_steps=3",
    ],
    "several_responses": [
        "rl.responses_per_prompt=4",
        "rl.batch_size=32",
        "rollout.log_responses=-1",
    ],
    "ptx": ["rl.ptx.coef=0.2"],
    "two_sources": [GOLD, "rollout.log_responses=-1"],
    "raw": ["rl.normalize_score=false"],
    "critic_optim": [
        "rl.critic.schedule=constant",
        "rl.critic.warmup_steps=2",
        "rl.warmup_ratio=0",
        "rl.max_steps=3",
    ],
    "dschat": ["rl=dschat", "rollout.log_responses=-1", "deploy.micro_batch=4"],
}


@pytest.fixture(scope="module")
def runs(
    parents: dict[str, Path], inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ppo")
    done = {
        name: prepare(root, name, "ppo", inputs, overrides) for name, overrides in CASES.items()
    }
    work(list(done.values()), 1)
    return done | parents


def answers(run: Path) -> pandas.DataFrame:
    return pandas.read_json(run / "rollouts.jsonl", lines=True)


def weights(run: Path, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(run / part / "model.safetensors")


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("name", CASES)
def test_every_option_trains_actor_and_critic(runs: dict[str, Path], name: str) -> None:
    rows = metrics(runs[name])
    assert all(
        math.isfinite(value)
        for row in rows
        for key, value in row.items()
        if key != "val/explained_variance"
    )
    assert apart(weights(runs[name]), weights(runs["sft"])) > 0
    if name != "dschat":  # whose masks leave no token of an answer that is an EOS only
        assert rows[0]["loss/value_avg"] > 0 and rows[0]["val/grad_norm"] > 0
        warmup = 1 if name == "critic_warmup" else 0  # whose rollouts leave the policy as it is
        assert not any("policy/ratio_first_minibatch" in row for row in rows[:warmup])
        for row in rows[warmup:]:  # in each rollout, before the policy moves
            assert row["policy/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)


# ------------------------------------------------------ what is logged, computed again from the log


@pytest.mark.parametrize(
    "name", ["plain", "reward_k3", "loss_k2", "penalties", "two_sources", "several_responses"]
)
def test_logged_metrics_equal_what_the_logged_answers_say(runs: dict[str, Path], name: str) -> None:
    """DeepSpeed-Chat logged losses of other tensors than it trained on (T18)."""
    cfg = load_config(runs[name] / "config.yaml")
    log = answers(runs[name])
    for row in metrics(runs[name]):
        some = log[log.step == row["step"]]
        kl, length = some.kl.map(sum), some.tokens.map(len)
        assert len(some) == cfg.rl.batch_size
        logged = {
            "objective/kl": kl.mean(),
            "objective/kl_per_token": kl.sum() / length.sum(),
            "objective/entropy": -some.logp.map(sum).mean(),
            "objective/scores": some.score.mean(),
            "objective/scores_std": some.score.std(ddof=0),
            "objective/scores_max": some.score.max(),
            "objective/eos_rate": some.finished.mean(),
            "val/num_eos_tokens": some.finished.sum(),
            "tokens/response_mean": length.mean(),
            "tokens/response_max": length.max(),
            "val/value_mean": np.concatenate(some.value.tolist()).mean(),
            "val/return_mean": np.concatenate(some["return"].tolist()).mean(),
            "val/return_std": np.concatenate(some["return"].tolist()).std(),
        }
        for key, value in logged.items():
            assert row[key] == pytest.approx(value, rel=1e-3, abs=2e-4), key
        advantages = np.concatenate(some.advantage.tolist())
        assert advantages.mean() == pytest.approx(
            0, abs=1e-4
        ) and advantages.var() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["plain", "reward_k3", "loss_k2", "penalties", "two_sources"])
def test_logged_rewards_are_score_minus_penalties_minus_kl(
    runs: dict[str, Path], name: str
) -> None:
    cfg = load_config(runs[name] / "config.yaml").rl
    for _, row in answers(runs[name]).iterrows():
        beta = cfg.kl.coef if cfg.kl.applied_to == KlAppliedTo.reward else 0.0
        estimate = {
            "k1": lambda d: d,
            "k2": lambda d: d**2 / 2,
            "k3": lambda d: math.exp(-d) - 1 + d,
        }[cfg.kl.estimator.name]
        parts = [
            row[f"score_{source}"] * settings.weight for source, settings in cfg.rewards.items()
        ]
        assert row.score == pytest.approx(sum(parts), abs=1e-4)
        assert row.prompt.startswith("\n\nHuman:") and row.prompt.endswith("Assistant:")
        score = (
            row.score
            - cfg.missing_eos_penalty * (not row.finished)
            - cfg.length_penalty * len(row.tokens)
        )
        score = (
            score if cfg.score_clip is None else max(-cfg.score_clip, min(cfg.score_clip, score))
        )
        assert row.score_used == pytest.approx(score, abs=1e-4)
        expected = [-beta * estimate(d) for d in row.kl]
        expected[-1] += score
        assert row.reward == pytest.approx(expected, abs=2e-4)
        to_come, advantage = (
            0.0,
            0.0,
        )  # advantages are logged whitened, but returns are advantage + value before that
        for t in reversed(range(len(row.tokens))):
            delta = (
                expected[t]
                + cfg.gamma * (row.value[t + 1] if t + 1 < len(row.tokens) else 0.0)
                - row.value[t]
            )
            advantage = delta + cfg.gamma * cfg.gae_lambda * advantage
            to_come = advantage + row.value[t]
            assert row["return"][t] == pytest.approx(to_come, abs=2e-3)


# ------------------------------------------------------------------------------------------ options


def test_kl_in_the_loss_is_not_in_the_reward(runs: dict[str, Path]) -> None:
    rows = metrics(runs["loss_k2"])
    assert all(row["objective/non_score_reward"] == 0 for row in rows)
    assert rows[1]["loss/kl_avg"] > 0  # at the second rollout the policy has moved
    assert "loss/kl_avg" not in metrics(runs["plain"])[0]
    for row in rows:
        assert row["loss/total_avg"] == pytest.approx(
            row["loss/policy_avg"] + row["loss/kl_avg"], abs=1e-6
        )


def test_the_coefficient_follows_its_controller(runs: dict[str, Path]) -> None:
    assert [row["objective/kl_coef"] for row in metrics(runs["plain"])] == [0.05, 0.05]
    assert [row["objective/kl_coef"] for row in metrics(runs["linear"])] == pytest.approx(
        [0.05, 0.03, 0.01]
    )
    rows = metrics(runs["adaptive"])
    beta = 0.05
    for row in rows:
        assert row["objective/kl_coef"] == pytest.approx(beta)
        beta *= 1 + max(-0.2, min(0.2, row["objective/kl"] / 0.5 - 1)) * 16 / 100
    assert rows[1]["objective/kl_coef"] == pytest.approx(
        0.05 * (1 - 0.2 * 0.16)
    )  # the first rollout has no KL


def test_the_entropy_bonus_is_part_of_the_loss_and_raises_entropy(runs: dict[str, Path]) -> None:
    row = metrics(runs["entropy"])[0]
    assert row["loss/entropy_avg"] == pytest.approx(-0.5 * row["policy/entropy_avg"], rel=0.02)
    assert (
        metrics(runs["entropy"])[-1]["policy/entropy_avg"]
        > metrics(runs["plain"])[-1]["policy/entropy_avg"]
    )


def test_while_the_critic_warms_up_the_policy_stays(runs: dict[str, Path]) -> None:
    first, second, third = metrics(runs["critic_warmup"])
    assert first["lr"] == 0 and "policy/grad_norm" not in first and first["val/grad_norm"] > 0
    assert second["objective/kl"] == pytest.approx(0, abs=1e-5) and second["policy/grad_norm"] > 0
    assert abs(third["objective/kl"]) > 1e-4
    peak = load_config(runs["critic_warmup"] / "config.yaml").rl.lr
    assert second["lr"] == pytest.approx(peak)  # its own warm-up begins with its first rollout


def test_a_pass_that_moves_too_far_is_the_last_one(runs: dict[str, Path]) -> None:
    assert [row["policy/epochs"] for row in metrics(runs["target_kl"])] == [1, 1]
    assert [row["policy/epochs"] for row in metrics(runs["plain"])] == [2, 2]


def test_ways_to_average_give_other_losses(runs: dict[str, Path]) -> None:
    losses = {
        name: metrics(runs[name])[0]["loss/value_avg"] for name in ("plain", "sequence", "constant")
    }
    row = metrics(runs["constant"])[0]
    # the same first rollout and the same errors: "constant" divides by 12 tokens, which not all
    # responses have
    assert losses["constant"] < losses["plain"] and losses["sequence"] != losses["plain"]
    assert losses["constant"] == pytest.approx(
        losses["plain"] * row["tokens/response_mean"] / 12, rel=0.05
    )


def test_an_average_and_the_best_policy_are_kept(runs: dict[str, Path]) -> None:
    run = runs["everything_kept"]
    start, end, average = weights(runs["sft"]), weights(run), weights(run, "model_ema")
    assert 0 < apart(average, end) < apart(start, end)  # behind the policy
    between = sum(float(((average[k] - start[k]) * (end[k] - start[k])).sum()) for k in start)
    assert between > 0
    rows = metrics(run)
    evaluated = [row["eval/gold"] for row in rows if "eval/gold" in row]
    assert (
        len(evaluated) == 2
    )  # after the first two of three rollouts; before and after all of them it is evaluated anyway
    assert {
        "eval/kl",
        "eval/length",
        "eval/eos_rate",
        "eval/repetition",
        "eval/objective",
        "eval/score",
    } <= set(rows[0])
    final = json.loads((run / "result.json").read_text())["metrics"]
    best = max([final["eval/gold_before"], *evaluated, final["eval/gold"]])
    kept = weights(run, "model_best")
    if best == final["eval/gold"]:
        assert apart(kept, end) == 0
    elif best == final["eval/gold_before"]:
        assert apart(kept, start) == 0
    else:
        assert apart(kept, end) > 0 and apart(kept, start) > 0
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {1, 2, 3}
    assert (
        not (runs["plain"] / "model_ema").exists() and not (runs["plain"] / "model_best").exists()
    )


def test_several_responses_to_a_prompt_differ(runs: dict[str, Path]) -> None:
    log = answers(runs["several_responses"])
    first = log[log.step == 1]
    assert len(first) == 32 and first.prompt.nunique() == 8
    for _, group in first.groupby("prompt", sort=False):
        assert len(group) == 4 and group.response.nunique() > 1
    assert metrics(runs["several_responses"])[-1]["episode"] == 64


def test_the_pretraining_loss_is_a_mean_over_tokens_times_its_weight(runs: dict[str, Path]) -> None:
    row = metrics(runs["ptx"])[0]
    sft_loss = metrics(runs["sft"])[-1][
        "loss"
    ]  # nats per token of the same demonstrations under nearly the same policy
    assert row["loss/ptx_avg"] == pytest.approx(0.2 * sft_loss, rel=0.2)
    assert row["loss/total_avg"] == pytest.approx(
        row["loss/policy_avg"] + row["loss/ptx_avg"], abs=1e-6
    )


def test_every_source_of_the_score_is_logged_by_its_name(runs: dict[str, Path]) -> None:
    log, rows = answers(runs["two_sources"]), metrics(runs["two_sources"])
    for row in rows:
        some = log[log.step == row["step"]]
        assert row["reward/model/mean"] == pytest.approx(some.score_model.mean(), abs=1e-4)
        assert row["reward/gold/std"] == pytest.approx(some.score_gold.std(ddof=0), abs=1e-4)
        assert row["objective/scores"] == pytest.approx(
            row["reward/model/mean"] + 0.5 * row["reward/gold/mean"], abs=1e-4
        )
    final = json.loads((runs["two_sources"] / "result.json").read_text())["metrics"]
    assert final["eval/score"] == pytest.approx(
        final["eval/score/model"] + 0.5 * final["eval/score/gold"], abs=1e-4
    )
    assert final["eval/score/gold"] == pytest.approx(final["eval/gold"], abs=1e-5)


def test_raw_scores_are_those_of_the_model_before_its_unit(runs: dict[str, Path]) -> None:
    unit = json.loads((runs["rm"] / "result.json").read_text())["metrics"]
    raw, normal = (metrics(runs[name])[0]["objective/scores"] for name in ("raw", "plain"))
    assert raw == pytest.approx(normal * unit["eval/score_std"] + unit["eval/score_mean"], abs=1e-4)


def test_answers_per_second_are_counted_answers_over_the_step_s_time(runs: dict[str, Path]) -> None:
    """DeepSpeed-Chat's samples per second divide a constant 2 by it, because of the precedence of
    operators."""
    for row in metrics(runs["several_responses"]):
        assert row["responses_per_second"] == pytest.approx(32 / row["timing_s/step"])
        assert row["timing_s/rollout"] + row["timing_s/update"] == pytest.approx(
            row["timing_s/step"]
        )


def test_actor_and_critic_have_schedules_of_their_own(runs: dict[str, Path]) -> None:
    cfg = load_config(runs["critic_optim"] / "config.yaml").rl
    rows = metrics(runs["critic_optim"])
    assert [row["lr_critic"] / cfg.critic.lr for row in rows] == pytest.approx([0.5, 1.0, 1.0])
    assert [row["lr"] / cfg.lr for row in rows] == pytest.approx([1.0, 0.55, 0.1])


# ----------------------------------------------------------------------------------- DeepSpeed-Chat


def test_dschat_is_greedy_masks_eos_and_says_so(runs: dict[str, Path]) -> None:
    log = answers(runs["dschat"])
    cfg: Any = load_config(runs["dschat"] / "config.yaml")
    assert cfg.rl.dschat == DsChat(greedy=True, pad_is_eos=True)
    first = log[log.step == 1]
    again = first.groupby("prompt").response.nunique()
    assert (again == 1).all()  # the same prompt, the same answer
    row = metrics(runs["dschat"])[0]
    # no dropout: before the first update policy, reference and sampler agree
    assert row["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert row["policy/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)


def test_a_sample_of_the_rollouts_is_logged_unless_all_are_asked_for(runs: dict[str, Path]) -> None:
    assert len(answers(runs["entropy"])) == 2 * 2 and len(answers(runs["plain"])) == 2 * 16

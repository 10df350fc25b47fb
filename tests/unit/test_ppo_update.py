"""The first update of PPO: its ratio is 1, it learns, and micro-batches do not change it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers
from rollouts import Engines, build
from torch import Tensor

from rlhf.config.choices import KlEstimator, Precision
from rlhf.config.schema import Config
from rlhf.data.batches import uniforms
from rlhf.models.loading import location
from rlhf.rl import experience as experience_module
from rlhf.rl.advantages import estimate_advantages, gae, token_rewards
from rlhf.rl.guards import Guards
from rlhf.rl.learner import Learner
from rlhf.rl.losses import kl_estimate
from rlhf.rl.update import step_critic_first, update_policy


def advantages_of(e: experience_module.Experience, cfg: Config) -> tuple[Tensor, Tensor]:
    rewards = token_rewards(
        e.scores[:, 0],
        cfg.rl.kl.coef * kl_estimate(e.old_logprobs, e.ref_logprobs, KlEstimator.k1),
        e.response_mask,
    )
    return gae(rewards, e.values, e.response_mask, cfg.rl.gamma, cfg.rl.gae_lambda)


def train_on(
    m: Engines, e: experience_module.Experience, advantages: Tensor, returns: Tensor, cfg: Config
) -> dict[str, float]:
    """The first of 100 rollouts, neither with a moving average nor with texts."""
    e.advantages, e.returns = advantages, returns
    learner = Learner(cfg, m.models, Guards(Precision.fp32, cfg.rl.dschat), rollouts=100)
    return update_policy(learner, e, cfg.rl.kl.coef, 0)


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with dropout in its configuration."""
    path = tmp_path_factory.mktemp("dropout") / "policy"
    shape = transformers.AutoConfig.from_pretrained(
        location("builtin:tiny"), dropout=0.1, attention_dropout=0.1
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    "rescore", [True, False]
)  # as in the first rollout of a run, and as in the others
def test_the_ratio_of_the_first_minibatch_is_1_even_with_dropout_in_the_configuration(
    cfg: Config, one_process: None, with_dropout: str, tmp_path: Path, rescore: bool
) -> None:
    m = build(cfg, tmp_path, with_dropout)
    m.actor.train(), m.critic.train()
    e = m.experience(
        [[5, 6, 7], [8], [300, 301, 302], [9, 9]],
        uniforms("rollout", range(4), 0, 0, 8),
        rescore=rescore,
    )
    assert torch.equal(e.old_logprobs, e.ref_logprobs if rescore else e.sampler_logprobs)
    assert torch.allclose(e.old_logprobs, e.ref_logprobs, atol=1e-5)
    advantages, returns = advantages_of(e, cfg)
    update = train_on(m, e, advantages, returns, cfg)
    assert update["policy/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)
    assert update["policy/ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert update["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-8)
    assert update["policy/clipfrac_avg"] == 0 and update["val/clipfrac_avg"] == 0
    tokens = float(e.response_mask.sum())
    assert (update["lr"], update["lr_critic"]) == (1e-3, 1e-3)
    assert update["loss/total_avg"] == pytest.approx(update["loss/policy_avg"], abs=1e-9)
    assert update["loss/policy_avg"] == pytest.approx(-float(advantages.sum()) / tokens, abs=1e-4)
    assert update["loss/value_avg"] == pytest.approx(
        0.5 * float(((e.values - returns) ** 2).sum()) / tokens, rel=1e-4
    )
    # and the step was one: now the policy is another, and the reference is not
    now = experience_module.policy_logprobs(m.actor, e, 1.0)
    assert (now - e.old_logprobs).abs().max() > 1e-4
    assert torch.allclose(
        experience_module.policy_logprobs(m.ref, e, 1.0), e.ref_logprobs, atol=1e-5
    )


def test_updates_make_good_tokens_likelier_and_values_better(
    cfg: Config, one_process: None, tmp_path: Path
) -> None:
    cfg = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, epochs=4, minibatches=2))
    m = build(cfg, tmp_path)
    e = m.experience([[5 + i, 6, 7] for i in range(8)], uniforms("rollout", range(8), 0, 0, 6))
    good = torch.tensor([1.0, -1.0] * 4)[:, None]
    returns = (e.values + 0.5) * e.response_mask
    update = train_on(m, e, good * e.response_mask, returns, cfg)
    moved = (experience_module.policy_logprobs(m.actor, e, 1.0) - e.old_logprobs).sum(1)
    assert (moved * good[:, 0] > 0).all()
    values = (
        experience_module.values_before(m.critic(e.ids, e.full_mask), 6).detach() * e.response_mask
    )
    assert float(((values - returns) ** 2).sum()) < float(((e.values - returns) ** 2).sum())
    assert (
        update["policy/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)
        and update["policy/approxkl_avg"] > 0
    )


def test_micro_batches_do_not_change_an_update(
    cfg: Config, one_process: None, tmp_path: Path
) -> None:
    # 12 tokens at most, so that few rows of full length are a small micro-batch
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, max_prompt_tokens=4),
        rollout=dataclasses.replace(cfg.rollout, max_new_tokens=8),
    )
    results, cuts = [], []
    for size in (1, 3, 16):
        cut = dataclasses.replace(cfg, deploy=dataclasses.replace(cfg.deploy, micro_batch=size))
        m = build(cut, tmp_path)
        e = m.experience(
            [[5, 6, 7], [8], [300, 301, 302, 303], [9, 9], [10]],
            uniforms("rollout", range(5), 0, 0, 8),
        )
        for mask in (e.response_mask, e.loss_mask):
            mask[1, 3:], mask[4, 1:] = 0, 0  # answers of several lengths
        advantages, returns = advantages_of(e, cut)
        rows: dict[str, list[int]] = {}
        for role, engine in (("actor", m.actor), ("critic", m.critic)):
            rows[role] = []
            engine.module.register_forward_pre_hook(
                lambda module, args, seen=rows[role]: seen.append(len(args[0]))
            )
        update = train_on(m, e, advantages, returns, cut)
        assert rows["actor"] == rows["critic"]
        cuts.append(rows["actor"])
        weights = [
            p.detach().clone() for engine in (m.actor, m.critic) for p in engine.module.parameters()
        ]
        results.append((update, weights))
    assert cuts == [[2, 1, 1, 1], [3, 2], [5]]
    for update, weights in results[1:]:
        assert update == pytest.approx(results[0][0], rel=1e-4, abs=1e-6)
        assert max(float((a - b).abs().max()) for a, b in zip(weights, results[0][1])) < 1e-5


@pytest.mark.parametrize("warmup", [0, 1])
def test_where_responses_are_used_once_the_critics_step_measures_the_values(
    cfg: Config, one_process: None, tmp_path: Path, warmup: int
) -> None:
    """The same values, metrics and weights as with a pass that only measures values.

    Micro-batches are small, one response has no score, and rewards are whitened. With and without
    the actor's step.
    """
    critic = dataclasses.replace(cfg.rl.critic, warmup_rollouts=warmup)
    cfg = dataclasses.replace(
        cfg,
        rl=dataclasses.replace(cfg.rl, whiten_rewards=True, critic=critic),
        data=dataclasses.replace(cfg.data, max_prompt_tokens=4),
        rollout=dataclasses.replace(cfg.rollout, max_new_tokens=8),
        deploy=dataclasses.replace(cfg.deploy, micro_batch=2),
    )
    results = []
    for critic_first in (False, True):
        m = build(cfg, tmp_path)
        learner = Learner(cfg, m.models, Guards(Precision.fp32, cfg.rl.dschat), rollouts=100)
        assert learner.steps_critic_first
        prompts = [[5, 6, 7], [8], [300, 301, 302, 303], [9, 9], [10]]
        e = m.experience(prompts, uniforms("rollout", range(5), 0, 0, 8))
        for mask in (e.response_mask, e.loss_mask):
            mask[1, 3:], mask[4, 1:] = 0, 0
        e.values *= e.response_mask
        e.scores[3], e.loss_mask[3] = torch.nan, 0
        rewards = token_rewards(e.scores[:, 0], torch.zeros_like(e.values), e.response_mask)
        done = None
        if critic_first:
            e.values = torch.zeros_like(e.values)
            done = step_critic_first(learner, e, rewards, 0.1, 0)
        e.advantages, returns = estimate_advantages(rewards, e, cfg.rl)
        assert returns is not None
        e.returns = returns
        metrics = update_policy(learner, e, 0.1, 0, done)
        weights = [p.detach() for one in (m.actor, m.critic) for p in one.module.parameters()]
        results.append((e.values, returns, metrics, weights))
    (values, returns, metrics, weights), first = results
    assert values.abs().sum() > 0 and torch.allclose(first[0], values, atol=1e-6)
    assert torch.allclose(first[1], returns, atol=1e-5)
    assert metrics["loss/value_avg"] > 0 and metrics["val/grad_norm"] > 0
    assert ("policy/grad_norm" in metrics) == (not warmup)
    assert first[2] == pytest.approx(metrics, rel=1e-4, abs=1e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(first[3], weights)) < 1e-5


@pytest.mark.parametrize("setting", [{"epochs": 2}, {"minibatches": 2}])
def test_where_responses_are_used_again_values_are_measured_before_the_update(
    cfg: Config, one_process: None, tmp_path: Path, setting: dict[str, int]
) -> None:
    cfg = dataclasses.replace(cfg, rl=dataclasses.replace(cfg.rl, **setting))
    m = build(cfg, tmp_path)
    learner = Learner(cfg, m.models, Guards(Precision.fp32, cfg.rl.dschat), rollouts=100)
    assert not learner.steps_critic_first

"""Rollouts with engines: what is sampled, scored and recorded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from helpers import rl_node
from rollouts import (
    ANSWERS,
    EOS,
    PAD,
    QUESTIONS,
    Engines,
    draws_for,
    next_probabilities,
    some_rollout,
)
from torch import Tensor

from rlhf.config.choices import KlEstimator, RolloutEngine
from rlhf.data import template
from rlhf.data.batches import pad_right, uniforms
from rlhf.data.records import Prompt, Turn
from rlhf.models.logprobs import token_logprobs
from rlhf.models.wrappers import last_token_score, model_inputs
from rlhf.rl import experience as experience_module
from rlhf.rl.advantages import token_rewards
from rlhf.rl.experience import Models, Prompts
from rlhf.rl.losses import kl_estimate, policy_loss, value_loss
from rlhf.rl.rewards import Rewards
from rlhf.sampling.token_choice import Sampling


def test_a_rollout_records_what_was_sampled_in_the_order_of_the_prompts(
    models_of_ppo: Engines,
) -> None:
    prompts, answers, draws = some_rollout(models_of_ppo)
    e = models_of_ppo.experience(prompts, draws)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        assert e.prompt_ids[i][e.prompt_mask[i] > 0].tolist() == prompt
        assert e.prompt_mask[i].tolist() == sorted(e.prompt_mask[i].tolist())  # padding in front
        assert e.response_ids[i][e.response_mask[i] > 0].tolist() == answer
        assert e.response_mask[i].tolist() == [1.0] * len(answer) + [0.0] * (
            draws.shape[1] - len(answer)
        )
    assert e.finished.tolist() == [1, 1, 1, 0]
    assert [e.text(i, models_of_ppo.tokenizer) for i in range(3)] == ANSWERS


def test_scores_values_and_log_probabilities_are_those_of_each_text_alone(
    models_of_ppo: Engines,
) -> None:
    m = models_of_ppo
    prompts, answers, draws = some_rollout(m)
    e = m.experience(prompts, draws)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        n = len(answer)
        whole = torch.tensor([prompt + answer])
        with torch.no_grad():
            score = (m.reward.module.hf(input_ids=whole).logits[0, 0] - 0.3) / 1.7
            values = (
                m.critic.module.hf.score(
                    m.critic.module.hf.model(input_ids=whole).last_hidden_state
                )[0, :, 0]
                - 0.3
            ) / 1.7
        if i < len(ANSWERS):  # what was scored is the dialogue as a user would write it down
            text = (
                template.render_prompt(m.tokenizer, [Turn("user", QUESTIONS[i])])
                + " "
                + ANSWERS[i]
                + m.tokenizer.eos_token
            )
            assert m.tokenizer(text, add_special_tokens=False).input_ids == prompt + answer
        assert e.scores[i].tolist() == pytest.approx([score.item()], abs=1e-5)
        assert e.values[i, :n].tolist() == pytest.approx(
            values[len(prompt) - 1 : -1].tolist(), abs=1e-5
        )
        logp = [
            math.log(next_probabilities(m.actor.module, prompt + answer[:k])[answer[k]])
            for k in range(n)
        ]
        assert e.old_logprobs[i, :n].tolist() == pytest.approx(logp, abs=1e-4)
        assert e.sampler_logprobs[i, :n].tolist() == pytest.approx(logp, abs=1e-4)
        for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values"):
            assert (getattr(e, name)[i, n:] == 0).all()


def test_a_reference_with_equal_weights_has_no_divergence_and_the_reward_is_the_score(
    models_of_ppo: Engines,
) -> None:
    prompts, answers, draws = some_rollout(models_of_ppo)
    e = models_of_ppo.experience(prompts, draws, rescore=True)
    assert (
        torch.equal(e.old_logprobs, e.ref_logprobs)
        and (e.old_logprobs[e.response_mask > 0] < 0).all()
    )
    assert torch.allclose(
        models_of_ppo.experience(prompts, draws).old_logprobs, e.ref_logprobs, atol=1e-5
    )  # those of the sampling loop
    for estimator in KlEstimator:
        rewards = token_rewards(
            e.scores[:, 0],
            0.1 * kl_estimate(e.old_logprobs, e.ref_logprobs, estimator),
            e.response_mask,
        )
        for i, answer in enumerate(answers):
            assert rewards[i].nonzero()[:, 0].tolist() == [len(answer) - 1]
            assert rewards[i, len(answer) - 1] == e.scores[i, 0]


@pytest.mark.parametrize("micro_batch", [1, 2, 64])
def test_every_answer_is_scored_with_its_own_prompt(
    models_of_ppo: Engines, micro_batch: int
) -> None:
    m = models_of_ppo
    prompts, answers, draws = some_rollout(m)
    asked = [Prompt([Turn("user", text)]) for text in QUESTIONS]
    calls: list[int] = []

    class Numbered(Rewards):
        """A response's score is the number of its question, and of its answer."""

        def __call__(self, part: experience_module.Experience, prompts: Sequence[Prompt]) -> Tensor:
            calls.append(len(prompts))
            assert len(part.response_mask) == len(prompts) <= micro_batch
            texts = [part.text(i, m.tokenizer) for i in range(len(prompts))]
            return torch.tensor(
                [
                    [QUESTIONS.index(prompt.turns[-1].text), (ANSWERS + texts).index(text)]
                    for prompt, text in zip(prompts, texts)
                ]
            ).float()

    e = experience_module.make_experience(
        Models(m.tokenizer, m.actor, rewards=Numbered([], m.tokenizer)),
        Prompts(asked, prompts, draws),
        Sampling(),
        micro_batch,
    )
    assert (
        e.scores[:, 0].tolist() == [0, 1, 2, 3]
        and e.scores[:3, 1].tolist() == [0, 1, 2]
        and sum(calls) == 4
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_rollout_does_not_depend_on_micro_batches_or_company(
    models_of_ppo: Engines, temperature: float
) -> None:
    prompts = [[5, 6, 7], [8], [300, 301, 302, 303, 304, 305, 306], [7, PAD, 7, 400], [9, 9]]
    draws = uniforms("rollout", range(5), 3, 0, 6)
    e = models_of_ppo.experience(prompts, draws, temperature, micro_batch=64)
    for size in (1, 2):
        other = models_of_ppo.experience(prompts, draws, temperature, micro_batch=size)
        for f in dataclasses.fields(experience_module.Experience):
            assert torch.allclose(getattr(other, f.name), getattr(e, f.name), atol=1e-5), f.name
    some = models_of_ppo.experience([prompts[3], prompts[0]], draws[[3, 0]], temperature)
    assert torch.equal(some.response_ids, e.response_ids[[3, 0]])
    assert some.scores[:, 0].tolist() == pytest.approx(e.scores[[3, 0], 0].tolist(), abs=1e-5)
    assert (
        e.prompt_ids[3][e.prompt_mask[3] > 0].tolist() == prompts[3]
    )  # the pad's id inside a prompt is a token
    loop = [
        math.log(
            next_probabilities(
                models_of_ppo.actor.module, prompts[0] + e.response_ids[0, :k].tolist(), temperature
            )[token]
        )
        for k, token in enumerate(e.response_ids[0].tolist())
    ]
    for stored in (
        e.old_logprobs,
        e.sampler_logprobs,
    ):  # the temperature is in the stored log-probabilities too
        assert stored[0].tolist() == pytest.approx(loop, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_transformers_loop_makes_the_same_experience(
    models_of_ppo: Engines, temperature: float
) -> None:
    m = models_of_ppo
    prompts, _, draws = some_rollout(m)
    asked = [Prompt([Turn("user", f"{i}")]) for i in range(len(prompts))]
    native, hf = (
        experience_module.make_experience(
            dataclasses.replace(m.models, engine=engine),
            Prompts(asked, prompts, draws),
            Sampling(temperature),
            3,
        )
        for engine in (RolloutEngine.native, RolloutEngine.hf)
    )
    for f in dataclasses.fields(experience_module.Experience):
        assert torch.allclose(getattr(native, f.name), getattr(hf, f.name), atol=1e-5), f.name


def test_what_has_no_engine_stays_zero(models_of_ppo: Engines) -> None:
    m = models_of_ppo
    asked, draws = (
        [Prompt([Turn("user", "a")]), Prompt([Turn("user", "b")])],
        uniforms("rollout", range(2), 0, 0, 3),
    )
    e = experience_module.make_experience(
        Models(m.tokenizer, m.actor), Prompts(asked, [[5, 6], [7]], draws), Sampling(), 2
    )
    assert (
        not e.ref_logprobs.any()
        and not e.values.any()
        and e.scores.shape == (2, 0)
        and e.old_logprobs.any()
    )


def test_eos_is_learnt_like_any_other_token_and_padding_is_not(models_of_ppo: Engines) -> None:
    prompts, answers, draws = some_rollout(models_of_ppo)
    e, policy = models_of_ppo.experience(prompts, draws), models_of_ppo.actor.module
    assert torch.equal(e.loss_mask, e.response_mask)
    width = e.response_mask.shape[1]
    learnt_from = policy(e.ids, e.full_mask, e.target_mask)[0][:, -width:]
    logits = policy.hf(**model_inputs(policy.hf, e.ids, e.full_mask)).logits[
        :, -width - 1 : -1
    ]  # the padded model, to look inside
    logits.retain_grad()
    gradients = []
    for logp in (learnt_from, token_logprobs(logits, e.response_ids)[0]):
        policy.zero_grad()
        policy_loss(
            logp,
            e.old_logprobs,
            torch.ones_like(logp),
            e.loss_mask,
            rl_node(clip_low=0.2, clip_high=0.2),
        )[0].sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters()})
    largest = max(float(g.norm()) for g in gradients[1].values())
    for name, gradient in gradients[
        1
    ].items():  # that of a key's bias is rounding only, hence the second part
        assert (
            float((gradients[0][name] - gradient).norm())
            < 1e-4 * float(gradient.norm()) + 1e-6 * largest
        ), name
    for i, answer in enumerate(answers[:3]):
        n = len(answer)
        assert e.response_ids[i, n - 1] == EOS and e.response_mask[i, n - 1] == 1
        assert logits.grad[i, n - 1, EOS] < 0  # with a positive advantage EOS shall become likelier
        assert (logits.grad[i, :n].abs().sum(-1) > 0).all() and (logits.grad[i, n:] == 0).all()
    models_of_ppo.actor.module.zero_grad()
    values = torch.zeros_like(e.response_mask, requires_grad=True)
    value_loss(values, e.values, torch.ones_like(values), e.loss_mask, 100.0)[0].sum().backward()
    assert torch.equal(values.grad != 0, e.response_mask > 0)


def test_masks_guessed_from_ids_hide_every_eos_but_the_answers_end_where_they_did(
    models_of_ppo: Engines,
) -> None:
    """DeepSpeed-Chat's masks, for comparison.

    EOS is sampled, seen and part of the response. It is not learnt, and not read in a prompt.
    """
    prompts, answers, draws = some_rollout(models_of_ppo)
    prompts[1] = [*prompts[1][:2], EOS, *prompts[1][2:]]  # between two turns, say
    draws[1] = torch.tensor(
        draws_for(models_of_ppo.actor.module, prompts[1], answers[1], draws.shape[1])
    )
    plain = models_of_ppo.experience(prompts, draws)
    guessed = models_of_ppo.experience(prompts, draws, pad_is_eos=True)
    for name in ("prompt_ids", "response_ids", "response_mask", "finished", "sampler_logprobs"):
        assert torch.equal(getattr(guessed, name), getattr(plain, name)), name
    assert torch.equal(guessed.loss_mask, plain.response_mask * (plain.response_ids != EOS))
    assert torch.equal(guessed.prompt_mask, plain.prompt_mask * (plain.prompt_ids != EOS))
    assert (guessed.loss_mask.sum(1) == plain.response_mask.sum(1) - plain.finished).all()
    assert torch.allclose(guessed.old_logprobs[[0, 2, 3]], plain.old_logprobs[[0, 2, 3]], atol=1e-5)
    assert (guessed.old_logprobs[1] - plain.old_logprobs[1]).abs().max() > 1e-3


def test_padding_on_the_right_serves_the_reward_model_as_well(models_of_ppo: Engines) -> None:
    """The reward stage pads on the right, the rollout on the left: the scores are the same."""
    m = models_of_ppo
    prompts, answers, draws = some_rollout(m)
    e = m.experience(prompts, draws)
    ids, mask = pad_right([prompt + answer for prompt, answer in zip(prompts, answers)], PAD)
    with torch.no_grad():
        scores = last_token_score(m.reward(ids, mask), mask)
    assert scores.tolist() == pytest.approx(e.scores[:, 0].tolist(), abs=1e-5)

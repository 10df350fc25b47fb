"""Sampling, and the experience made of it, with real models and DeepSpeed engines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_config import composed

from rlhf import comm, engines, worker
from rlhf.config import Precision
from rlhf.data.batches import pad_left, pad_right, uniforms
from rlhf.models import last_token_score, load_policy, load_scorer, load_tokenizer
from rlhf.objectives import policy_loss, token_logp
from rlhf.rollout import Experience, make_experience, response_logp, sample, values_before

CPU = torch.device("cpu")
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def policy(tokenizer: Any) -> Any:
    """Random weights whose answers end at different times, because EOS is made likelier."""
    torch.manual_seed(0)
    policy = load_policy("builtin:tiny", tokenizer, Precision.fp32).eval()
    with torch.no_grad():  # the head is tied to the embeddings: EOS points to where the model often is
        hidden = policy.hf.base_model(input_ids=torch.tensor([PROMPTS[1]])).last_hidden_state.mean((0, 1))
        policy.hf.get_input_embeddings().weight[tokenizer.eos_token_id] = 5 * hidden / hidden.square().sum()
    return policy


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of one, as a worker has it."""
    before = dict(os.environ)
    worker.prepare_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"
    engines.init_distributed()
    yield
    torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def draw(policy: Any, tokenizer: Any, prompts: list[list[int]], draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = pad_left(prompts, tokenizer.pad_token_id, CPU)
    return sample(policy.hf, ids, mask, draws, tokenizer.eos_token_id, 1.0)


def test_a_sample_does_not_depend_on_its_batch(policy: Any, tokenizer: Any) -> None:
    draws = uniforms("test", range(4), 0, 0, 40)
    ids, mask = draw(policy, tokenizer, PROMPTS, draws)
    for i, prompt in enumerate(PROMPTS):
        alone, alone_mask = draw(policy, tokenizer, [prompt], draws[i : i + 1])
        assert torch.equal(ids[i][mask[i] > 0], alone[0][alone_mask[0] > 0])
    other, _ = draw(policy, tokenizer, PROMPTS, uniforms("test", range(4), 0, 1, 40))
    assert not torch.equal(ids, other), "other random numbers give other answers: rollouts are not greedy"


def test_the_mask_ends_with_the_first_eos(policy: Any, tokenizer: Any) -> None:
    ids, mask = draw(policy, tokenizer, PROMPTS * 16, uniforms("test", range(64), 1, 0, 30))
    lengths = set()
    for row, m in zip(ids.tolist(), mask.tolist()):
        n = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        assert m == [1.0] * n + [0.0] * (len(row) - n)
        lengths.add(n)
    assert len(lengths) > 3, "rows end at different times"


def test_the_first_token_follows_the_softmax(policy: Any, tokenizer: Any) -> None:
    n = 4000
    ids, _ = draw(policy, tokenizer, [PROMPTS[0]] * n, uniforms("test", range(n), 2, 0, 1))
    inputs, mask = pad_right([PROMPTS[0]], 0, CPU)
    expected = policy.hf(input_ids=inputs, attention_mask=mask).logits[0, -1].softmax(-1)
    observed = torch.bincount(ids[:, 0], minlength=len(expected)) / n
    deviation = (observed - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1 / n)
    assert deviation.max() < 6


def test_log_probabilities_agree_with_a_loop_without_padding_or_cache(policy: Any, tokenizer: Any) -> None:
    ids, mask = draw(policy, tokenizer, PROMPTS, uniforms("test", range(4), 3, 0, 12))
    prompts, prompt_mask = pad_left(PROMPTS, tokenizer.pad_token_id, CPU)
    zeros = torch.zeros_like(mask)
    experience = Experience(prompts, prompt_mask, ids, mask, zeros, zeros, zeros, zeros[:, 0], zeros[:, 0])
    for temperature in (1.0, 0.7):
        batch = response_logp(policy, experience, temperature)
        for i, prompt in enumerate(PROMPTS):
            answer = ids[i][mask[i] > 0].tolist()
            for t, token in enumerate(answer):
                logits = policy.hf(input_ids=torch.tensor([prompt + answer[:t]])).logits[0, -1] / temperature
                assert float(batch[i, t]) == pytest.approx(float(logits.detach().log_softmax(-1)[token]), abs=1e-4)


def test_values_are_those_before_each_token() -> None:
    scores = torch.arange(6.0)[None]  # prompt of 3 tokens, answer of 3: its first token is chosen at the prompt's last one
    assert values_before(scores, 3).tolist() == [[2.0, 3.0, 4.0]]


def test_experience(group: None, policy: Any, tokenizer: Any, tmp_path: Path) -> None:
    cfg = composed("stage=ppo")
    torch.manual_seed(1)
    scorer = load_scorer("builtin:tiny", tokenizer, Precision.fp32)
    scorer.hf.config.score_mean, scorer.hf.config.score_std = 0.5, 2.0
    actor = engines.build_engine(policy, cfg, "actor", tmp_path)
    reward = engines.build_engine(scorer, cfg, "reward", tmp_path)
    draws = uniforms("test", range(4), 4, 0, 40)
    e = make_experience(PROMPTS, draws, 1.0, 3, tokenizer, actor, ref=actor, reward=reward, critic=reward)
    assert torch.equal(e.old_logp, e.ref_logp) and (e.old_logp.sum(1) < 0).all()
    for i, prompt in enumerate(PROMPTS):
        answer = e.response_ids[i][e.mask[i] > 0].tolist()
        assert e.prompt_ids[i][e.prompt_mask[i] > 0].tolist() == prompt, "rows come back in the order of the prompts"
        ids, mask = pad_right([prompt + answer], 0, CPU)
        scores = scorer(ids, mask)
        assert float(e.score[i]) == pytest.approx(float(last_token_score(scores, mask)), abs=1e-4)
        assert e.old_values[i, : len(answer)].tolist() == pytest.approx(scores[0, len(prompt) - 1 : -1].tolist(), abs=1e-4)
        assert bool(e.ended[i]) == (answer[-1] == tokenizer.eos_token_id)
    short = e.rows([2])
    assert short.prompt_ids.tolist() == [PROMPTS[2]] and short.mask.shape[1] == int(e.mask[2].sum())

    # the update of the first minibatch: ratio 1, and EOS is learnt from
    logits = actor.module(e.ids, e.full_mask, e.mask.shape[1])
    logits.retain_grad()
    logp, _ = token_logp(logits, e.response_ids)
    loss, sums = policy_loss(logp, e.old_logp, torch.ones_like(e.mask), e.mask, 0.2)
    assert float(sums["ratio"]) == pytest.approx(float(e.mask.sum()), rel=1e-5)
    loss.backward()
    ended = e.ended.nonzero()[:, 0]
    assert len(ended) > 0
    for i in ended.tolist():
        assert logits.grad[i, int(e.mask[i].sum()) - 1].abs().max() > 0
    assert (logits.grad.abs().amax(-1)[e.mask == 0] == 0).all()


def test_one_process_needs_no_communication() -> None:
    assert comm.world_size() == 1 and comm.all_sum([1.5], CPU) == [1.5] and comm.all_max(2.0, CPU) == 2.0

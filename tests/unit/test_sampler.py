"""The sampler: tokens and their log-probabilities, against a slow loop without batch and cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from helpers import some
from rollouts import EOS, FEW, PAD, draws_for, experience_of, next_probabilities
from torch import Tensor

from rlhf.data.batches import pad_left, uniforms
from rlhf.models.wrappers import Policy
from rlhf.rl import experience as experience_module
from rlhf.sampling import sampler
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.token_choice import Sampling, choose_token

SHAPE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "max_position_embeddings": 64,
    "vocab_size": FEW,
}
PROMPTS = [
    [5, 6, 7],
    [8],
    [3, 4, 5, 9, 10, 11, 3],
    [7, PAD, 7, 4],
]  # of several lengths; one has a real token with the pad's id


@pytest.fixture(scope="module", params=["opt", "llama", "bloom"])
def small(request: pytest.FixtureRequest) -> Policy:
    """A random model of few tokens whose probabilities are far from uniform.

    It has absolute positions, rotary positions or ALiBi. With ALiBi it is always padded.
    """
    shapes = {
        "opt": lambda: transformers.OPTConfig(
            **SHAPE, word_embed_proj_dim=32, ffn_dim=64, init_std=0.35
        ),
        "llama": lambda: transformers.LlamaConfig(
            **SHAPE, intermediate_size=64, num_key_value_heads=1, initializer_range=0.35
        ),
        "bloom": lambda: transformers.BloomConfig(
            vocab_size=FEW, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.35
        ),
    }
    torch.manual_seed(0)
    policy = Policy(transformers.AutoModelForCausalLM.from_config(shapes[request.param]())).eval()
    assert policy.supports_packing() == (request.param != "bloom")
    return policy


def sample_slowly(
    policy: Policy, prompt: Sequence[int], draws: Sequence[float], temperature: float = 1.0
) -> tuple[list[int], list[float]]:
    """Tokens up to and including EOS, and their log-probabilities."""
    ids, logp = list(prompt), []
    for u in draws:
        below = 0.0
        for token, p in enumerate(next_probabilities(policy, ids, temperature).tolist()):  # noqa: B007
            below += p
            if u < below:
                break
        ids.append(token)
        logp.append(math.log(p))
        if token == EOS:
            break
    return ids[len(prompt) :], logp


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    temperature: float = 1.0,
    **choice: Any,
) -> SampledResponses:
    batch = PromptBatch(*pad_left(prompts, PAD))
    return sampler.sample(policy, batch, draws, EOS, Sampling(temperature, **choice))


# ------------------------------------------------------------------------------------------- sample


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_and_their_log_probabilities_equal_a_loop_without_batch_and_cache(
    small: Policy, temperature: float
) -> None:
    prompts = PROMPTS * 6
    draws = uniforms("test", range(len(prompts)), 0, 0, 10)
    response, mask, sampled_logp = sample(small, prompts, draws, temperature)
    experience = experience_of(prompts, response, mask)
    logp = experience_module.policy_logprobs(small, experience, temperature)
    lengths = set()
    for i, prompt in enumerate(prompts):
        tokens, expected = sample_slowly(small, prompt, draws[i].tolist(), temperature)
        n = len(tokens)
        lengths.add(n)
        assert response[i].tolist() == tokens + [EOS] * (
            10 - n
        )  # what stands behind the end is EOS ...
        assert mask[i].tolist() == [1.0] * n + [0.0] * (
            10 - n
        )  # ... and masked; the EOS that was sampled is not
        for found in (sampled_logp, logp):  # as the loop saw them, and as the training forward does
            assert found[i].tolist() == pytest.approx(expected + [0.0] * (10 - n), abs=1e-5)
    assert len(lengths) >= 4  # rows that end at different times are what this is about


def test_a_sample_does_not_depend_on_its_company(small: Policy) -> None:
    draws = uniforms("test", range(4), 0, 1, 8)
    together, mask, logp = sample(small, PROMPTS, draws)
    for i, prompt in enumerate(PROMPTS):
        alone, alone_mask, alone_logp = sample(small, [prompt], draws[i : i + 1])
        assert torch.equal(alone[0], together[i]) and torch.equal(alone_mask[0], mask[i])
        assert torch.allclose(alone_logp[0], logp[i], atol=1e-5)
    order = [2, 0, 3, 1]
    shuffled, *_ = sample(small, [PROMPTS[i] for i in order], draws[order])
    assert torch.equal(shuffled, together[order])


def test_answers_end_where_eos_is_drawn_and_nowhere_else(small: Policy) -> None:
    wanted = [
        [EOS],
        [5, 6, EOS],
        [7, 7, 7, 7, 7],
        [4, 5, 6, 7, EOS],
        [3, PAD, EOS],
    ]  # a pad token that was sampled is a token
    draws = torch.tensor([draws_for(small, [3, 4], tokens, 5) for tokens in wanted])
    response, mask, _ = sample(small, [[3, 4]] * 5, draws)
    assert response.tolist() == [tokens + [EOS] * (5 - len(tokens)) for tokens in wanted]
    assert mask.tolist() == [[1.0] * len(tokens) + [0.0] * (5 - len(tokens)) for tokens in wanted]
    assert experience_of([[3, 4]] * 5, response, mask).finished.tolist() == [1, 1, 0, 1, 1]


def test_finished_rows_cost_no_more_forwards(small: Policy) -> None:
    wanted = [[EOS], [5, 6, EOS], [7, 8, EOS], [4, 5, 6, EOS]]
    draws = torch.tensor([draws_for(small, [3, 4], tokens, 9) for tokens in wanted])
    rows: list[int] = []  # whose next token is computed
    hook = small.hf.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0]))
    )
    sample(small, [[3, 4]] * 4, draws)
    hook.remove()
    assert rows == [4, 3, 3, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_first_token_follows_the_softmax_at_its_temperature(
    small: Policy, temperature: float
) -> None:
    n = 4000
    p = next_probabilities(small, PROMPTS[0], temperature)
    grid = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    counts = torch.bincount(
        sample(small, [PROMPTS[0]] * n, grid, temperature)[0][:, 0], minlength=FEW
    )
    assert (
        counts - n * p
    ).abs().max() <= 1.01  # evenly spread numbers: every token has its share, to one
    counts = torch.bincount(
        sample(small, [PROMPTS[0]] * n, uniforms("test", range(n), 0, 2, 1), temperature)[0][:, 0],
        minlength=FEW,
    )
    expected = n * p
    big = expected > 5
    chi_square = float(((counts - expected)[big] ** 2 / expected[big]).sum())
    assert chi_square < 31.3  # 11 degrees of freedom, p = 0.001


def test_later_tokens_follow_their_own_distribution(small: Policy) -> None:
    n = 4000
    response, mask, _ = sample(small, [PROMPTS[0]] * n, uniforms("test", range(n), 0, 3, 2))
    first = int(torch.bincount(response[:, 0][response[:, 0] != EOS]).argmax())
    seconds = response[response[:, 0] == first, 1]
    expected = len(seconds) * next_probabilities(small, [*PROMPTS[0], first])
    big = expected > 5
    counts = torch.bincount(seconds, minlength=FEW)
    assert float(((counts - expected)[big] ** 2 / expected[big]).sum()) < 31.3
    assert (mask[response[:, 0] == EOS, 1] == 0).all()


def test_a_low_temperature_takes_the_likeliest_token(small: Policy) -> None:
    response, mask, _ = sample(
        small, PROMPTS, uniforms("test", range(4), 0, 4, 6), temperature=1e-4
    )
    for i, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for token, m in zip(response[i].tolist(), mask[i].tolist()):
            if m:
                assert token == int(next_probabilities(small, ids).argmax())
            ids.append(token)


def test_the_smallest_and_the_largest_draw_take_the_first_and_the_last_token(small: Policy) -> None:
    edge = torch.tensor([[0.0], [1.0 - 2**-53]], dtype=torch.float64)
    assert sample(small, [PROMPTS[0]] * 2, edge)[0].tolist() == [[0], [FEW - 1]]


def test_other_draws_give_other_answers(small: Policy) -> None:
    def answers(seed: int, step: int, keys: Sequence[int]) -> list[list[int]]:
        return sample(small, PROMPTS, uniforms("rollout", keys, seed, step, 12))[0].tolist()

    first = answers(0, 0, range(4))
    assert first == answers(0, 0, range(4))
    assert first not in (
        answers(1, 0, range(4)),
        answers(0, 1, range(4)),
        answers(0, 0, range(4, 8)),
    )


# --------------------------------------------------------------------- a choice among the likeliest


CHOICES: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": FEW + 5},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 0.95},
    {"top_p": 0.8, "top_k": 3},
    {"top_p": 0.3, "top_k": 5},
    {"greedy": True},
    {"greedy": True, "top_p": 0.9, "top_k": 4},
]


def allowed(
    p: Sequence[float], top_p: float = 1.0, top_k: int = 0, greedy: bool = False
) -> set[int]:
    """The tokens that may be chosen.

    They follow one another from the likeliest, while those before have less than top_p.
    """
    kept: list[int] = []
    for token in sorted(range(len(p)), key=lambda i: -p[i]):  # of equals the first
        full = len(kept) == (1 if greedy else top_k or len(p)) or (
            top_p < 1 and sum(p[i] for i in kept) >= top_p
        )
        kept += [] if full else [token]
    return set(kept)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_likeliest_are_chosen_as_often_as_their_share_of_what_may_be_chosen(
    choice: dict[str, Any],
) -> None:
    n = 2000
    rows = (
        3 * torch.randn(5, FEW, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).softmax(-1)
    draws = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[
        :, None
    ]  # evenly spread: every token has its share, to one
    for p in rows:
        kept = allowed(p.tolist(), **choice)
        counts = torch.bincount(
            choose_token(p.repeat(n, 1), draws, Sampling(**choice))[:, 0], minlength=FEW
        )
        share = torch.tensor(
            [float(p[i]) if i in kept else 0.0 for i in range(FEW)], dtype=torch.float64
        )
        assert set(counts.nonzero()[:, 0].tolist()) <= kept
        assert (counts - n * share / share.sum()).abs().max() <= 1.01
        edge = torch.tensor([[0.0], [1.0 - 2**-53]], dtype=torch.float64)
        assert choose_token(p.repeat(2, 1), edge, Sampling(**choice))[:, 0].tolist() == [
            min(kept),
            max(kept),
        ]
    together = choose_token(rows, draws[[3, 400, 900, 1400, 1999]], Sampling(**choice))
    alone = [
        choose_token(row[None], draws[[i]], Sampling(**choice))
        for row, i in zip(rows, (3, 400, 900, 1400, 1999))
    ]
    assert torch.equal(together, torch.cat(alone))


def test_the_token_that_reaches_top_p_may_be_chosen_and_of_equals_the_first() -> None:
    p = torch.tensor([[0.125, 0.25, 0.5, 0.125]], dtype=torch.float64)
    draws = torch.linspace(0, 0.999, 50, dtype=torch.float64)[:, None]

    def chosen(**choice: Any) -> set[int]:
        return set(choose_token(p.repeat(50, 1), draws, Sampling(**choice))[:, 0].tolist())

    assert chosen(top_p=0.5) == {2} and chosen(top_p=0.51) == chosen(top_p=0.75) == {1, 2}
    assert chosen(top_p=0.76) == chosen(top_k=3) == chosen(top_p=0.875) == {0, 1, 2} and chosen(
        top_p=0.88
    ) == {0, 1, 2, 3}
    assert chosen(top_k=4) == chosen(top_k=9) == chosen(top_k=0) == {0, 1, 2, 3}


@pytest.mark.parametrize("choice", some(CHOICES, every=5), ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_log_probabilities_stay_those_of_the_full_distribution(
    small: Policy, temperature: float, choice: dict[str, Any]
) -> None:
    """PPO learns from the policy's own probabilities.

    Tokens that an evaluation leaves out do not make the others likelier.
    """
    prompts = PROMPTS * 3
    response, mask, logp = sample(
        small, prompts, uniforms("test", range(len(prompts)), 0, 5, 6), temperature, **choice
    )
    for i, prompt in enumerate(prompts):
        for t in range(int(mask[i].sum())):
            p = next_probabilities(small, [*prompt, *response[i, :t].tolist()], temperature)
            token = int(response[i, t])
            assert token in allowed(p.tolist(), **choice)
            assert float(logp[i, t]) == pytest.approx(math.log(p[token]), abs=1e-5)


def test_greedy_answers_do_not_depend_on_the_draws(small: Policy) -> None:
    one, two = (
        sample(small, PROMPTS, uniforms("test", range(4), 0, step, 6), greedy=True)
        for step in (0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two))

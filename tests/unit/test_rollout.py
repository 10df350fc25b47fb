"""Sampling and its records, against slow and plain versions; and the first update of PPO."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import composed, rl_node
from torch import Tensor

from rlhf.config.choices import KlEstimator, Precision, RolloutEngine
from rlhf.config.schema import Config
from rlhf.data import template
from rlhf.data.batches import pad_left, pad_right, uniforms
from rlhf.data.records import Dataset, Turn
from rlhf.distributed.engine import build_engine
from rlhf.evaluation.policy import evaluate_policy
from rlhf.models.loading import load_policy, load_scorer, load_tokenizer, location
from rlhf.models.logprobs import token_logprobs
from rlhf.models.wrappers import Policy, last_token_score, model_inputs
from rlhf.rl import experience as experience_module
from rlhf.rl.advantages import gae, token_rewards
from rlhf.rl.experience import Models, Prompts
from rlhf.rl.guards import Guards
from rlhf.rl.losses import kl_estimate, policy_loss, value_loss
from rlhf.rl.metrics import Scored, rollout_metrics
from rlhf.rl.rewards import Rewards, Source
from rlhf.rl.update import Learner, update_policy
from rlhf.sampling import sampler
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.token_choice import Sampling, choose_token

CPU = torch.device("cpu")
PAD, EOS = 0, 2
FEW = 12  # tokens of the small vocabulary, so that EOS is drawn often
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
QUESTIONS = [
    "My cat looks sad. What now?",
    "Hi",
    "Is it hard to look after the oven? Keep it short. No small talk.",
    "a b",
]
ANSWERS = [
    "Happy to help! First, fill the bowl.",
    "It needs a little care.",
    "Work it out yourself. Then, wash it cold. Finally, fold it flat.",
]


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


@torch.no_grad()
def next_probabilities(policy: Policy, ids: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Distribution of the token after `ids`: the model itself, no batch, no padding, no cache."""
    return (
        policy.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1].double()
        / temperature
    ).softmax(-1)


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


def draws_for(
    policy: Policy,
    prompt: Sequence[int],
    tokens: Sequence[int],
    width: int,
    temperature: float = 1.0,
) -> list[float]:
    """Random numbers with which exactly `tokens` are sampled; behind them any number will do."""
    ids, draws = list(prompt), []
    for token in tokens:
        p = next_probabilities(policy, ids, temperature)
        draws.append(float(p[:token].sum() + 0.5 * p[token]))
        ids.append(token)
    return draws + [0.7] * (width - len(tokens))


def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    temperature: float = 1.0,
    **choice: Any,
) -> SampledResponses:
    batch = PromptBatch(*pad_left(prompts, PAD, CPU))
    return sampler.sample(policy, batch, draws, EOS, Sampling(temperature, **choice))


def experience_of(
    prompts: Sequence[Sequence[int]], response: Tensor, mask: Tensor
) -> experience_module.Experience:
    zeros = torch.zeros_like(mask)
    prompt_ids, prompt_mask = pad_left(prompts, PAD, CPU)
    return experience_module.Experience(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response,
        response_mask=mask,
        loss_mask=mask,
        sampler_logprobs=zeros,
        old_logprobs=zeros,
        ref_logprobs=zeros,
        values=zeros,
        scores=zeros[:, :1],
        finished=((response == EOS) * mask).amax(1),
    )


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


@pytest.mark.parametrize("choice", CHOICES, ids=str)
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


# --------------------------------------------------------------------------------------- experience


def test_the_value_before_a_token_is_the_score_one_place_earlier() -> None:
    scores = torch.arange(12.0).reshape(2, 6)  # 4 prompt tokens, 2 response tokens
    assert experience_module.values_before(scores, 2).tolist() == [[3.0, 4.0], [9.0, 10.0]]


def test_the_value_before_a_token_does_not_know_the_token() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    torch.manual_seed(0)
    critic = load_scorer("builtin:tiny", tokenizer, Precision.fp32)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    changed = ids.clone()
    changed[0, 4] = 300  # the second of three response tokens
    one, other = (
        experience_module.values_before(critic(x, torch.ones_like(x)), 3)[0] for x in (ids, changed)
    )
    assert torch.equal(one[:2], other[:2]) and one[2] != other[2]


def random_experience(generator: torch.Generator) -> experience_module.Experience:
    prompts, lengths = [[3] * n for n in (2, 5, 1)], torch.tensor([3, 1, 2])
    mask = (torch.arange(4) < lengths[:, None]).float()
    e = experience_of(prompts, torch.randint(3, FEW, (3, 4), generator=generator), mask)
    for name in ("sampler_logprobs", "old_logprobs", "ref_logprobs", "values"):
        setattr(e, name, torch.randn(3, 4, generator=generator) * mask)
    e.scores, e.finished = torch.randn(3, 2, generator=generator), torch.tensor([1.0, 0.0, 1.0])
    e.loss_mask = mask * torch.tensor(
        [1.0, 1.0, 0.0, 1.0]
    )  # not the mask, so that the two are told apart
    return e


def test_picking_rows_trims_their_padding_and_keeps_their_content() -> None:
    e = random_experience(torch.Generator().manual_seed(0))
    picked = e.rows([2, 0])
    assert picked.prompt_ids.shape == (2, 2) and picked.response_ids.shape == (2, 3)
    assert picked.ids.shape == picked.full_mask.shape == (2, 5)
    for new, old in enumerate([2, 0]):
        assert (
            picked.prompt_ids[new][picked.prompt_mask[new] > 0].tolist()
            == e.prompt_ids[old][e.prompt_mask[old] > 0].tolist()
        )
        for name in (
            "response_ids",
            "loss_mask",
            "sampler_logprobs",
            "old_logprobs",
            "ref_logprobs",
            "values",
        ):
            before, after = getattr(e, name)[old], getattr(picked, name)[new]
            assert torch.equal(
                after[picked.response_mask[new] > 0], before[e.response_mask[old] > 0]
            )
        assert (
            torch.equal(picked.scores[new], e.scores[old])
            and picked.finished[new] == e.finished[old]
        )
    again = e.rows(
        [0, 1, 2]
    )  # nothing is lost when nothing can be trimmed but the last column, which no row uses
    assert torch.equal(again.response_mask, e.response_mask[:, :3]) and torch.equal(
        again.prompt_ids, e.prompt_ids
    )
    assert e.response_ids.shape == (3, 4)  # the whole is left as it was


def test_rows_without_an_answer_keep_one_column() -> None:
    e = random_experience(torch.Generator().manual_seed(0))
    e.response_mask = torch.zeros_like(e.response_mask)
    assert e.rows([0, 1]).response_mask.shape == (2, 1)


def test_rollout_metrics_equal_loops_and_do_not_see_padding() -> None:
    e = random_experience(torch.Generator().manual_seed(1))
    returns, penalty = (
        torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) * e.response_mask
        for seed in (2, 3)
    )
    raw_score, beta = e.scores[:, 0], 0.05
    score = raw_score - 1.0 * (1 - e.finished)
    e.returns = returns
    scored = Scored(raw_score, score, penalty, torch.zeros_like(penalty))
    found = rollout_metrics(e, scored, beta)
    tokens = [(i, j) for i in range(3) for j in range(4) if e.response_mask[i, j]]
    kl = [
        sum(
            float(e.old_logprobs[i, j] - e.ref_logprobs[i, j])
            for j in range(4)
            if e.response_mask[i, j]
        )
        for i in range(3)
    ]
    k3 = [
        sum(
            math.exp(d) - 1 - d
            for j in range(4)
            if e.response_mask[i, j]
            for d in [float(e.ref_logprobs[i, j] - e.old_logprobs[i, j])]
        )
        for i in range(3)
    ]
    expected = {
        "objective/kl": sum(kl) / 3,
        "objective/kl_per_token": sum(kl) / 6,
        "objective/kl_k3": sum(k3) / 3,
        "objective/kl_coef": beta,
        "objective/entropy": -sum(float(e.old_logprobs[i].sum()) for i in range(3)) / 3,
        "objective/non_score_reward": -sum(float(penalty[i, j]) for i, j in tokens) / 3,
        "objective/rlhf_reward": sum(float(s) for s in score) / 3 - beta * sum(kl) / 3,
        "objective/scores": sum(raw_score.tolist()) / 3,
        "objective/scores_std": statistics.pstdev(raw_score.tolist()),
        "objective/scores_min": min(raw_score.tolist()),
        "objective/scores_max": max(raw_score.tolist()),
        "objective/eos_rate": 2 / 3,
        "val/num_eos_tokens": 2,
        "val/sampler_logp_diff": sum(
            abs(float(e.sampler_logprobs[i, j] - e.old_logprobs[i, j])) for i, j in tokens
        )
        / 6,
        "val/value_mean": float(e.values.sum()) / 6,
        "val/return_mean": float(returns.sum()) / 6,
        "val/return_std": statistics.pstdev(float(returns[i, j]) for i, j in tokens),
        "tokens/response_mean": 2,
        "tokens/response_max": 3,
        "tokens/truncated_frac": 1 / 3,
        "tokens/prompt_mean": 8 / 3,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert set(found) - set(expected) == {"val/explained_variance"}
    fills = {
        "response_ids": EOS,
        "response_mask": 0.0,
        "loss_mask": 0.0,
        "old_logprobs": 9.0,
        "ref_logprobs": -9.0,
        "values": 50.0,
        "sampler_logprobs": 3.0,
        "returns": 7.0,
    }
    wide = {
        name: torch.cat([getattr(e, name), torch.full((3, 5), fill)], 1)
        for name, fill in fills.items()
    }
    scored.penalty = torch.cat([penalty, torch.full((3, 5), 7.0)], 1)
    padded = rollout_metrics(dataclasses.replace(e, **wide), scored, beta)
    assert padded == pytest.approx(found, rel=1e-5, nan_ok=True)


# ---------------------------------------------------------------------------- rollouts with engines


@dataclasses.dataclass
class Engines:
    tokenizer: Any
    actor: Any
    ref: Any
    reward: Any
    critic: Any

    @property
    def rewards(self) -> Rewards:
        return Rewards([Source("model", 1.0, self.reward)], self.tokenizer)

    @property
    def models(self) -> experience.Models:
        return experience_module.Models(
            self.tokenizer, self.actor, self.ref, self.rewards, self.critic
        )

    def experience(
        self,
        prompts: Sequence[Sequence[int]],
        draws: Tensor,
        temperature: float = 1.0,
        micro_batch: int = 2,
        **switches: bool,
    ) -> experience.Experience:
        asked = [
            [Turn("user", f"{i}")] for i in range(len(prompts))
        ]  # a reward model with the policy's tokenizer reads ids
        return experience_module.make_experience(
            self.models,
            Prompts(asked, prompts, draws),
            Sampling(temperature),
            micro_batch,
            **switches,
        )


@pytest.fixture(scope="module")
def cfg() -> Config:
    rates = ["rl.lr=1e-3", "rl.critic.lr=1e-3", "rl.schedule=constant", "rl.warmup_steps=0"]
    few = ["rl.epochs=1", "rl.minibatches=1", "rl.kl.coef=0.1"]
    return composed("stage=ppo", *few, *rates)


def build(cfg: Config, run_dir: Path, policy: str = "builtin:tiny") -> Engines:
    tokenizer = load_tokenizer("builtin:tiny")
    parts = []
    for role, load, path, seed in (
        ("actor", load_policy, policy, 0),
        ("ref", load_policy, policy, 0),
        ("reward", load_scorer, "builtin:tiny", 1),
        ("critic", load_scorer, "builtin:tiny", 2),
    ):
        torch.manual_seed(seed)
        module = load(path, tokenizer, Precision.fp32)
        module.hf.config.score_mean, module.hf.config.score_std = 0.3, 1.7
        parts.append(build_engine(lambda module=module: module, cfg, role, run_dir))
    return Engines(tokenizer, *parts)


@pytest.fixture(scope="module")
def models_of_ppo(
    cfg: Config, one_process: None, tmp_path_factory: pytest.TempPathFactory
) -> Engines:
    """Actor and reference with the same weights, a reward model and a critic; all untrained."""
    return build(cfg, tmp_path_factory.mktemp("engines"))


def some_rollout(m: Engines) -> tuple[list[list[int]], list[list[int]], Tensor]:
    """Prompts of several lengths, the tokens that shall be sampled, and the draws for them.

    The responses are whole sentences, and one without an end.
    """
    prompts = [
        ids
        for ids in template.encode_prompts(
            m.tokenizer, [[Turn("user", text)] for text in QUESTIONS], 99
        )
        if ids
    ]
    answers = template.encode_responses(m.tokenizer, ANSWERS, 99)
    width = max(map(len, answers))
    answers.append([9, 8, PAD, *range(100, 100 + width - 3)])
    draws = torch.tensor(
        [
            draws_for(m.actor.module, prompt, answer, width)
            for prompt, answer in zip(prompts, answers)
        ]
    )
    return prompts, answers, draws


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
    asked = [[Turn("user", text)] for text in QUESTIONS]
    calls: list[int] = []

    def rewards(part: experience_module.Experience, turns: Sequence[list[Turn]]) -> Tensor:
        calls.append(len(turns))
        assert len(part.response_mask) == len(turns) <= micro_batch
        texts = [part.text(i, m.tokenizer) for i in range(len(turns))]
        return torch.tensor(
            [
                [QUESTIONS.index(turn[-1].text), (ANSWERS + texts).index(text)]
                for turn, text in zip(turns, texts)
            ]
        ).float()

    e = experience_module.make_experience(
        Models(m.tokenizer, m.actor, rewards=rewards),
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
    asked = [[Turn("user", f"{i}")] for i in range(len(prompts))]
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
        [[Turn("user", "a")], [Turn("user", "b")]],
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


# --------------------------------------------------------------------------------- the first update


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
    learner = Learner(cfg, m.models, Guards(Precision.fp32, cfg.rl.dschat), steps=100)
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


# --------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_measures_each_kept_prompt_and_repeats_itself(models_of_ppo: Engines) -> None:
    m = models_of_ppo
    prompts = [
        [Turn("user", "What does my cat need?")],
        [Turn("user", "far too long " * 30)],
        [Turn("user", "Hi")],
    ]
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


def test_an_evaluation_reports_the_weighted_sum_and_each_of_several_sources(
    models_of_ppo: Engines,
) -> None:
    m = models_of_ppo
    data = Dataset(
        [], [], [], [], [], [[Turn("user", "What does my cat need?")], [Turn("user", "Hi")]]
    )
    sources = [
        Source("model", 1.0, m.reward),
        Source("long", -0.5, function=lambda turns, answer: float(len(turns[-1].text + answer))),
    ]
    several = Models(m.tokenizer, m.actor, rewards=Rewards(sources, m.tokenizer))
    means, rows = evaluate_policy(several, data, 48, 8, Sampling(), 2)
    _, one = evaluate_policy(m.models, data, 48, 8, Sampling(), 2)
    for row, alone in zip(rows, one):
        assert row["score/long"] == len(row["prompt"] + row["completion"])
        assert row["score/model"] == pytest.approx(alone["score"], abs=1e-5)
        assert row["score"] == pytest.approx(row["score/model"] - 0.5 * row["score/long"], abs=1e-5)
    for key in ("score", "score/model", "score/long"):
        assert means[key] == pytest.approx(sum(row[key] for row in rows) / 2)


def test_an_evaluation_samples_as_it_is_told(models_of_ppo: Engines) -> None:
    m = models_of_ppo
    data = Dataset([], [], [], [], [], [[Turn("user", text)] for text in QUESTIONS])
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


def test_padding_on_the_right_serves_the_reward_model_as_well(models_of_ppo: Engines) -> None:
    """The reward stage pads on the right, the rollout on the left: the scores are the same."""
    m = models_of_ppo
    prompts, answers, draws = some_rollout(m)
    e = m.experience(prompts, draws)
    ids, mask = pad_right([prompt + answer for prompt, answer in zip(prompts, answers)], PAD, CPU)
    with torch.no_grad():
        scores = last_token_score(m.reward(ids, mask), mask)
    assert scores.tolist() == pytest.approx(e.scores[:, 0].tolist(), abs=1e-5)

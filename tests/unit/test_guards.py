"""Guards that stop a run with broken arithmetic, and warnings about training that goes wrong.

Each test breaks something on purpose.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.choices import Precision
from rlhf.config.stage_nodes import DsChat
from rlhf.models.loading import load_policy
from rlhf.models.wrappers import TokenStats
from rlhf.rl.experience import Experience, Models
from rlhf.rl.guards import Guards
from rlhf.rl.monitor import Monitor, warnings_of
from rlhf.training.optimizer_step import optimizer_step

EOS = 2
OFF = DsChat(greedy=False, pad_is_eos=False)
ALL_ON = DsChat(greedy=True, pad_is_eos=True)


def checked(e: Experience, switches: DsChat = OFF, precision: Precision = Precision.fp32) -> None:
    Guards(precision, switches).check_rollout(e, EOS)


def test_a_sound_rollout_passes(actor: Any, tokenizer: Any, experience: Experience) -> None:
    checked(experience)
    sound = Guards(Precision.fp32, OFF)
    sound.check_start(experience)
    sound.check_ratio(experience.old_logprobs, experience.old_logprobs, experience.response_mask)
    sound.check_padding(actor, experience, 1.0, 0)
    sound.check_models(Models(tokenizer, actor))


def set_to(name: str, row: int, column: int, value: float) -> Callable[[Experience], None]:
    def break_it(e: Experience) -> None:
        getattr(e, name)[row, column] = value

    return break_it


BROKEN = {
    "finite: old_logprobs is not finite in 1 places": set_to("old_logprobs", 0, 1, math.nan),
    "finite: scores is not finite": set_to("scores", 2, 0, math.inf),
    "mask: a response mask has a hole": set_to("response_mask", 0, 2, 0.0),
    "mask: a response mask has a hole, or no token": lambda e: e.response_mask[3].zero_(),
    "length: in 1 responses the mask does not end at the first EOS": set_to(
        "response_ids", 0, 3, EOS
    ),
    "length: in 1 responses": lambda e: e.finished[1].zero_(),
    "eos: the EOS of 1 responses is not in the loss": set_to("loss_mask", 1, 2, 0.0),
    "sampler: the sampling loop and the training forward pass disagree": lambda e: (
        e.sampler_logprobs.add_(0.01 * e.response_mask)
    ),
    "sampler: .* maximum 0.00": set_to("sampler_logprobs", 0, 0, -1.0),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_break_stops_the_run_with_its_name(experience: Experience, what: str) -> None:
    if what.startswith(
        "sampler: .*"
    ):  # one token that is off by 5e-3 does not show in the mean of many, but in the maximum
        experience.sampler_logprobs = experience.old_logprobs.clone()
        experience.sampler_logprobs[0, 0] += 2e-3
        experience = dataclasses.replace(
            experience, **{f.name: torch.cat([getattr(experience, f.name)] * 20) for f in FIELDS}
        )
        experience.sampler_logprobs[6:] = experience.old_logprobs[6:]
    else:
        BROKEN[what](experience)
    with pytest.raises(RuntimeError, match=f"guard {what}"):
        checked(experience)


FIELDS = dataclasses.fields(Experience)


def test_a_reference_of_other_weights_and_a_ratio_that_is_not_1_stop_the_run(
    experience: Experience,
) -> None:
    experience.ref_logprobs += 0.01 * experience.response_mask
    with pytest.raises(
        RuntimeError,
        match="guard reference: policy and reference differ before the first update: mean 0.01",
    ):
        Guards(Precision.fp32, OFF).check_start(experience)
    Guards(Precision.bf16, OFF).check_start(experience)  # which rounds more than that
    with pytest.raises(RuntimeError, match="guard ratio: the ratio of the first update is not 1"):
        Guards(Precision.bf16, OFF).check_ratio(
            experience.old_logprobs + 0.1, experience.old_logprobs, experience.response_mask
        )


class Deaf:
    """A policy that does not hear its mask: padding is read like text."""

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(self, ids: Tensor, mask: Tensor, wanted: Tensor, temperature: float) -> TokenStats:
        with torch.no_grad():
            return self.engine(ids, torch.ones_like(mask), wanted, temperature)


class Gossip(Deaf):
    """A policy that hears its mask, and also the row above its own."""

    def __call__(self, ids: Tensor, mask: Tensor, wanted: Tensor, temperature: float) -> TokenStats:
        with torch.no_grad():
            logp, *others = self.engine(ids, mask, wanted, temperature)
            mixed = logp + 0.01 * (logp.roll(1, 0) - logp) * wanted
            return TokenStats(mixed, *others)


@pytest.mark.parametrize("broken", [Deaf, Gossip])
def test_a_model_that_ignores_its_mask_or_mixes_its_rows_stops_the_run(
    actor: Any, experience: Experience, broken: type[Deaf]
) -> None:
    guard = Guards(Precision.fp32, OFF)
    guard.check_padding(actor, experience, 1.0, 0)
    with pytest.raises(
        RuntimeError, match="guard padding: padding or other responses change log-probs"
    ):
        guard.check_padding(broken(actor), experience, 1.0, 0)


def test_dropout_stops_the_run_with_the_role_of_the_model(actor: Any, tokenizer: Any) -> None:
    sound = SimpleNamespace(module=load_policy("builtin:tiny", tokenizer, Precision.fp32))
    actor.module.hf.config.dropout = 0.1
    guards = Guards(Precision.fp32, OFF)
    try:
        for role, models in (
            ("actor", Models(tokenizer, actor, sound)),
            ("reference", Models(tokenizer, sound, actor)),
            ("critic", Models(tokenizer, sound, sound, critic=actor)),
        ):
            line = rf"guard dropout: the {role} has dropout \(config.dropout\)"
            with pytest.raises(RuntimeError, match=line):
                guards.check_models(models)
    finally:
        actor.module.hf.config.dropout = 0.0


def test_a_guard_that_a_switch_contradicts_is_logged_once(
    experience: Experience, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    experience.loss_mask[1, 2] = 0.0
    experience.sampler_logprobs += 0.3
    waived = Guards(Precision.fp32, ALL_ON)
    logger = logging.getLogger("rlhf")
    monkeypatch.setattr(logger, "propagate", False)  # to the root, where caplog listens too
    logger.addHandler(caplog.handler)
    try:
        for _ in range(2):
            waived.check_rollout(experience, EOS)
    finally:
        logger.removeHandler(caplog.handler)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == ["guard eos", "guard sampler"]
    assert "Expected with rl.dschat.pad_is_eos: the run continues" in messages[-1]
    mask, old = experience.response_mask, experience.old_logprobs
    with pytest.raises(RuntimeError, match="guard ratio"):  # no switch explains it
        waived.check_ratio(old + 0.3, old, mask)
    experience.ref_logprobs += 0.3
    with pytest.raises(RuntimeError, match="guard reference"):
        waived.check_start(experience)
    experience.scores[0] = math.nan  # no switch is a reason for that
    with pytest.raises(RuntimeError, match="guard finite"):
        waived.check_rollout(experience, EOS)


def test_in_bf16_only_the_first_rollout_must_keep_the_sampler_s_limit(
    experience: Experience,
) -> None:
    """Later a sharp policy has logits whose rounding alone is that large."""
    experience.sampler_logprobs += 0.06
    near = Guards(Precision.bf16, OFF)
    near.check_rollout(experience, EOS)
    assert near.logged == {"sampler"}
    experience.sampler_logprobs += 0.15
    with pytest.raises(RuntimeError, match="guard sampler"):
        checked(experience, precision=Precision.bf16)
    later = Guards(Precision.bf16, OFF)
    later.check_rollout(experience, EOS, first=False)
    assert later.logged == {"sampler"}
    with pytest.raises(RuntimeError, match="guard sampler"):
        Guards(Precision.fp32, OFF).check_rollout(experience, EOS, first=False)


def test_in_bf16_only_the_first_ratio_must_keep_its_limit(experience: Experience) -> None:
    """It is looked at in every rollout, and the largest difference is what is reported."""
    now, before, mask = (
        experience.old_logprobs + 0.06,
        experience.old_logprobs,
        experience.response_mask,
    )
    with pytest.raises(RuntimeError, match="guard ratio"):
        Guards(Precision.bf16, OFF).check_ratio(now, before, mask)
    later = Guards(Precision.bf16, OFF)
    later.check_ratio(now, before, mask, first=False)
    later.check_ratio(before, before, mask, first=False)
    assert later.logged == {"ratio"} and later.measured["ratio"] == pytest.approx(
        (0.06, 0.06), rel=1e-3
    )
    for first in (True, False):
        with pytest.raises(RuntimeError, match="guard ratio"):
            Guards(Precision.fp32, OFF).check_ratio(now, before, mask, first)


# ----------------------------------------------------------------------------------------- warnings


def row(**values: float) -> dict[str, float]:
    plain = {"kl": 2.0, "kl_per_token": 0.1, "kl_coef": 0.05, "eos_rate": 1.0, "scores": 0.5}
    names = {"entropy": "policy/entropy_avg", "explained": "val/explained_variance"}
    given = {"entropy": 1.0, "explained": 0.3} | plain | values
    return {names.get(key, f"objective/{key}"): value for key, value in given.items()}


def titles(rows: list[dict[str, float]]) -> list[str]:
    return [title for title, _ in warnings_of(rows)]


def test_a_healthy_run_gets_no_warning() -> None:
    rows = [row(kl=0.2 * i, scores=0.05 * i, entropy=1 - 0.02 * i) for i in range(40)]
    assert all(titles(rows[: i + 1]) == [] for i in range(40))


@pytest.mark.parametrize(
    "title, rows",
    [
        ("KL blow-up", [row(kl_per_token=1.1)]),
        ("KL blow-up", [*[row()] * 8, row(kl=9.0)]),
        ("entropy collapse", [row(), row(entropy=0.09)]),
        ("critic broken", [row(explained=-0.1)] * 10),
        ("all responses truncated", [row(eos_rate=0.0)]),
        ("equal rewards", [row() | {"frac_reward_zero_std": 0.6}] * 8),
        ("responses without a score", [row(unscored_frac=0.51)]),
        (
            "over-optimization",
            [row()] * 8 + [row(scores=0.7, kl=4.9, kl_coef=0.2)] * 8,
        ),  # -0.38 in units of now
    ],
)
def test_each_kind_of_trouble_gets_its_warning(title: str, rows: list[dict[str, float]]) -> None:
    assert titles(rows) == [title]
    (text,) = (text for _, text in warnings_of(rows))
    assert "rl." in text or "rollout." in text, "the fix is named"


def test_what_is_near_trouble_gets_none() -> None:
    assert titles([*[row()] * 8, row(kl=7.9)]) == []  # under 4 x the median
    assert titles([row(kl=0.2)] * 8 + [row(kl=4.0)]) == []  # under 5 nats
    assert (
        titles([row(explained=-0.1)] * 9)
        == titles([row(explained=-0.1)] * 9 + [row(explained=0.1)])
        == []
    )
    assert titles([row()] * 8 + [row(scores=0.7, kl=4.9)] * 8) == []  # both rise
    assert titles([row() | {"frac_reward_zero_std": 1.0}] * 7) == []  # too few rollouts
    assert titles([row() | {"frac_reward_zero_std": 0.5}] * 9) == []
    assert titles([row(unscored_frac=0.5)]) == []


def test_each_kind_is_said_once_per_run() -> None:
    said: list[str] = []
    watch = Monitor(lambda title, text: said.append(title))
    for _ in range(3):
        watch.check(row(eos_rate=0.0, kl_per_token=2.0))
    assert said == ["KL blow-up", "all responses truncated"]
    kept = watch.alerted["KL blow-up"]
    assert kept.startswith("KL blow-up at rollout 1: objective/kl is 2.0") and "lower rl.lr" in kept
    resumed = Monitor(lambda title, text: said.append(title))
    resumed.load_state_dict(watch.state_dict())
    resumed.check(row(eos_rate=0.0, kl_per_token=2.0))
    assert len(said) == 2 and resumed.alerted == watch.alerted


def test_a_gradient_that_is_not_finite_stops_the_run(actor: Any) -> None:
    """The last test: it leaves the actor broken."""
    weight = next(actor.module.parameters())
    with pytest.raises(
        RuntimeError, match="the norm of the gradient is (inf|nan), though the loss is finite"
    ):
        optimizer_step(actor, [lambda: (weight[0, 0] - weight[0, 0].detach()).abs().sqrt()], 0.0)
    with pytest.raises(RuntimeError, match="the loss is nan"):
        optimizer_step(actor, [lambda: weight[0, 0] * math.nan], 0.0)

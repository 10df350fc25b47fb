"""What stops a run whose arithmetic is broken, each broken on purpose; and the warnings about training that goes wrong."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.config.choices import Precision
from rlhf.config.stage_nodes import DsChat
from rlhf.rl.experience import Experience
from rlhf.rl.guards import Guards
from rlhf.rl.monitor import Monitor, warnings_of
from rlhf.training.optimizer_step import optimizer_step

EOS = 2
OFF, ALL_ON = DsChat(False, False, 0.0, False, False), DsChat(True, True, 0.1, True, True)


def checked(e: Experience, switches: DsChat = OFF, precision: Precision = Precision.fp32) -> None:
    Guards(precision, switches).check_rollout(e, EOS)


def test_a_sound_rollout_passes(actor: Any, experience: Experience) -> None:
    checked(experience)
    sound = Guards(Precision.fp32, OFF)
    sound.check_start(experience)
    sound.check_ratio(experience.old_logp, experience.old_logp, experience.mask)
    sound.check_padding(actor, experience, 1.0, 0)
    sound.check_models(actor=actor)


def set_to(name: str, row: int, column: int, value: float) -> Callable[[Experience], None]:
    def break_it(e: Experience) -> None:
        getattr(e, name)[row, column] = value

    return break_it


BROKEN = {
    "finite: old_logp is not finite in 1 places": set_to("old_logp", 0, 1, math.nan),
    "finite: scores is not finite": set_to("scores", 2, 0, math.inf),
    "mask: a response mask has a hole": set_to("mask", 0, 2, 0.0),
    "mask: a response mask has a hole, or no token": lambda e: e.mask[3].zero_(),
    "length: in 1 answers the mask does not end at the first EOS": set_to(
        "response_ids", 0, 3, EOS
    ),
    "length: in 1 answers": lambda e: e.ended[1].zero_(),
    "eos: the EOS of 1 answers is outside the mask of the loss": set_to("learnt", 1, 2, 0.0),
    "sampler: the sampling loop and the training forward disagree": lambda e: e.sampler_logp.add_(
        0.01 * e.mask
    ),
    "sampler: .* maximum 0.00": set_to("sampler_logp", 0, 0, -1.0),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_break_stops_the_run_with_its_name(experience: Experience, what: str) -> None:
    if what.startswith(
        "sampler: .*"
    ):  # one token that is off by 5e-3 does not show in the mean of many, but in the maximum
        experience.sampler_logp = experience.old_logp.clone()
        experience.sampler_logp[0, 0] += 2e-3
        experience = dataclasses.replace(
            experience, **{f.name: torch.cat([getattr(experience, f.name)] * 20) for f in FIELDS}
        )
        experience.sampler_logp[6:] = experience.old_logp[6:]
    else:
        BROKEN[what](experience)
    with pytest.raises(RuntimeError, match=f"guard {what}"):
        checked(experience)


FIELDS = dataclasses.fields(Experience)


def test_a_reference_of_other_weights_and_a_ratio_that_is_not_1_stop_the_run(
    experience: Experience,
) -> None:
    experience.ref_logp += 0.01 * experience.mask
    with pytest.raises(
        RuntimeError,
        match="guard reference: policy and reference differ before the first update: mean 0.01",
    ):
        Guards(Precision.fp32, OFF).check_start(experience)
    Guards(Precision.bf16, OFF).check_start(experience)  # which rounds more than that
    with pytest.raises(RuntimeError, match="guard ratio: the ratio of the first update is not 1"):
        Guards(Precision.bf16, OFF).check_ratio(
            experience.old_logp + 0.1, experience.old_logp, experience.mask
        )


class Deaf:
    """A policy that does not hear its mask: padding is read like text."""

    def __init__(self, engine: Any):
        self.engine = engine

    def __call__(
        self, ids: Tensor, mask: Tensor, wanted: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.engine(ids, torch.ones_like(mask), wanted, temperature)


class Gossip(Deaf):
    """A policy that hears its mask, and also the row above its own."""

    def __call__(
        self, ids: Tensor, mask: Tensor, wanted: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        with torch.no_grad():
            logp, *others = self.engine(ids, mask, wanted, temperature)
            return logp + 0.01 * (logp.roll(1, 0) - logp) * wanted, *others


@pytest.mark.parametrize("broken", [Deaf, Gossip])
def test_a_model_that_ignores_its_mask_or_mixes_its_rows_stops_the_run(
    actor: Any, experience: Experience, broken: type[Deaf]
) -> None:
    guard = Guards(Precision.fp32, OFF)
    guard.check_padding(actor, experience, 1.0, 0)
    with pytest.raises(
        RuntimeError, match="guard padding: padding or other answers change log-probabilities"
    ):
        guard.check_padding(broken(actor), experience, 1.0, 0)


def test_dropout_stops_the_run(actor: Any) -> None:
    actor.module.hf.config.dropout = 0.1
    try:
        with pytest.raises(
            RuntimeError, match=r"guard dropout: the critic has dropout \(config.dropout\)"
        ):
            Guards(Precision.fp32, OFF).check_models(critic=actor)
    finally:
        actor.module.hf.config.dropout = 0.0


def test_a_guard_that_a_switch_contradicts_is_logged_once(
    experience: Experience, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    experience.learnt[1, 2] = 0.0
    experience.sampler_logp += 0.3
    experience.ref_logp += 0.3
    chosen = Guards(Precision.fp32, ALL_ON)
    logger = logging.getLogger("rlhf")
    monkeypatch.setattr(logger, "propagate", False)  # to the root, where caplog listens too
    logger.addHandler(caplog.handler)
    try:
        for _ in range(2):
            chosen.check_rollout(experience, EOS)
            chosen.check_start(experience)
            chosen.check_ratio(experience.old_logp + 0.3, experience.old_logp, experience.mask)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"guard {n}" for n in ("eos", "sampler", "reference", "ratio")
    ]
    assert (
        "Chosen by rl.dschat.dropout, rl.dschat.train_mode_logp: the run goes on"
        in caplog.records[-1].getMessage()
    )
    experience.scores[0] = math.nan  # no switch is a reason for that
    with pytest.raises(RuntimeError, match="guard finite"):
        chosen.check_rollout(experience, EOS)


def test_in_bf16_only_the_first_rollout_must_keep_the_sampler_s_limit(
    experience: Experience,
) -> None:
    """Later a sharp policy has logits whose rounding alone is that large."""
    experience.sampler_logp += 0.06
    with pytest.raises(RuntimeError, match="guard sampler"):
        checked(experience, precision=Precision.bf16)
    later = Guards(Precision.bf16, OFF)
    later.check_rollout(experience, EOS, first=False)
    assert later.logged == {"sampler"}
    with pytest.raises(RuntimeError, match="guard sampler"):
        Guards(Precision.fp32, OFF).check_rollout(experience, EOS, first=False)


def test_in_bf16_only_the_first_ratio_must_keep_its_limit(experience: Experience) -> None:
    """It is looked at in every rollout, and the largest difference is what is reported."""
    now, before, mask = experience.old_logp + 0.06, experience.old_logp, experience.mask
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


# --------------------------------------------------------------------------------------------------------------------- warnings


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
        ("all answers truncated", [row(eos_rate=0.0)]),
        (
            "over-optimisation",
            [row()] * 8 + [row(scores=0.7, kl=4.9, kl_coef=0.2)] * 8,
        ),  # -0.38 in units of now
    ],
)
def test_each_kind_of_trouble_gets_its_warning(title: str, rows: list[dict[str, float]]) -> None:
    assert titles(rows) == [title]
    (text,) = (text for _, text in warnings_of(rows))
    assert "ppo." in text or "rollout." in text, "the fix is named"


def test_what_is_near_trouble_gets_none() -> None:
    assert titles([*[row()] * 8, row(kl=7.9)]) == []  # under 4 x the median
    assert titles([row(kl=0.2)] * 8 + [row(kl=4.0)]) == []  # under 5 nats
    assert (
        titles([row(explained=-0.1)] * 9)
        == titles([row(explained=-0.1)] * 9 + [row(explained=0.1)])
        == []
    )
    assert titles([row()] * 8 + [row(scores=0.7, kl=4.9)] * 8) == []  # both rise


def test_each_kind_is_said_once_per_run() -> None:
    said: list[str] = []
    watch = Monitor(lambda title, text: said.append(title))
    for _ in range(3):
        watch.look(row(eos_rate=0.0, kl_per_token=2.0))
    assert said == ["KL blow-up", "all answers truncated"]


def test_a_gradient_that_is_not_finite_stops_the_run(actor: Any) -> None:
    """The last test: it leaves the actor broken."""
    weight = next(actor.module.parameters())
    with pytest.raises(
        RuntimeError, match="the norm of the gradient is (inf|nan), though the loss is finite"
    ):
        optimizer_step(
            actor, [0], lambda _: (weight[0, 0] - weight[0, 0].detach()).abs().sqrt(), 0.0
        )
    with pytest.raises(RuntimeError, match="the loss is nan"):
        optimizer_step(actor, [0], lambda _: weight[0, 0] * math.nan, 0.0)

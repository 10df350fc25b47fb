"""The learning rate of each step: warm-up, schedules and the final rate."""

from __future__ import annotations

import dataclasses
import math

import pytest
from helpers import composed

from rlhf.config.choices import Schedule
from rlhf.training.schedule import learning_rate


def rates(
    total: int,
    lr: float,
    schedule: str,
    final: float = 0.0,
    ratio: float = 0.0,
    steps: int | None = None,
) -> list[float]:
    """The rate of each step of a run."""
    optim = dataclasses.replace(
        composed().sft,
        lr=lr,
        schedule=Schedule[schedule],
        warmup_ratio=ratio,
        warmup_steps=steps,
        final_lr=final,
    )
    return [learning_rate(step, total, optim) for step in range(total)]


@pytest.mark.parametrize("warmup", [{"ratio": 0.2}, {"ratio": 0.9, "steps": 2}])
def test_learning_rate_by_hand(warmup: dict) -> None:
    # two steps of warm-up, then seven equal steps down from 2.0 to 0.2
    assert rates(10, 2.0, "constant", 0.1, **warmup) == pytest.approx([1.0] + [2.0] * 9)
    down = [2.0 - 1.8 * k / 7 for k in range(8)]
    assert rates(10, 2.0, "linear", 0.1, **warmup) == pytest.approx([1.0, 2.0, *down])
    cosine = [0.2 + 0.9 * (1 + math.cos(math.pi * k / 7)) for k in range(8)]
    found = rates(10, 2.0, "cosine", 0.1, **warmup)
    assert found == pytest.approx([1.0, 2.0, *cosine])
    assert [round(x, 3) for x in found] == [
        1.0,
        2.0,
        2.0,
        1.911,
        1.661,
        1.3,
        0.9,
        0.539,
        0.289,
        0.2,
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    "total, ratio, steps",
    [
        (2, 0.0, None),
        (3, 0.3, None),
        (10, 0.0, None),
        (10, 0.05, None),
        (100, 0.1, None),
        (1000, 0.5, None),
    ]
    + [(2, 0.5, 0), (10, 0.5, 0), (10, 0.0, 3), (10, 1.0, 8), (100, 0.0, 1), (50, 0.1, 48)],
)
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_last_step_has_the_final_rate_and_the_first_is_not_zero(
    schedule: str, total: int, ratio: float, steps: int | None, final: float
) -> None:
    found = rates(total, 3e-4, schedule, final, ratio, steps)
    assert found[-1] == pytest.approx(final * 3e-4, abs=1e-18)
    assert found[0] > 0 and max(found) == pytest.approx(3e-4)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


def test_warm_up_is_linear_and_ends_at_the_peak() -> None:
    assert rates(20, 1.0, "constant", ratio=0.25)[:6] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0, 1.0]
    )
    assert rates(20, 1.0, "constant")[0] == 1.0
    assert rates(30, 1.0, "constant", ratio=0.05)[:3] == pytest.approx(
        [0.5, 1.0, 1.0]
    )  # one and a half steps are two


def test_steps_of_warm_up_override_the_ratio() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rates(20, 1.0, schedule, 0.1, ratio=0.9, steps=5) == rates(
            20, 1.0, schedule, 0.1, ratio=0.25
        )
        assert rates(20, 1.0, schedule, 0.1, ratio=0.9, steps=0) == rates(
            20, 1.0, schedule, 0.1
        )  # 0 is a number, not "unset"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_goes_on_to_its_end(schedule: str) -> None:
    assert rates(4, 1.0, schedule, 0.1, steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert (
        rates(4, 1.0, schedule, 0.1, steps=4)
        == rates(4, 1.0, schedule, 0.1, ratio=1.0)
        == pytest.approx([0.25, 0.5, 0.75, 1.0])
    )
    assert rates(1, 1.0, schedule, 0.1, steps=3) == pytest.approx([1 / 3])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("total, steps", [(1, 0), (2, 1), (10, 9)])
def test_a_run_without_room_for_a_decay_still_has_rates(
    schedule: str, total: int, steps: int
) -> None:
    assert all(0 < x <= 1 for x in rates(total, 1.0, schedule, 0.1, steps=steps))

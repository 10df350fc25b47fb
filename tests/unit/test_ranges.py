"""Ranges of numbers: each kind of limit, lists, null, and numbers that are not finite."""

from __future__ import annotations

import math

import pytest
from helpers import composed
from hydra.errors import ConfigCompositionException

from rlhf.base.processors import usable_cores
from rlhf.config.keys import LIMITS, out_of_range, schema
from rlhf.config.validation import check_config

SMALL_STEP = 1e-6


def is_wrong(key: str, value: float) -> bool:
    """Whether a value is refused for its range, set into a composed configuration."""
    cfg = composed("stage=ppo")
    *nodes, leaf = key.split(".")
    node = cfg
    for name in nodes:
        node = getattr(node, name)
    setattr(node, leaf, value)
    lines = out_of_range(cfg)
    assert len(lines) <= 1 and all(line.startswith(f"{key}={value}: must be") for line in lines)
    return bool(lines)


@pytest.mark.parametrize(
    "key, kind, limit",
    [
        ("rl.lr", "above", 0),
        ("rl.kl.coef", "at_least", 0),
        ("actor.lora.dropout", "below", 1),
        ("rl.gamma", "at_most", 1),
    ],
)
def test_each_kind_of_limit_at_its_limit_and_on_both_sides(
    key: str, kind: str, limit: float
) -> None:
    assert schema()[key].limits[kind] == limit
    inside = SMALL_STEP if kind in ("above", "at_least") else -SMALL_STEP
    assert not is_wrong(key, limit + inside)
    assert is_wrong(key, limit - inside)
    assert is_wrong(key, limit) == (kind in ("above", "below"))
    assert all(is_wrong(key, value) for value in (math.inf, -math.inf, math.nan))


def test_every_kind_of_limit_is_used_by_some_key() -> None:
    used = {kind for key in schema().values() for kind in key.limits}
    assert used == set(LIMITS)


def test_limits_are_on_numbers_only_and_both_ends_leave_room() -> None:
    for name, key in schema().items():
        if key.limits:
            assert "int" in str(key.annotation) or "float" in str(key.annotation), name
            low = max((key.limits[k] for k in ("above", "at_least") if k in key.limits), default=-1)
            high = min((key.limits[k] for k in ("below", "at_most") if k in key.limits), default=9)
            assert low < high, name


def test_every_element_of_a_list_is_within_the_range() -> None:
    assert out_of_range(composed("rl.betas=[0,0.999]")) == []
    both = ["rl", "rl.critic"]  # the critic's follow the actor's
    for betas, shown in (("[0.9,1]", "[0.9, 1.0]"), ("[-0.1,0.9]", "[-0.1, 0.9]")):
        expected = [f"{node}.betas={shown}: must be at least 0, below 1" for node in both]
        assert out_of_range(composed(f"rl.betas={betas}")) == expected
    assert out_of_range(composed("data.shares=[2,0,4]")) == []
    (line,) = out_of_range(composed("data.shares=[2,-1,4]"))
    assert line == "data.shares=[2, -1, 4]: must be at least 0"


def test_null_is_within_the_range_where_the_type_allows_it() -> None:
    assert out_of_range(composed("rl.max_steps=null", "rl.score_clip=null", "rl.ema=null")) == []
    with pytest.raises(ConfigCompositionException):
        composed("rl.lr=null")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_number_that_is_not_finite_is_outside_every_range(value: str) -> None:
    (line,) = out_of_range(composed(f"rl.kl.horizon={value}"))
    assert line == f"rl.kl.horizon={value}: must be a finite number, above 0"


@pytest.mark.parametrize(
    "override, line",
    [
        ("rl.max_steps=10000000000", "must be at most 2,147,483,647"),
        ("seed=100000000000000000000", "must be at most 2,147,483,647"),
        ("rollout.top_p=inf", "must be a finite number"),
        ("sft.batch_size=100000000000000000000", "must be above 0, at most 1,000,000"),
        ("data.sandbox.demonstrations=1000000000000", "must be above 0, at most 1,000,000"),
    ],
)
def test_every_number_has_a_largest_value(override: str, line: str) -> None:
    assert f"{override}: {line}" in check_config(composed(override))


def test_threads_are_at_most_four_to_a_core() -> None:
    cores = usable_cores()
    assert not check_config(composed(f"deploy.threads={4 * cores}"))
    (line,) = check_config(composed(f"deploy.threads={4 * cores + 1}"))
    assert f"; give at most {4 * cores}, or null" in line


def test_ranges_of_names_that_the_user_chooses() -> None:
    (line,) = out_of_range(composed("data=shp", "data.sources.shp.rows=0"))
    assert line == "data.sources.shp.rows=0: must be above 0"


def test_numbers_out_of_range_do_not_hide_other_problems_and_are_not_divided_by() -> None:
    zeros = ["rl.minibatches=0", "deploy.processes_per_node=0", "rl.responses_per_prompt=0"]
    lines = check_config(composed(*zeros, "deploy.master=here"))
    assert sorted(line.partition(",")[0] for line in lines[:3]) == sorted(
        f"{key}: must be above 0" for key in zeros
    )
    assert lines[3:] == ["deploy.master=here: give host:port of node 0"]

"""The keys of a judge in the configuration reach the judge; others are refused."""

from __future__ import annotations

import pytest
from helpers import composed

from rlhf.config.stage_graph import function_sources
from rlhf.config.validation import check_config
from rlhf.rewards.trial import spec_of

JUDGE = ["rl.rewards.j.judge={endpoint: 'http://127.0.0.1:9/v1', model: m, rubric: r.txt}"]


def test_every_key_is_an_argument_of_the_judge() -> None:
    more = ["max_score=1", "max_tokens=9", "concurrency=2", "cache=replies"]
    cfg = composed("stage=grpo", *JUDGE, *(f"rl.rewards.j.judge.{one}" for one in more))
    given = spec_of("rl.rewards.j", function_sources(cfg, "grpo")["j"]).kwargs
    assert given["max_score"] == 1 and given["max_tokens"] == 9
    assert given["concurrency"] == 2 and given["cache"] == "replies"


@pytest.mark.parametrize("kind", [JUDGE[0], "rl.rewards.j.url=http://127.0.0.1:9/r"])
def test_other_arguments_are_refused(kind: str) -> None:
    cfg = composed("stage=grpo", kind, "rl.rewards.j.kwargs={column: truth, max_score: 1}")
    [line] = [line for line in check_config(cfg) if "kwargs" in line]
    assert (
        line == "rl.rewards.j.kwargs.max_score: of a server only `column` is read, the reference's"
    )

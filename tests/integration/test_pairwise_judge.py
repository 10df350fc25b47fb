"""Two responses compared by a language model: a real server in another process, both orders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers import composed
from reward_server import Running, running

from rlhf.base import server as requests
from rlhf.base.errors import UserError
from rlhf.config.choices import OnError
from rlhf.config.stage_nodes import Judge, RewardSource
from rlhf.data.records import Prompt, Turn
from rlhf.evaluation.win_rates import comparing_judges, win_rates
from rlhf.rewards.pairwise import PairwiseJudge, compare, in_both_orders, verdict
from rlhf.rewards.rubric import render
from rlhf.rewards.trial import spec_of

VARIABLE, KEY = "TEST_JUDGE_KEY", "sk-secret-5f0c"
PROMPTS = ["Say hello.", "Count {first}."]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, a key, a cache of this test, and short waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setattr(requests, "WAITS", (0.01, 0.02))


def judge_at(server: Running, rubric: str | None = None) -> PairwiseJudge:
    return PairwiseJudge(server.endpoint, "judge", VARIABLE, timeout=10.0, rubric=rubric)


def test_the_better_response_wins_in_both_orders(tmp_path: Path) -> None:
    """This judge counts exclamation marks."""
    with running(tmp_path) as server:
        judge = judge_at(server)
        assert compare(judge, PROMPTS, ["Hello!", "1"], ["Hello", "1!!"]) == [1.0, 0.0]
        assert compare(judge, PROMPTS[:1], ["Hi!"], ["Hello!"]) == [0.5], "the judge sees a tie"
    asked = [request["body"]["messages"][0]["content"] for request in server.requests]
    assert len(asked) == 6
    assert sum("Count {first}." in question for question in asked) == 2, "a prompt stays as it is"
    assert {request["key"] for request in server.requests} == {f"Bearer {KEY}"}
    assert all(request["body"]["temperature"] == 0 for request in server.requests)


def test_what_the_configuration_says_reaches_the_server(tmp_path: Path) -> None:
    cfg = composed(
        "stage=eval",
        "eval.rewards.kind.judge.endpoint=http://127.0.0.1:1/v1",
        "eval.rewards.kind.judge.model=judge",
        "eval.rewards.kind.judge.rubric=r.txt",
        "eval.rewards.kind.judge.max_tokens=64",
        "eval.rewards.kind.judge.max_score=5",
        "eval.rewards.kind.timeout=7",
    )
    judge = comparing_judges(cfg)["kind"]
    assert judge == PairwiseJudge("http://127.0.0.1:1/v1", "judge", timeout=7.0, max_tokens=64)
    with running(tmp_path) as server:
        at_server = dataclasses.replace(judge, endpoint=server.endpoint)
        assert compare(at_server, ["Hi"], ["a!"], ["b"]) == [1.0]
    assert [request["body"]["max_tokens"] for request in server.requests] == [64, 64]


def test_a_judge_that_always_prefers_the_first_sees_ties_only(tmp_path: Path) -> None:
    with running(tmp_path, "first") as server:
        given = compare(judge_at(server), PROMPTS, ["Hello!", "1"], ["Hello", "1!!"])
    assert given == [0.5, 0.5]


def test_verdicts_are_kept_on_disk_and_replies_without_one_are_asked_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path, "silent", "fine") as server, caplog.at_level("WARNING", "rlhf"):
        judge = judge_at(server)
        assert compare(judge, PROMPTS[:1], ["a!"], ["b"]) == [None]
        assert "1 of 2 replies have no verdict such as [[A]]" in caplog.text
        assert compare(judge, PROMPTS[:1], ["a!"], ["b"]) == [1.0]
        assert compare(judge, PROMPTS[:1], ["b"], ["a!"]) == [0.0]
    assert len(server.requests) == 3, "the other order of the same pair is the same two questions"
    kept = list((tmp_path / "cache").rglob("*.json"))
    assert len(kept) == 2 and not any(KEY in file.read_text() for file in kept)


def test_a_server_that_fails_at_times_is_asked_again(tmp_path: Path) -> None:
    with running(tmp_path, "500", "429", "fine") as server:
        assert compare(judge_at(server), PROMPTS[:1], ["a!"], ["b"]) == [1.0]


@pytest.mark.parametrize(
    "behaviour, line", [("401", "check the API key in TEST_JUDGE_KEY"), ("404", "HTTP 404")]
)
def test_a_server_that_refuses_gets_one_line_without_the_key(
    tmp_path: Path, behaviour: str, line: str
) -> None:
    with running(tmp_path, behaviour) as server, pytest.raises(UserError) as error:
        compare(judge_at(server), PROMPTS, ["a", "b"], ["c", "d"])
    assert line in str(error.value) and KEY not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rubric_of_the_user(tmp_path: Path) -> None:
    rubric = tmp_path / "pairs.txt"
    rubric.write_text("Q: {prompt}\n[Response A]\n{first}\n[Response B]\n{second}\n[[A]] or [[B]]?")
    with running(tmp_path) as server:
        assert compare(judge_at(server, str(rubric)), ["Hm?"], ["a!"], ["b"]) == [1.0]
        assert server.requests[0]["body"]["messages"][0]["content"].startswith("Q: Hm?\n")
        rubric.write_text("{prompt} {first}")
        with pytest.raises(UserError, match=r"the rubric has no \{second\} \(pair_rubric="):
            compare(judge_at(server, str(rubric)), ["Hm?"], ["a!"], ["b"])
        with pytest.raises(UserError, match="cannot read the rubric"):
            compare(judge_at(server, "nowhere.txt"), ["Hm?"], ["a!"], ["b"])


def test_win_rates_by_a_judge_count_ties_half_and_leave_out_what_is_not_clear(
    tmp_path: Path,
) -> None:
    prompts = [Prompt([Turn("system", "Be kind."), Turn("user", f"{n}?")]) for n in range(3)]
    sft, dpo = (
        [{"prompt": "", "completion": text, "score": 0.0} for text in texts]
        for texts in (["a", "b!", "c"], ["a!", "b", "c"])
    )
    with running(tmp_path) as server:
        judge = judge_at(server)
        responses = {"sft": sft, "dpo": dpo}
        [rate] = win_rates(responses, "sft", ["kind"], prompts, {"kind": judge})
    assert (rate.wins, rate.ties, rate.losses, rate.rate) == (1, 1, 1, 0.5)
    asked = [request["body"]["messages"][0]["content"] for request in server.requests]
    assert sum("system: Be kind.\n\nuser: 0?" in question for question in asked) == 2


@pytest.mark.parametrize(
    "forward, swapped, both",
    [(1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.0, 0.0, 0.5), (0.5, 0.5, 0.5)]
    + [(1.0, 0.5, 0.5), (0.5, 1.0, 0.5), (None, 1.0, None), (0.0, None, None)],
)
def test_the_two_orders_by_hand(
    forward: float | None, swapped: float | None, both: float | None
) -> None:
    assert in_both_orders(forward, swapped) == both


def test_the_last_verdict_of_a_reply_counts() -> None:
    assert verdict("[[A]] at first sight, but [[B]]") == 0.0
    assert verdict("A good answer. [[C]]") == 0.5 and verdict("[[tie]]") == 0.5
    assert verdict("A is better") is None and verdict("") is None


def test_a_text_that_looks_like_a_placeholder_stays() -> None:
    texts = {"prompt": "{second}", "first": "{first}", "second": "x"}
    assert render("{prompt}|{first}|{second}|{third}", texts) == "{second}|{first}|x|{third}"


def test_the_rubric_for_pairs_is_no_argument_of_the_judge_of_one_response() -> None:
    judge = Judge(endpoint="http://x/v1", model="m", rubric="r.txt", pair_rubric="p.txt")
    source = RewardSource(judge=judge, on_error=OnError.stop)
    given = spec_of("eval.rewards.kind", source).kwargs
    assert given["rubric"] == "r.txt" and "pair_rubric" not in given

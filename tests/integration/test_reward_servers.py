"""Rewards from servers in other processes: fine ones, slow ones, and ones that fail."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from reward_server import running

from rlhf.base import server as requests
from rlhf.base.errors import UserError
from rlhf.rewards.judge import grade, judge
from rlhf.rewards.language_model import cache_folder
from rlhf.rewards.remote import remote

PROMPTS = ["3 + 4?", [{"role": "user", "content": "5 + 6?"}]]
COMPLETIONS = ["7", [{"role": "assistant", "content": "eleven"}]]
RUBRIC = 'Grade "{completion}" as an answer to {prompt}. Write {"why": ...} and Score: 0-10.'
VARIABLE = "TEST_JUDGE_KEY"
KEY = "sk-secret-5f0c"


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No proxy, a key, a cache of this test, and short waits."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(VARIABLE, KEY)
    monkeypatch.setattr(requests, "WAITS", (0.01, 0.02))


def scores(url: str, **columns: Any) -> list[float | None]:
    return asyncio.run(remote(PROMPTS, COMPLETIONS, url, **columns))


def refused(url: str, **columns: Any) -> str:
    with pytest.raises(UserError) as raised:
        scores(url, **columns)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# --- the protocol


def test_the_request_is_that_of_openrlhf(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        assert scores(server.url, answer=["... #### 7", None]) == [7.0, 12.0]
        assert scores(server.url) == [7.0, 12.0]
    sent = {"query": ["3 + 4?7", "5 + 6?eleven"], "prompts": ["3 + 4?", "5 + 6?"]}
    assert [request["body"] for request in server.requests] == [
        {**sent, "labels": ["... #### 7", None]},
        {**sent, "labels": [None, None]},
    ]


def test_a_dialogue_is_written_with_its_roles(tmp_path: Path) -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "3 + 4?"},
    ]
    with running(tmp_path) as server:
        asyncio.run(remote([talk], ["7"], server.url, goal=[["7", "seven"]], column="goal"))
    prompt = "system: Be brief.\n\nuser: 3 + 4?\n\nassistant: "
    assert server.requests[0]["body"] == {
        "query": [prompt + "7"],
        "prompts": [prompt],
        "labels": [["7", "seven"]],
    }


def test_no_text_can_break_the_request(tmp_path: Path) -> None:
    texts = ['"}]', "\x00\u2028\n", "\ud800", "na\u00efve \U0001f600"]
    with running(tmp_path) as server:
        given = asyncio.run(remote([""] * 4, texts, server.url))
    assert given == [float(len(text)) for text in texts]
    assert server.requests[0]["body"]["query"] == texts


def test_null_is_a_row_without_a_score(tmp_path: Path) -> None:
    with running(tmp_path, "null") as server:
        assert scores(server.url) == [None, 12.0]


@pytest.mark.parametrize("first", ["500", "429", "half"])
def test_what_passes_is_tried_again(tmp_path: Path, first: str) -> None:
    with running(tmp_path, first, first, "fine") as server:
        assert scores(server.url) == [7.0, 12.0]
        assert len(server.requests) == 3


def test_a_server_that_comes_back_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path, "die") as server:
        monkeypatch.setattr(requests, "WAITS", (0.5,) * 40)

        async def both() -> list[float | None]:
            asked = asyncio.create_task(remote(PROMPTS, COMPLETIONS, server.url))
            while server.process.poll() is None:  # until it died of the first request
                await asyncio.sleep(0.05)
            with running(tmp_path, "fine", port=server.port):
                return await asked

        assert asyncio.run(both()) == [7.0, 12.0]


@pytest.mark.parametrize(
    "behaviour, said",
    [
        (
            "500",
            "no answer after 3 tries: HTTP 500 Internal Server Error: no such thing: check the",
        ),
        ("die", "no answer after 3 tries: Connect"),
        ("404", "HTTP 404 Not Found: no such thing"),
        ("401", "HTTP 401 Unauthorized: wrong key None: check the API key"),
        ("slow", "no answer within 0.3 s (timeout=0.3): raise it, or send less at once"),
        ("short", "1 reward for 2 responses"),
        ("nan", "reward 0 is nan, not a finite number"),
        ("words", "reward 0 is 'good', not a finite number"),
        ("other", 'the answer has no list "rewards" (it has results): it must be {"rewards": [..'),
        ("text", "the answer is not JSON: '<html>Bad Gateway</html>'"),
    ],
)
def test_what_a_server_does_wrong_is_one_line_with_the_url(
    tmp_path: Path, behaviour: str, said: str
) -> None:
    with running(tmp_path, behaviour) as server:
        timeout = 0.3 if behaviour == "slow" else 60.0
        assert refused(server.url, timeout=timeout).startswith(f"{server.url}: {said}")
        if behaviour != "slow":  # a busy machine may not even have read that request
            assert len(server.requests) == (3 if behaviour == "500" else 1)


def test_a_wrong_url_is_refused_and_no_password_is_shown() -> None:
    assert refused("localhost:5000/get_reward") == (
        "localhost:5000/get_reward: not a URL; it begins with http:// or https://"
    )
    assert "pass" not in refused("http://me:pass@127.0.0.1:9/get_reward")


# --- the judge


def grades(
    endpoint: str, rubric: Path, completions: list[Any], **settings: Any
) -> list[float | None]:
    prompts = ["Say hello."] * len(completions)
    server = {"endpoint": endpoint, "model": "m", "api_key_env": VARIABLE}
    return asyncio.run(judge(prompts, completions, str(rubric), **(server | settings)))


@pytest.fixture
def rubric(tmp_path: Path) -> Path:
    file = tmp_path / "rubric.txt"
    file.write_text(RUBRIC)
    return file


def test_a_judge_is_asked_once_for_each_text(tmp_path: Path, rubric: Path) -> None:
    hello = [{"role": "assistant", "content": "hello!"}]
    with running(tmp_path) as server:
        got = grades(server.endpoint, rubric, ["a!!!!!", hello, "hello!", "!" * 10], max_tokens=9)
        assert got == [0.5, 0.1, 0.1, 1.0]
        assert len(server.requests) == 3
    request = next(r for r in server.requests if "hello!" in str(r))
    assert request["path"] == "/v1/chat/completions" and request["key"] == f"Bearer {KEY}"
    text = 'Grade "hello!" as an answer to Say hello.. Write {"why": ...} and Score: 0-10.'
    assert request["body"] == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 9,
        "messages": [{"role": "user", "content": text}],
    }


def test_grades_are_kept_on_disk_without_the_key(tmp_path: Path, rubric: Path) -> None:
    with running(tmp_path) as server:
        assert grades(server.endpoint, rubric, ["a!", "b!!"]) == [0.1, 0.2]
        assert grades(server.endpoint, rubric, ["b!!", "a!", "c!"]) == [0.2, 0.1, 0.1]
        assert len(server.requests) == 3
        files = [*(tmp_path / "cache" / "rlhf" / "judge").rglob("*.json")]
        assert len(files) == 3 and not any(KEY in file.read_text() for file in files)
        files[0].write_text('{"reply"')  # half a file is asked again
        assert grades(server.endpoint, rubric, ["b!!", "a!", "c!"]) == [0.2, 0.1, 0.1]
        assert len(server.requests) == 4
        rubric.write_text(RUBRIC + " Be strict.")
        elsewhere = str(tmp_path / "replies")
        assert grades(server.endpoint, rubric, ["a!"], cache=elsewhere) == [0.1]
        assert len(server.requests) == 5 and len([*Path(elsewhere).rglob("*.json")]) == 1


def test_a_reply_without_a_grade_is_none_counted_and_not_kept(
    tmp_path: Path, rubric: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path) as server:
        for _ in range(2):
            assert grades(server.endpoint, rubric, ["a", "b!", "!" * 11]) == [None, 0.1, None]
    assert len(server.requests) == 5
    assert caplog.messages[0] == (
        f"{server.endpoint}/chat/completions: no score from 0 to 10 in 2 of 3 replies; one ends in "
        "'I would rather not say.'"
    )


def test_a_rubric_with_the_reference(tmp_path: Path, rubric: Path) -> None:
    rubric.write_text("{completion} or {ground_truth}? Score: 0 or 1")
    with running(tmp_path) as server:
        completions = ["{ground_truth}", "b!", "c"]
        got = grades(
            server.endpoint, rubric, completions, answer=["x!", None, ["y", "z!"]], max_score=1
        )
        assert got == [1.0, None, 1.0]
        with pytest.raises(ValueError, match="the data have no column ground_truth or answer"):
            grades(server.endpoint, rubric, completions, level=[1, 2, 3])
    texts = {request["body"]["messages"][0]["content"] for request in server.requests}
    assert texts == {
        "{ground_truth} or x!? Score: 0 or 1",
        "c or y or z!? Score: 0 or 1",
    }


def test_requests_run_at_the_same_time(tmp_path: Path, rubric: Path) -> None:
    """Each takes SLOW seconds; twelve of them, four at a time, take three times as long."""
    with running(tmp_path, "slow") as server:
        started = time.perf_counter()
        texts = [f"{i}!" for i in range(12)]
        assert grades(server.endpoint, rubric, texts, concurrency=4) == [0.1] * 12
        seconds = time.perf_counter() - started
        print(f"{seconds:.1f} s")
        assert 6 <= seconds < 18


@pytest.mark.parametrize(
    "behaviours, said",
    [
        (["fine", "500"], "no answer after 3 tries: HTTP 500"),
        (["fine", "die"], "no answer after 3 tries: "),
        (
            ["fine", "401"],
            f"HTTP 401 Unauthorized: wrong key Bearer ***: check the API key in {VARIABLE}",
        ),
        (["slow"], "no answer within 0.3 s (timeout=0.3)"),
        (["text"], "the answer is not JSON"),
        (["other"], "the answer has no choices[0].message.content"),
    ],
)
def test_what_a_judge_does_wrong_is_one_line_without_the_key(
    tmp_path: Path, rubric: Path, behaviours: list[str], said: str
) -> None:
    with running(tmp_path, *behaviours) as server:
        with pytest.raises(UserError) as raised:
            texts = [f"{i}!" for i in range(6)]
            timeout = 0.3 if behaviours == ["slow"] else 60
            grades(server.endpoint, rubric, texts, timeout=timeout, concurrency=1)
        line = str(raised.value)
        assert line.startswith(f"{server.endpoint}/chat/completions: {said}")
        assert "\n" not in line and KEY not in line
    if behaviours[0] == "fine":  # what was answered is not paid for again
        assert len([*cache_folder(None).rglob("*.json")]) == 1


@pytest.mark.parametrize("key", ["", "sk-\u00e9", "sk-a\nb"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(
    tmp_path: Path, rubric: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(VARIABLE, key)
    with pytest.raises(UserError, match=f"the environment variable {VARIABLE} ") as raised:
        grades("http://127.0.0.1:9/v1", rubric, ["a"])
    assert not key or key not in str(raised.value)


def test_a_rubric_that_cannot_be_used_is_refused(tmp_path: Path, rubric: Path) -> None:
    rubric.write_text("Grade {prompt}.")
    for file, said in [(rubric, "the rubric has no {completion}"), (tmp_path, "cannot read the")]:
        with pytest.raises(UserError, match=rf"{said}.*\(rubric={file}\)"):
            grades("http://127.0.0.1:9/v1", file, ["a"])
    for wrong in ({"concurrency": 0}, {"max_score": 0.0}):
        with pytest.raises(UserError, match="a judge needs both above 0"):
            grades("http://127.0.0.1:9/v1", rubric, ["a"], **wrong)
    (tmp_path / "file").touch()
    rubric.write_text("{completion}")
    with pytest.raises(UserError, match="cannot make the folder of the judge's replies"):
        grades("http://127.0.0.1:9/v1", rubric, ["a"], cache=str(tmp_path / "file" / "x"))


@pytest.mark.parametrize(
    "reply, score",
    [
        ("Score: 7", 7),
        ("**Score:** 7/10", 7),
        ("Score (0-10): 7.5", 7.5),
        ('{"why": "2 errors", "score": 7}', 7),
        ("Score: 3 at first. Final score: 8. It has 2 errors.", 8),
        ("I give it a score of 9 for 2 reasons.", 9),
        ("6", 6),
        ("I'd say 7 out of 10.", 7),
        ("It is worth 4/10", 4),
        ("It has 2 errors.\n\n**7**\n", 7),
        ("7 points of the possible ones", 7),
        ("10 is right, 0 is wrong.", None),  # SmolLM2-135M repeats the rubric
        ("3 + 4 = 7", None),  # or solves the task
        ("\n" * 50_000 + "7", 7),  # in no time
        ("Score: .5", 0.5),
        ("Score: 7e-1", 0.7),
        ("Score: 8/100", None),  # of another scale
        ("8/10", 8),
        ("Score: 9 - 10", None),  # a range
        ("Score: 10-12 points", None),
        ("Score - 7", 7),
        ("Score out of 10: 7", 7),
        ("Score:\n\n7", 7),
        ("Score: 11", None),
        ("Score: -1", None),
        ("None at all", None),
        ("", None),
    ],
)
def test_the_grade_in_a_reply(reply: str, score: float | None) -> None:
    assert grade(reply, 10) == score


# --- processes


ASK = """
import asyncio, json, sys
from rlhf.rewards.judge import judge
texts = [f"{i}!" for i in range(20)]
scores = asyncio.run(judge(["x"] * 20, texts, sys.argv[2], endpoint=sys.argv[1], model="m"))
print(json.dumps(scores), any(name in sys.modules for name in ("torch", "transformers")))
"""


def test_several_processes_share_the_replies(tmp_path: Path, rubric: Path) -> None:
    with running(tmp_path) as server:
        command = [sys.executable, "-c", ASK, server.endpoint, str(rubric)]
        asked = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        output = [process.communicate(timeout=120)[0] for process in asked]
    assert output == [f"{json.dumps([0.1] * 20)} False\n"] * 3
    assert sorted(p.suffix for p in cache_folder(None).rglob("*.*")) == [".json"] * 20

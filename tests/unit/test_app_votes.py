"""Votes of the arena: their lines, two writers, kills in the middle, and the win rate."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO

from rlhf.app import votes
from rlhf.app.match import Match, take
from rlhf.app.votes import Standing, Vote
from rlhf.base.errors import UserError
from rlhf.chat.advice import Start, advice
from rlhf.config.choices import Template
from rlhf.data.records import Turn

WRITER = """
import sys
from pathlib import Path
from rlhf.app import votes
from rlhf.app.match import Match, take
from rlhf.data.records import Turn
name, count = sys.argv[2], int(sys.argv[3])
for i in range(count):
    texts = (f"yes {name} {i} " + "x" * 3000, f"no {name} {i}")
    vote = votes.Vote([Turn("user", f"{name} {i}?")], texts, ("p", "q"), "A", name)
    votes.append(Path(sys.argv[1]), vote)
    print(i, flush=True)
"""


def vote(choice: str, a: str = "yes", b: str = "no", prompt: str = "Hi?") -> Vote:
    return Vote([Turn("user", prompt)], (a, b), ("ppo-1", "sft-1"), choice, "Ann")


def writer(file: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(file), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)


def test_a_vote_for_a_response_is_a_pair_with_name_and_time(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    assert votes.append(file, vote("B")) == file
    row = json.loads(file.read_text())
    assert row["prompt"] == [{"role": "user", "content": "Hi?"}]
    assert (row["chosen"], row["rejected"], row["annotator"]) == ("no", "yes", "Ann")
    assert row["policies"] == ["ppo-1", "sft-1"] and row["vote"] == "B"
    assert row["time"].endswith("+00:00")


def test_a_name_is_one_short_line(tmp_path: Path) -> None:
    one = vote("A")
    one.annotator = " Ann\n\tB. \x00" + "x" * 100_000
    votes.append(tmp_path / "votes.jsonl", one)
    name = json.loads((tmp_path / "votes.jsonl").read_text())["annotator"]
    assert name.startswith("Ann B. ") and len(name) == 80


def test_a_vote_has_the_names_of_when_it_was_asked_for_and_counts_once(tmp_path: Path) -> None:
    """Its run may be deleted meanwhile."""
    gone = str(tmp_path / "outputs" / "ppo-1")
    match = Match((gone, "sft"), ("ppo-1", "sft-1"), [Turn("user", "Hi?")], ["yes", "no"], True)
    said = take(tmp_path / "votes.jsonl", match, "A", "Ann")
    assert "A was ppo-1, B was sft-1" in said
    with pytest.raises(UserError, match="A was ppo-1, B was sft-1"):
        take(tmp_path / "votes.jsonl", match, "B", "Ann")
    (row,) = votes.read(tmp_path / "votes.jsonl")
    assert row["policies"] == ["ppo-1", "sft-1"] and row["vote"] == "A"


@pytest.mark.parametrize(
    "other", [vote("tie"), vote("both bad"), vote("A", b=" "), vote("B", a="same", b="same ")]
)
def test_what_is_no_pair_is_kept_in_a_second_file(tmp_path: Path, other: Vote) -> None:
    file = tmp_path / "votes.jsonl"
    assert votes.append(file, other) == tmp_path / "votes-undecided.jsonl"
    assert not file.exists()
    (row,) = votes.read(file)
    assert row["vote"] == other.choice and row["responses"] == list(other.responses)


def test_the_win_rate_does_not_depend_on_the_order_of_the_responses() -> None:
    rows = [{"policies": ["p", "q"], "vote": choice} for choice in ("A", "A", "B", "tie")]
    rows += [{"policies": ["q", "p"], "vote": choice} for choice in ("B", "A", "both bad")]
    rows += [{"policies": ["p", "other"], "vote": "A"}]
    count = votes.standing(rows, "p", "q")
    assert count == Standing(wins=3, losses=2, ties=1, both_bad=1)
    assert votes.standing(rows, "q", "p") == Standing(wins=2, losses=3, ties=1, both_bad=1)
    rate, low, high = count.win_rate()
    assert rate == 4 / 7  # ties and two bad responses count half
    assert (round(low, 3), round(high, 3)) == (0.250, 0.842)  # Wilson, by hand


def test_a_torn_line_is_skipped_and_the_next_vote_has_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    for i in range(12):
        votes.append(file, vote("A", prompt=f"{i}?"))
    with open(file, "ab") as stream:  # by a server that was killed, or a full disk
        stream.write(b'{"prompt": [{"role": "user", "content": "to')
    assert len(list(votes.read(file))) == 12
    votes.append(file, vote("A", prompt="12?"))
    assert [row["prompt"][0]["content"] for row in votes.read(file)][-1] == "12?"
    assert "stage=rm" in advice(file, "rm", Start("owner/model", Template.hh))


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    writers = [writer(file, name, 150) for name in ("a", "b")]
    assert [one.wait(120) for one in writers] == [0, 0]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["prompt"][0]["content"] for row in rows} == {
        f"{name} {i}?" for name in ("a", "b") for i in range(150)
    }
    assert len(rows) == 300


def test_a_server_killed_in_the_middle_loses_no_vote_that_was_taken(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    taken: set[str] = set()
    for kill in range(4):
        process = writer(file, f"k{kill}", 100_000)
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(random.uniform(0.02, 0.3))
        process.kill()
        lines = [first, *process.stdout.read().splitlines()]
        taken |= {f"k{kill} {int(line)}?" for line in lines if line.strip()}
        process.wait()
    votes.append(file, vote("A", prompt="last?"))
    read = [row["prompt"][0]["content"] for row in votes.read(file)]
    assert taken | {"last?"} <= set(read)
    assert len(read) == len(set(read)) <= len(taken) + 1 + 4  # one more of each: not reported yet
    assert len(taken) > 20


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write to .*votes.jsonl: No such file"):
        votes.append(tmp_path / "no" / "votes.jsonl", vote("A"))


def test_prompts_that_were_voted_on_are_known(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    votes.append(file, vote("A", prompt="ä 1?"))
    votes.append(file, vote("tie", prompt="2?"))
    rows = list(votes.read(file))
    seen = votes.voted_prompts(rows, "sft-1", "ppo-1")
    assert seen == {votes.prompt_key([Turn("user", text)]) for text in ("ä 1?", "2?")}
    assert not votes.voted_prompts(rows, "sft-1", "other")

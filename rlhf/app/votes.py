"""Votes of blind comparisons, as lines of a file that data=jsonl trains on.

A vote for a response is a pair: prompt, chosen, rejected, and who voted when. Ties, two bad
responses, and pairs that no stage could train on are lines of a second file beside it. A vote is on
the disk when `append` returns.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.chat.conversation import reason
from rlhf.chat.feedback import append_line
from rlhf.data.records import Turn
from rlhf.evaluation.statistics import wilson_interval
from rlhf.runs.history import read_lines

FILE = "votes.jsonl"
CHOICES = ("A", "B", "tie", "both bad")
LONGEST_NAME = 80  # characters
UNKNOWN = "anonymous"  # an annotator without a name


@dataclass
class Vote:
    """A vote on two responses to a prompt; those of policy A and B, in the order that was shown."""

    prompt: Sequence[Turn]
    responses: tuple[str, str]
    policies: tuple[str, str]  # their names
    choice: str  # one of CHOICES
    annotator: str
    time: str = ""  # ISO 8601, UTC; "": now

    def record(self) -> tuple[dict[str, Any], bool]:
        """The line of the vote, and whether it is a pair that can be trained on."""
        prompt = [{"role": turn.role, "content": turn.text} for turn in self.prompt]
        now = datetime.now(UTC).isoformat(timespec="seconds")
        about = {
            "vote": self.choice,
            "policies": list(self.policies),  # A, B
            "annotator": " ".join(self.annotator.split())[:LONGEST_NAME] or UNKNOWN,
            "time": self.time or now,
        }
        texts = [text.strip() for text in self.responses]
        if self.choice in ("A", "B") and all(texts) and texts[0] != texts[1]:
            chosen = "AB".index(self.choice)
            pair = {"chosen": self.responses[chosen], "rejected": self.responses[1 - chosen]}
            return {"prompt": prompt, **pair, **about}, True
        return {"prompt": prompt, "responses": list(self.responses), **about}, False


def undecided(file: Path) -> Path:
    """The file of the votes that are no pairs."""
    return file.with_name(f"{file.stem}-undecided{file.suffix}")


def append(file: Path, vote: Vote) -> Path:
    """Write a vote to the disk. Several processes may append at the same time.

    Args: file: of the pairs.  Returns: the file that has it.
    Raises: UserError where it cannot be written; the file is then as it was.
    """
    record, is_pair = vote.record()
    file = file if is_pair else undecided(file)
    try:
        is_new = not file.exists()
        with open(file, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed
            append_line(file, json.dumps(record))
            os.fsync(stream.fileno())
        if is_new:
            sync_folder(file.parent)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write to {file}: {reason(error)}") from None
    return file


def sync_folder(folder: Path) -> None:
    """Write a folder's list of files to the disk; not all file systems can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of both files; torn ones and those of other programs are skipped.

    Raises: UserError where a file cannot be read.
    """
    for one in (file, undecided(file)):
        try:
            rows = read_lines(one)
        except OSError as error:
            raise UserError(f"cannot read {one}: {reason(error)}") from None
        for row in rows:
            names = row.get("policies")
            if row.get("vote") in CHOICES and isinstance(names, list) and len(names) == 2:
                yield row


@dataclass
class Standing:
    """How often the first of two policies won."""

    wins: int = 0
    losses: int = 0
    ties: int = 0
    both_bad: int = 0

    @property
    def votes(self) -> int:
        return self.wins + self.losses + self.ties + self.both_bad

    def win_rate(self) -> tuple[float, float, float]:
        """Share of wins, where ties and two bad responses count half, and its 95 % interval."""
        wins = self.wins + (self.ties + self.both_bad) / 2
        return (wins / self.votes, *wilson_interval(wins, self.votes))


def standing(rows: Sequence[dict[str, Any]], first: str, second: str) -> Standing:
    """The votes on two policies, by their names, whatever order they were shown in."""
    counts: Counter[str] = Counter()
    for row in rows:
        if sorted(row["policies"]) == sorted((first, second)):
            choice = row["vote"]
            counts[row["policies"]["AB".index(choice)] if choice in ("A", "B") else choice] += 1
    return Standing(counts[first], counts[second], counts["tie"], counts["both bad"])


def voted_prompts(rows: Sequence[dict[str, Any]], first: str, second: str) -> set[str]:
    """The prompts that were voted on for two policies, as `prompt_key` writes them."""
    ours = sorted((first, second))
    return {json.dumps(row.get("prompt")) for row in rows if sorted(row["policies"]) == ours}


def prompt_key(prompt: Sequence[Turn]) -> str:
    """A prompt as a text that can be compared."""
    return json.dumps([{"role": turn.role, "content": turn.text} for turn in prompt])

"""A blind comparison in the arena: a prompt, two responses, and the vote. No page here."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.app import votes
from rlhf.app.models import Models, Request
from rlhf.app.policies import name_of
from rlhf.base.errors import UserError
from rlhf.chat.conversation import as_text
from rlhf.data.records import Turn


@dataclass
class Match:
    """Two responses of a browser that wait for a vote."""

    policies: tuple[str, str] = ("", "")  # paths; A, B
    names: tuple[str, str] = ("", "")  # theirs, also when a run is deleted before the vote
    prompt: list[Turn] = field(default_factory=list)
    responses: list[str] = field(default_factory=list)
    is_open: bool = False  # waits for a vote
    voted: str = ""  # what was said of the last vote
    request: Request | None = None  # which is running
    round: int = 0  # an older one that is still being written is stopped


TAKING = threading.Lock()  # while a vote is taken: two clicks are one vote


def check_pair(first: str | None, second: str | None) -> None:
    """Raises: UserError unless two different policies are chosen."""
    if not (first or "").strip() or not (second or "").strip():
        raise UserError("choose two policies: runs, directories or hub ids")
    if name_of(str(first).strip()) == name_of(str(second).strip()):
        raise UserError("choose two different policies")


def next_prompt(
    models: Models, file: Path, policies: tuple[str, str], typed: str | None
) -> list[Turn]:
    """A prompt for two policies: the typed one, or of the held-out ones of the first policy's data
    one that was not voted on, at random. Where all were voted on, any.

    Args: file: of the votes.  Raises: UserError.
    """
    first, second = policies
    if typed is not None:
        text = as_text(typed)
        if not text:
            raise UserError("type a prompt")
        return [Turn("user", text)]
    prompts = models.held_out(first)
    if not prompts:
        raise UserError(f"the data of {name_of(first)} have no held-out prompts: type one")
    seen = votes.voted_prompts(list(votes.read(file)), name_of(first), name_of(second))
    new = [prompt for prompt in prompts if votes.prompt_key(prompt) not in seen]
    return random.choice(new or prompts)


def take(file: Path, match: Match, choice: str, annotator: str) -> str:
    """Write a vote. Returns: whose the responses were.

    Raises: UserError where there is nothing to vote on, or it cannot be written.
    """
    with TAKING:
        if not match.is_open:  # a second press of a button keeps what the first one has shown
            raise UserError(match.voted or "there is nothing to vote on: ask for the next prompt")
        a, b = match.names
        texts = (match.responses[0], match.responses[1])
        where = votes.append(file, votes.Vote(match.prompt, texts, (a, b), choice, annotator))
        match.is_open = False
        match.voted = f"{choice}: written to {where}. A was {a}, B was {b}."
    return match.voted

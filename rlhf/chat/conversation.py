"""A conversation with one policy or two.

Scores, traces and preferences are in rlhf/chat/feedback.py; keyboard and screen are chat.py's.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rlhf.base.errors import UserError
from rlhf.base.files import read_small_file
from rlhf.chat.policy import Params, Policy, Reply
from rlhf.data import encoding
from rlhf.data.records import Turn
from rlhf.runs.directory import write_json

Number = int | float


class Limit(NamedTuple):
    """What a sampling parameter may be."""

    kind: type[int] | type[float]
    fits: Callable[[Number], bool]
    range: str


LIMITS = {
    "temperature": Limit(
        float, lambda x: x == 0 or 0.01 <= x <= 100, "0 (greedy), or between 0.01 and 100"
    ),
    "top_p": Limit(float, lambda x: 0 < x <= 1, "above 0, at most 1"),
    "top_k": Limit(int, lambda x: x >= 0, "a whole number, 0 or more"),
    "max_new_tokens": Limit(int, lambda x: x > 0, "a whole number above 0"),
    "seed": Limit(int, lambda x: 0 <= x < 2**63, "a whole number, 0 or more"),
}


def read_param(name: str, text: str) -> Number:
    """A value of Params from text. Raises: UserError with its range."""
    limit = LIMITS[name]
    with contextlib.suppress(ValueError):
        value = limit.kind(text)
        if limit.fits(value):
            return value
    raise UserError(f"{text[:40]}: must be {limit.range}")


def read_params(given: dict[str, str]) -> dict[str, Number]:
    """Values of Params by name, from text. Raises: UserError naming the first that is wrong."""
    values = {}
    for name, text in given.items():
        if name not in LIMITS:
            raise UserError(f"no parameter {name}; there are {', '.join(LIMITS)}")
        try:
            values[name] = read_param(name, text)
        except UserError as error:
            raise UserError(f"{name}={error}") from None
    return values


class Conversation:
    """The turns with one policy, or with two side by side.

    Two policies share the user's turns, and each continues from its own responses until one is
    preferred. A response depends on the turns, the parameters and the number of responses before
    it: with the same seed both policies draw the same random numbers.
    """

    def __init__(self, policies: list[Policy], params: Params):
        self.policies, self.params = policies, params
        self.answered = 0  # responses since the seed was set
        self.clear()

    def clear(self) -> None:
        """Forget all turns."""
        self.histories: list[list[Turn]] = [[] for _ in self.policies]
        self.replies: list[Reply] = []  # to the last message, one of each policy

    def ask(self, message: str, show: Callable[[int, str], None]) -> list[Reply]:
        """Let all policies respond.

        They become part of the conversation where each policy has responded with some text; else
        the message is forgotten with them.

        Args: show: gets the number of the policy (from 0) and each certain piece of its response.
        Returns: their replies, fewer after Ctrl-C.
        Raises: UserError for a message that is too long.
        """
        return self._respond(self.histories, Turn("user", as_text(message)), show)

    def retry(self, show: Callable[[int, str], None]) -> list[Reply]:
        """Other responses to the last message; where there are none, the old ones stay.

        Raises: UserError before the first message.
        """
        self.check_replies()
        histories = [reply.prompt[:-1] for reply in self.replies]
        return self._respond(histories, self.replies[0].prompt[-1], show)

    def _respond(
        self, histories: list[list[Turn]], message: Turn, show: Callable[[int, str], None]
    ) -> list[Reply]:
        longest = self.params.max_new_tokens
        prompts = [
            policy.fit([*turns, message], longest)
            for policy, turns in zip(self.policies, histories)
        ]
        seed = self.params.seed + self.answered
        self.answered += 1
        replies: list[Reply] = []
        for i, (policy, (turns, ids)) in enumerate(zip(self.policies, prompts)):
            reply = Reply(turns, ids)
            policy.respond(reply, self.params, seed, functools.partial(show, i))
            replies.append(reply)
            if reply.stopped:
                break
        if len(replies) == len(self.policies) and all(reply.text for reply in replies):
            self.replies = replies
            self.histories = [[*reply.prompt, Turn("assistant", reply.text)] for reply in replies]
        return replies

    def check_replies(self) -> None:
        """Raises: UserError before the first response."""
        if not self.replies:
            raise UserError("there is no response yet: type a message first")

    def prefer(self, number: int) -> None:
        """Let both policies continue from the response of one (from 0), with its turns."""
        reply = self.replies[number]
        self.histories = [[*reply.prompt, Turn("assistant", reply.text)] for _ in self.policies]

    def save(self, file: Path) -> None:
        """Write turns and parameters as JSON.

        Raises: UserError when that fails, or when the file exists and is no conversation.
        """
        messages = [
            [{"role": turn.role, "content": turn.text} for turn in turns]
            for turns in self.histories
        ]
        saved = {
            "conversations": messages,
            "params": asdict(self.params),
            "answered": self.answered,
        }
        try:
            if file.exists():
                read_conversation(file)  # the name of another file may be a typo
            write_json(file, saved)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot save to {file}: {reason(error)}") from None

    def load(self, file: Path) -> None:
        """Continue a saved conversation; one with a single policy can continue with two.

        Raises: UserError with the reason why not; then nothing has changed.
        """
        try:
            saved = read_conversation(file)
            histories = saved.histories
            if len(histories) == 1:
                histories *= len(self.policies)
            if len(histories) != len(self.policies):
                raise UserError("it was with two policies: start with --compare")
            replies = []
            for policy, (*prompt, last) in zip(self.policies, filter(None, histories)):
                turns, prompt_ids = policy.fit(prompt, saved.params.max_new_tokens)
                ids = encoding.encode_response(policy.tokenizer, last.text, True)
                replies.append(Reply(turns, prompt_ids, last.text, ids, finished=True))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load {file}: {reason(error)}") from None
        self.histories, self.replies = histories, replies
        self.params, self.answered = saved.params, saved.answered


def as_text(message: str) -> str:
    """A message without space around it.

    Bytes that are no text arrive as lone surrogates, which neither tokenizers nor files accept.
    """
    return message.strip().encode(errors="replace").decode()


def reason(error: Exception) -> str:
    """Why something with a file failed, without the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


@dataclass
class SavedConversation:
    """What a file of `Conversation.save` holds."""

    histories: list[list[Turn]]  # the turns with each policy
    params: Params
    answered: int  # responses since the seed was set


def read_conversation(file: Path) -> SavedConversation:
    """A saved conversation. Raises: OSError; UserError where the file is something else."""
    unreadable = (KeyError, TypeError, AttributeError, RecursionError, OverflowError)
    try:
        saved = json.loads(read_small_file(file))
        params = {name: str(value) for name, value in saved["params"].items()}
        histories = [
            [Turn(turn["role"], as_text(turn["content"])) for turn in turns]
            for turns in saved["conversations"]
        ]
        read = SavedConversation(
            histories,
            Params(**read_params(params)),  # type: ignore[arg-type]
            int(saved["answered"]),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, *unreadable) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"this is no saved conversation ({what})") from None
    for turns in histories:
        roles = [turn.role for turn in turns if turn.text]
        alternate = roles == ["user", "assistant"] * (len(turns) // 2)
        if not alternate or turns[-2:-1] != histories[0][-2:-1]:
            raise UserError(
                "this is no saved conversation (user and assistant must alternate, with some text)"
            )
    if not histories or not 0 <= read.answered < 2**32:
        raise UserError("this is no saved conversation (no turns, or a wrong number of responses)")
    return read

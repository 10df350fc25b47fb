"""A conversation of one browser with up to four policies. No torch, and no page, here."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlhf.app.models import Answer, Models, Request
from rlhf.base.errors import UserError
from rlhf.chat.conversation import as_text, read_params
from rlhf.chat.policy import Params
from rlhf.data.records import Turn

MOST = 4  # policies side by side


@dataclass
class Settings:
    """What the user has chosen."""

    policies: list[str]  # runs, directories, hub ids
    rewards: list[str]
    reference: str  # as of Models.answer
    system: str
    params: Params


@dataclass
class Exchange:
    """A message, and a response of each policy; None while it is missing."""

    message: str
    answers: list[Answer | None]


def settings_of(
    policies: Sequence[str], rewards: Sequence[str], reference: str, system: str, params: Params
) -> Settings:
    """Raises: UserError for too many or no policies."""
    paths = [path.strip() for path in policies if path.strip()]
    if not paths:
        raise UserError("choose a policy: a run, a directory or a hub id")
    if len(paths) > MOST:
        raise UserError(f"at most {MOST} policies are shown side by side")
    given = [path.strip() for path in rewards if path.strip()]
    return Settings(paths, given, (reference or "").strip(), as_text(system or ""), params)


def params_of(**values: float | int | None) -> Params:
    """Sampling parameters, as typed. Raises: UserError naming the first that is wrong."""
    given = {name: "" if value is None else f"{value:.15g}" for name, value in values.items()}
    return Params(**read_params(given))  # type: ignore[arg-type]


@dataclass
class Talk:
    """The exchanges of a browser. One response is written at a time."""

    exchanges: list[Exchange] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)
    asked: int = 0  # adds to the seed: another response to the same message differs
    is_stopped: bool = False
    request: Request | None = None  # which is running
    busy: bool = False

    def ask(self, models: Models, message: str, settings: Settings) -> Iterator[tuple[int, str]]:
        """Let all policies respond, one after the other. Another choice of policies begins anew.

        They share the messages, and each continues from its own responses. With the same seed all
        draw the same random numbers.

        Yields: (number of the policy, its response so far), and (-1, what is being done).
        Raises: UserError; an exchange without any response is forgotten then.
        """
        message = as_text(message)
        if not message:
            raise UserError("type a message")
        with BUSY:
            if self.busy:
                raise UserError("a response is being written: stop it first")
            self.busy, self.is_stopped = True, False
        if settings.policies != self.policies:
            self.exchanges, self.policies = [], settings.policies
        exchange = Exchange(message, [None] * len(self.policies))
        self.exchanges.append(exchange)
        try:
            yield from self._respond(models, exchange, settings)
        finally:
            self.busy, self.request = False, None
            if not any(exchange.answers) and exchange in self.exchanges:
                self.exchanges.remove(exchange)

    def _respond(
        self, models: Models, exchange: Exchange, settings: Settings
    ) -> Iterator[tuple[int, str]]:
        params = dataclasses.replace(settings.params, seed=settings.params.seed + self.asked)
        self.asked += 1
        problems = []
        for i, policy in enumerate(self.policies):
            if self.is_stopped:
                break
            text, turns = "", self.turns(i, settings.system)
            yield i, text
            self.request = models.answer(
                policy, turns, params, settings.rewards, settings.reference
            )
            try:
                for kind, piece in self.request:
                    text += piece if kind == "piece" else ""
                    yield (i, text) if kind == "piece" else (-1, piece)
                exchange.answers[i] = self.request.answer
                yield i, text
            except UserError as error:  # the other policies may respond
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))

    def turns(self, i: int, system: str) -> list[Turn]:
        """What policy i responds to: its exchanges with some text, and the last message."""
        turns = [Turn("system", system)] if system else []
        for exchange in self.exchanges[:-1]:
            answer = exchange.answers[i]
            if answer and answer.text:
                turns += [Turn("user", exchange.message), Turn("assistant", answer.text)]
        return [*turns, Turn("user", self.exchanges[-1].message)]

    def stop(self) -> None:
        """Stop what is being written, and do not begin with the next policy."""
        self.is_stopped = True
        if self.request:
            self.request.stop()

    def clear(self) -> None:
        """Forget everything; what is being written is stopped."""
        self.stop()
        self.exchanges = []

    def undo(self, number: int) -> str:
        """Forget an exchange (from 0) and those after it. Returns: its message.

        Raises: UserError where there is none, or a response is being written.
        """
        if self.busy:
            raise UserError("a response is being written: stop it first")
        if not 0 <= number < len(self.exchanges):
            raise UserError("there is no such message")
        message = self.exchanges[number].message
        del self.exchanges[number:]
        return message


BUSY = threading.Lock()  # while a conversation is taken

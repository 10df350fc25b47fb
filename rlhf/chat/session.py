"""What chat.py does with its models: responses on the screen, and the commands of a user."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.base.errors import UserError
from rlhf.base.log import plural, printable, say
from rlhf.chat.advice import start_of
from rlhf.chat.conversation import LIMITS, Conversation, read_params
from rlhf.chat.feedback import Judge, Preferences, trace
from rlhf.chat.models import find_model, find_reference, load_model, newest_policy
from rlhf.chat.policy import Params, Policy, Reply
from rlhf.data import template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMMANDS = {  # arguments and meaning
    "/retry": ("", "another response to the same message"),
    "/good": ("", "this is a good response"),
    "/bad": ("", "this is a bad response"),
    "/prefer": ("1|2", "with --compare: the better response; both continue from it"),
    "/trace": ("", "the last response, each token coloured by log pi - log ref"),
    "/params": ("[NAME=VALUE ...]", "show or set how responses are sampled"),
    "/save": ("FILE", "write the conversation"),
    "/load": ("FILE", "continue a saved conversation"),
    "/clear": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/quit": ("", "end, as Ctrl-D does; Ctrl-C stops a response"),
}
WIDE = 100  # columns of a terminal in which two responses are shown side by side
STRONG = 3.0  # nats from which on a token has the full colour


class Session:
    """The models of the command line, and what the commands do with them.

    Raises: UserError with one line for what cannot be done.
    """

    def __init__(self, args: argparse.Namespace):
        from rich.console import Console

        option = "--compare" if args.compare else "--path"
        given = args.compare or ([args.path] if args.path is not None else [])
        paths = [find_model(path, option) for path in given] or [str(newest_policy() / "model")]
        reward = args.reward and find_model(args.reward, "--reward")
        self.reference = args.reference and find_model(args.reference, "--reference")
        self.device = args.device
        seed = random.getrandbits(31) if args.seed is None else args.seed
        params = Params(args.temperature, args.top_p, args.top_k, args.max_new_tokens, seed)
        self.talk = Conversation([self.policy(path, option) for path in paths], params)
        self.judge = Judge(*self.load(reward, "--reward"), reward) if reward else None
        # loaded when they are first needed
        self.references: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        self.preferences = Preferences(args.preferences)
        self.console = Console(highlight=False)
        if self.judge:
            say(f"rewards: {self.judge.unit}")

    def load(self, path: str, option: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        say(f"{path}: loading")
        return load_model(path, self.device, option)

    def policy(self, path: str, option: str) -> Policy:
        model, tokenizer = self.load(path, option)
        if not tokenizer.chat_template:
            example = f"{template.USER.strip()} ... {template.ASSISTANT.strip()}"
            say(f"{path}: its tokenizer has no chat template; using this project's ({example})")
        return Policy(model, tokenizer, path)

    # --------------------------------------------------------------------------------- responses

    def respond(self, ask: Callable[[Callable[[int, str], None]], list[Reply]]) -> list[Reply]:
        """Show the responses: streamed, or with room for two columns when both are done."""
        two = len(self.talk.policies) == 2
        if two and self.console.is_terminal and self.console.width >= WIDE:
            with self.console.status("both respond"):
                replies = ask(lambda i, text: None)
            self.show_columns(replies)
        else:
            replies = ask(Stream(self))
            show("\n")
        if self.judge:
            self.show_scores(self.judge, replies)
        remembered, stopped = self.talk.replies is replies, any(r.stopped for r in replies)
        if stopped or not remembered:
            what = "stopped" if stopped else "an empty response"
            say(f"({what}{'' if remembered else ': not remembered'})")
        elif cut := [len(reply.ids) for reply in replies if not reply.finished]:
            say(f"(cut after {max(cut)} tokens: --max-new-tokens)")
        return replies

    def show_scores(self, judge: Judge, replies: list[Reply]) -> None:
        scores = []
        for i, (policy, reply) in enumerate(zip(self.talk.policies, replies), 1):
            if reply.text:
                number = f"{i}: " if len(self.talk.policies) == 2 else ""
                scores.append(f"{number}{judge.score(policy, reply):+.2f}")
        if scores:
            say(f"(reward {'   '.join(scores)})")

    def heading(self, i: int) -> str:
        return f"{i + 1}  {self.talk.policies[i].name}"

    def show_columns(self, replies: list[Reply]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for i in range(2):
            table.add_column(Text(printable(self.heading(i))), ratio=1)
        table.add_row(*(Text(printable(reply.text)) for reply in replies))
        self.console.print(table)

    # ---------------------------------------------------------------------------------- commands

    def command(self, line: str) -> None:
        """Run a line that begins with /. Raises: UserError for what is no command, or cannot be
        done now."""
        name, _, rest = line.partition(" ")
        rest, talk = rest.strip(), self.talk
        check_command(name, rest)
        match name:
            case "/retry":
                self.respond(talk.retry)
            case "/good" | "/bad":
                self.mark(good=name == "/good")
            case "/prefer":
                self.prefer(rest)
            case "/trace":
                talk.check_replies()
                self.trace()
            case "/params":
                self.params(rest)
            case "/save":
                talk.save(Path(rest).expanduser())
                say(f"saved to {rest}")
            case "/load":
                talk.load(Path(rest).expanduser())
                count = plural(len(talk.histories[0]) // 2, "message")
                say(f"loaded {rest}: {count} of yours with their responses, and the parameters")
            case "/clear":
                talk.clear()
                say("(forgotten)")
            case "/help":
                for command, (takes, meaning) in COMMANDS.items():
                    say(f"{f'{command} {takes}':27}{meaning}")

    def mark(self, good: bool) -> None:
        """/good and /bad."""
        self.talk.check_replies()
        if len(self.talk.replies) > 1:
            name = "/good" if good else "/bad"
            raise UserError(f"there are two responses: /prefer 1 or /prefer 2, not {name}")
        policy, reply = self.talk.policies[0], self.talk.replies[0]
        say(self.preferences.mark(reply, good, start_of(policy)))

    def prefer(self, number: str) -> None:
        """/prefer 1 or 2."""
        if len(self.talk.policies) == 1:
            raise UserError("/prefer is for --compare; here mark responses with /good and /bad")
        if number not in ("1", "2"):
            raise UserError(f"/prefer {number[:40]}: must be 1 or 2")
        self.talk.check_replies()
        better = int(number) - 1
        chosen, rejected = self.talk.replies[better], self.talk.replies[1 - better]
        say(self.preferences.prefer(chosen, rejected, start_of(self.talk.policies[better])))
        self.talk.prefer(better)

    def params(self, text: str) -> None:
        """/params, with or without values."""
        given = dict(pair.partition("=")[::2] for pair in text.split())
        names = {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}
        values = read_params(names)
        self.talk.params = dataclasses.replace(self.talk.params, **values)  # type: ignore[arg-type]
        if "seed" in values:
            self.talk.answered = 0
        say(" ".join(f"{name}={getattr(self.talk.params, name)}" for name in LIMITS))

    def trace(self) -> None:
        """Show the last responses token by token, each with what it adds to the KL."""
        for i, (policy, reply) in enumerate(zip(self.talk.policies, self.talk.replies)):
            if len(self.talk.policies) == 2:
                show(self.heading(i) + "\n")
            try:
                path = self.reference or find_reference(policy.path)
                if path not in self.references:
                    self.references[path] = self.load(path, "--reference")
                self.show_trace(trace(policy, *self.references[path], reply), path)
            except UserError as error:  # the other policy may have a reference
                say(f"({error})")

    def show_trace(self, tokens: list[tuple[str, float]], reference: str) -> None:
        from rich.text import Text

        if self.console.color_system is None or self.console.no_color:
            show("".join(f"{difference:+8.3f}  {piece!r}\n" for piece, difference in tokens))
        else:
            coloured = ((printable(piece), colour(difference)) for piece, difference in tokens)
            self.console.print(Text.assemble(*coloured), soft_wrap=True)
        by_size = sorted(tokens, key=lambda token: -abs(token[1]))
        largest = ", ".join(f"{piece!r} {difference:+.2f}" for piece, difference in by_size[:3])
        total = sum(difference for _, difference in tokens)
        count = plural(len(tokens), "token")
        show(f"sum {total:+.2f} nats over {count} against {reference}; largest: {largest}\n")
        show("red: likelier than under the reference; green: less likely\n")


class Stream:
    """Prints pieces of responses as they come, two policies one after the other."""

    def __init__(self, session: Session):
        self.session, self.shown = session, -1  # the policy whose response is being printed

    def __call__(self, i: int, text: str) -> None:
        if len(self.session.talk.policies) == 2 and text and i != self.shown:
            show(("\n" if self.shown >= 0 else "") + self.session.heading(i) + "\n")
            self.shown = i
        show(text)


def check_command(name: str, rest: str) -> None:
    """Raises: UserError for an unknown command, or one with wrong arguments."""
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name[:40], COMMANDS, 1, 0.0)
        guess = nearest[0] if nearest else "/help"
        raise UserError(f"unknown command {name[:40]}: did you mean {guess}? /help lists all")
    takes = COMMANDS[name][0]
    if (rest and not takes) or (takes and not rest and not takes.startswith("[")):
        raise UserError(f"{name} takes {takes or 'no argument'}")


def show(text: str) -> None:
    """Print a piece of a response."""
    print(printable(text), end="", flush=True)


def colour(difference: float) -> str:
    """The style of a token by log pi - log ref in nats: red above 0, green below, stronger where
    it is farther from 0."""
    strength = min(abs(difference) / STRONG, 1.0)
    if not strength >= 0.03:  # nothing to see; NaN neither
        return ""
    pale = round(225 - 165 * strength)
    return f"black on rgb({f'255,{pale},{pale}' if difference > 0 else f'{pale},230,{pale}'})"

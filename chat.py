"""Talk to a policy in the terminal: python chat.py [--path RUN|DIRECTORY|HUB_ID] [--prompt TEXT]; --help lists the rest.

Models are in rlhf/chat_models.py, turns and answers in rlhf/conversation.py, scores, traces and preferences in rlhf/feedback.py.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.chat.conversation import (
    LIMITS,
    Conversation,
    Params,
    Policy,
    Reply,
    read_param,
    read_params,
)
from rlhf.chat.feedback import Judge, Preferences, trace
from rlhf.chat.models import find_model, find_reference, load_model, newest_policy
from rlhf.data import template

COMMANDS = {  # and what may follow
    "/retry": ("", "another answer to the same message"),
    "/good": ("", "this is a good answer"),
    "/bad": ("", "this is a bad answer"),
    "/prefer": ("1|2", "with --compare: the better answer, from which both go on"),
    "/trace": ("", "the last answer, each token coloured by log pi - log ref"),
    "/params": ("[NAME=VALUE ...]", "show or set how answers are sampled"),
    "/save": ("FILE", "write the conversation"),
    "/load": ("FILE", "go on from a saved one"),
    "/clear": ("", "forget the conversation"),
    "/help": ("", "this list"),
    "/quit": ("", "end, as Ctrl-D does; Ctrl-C stops an answer"),
}
WIDE = 100  # columns of a terminal in which two answers stand side by side
STRONG = 3.0  # nats from which on a token has the full colour


def main() -> int:
    """Run the command line; returns the exit code: 0 done, 2 the command was wrong, 130 interrupted."""
    args = parse_arguments()
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # text that the terminal cannot show must not end us
    try:
        session = Session(args)
        if args.prompt is not None:
            return (
                130
                if session.answer(functools.partial(session.talk.ask, args.prompt))[-1].stopped
                else 0
            )
        interact(session)
    except (FileNotFoundError, ValueError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    def param(name: str) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            try:
                return read_param(name, text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return read

    def message(text: str) -> str:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty: say something")
        return text

    def lines(text: str) -> Path:
        if not text.endswith(".jsonl"):
            raise argparse.ArgumentTypeError(f"{text}: must end in .jsonl")
        return Path(text).expanduser()

    parser = argparse.ArgumentParser(
        description="Talk to a policy in the terminal, or compare two.",
        epilog=f"While you talk: {', '.join(COMMANDS)}.",
        allow_abbrev=False,
    )
    who = parser.add_mutually_exclusive_group()
    who.add_argument(
        "--path",
        help="run, model directory or hub id; default: the newest finished policy in outputs/",
    )
    who.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two policies, that answer side by side with the same random draws",
    )
    parser.add_argument(
        "--reward",
        metavar="PATH",
        help="run, model directory or hub id of a reward model, that scores each answer",
    )
    parser.add_argument(
        "--reference",
        metavar="PATH",
        help="what /trace compares with; default: the SFT policy that the run stands on",
    )
    parser.add_argument(
        "--preferences",
        type=lines,
        metavar="FILE",
        default="preferences.jsonl",
        help="where /good, /bad, /prefer go (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        type=message,
        help="answer this once, with nothing but the answer on standard output, and exit",
    )
    whats = {
        "temperature": "divides the logits; 0 = the likeliest token (default: 1.0)",
        "top_p": "sample from the likeliest tokens of this total probability (default: 1.0, all)",
        "top_k": "sample from so many of the likeliest tokens (default: 0, all)",
        "max_new_tokens": "tokens per answer, at most, if the context has room (default: 128)",
        "seed": "makes the answers repeatable (default: another one each time)",
    }
    for name, what in whats.items():
        default = None if name == "seed" else getattr(Params, name)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=param(name), default=default, help=what
        )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto = the GPU where there is one (default: auto)",
    )
    return parser.parse_args()


def clean(text: str) -> str:
    """What a model or a user says must not steer the terminal: escape codes and the like are replaced."""
    # no-break space and the joiner inside emoji do not count as printable, and are harmless
    return "".join(c if c.isprintable() or c in "\n\t\u00a0\u200d" else "\ufffd" for c in text)


def say(line: str) -> None:
    print(clean(line), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a piece of an answer."""
    print(clean(text), end="", flush=True)


class Session:
    """The models of the command line, and what the commands do with them. What cannot be done raises ValueError with one line."""

    def __init__(self, args: argparse.Namespace):
        from rich.console import Console

        option = "--compare" if args.compare else "--path"
        paths = [
            find_model(path, option) for path in args.compare or [args.path] if path is not None
        ]
        paths = paths or [str(newest_policy() / "model")]
        reward = args.reward and find_model(args.reward, "--reward")
        self.reference = args.reference and find_model(args.reference, "--reference")
        self.device = args.device
        seed = random.getrandbits(31) if args.seed is None else args.seed
        params = Params(args.temperature, args.top_p, args.top_k, args.max_new_tokens, seed)
        self.talk = Conversation([self.policy(path, option) for path in paths], params)
        self.judge = Judge(*self.load(reward, "--reward"), reward) if reward else None
        self.references: dict[str, tuple[Any, Any]] = {}  # loaded when they are first asked
        self.preferences = Preferences(args.preferences)
        self.console = Console(highlight=False)
        if self.judge:
            say(f"rewards: {self.judge.unit}")

    def load(self, path: str, option: str) -> tuple[Any, Any]:
        say(f"{path}: loading")
        return load_model(path, self.device, option)

    def policy(self, path: str, option: str) -> Policy:
        model, tokenizer = self.load(path, option)
        if not tokenizer.chat_template:
            example = f"{template.USER.strip()} ... {template.ASSISTANT.strip()}"
            say(
                f"{path}: its tokenizer has no chat template; using the one of this framework ({example})"
            )
        return Policy(model, tokenizer, path)

    # ------------------------------------------------------------------------------------------------------------------ answers

    def answer(self, ask: Callable[[Callable[[int, str], None]], list[Reply]]) -> list[Reply]:
        """Show what the policies answer: as it comes, or where there is room for two columns, when both are done."""
        two, shown = len(self.talk.policies) == 2, -1

        def piece(i: int, text: str) -> None:
            nonlocal shown
            if two and text and i != shown:
                show("\n" * (shown >= 0) + self.heading(i) + "\n")
                shown = i
            show(text)

        if two and self.console.is_terminal and self.console.width >= WIDE:
            with self.console.status("both answer"):
                replies = ask(lambda i, text: None)
            self.show_columns(replies)
        else:
            replies = ask(piece)
            show("\n")
        if self.judge:
            numbered = [
                (f"{i}: " * two, *pair)
                for i, pair in enumerate(zip(self.talk.policies, replies), 1)
            ]
            scores = [
                f"{number}{self.judge.score(policy, reply):+.2f}"
                for number, policy, reply in numbered
                if reply.text
            ]
            if scores:
                say(f"(reward {'   '.join(scores)})")
        kept, stopped = self.talk.replies is replies, any(reply.stopped for reply in replies)
        if stopped or not kept:
            say(
                f"({'stopped' if stopped else 'an empty answer'}{'' if kept else ': not remembered'})"
            )
        return replies

    def heading(self, i: int) -> str:
        return f"{i + 1}  {self.talk.policies[i].name}"

    def show_columns(self, replies: list[Reply]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for i in range(2):
            table.add_column(Text(clean(self.heading(i))), ratio=1)
        table.add_row(*(Text(clean(reply.text)) for reply in replies))
        self.console.print(table)

    # ----------------------------------------------------------------------------------------------------------------- commands

    def command(self, line: str) -> None:
        """Do what a line that begins with / says. Raises: ValueError for what is no command, or cannot be done now."""
        name, _, rest = line.partition(" ")
        rest, talk = rest.strip(), self.talk
        if name not in COMMANDS:
            nearest = difflib.get_close_matches(name[:40], COMMANDS, 1, 0.0)
            raise ValueError(
                f"unknown command {name[:40]}: did you mean {nearest[0] if nearest else '/help'}? /help lists all"
            )
        takes = COMMANDS[name][0]
        if (rest and not takes) or (takes and not rest and not takes.startswith("[")):
            raise ValueError(f"{name} takes {takes or 'nothing behind it'}")
        match name:
            case "/retry":
                self.answer(talk.retry)
            case "/good" | "/bad":
                talk.check_replies()
                if len(talk.replies) > 1:
                    raise ValueError(f"two answers stand here: /prefer 1 or /prefer 2, not {name}")
                say(self.preferences.mark(talk.replies[0], name == "/good"))
            case "/prefer":
                if len(talk.policies) == 1:
                    raise ValueError(
                        "/prefer is for --compare; here mark answers with /good and /bad"
                    )
                if rest not in ("1", "2"):
                    raise ValueError(f"/prefer {rest[:40]}: must be 1 or 2")
                talk.check_replies()
                better = int(rest) - 1
                say(self.preferences.prefer(talk.replies[better], talk.replies[1 - better]))
                talk.prefer(better)
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
                say(
                    f"loaded {rest}: {len(talk.histories[0]) // 2} of your messages with their answers, and the parameters"
                )
            case "/clear":
                talk.clear()
                say("(forgotten)")
            case "/help":
                for command, (takes, what) in COMMANDS.items():
                    say(f"{f'{command} {takes}':27}{what}")

    def params(self, text: str) -> None:
        given = dict(pair.partition("=")[::2] for pair in text.split())
        values = read_params(
            {name.lstrip("-").replace("-", "_"): value for name, value in given.items()}
        )
        self.talk.params = dataclasses.replace(self.talk.params, **values)
        if "seed" in values:
            self.talk.answered = 0
        say(" ".join(f"{name}={getattr(self.talk.params, name)}" for name in LIMITS))

    def trace(self) -> None:
        """Show the last answers again, token by token, each with what it adds to the KL against the reference."""
        for i, (policy, reply) in enumerate(zip(self.talk.policies, self.talk.replies)):
            if len(self.talk.policies) == 2:
                show(self.heading(i) + "\n")
            try:
                path = self.reference or find_reference(policy.path)
                if path not in self.references:
                    self.references[path] = self.load(path, "--reference")
                self.show_trace(trace(policy, *self.references[path], reply), path)
            except ValueError as error:  # the other policy may have a reference
                say(f"({error})")

    def show_trace(self, tokens: list[tuple[str, float]], reference: str) -> None:
        from rich.text import Text

        if self.console.color_system is None or self.console.no_color:
            show("".join(f"{d:+8.3f}  {piece!r}\n" for piece, d in tokens))
        else:
            self.console.print(
                Text.assemble(*((clean(piece), colour(d)) for piece, d in tokens)), soft_wrap=True
            )
        largest = ", ".join(
            f"{piece!r} {d:+.2f}"
            for piece, d in sorted(tokens, key=lambda token: -abs(token[1]))[:3]
        )
        total = sum(d for _, d in tokens)
        show(
            f"sum {total:+.2f} nats over {len(tokens)} tokens against {reference}; largest: {largest}\n"
        )
        show("red: likelier than under the reference; green: less likely\n")


def colour(d: float) -> str:
    """The style of a token by log pi - log ref in nats: red above 0, green below, stronger where it is farther from 0."""
    strength = min(abs(d) / STRONG, 1.0)
    if not strength >= 0.03:  # nothing to see; nor for nan
        return ""
    pale = round(225 - 165 * strength)
    return f"black on rgb(255,{pale},{pale})" if d > 0 else f"black on rgb({pale},230,{pale})"


def interact(session: Session) -> None:
    """Read messages and commands until the user ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import gives input() a history and line editing
    terminal = sys.stdin.isatty()
    say("/help lists the commands, /quit (or Ctrl-D) ends; Ctrl-C stops an answer.")
    while True:
        try:
            message = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if message == "/quit":
            return
        try:
            if message.startswith("/"):
                session.command(message)
            elif message:
                session.answer(functools.partial(session.talk.ask, message))
        except KeyboardInterrupt:
            say("\n(stopped)")
        except (ValueError, RuntimeError) as error:
            say(f"({' '.join(str(error).split())[:500]})")


if __name__ == "__main__":
    sys.exit(main())

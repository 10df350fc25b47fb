"""Talk to a policy in the terminal: python chat.py [--path RUN|DIRECTORY|HUB_ID] [--prompt TEXT].

--help lists the rest. Models, turns and feedback are in rlhf/chat/.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rlhf.base import interrupts

if __name__ == "__main__":
    interrupts.end_at_interrupt()  # before imports that take a second

from rlhf.base.errors import UserError
from rlhf.base.files import why_not_small_file
from rlhf.base.log import say
from rlhf.base.processors import default_threads
from rlhf.chat.conversation import Number, read_param
from rlhf.chat.policy import Params
from rlhf.chat.session import COMMANDS, Session
from rlhf.runs.environment import thread_settings


def main() -> int:
    """Run the command line; returns the exit code. Raises: KeyboardInterrupt."""
    args = parse_arguments()
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # text that the terminal cannot show must not end us
    threads = default_threads()  # torch reads it when it is imported, to load a model
    os.environ.update(thread_settings(threads) | {"OMP_NUM_THREADS": str(threads)})
    try:
        session = Session(args)
        interrupts.raise_at_interrupt()
        if args.prompt is not None:
            replies = session.respond(functools.partial(session.talk.ask, args.prompt))
            return interrupts.INTERRUPTED if replies[-1].stopped else interrupts.DONE
        interact(session)
    except UserError as error:
        say(f"error: {error}")
        return interrupts.WRONG
    return interrupts.DONE


# ---- the command line


def param(name: str) -> Callable[[str], Number]:
    """A reader of one sampling parameter for argparse."""

    def read(text: str) -> Number:
        try:
            return read_param(name, text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def message(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: type a message")
    return text


def jsonl(text: str) -> Path:
    if not text.endswith(".jsonl"):
        raise argparse.ArgumentTypeError(f"{text}: must end in .jsonl")
    file = Path(text).expanduser()
    if problem := why_not_small_file(file):
        raise argparse.ArgumentTypeError(f"{text}: {problem}")
    return file


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Talk to a policy in the terminal, or compare two.",
        epilog=f"While you talk: {', '.join(COMMANDS)}.",
        allow_abbrev=False,
    )
    who = parser.add_mutually_exclusive_group()
    newest = "default: the newest finished policy in outputs/"
    who.add_argument("--path", help=f"run, model directory or hub id; {newest}")
    two = "two policies, which respond side by side with the same random numbers"
    who.add_argument("--compare", nargs=2, metavar=("A", "B"), help=two)
    add_models(parser)
    add_sampling(parser)
    once = "respond to this once, with only the response on standard output, and exit"
    parser.add_argument("--prompt", type=message, help=once)
    auto = "auto = the GPU where there is one (default: auto)"
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help=auto)
    args, unknown = parser.parse_known_args()
    if unknown:
        words = " ".join(unknown)
        parser.error(f"{words}: not understood; a run is given by --path, a message by --prompt")
    return args


def add_models(parser: argparse.ArgumentParser) -> None:
    """Options for what rates a response."""
    scores = "run, model directory or hub id of a reward model, which scores each response"
    parser.add_argument("--reward", metavar="PATH", help=scores)
    reference = "what /trace compares with; default: the SFT policy that the run was trained from"
    parser.add_argument("--reference", metavar="PATH", help=reference)
    file = "where /good, /bad, /prefer are written (default: %(default)s)"
    default = "preferences.jsonl"
    parser.add_argument("--preferences", type=jsonl, metavar="FILE", default=default, help=file)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options for how responses are sampled."""
    meanings = {
        "temperature": "divides the logits; 0 = the likeliest token (default: 1.0)",
        "top_p": "sample from the likeliest tokens of this total probability (default: 1.0, all)",
        "top_k": "sample from the k likeliest tokens (default: 0, all)",
        "max_new_tokens": "tokens per response, at most, if the context has room (default: 128)",
        "seed": "makes the responses repeatable (default: another one each time)",
    }
    for name, meaning in meanings.items():
        option, default = "--" + name.replace("_", "-"), getattr(Params, name)
        default = None if name == "seed" else default
        parser.add_argument(option, type=param(name), default=default, help=meaning)


# ---- the conversation


def interact(session: Session) -> None:
    """Read messages and commands until the user ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import gives input() a history and line editing
    terminal = sys.stdin.isatty()
    say("/help lists the commands, /quit (or Ctrl-D) ends; Ctrl-C stops a response.")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                session.command(line)
            elif line:
                session.respond(functools.partial(session.talk.ask, line))
        except KeyboardInterrupt:
            say("\n(stopped)")
        except (UserError, RuntimeError) as error:
            say(f"({' '.join(str(error).split())[:500]})")


if __name__ == "__main__":
    sys.exit(interrupts.run_interruptible(main))

"""The logger of the package, and helpers for messages. No torch here."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

log = logging.getLogger("rlhf")
SURROGATES = re.compile("[\ud800-\udfff]")
LONGEST = 4000  # characters of a line for the user; texts of data may be of any length
SILENCE = 2.0  # seconds after which something slow is named


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type where the message is empty."""
    return cut((str(error).splitlines() or [type(error).__name__])[0])


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """Within this context: say what is happening if it takes more than 2 seconds."""

    def announce() -> None:
        if log.handlers:
            log.info(f"{what} ...")
        elif os.environ.get("RANK", "0") == "0":  # before logging is set up
            say(f"{what} ...")

    timer = threading.Timer(SILENCE, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def printable(text: str) -> str:
    """Replace escape codes and the like: no text of a model, a file or a user may control the
    terminal."""
    # no-break and wide spaces, and the joiner inside emoji, do not count as printable: harmless
    harmless = "\n\t\u00a0\u3000\u200d"
    return "".join(c if c.isprintable() or c in harmless else "\ufffd" for c in text)


def valid_text(text: str) -> str:
    """A text that UTF-8 can encode: bytes of a file's name that are no UTF-8 arrive in Python as
    halves of surrogate pairs, and become \ufffd here."""
    return SURROGATES.sub("\ufffd", text)


def cut(line: str, most: int = LONGEST) -> str:
    """A line of at most about `most` characters; a longer one ends with its length."""
    if len(line) <= most:
        return line
    return f"{line[:most]} ... ({len(line):,} characters)"


def presentable(text: str) -> str:
    """A text for the terminal or a log: printable, and each of its lines cut."""
    return printable("\n".join(map(cut, text.split("\n"))))


def say(line: str) -> None:
    """Print a line to the user, on stderr."""
    with contextlib.suppress(OSError):  # a full disk behind it: there is nowhere to say so
        # with its end in one piece: Ctrl-C may come between two
        print(f"{presentable(line)}\n", end="", file=sys.stderr, flush=True)


def plural(count: int, noun: str, ending: str = "s") -> str:
    """`1 process`, `2 processes`: a number and its noun."""
    return f"{count} {noun}{'' if count == 1 else ending}"


def first_few(names: Sequence[str], count: int = 5) -> str:
    """`a, b, c`; of more than `count` names the first ones, and how many others there are."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest:,} more" if rest > 0 else "")


def is_listening(url: str) -> bool:
    """Whether a server accepts connections at a URL within 2 seconds; where the environment sets a
    proxy for it (HTTPS_PROXY), whether the proxy does."""
    from urllib.request import getproxies, proxy_bypass  # takes 0.05 s

    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=2).close()
    except OSError:
        return False
    return True


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached."""
    return is_listening(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))

"""Commands that messages suggest: they can be pasted into a shell as they are. No torch here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]  # where train.py and chat.py are


def command_line(script: str, *args: str) -> str:
    """A command to print, quoted for a shell: python SCRIPT ARGS.

    Args: script: train.py or chat.py; with its folder where the current folder is another one.
    """
    file = CHECKOUT / script
    return shlex.join(["python", script if Path(script).resolve() == file else str(file), *args])


def override_text(text: str, always: bool = False) -> str:
    """A text as the value of an override, quoted for Hydra (not for the shell).

    Args: always: quote it also where it is plain, as it may look like a number.
    """
    if not always and re.fullmatch(r"[A-Za-z0-9_./~-]+", text):
        return text
    # backslashes count only in front of a quote; there, each one is doubled
    escaped = re.sub(r'(\\*)("|\Z)', lambda end: end[1] * 2 + (end[2] and '\\"'), text)
    return f'"{escaped}"'

"""Commands that messages suggest: they can be pasted into a shell as they are."""

from __future__ import annotations

import re
import shlex


def train_command(*overrides: str) -> str:
    """`python train.py` with these overrides, quoted for a shell."""
    return shlex.join(["python", "train.py", *overrides])


def override(key: str, value: str) -> str:
    """key=value, with a text that Hydra reads as it is, whatever its characters."""
    plain = re.fullmatch(r"[\w./~+-]+", value, re.ASCII)
    return f"{key}={value}" if plain else f'{key}="{value.replace(chr(34), chr(92) + chr(34))}"'

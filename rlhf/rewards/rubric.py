"""Rubrics: the user's text with the question to a judge, and placeholders for a row's texts.

No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.files import read_small_file
from rlhf.base.log import first_line


def read_rubric(path: str, key: str, needed: Sequence[str]) -> str:
    """The text of a rubric.

    Args:
        key: what the configuration calls the file, for messages.
        needed: placeholders that it must have.
    Raises: UserError where it cannot be read, or lacks one of them.
    """
    try:
        text = read_small_file(Path(path).expanduser())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the rubric ({key}={path}): {first_line(error)}") from None
    if missing := [name for name in needed if f"{{{name}}}" not in text]:
        names = ", ".join(f"{{{name}}}" for name in missing)
        raise UserError(f"the rubric has no {names} ({key}={path}): write it where it belongs")
    return text


def render(rubric: str, texts: Mapping[str, str]) -> str:
    """The rubric with texts in place of their names in braces.

    Other braces stay, and so does what looks like a placeholder in a text.
    """
    placeholder = re.compile(rf"\{{({'|'.join(texts)})\}}")
    return placeholder.sub(lambda name: texts[name[1]], rubric)

"""Files are UTF-8 whatever the locale is: every call that opens a text says so."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers import REPO

CODE = [*sorted((REPO / "rlhf").rglob("*.py")), *sorted(REPO.glob("*.py"))]
OPENS_TEXT = ("read_text", "write_text", "TextIOWrapper", "FileHandler")
RUNS = ("Popen", "run", "check_output")


def opens_text_in_the_locale(call: ast.Call) -> bool:
    """Whether a call opens a text without naming its encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    owner = getattr(getattr(call.func, "value", None), "id", "")
    given = {keyword.arg for keyword in call.keywords}
    if "encoding" in given:
        return False
    if name in RUNS:
        return "text" in given
    if name == "read_text" and owner == "":  # of a module of ours: not a file's
        return isinstance(call.func, ast.Attribute)
    if name in ("open", "fdopen") and owner in ("", "os", "Path"):
        if name == "open" and isinstance(call.func, ast.Attribute):
            return False  # os.open; gzip.open and others give bytes
        modes = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
        return not any("b" in mode for mode in modes if isinstance(mode, str) and len(mode) < 4)
    return name in OPENS_TEXT


@pytest.mark.parametrize("file", CODE, ids=[str(file.relative_to(REPO)) for file in CODE])
def test_every_text_is_opened_as_utf8(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.lineno for call in calls if opens_text_in_the_locale(call)] == []

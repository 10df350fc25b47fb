"""The files of a model directory, without loading it: broken files, and the names of its weights.

No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

GIT_LFS = b"version https://git-lfs"  # begins a file that Git LFS has not fetched
# weights of a head that gives scores, as other programs call it: value_head.weight,
# v_head.summary.weight, regression_head.weight, classifier.weight
SCORE_HEAD = re.compile(
    r"(?:.*\.)?(?:score|classifier|(?:v|value|reward|regression|rm|score|scalar)_?head)"
    r"(?:\.\w+)*\.weight"
)


def broken_file(directory: Path) -> str | None:
    """What is wrong with a file of a model directory, as one line that names it; or None."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        with file.open("rb") as opened:
            if opened.read(len(GIT_LFS)) == GIT_LFS:
                return f"{file} is a Git LFS pointer, not the file itself: run git lfs pull there"
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:
            return f"{file} is torn, or no safetensors file ({error}): fetch it again"
    return None


def weight_names(directory: Path) -> set[str]:
    """The names of the weights in a directory's safetensors files; empty where there are none."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    if index.exists():
        return set(json.loads(index.read_text())["weight_map"])
    if not (directory / "model.safetensors").exists():
        return set()
    with safe_open(directory / "model.safetensors", "np") as opened:
        return set(opened.keys())


def score_heads(names: Iterable[str]) -> list[str]:
    """Those of the names that are weights of a head that gives scores."""
    return sorted(name for name in names if SCORE_HEAD.fullmatch(name))

"""The files of a model directory, without loading it: broken files, and the names of its weights.

No torch here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from rlhf.base.files import special_kind

INDEX = "model.safetensors.index.json"  # of weights in several files
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

    for file in sorted(directory.iterdir()):
        if kind := special_kind(file):
            return f"{file} is {kind}, not a file"
        if not file.is_file():
            continue
        with file.open("rb") as opened:
            if opened.read(len(GIT_LFS)) == GIT_LFS:
                return f"{file} is a Git LFS pointer, not the file itself: run git lfs pull there"
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.match("model*.safetensors") or file.match("adapter_model*.safetensors"):
                with safe_open(file, "np"):
                    pass
        except SafetensorError as error:
            return f"{file} is torn, or no safetensors file ({error}): fetch it again"
        except RecursionError:
            return f"{file} is no JSON that can be read: it is nested too deeply"
        except ValueError as error:  # also what is not UTF-8
            return f"{file} is torn, or no JSON ({error}): fetch it again"
    return _broken_index(directory / INDEX) if (directory / INDEX).exists() else None


def _broken_index(index: Path) -> str | None:
    content = json.loads(index.read_text(encoding="utf-8"))
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return f"{index} has no weight_map: fetch it again"
    missing = sorted({file for file in files.values() if not (index.parent / str(file)).exists()})
    return f"{index} names files that are not there: {', '.join(missing)}" if missing else None


def weight_names(directory: Path) -> set[str]:
    """The names of the weights in a directory's safetensors files; empty where there are none."""
    return set(files_of_weights(directory))


def files_of_weights(directory: Path) -> dict[str, str]:
    """The file of each weight."""
    from safetensors import safe_open

    if (directory / INDEX).exists():
        return json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"]
    if not (directory / "model.safetensors").exists():
        return {}
    with safe_open(directory / "model.safetensors", "np") as opened:
        return dict.fromkeys(opened.keys(), "model.safetensors")


def score_heads(names: Iterable[str]) -> list[str]:
    """Those of the names that are weights of a head that gives scores."""
    return sorted(name for name in names if SCORE_HEAD.fullmatch(name))

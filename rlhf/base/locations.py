"""What a model path means: built in, a directory, or a hub id. No torch here."""

from __future__ import annotations

import re
from pathlib import Path

BUILTIN = "builtin:"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
ASSETS = Path(__file__).parents[1] / "assets"


def hub_id_of(url: str) -> str:
    """The hub id in the address of a page of the hub; "" for other addresses."""
    host = r"https?://(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/(?:datasets/)?"
    found = re.match(host + r"([\w.-]+/[\w.-]+)", url)
    return found[1] if found else ""


def is_directory(path: str) -> bool:
    """Whether a model path means a directory (else it is a hub id, or built in)."""
    return not path.startswith(BUILTIN) and is_local(path)


def is_local(path: str) -> bool:
    """Whether a path means something on this disk, there or not; else it is a hub id.

    A hub id has at most one slash. NAME/x, where NAME is a folder here, is a path.
    """
    inside = "/" in path and Path(path).parent.is_dir()
    return path[:1] in "/.~" or inside or path.count("/") > 1 or Path(path).exists()


def model_directory(path: str) -> Path:
    """The model in a directory: a run's `model/`, or the directory itself."""
    directory = Path(path).expanduser()
    return directory / "model" if (directory / "model" / "config.json").exists() else directory

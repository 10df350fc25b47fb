"""What a model path means: built in, a directory, or a hub id. No torch here."""

from __future__ import annotations

from pathlib import Path

BUILTIN = "builtin:"
ASSETS = Path(__file__).parents[1] / "assets"


def is_directory(path: str) -> bool:
    """Whether a model path means a directory (else it is a hub id, or built in)."""
    return not path.startswith(BUILTIN) and (path[:1] in "/.~" or Path(path).exists())


def model_directory(path: str) -> Path:
    """The model in a directory: a run's `model/`, or the directory itself."""
    directory = Path(path).expanduser()
    return directory / "model" if (directory / "model" / "config.json").exists() else directory

"""The JSON files of a run directory: what is in each, and the one reader of them. No torch here."""

from __future__ import annotations

import json
import types
import typing
from pathlib import Path
from typing import Any, TypedDict

from rlhf.base.errors import UserError
from rlhf.base.files import special_kind
from rlhf.base.log import first_line

SUMMARY, RESULT, WARNINGS = "summary.json", "result.json", "warnings.json"
PARENTS, ENVIRONMENT, DATA = "parents.json", "env.json", "data.json"
PROGRESS = "progress.json"


class Always(TypedDict):
    """What each entry of data.json has."""

    source: str
    split: str
    rows: float


class DataReport(Always, total=False):
    """Where the rows of one split of a source go; a stage's name: the rows that it trains on."""

    sft: float
    rm: float
    ppo: float
    eval: float


class Identified(TypedDict):
    """What each summary.json has."""

    id: str


class Summary(Identified, total=False):
    """summary.json; its presence means that the run is finished."""

    stage: str
    status: str
    parents: dict[str, str]
    metrics: dict[str, float]
    seconds: float
    finished: str
    data: list[DataReport]
    data_files: dict[str, list[float]]  # bytes and time of each
    settings: dict[str, Any]
    versions: dict[str, str | None]


class Environment(TypedDict, total=False):
    """env.json: what a run was made with."""

    command: str
    folder: str
    started: str
    git: str
    git_dirty: bool
    packages: dict[str, str | None]


class Result(TypedDict):
    """result.json: what the workers hand to the command."""

    metrics: dict[str, Any]
    seconds: float


class Planned(TypedDict):
    """progress.json: how many steps (online RL: rollouts) a run has."""

    steps: float


class Checkpoint(TypedDict):
    """checkpoint.json of a checkpoint; `kernels` is there too since there are compiled ones."""

    step: float
    placement: dict[str, Any]
    files: dict[str, float]  # their sizes in bytes


KINDS: dict[str, Any] = {
    SUMMARY: Summary,
    RESULT: Result,
    PARENTS: dict[str, str],
    ENVIRONMENT: Environment,
    DATA: list[DataReport],
    WARNINGS: list[str],
    PROGRESS: Planned,
}
AGAIN = "add fresh=true to train it again (this attempt is kept in its attempts/)"
FIXES = {
    SUMMARY: f"delete it, then the run counts as unfinished, or {AGAIN}",
    RESULT: "repeat the run's command",
    ENVIRONMENT: "it only tells how the run was made: delete it",
    DATA: "delete it, then nobody checks that the data are still the same",
    WARNINGS: "only reports show it: delete it",
    PROGRESS: "only pages that follow runs read it: delete it",
}
NAMES = {str: "a text", float: "a number", bool: "true or false", dict: "an object", list: "a list"}


def read_file(directory: Path, name: str) -> Any:
    """What a JSON file of a run has; None where there is no such file.

    Raises: UserError that names the file, what is wrong with it, and the fix.
    """
    file = directory / name
    try:
        return read_json(file, KINDS[name])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UserError as error:
        raise UserError(f"{error}: {FIXES.get(name, AGAIN)}") from None


def read_json(file: Path, kind: Any = Any) -> Any:
    """What a JSON file has.

    Args: kind: its type: str, float, bool, dict, list, a TypedDict, or Any.
    Raises: FileNotFoundError; UserError that names the file and what is wrong with it.
    """
    if kind_of_file := special_kind(file):
        raise UserError(f"{file}: cannot be read (this is {kind_of_file}, not a file)")
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: cannot be read (it is no text)") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        wrong = f"it is no JSON: {first_line(error)}" if text.strip() else "it is empty"
        raise UserError(f"{file}: cannot be read ({wrong})") from None
    if wrong := mismatch(value, kind, "it"):
        raise UserError(f"{file}: cannot be read ({wrong})")
    return value


def mismatch(value: Any, kind: Any, name: str) -> str:
    """How a value differs from a type, in words; "" where it is of that type."""
    if kind is Any:
        return ""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        differences = [mismatch(value, one, name) for one in inner]
        return "" if "" in differences else differences[0]
    if typing.is_typeddict(kind):
        if not isinstance(value, dict):
            return f"{name} must be an object"
        fields = typing.get_type_hints(kind)
        if missing := [key for key in sorted(kind.__required_keys__) if key not in value]:
            return f"{missing[0]} is missing"
        parts = [(value[key], one, key) for key, one in fields.items() if key in value]
    else:
        plain = origin or kind
        if not is_plain(value, plain):
            return f"{name} must be {NAMES.get(plain, 'null')}"
        if origin is dict:
            parts = [(one, inner[1], f"{name}: {key}") for key, one in value.items()]
        else:
            parts = [(one, inner[0], name) for one in value] if origin is list else []
    return next((wrong for part in parts if (wrong := mismatch(*part))), "")


def is_plain(value: Any, kind: type) -> bool:
    """Whether a value is of a type; any number but true and false is a float."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind)

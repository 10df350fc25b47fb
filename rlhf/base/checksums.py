"""SHA256SUMS: what the files of a model or of a checkpoint held when they were written.

It has the format of the program sha256sum, so `sha256sum --check SHA256SUMS` in such a directory
says the same. No torch here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.files import read_small_file, special_kind
from rlhf.base.log import announced

SUMS = "SHA256SUMS"


def hash_file(file: Path) -> str:
    """The SHA-256 of a file's content, as 64 hexadecimal digits.

    Raises: OSError, also for a pipe or a device.
    """
    if special := special_kind(file):
        raise OSError(f"{file}: this is {special}, not a file")
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def files_below(directory: Path) -> list[str]:
    """The names of all files in a directory and below it, relative to it, in order."""
    files = (file for file in directory.rglob("*") if file.is_file() and file.name != SUMS)
    return sorted(str(file.relative_to(directory)) for file in files)


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The hash of each of these files; "" for one that cannot be read."""
    hashes = {}
    for name in names:
        try:
            hashes[name] = hash_file(directory / name)
        except (OSError, ValueError):  # ValueError: a NUL in the name
            hashes[name] = ""
    return hashes


def write_sums(directory: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS.

    Args: hashes: of the files, by their names relative to the directory, where they are known.
    """
    hashes = hash_files(directory, files_below(directory)) if hashes is None else hashes
    text = "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))
    (directory / SUMS).write_text(text, encoding="utf-8")


def read_sums(directory: Path) -> dict[str, str]:
    """The hashes of SHA256SUMS by file name; empty where the directory has no such file.

    What is damaged gives a name or a hash that no file has.
    """
    try:
        text = read_small_file(directory / SUMS, errors="replace")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return {SUMS: "unreadable"}
    lines = (line.partition("  ") for line in text.split("\n") if line)
    # a name that leads out of the directory is none that was written
    return {name if is_below(name) else SUMS: digest for digest, _, name in lines}


def is_below(name: str) -> bool:
    """Whether a relative name stays in its directory."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def damaged_files(directory: Path, names: Iterable[str] | None = None) -> list[str]:
    """The files that are not what SHA256SUMS says. Args: names: check only these."""
    expected = read_sums(directory)
    checked = expected if names is None else names
    hashes = hash_files(directory, checked)
    return [name for name in checked if hashes[name] != expected.get(name)]


def check_model(directory: Path) -> None:
    """Refuse a model whose files have changed since it was saved; it may have no SHA256SUMS.

    Raises: UserError that names the file.
    """
    with announced(f"comparing {directory} with its {SUMS}"):
        damaged = damaged_files(directory)
    if damaged:
        raise UserError(
            f"{directory / damaged[0]}: it is not the file that was saved ({SUMS}): train the "
            f"model again with fresh=true, or delete {SUMS} if you changed the model yourself"
        )

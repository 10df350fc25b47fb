"""Whether the data files of a finished run are those that it was trained on. Opens no file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.config.schema import Data
from rlhf.data.files import find_files


def sizes_and_times(data: Data) -> dict[str, list[float]]:
    """Bytes and time (s) of each file of the sources that are on this disk."""
    found = {}
    for source in data.sources.values():
        with contextlib.suppress(ValueError, OSError):  # a hub id, or gone: others say so
            for file in find_files(source.path).files:
                state = file.stat()
                found[str(file.resolve())] = [float(state.st_size), float(int(state.st_mtime))]
    return found


def changed_files(before: Mapping[str, Sequence[float]], data: Data) -> list[str]:
    """The names of the files that are not as they were; in another folder they may be.

    Args: before: as `sizes_and_times` gave them.
    """
    known = {(Path(file).name, *state) for file, state in before.items()}
    now = [(Path(file).name, state) for file, state in sizes_and_times(data).items()]
    return sorted({name for name, state in now if (name, *state) not in known})

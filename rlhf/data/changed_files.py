"""Whether the data files of a finished run are those that it was trained on. Opens no file."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.config.schema import Data
from rlhf.data.files import SAVED, find_files, kind_of_source


def sizes_and_times(data: Data) -> dict[str, list[float]]:
    """Bytes and time (s) of each file of the sources that are on this disk."""
    found = {}
    paths = [source.path for source in data.sources.values()]
    for source in data.sources.values():
        if source.eval_split and kind_of_source(source.path) not in ("", SAVED):
            paths.append(source.eval_split)  # else it is the name of a split
    for path in paths:
        with contextlib.suppress(ValueError, OSError):  # a hub id, a split, or gone: others say so
            for file in find_files(path).files:
                state = file.stat()
                found[str(file.resolve())] = [float(state.st_size), float(int(state.st_mtime))]
    return found


def changed_files(before: Mapping[str, Sequence[float]], data: Data) -> list[str]:
    """The names of the files that are not as they were, are new, or are not there any more; in
    another folder they may be.

    Args: before: as `sizes_and_times` gave them.
    """
    known = {(Path(file).name, *state) for file, state in before.items()}
    now = {(Path(file).name, *state) for file, state in sizes_and_times(data).items()}
    differ = known ^ now if now else set()  # of data that are not on this disk others tell
    return sorted({str(name) for name, *_ in differ})

"""Cache what is computed from the data: arrow files in the cache of the `datasets` library."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.checksums import damaged_files, read_sums, write_sums
from rlhf.base.errors import UserError
from rlhf.base.files import remove
from rlhf.base.log import log
from rlhf.base.processors import usable_cores

if TYPE_CHECKING:
    import datasets

Columns = dict[str, list[Any]]  # a batch of rows, column by column
LARGE = 20_000  # rows from which on several processes share the work


def digest(*parts: str) -> str:
    """A key for the cache: 32 hexadecimal digits that depend on all parts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def cache_folder() -> Path:
    """The directory of the cache, which is made if it does not exist.

    Raises: UserError where it cannot be written.
    """
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"the cache of data {folder} cannot be written ({error.strerror}): set HOME, or "
            "HF_DATASETS_CACHE alone, to a folder that can"
        ) from None
    return folder


def cached_map(
    table: datasets.Dataset,
    function: Callable[[Columns], dict[str, Any]],
    features: datasets.Features,
    key: str,
    description: str,
    workers: int | None,
) -> datasets.Dataset:
    """`table.map(function)` in several processes; computed once, then read from the cache.

    Args:
        function: from a batch of rows to the columns of the new rows.
        key: the name in the cache. It must depend on the table's content, on all settings, and on
            the code of `function`.
        description: label of the progress bar.
        workers: number of processes for a large table; None = one per usable core, at most 8.
    """
    from filelock import FileLock

    folder = cache_folder()
    large = len(table) > LARGE
    show_progress(large)
    processes = min(workers or min(usable_cores(), 8), len(table)) if large else None
    # another process of this run, or another run, may be computing the same: wait, then read it
    with FileLock(folder / f"{key}.lock"):
        prepared = folder / key
        remove_damaged(prepared)
        prepared.mkdir(exist_ok=True)
        mapped = table.map(
            function,
            batched=True,
            remove_columns=table.column_names,
            features=features,
            num_proc=processes,
            cache_file_name=str(prepared / "rows.arrow"),
            new_fingerprint=key,
            desc=description,
        )
        if not read_sums(prepared):
            write_sums(prepared)
        return mapped


def remove_damaged(prepared: Path) -> None:
    """Delete prepared rows that are not what was written, or not complete: they are made again."""
    sums = read_sums(prepared)
    damaged = damaged_files(prepared)
    if damaged:
        log.warning(f"{prepared / damaged[0]}: not what was written; it is made again")
    if damaged or not sums:  # without sums: its maker was killed
        remove(prepared)


def show_progress(wanted: bool) -> None:
    """Switch the progress bars of the `datasets` library on or off."""
    import datasets

    if wanted:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()

"""Open a source as it is: a file, a directory of `save_to_disk`, or a data set of the hub."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from rlhf.base.errors import UserError
from rlhf.base.log import first_line, is_listening
from rlhf.config.schema import Source
from rlhf.data.cache import show_progress

if TYPE_CHECKING:
    import datasets

BUILDERS = {  # of the `datasets` library; a .jsonl file is read line by line: one may be broken
    ".jsonl": "text",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
BIG_FILE = 10**8  # bytes; reading it shows a progress bar


class RawTable(NamedTuple):
    """The rows of a source before any conversion."""

    table: datasets.Dataset
    by_line: bool  # each row is a line of a .jsonl file, in the column `text`


def open_source(name: str, source: Source, split: str) -> RawTable:
    """The rows of a split of a source.

    Args: name: the source's key in `data.sources`.
    Raises: UserError that names the source and what is wrong with it.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
    file = Path(source.path).expanduser()
    suffix = Path(source.path.removesuffix(".gz")).suffix
    if not file.exists() and suffix not in BUILDERS and source.path[:1] not in "/.~":
        return RawTable(_open_hub(name, source, split), by_line=False)
    if file.is_dir():
        return RawTable(_open_directory(name, source, split, file), by_line=False)
    where = f"data.sources.{name}.path={source.path}"
    if not file.is_file():
        raise UserError(f"{where}: no such file")
    if not file.stat().st_size:
        raise UserError(f"{where}: the file is empty")
    if suffix not in BUILDERS:
        raise UserError(
            f"{where}: give a file ending in {', '.join(BUILDERS)} (.gz too), a directory written"
            " by save_to_disk, or a hub id"
        )
    try:
        return _open_file(file, suffix, source)
    except Exception as error:  # the library wraps the causes in its own errors, or names none
        raise UserError(f"{where}: {_what_is_wrong(file, suffix, error)}") from None


# --- files and directories


def _open_file(file: Path, suffix: str, source: Source) -> RawTable:
    import datasets

    show_progress(file.stat().st_size > BIG_FILE)
    builder = "text" if suffix == ".json" and _holds_lines(file) else BUILDERS[suffix]
    options = _csv_as_text(file, source) if builder == "csv" else {}
    table = datasets.load_dataset(builder, data_files=str(file), split="train", **options)
    return RawTable(table, by_line=builder == "text")


def _open_directory(name: str, source: Source, split: str, directory: Path) -> datasets.Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise UserError(
            f"data.sources.{name}.path={source.path}: not a directory written by save_to_disk"
            f" ({first_line(error)})"
        ) from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {source.split: saved}
    if split not in splits:
        raise UserError(
            f"data.sources.{name}: {source.path} has no split {split}; it has {', '.join(splits)}"
        )
    return splits[split]


def _open_compressed(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")  # type: ignore[return-value]


def _holds_lines(file: Path) -> bool:
    """Whether a .json file has an object in each line, as .jsonl files do."""
    with _open_compressed(file) as lines:
        try:
            return isinstance(json.loads(lines.readline()), dict)
        except ValueError:
            return False


def _csv_as_text(file: Path, source: Source) -> dict[str, Any]:
    """Arguments with which a .csv file's fields stay strings, also "NA" and "42".

    An empty field is null. Scores are numbers.
    """
    import datasets
    import pandas

    scores = [source.columns.get(name, name) for name in ("score_a", "score_b")]
    columns = pandas.read_csv(file, nrows=0).columns
    features = {name: datasets.Value("float64" if name in scores else "string") for name in columns}
    return {"features": datasets.Features(features), "keep_default_na": False, "na_values": [""]}


def _what_is_wrong(file: Path, suffix: str, error: BaseException) -> str:
    """Why a file cannot be read: the line that is not UTF-8 or JSON, else the library's words."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, OSError):
        return first_line(error)
    if suffix != ".parquet":
        with _open_compressed(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as problem:
                    return f"line {number} is not UTF-8: {problem}"
    if suffix == ".json":
        with _open_compressed(file) as content:
            try:
                json.load(content)
            except ValueError as problem:
                return f"not JSON ({problem})"
    if "corresponds to no data" in str(error):
        return "the file is empty"
    return first_line(error)


# --- the hub


def _open_hub(name: str, source: Source, split: str) -> datasets.Dataset:
    """A split of a data set of the hub, or of the cache when the hub does not answer."""
    import datasets
    import huggingface_hub

    # without this check the library would try for half a minute
    if not datasets.config.HF_HUB_OFFLINE and not _hub_answers():
        datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    show_progress(True)
    try:
        return _load_from_hub(source, split)
    except Exception as error:
        text = first_line(error)
        if "nknown split" in text:
            raise UserError(f"data.sources.{name}.split={split}: {text}") from None
        reason = "cannot be loaded"
        if datasets.config.HF_HUB_OFFLINE:
            reason = "no such file, not in the cache, and the hub does not answer"
        raise UserError(f"data.sources.{name}.path={source.path}: {reason}: {text}") from None


def _load_from_hub(source: Source, split: str) -> datasets.Dataset:
    import datasets

    try:
        return datasets.load_dataset(source.path, source.config, split=split)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        # the data set is a program, which the library does not run; the hub has its rows as files
        return datasets.load_dataset(
            source.path, source.config, split=split, revision="refs/convert/parquet"
        )


def _hub_answers() -> bool:
    """Whether the hub is reachable; where a proxy is set, whether the proxy is."""
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    return is_listening(proxy or os.environ.get("HF_ENDPOINT", "https://huggingface.co"))

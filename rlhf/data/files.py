"""Open a source as it is: files, a directory of `save_to_disk`, or a data set of the hub."""

from __future__ import annotations

import bisect
import functools
import glob
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.base.errors import UserError
from rlhf.base.files import special_kind
from rlhf.base.locations import BUILTIN, hub_id_of, is_local
from rlhf.base.log import first_few, first_line, hub_answers
from rlhf.config.schema import Data, Source
from rlhf.data.cache import cache_folder, digest, show_progress
from rlhf.data.text_files import (
    MARK_BYTES,
    SEPARATORS,
    check_csv,
    check_sizes,
    holds_lines,
    open_compressed,
    problem_at_start,
    separator_of,
    suffix_of,
    what_is_wrong,
)

if TYPE_CHECKING:
    import datasets

BUILDERS = {  # of the `datasets` library; a .jsonl file is read line by line: one may be broken
    ".jsonl": "text",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
}
ENDINGS = f"{', '.join(BUILDERS)} (.gz too)"
BIG_FILE = 10**8  # bytes; reading it shows a progress bar
SAVED = "a directory of save_to_disk"
METADATA = ("dataset_info.json", "dataset_infos.json")  # beside the data of many folders


class RawTable(NamedTuple):
    """The rows of a source before any conversion."""

    table: datasets.Dataset
    by_line: bool  # each row is a line of a .jsonl file, in the column `text`
    files: list[str]  # that the rows come from, in their order; else the path of the source
    starts: list[int]  # number of the first row of each file
    not_read: list[str]  # other files and folders beside them
    separators: list[str] = []  # of .csv files, in words, where there are others than commas

    def place(self, row: int) -> str:
        """Where a row is, for messages: "line 3 of DIR/b.jsonl"."""
        file = bisect.bisect_right(self.starts, row) - 1
        number = row - self.starts[file] + 1
        return f"{'line' if self.by_line else 'row'} {number} of {self.files[file]}"


class DataFiles(NamedTuple):
    """What a folder or a pattern holds."""

    files: list[Path]  # of one kind, sorted by name
    not_read: list[str]  # other files and folders


def open_source(name: str, source: Source, split: str, most_row: int) -> RawTable:
    """The rows of a split of a source.

    Args: name: the source's key in `data.sources`.  most_row: bytes of a row in a file of text.
    Raises: UserError that names the source and what is wrong with it.
    """
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised as well
    path = Path(source.path).expanduser()
    if _is_hub_id(source.path):
        return RawTable(_open_hub(name, source, split), False, [source.path], [0], [])
    if _is_saved(path):
        return RawTable(_open_directory(name, source, split, path), False, [source.path], [0], [])
    key = "eval_split" if source.path == source.eval_split else "path"
    try:
        found = find_files(source.path)
        cache_folder()  # the library's own message names no folder
        return _open_files(found, source, most_row)
    except UserError:  # of the cache, not of the file
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"data.sources.{name}.{key}={source.path}: {error}") from None


# --- files


def kind_of_source(path: str) -> str:
    """What a path names, in words; "" for a hub id, and where nothing is there."""
    file = Path(path).expanduser()
    if file.is_file():
        return "a file"
    if file.is_dir():
        return SAVED if _is_saved(file) else "a folder of files"
    return "a pattern of files" if glob.has_magic(path) else ""


def check_files(data: Data) -> list[str]:
    """Sources on this disk that are not there or hold no files, a line each. Opens no file."""
    lines = []
    for name, source in data.sources.items():
        path = source.path
        if path.startswith(BUILTIN) or _is_hub_id(path) or _is_saved(Path(path).expanduser()):
            continue
        try:
            find_files(path)
        except (ValueError, OSError) as error:
            lines.append(f"data.sources.{name}.path={path}: {error}")
    return lines


def find_files(path: str) -> DataFiles:
    """The files that a path names: one file, those in a folder, or those that match a pattern.

    Raises: ValueError with what is wrong.
    """
    file = Path(path).expanduser()
    if file.is_file():
        if suffix_of(file) not in BUILDERS:
            raise ValueError(
                f"give a file ending in {ENDINGS}, a folder or pattern of such files, a directory"
                " written by save_to_disk, or a hub id"
            )
        return DataFiles([file], [])
    if kind := special_kind(file):
        raise ValueError(f"this is {kind}, not a file")
    if "://" in path:
        raise ValueError(f"an address on the web is not read: {download_of(path)}")
    if file.is_dir():
        entries = sorted(entry for entry in file.iterdir() if not entry.name.startswith("."))
    elif glob.has_magic(path):
        entries = sorted(Path(match) for match in glob.glob(str(file), recursive=True))
        if not entries:
            raise ValueError("no file matches")
    else:
        raise ValueError("no such file" + ("" if file.is_absolute() else f" in {Path.cwd()}"))
    files, not_read = [], []
    for entry in entries:
        if suffix_of(entry) in BUILDERS and entry.is_file() and entry.name not in METADATA:
            files.append(entry)
        else:
            not_read.append(f"{entry.name}/" if entry.is_dir() else entry.name)
    if not files:
        there = f"there are {first_few(not_read)}" if not_read else "the folder is empty"
        raise ValueError(f"no file ends in {ENDINGS}; {there}")
    examples = {suffix_of(file): file.name for file in reversed(files)}  # the first of each kind
    if len(examples) > 1:
        kinds = ", ".join(sorted(examples.values()))
        raise ValueError(f"files of several kinds ({kinds}): give a source for each kind")
    return DataFiles(files, not_read)


def download_of(url: str) -> str:
    """What to give in place of an address on the web."""
    if hub := hub_id_of(url):
        return f"give the hub id: {hub}"
    return "give a hub id (OWNER/NAME), or download it and give the path of the file or folder"


def _open_files(found: DataFiles, source: Source, most_row: int) -> RawTable:
    """The rows of all files, one file after the other. Raises: ValueError that names the file."""
    builders, tables = [], []
    for file in found.files:
        name = f"{file}: " if len(found.files) > 1 else ""
        if problem := problem_at_start(file):
            raise ValueError(name + problem)
        try:
            check_sizes(file, most_row)
            builders.append(_builder(file))
            tables.append(_open_file(file, builders[-1], source, most_row))
        except Exception as error:  # the library wraps the causes in its own, or names none
            raise ValueError(name + what_is_wrong(file, suffix_of(file), error)) from None
        if builders[-1] != builders[0]:
            raise ValueError(
                f"of {found.files[0]} and {file} one has a row in each line, and one a list of"
                " rows: give a source for each kind"
            )
    starts = [0, *itertools.accumulate(len(table) for table in tables)][:-1]
    files = [str(file) for file in found.files]
    table = _concatenate(tables, found.files)
    used = {separator_of(file) for file in found.files if suffix_of(file) == ".csv"} - {","}
    separators = [SEPARATORS[separator] for separator in sorted(used)]
    return RawTable(table, builders[0] == "text", files, starts, found.not_read, separators)


def _builder(file: Path) -> str:
    suffix = suffix_of(file)
    return "text" if suffix == ".json" and holds_lines(file) else BUILDERS[suffix]


def _open_file(file: Path, builder: str, source: Source, most_row: int) -> datasets.Dataset:
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would ask the hub for each local file
    show_progress(file.stat().st_size > BIG_FILE)
    options: dict[str, Any] = {}
    if builder == "csv":
        options = _csv_as_text(file, source, most_row)
    if builder == "text":
        options = {"encoding_errors": MARK_BYTES}
    pattern = glob.escape(str(file))  # the library takes it for one
    load = functools.partial(
        datasets.load_dataset, builder, data_files=pattern, split="train", **options
    )
    try:
        table = load()
    except Exception:  # of any kind: the library's own cache of this file may be damaged
        table = load(download_mode=datasets.DownloadMode.FORCE_REDOWNLOAD)
    return _dates_as_text(table, file) if builder == "json" else table


def _dates_as_text(table: datasets.Dataset, file: Path) -> datasets.Dataset:
    """The table of a .json file with texts where the library has made times of them.

    JSON has no dates; "1999-05-04" as a time would read "1999-05-04 00:00:00".
    """
    import datasets
    import pyarrow

    def holds_times(kind: pyarrow.DataType) -> bool:
        inside = (kind.field(i).type for i in range(kind.num_fields))  # of an object or a list
        return pyarrow.types.is_temporal(kind) or any(map(holds_times, inside))

    names = table.column_names
    times = [one.name for one in table.features.arrow_schema if holds_times(one.type)]
    if not times:
        return table
    before = table._fingerprint
    with open_compressed(file) as content:
        rows = json.load(content)
    for name in times:
        texts = datasets.Dataset.from_dict({name: [row.get(name) for row in rows]})
        table = datasets.concatenate_datasets([table.remove_columns(name), texts], axis=1)
    table = table.select_columns(names)
    table._fingerprint = digest(before, "dates as text")
    return table


def media_columns(table: datasets.Dataset) -> list[str]:
    """The columns of images, sounds and videos, which would be decoded and are not read."""

    def holds_media(feature: Any) -> bool:
        while hasattr(feature, "feature"):  # a list
            feature = feature.feature
        return hasattr(feature, "decode")

    return [name for name, feature in table.features.items() if holds_media(feature)]


def _concatenate(tables: list[datasets.Dataset], files: list[Path]) -> datasets.Dataset:
    """One table with the columns of all; what a file does not have is null.

    Raises: ValueError that names the file whose columns have other types.
    """
    import datasets
    import pyarrow

    if len(tables) == 1:
        return tables[0]
    schema = pyarrow.schema([])
    for table, file in zip(tables, files):
        try:
            own = table.features.arrow_schema.remove_metadata()
            schema = pyarrow.unify_schemas([schema, own], promote_options="permissive")
        except pyarrow.ArrowException as error:
            raise ValueError(
                f"{file} does not fit the files before it: {first_line(error)}"
            ) from None
    features = datasets.Features.from_arrow_schema(schema)
    same_types = []
    for table in tables:
        own_features = datasets.Features({name: features[name] for name in table.column_names})
        same_types.append(table if table.features == own_features else table.cast(own_features))
    together = datasets.concatenate_datasets(same_types)
    together._fingerprint = digest(*(table._fingerprint for table in tables))
    return together


# --- directories of save_to_disk


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote a directory, in whole or in part."""
    marks = ("state.json", "dataset_dict.json")
    return path.is_dir() and (any((path / m).exists() for m in marks) or any(path.glob("*.arrow")))


def _open_directory(name: str, source: Source, split: str, directory: Path) -> datasets.Dataset:
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory))
    except Exception as error:
        raise UserError(
            f"data.sources.{name}.path={source.path}: not a directory written by save_to_disk"
            f" ({first_line(error)})"
        ) from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split not in splits:
        raise UserError(
            f"data.sources.{name}: {source.path} has no split {split}; it has {', '.join(splits)}"
        )
    return splits[split].with_format(None)  # not the tensors of a format that it is saved with


def _csv_as_text(file: Path, source: Source, most_row: int) -> dict[str, Any]:
    """Arguments with which a .csv file's fields stay strings, also "NA" and "42".

    An empty field is null. Scores are numbers.
    """
    import datasets
    import pandas

    separator = separator_of(file)
    check_csv(file, separator, most_row)
    scores = [source.columns.get(name, name) for name in ("score_a", "score_b")]
    columns = pandas.read_csv(file, nrows=0, sep=separator, encoding_errors=MARK_BYTES).columns
    features = {name: datasets.Value("float64" if name in scores else "string") for name in columns}
    texts = {"sep": separator, "keep_default_na": False, "na_values": [""]}
    texts["encoding_errors"] = MARK_BYTES
    return {"features": datasets.Features(features), **texts}


# --- the hub


def _is_hub_id(path: str) -> bool:
    file = Path(path).expanduser()
    return not (is_local(path) or suffix_of(file) in BUILDERS or glob.has_magic(path))


def _open_hub(name: str, source: Source, split: str) -> datasets.Dataset:
    """A split of a data set of the hub, or of the cache when the hub does not answer."""
    import datasets
    import huggingface_hub

    # without this check the library would try for half a minute
    if not datasets.config.HF_HUB_OFFLINE and not hub_answers():
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

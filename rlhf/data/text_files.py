"""What is wrong with a text file before its rows are read: its encoding, its fields, its JSON."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import shlex
import zlib
from pathlib import Path
from typing import IO

from rlhf.base.errors import UserError
from rlhf.base.log import first_line, plural
from rlhf.base.model_files import GIT_LFS
from rlhf.data.formats.rows import NOT_UTF8, first_repeated

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # between the fields of a .csv file
BROKEN = (OSError, EOFError, zlib.error)  # a file that cannot be read, or a .gz that is cut off
MARK_BYTES = "rlhf-mark"  # the name of `_mark_byte`, as `errors` of open()


def _mark_byte(error: UnicodeError) -> tuple[str, int]:
    """Put a mark in place of a byte that is not UTF-8, by which its line is found."""
    assert isinstance(error, UnicodeDecodeError)
    return NOT_UTF8, error.start + 1


codecs.register_error(MARK_BYTES, _mark_byte)


def suffix_of(file: Path) -> str:
    """The ending that says the kind of a file: ".jsonl" for a.jsonl and a.jsonl.gz."""
    return Path(file.name.removesuffix(".gz")).suffix


def open_compressed(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix == ".gz" else open(file, "rb")  # type: ignore[return-value]


def problem_at_start(file: Path) -> str:
    """What the first bytes of a file show to be wrong with it; "" where they show nothing."""
    if not file.stat().st_size:
        return "the file is empty"
    try:
        with open_compressed(file) as content:
            start = content.read(100)
    except BROKEN as error:
        return first_line(error)
    if start.startswith(GIT_LFS):
        return "a Git LFS pointer, not the file itself: run git lfs pull there"
    if suffix_of(file) == ".parquet":
        return ""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"the text is UTF-16, not UTF-8: {_convert_command(file, 'UTF-16')}"
    for zeros, encoding in ((start[1::2], "UTF-16LE"), (start[::2], "UTF-16BE")):
        if any(start) and len(start) > 3 and not any(zeros):
            return f"the text is UTF-16, not UTF-8: {_convert_command(file, encoding)}"
    return ""


def _convert_command(file: Path, encoding: str) -> str:
    """The command that converts a file to UTF-8."""
    name = str(file)
    source = f"zcat {shlex.quote(name)} | iconv" if file.suffix == ".gz" else "iconv"
    last = "" if file.suffix == ".gz" else f" {shlex.quote(name)}"
    new = shlex.quote(f"utf8-{file.name.removesuffix('.gz')}")
    return f"convert it with  {source} -f {encoding} -t UTF-8{last} > {new}"


def separator_of(file: Path) -> str:
    """What is between the fields of a .csv file: a comma, or what its header has in its place."""
    with open_compressed(file) as content:
        header = content.readline()
    return next((mark for mark in SEPARATORS if mark.encode() in header), ",")


def check_csv(file: Path, separator: str) -> None:
    """Raises: UserError for a column that is there twice, and for the first row that has another
    number of fields than the header: its texts cannot be assigned to columns."""
    fix = (
        "put a text that has a separator, a line break or a quote into quotes, and double the"
        ' quotes inside ("")'
    )
    csv.field_size_limit(2**31 - 1)
    with open_compressed(file) as content:
        lines = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
        rows = csv.reader(lines, delimiter=separator, strict=True)
        line = 1
        try:
            header = next(rows, [])
            if twice := first_repeated(header):
                raise UserError(f"line 1: the column {twice} is there twice")
            line = rows.line_num + 1
            for fields in rows:
                if len(fields) != len(header) and "".join(fields).strip():
                    raise UserError(
                        f"line {line} has {plural(len(fields), 'field')}, and the header has"
                        f" {len(header)}: {fix}"
                    )
                line = rows.line_num + 1
        except csv.Error:
            raise UserError(
                f"line {line}: a quote is not closed, or text follows a closing quote: {fix}"
            ) from None


def what_is_wrong(file: Path, suffix: str, error: BaseException) -> str:
    """Why a file cannot be read: the line that is not UTF-8 or JSON, else the library's words."""
    if isinstance(error, UserError):  # in our own words
        return str(error)
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, BROKEN):
        return first_line(error)
    if suffix != ".parquet":
        with open_compressed(file) as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as problem:
                    fix = _convert_command(file, "ISO-8859-1")
                    byte = f"byte 0x{line[problem.start]:02x}"
                    return f"line {number} is not UTF-8 ({byte}); if it is Latin-1, {fix}"
    if suffix == ".json":
        with open_compressed(file) as content:
            try:
                json.load(content)
            except ValueError as problem:
                return f"not JSON ({problem})"
            except RecursionError:
                return "its JSON is nested too deeply"
    if "corresponds to no data" in str(error):
        return "the file is empty"
    return first_line(error)

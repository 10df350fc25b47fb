"""What is wrong with a text file before its rows are read: its encoding, its fields, its JSON."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rlhf.base.errors import UserError
from rlhf.base.log import first_line, plural
from rlhf.base.model_files import GIT_LFS
from rlhf.data.formats.rows import NOT_UTF8, first_repeated

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # between the fields of a .csv file
# A compressed file that unpacks to more than MOST_UNPACKED, and to more than MOST_RATIO times its
# size, holds no text of people: text shrinks to a tenth, a generated one to a fiftieth.
MOST_UNPACKED, MOST_RATIO = 256 * 2**20, 200
MOST_JSON = 2**30  # bytes of a .json file with a list of rows, which is read as a whole
CHUNK = 2**20  # bytes that are looked at at a time
# how files begin that a program has compressed, whatever their ending
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"(\xb5/\xfd": "zstandard",
    b"\x04\x22M\x18": "lz4",
    b"7z\xbc\xaf": "7-zip",
    b"Rar!": "RAR",
}
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
    if kind := next((name for mark, name in COMPRESSED.items() if start.startswith(mark)), None):
        what = "compressed twice" if file.suffix == ".gz" else f"a {kind} file"
        return f"{what}: unpack it, or compress its text with gzip to a name that ends in .gz"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return f"the text is UTF-16, not UTF-8: {_convert_command(file, 'UTF-16')}"
    for zeros, encoding in ((start[1::2], "UTF-16LE"), (start[::2], "UTF-16BE")):
        if any(start) and len(start) > 3 and not any(zeros):
            return f"the text is UTF-16, not UTF-8: {_convert_command(file, encoding)}"
    return ""


def holds_lines(file: Path) -> bool:
    """Whether a .json file has an object in each line, as .jsonl files do."""
    with open_compressed(file) as lines:
        first = lines.readline(CHUNK)
    if len(first) == CHUNK:  # a long first row
        return first.lstrip().startswith(b"{")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def check_sizes(file: Path, most_row: int) -> None:
    """Check that the rows of a file can be read in little memory; looks at all of it.

    Args: most_row: bytes of a row; data.max_row_mb.
    Raises: UserError for a row that is longer, and for a file that unpacks to far too much; what
        BROKEN has.
    """
    if suffix_of(file) == ".json" and not holds_lines(file):
        check_json_size(file)
    elif suffix_of(file) == ".parquet":
        check_parquet(file)
    else:
        check_lines(file, most_row)


def check_lines(file: Path, most_row: int) -> None:
    """Look through a file of text in little memory.

    Args: most_row: bytes of a row; data.max_row_mb.
    Raises: UserError for a line that is longer, and for a file that unpacks to far too much; what
        BROKEN has.
    """
    lines, length = 0, 0  # that have ended; bytes of the one that has not
    for chunk in unpacked_chunks(file):
        end = chunk.find(b"\n")
        length += len(chunk) if end < 0 else end
        if end >= 0 and length > most_row:
            break
        if end >= 0:
            lines += chunk.count(b"\n")
            length = len(chunk) - chunk.rfind(b"\n") - 1
    if length > most_row:
        raise UserError(
            f"line {lines + 1} has {length / 2**20:,.1f} MiB, and data.max_row_mb="
            f"{most_row / 2**20:g}: raise it, or cut the text of this row"
        )


def check_json_size(file: Path) -> None:
    """Raises: UserError for a list of rows that is too large to be read as a whole; what BROKEN
    has."""
    size = 0
    for chunk in unpacked_chunks(file):
        size += len(chunk)
        if size > MOST_JSON:
            raise UserError(
                f"a list of rows of more than {MOST_JSON / 2**30:g} GiB, which is read as a whole:"
                " write a row per line instead (jq -c '.[]') and call it .jsonl"
            )


def check_parquet(file: Path) -> None:
    """Raises: UserError for a file that unpacks to far too much, by its footer; what BROKEN has,
    and errors of pyarrow."""
    import pyarrow.parquet  # takes a third of a second, for these files only

    if file.suffix == ".gz":
        for _ in unpacked_chunks(file):
            pass
    with open_compressed(file) as content, pyarrow.parquet.ParquetFile(content) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    check_ratio(file.stat().st_size, sum(group.total_byte_size for group in groups))


def unpacked_chunks(file: Path) -> Iterator[bytes]:
    """The content of a file, piece by piece. Raises: UserError for a file that unpacks to far too
    much; what BROKEN has."""
    packed = file.stat().st_size if file.suffix == ".gz" else 0
    unpacked = 0
    with open_compressed(file) as content:
        while chunk := content.read(CHUNK):
            unpacked += len(chunk)
            if packed:
                check_ratio(packed, unpacked)
            yield chunk


def check_ratio(packed: int, unpacked: int) -> None:
    """Raises: UserError for a file of `packed` bytes that unpacks to far too many."""
    if unpacked > MOST_UNPACKED and unpacked > MOST_RATIO * packed:
        raise UserError(
            f"it has {packed:,} bytes and unpacks to more than {unpacked // 2**20:,} MiB, over"
            f" {MOST_RATIO} times as much: this is no text; unpack and look at it"
        )


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


def check_csv(file: Path, separator: str, most_row: int) -> None:
    """Args: most_row: characters of a field.
    Raises: UserError for a column that is there twice, and for the first row that has another
        number of fields than the header: its texts cannot be assigned to columns."""
    fix = (
        "put a text that has a separator, a line break or a quote into quotes, and double the"
        ' quotes inside ("")'
    )
    csv.field_size_limit(most_row)
    with open_compressed(file) as content:
        lines = io.TextIOWrapper(content, encoding="utf-8-sig", errors=MARK_BYTES, newline="")
        rows = csv.reader(lines, delimiter=separator, strict=True)
        line = 1
        try:
            header = next(rows, [])
            if any(NOT_UTF8 in name for name in header):
                raise UserError(not_utf8(file))
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
        except csv.Error as error:
            if "field limit" in str(error):
                raise UserError(
                    f"line {line}: a field has more than data.max_row_mb={most_row / 2**20:g} MiB:"
                    " raise it, or close the quote that this text begins with"
                ) from None
            raise UserError(
                f"line {line}: a quote is not closed, or text follows a closing quote: {fix}"
            ) from None


def not_utf8(file: Path) -> str:
    """The first line of a file that is not UTF-8, and the fix; "" where there is none."""
    with open_compressed(file) as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as problem:
                fix = _convert_command(file, "ISO-8859-1")
                byte = f"byte 0x{line[problem.start]:02x}"
                return f"line {number} is not UTF-8 ({byte}); if it is Latin-1, {fix}"
    return ""


def what_is_wrong(file: Path, suffix: str, error: BaseException) -> str:
    """Why a file cannot be read: the line that is not UTF-8 or JSON, else the library's words."""
    if isinstance(error, UserError):  # in our own words
        return str(error)
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, BROKEN):
        return first_line(error)
    if suffix != ".parquet" and (problem := not_utf8(file)):
        return problem
    if suffix == ".json":
        with open_compressed(file) as content:
            try:
                json.load(content)
            except ValueError as problem:
                if "integer string conversion" in str(problem):
                    return "a number has more than 4,300 digits"
                return f"not JSON ({problem})"
            except RecursionError:
                return "its JSON is nested too deeply"
    if "corresponds to no data" in str(error):
        return "the file is empty"
    return first_line(error)

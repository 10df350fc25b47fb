"""What a case of the tables of bad inputs is, and the files that it needs."""

from __future__ import annotations

import gzip
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Build = Callable[[], object]  # makes files in the current folder


class BadInput(NamedTuple):
    """A command with something wrong in it, which ends with exit code 2 and one line."""

    name: str
    arguments: list[str]
    words: list[str]  # that the line has
    build: Build | None = None
    # train: train.py.  data: its data alone, as a stage reads them.  load: /load FILE of chat.py.
    # report: python -m rlhf.report
    program: str = "train"
    full: bool = False  # like another one: only in the full matrices


class BadRow(NamedTuple):
    """A file that is read, but for one row, which is counted as unreadable with these words."""

    name: str
    file: str
    words: str
    build: Build


# --- files


def write(name: str, content: str | bytes) -> Build:
    data = content if isinstance(content, bytes) else content.encode()

    def build() -> None:
        file = Path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    return build


def pipe(name: str) -> Build:
    def build() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(name)

    return build


def link(name: str, target: str) -> Build:
    def build() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(target, name)

    return build


def folder(name: str) -> Build:
    return lambda: Path(name).mkdir(parents=True)


def a_socket(name: str) -> Build:
    return lambda: socket.socket(socket.AF_UNIX).bind(name)


def sparse(name: str, size: int) -> Build:
    """A file of NULs that takes no room."""

    def build() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
        os.truncate(name, size)

    return build


def packed(name: str, size: int) -> Build:
    """A .gz file that unpacks to `size` bytes: copies of one packed MiB are a valid file too."""
    return write(name, gzip.compress(b"a" * 2**20, 9) * (size // 2**20))


def parquet(name: str, rows: int, text: str) -> Build:
    def build() -> None:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"prompt": [text * 2**20], "chosen": ["b"]})
        options = {"use_dictionary": False, "compression": "zstd"}
        with pyarrow.parquet.ParquetWriter(name, table.schema, **options) as file:
            for _ in range(rows):
                file.write_table(table)

    return build


def both(*builds: Build) -> Build:
    return lambda: [build() for build in builds]


def pairs(count: int = 20) -> str:
    """Lines of a file that is fine."""
    rows = [{"prompt": f"Question {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def pair(**values: str) -> str:
    """A line of JSON with these values, which are JSON."""
    values = {"prompt": '"Why?"', "chosen": '"So."', "rejected": '"No."'} | values
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}\n"


MIB = 2**20
DEEP = 100_000  # brackets
TABLE = "prompt,chosen,rejected\n" + "".join(f"{i}?,yes,no\n" for i in range(20))
CONFIG = '{"architectures": ["OPTForCausalLM"], "model_type": "opt"}'
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi")
)

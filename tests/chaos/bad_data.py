"""Bad data: files and rows, and the words of the line that each gets."""

from __future__ import annotations

import gzip
import json
import os

from bad_files import (
    DEEP,
    MIB,
    TABLE,
    BadInput,
    BadRow,
    Build,
    a_socket,
    both,
    folder,
    link,
    packed,
    pair,
    pairs,
    parquet,
    pipe,
    write,
)

# --- data


def data(name: str, file: str, *words: str, build: Build | None = None, more: str = "") -> BadInput:
    arguments = ["data=jsonl", f"data.sources.mine.path={file}", *more.split()]
    return BadInput(name, arguments, ["data.sources.mine", *words], build, "data")


REFUSE = "data.on_bad_row=refuse"
DATA = [
    data("no data", "a.jsonl", "no such file in"),
    data("data elsewhere", "https://example.org/a.jsonl", "an address on the web"),
    data("data on a page of the hub", "https://huggingface.co/datasets/a/b", "the hub id: a/b"),
    data("data in a pipe", "a.jsonl", "this is a pipe", build=pipe("a.jsonl")),
    data("endless data", "/dev/zero", "this is a device"),
    data(
        "a link to endless data", "a.jsonl", "this is a device", build=link("a.jsonl", "/dev/zero")
    ),
    data("a socket as data", "a.jsonl", "this is a socket", build=a_socket("a.jsonl")),
    data("an empty folder as data", "d", "the folder is empty", build=folder("d")),
    data("a folder with a pipe", "d", "no file ends in", build=pipe("d/a.jsonl")),
    data("an unknown ending", "a.xlsx", "give a file ending in", build=write("a.xlsx", "a")),
    data("an empty file", "a.jsonl", "the file is empty", build=write("a.jsonl", "")),
    data("no JSON at all", "a.jsonl", "line 1 of a.jsonl", build=write("a.jsonl", "hello\n")),
    data(
        "a long line",
        "a.jsonl",
        "line 21 has 200.0 MiB",
        "data.max_row_mb=16",
        build=both(
            write("a.jsonl", pairs()), lambda: os.truncate("a.jsonl", len(pairs()) + 200 * MIB)
        ),
    ),
    data(
        "a long line of a table",
        "a.csv",
        "line 22 has",
        "data.max_row_mb=16",
        build=both(write("a.csv", TABLE), lambda: os.truncate("a.csv", len(TABLE) + 40 * MIB)),
    ),
    data(
        "a long field",
        "a.csv",
        "a field has more than data.max_row_mb=1 MiB",
        build=write("a.csv", TABLE + 'a,"' + "yes\n" * MIB),
        more="data.max_row_mb=1",
    ),
    data(
        "a list that is too large",
        "a.json",
        "more than 1 GiB",
        build=both(write("a.json", "[" + " " * 200), lambda: os.truncate("a.json", 2**30 + 1)),
    ),
    data("a gzip bomb", "a.jsonl.gz", "unpacks to more than", build=packed("a.jsonl.gz", 2**30)),
    data("a packed table", "a.csv.gz", "unpacks to more than", build=packed("a.csv.gz", 2**30)),
    data("a packed list", "a.json.gz", "unpacks to more than", build=packed("a.json.gz", 2**30)),
    data(
        "a parquet bomb", "a.parquet", "unpacks to more than", build=parquet("a.parquet", 300, "a")
    ),
    data(
        "a cut .gz",
        "a.jsonl.gz",
        "end",
        build=write("a.jsonl.gz", gzip.compress(pairs().encode())[:60]),
    ),
    data("no .gz", "a.jsonl.gz", "gzipped", build=write("a.jsonl.gz", pairs())),
    data(
        "packed twice",
        "a.jsonl.gz",
        "compressed twice",
        build=write("a.jsonl.gz", gzip.compress(gzip.compress(pairs().encode()))),
    ),
    data(
        "gzip without .gz",
        "a.jsonl",
        "a gzip file",
        build=write("a.jsonl", gzip.compress(pairs().encode())),
    ),
    data("zip", "a.jsonl", "a zip file", build=write("a.jsonl", b"PK\x03\x04" + b"a" * 100)),
    data("no parquet", "a.parquet", "a.parquet", build=write("a.parquet", "PAR1 not really")),
    data("UTF-16", "a.jsonl", "UTF-16", build=write("a.jsonl", pairs().encode("utf-16"))),
    data(
        "a list in Latin-1",
        "a.json",
        "line 1 is not UTF-8",
        build=write("a.json", b'[{"prompt": "\xe9"}]'),
    ),
    data(
        "a header in Latin-1",
        "a.csv",
        "line 1 is not UTF-8",
        build=write("a.csv", b"prompt,caf\xe9\na,b\n"),
    ),
    data(
        "a deep list",
        "a.json",
        "nested too deeply",
        build=write("a.json", '[{"prompt": ' + "[" * DEEP),
    ),
    data(
        "a long number in a list",
        "a.json",
        "4,300 digits",
        build=write("a.json", '[{"prompt": ' + "1" * 5000 + "}]"),
    ),
    data(
        "a ragged table",
        "a.csv",
        "line 2 has 3 fields",
        build=write("a.csv", "prompt,chosen\na,b,c\n"),
    ),
    data(
        "a ragged table with semicolons",
        "a.csv",
        "line 2 has 3 fields, and the header has 2",
        build=write("a.csv", "prompt;chosen\na;b;c\n"),
    ),
    data(
        "a table with one column",
        "a.csv",
        "has the columns prompt|chosen",
        build=write("a.csv", "prompt|chosen\na|b\n"),
    ),
    data(
        "an open quote",
        "a.csv",
        "a quote is not closed",
        build=write("a.csv", 'prompt,chosen\n"a,b\n'),
    ),
    data(
        "a column twice",
        "a.csv",
        "the column prompt is there twice",
        build=write("a.csv", "prompt,prompt\na,b\n"),
    ),
    data("unknown columns", "a.jsonl", "has the columns x", build=write("a.jsonl", '{"x": 1}\n')),
    data(
        "all rows are skipped",
        "a.jsonl",
        "are skipped: 3 chosen equals rejected",
        build=write("a.jsonl", pair(rejected='"So."') * 3),
    ),
    data(
        "no row can be read",
        "a.jsonl",
        "no other row can be read",
        build=write("a.jsonl", pair(prompt="7") * 3),
    ),
    data(
        "one deep row",
        "a.jsonl",
        "line 21 of a.jsonl",
        "nested too deeply",
        build=write("a.jsonl", pairs() + "[" * DEEP),
        more=REFUSE,
    ),
    data(
        "one large number",
        "a.jsonl",
        "line 21 of a.jsonl",
        "chosen is too large for a number",
        build=write("a.jsonl", pairs() + pair(chosen="1" + "0" * 400)),
        more=REFUSE,
    ),
    data(
        "one byte in a table",
        "a.csv",
        "row 21 of a.csv",
        "not UTF-8",
        build=write("a.csv", TABLE.encode() + b"\xe9?,yes,no\n"),
        more=REFUSE,
    ),
    data(
        "one byte in a line",
        "a.jsonl",
        "line 21 of a.jsonl",
        "not UTF-8",
        build=write("a.jsonl", pairs().encode() + b"\xff\n"),
        more=REFUSE,
    ),
    data(
        "a role of 3 million characters",
        "a.jsonl",
        "unknown role",
        "characters)",
        build=write(
            "a.jsonl",
            pairs() + pair(prompt=json.dumps([{"role": "\x1b[2J" * 750_000, "content": "a"}])),
        ),
        more=REFUSE,
    ),
]

BAD_ROWS = [
    BadRow("deep", "a.jsonl", "nested too deeply", write("a.jsonl", pairs() + "[" * DEEP)),
    BadRow(
        "rather deep",
        "a.jsonl",
        "nested too deeply",
        write("a.jsonl", pairs() + pair(x="[" * 500 + "]" * 500)),
    ),
    BadRow(
        "large number",
        "a.jsonl",
        "too large",
        write("a.jsonl", pairs() + pair(chosen="1" + "0" * 400)),
    ),
    BadRow(
        "long number",
        "a.jsonl",
        "4,300 digits",
        write("a.jsonl", pairs() + pair(chosen="1" * 5000)),
    ),
    BadRow(
        "byte of a line", "a.jsonl", "not UTF-8", write("a.jsonl", pairs().encode() + b"\xff\n")
    ),
    BadRow(
        "byte of a table", "a.csv", "not UTF-8", write("a.csv", TABLE.encode() + b"\xe9?,yes,no\n")
    ),
    BadRow(
        "half a pair", "a.jsonl", "surrogate", write("a.jsonl", pairs() + pair(chosen='"\\ud83d"'))
    ),
    BadRow("key twice", "a.jsonl", "there twice", write("a.jsonl", pairs() + pair(x='1, "x": 2'))),
    BadRow(
        "long role",
        "a.jsonl",
        "characters)",
        write(
            "a.jsonl",
            pairs() + pair(prompt=json.dumps([{"role": "\x1b[2J" * 750_000, "content": "a"}])),
        ),
    ),
]

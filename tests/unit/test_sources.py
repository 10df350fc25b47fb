"""Files and rows that cannot be read, and what a stage says of its data."""

# T.. and D.. name the tests and flaws of the survey of DeepSpeed-Chat that a test answers.

from __future__ import annotations

import gzip
import json
import logging
import os
import shutil
from pathlib import Path

import datasets
import pytest
from data_files import jsonl, row, rows
from helpers import composed
from prepared_data import assert_counts_add_up, config

from rlhf.base.errors import UserError
from rlhf.config.choices import BadRow, Format
from rlhf.config.schema import Config, Source
from rlhf.data import load
from rlhf.data.sources import load_sources

pytestmark = pytest.mark.usefixtures("cache")


def broken(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD = json.dumps(row(1)) + "\n"
FILES: list[tuple[str, str | bytes | None, str]] = [
    ("missing.jsonl", None, ".path={path}: no such file"),
    ("empty.jsonl", "", ".path={path}: the file is empty"),
    ("empty.json", "[]", ".path={path}: the file is empty"),
    ("header.csv", "prompt,chosen\n", ".path={path}: the file is empty"),
    (
        "a.txt",
        "hello",
        ".path={path}: give a file ending in .jsonl, .json, .parquet, .csv (.gz too), a folder",
    ),
    (
        "a.json",
        '[{"prompt": 1},\n {]',
        ".path={path}: not JSON (Expecting property name enclosed in double quotes: line 2",
    ),
    ("a.parquet", "hello", ".path={path}: Parquet file size is 5 bytes"),
    (
        "a.csv",
        "prompt,chosen\na,b\na,b,c\n",
        ".path={path}: line 3 has 3 fields, and the header has 2: put a text that has a separator",
    ),
    ("a.jsonl.gz", "no gzip", ".path={path}: "),
    (
        "latin.jsonl",
        b'{"prompt": "caf\xe9"}\n',
        ": no line is a JSON object {{...}}: line 1 of {path}: not UTF-8: save the file as UTF-8",
    ),
    (
        "latin.csv",
        b"prompt,caf\xe9\na,b\n",
        ".path={path}: line 1 is not UTF-8 (byte 0xe9); if it is Latin-1, convert it with  "
        "iconv -f ISO-8859-1 -t UTF-8 {path} > utf8-latin.csv",
    ),
    ("latin.json", b'[{"prompt":\n"caf\xe9"}]', ".path={path}: line 2 is not UTF-8 (byte 0xe9)"),
    (
        "wide.jsonl",
        GOOD.encode("utf-16"),
        ".path={path}: the text is UTF-16, not UTF-8: convert it with  "
        "iconv -f UTF-16 -t UTF-8 {path} > utf8-wide.jsonl",
    ),
    ("wide.csv", "prompt,chosen\na,b\n".encode("utf-16-be"), ".path={path}: the text is UTF-16"),
    ("wide.json", "[1, 2]".encode("utf-16-le"), ".path={path}: the text is UTF-16, not UTF-8"),
    ("pointer.jsonl", "version https://git-lfs.github.com/spec/v1\n", ".path={path}: a Git LFS"),
    ("short.csv", "prompt,chosen,rejected\n\na,b\n", ".path={path}: line 3 has 2 fields, and the"),
    ("index.csv", "prompt,chosen\na,b,c\nd,e,f\n", ".path={path}: line 2 has 3 fields, and the"),
    ("twice.csv", "prompt,chosen,chosen\na,b,c\n", ".path={path}: line 1: the column chosen is"),
    (
        "open.csv",
        'prompt,chosen\na,b\n"c,d\ne,f\n',
        ".path={path}: line 3: a quote is not closed, or text follows a closing quote: put a text",
    ),
    (
        "after.csv",
        'prompt;chosen\n"a\nb";c\n"d" e;f\n',
        ".path={path}: line 4: a quote is not closed, or text follows a closing quote",
    ),
    ("deep.json", "[" * 100_000, ".path={path}: "),
    *(
        (name, gzip.compress(GOOD.encode() * 2000)[:-20], ".path={path}: Compressed file ended")
        for name in ("cut.jsonl.gz", "cut.csv.gz")
    ),
    (
        "columns.jsonl",
        '{"a": 1, "b": 2}\n',
        ": {path} has the columns a, b; give format and columns. Known: prompt, chosen",
    ),
    (
        "blank.jsonl",
        "\n\n  \n",
        ": no line is a JSON object {{...}}: line 1 of {path} is empty",
    ),
    (
        "lines.jsonl",
        "{no\n{\n",
        ": no line is a JSON object {{...}}: line 1 of {path}: not JSON (Expecting property name",
    ),
    (
        "types.jsonl",
        '{"prompt": 3, "chosen": "a"}\n',
        ": line 1 of {path}: prompt is a number, not a string (and no other row can",
    ),
    (
        "types.json",
        '[{"prompt": "a", "chosen": {"b": "c"}}]',
        ": row 1 of {path}: chosen is an object, not a string (and no other row can",
    ),
    (
        "same.jsonl",
        '{"prompt": "a", "chosen": "b", "rejected": "b"}\n' * 3,
        ": all rows of {path} (train) are skipped: 3 chosen equals rejected",
    ),
]


@pytest.mark.parametrize("name, content, expected", FILES, ids=[name for name, _, _ in FILES])
def test_a_file_that_cannot_be_read_gets_one_line(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    name: str,
    content: str | bytes | None,
    expected: str,
) -> None:
    path = tmp_path / name if content is None else broken(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        load_sources(config(mine=path))
    assert str(error.value).startswith(
        "data.sources.mine" + expected.format(path=path)
    ) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_columns_that_are_missing_are_named_with_those_there_are(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"query": "a", "chosen": "b"}])
    with pytest.raises(
        UserError,
        match=(
            rf"data.sources.mine: {file}: format chosen_rejected needs the columns rejected; "
            rf"there are query"
        ),
    ):
        load_sources(config(mine=Source(path=str(file), format=Format.chosen_rejected)))


BAD = [
    ("{not json", "not JSON (Expecting property name"),
    ("[1, 2]", "JSON, but not an object"),
    ('{"prompt": 3, "chosen": "a"}', "prompt is a number, not a string"),
    ('{"prompt": "a"}', "no field chosen"),
    ('{"prompt": "half an emoji \\ud83d", "chosen": "a"}', "a text has \\ud83d, half of a"),
    ("[" * 100_000, "its JSON is nested too deeply"),
]


@pytest.mark.parametrize("line, problem", BAD)
def test_a_bad_row_among_many_is_skipped_and_shown_or_refused(
    tmp_path: Path, line: str, problem: str
) -> None:
    file = broken(
        tmp_path,
        "a.jsonl",
        GOOD
        + "\n"
        + line
        + "\n"
        + line
        + "\n"
        + "".join(json.dumps(r) + "\n" for r in rows(*range(2, 50))),
    )
    data = load_sources(config(mine=file))
    (report,) = data.report
    assert report["skipped"] == {"empty line": 1, "unreadable": 2} and report["rows"] == 52
    assert_counts_add_up(data)
    where = f"data.sources.mine: line 3 of {file}: {problem}"
    assert report["first_unreadable"].startswith(where)
    assert (
        "skipped: 1 empty line, 2 unreadable\n  first unreadable row: " + where
        in load.summarize(data)
    )
    with pytest.raises(UserError) as error:
        load_sources(config(BadRow.refuse, mine=file))
    assert str(error.value).startswith(where)


def stage(name: str, file: Path, *overrides: str) -> Config:
    return composed(
        f"stage={name}",
        "data=jsonl",
        f"data.sources.mine.path={file}",
        "data.eval_share=0.2",
        *overrides,
    )


def test_a_run_says_what_it_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T22: nobody has to guess what a run was trained on."""
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    file = jsonl(tmp_path / "a.jsonl", rows(*range(1200)) + rows(1))
    with caplog.at_level(logging.INFO, "rlhf"):
        data = load.open_data(stage("rm", file), tmp_path)
    assert json.loads((tmp_path / "data.json").read_text()) == data.report
    sizes = (
        f"sft {len(data.sft)}, rm {len(data.rm)}, ppo {len(data.ppo)}, eval "
        f"{data.report[0]['eval']}"
    )
    assert f"mine/train: 1,201 rows: {sizes}; skipped: 1 duplicate row" in caplog.text


def test_the_copy_of_a_file_that_its_library_keeps_may_be_damaged(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows(*range(30)))
    whole = load_sources(config(mine=file))
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    shutil.rmtree(cache / "rlhf")  # our own of prepared rows
    [copy] = cache.rglob("*.arrow")
    os.truncate(copy, 10)
    assert load_sources(config(mine=file)).sft[:] == whole.sft[:]


def test_a_stage_without_rows_says_why(tmp_path: Path) -> None:
    one_answer = jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"{i}?", "response": "a"} for i in range(100)]
    )
    assert len(load.open_data(stage("sft", one_answer), tmp_path).sft) > 5
    lack = "data=mine: no rows for rm: none of the 100 rows has a rejected answer; SFT trains on"
    with pytest.raises(UserError, match=lack):
        load.open_data(stage("rm", one_answer), tmp_path)
    with pytest.raises(UserError, match="data=mine: no rows.* sft.*: there is one row only: add"):
        load.open_data(stage("sft", jsonl(tmp_path / "b.jsonl", rows(1))), tmp_path)

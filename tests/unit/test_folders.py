"""A folder of files, or a pattern, as a source: which files, in which order, what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest
from data_files import Record, jsonl, rows
from helpers import composed
from prepared_data import assert_counts_add_up, config, questions_of, saved

from rlhf.base.errors import UserError
from rlhf.config.choices import BadRow
from rlhf.config.schema import Source
from rlhf.data.files import ENDINGS, check_files
from rlhf.data.load import check_same, summarize
from rlhf.data.sources import load_sources
from rlhf.runs.directory import write_json
from rlhf.runs.run_files import DATA

pytestmark = pytest.mark.usefixtures("cache")

PARTS = [rows(*range(40)), rows(*range(40, 70)), rows(*range(70, 120))]


def write(file: Path, records: list[Record]) -> None:
    table, text = (
        datasets.Dataset.from_list(records),
        "".join(f"{json.dumps(r)}\n" for r in records),
    )
    match file.name.split(".", 1)[1]:
        case "jsonl" | "lines.json":
            file.write_text(text)
        case "jsonl.gz":
            file.write_bytes(gzip.compress(text.encode()))
        case "json":
            file.write_text(json.dumps(records))
        case "csv":
            table.to_csv(str(file))
        case "parquet":
            table.to_parquet(str(file))


def folder(path: Path, ending: str = "jsonl") -> Path:
    """Three files, written in another order than that of their names."""
    path.mkdir()
    for number in (2, 0, 1):
        write(path / f"{'abc'[number]}.{ending}", PARTS[number])
    return path


def tables(path: Path | str) -> list[list[Record]]:
    data = load_sources(config(mine=path))
    return [table.to_list() for table in (data.sft, data.rm, data.ppo)]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "lines.json", "csv", "parquet"])
def test_the_files_of_a_folder_are_read_one_after_the_other(tmp_path: Path, ending: str) -> None:
    wanted = tables(jsonl(tmp_path / "all.jsonl", [r for part in PARTS for r in part]))
    path = folder(tmp_path / "parts", ending)
    (path / "README.md").write_text("# What this is")
    (path / ".hidden.csv").write_text("x")
    (path / "dataset_infos.json").write_text("{}")
    (path / "more").mkdir()
    assert tables(path) == tables(f"{path}/*.{ending}") == wanted
    data = load_sources(config(mine=path))
    report = data.report[0]
    assert report["files"] == [f"{name}.{ending}" for name in "abc"]
    assert report["not_read"] == ["README.md", "dataset_infos.json", "more/"]
    write_json(tmp_path / DATA, data.report)
    (path / "LICENSE").write_text("new")
    check_same(load_sources(config(mine=path)).report, tmp_path)  # a run may resume
    with pytest.raises(UserError, match="the data have changed"):
        check_same(load_sources(config(mine=path / f"a.{ending}")).report, tmp_path)
    assert summarize(data).splitlines()[1:3] == [
        f"  files: {', '.join(report['files'])}",
        "  not read: README.md, dataset_infos.json, more/",
    ]


def test_a_plain_and_a_compressed_file_are_of_one_kind(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", PARTS[0])
    write(tmp_path / "b.jsonl.gz", PARTS[1])
    assert load_sources(config(mine=tmp_path)).report[0]["rows"] == 70


def test_a_pattern_may_lead_into_folders_and_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    write(tmp_path / "x" / "y" / "a.jsonl", PARTS[0])
    write(tmp_path / "x" / "b[1].jsonl", PARTS[1])
    for path, count in ((f"{tmp_path}/**/*.jsonl", 70), (f"{tmp_path}/x/b[1].jsonl", 30)):
        assert load_sources(config(mine=path)).report[0]["rows"] == count


def test_a_changed_a_new_and_a_renamed_file_change_the_data_of_a_run(tmp_path: Path) -> None:
    """As a single file's change does: a run that is resumed compares data.json."""
    path = folder(tmp_path / "parts")
    reports = [load_sources(config(mine=path)).report]
    assert load_sources(config(mine=path)).report == reports[0]
    write(path / "b.jsonl", rows(*range(200, 230)))
    reports.append(load_sources(config(mine=path)).report)
    write(path / "d.jsonl", rows(300))
    reports.append(load_sources(config(mine=path)).report)
    (path / "d.jsonl").rename(path / "e.jsonl")
    reports.append(load_sources(config(mine=path)).report)
    assert all(reports[i] != reports[j] for i in range(4) for j in range(i))


def test_columns_are_the_union_and_numbers_of_two_types_fit(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{**r, "score": 1} for r in PARTS[0]])
    write(tmp_path / "b.parquet", [{**r, "score": 1.5, "meta": {"x": "y"}} for r in PARTS[1]])
    answer_only = [{"prompt": r["prompt"], "chosen": r["chosen"]} for r in PARTS[2]]
    write(tmp_path / "c.parquet", answer_only)
    data = load_sources(config(mine=tmp_path))
    assert data.report[0]["unread"] == ["score", "meta"]
    assert_counts_add_up(data)
    with_pairs = {r["prompt"].lower() for part in PARTS[:2] for r in part}
    assert set(questions_of(data.rm)) <= with_pairs and set(questions_of(data.sft)) - with_pairs


def test_the_first_rows_are_those_of_all_files(tmp_path: Path) -> None:
    """A column that only the last file has is seen, however long the first one is."""
    write(tmp_path / "a.jsonl", rows(*range(1100)))
    write(tmp_path / "b.jsonl", [{**r, "votes": 3} for r in rows(1100)])
    assert load_sources(config(mine=tmp_path)).report[0]["unread"] == ["votes"]


def test_rows_limits_all_files_together(tmp_path: Path) -> None:
    path = folder(tmp_path / "parts")
    data = load_sources(config(mine=Source(path=str(path), rows=45)))
    assert data.report[0]["rows"] == 45


# --- evaluation files


@pytest.mark.parametrize("held_out", ["test", "test/a.jsonl", "test/*.jsonl"])
def test_the_evaluation_split_may_be_a_file_a_folder_or_a_pattern(
    tmp_path: Path, held_out: str
) -> None:
    path = folder(tmp_path / "parts")
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "a.jsonl", rows(*range(30, 45)))
    source = Source(path=str(path), eval_split=str(tmp_path / held_out))
    data = load_sources(config(mine=source))
    train, evaluation = data.report
    assert (train["rows"], evaluation["rows"], evaluation["eval"]) == (120, 15, 15)
    assert train["skipped"] == {"prompt is held out for evaluation": 15} and train["eval"] == 0


def test_an_error_in_the_evaluation_files_names_their_key(tmp_path: Path) -> None:
    path = folder(tmp_path / "parts")
    (tmp_path / "test").mkdir()
    source = Source(path=str(path), eval_split=str(tmp_path / "test"))
    with pytest.raises(UserError, match=r"mine\.eval_split=.*/test: no file ends in"):
        load_sources(config(mine=source))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"eval_split": "test"}, "eval_split=test: no such file; .* is a folder of files, so its"),
        ({"split": "dev"}, "split=dev: .* is a folder of files; it has none"),
        ({"config": "en"}, "config=en: .* is a folder of files; it has none"),
    ],
)
def test_a_folder_has_no_splits(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    path = folder(tmp_path / "parts")
    with pytest.raises(UserError, match=rf"data\.sources\.mine\.{said}"):
        load_sources(config(mine=Source(path=str(path), **settings)))


def test_a_directory_of_save_to_disk_has_no_configurations(tmp_path: Path) -> None:
    path = str(saved(tmp_path / "set", train=rows(*range(60)), dev=rows(90)))
    assert len(load_sources(config(mine=Source(path=path, eval_split="dev"))).report) == 2
    with pytest.raises(UserError, match="mine.config=en: .* is a directory of save_to_disk; it"):
        load_sources(config(mine=Source(path=path, config="en")))
    datasets.Dataset.from_list(rows(1, 2)).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(UserError, match="has no split dev; it has train"):
        load_sources(config(mine=Source(path=str(tmp_path / "one"), split="dev")))


# --- what is refused


def refused(path: Path | str, on_bad_row: BadRow = BadRow.skip) -> str:
    with pytest.raises(UserError) as error:
        load_sources(config(on_bad_row, mine=path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_without_data_names_what_it_has(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"data.sources.mine.path={tmp_path}: no file ends in .jsonl, .json, .parquet, .csv (.gz"
        " too); the folder is empty"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("x")
    assert refused(tmp_path).endswith("(.gz too); there are README.md, data/")


def test_other_mistakes_get_one_line(tmp_path: Path) -> None:
    path = folder(tmp_path / "parts")
    start = f"data.sources.mine.path={path}"
    assert refused(f"{path}/*.csv") == f"{start}/*.csv: no file matches"
    write(path / "d.csv", PARTS[0])
    assert refused(path) == (
        f"{start}: files of several kinds (a.jsonl, d.csv): give a source for each kind"
    )
    (path / "d.csv").unlink()
    (path / "bb.jsonl").write_text("")
    assert refused(path) == f"{start}: {path}/bb.jsonl: the file is empty"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.json", PARTS[0])
    (tmp_path / "b.json").write_text('[{"prompt": 1},\n {]')
    start = f"data.sources.mine.path={tmp_path}: {tmp_path}/b.json: not JSON (Expecting property"
    assert refused(tmp_path).startswith(start)
    write(tmp_path / "b.json", PARTS[1])
    write(tmp_path / "c.lines.json", PARTS[2])
    assert refused(tmp_path).endswith(
        f"of {tmp_path}/a.json and {tmp_path}/c.lines.json one has a row in each line, and one a"
        " list of rows: give a source for each kind"
    )


def test_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [{**r, "meta": "x"} for r in PARTS[0]])
    write(tmp_path / "b.parquet", [{**r, "meta": {"x": 1}} for r in PARTS[1]])
    assert f"{tmp_path}/b.parquet does not fit the files before it" in refused(tmp_path)
    assert "meta" in refused(tmp_path)


def test_a_bad_line_has_the_number_in_its_own_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "parts")
    good = (path / "b.jsonl").read_text().splitlines()
    (path / "b.jsonl").write_text("\n".join([*good[:2], "{oops", *good[2:]]) + "\n")
    where = f"data.sources.mine: line 3 of {path}/b.jsonl: not JSON"
    data = load_sources(config(mine=path))
    assert data.report[0]["first_unreadable"].startswith(where)
    assert data.report[0]["skipped"] == {"unreadable": 1}
    assert refused(path, BadRow.refuse).startswith(where)


def test_a_file_of_which_no_row_can_be_read_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "parts")
    write(path / "b.jsonl", [{"query": "a", "reply": "b"}] * 3)
    assert refused(path) == (
        f"data.sources.mine: line 1 of {path}/b.jsonl: no field prompt (and no other row of it can"
        " be read)"
    )
    for name in "abc":
        (path / f"{name}.jsonl").write_text("[1]\n")
    assert refused(path).startswith(
        f"data.sources.mine: no line is a JSON object {{...}}: line 1 of {path}/a.jsonl: JSON, but"
    )


def test_what_is_not_there_is_known_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    paths = {
        "mine": "nowhere.jsonl",
        "b": "here",
        "c": "here/pairs",  # a folder here: no hub id
        "d": "x/y/z",  # a hub id has one slash
        "e": "owner/name",
    }
    given = [f"data.sources.{name}.path={path}" for name, path in paths.items()]
    lines = check_files(composed("data=jsonl", *given).data)
    assert lines == [
        f"data.sources.mine.path=nowhere.jsonl: no such file in {tmp_path}",
        f"data.sources.b.path=here: no file ends in {ENDINGS}; the folder is empty",
        f"data.sources.c.path=here/pairs: no such file in {tmp_path}",
        f"data.sources.d.path=x/y/z: no such file in {tmp_path}",
    ]

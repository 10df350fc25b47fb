"""Files -> records on disk (parts, duplicates, mixes, bad input, the cache) -> token ids on disk.

T.. and D.. name the tests and flaws of the survey of DeepSpeed-Chat that a test answers.
"""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import Record, jsonl, row, rows
from helpers import composed

from rlhf.base.errors import UserError
from rlhf.config.choices import BadRow, Format, Template
from rlhf.config.schema import Config, Data, Source
from rlhf.data import load, reading, template, tokenized
from rlhf.data.reading import hash_text
from rlhf.data.records import Dataset, Demonstration, Pair, Turn
from rlhf.data.sources import load_sources, pair_of
from rlhf.data.splits import PARTS
from rlhf.models.loading import load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rlhf"


def config(on_bad_row: BadRow = BadRow.skip, workers: int | None = None, **of_sources: Any) -> Data:
    """Settings with sources by name: a path, or a Source."""
    data = composed().data
    data.sandbox, data.eval_share, data.eval_rows, data.on_bad_row, data.workers = (
        None,
        0.1,
        10_000,
        on_bad_row,
        workers,
    )
    data.sources = {
        name: s if isinstance(s, Source) else Source(path=str(s)) for name, s in of_sources.items()
    }
    return data


def saved(path: Path, **splits: list[Record]) -> Path:
    """A directory of save_to_disk with splits."""
    import datasets

    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(records) for name, records in splits.items()}
    ).save_to_disk(str(path))
    return path


def questions_of(table: Any) -> list[str]:
    """The questions of a table, or of a list of prompts, in one spelling."""
    prompts = (
        r if isinstance(r, list) else r["prompt"] if isinstance(r, dict) else r.prompt
        for r in table
    )
    return [
        turn["text"].lower() if isinstance(turn, dict) else turn.text.lower()
        for *_, turn in prompts
    ]


def parts(data: Dataset) -> dict[str, set[str]]:
    return {
        "sft": set(questions_of(data.sft)),
        "rm": set(questions_of(data.rm)),
        "ppo": set(questions_of(data.ppo)),
        "eval": set(questions_of(data.eval_sft)),
    }


def assert_apart(data: Dataset) -> None:
    found = list(parts(data).values())
    assert sum(map(len, found)) == len(set().union(*found))
    assert set(questions_of(data.eval_rm)) | set(questions_of(data.eval_prompts)) <= set(
        questions_of(data.eval_sft)
    )


def assert_counts_add_up(data: Dataset) -> None:
    sizes = {"sft": len(data.sft), "rm": len(data.rm), "ppo": len(data.ppo)}
    for part, size in sizes.items():
        assert sum(report[part] for report in data.report if part in report) == size
    for report in data.report:
        into = sum(report[part] for part in ("sft", "rm", "ppo", "eval", "texts") if part in report)
        assert report["rows"] + report.get("copies", 0) == into + sum(report["skipped"].values()), (
            report
        )


# --- splits


@pytest.mark.parametrize("n", [10_000, pytest.param(50_000, marks=pytest.mark.full)])
def test_parts_have_their_shares_and_do_not_overlap(tmp_path: Path, n: int) -> None:
    """T16, in two processes."""
    file = jsonl(tmp_path / "a.jsonl", rows(*range(n)))
    cfg = config(workers=2, mine=file)
    data = load_sources(cfg)
    assert_apart(data)
    assert_counts_add_up(data)
    share = {part: len(questions) / n for part, questions in parts(data).items()}
    expected = {"sft": 0.9 * 0.2, "rm": 0.9 * 0.4, "ppo": 0.9 * 0.4, "eval": 0.1}
    assert all(
        abs(share[part] - expected[part]) < 4 * (expected[part] / n) ** 0.5 for part in expected
    ), share
    cfg.seed = 2
    assert parts(load_sources(cfg)) != parts(data)


def test_a_prompt_is_in_one_part_whatever_is_mixed_in_whatever_order(tmp_path: Path) -> None:
    """T16, D3: three of DeepSpeed-Chat's default sets are the same HH data, each cut by itself."""
    one = jsonl(tmp_path / "one.jsonl", rows(*range(400)))
    shouted = [{**row(i, "!"), "prompt": f"  QUESTION   {i}?\n"} for i in range(200, 600)]
    two = jsonl(tmp_path / "two.jsonl", shouted)
    three = saved(
        tmp_path / "three", train=rows(*range(300, 700), tag="."), test=rows(*range(650, 800))
    )
    demonstrations = jsonl(
        tmp_path / "four.jsonl",
        [{"prompt": f"Question {i}?", "response": f"So {i}."} for i in range(100, 900)],
    )
    of_sources: dict[str, Any] = {
        "one": one,
        "two": two,
        "three": Source(path=str(three), eval_split="test"),
        "four": Source(path=str(demonstrations), sft_only=True),
    }

    def division(*names: str) -> dict[str, set[str]]:
        data = load_sources(config(**{name: of_sources[name] for name in names}))
        assert_apart(data)
        assert_counts_add_up(data)
        # without the spelling: which part does a question's number belong to?
        return {
            part: {"".join(filter(str.isdigit, text)) for text in texts}
            for part, texts in parts(data).items()
        }

    alone = {name: division(name) for name in of_sources}
    for names in (["one", "two"], ["two", "three"], ["one", "two", "three", "four"]):
        mixed = division(*names)
        assert mixed == division(*reversed(names))
        for name in names:
            for part in (
                "sft",
                "rm",
                "ppo",
            ):  # nothing changes its part; what another source evaluates on is trained on no more
                if not (name == "four" and part == "sft"):
                    assert alone[name][part] <= mixed[part] | mixed["eval"] | (
                        mixed["sft"] if part == "sft" else set()
                    ), (name, part)


def test_case_and_spaces_do_not_make_another_prompt(tmp_path: Path) -> None:
    records = rows(*range(300)) + [{**row(i), "prompt": f" qUESTION\n {i}? "} for i in range(300)]
    data = load_sources(config(mine=jsonl(tmp_path / "a.jsonl", records)))
    (report,) = data.report
    assert report["skipped"] == {"duplicate row": 300}
    assert sorted(questions_of(data.ppo)) == sorted(set(questions_of(data.ppo)))


def test_added_rows_and_other_versions_do_not_move_a_prompt(tmp_path: Path) -> None:
    before = parts(load_sources(config(mine=jsonl(tmp_path / "a.jsonl", rows(*range(500))))))
    after = parts(
        load_sources(config(mine=jsonl(tmp_path / "b.jsonl", rows(*reversed(range(100, 900))))))
    )
    for part, questions in before.items():
        for other in {*after} - {part}:
            assert not questions & after[other]


def test_an_own_eval_split_is_evaluated_on_and_nothing_of_it_trained_on(tmp_path: Path) -> None:
    """T16. Half of the held-out prompts are in the training split too, with a few equal rows."""
    directory = saved(
        tmp_path / "set",
        train=rows(*range(300)),
        test=rows(*range(250, 350), tag="!") + rows(0, 1, 2),
    )
    data = load_sources(config(mine=Source(path=str(directory), eval_split="test")))
    assert set(questions_of(data.eval_sft)) == {
        f"question {i}?" for i in (0, 1, 2, *range(250, 350))
    }
    assert_apart(data)
    assert_counts_add_up(data)
    trained, held_out = data.report
    assert trained["skipped"] == {"prompt is held out for evaluation": 53} and trained["eval"] == 0
    assert (held_out["eval"], held_out["skipped"]) == (103, {})
    assert len(data.sft) + len(data.rm) + len(data.ppo) == 247  # nothing else is held out


def test_duplicates_are_dropped_and_counted_over_all_sources(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", rows(*range(200)) + rows(*range(50)))
    two = jsonl(tmp_path / "two.jsonl", rows(*range(100, 300)))
    data = load_sources(config(one=one, two=two))
    assert [report["skipped"] for report in data.report] == [
        {"duplicate row": 50},
        {"duplicate row": 100},
    ]
    everything = [*data.sft, *data.rm, *data.ppo]
    assert (
        len({json.dumps(record) for record in everything})
        == len(everything)
        == 300 - len(data.eval_sft)
    )
    assert_counts_add_up(data)


def test_ppo_has_each_prompt_once(tmp_path: Path) -> None:
    data = load_sources(
        config(mine=jsonl(tmp_path / "a.jsonl", rows(*range(200)) + rows(*range(200), tag="!")))
    )
    assert len(data.rm) == 2 * len(set(questions_of(data.rm))) and len(data.ppo) == len(
        set(questions_of(data.ppo))
    )
    assert data.report[0]["skipped"] == {"duplicate prompt": len(data.ppo)}


# --- mixing


def test_weight_takes_a_share_of_the_rows_or_repeats_them(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows(*range(2000)))
    full, half, twice, more = (
        load_sources(config(mine=Source(path=str(file), weight=w))) for w in (1, 0.5, 2, 1.5)
    )
    for data in (full, half, twice, more):
        assert_counts_add_up(data)
        assert_apart(data)
    assert (
        set(questions_of(half.sft)) < set(questions_of(full.sft))
        and 0.4 < len(half.rm) / len(full.rm) < 0.6
    )
    assert sorted(questions_of(twice.sft)) == sorted(questions_of(full.sft) * 2)
    assert 1.4 < len(more.rm) / len(full.rm) < 1.6
    assert half.eval_sft == full.eval_sft == twice.eval_sft  # what is evaluated on stays
    assert questions_of(full.ppo) == questions_of(twice.ppo)
    assert half.report[0]["skipped"]["weight below 1"] == 2000 - sum(
        half.report[0][part] for part in PARTS
    )
    assert twice.report[0]["copies"] == len(full.sft) + len(full.rm)
    assert "copies by weight" in load.summarize(twice) and "by weight" not in load.summarize(full)


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows(*range(500)))
    data = load_sources(config(mine=Source(path=str(file), rows=100)))
    assert data.report[0]["rows"] == 100
    assert set().union(*parts(data).values()) == {f"question {i}?" for i in range(100)}
    assert load_sources(config(mine=Source(path=str(file), rows=9999))).report[0]["rows"] == 500


def test_sft_only_keeps_a_source_from_the_other_stages(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", rows(*range(300)))
    two = jsonl(tmp_path / "two.jsonl", rows(*range(200, 600), tag="!"))
    data = load_sources(config(one=one, two=Source(path=str(two), sft_only=True)))
    assert_apart(data)
    assert_counts_add_up(data)
    assert {report["source"]: (report["rm"], report["ppo"]) for report in data.report}["two"] == (
        0,
        0,
    )
    assert data.report[1]["skipped"]["prompt is used by another stage"] > 50
    # the same file twice: for all stages as if it were there once
    both = load_sources(config(two=Source(path=str(one), sft_only=True), one=one))
    assert parts(both) == parts(load_sources(config(one=one)))


def test_one_answer_is_enough_for_all_but_the_reward_model(tmp_path: Path) -> None:
    records = rows(*range(300)) + [
        {"prompt": f"Else {i}?", "chosen": "So.", "rejected": None} for i in range(300)
    ]
    data = load_sources(config(mine=jsonl(tmp_path / "a.jsonl", records)))
    assert all(record["rejected"] for record in data.rm) and all(
        pair.rejected for pair in data.eval_rm
    )
    assert any(text.startswith("else") for text in questions_of(data.sft)) and any(
        text.startswith("else") for text in questions_of(data.ppo)
    )
    assert data.report[0]["skipped"]["no rejected answer"] > 50
    assert_counts_add_up(data)


def test_texts_are_for_the_pretraining_loss_only(tmp_path: Path) -> None:
    texts = jsonl(
        tmp_path / "texts.jsonl",
        [{"text": f"Once upon {i}."} for i in (1, 2, 3, 1)] + [{"text": " "}],
    )
    pairs = jsonl(tmp_path / "pairs.jsonl", rows(*range(100)))
    data = load_sources(config(pairs=pairs, corpus=texts))
    assert data.texts["text"] == ["Once upon 1.", "Once upon 2.", "Once upon 3."]
    assert not any("once" in text for questions in parts(data).values() for text in questions)
    assert data.report[1]["skipped"] == {"empty text": 1, "duplicate text": 1}
    assert_counts_add_up(data)
    assert (
        "corpus/train: 5 rows: texts 3; skipped: 1 empty text, 1 duplicate text"
        in load.summarize(data)
    )
    with pytest.raises(
        UserError, match="data=corpus: plain text only; add a source with prompts and answers"
    ):
        load_sources(config(corpus=texts))
    held_out = saved(tmp_path / "set", train=[{"text": "a"}], test=[{"text": "b"}])
    assert load_sources(
        config(pairs=pairs, corpus=Source(path=str(held_out), eval_split="test"))
    ).texts["text"] == ["a"]


def written(path: Path, records: list[Record]) -> Path:
    """A file or directory of the kind that the name says."""
    import datasets

    table = datasets.Dataset.from_list(records)
    text = "".join(json.dumps(record) + "\n" for record in records)
    match path.name.split(".", 1)[1]:
        case "jsonl":
            path.write_text(text)
        case "bom.jsonl":
            path.write_text("\ufeff" + text)
        case "lines.json":
            path.write_text(text)
        case "json":
            path.write_text(json.dumps(records, indent=1))
        case "jsonl.gz":
            path.write_bytes(gzip.compress(text.encode()))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps(records).encode()))
        case "parquet":
            table.to_parquet(str(path))
        case "csv":
            table.to_csv(str(path))
        case "csv.gz":
            path.write_bytes(gzip.compress(table.to_pandas().to_csv(index=False).encode()))
        case "saved":
            table.save_to_disk(str(path))
    return path


KINDS = [
    "jsonl",
    "bom.jsonl",
    "jsonl.gz",
    "json",
    "lines.json",
    "json.gz",
    "parquet",
    "csv",
    "csv.gz",
    "saved",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same(tmp_path: Path, kind: str) -> None:
    records = rows(*range(60)) + [
        {"prompt": 'Größe, "日本"\n☃?', "chosen": "a,b\nc", "rejected": "x\ty"}
    ]
    wanted = load_sources(config(mine=jsonl(tmp_path / "wanted.jsonl", records)))
    data = load_sources(config(mine=written(tmp_path / f"a.{kind}", records)))
    for part in ("sft", "rm", "ppo"):
        assert getattr(data, part).to_list() == getattr(wanted, part).to_list()
    assert (data.eval_sft, data.eval_rm, data.report) == (
        wanted.eval_sft,
        wanted.eval_rm,
        wanted.report,
    )


def test_a_csv_file_is_text(tmp_path: Path) -> None:
    """ "NA" is an answer, and so is 42; nothing at all is null."""
    file = tmp_path / "a.csv"
    file.write_text(
        "prompt,chosen,rejected\n"
        + "".join(f"What is {i}?,NA,{i}\nAnd {i}?,null,\n" for i in range(100))
    )
    data = load_sources(config(mine=file))
    found = {(record["chosen"], record["rejected"] is None) for record in [*data.sft, *data.ppo]}
    assert found == {("NA", False), ("null", True)} and {
        record["chosen"] for record in data.rm
    } == {"NA"}
    scores = tmp_path / "scores.csv"
    scores.write_text(
        "prompt,answer_a,answer_b,score_a,votes\n"
        + "".join(f"What is {i}?,1,2,{i}.5,50\n" for i in range(100))
    )
    columns = {"score_b": "votes"}
    data = load_sources(
        config(mine=Source(path=str(scores), format=Format.scored_answers, columns=columns))
    )
    assert {
        (int(text.split()[-1][:-1]) > 49, r["chosen"])
        for r, text in zip(data.rm, questions_of(data.rm))
    } == {(True, "1"), (False, "2")}


def test_columns_of_other_names_mix_with_the_usual_ones(tmp_path: Path) -> None:
    one = jsonl(tmp_path / "one.jsonl", rows(*range(100)))
    others = [
        {"q": {"text": f"Else {i}?"}, "good": [{"t": f"a {i}"}], "bad": "b"} for i in range(100)
    ]
    columns = {"prompt": "q.text", "chosen": "good.0.t", "rejected": "bad"}
    data = load_sources(
        config(
            one=one, two=Source(path=str(jsonl(tmp_path / "two.jsonl", others)), columns=columns)
        )
    )
    assert {text.split()[0] for text in questions_of(data.rm)} == {"question", "else"}
    assert data.rm.column_names == ["prompt", "chosen", "rejected"]


# --- bad input


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
        ".path={path}: give a file ending in .jsonl, .json, .parquet, .csv (.gz too), a directory",
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
        ".path={path}: Error tokenizing data. C error: Expected 2 fields in line 3, saw 3",
    ),
    ("a.jsonl.gz", "no gzip", ".path={path}: "),
    (
        "latin.jsonl",
        GOOD.encode() + b'{"prompt": "caf\xe9"}\n',
        ".path={path}: line 2 is not UTF-8",
    ),
    ("latin.csv", b"prompt,chosen\na,b\ncaf\xe9,c\n", ".path={path}: line 3 is not UTF-8"),
    ("latin.json", b'[{"prompt":\n"caf\xe9"}]', ".path={path}: line 2 is not UTF-8"),
    (
        "columns.jsonl",
        '{"a": 1, "b": 2}\n',
        ": {path} has the columns a, b; give format and columns. Known: prompt, chosen",
    ),
    (
        "blank.jsonl",
        "\n\n  \n",
        ": {path} has no line that is a JSON object {{...}}: line 1 is empty",
    ),
    (
        "lines.jsonl",
        "{no\n{\n",
        ": {path} has no line that is a JSON object {{...}}: line 1: not JSON (Expecting "
        "property name",
    ),
    (
        "types.jsonl",
        '{"prompt": 3, "chosen": "a"}\n',
        ": line 1 of {path}: prompt is a number, not a string (and no other row can",
    ),
    (
        "types.json",
        '[{"prompt": "a", "chosen": 3}]',
        ": row 1 of {path}: chosen is a number, not a string (and no other row can",
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


def test_a_split_that_is_not_there_is_named_with_those_there_are(tmp_path: Path) -> None:
    directory = saved(tmp_path / "set", train=rows(1), validation=rows(2))
    for source in (
        Source(path=str(directory), split="test"),
        Source(path=str(directory), eval_split="test"),
    ):
        with pytest.raises(
            UserError,
            match=rf"data.sources.mine: {directory} has no split test; it has train, validation",
        ):
            load_sources(config(mine=source))
    written(tmp_path / "one.saved", rows(1, 2))
    with pytest.raises(UserError, match="has no split test; it has train"):
        load_sources(config(mine=Source(path=str(tmp_path / "one.saved"), eval_split="test")))
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="other: not a directory written by save_to_disk"):
        load_sources(config(mine=tmp_path / "other"))


BAD = [
    ("{not json", "not JSON (Expecting property name"),
    ("[1, 2]", "JSON, but not an object"),
    ('{"prompt": 3, "chosen": "a"}', "prompt is a number, not a string"),
    ('{"prompt": "a"}', "no field chosen"),
    ('{"prompt": "half an emoji \\ud83d", "chosen": "a"}', "'utf-8' codec can't encode character"),
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


def test_a_hub_name_without_network_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The library alone would try for 23 s. The server here takes no connection."""
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    started = time.time()
    with pytest.raises(UserError) as error:
        load_sources(config(mine="somebody/unknown", other="somebody/else"))
    assert time.time() - started < 5
    expected = (
        "data.sources.mine.path=somebody/unknown: no such file, not in the cache, and the hub "
        "does not answer"
    )
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_hub_sets_that_are_programs_are_read_as_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """miracl and jaquad are programs, which the library does not run; the hub has parquet files."""
    import datasets

    called = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        called.append((args, kwargs))
        if "revision" not in kwargs:
            raise RuntimeError("Dataset scripts are no longer supported, but found x.py")
        return datasets.Dataset.from_list(rows(*range(50)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert (
        load_sources(config(mine=Source(path="a/b", config="c", split="dev"))).report[0]["rows"]
        == 50
    )
    assert called[1] == (("a/b", "c"), {"split": "dev", "revision": "refs/convert/parquet"})


def test_the_hubs_own_splits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Unknown split \"dev\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError,
        match=(
            r"data.sources.mine.split=dev: Unknown split .dev.. Should be one of \['train', "
            r"'test'\]"
        ),
    ):
        load_sources(config(mine=Source(path="a/b", split="dev")))


# --- for the stages


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


def test_a_stage_without_rows_says_why(tmp_path: Path) -> None:
    one_answer = jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"{i}?", "response": "a"} for i in range(100)]
    )
    assert len(load.open_data(stage("sft", one_answer), tmp_path).sft) > 5
    with pytest.raises(
        UserError,
        match=(
            "data=mine: no rows for rm: no source has rejected answers, or the sources are too "
            "small"
        ),
    ):
        load.open_data(stage("rm", one_answer), tmp_path)
    with pytest.raises(
        UserError, match="data=mine: no rows.* for sft: the sources are too small for data.shares"
    ):
        load.open_data(stage("sft", jsonl(tmp_path / "b.jsonl", rows(1))), tmp_path)


# --- tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("builtin:tiny", Template.hh)


def mixed_lengths(tmp_path: Path) -> Dataset:
    records = [
        {**row(i), "prompt": "Why? " * (i % 40) + str(i), "chosen": "Yes. " * (i % 30) + str(i)}
        for i in range(200)
    ]
    dialogue = "\n\nHuman: {0}\n\nAssistant: So.\n\nHuman: And {0}?\n\nAssistant:"
    records += [{**row(i), "prompt": dialogue.format(i)} for i in range(1000, 1100)]
    return load_sources(config(mine=jsonl(tmp_path / "lengths.jsonl", records)))


@pytest.mark.parametrize("limits", [(500, 500), (30, 20)], ids=["all", "some dropped and cut"])
def test_rows_on_disk_are_what_the_template_makes_of_the_records(
    tmp_path: Path, tokenizer: Any, limits: tuple[int, int]
) -> None:
    """T1, D7: an answer keeps its length beside a long prompt; a truncated one has no EOS."""
    data = mixed_lengths(tmp_path)
    pairs = [pair_of(record) for record in data.rm]
    done = tokenized.pairs(tokenizer, data.rm, *limits)
    expected = template.encode_pairs(tokenizer, pairs, *limits)
    assert list(done) == done[:] == expected and len(done) == len(expected)
    assert list(done.lengths) == [
        len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in expected
    ]
    assert done.skipped == len(pairs) - len(expected)
    assert done.truncated == sum(
        any(ids[-1] != tokenizer.eos_token_id for ids in both) for _, *both in expected
    )

    shown = tokenized.demonstrations(tokenizer, data.sft, *limits)
    records = [Demonstration(pair.prompt, pair.chosen) for pair in map(pair_of, data.sft)]
    wanted = template.encode_demonstrations(tokenizer, records, *limits)
    assert list(shown) == wanted and list(shown.lengths) == [
        len(prompt) + len(answer) for prompt, answer in wanted
    ]
    assert shown.truncated == sum(answer[-1] != tokenizer.eos_token_id for _, answer in wanted)
    assert (
        (shown.skipped > 0)
        == (shown.truncated > 0)
        == (done.skipped > 0)
        == (done.truncated > 0)
        == (limits[0] == 30)
    )
    assert shown[-1] == wanted[-1]
    notes = f" ({shown.skipped} skipped: prompt too long; {shown.truncated} truncated)"
    assert str(shown) == f"{len(wanted)} demonstrations" + (notes if shown.skipped else "")

    prompts = tokenized.prompts(tokenizer, data.ppo, limits[0])
    turns = [pair.prompt for pair in map(pair_of, data.ppo)]
    encoded = template.encode_prompts(tokenizer, turns, limits[0])
    assert list(prompts) == [(t, ids) for t, ids in zip(turns, encoded) if ids is not None]
    assert list(prompts.lengths) == [len(ids) for _, ids in prompts] and prompts.truncated == 0


def test_tokens_stay_on_disk_and_nothing_is_padded(
    tmp_path: Path, cache: Path, tokenizer: Any
) -> None:
    """D5: DeepSpeed-Chat keeps two tensors of 512 numbers per row in every process."""
    import pyarrow

    file = jsonl(
        tmp_path / "a.jsonl", [{**row(i), "chosen": f"Yes, {i}. " * 20} for i in range(6000)]
    )
    data = load_sources(config(mine=file))
    before = pyarrow.total_allocated_bytes()
    done = tokenized.pairs(tokenizer, data.rm, 256, 256)
    tokens = sum(2 * len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in done)
    assert all(Path(f["filename"]).parent == cache for f in done.table.cache_files)
    on_disk = sum(Path(f["filename"]).stat().st_size for f in done.table.cache_files)
    assert 4 * tokens * 0.5 < on_disk < 4 * tokens * 1.5
    assert pyarrow.total_allocated_bytes() - before < on_disk / 10
    assert isinstance(done.lengths, np.ndarray)


def test_records_of_the_memory_are_read_likewise(tokenizer: Any) -> None:
    pairs = [Pair([Turn("user", f"{i}?")], "Yes.", None if i % 2 else "No.") for i in range(20)]
    table = load.table_of(pairs)
    assert [pair_of(record) for record in table] == pairs
    done = tokenized.demonstrations(tokenizer, table, 99, 99)
    assert list(done) == template.encode_demonstrations(
        tokenizer, [Demonstration(p.prompt, p.chosen) for p in pairs], 99, 99
    )


# --- cache


def files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in cache.glob("*.arrow")}


def test_the_cache_holds_for_the_same_and_for_nothing_else(
    tmp_path: Path, cache: Path, tokenizer: Any
) -> None:
    """T15, D1, D2."""
    file = jsonl(tmp_path / "a.jsonl", rows(*range(100)))

    def prepare(limit: int = 99, tokenizer: Any = tokenizer, seed: int = 1, **settings: Any) -> int:
        """Prepare the data; returns how many files of the cache are new. None is rewritten."""
        before = files(cache)
        cfg = config(mine=Source(path=str(file), **settings))
        cfg.seed = seed
        tokenized.demonstrations(tokenizer, load_sources(cfg).sft, limit, 99)
        after = files(cache)
        assert before.items() <= after.items()
        return len(after) - len(before)

    def rewrite(records: list[Record]) -> None:
        """Later, in the same length."""
        size, changed = file.stat().st_size, file.stat().st_mtime
        jsonl(file, records)
        assert file.stat().st_size == size and file.stat().st_mtime != changed

    assert prepare() == 2 and prepare() == 0
    assert prepare(limit=98) == 1, "another length"
    assert prepare(tokenizer=load_tokenizer("builtin:tiny", Template.chatml)) == 1, (
        "another template"
    )
    other = load_tokenizer("builtin:tiny", Template.hh)
    other.add_tokens(["Question"])
    assert prepare(tokenizer=other) == 1, "another tokenizer"
    assert prepare(seed=2) == 2, "another division"
    assert prepare(columns={"chosen": "rejected", "rejected": "chosen"}) == 2, "other columns"
    assert prepare(rows=50) == 2, "fewer rows"
    assert prepare(weight=2.0) == 1, "the same records, other tables of them"
    assert prepare() == 0
    time.sleep(0.05)
    rewrite(rows(*reversed(range(100))))
    assert prepare() == 2 and prepare() == 0, "the file is another one"


def test_another_version_of_a_directory_is_read_anew(tmp_path: Path) -> None:
    """D2: an index of another version must not be used."""
    import shutil

    directory = saved(tmp_path / "set", train=rows(*range(100)))
    one = load_sources(config(mine=directory))
    assert len(one.rm) == len(load_sources(config(mine=directory)).rm)
    shutil.rmtree(directory)
    saved(directory, train=rows(*range(100), tag="!"))
    assert {record["chosen"][-1] for record in load_sources(config(mine=directory)).rm} == {"!"}


def test_another_version_of_the_code_reads_anew(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T15, D1: DeepSpeed-Chat's cache outlives the code that made it."""
    file = jsonl(tmp_path / "a.jsonl", rows(*range(50)))
    load_sources(config(mine=file))
    changed = tmp_path / "formats.py"
    changed.write_text(Path(reading.formats.__file__).read_text() + "\n# another version\n")
    monkeypatch.setattr(reading.formats, "__file__", str(changed))
    load_sources(config(mine=file))
    assert len(files(cache)) == 2


def test_an_interrupted_preparation_leaves_nothing_half_done(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = jsonl(tmp_path / "a.jsonl", rows(*range(3000)))
    original: Callable[..., Any] = hash_text
    calls = []

    def fails(text: str) -> int:
        calls.append(text)
        if len(calls) > 4000:
            raise KeyboardInterrupt
        return original(text)

    monkeypatch.setattr(reading, "hash_text", fails)
    with pytest.raises(KeyboardInterrupt):
        load_sources(config(mine=file))
    assert not files(cache)
    monkeypatch.setattr(reading, "hash_text", original)
    assert load_sources(config(mine=file)).report[0]["rows"] == 3000

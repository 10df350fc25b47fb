"""Files of every kind give the same; splits; sets of the hub."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
from data_files import Record, jsonl, rows
from prepared_data import config, questions_of, saved

from rlhf.base.errors import UserError
from rlhf.config.choices import Format, Template
from rlhf.config.schema import Source
from rlhf.data.sources import load_sources

pytestmark = pytest.mark.usefixtures("cache")


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


@pytest.mark.parametrize("ending", ["json", "json.gz", "jsonl"])
def test_a_text_that_looks_like_a_date_stays_a_text(tmp_path: Path, ending: str) -> None:
    """In a list of rows the library would make times of them, "1999-05-04 00:00:00"."""
    records = [
        {
            "day": f"1999-05-{i:02}",
            "prompt": f"q {i}",
            "response": f"2000-01-{i:02}",
            "n": i,
            "reward_model": {"style": "rule", "ground_truth": [f"2024-05-{i:02}"]},
        }
        for i in range(1, 31)
    ]
    file = tmp_path / f"days.{ending}"
    if ending == "json.gz":
        file.write_bytes(gzip.compress(json.dumps(records).encode()))
    else:
        written(file, records)
    data = load_sources(config(mine=file))
    assert not data.report[0]["skipped"] and "unreadable" not in data.report[0]
    answers = {row["chosen"] for row in data.sft}
    assert answers and answers <= {record["response"] for record in records}
    columns = [json.loads(row["columns"]) for row in data.ppo]
    assert columns and all(row["day"] == f"1999-05-{row['n']:02}" for row in columns)
    truths = [(row["reward_model"]["ground_truth"], row["n"]) for row in columns]
    assert all(truth == [f"2024-05-{n:02}"] for truth, n in truths)


@pytest.mark.parametrize("format", ["torch", "numpy", "pandas"])
def test_a_table_that_is_saved_with_a_format_gives_the_same(tmp_path: Path, format: str) -> None:
    import datasets

    records = [{"prompt": f"q {i}", "response": f"a {i}", "w": i / 2} for i in range(40)]
    table = datasets.Dataset.from_list(records)
    table.with_format(format).save_to_disk(str(tmp_path / "formatted"))
    wanted = load_sources(config(mine=jsonl(tmp_path / "wanted.jsonl", records)))
    data = load_sources(config(mine=tmp_path / "formatted"))
    assert data.sft.to_list() == wanted.sft.to_list() and len(data.sft) > 10
    assert data.ppo.to_list() == wanted.ppo.to_list()


def test_images_are_named_and_not_decoded(tmp_path: Path) -> None:
    import datasets

    count = 40
    columns = {name: [f"{name} {i}" for i in range(count)] for name in ("prompt", "response")}
    columns |= {"image": [{"bytes": b"no image"}] * count, "photos": [[{"bytes": b"no"}]] * count}
    kinds = {name: datasets.Value("string") for name in ("prompt", "response")}
    kinds |= {"image": datasets.Image(), "photos": datasets.List(datasets.Image())}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    table.save_to_disk(str(tmp_path / "media"))
    data = load_sources(config(mine=tmp_path / "media"))
    assert data.report[0]["unread"] == ["image", "photos"] and len(data.sft) > 10
    assert "image" not in data.ppo[0]["columns"]


@pytest.mark.parametrize("kind", ["parquet", "saved", "jsonl"])
def test_tools_have_no_keys_of_other_tools(tmp_path: Path, kind: str) -> None:
    """A table gives each call the arguments of all, which are null where they are not its own."""
    calls = [("add", {"a": 1, "how": {"exactly": True}}), ("weather", {"city": "Bern"})]
    records: list[Record] = []
    for i in range(40):
        name, arguments = calls[i % 2]
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [{"role": "user", "content": f"{i}?"}]
        messages += [{"role": "assistant", "content": "", "tool_calls": [call]}]
        tool = {"name": name, "parameters": {key: {"type": "string"} for key in arguments}}
        records.append({"messages": messages, "tools": [tool]})
    settings = config(mine=written(tmp_path / f"calls.{kind}", records))
    settings.template = Template.tokenizer
    data = load_sources(settings)
    assert len(data.sft) > 10
    for row in data.sft:
        number = int(row["prompt"][1]["text"].removesuffix("?"))
        (call,) = json.loads(row["calls"])["tool_calls"]
        assert call["function"]["arguments"] == calls[number % 2][1]
        (tool,) = json.loads(row["prompt"][0]["text"])
        assert list(tool["parameters"]) == list(calls[number % 2][1])


def test_half_a_character_in_another_column_is_unreadable(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"{i}?", "solution": "\ud83d\ude00"}) for i in range(40)]
    lines.append(r'{"prompt": "q", "solution": "\ud83d"}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = load_sources(config(mine=tmp_path / "a.jsonl"))
    assert "half of a surrogate pair" in data.report[0]["first_unreadable"]
    assert json.loads(data.ppo[0]["columns"]) == {"solution": "\U0001f600"}


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
    with pytest.raises(UserError, match="other: no file ends in .jsonl, .*; the folder is empty"):
        load_sources(config(mine=tmp_path / "other"))


def test_a_hub_name_without_network_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The library alone would try for 23 s. The server here takes no connection."""
    import datasets
    import huggingface_hub

    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy"):
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

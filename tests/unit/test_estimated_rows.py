"""The rows that the plan expects are about those that the stages get."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from data_files import Record, jsonl
from format_rows import message
from prepared_data import config

from rlhf.config.choices import Template
from rlhf.config.schema import Data, Source
from rlhf.data.sources import load_sources
from rlhf.planning import rows as planning_rows
from rlhf.planning.rows import estimate_rows, rows_of_source

pytestmark = pytest.mark.usefixtures("cache")

N = 2000
KINDS: dict[str, Callable[[int], Record]] = {
    "pairs": lambda i: {"prompt": f"q {i}", "chosen": "a", "rejected": "b"},
    "one answer": lambda i: {"prompt": f"q {i}", "response": "a"},
    "half of them pairs": lambda i: {
        "prompt": f"q {i}",
        "chosen": "a",
        "rejected": "b" if i % 2 else None,
    },
    "conversations": lambda i: {"messages": [message("user", f"q {i}"), message("assistant", "a")]},
    "prompts": lambda i: {"prompt": f"q {i}"},
    "ranked": lambda i: {"prompt": f"q {i}", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]},
    "other names": lambda i: {"q": f"q {i}", "good": "a", "bad": "b"},
    "ties": lambda i: {
        "prompt": f"q {i}",
        "answer_a": "a",
        "answer_b": "b",
        "score_a": i % 4,
        "score_b": 0,
    },
}
NAMES = {"prompt": "q", "chosen": "good", "rejected": "bad"}


def assert_about_right(data: Data) -> None:
    loaded = load_sources(data)
    for share in ("sft", "rm", "ppo"):
        rows = len(getattr(loaded, share))
        assert estimate_rows(data, share) == pytest.approx(rows, rel=0.12, abs=20), share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings, shares",
    [
        ({}, [2, 4, 4]),
        ({"rows": 900}, [2, 4, 4]),
        ({"weight": 2.0}, [1, 1, 0]),
        ({"weight": 0.5}, [1, 1, 1]),
        ({"sft_only": True}, [2, 4, 4]),
    ],
)
def test_the_estimate_is_about_what_the_stages_get(
    tmp_path: Path, kind: str, settings: dict[str, Any], shares: list[int]
) -> None:
    if kind == "prompts" and (settings.get("sft_only") or settings.get("weight", 1) > 1):
        return  # refused
    file = jsonl(tmp_path / "a.jsonl", [KINDS[kind](i) for i in range(N)])
    columns = NAMES if kind == "other names" else {}
    data = config(mine=Source(path=str(file), columns=columns, **settings))
    data.shares = shares
    assert_about_right(data)


def test_a_file_is_counted_once_and_again_when_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan tries hundreds of settings on the same files."""
    file = jsonl(tmp_path / "rows.jsonl", [KINDS["pairs"](i) for i in range(50)])
    counted: list[Path] = []

    def counting(file: Path, source: Source) -> planning_rows.FileSample:
        counted.append(file)
        return sample_file(file, source)

    sample_file = planning_rows.sample_file
    monkeypatch.setattr(planning_rows, "sample_file", counting)
    data = config(mine=file)
    first = [estimate_rows(data, "sft") for _ in range(3)]
    assert len(counted) == 1 and len({*first}) == 1
    jsonl(file, [KINDS["pairs"](i) for i in range(500)])
    assert estimate_rows(data, "sft") != first[0] and len(counted) == 2


def test_a_folder_an_evaluation_file_and_a_mix(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for name, start in (("a", 0), ("b", 700)):
        rows = [KINDS["pairs"](i) for i in range(start, start + 700)]
        jsonl(tmp_path / "parts" / f"{name}.jsonl", rows)
    held_out = jsonl(tmp_path / "test.jsonl", [KINDS["pairs"](i) for i in range(9000, 9100)])
    talks = jsonl(tmp_path / "talks.jsonl", [KINDS["conversations"](i) for i in range(3000, 4000)])
    texts = jsonl(tmp_path / "texts.jsonl", [{"text": f"t {i}"} for i in range(500)])
    folder = Source(path=f"{tmp_path}/parts", eval_split=str(held_out))
    assert_about_right(config(mine=folder, talks=talks, texts=texts))


@pytest.mark.parametrize("kind", ["lines.json", "list.json", "a.csv", "a.csv.gz", "a.parquet"])
def test_files_of_every_kind_are_counted(tmp_path: Path, kind: str) -> None:
    rows = [
        {"prompt": f'q {i}\nand, "more"', "chosen": "a", "rejected": "b" if i % 2 else None}
        for i in range(4000)
    ]
    file = tmp_path / kind
    if kind == "lines.json":
        jsonl(file, rows)
    elif kind == "list.json":
        file.write_text(json.dumps(rows))
    elif kind == "a.parquet":
        pandas.DataFrame(rows).to_parquet(file)
    else:
        pandas.DataFrame(rows).to_csv(file, index=False)
    assert_about_right(config(mine=file))
    assert rows_of_source(Source(path=str(file))) == (4000, 4000, 2000, 0)


def test_scores_of_a_csv_file_are_numbers(tmp_path: Path) -> None:
    rows = [KINDS["ties"](i) for i in range(N)]
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    assert_about_right(config(mine=tmp_path / "a.csv"))


def test_every_answer_and_calls_of_tools_count(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w"}}]}
    said = [message("user", "q"), call, message("tool", "7"), message("assistant", "a")]
    rows = [{"messages": said}, {"messages": said[:2]}]
    data = config(mine=jsonl(tmp_path / "tools.jsonl", rows * 500))
    data.shares, data.eval_share, data.template = [1, 0, 0], 0.5, Template.tokenizer
    assert estimate_rows(data, "sft") == 500
    assert estimate_rows(data, "sft", every_answer=True) == 750


def test_a_mark_at_the_start_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("\ufeffprompt,chosen\r\nq,a\r\n".encode())
    assert rows_of_source(Source(path=str(tmp_path / "a.csv"))) == (1, 1, 0, 0)


def test_what_is_not_known_before_it_is_read_is_not_estimated(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for name, rows in (("b.jsonl", [{"query": "q"}]), ("c.jsonl", []), ("d.csv", [row])):
        file = jsonl(tmp_path / name, rows)
        assert estimate_rows(config(mine=file), "sft") is None
    whole = gzip.compress(b'{"prompt": "q", "chosen": "a"}\n' * 2000)
    (tmp_path / "e.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "f.json").write_text("[" * 10**5)
    for name in ("e.jsonl.gz", "f.json"):
        assert estimate_rows(config(mine=tmp_path / name), "sft") is None
    for path in (f"{tmp_path}/missing.jsonl", f"{tmp_path}/*.csv", "somebody/something"):
        assert estimate_rows(config(mine=path), "sft") is None

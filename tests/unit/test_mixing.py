"""Several sources in one data set: weights, limits, and what each stage takes from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_files import jsonl, rows
from prepared_data import assert_apart, assert_counts_add_up, config, parts, questions_of, saved

from rlhf.base.errors import UserError
from rlhf.config.schema import Source
from rlhf.data import load
from rlhf.data.records import PAIR_COLUMNS
from rlhf.data.sources import load_sources
from rlhf.data.splits import PARTS

pytestmark = pytest.mark.usefixtures("cache")


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
    assert load_sources(config(pairs=pairs, corpus=held_out)).texts["text"] == ["a"]
    with pytest.raises(UserError, match="corpus.eval_split=test: format=text does not use it"):
        load_sources(config(pairs=pairs, corpus=Source(path=str(held_out), eval_split="test")))


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
    assert data.rm.column_names == list(PAIR_COLUMNS)

"""How prompts are split into the parts of the stages and of the evaluation; duplicates."""

# T.. and D.. name the tests and flaws of the survey of DeepSpeed-Chat that a test answers.

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import jsonl, row, rows
from prepared_data import assert_apart, assert_counts_add_up, config, parts, questions_of, saved

from rlhf.config.schema import Source
from rlhf.data.sources import load_sources

pytestmark = pytest.mark.usefixtures("cache")


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

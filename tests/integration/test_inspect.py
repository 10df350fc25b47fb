"""stage=inspect: its numbers for a file whose numbers are known, and its page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import digits, known_file
from helpers import composed

from rlhf.data import encoding, load, tokenized
from rlhf.data.inspection import measuring
from rlhf.data.inspection.leakage import leakage
from rlhf.data.load import table_of
from rlhf.data.records import Dataset, Pair, Prompt, Turn
from rlhf.models.loading import load_tokenizer
from rlhf.reporting import inspect_page
from rlhf.stages import inspect


def config_for(path: Path, *more: str) -> Any:
    limits = ["data.max_prompt_tokens=10", "data.max_response_tokens=8", "data.eval_share=0.2"]
    return composed(
        "stage=inspect", "data=jsonl", f"data.sources.mine.path='{path}'", *limits, *more
    )


class Boxes(HTMLParser):
    """The tokens of a page's samples: (classes, text, ids) of each box."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[set[str], str, list[int]]] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = {name: value or "" for name, value in attrs}
        if tag == "span" and "title" in values:
            self.found.append(
                (set(values["class"].split()), "", [int(i) for i in values["title"].split()])
            )

    def handle_data(self, data: str) -> None:
        if self.found and self.lasttag == "span":
            classes, text, ids = self.found[-1]
            self.found[-1] = (classes, text + data, ids)


def boxes_of(sample: inspect_page.Sample) -> list[inspect_page.TokenBox]:
    return sample.prompt + sample.answer


def ids_of(sample: inspect_page.Sample, kind: str = "") -> list[int]:
    """Token ids of a sample, or those of one kind."""
    boxes = boxes_of(sample)
    return [i for box in boxes for i in box.ids if not kind or kind in box.kinds.split()]


# --- numbers


def test_the_numbers_of_a_known_file(tmp_path: Path) -> None:
    cfg = config_for(known_file(tmp_path / "known.jsonl"))
    found = inspect.run(cfg, tmp_path)
    (source,) = found["sources"]
    assert (source["source"], source["split"], source["rows"]) == ("mine", "train", 60)
    counts = {
        "chosen equals rejected": 2,
        "empty answer": 1,
        "unreadable": 1,
        "duplicate row": 3,
    }
    assert source["skipped"] == counts and source["same_answers"] == 2 and source["duplicates"] == 3
    assert sum(source[part] for part in ("sft", "rm", "ppo", "eval")) == 60 - 7
    assert source["share"] == {part: 1.0 for part in ("sft", "rm", "ppo", "eval") if source[part]}

    numbers = source["tokens"]  # of the 56 rows that could be read
    assert numbers["rows"] == numbers["measured"] == numbers["pairs"] == 56
    assert numbers["tokens"] == {
        "prompt": {"median": 8, "p95": 8, "max": 20},
        "chosen": {"median": 9, "p95": 9, "max": 11},
        "rejected": {"median": 5, "p95": 9, "max": 11},
    }
    assert (
        numbers["dropped"],
        numbers["shortened"],
        numbers["truncated"],
        numbers["same_truncated"],
    ) == (
        1,
        1,
        44,
        1,
    )
    assert (numbers["chosen_longer"], numbers["chosen_shorter"]) == (33, 10)
    assert numbers["chosen_longer_by"] == pytest.approx((33 * 4 - 10 * 4) / 56)
    assert measuring.longer_is_better(numbers) == pytest.approx((33 + 13 / 2) / 56)

    stages = found["stages"]
    assert [stages[name]["rows"] for name in ("sft", "rm", "ppo")] == [
        source[name] for name in ("sft", "rm", "ppo")
    ]
    assert set(found["leakage"].values()) == {0} and len(found["leakage"]) == 6
    text = "\n".join(found["verdicts"])
    assert "line 60 of" in text and "whose chosen and rejected answers are equal: 2" in text
    assert re.search(
        r"truncated answers, .* of sft, \d+% of rm: raise data.max_response_tokens=8", text
    )
    assert json.loads(json.dumps(found)) == found


def test_the_numbers_are_those_of_training(tmp_path: Path) -> None:
    """Skipped and truncated rows are counted by other code than that which prepares training."""
    cfg = config_for(known_file(tmp_path / "known.jsonl"), "data.shares=[1,1,1]")
    found, data = inspect.run(cfg, tmp_path)["stages"], load.load_data(cfg.data)
    tokenizer = load_tokenizer("builtin:tiny")
    for name, rows in (
        ("sft", tokenized.demonstrations(tokenizer, data.sft, 10, 8)),
        ("rm", tokenized.pairs(tokenizer, data.rm, 10, 8)),
    ):
        assert len(rows) == found[name]["rows"] - found[name]["dropped"] > 0
        assert (rows.skipped, rows.truncated) == (found[name]["dropped"], found[name]["truncated"])
    assert tokenized.prompts(tokenizer, data.ppo, 10).skipped == found["ppo"]["dropped"]


def test_a_large_part_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SAMPLE", 20)
    found = inspect.run(config_for(known_file(tmp_path / "known.jsonl")), tmp_path)
    (source,) = found["sources"]
    assert (
        source["rows"],
        source["tokens"]["rows"],
        source["tokens"]["measured"],
        source["tokens"]["pairs"],
    ) == (60, 56, 20, 20)
    assert "56 rows, a random sample of 20" in (tmp_path / "report.html").read_text()


def test_leakage_is_found_where_there_is_some() -> None:
    def pairs(*questions: str) -> list[Pair]:
        return [Pair([Turn("user", question)], "yes", "no") for question in questions]

    sft, rm, ppo = (
        table_of(pairs("one", "two")),
        table_of(pairs("TWO ", "three", "three")),
        table_of(pairs("four")),
    )
    evaluated = [Prompt([Turn("user", "one")]), Prompt([Turn("system", "three")])]
    data = Dataset(sft, rm, ppo, [], pairs("four", "five"), evaluated)
    shared, distinct = leakage(data)
    assert shared == {
        "sft & rm": 1,
        "sft & ppo": 0,
        "sft & eval": 1,
        "rm & ppo": 0,
        "rm & eval": 0,
        "ppo & eval": 1,
    }
    assert distinct == {"sft": 2, "rm": 2, "ppo": 1, "eval": 4}


@pytest.mark.parametrize(
    "longer, shorter, expected",
    [
        (
            710,
            290,
            "chosen answers are longer in 71% of the pairs: a judge that only counts tokens has"
            " an accuracy of 71%",
        ),
        (
            100,
            700,
            "chosen answers are shorter in 70% of the pairs: a judge that only counts tokens "
            "has an accuracy of 80%",
        ),
        (540, 460, ""),
        (0, 0, ""),
    ],
)
def test_length_bias_is_said(longer: int, shorter: int, expected: str) -> None:
    line = inspect.length_bias({"pairs": 1000, "chosen_longer": longer, "chosen_shorter": shorter})
    assert line.startswith(expected) and bool(line) == bool(expected)


def test_few_pairs_are_no_bias() -> None:
    assert inspect.length_bias({"pairs": 10, "chosen_longer": 8, "chosen_shorter": 2}) == ""
    assert inspect.length_bias({"pairs": 0, "chosen_longer": 0, "chosen_shorter": 0}) == ""


def test_spread_takes_values_that_are_there() -> None:
    assert measuring.spread(np.arange(1, 101)) == {"median": 50, "p95": 95, "max": 100}
    assert measuring.spread(np.array([7])) == {"median": 7, "p95": 7, "max": 7}


# --- the page


@pytest.mark.parametrize("train_on", ["last", "everything"])
def test_samples_of_sft_show_the_tokens_in_the_loss(train_on: str) -> None:
    train_on_prompt = train_on == "everything"
    cfg = composed(f"sft.train_on={train_on}")
    tokenizer = load_tokenizer("builtin:tiny")
    question = [Turn("user", "What does my pan need?")]
    table = table_of([Pair(question, "A café ☃ <b>.", None)])
    (sample,) = inspect_page.samples(tokenizer, "sft", table, cfg)
    [prompt] = encoding.encode_prompts(tokenizer, [question], 99)
    [answer] = encoding.encode_responses(tokenizer, ["A café ☃ <b>."], 99)
    assert prompt and ids_of(sample) == prompt + answer
    assert ids_of(sample, "loss") == (prompt[1:] if train_on_prompt else []) + answer
    assert ids_of(sample, "context") == (prompt[:1] if train_on_prompt else prompt)
    assert ids_of(sample, "eos") == [tokenizer.eos_token_id]
    shown = "".join(box.text for box in boxes_of(sample)).replace("↵", "")
    dialogue = "\n\nHuman: What does my pan need?\n\nAssistant: A café ☃ <b>."
    assert shown == dialogue + tokenizer.eos_token
    # one character of several tokens has one box
    assert len([box for box in boxes_of(sample) if "☃" in box.text and len(box.ids) > 1]) == 1


def test_samples_of_rm_and_ppo() -> None:
    cfg = composed("data.max_response_tokens=8")
    tokenizer = load_tokenizer("builtin:tiny")
    table = table_of([Pair([Turn("user", "1")], digits("12"), digits("54321"))])
    chosen, rejected = inspect_page.samples(tokenizer, "rm", table, cfg)
    assert ids_of(chosen, "scored") == ids_of(chosen, "eos") == [tokenizer.eos_token_id]
    last = tokenizer("2", add_special_tokens=False).input_ids  # it is truncated there
    assert ids_of(rejected, "eos") == [] and ids_of(rejected, "scored") == last
    assert len(ids_of(chosen, "answer")) == 5 and len(ids_of(rejected, "answer")) == 8
    (prompt,) = inspect_page.samples(tokenizer, "ppo", table, cfg)
    assert ids_of(prompt, "context") == ids_of(prompt) == ids_of(chosen, "context")


def test_the_middle_of_a_long_text_is_not_shown() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    ids = tokenizer(" " + digits("1" * 400), add_special_tokens=False).input_ids
    boxes = list(inspect_page.token_boxes(tokenizer, ids, ["context"] * len(ids)))
    assert sum(bool(box.ids) for box in boxes) == 2 * inspect_page.SHOWN
    (note,) = [box.text for box in boxes if not box.ids]
    assert f"{len(ids) - 2 * inspect_page.SHOWN:,} tokens" in note


def test_the_page_is_self_contained_and_escapes_what_data_hold(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x00$\\frac$ 漢字"
    rows = [
        {"prompt": f"{evil} {i}?", "chosen": f"{evil} yes {i}", "rejected": f"{evil} no {i}"}
        for i in range(60)
    ]
    file = tmp_path / "evil<script>.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json <script>\n")
    found = inspect.run(
        config_for(file, "data.max_prompt_tokens=256", "data.max_response_tokens=256"), tmp_path
    )
    assert [s["skipped"] for s in found["sources"]] == [{"unreadable": 1}]
    page = (tmp_path / "report.html").read_text()
    boxes = Boxes(page)
    assert not boxes.tags & {"script", "img", "link", "iframe", "object"} and "svg" in boxes.tags
    assert "default-src 'none'" in page and not re.search(
        r"(src|href)=[\"']?(http|//|file)", page.replace('xlink:href="#', "")
    )
    assert "漢" in "".join(text for _, text, _ in boxes.found)
    assert page.count("<h3>sft</h3>") == 2  # lengths and samples
    assert {"loss", "context", "answer", "eos", "scored"} <= set().union(
        *(classes for classes, *_ in boxes.found)
    )


def test_a_source_without_second_answers(tmp_path: Path) -> None:
    file = tmp_path / "instructions.jsonl"
    file.write_text(
        "".join(
            json.dumps({"instruction": f"Say {i}.", "output": f"{i}"}) + "\n" for i in range(50)
        )
    )
    found = inspect.run(
        config_for(file, "data.sources.mine.sft_only=true", "data.max_prompt_tokens=64"), tmp_path
    )
    assert (
        found["stages"]["rm"]["rows"] == found["stages"]["ppo"]["rows"] == 0
        and found["stages"]["sft"]["rows"] > 30
    )
    assert any(
        line.startswith("no rows for rm: none of the 50 rows has a rejected answer (sft_only=true")
        for line in found["verdicts"]
    )
    assert (
        "No pairs for the reward model" not in (tmp_path / "report.html").read_text()
    )  # no section of pairs


def test_a_folder_of_ranked_responses(tmp_path: Path) -> None:
    """SFT has each prompt once; the pairs beyond the first of a row are not counted as skipped."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, numbers in (("a", range(100, 150)), ("b", range(150, 200))):
        rows = [
            {"prompt": digits(str(i)), "responses": ["1", "2", "3", "4"], "ranks": [2, 1, 3, 4]}
            for i in numbers
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inspect.run(config_for(folder), tmp_path)
    (source,) = found["sources"]
    assert source["rows"] == 100 and source["files"] == ["a.jsonl", "b.jsonl"]
    stages = found["stages"]
    assert stages["rm"]["rows"] == 6 * stages["rm"]["distinct_prompts"] > 60
    assert stages["sft"]["rows"] == stages["sft"]["distinct_prompts"] > 5
    assert stages["eval rm"]["rows"] == 6 * stages["eval sft"]["rows"] > 6
    assert not any("skipped" in line for line in found["verdicts"])


def test_plain_text_beside_pairs(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": digits(f"{i:03d}")}) + "\n" for i in range(40))
    )
    texts = f"+data.sources={{corpus: {{path: '{tmp_path / 'texts.jsonl'}'}}}}"
    found = inspect.run(config_for(known_file(tmp_path / "known.jsonl"), texts), tmp_path)
    assert found["stages"]["ppo texts"]["rows"] == 40
    assert found["stages"]["ppo texts"]["tokens"]["text"]["max"] in (
        5,
        6,
    )  # whether or not a digit in front has a token for its space
    assert [f"{s['source']}" for s in found["sources"]] == ["mine", "corpus"]


def test_the_sandbox(tmp_path: Path) -> None:
    found = inspect.run(
        composed("stage=inspect", "data.sandbox.demonstrations=64", "data.sandbox.pairs=64"),
        tmp_path,
    )
    assert (found["stages"]["sft"]["rows"], found["stages"]["rm"]["rows"]) == (64, 64)
    assert set(found["leakage"].values()) == {0}
    assert all(numbers["dropped"] == 0 for numbers in found["stages"].values())

"""Records on disk become token ids on disk; the cache holds for the same and for nothing else."""

# T.. and D.. name the tests and flaws of the survey of DeepSpeed-Chat that a test answers.

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import Record, jsonl, row, rows
from helpers import composed
from prepared_data import config, saved

from rlhf.base.constants import WORLD_HELD_OUT
from rlhf.config.choices import Template
from rlhf.config.schema import Source
from rlhf.data import encoding, load, reading, tokenized
from rlhf.data.cache import cached_map
from rlhf.data.reading import hash_text
from rlhf.data.records import Dataset, Demonstration, Pair, Prompt, Turn
from rlhf.data.sources import load_sources, pair_of
from rlhf.models.loading import load_tokenizer

pytestmark = pytest.mark.usefixtures("cache")


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
    expected = encoding.encode_pairs(tokenizer, pairs, *limits)
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
    wanted = encoding.encode_demonstrations(tokenizer, records, *limits)
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
    encoded = encoding.encode_prompts(tokenizer, turns, limits[0])
    assert list(prompts) == [(Prompt(t), ids) for t, ids in zip(turns, encoded) if ids is not None]
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
    assert all(Path(f["filename"]).parent.parent == cache for f in done.table.cache_files)
    on_disk = sum(Path(f["filename"]).stat().st_size for f in done.table.cache_files)
    assert 4 * tokens * 0.5 < on_disk < 4 * tokens * 1.5
    assert pyarrow.total_allocated_bytes() - before < on_disk / 10
    assert isinstance(done.lengths, np.ndarray)


def test_records_of_the_memory_are_read_likewise(tokenizer: Any) -> None:
    pairs = [Pair([Turn("user", f"{i}?")], "Yes.", None if i % 2 else "No.") for i in range(20)]
    table = load.table_of(pairs)
    assert [pair_of(record) for record in table] == pairs
    done = tokenized.demonstrations(tokenizer, table, 99, 99)
    assert list(done) == encoding.encode_demonstrations(
        tokenizer, [Demonstration(p.prompt, p.chosen) for p in pairs], 99, 99
    )


# --- cache


def files(cache: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in cache.glob("*/rows.arrow")}


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


# --- built-in worlds


def records(data: Dataset) -> list[Any]:
    tables = [table[:] for table in (data.sft, data.rm, data.ppo)]
    lists = [data.eval_sft, data.eval_rm, data.eval_probe, data.eval_prompts, data.score_unit]
    return [tables, lists, data.report]


@pytest.mark.parametrize("world", ["sandbox", "arithmetic"])
def test_a_world_from_the_cache_is_the_world(
    world: str, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [f"data.{world}.demonstrations=40", f"data.{world}.pairs=40", "data.eval_rows=8"]
    cfg = composed(f"data={world}", *sizes).data
    package, settings = load.world_of(cfg)
    made = load.records_of(package.build_world(settings, cfg.seed, WORLD_HELD_OUT))
    first = load.data_of_world(cfg)
    # 1. as it was made, in every record and every digit
    assert [first.sft[:], first.rm[:], first.ppo[:]] == [made.sft[:], made.rm[:], made.ppo[:]]
    assert first.eval_rm == made.eval_rm[: len(first.eval_rm)]
    assert first.eval_probe == made.eval_probe[:8] and first.score_unit == made.score_unit
    # 2. once: it is not made again
    with monkeypatch.context() as patch:
        patch.setattr(package, "build_world", None)
        again = load.data_of_world(cfg)
    assert records(again) == records(first)
    assert again.rm._fingerprint == first.rm._fingerprint, "its tokens are in the cache too"
    assert again.gold and again.best_gold
    turns = again.eval_prompts[0].turns
    assert again.gold(turns, again.eval_probe[0].chosen) == again.best_gold(turns)
    # 3. for the same settings
    other = load.data_of_world(dataclasses.replace(cfg, seed=2))
    assert other.sft[:] != first.sft[:]
    # 4. a damaged one is made again
    for file in cache.glob("world-*/evaluation.json"):
        file.write_text("{")
    monkeypatch.setattr(logging.getLogger("rlhf"), "propagate", True)
    assert records(load.data_of_world(cfg)) == records(first)
    assert "cannot be read" in caplog.text and "it is made again" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "halve", "empty", "no sums"])
def test_prepared_rows_that_are_damaged_are_made_again(
    cache: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    import datasets

    def prepare() -> list[int]:
        table = datasets.Dataset.from_dict({"n": list(range(1000))})
        features = datasets.Features({"m": datasets.Value("int64")})
        double = lambda columns: {"m": [2 * n for n in columns["n"]]}  # noqa: E731
        return cached_map(table, double, features, "0" * 32, "doubling", None)["m"][:]

    expected = prepare()
    [file] = cache.glob("*/rows.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flip":
        file.write_bytes(content)
    elif damage == "no sums":
        file.write_bytes(content)
        file.with_name("SHA256SUMS").unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "halve" else b"")
    with caplog.at_level("WARNING", logger="rlhf"):
        assert prepare() == expected == prepare()
    assert ("is made again" in caplog.text) == (damage != "no sums")

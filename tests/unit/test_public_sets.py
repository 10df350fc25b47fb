"""Every data set of conf/data composes, and its rows are read as expected."""

from __future__ import annotations

import pytest
from format_rows import read_row
from helpers import CONF, composed
from public_sets import SETS

from rlhf.config.schema import Source
from rlhf.config.validation import check_config
from rlhf.data.formats.fields import check_columns
from rlhf.data.formats.rows import Skip
from rlhf.data.records import Pair

DATA = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
PROMPTS = {"deepscaler", "dapo_math", "verl"}  # without answers
SOLUTIONS = {"gsm8k", "math"}  # SFT learns their solutions, online RL takes their prompts
FOUR = ["rm_static", "full_hh", "synthetic_instruct", "rlhf_reward"]


def path_of(name: str) -> list[str]:
    """The path of a set of which only the user knows where it is."""
    names = {"jsonl": "mine", "verl": "verl"}
    return [f"data.sources.{names[name]}.path=x.jsonl"] if name in names else []


@pytest.mark.parametrize("name", SETS)
def test_a_public_set_is_read_from_rows_in_its_schema(name: str) -> None:
    [one] = composed(f"data={name}", *path_of(name)).data.sources.values()
    for row, expected in SETS[name]:
        check_columns(list(row), one)
        try:
            assert read_row(row, one) == expected
        except Skip as reason:
            assert str(reason) == expected


def test_no_set_of_the_configuration_is_left_untested() -> None:
    assert set(DATA) == {*SETS, "sandbox", "arithmetic", "jsonl", "dschat_four", "dschat_six"}


@pytest.mark.parametrize("name", DATA)
def test_every_data_file_composes(name: str) -> None:
    cfg = composed(f"data={name}", *path_of(name))
    assert check_config(cfg) == []
    assert all(one.path for one in cfg.data.sources.values())


def test_your_own_file_needs_a_path_only() -> None:
    with pytest.raises(ValueError, match="data.sources.mine.path has no value"):
        composed("data=jsonl")
    cfg = composed(
        "data=jsonl",
        "data.sources.mine.path=a.jsonl",
        "+data.sources.mine.columns={prompt: question, chosen: answers.0}",
    )
    assert cfg.data.sources == {
        "mine": Source(path="a.jsonl", columns={"prompt": "question", "chosen": "answers.0"})
    }


def test_the_mixes_of_deepspeed_chat_are_the_single_files() -> None:
    """What a mix trains on is what its single files say: no two files differ in silence."""
    for mix, names in (
        ("dschat_four", FOUR),
        ("dschat_six", [*FOUR, "webgpt", "shp"]),
        ("[rm_static,webgpt]", ["rm_static", "webgpt"]),
    ):
        single = {name: composed(f"data={name}").data.sources[name] for name in names}
        mixed = composed(f"data={mix}").data.sources
        assert mixed == single and list(mixed) == names


def test_sets_with_one_answer_are_for_sft_only() -> None:
    for name, rows in SETS.items():
        if name in PROMPTS | SOLUTIONS:  # their prompts are for online RL
            continue
        pairs = [expected for _, expected in rows if isinstance(expected, Pair)]
        [one] = composed(f"data={name}").data.sources.values()
        assert one.sft_only == all(pair.rejected is None for pair in pairs), name

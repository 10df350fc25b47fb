"""The columns of a row that reward functions get."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_files import Record, jsonl
from format_rows import message, read_row, source
from prepared_data import config

from rlhf.config.choices import Template
from rlhf.data.records import Prompt, Turn
from rlhf.data.sources import load_sources


@pytest.mark.parametrize(
    "row, columns",
    [
        # GSM8K: the one answer is the response for SFT and the reference for a function
        ({"question": "3 + 4?", "answer": "It is #### 7"}, {"answer": "It is #### 7"}),
        ({"question": "3 + 4?", "answer": 7}, {"answer": 7}),
        ({"instruction": "3 + 4?", "output": "7", "level": 1}, {"output": "7", "level": 1}),
        ({"prompt": "3 + 4?", "chosen": "7", "rejected": "8", "level": 1}, {"level": 1}),
        ({"prompt": "3 + 4?"}, {}),
        (
            {
                "data_source": "sums",
                "prompt": [message("user", "3 + 4?")],
                "reward_model": {"style": "rule", "ground_truth": "7"},
            },
            {"data_source": "sums", "reward_model": {"style": "rule", "ground_truth": "7"}},
        ),
        (
            {"messages": [message("user", "3 + 4?"), message("assistant", "7")], "id": 4},
            {"id": 4},
        ),
    ],
)
@pytest.mark.parametrize("style", [Template.hh, Template.tokenizer])
def test_columns_are_those_beside_the_conversation(
    row: Record, columns: Record, style: Template
) -> None:
    pair = read_row(row, source(), style)
    assert json.loads(pair.columns or "{}") == columns


@pytest.mark.usefixtures("cache")
def test_columns_reach_the_prompts_of_training_and_of_evaluation(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": f"{n} + 1?", "sum": n + 1} for n in range(60)])
    data = load_sources(config(mine=file))
    given = [Prompt([Turn(**turn) for turn in row["prompt"]], row["columns"]) for row in data.ppo]
    assert len(given) > 40 and data.eval_prompts
    for prompt in [*given, *data.eval_prompts]:
        number = int(prompt.turns[0].text.split()[0])
        assert json.loads(prompt.columns) == {"sum": number + 1}

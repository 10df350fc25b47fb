"""The data sets with answers that can be checked: small files in their schemas, from the file to
the columns that a reward function gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_files import Record, jsonl
from format_rows import message
from helpers import composed

from rlhf.config.schema import Config
from rlhf.data import tokenized
from rlhf.data.load import load_data
from rlhf.data.records import Prompt, Turn
from rlhf.models.loading import load_tokenizer

ROWS = 60


def gsm8k(n: int) -> Record:
    return {
        "question": f"Ann has {n} pens and gets 2. How many has she?",
        "answer": f"She has {n} + 2 = <<{n}+2={n + 2}>>{n + 2}.\n#### {n + 2}",
    }


def math(n: int) -> Record:
    return {
        "problem": f"Find ${n}+2$.",
        "level": "Level 1",
        "solution": f"It is $\\boxed{{{n + 2}}}$.",
        "type": "Prealgebra",
    }


def deepscaler(n: int) -> Record:
    return {"problem": f"Find ${n}+2$.", "answer": str(n + 2), "solution": ""}


def verl(n: int) -> Record:
    return {
        "data_source": "openai/gsm8k",
        "prompt": [message("user", f"Find {n} + 2. Write the answer after ####.")],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(n + 2)},
        "extra_info": {"index": n, "split": "train", "question": f"Find {n} + 2."},
    }


def dapo_math(n: int) -> Record:
    row = verl(n)
    return {
        "prompt": f"Find {n} + 2.",
        "solution": str(n + 2),
        "data_source": "math_dapo",
        "source_prompt": row["prompt"],
        "ability": "MATH",
        "reward_model": row["reward_model"],
        "extra_info": {"index": f"id-{n}"},
    }


# schema; the columns that reward functions get; whether prompts are messages; whether SFT has rows
SETS = {
    "gsm8k": (gsm8k, ["answer"], False, True),
    "math": (math, ["level", "solution", "type"], False, True),
    "deepscaler": (deepscaler, ["answer", "solution"], False, False),
    "dapo_math": (
        dapo_math,
        ["solution", "data_source", "source_prompt", "ability", "reward_model", "extra_info"],
        False,
        False,
    ),
    "verl": (verl, ["data_source", "ability", "reward_model", "extra_info"], True, False),
}


def parquet(path: Path, rows: list[Record]) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def config(name: str, path: Path, *more: str) -> Config:
    """The option file of a set, which reads a file of its schema."""
    where = f"data.sources.{name}"
    file = [f"{where}.path={path}", f"{where}.config=null", f"{where}.eval_split=null"]
    return composed(f"data={name}", *file, *more)


def prompts_of(cfg: Config) -> list[Prompt]:
    """The prompts that online RL is trained and evaluated on, as it gets them."""
    data = load_data(cfg.data)
    rows = tokenized.prompts(load_tokenizer("builtin:tiny"), data.ppo, 256)
    assert len(rows) and data.eval_prompts
    return [prompt for prompt, _ in rows] + data.eval_prompts


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", SETS)
def test_columns_of_a_set_reach_the_prompts(name: str, kind: str, tmp_path: Path) -> None:
    make, columns, is_messages, has_answers = SETS[name]
    rows = [make(n) for n in range(ROWS)]
    path = tmp_path / f"train.{kind}"
    cfg = config(name, parquet(path, rows) if kind == "parquet" else jsonl(path, rows))
    by_text = {str(row[n]): row for row in rows for n in ("question", "problem") if n in row}
    if not by_text:
        texts = [
            r["prompt"] if isinstance(r["prompt"], str) else r["prompt"][0]["content"] for r in rows
        ]
        by_text = dict(zip(texts, rows))
    prompts = prompts_of(cfg)
    assert len(prompts) > ROWS / 4 if has_answers else len(prompts) == ROWS
    for prompt in prompts:
        row = by_text[prompt.turns[-1].text]
        assert json.loads(prompt.columns) == {column: row[column] for column in columns}
        assert prompt.is_messages == is_messages
    assert bool(len(load_data(cfg.data).sft)) == has_answers


def test_an_object_that_the_prompt_is_a_part_of_stays_a_column() -> None:
    from format_rows import read_row, source

    row = verl(3)
    pair = read_row(row, source("prompts", columns={"prompt": "extra_info.question"}))
    assert pair.prompt == [Turn("user", "Find 3 + 2.")]
    assert json.loads(pair.columns) == row | {}


@pytest.mark.parametrize(
    "value, shown",
    [
        ("x" * 200, "x" * 200),
        ("x" * 1201, "x" * 200 + " ... (1,001 more characters)"),
        (["y"] * 20, ["y"] * 20),
        (["y"] * 100, str(["y"] * 50).replace("'", '"')[:200] + " ... (300 more characters)"),
        (7, 7),
        (None, None),
    ],
)
def test_logs_show_columns_up_to_a_length(value: Any, shown: Any) -> None:
    prompt = Prompt([Turn("user", "Hi")], json.dumps({"a": value, "b": 1}))
    assert prompt.short_columns() == {"a": shown, "b": 1}
    assert Prompt([Turn("user", "Hi")]).short_columns() == {}


@pytest.mark.usefixtures("cache")
def test_a_system_prompt_is_put_in_front_of_rows_without_one(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [verl(n) for n in range(ROWS)]
    own = message("system", "Be brief.")
    for row in rows[:7]:
        row["prompt"] = [own, *row["prompt"]]
    path = jsonl(tmp_path / "train.jsonl", rows)
    plain = prompts_of(config("verl", path))
    cfg = config("verl", path, "data.sources.verl.system_prompt='Think first.'")
    added = Turn("system", "Think first.")
    prompts = prompts_of(cfg)
    assert len(prompts) == ROWS
    assert sum(prompt.turns[0] == added for prompt in prompts) == ROWS - 7
    assert sum(prompt.turns[0] == Turn("system", "Be brief.") for prompt in prompts) == 7
    assert all([turn.role for turn in prompt.turns] == ["system", "user"] for prompt in prompts)
    # it changes neither which rows are held out nor their order
    assert [p.turns[-1] for p in prompts] == [p.turns[-1] for p in plain]
    [report] = load_data(cfg.data).report
    assert report["own_system"] == 7
    from rlhf.data.load import summarize

    assert "system_prompt: 7 rows with a system turn, which stays" in summarize(load_data(cfg.data))


@pytest.mark.usefixtures("cache")
def test_demonstrations_get_the_system_prompt_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "train.jsonl", [gsm8k(n) for n in range(ROWS)])
    data = load_data(config("gsm8k", path, "data.sources.gsm8k.system_prompt=Solve.").data)
    first = [row["prompt"][0] for row in data.sft] + [vars(d.prompt[0]) for d in data.eval_sft]
    assert first and all(turn == {"role": "system", "text": "Solve.", "more": ""} for turn in first)

"""Small files of preference data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def row(i: int, tag: str = "") -> Record:
    return {"prompt": f"Question {i}?", "chosen": f"Yes, {i}.{tag}", "rejected": f"No, {i}.{tag}"}


def rows(*numbers: int, tag: str = "") -> list[Record]:
    return [row(i, tag) for i in numbers]


def jsonl(path: Path, records: list[Record]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def digits(text: str) -> str:
    """Two tokens for each digit, in the tokenizer of builtin:tiny."""
    return " ".join(text)


def dialogue(*turns: str) -> str:
    return (
        "".join(f"\n\n{role}: {text}" for role, text in zip(["Human", "Assistant"] * 9, turns))
        + "\n\nAssistant:"
    )


def known_file(path: Path) -> Path:
    """60 lines of which every number is known: see the tests."""

    def row(prompt: str, chosen: str, rejected: str) -> str:
        return json.dumps(
            {"prompt": prompt, "chosen": digits(chosen), "rejected": digits(rejected)}
        )

    longer = [
        row(digits(f"1{i:02d}"), "1234", "12") for i in range(30)
    ]  # prompts of 8 tokens, answers of 9 and 5
    shorter = [row(digits(f"2{i:02d}"), "12", "1234") for i in range(10)]
    equal = [row(digits(f"3{i:02d}"), "123", "321") for i in range(10)]  # answers of 7
    alike = [row(digits("400"), "11111", "11112")]  # of 11, they differ in the last digit
    too_long = [row(digits("5" * 9), "1", "2")]  # a prompt of 20 tokens; answers of 3
    turns = [
        row(dialogue(digits("123"), "1", digits("600")), "1", "2")
    ]  # 18 tokens, 8 without the first turns
    left_out = [
        row(digits("700"), "1", "1"),
        row(digits("701"), "1", "1"),
        row(digits("800"), "", "1"),
        '{"prompt": ',
    ]
    lines = longer + shorter + equal + longer[:3] + alike + too_long + turns + left_out
    path.write_text("\n".join(lines) + "\n")
    return path

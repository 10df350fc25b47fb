"""Built-in verifiers: functions that check a response against a reference."""

from __future__ import annotations

import re

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"


def final_answer(text: str) -> str | None:
    """The final answer of a response: in \\boxed{}, else after ####, else the last number."""
    if boxed := re.findall(r"\\boxed\{([^{}]*)\}", text):
        return boxed[-1].strip()
    if marked := re.findall(r"####\s*(.+)", text):
        return marked[-1].strip()
    numbers = re.findall(NUMBER, text)
    return numbers[-1].replace(",", "") if numbers else None

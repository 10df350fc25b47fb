"""The responses of an evaluation as a file for other tools (eval.save_responses)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rlhf.base.files import atomic_path
from rlhf.base.log import log
from rlhf.data.records import Prompt
from rlhf.data.template import message_of
from rlhf.evaluation.win_rates import Responses, judgement
from rlhf.rewards.batch import columns_of


def response_lines(
    policy: str, prompts: Sequence[Prompt], rows: Responses, sources: Sequence[str], part: str
) -> list[str]:
    """A line of JSON for each response of a policy.

    Args:
        rows: equally many to each prompt, side by side, as evaluate_policy returns them.
        sources: of the score. A score is null where its source does not apply.
        part: held-out or fixed.
    """
    samples = len(rows) // max(1, len(prompts))
    lines = []
    for i, row in enumerate(rows):
        prompt = prompts[i // samples]
        line = {
            "policy": policy,
            "part": part,
            "prompt_number": i // samples,
            "sample": i % samples,
            "prompt": row["prompt"],
            "messages": [message_of(turn) for turn in prompt.turns],
            "response": row["completion"],
            "finished": bool(row["eos_rate"]),
            "length": row["length"],
            "scores": {name: judgement(row, name) for name in sources},
        }
        if "gold" in row:
            line["gold"] = row["gold"]
        line["columns"] = columns_of(prompt)
        lines.append(json.dumps(line))
    return lines


def write_responses(file: Path, lines: Sequence[str]) -> None:
    """Write the file, whole or not at all; one that is there is replaced."""
    with atomic_path(file) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    log.info(f"{len(lines):,} responses are in {file}")

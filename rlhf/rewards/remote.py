"""Rewards from a server that speaks OpenRLHF's remote reward protocol. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.log import plural
from rlhf.base.server import Server
from rlhf.rewards.batch import prompt_text
from rlhf.verifiers import REFERENCES, Scores, Text, references_of, setting, text_of


async def remote(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    url: str,
    timeout: float = 60.0,
    column: str | None = None,
    **columns: Any,
) -> Scores:
    """Rewards from a server that speaks OpenRLHF's protocol of remote reward models.

    One request for all rows: {"query": [prompt and completion], "prompts": [...], "labels": [...]};
    the answer is {"rewards": [...]}, a number or null (does not apply) per row. Its other keys, as
    OpenRLHF's `scores` and `extra_logs`, are not read. A label is the row's reference as text (a
    list where there are several), read as the verifiers read it, or null.

    Args:
        timeout: seconds for one request.
        column: the column with the reference.
    Raises: UserError where the server fails, and for another number of rewards, or no number.

    Source: github.com/OpenRLHF/OpenRLHF, openrlhf/cli/serve_rm.py.
    """
    labels: list[Any] = [None] * len(prompts)
    column = setting(column)
    if column is not None or any(columns.get(name) is not None for name in REFERENCES):
        found = references_of(len(prompts), columns, column)
        labels = [(row[0] if len(row) == 1 else row) if row else None for row in found]
    texts = [prompt_text(prompt) for prompt in prompts]
    query = [text + text_of(completion) for text, completion in zip(texts, completions)]
    server = Server(url, timeout)
    async with server.open():
        reply = await server.post({"query": query, "prompts": texts, "labels": labels})
    return _rewards(reply, len(query), server)


def _rewards(reply: Any, count: int, server: Server) -> Scores:
    """The rewards in a server's answer. Raises: UserError naming the URL."""
    url = server.shown
    if not isinstance(reply, dict) or not isinstance(reply.get("rewards"), list):
        has = ", ".join(map(str, reply)) if isinstance(reply, dict) else type(reply).__name__
        has = server.safe(has) or "nothing"
        raise UserError(
            f'{url}: the answer has no list "rewards" (it has {has}): '
            'it must be {"rewards": [...]}'
        )
    rewards = reply["rewards"]
    if len(rewards) != count:
        raise UserError(f"{url}: {plural(len(rewards), 'reward')} for {plural(count, 'response')}")
    for row, reward in enumerate(rewards):
        if reward is not None and not _is_number(reward):
            shown = server.hide(repr(reward))[:80]
            raise UserError(f"{url}: reward {row} is {shown}, not a finite number")
    return [None if reward is None else float(reward) for reward in rewards]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False

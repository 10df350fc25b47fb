"""Rewards from servers: OpenRLHF's remote reward protocol, and a judge that is asked to grade.

Both are reward functions in TRL's convention. A UserError of one line says what a server did wrong
(`rlhf/rewards/server.py`). No torch here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.base.errors import UserError
from rlhf.base.log import first_line, log, plural
from rlhf.rewards.server import SHOWN, Server
from rlhf.verifiers import REFERENCES, Scores, Text, references_of, text_of

PLACEHOLDER = re.compile(r"\{(prompt|completion|ground_truth)\}")
GRADE = re.compile(  # Score: 7, **Score:** 7/10, Score (0-10): 7, "score": 7, a score of 7
    r"score(?: of| is| \([^)\n]*\))?\W{0,6}?(-?\d+(?:\.\d+)?)", re.IGNORECASE
)
NUMBER = r"(?<![\w.])(-?\d+(?:\.\d+)?)(?: ?(?:/|out of) ?\d+)?"  # 7 in 7/10 and 7 out of 10
LAST_LINE = rf"(?m)^[^\w\n]*{NUMBER}[^\w\n]*\Z"  # of nothing but a number


# ------------------------------------------------------------------------------------ texts of rows


def prompt_text(prompt: Text) -> str:
    """A prompt as one text that a completion can follow.

    A single message is its content. Several are written one after the other with their roles, and
    then `assistant: `.
    """
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    turns = [f"{message['role']}: {message['content'] or ''}" for message in prompt]
    return "\n\n".join([*turns, "assistant: "])


def question_text(prompt: Text) -> str:
    """A prompt as a judge reads it: as `prompt_text`, without the beginning of the answer."""
    return prompt_text(prompt).removesuffix("\n\nassistant: ")


def has_references(columns: Mapping[str, Any], column: str | None) -> bool:
    """Whether the data have a column with references, or one is named."""
    return column is not None or any(columns.get(name) is not None for name in REFERENCES)


# ------------------------------------------------------------------------------------ a reward URL


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
    if has_references(columns, column):
        found = references_of(len(prompts), columns, column)
        labels = [(row[0] if len(row) == 1 else row) if row else None for row in found]
    texts = [prompt_text(prompt) for prompt in prompts]
    query = [text + text_of(completion) for text, completion in zip(texts, completions)]
    server = Server(url, timeout)
    async with server.open():
        reply = await server.post({"query": query, "prompts": texts, "labels": labels})
    return _rewards(reply, len(query), server.shown)


def _rewards(reply: Any, count: int, url: str) -> Scores:
    """The rewards in a server's answer. Raises: UserError naming the URL."""
    if not isinstance(reply, dict) or not isinstance(reply.get("rewards"), list):
        has = ", ".join(map(str, reply)) if isinstance(reply, dict) else type(reply).__name__
        raise UserError(
            f'{url}: the answer has no list "rewards" (it has {has[:SHOWN] or "nothing"}): it must '
            'be {"rewards": [...]}'
        )
    rewards = reply["rewards"]
    if len(rewards) != count:
        raise UserError(f"{url}: {plural(len(rewards), 'reward')} for {plural(count, 'response')}")
    for row, reward in enumerate(rewards):
        if reward is not None and not _is_number(reward):
            raise UserError(f"{url}: reward {row} is {reward!r:.80}, not a finite number")
    return [None if reward is None else float(reward) for reward in rewards]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


# ------------------------------------------------------------------------------------------ a judge


async def judge(
    prompts: Sequence[Text],
    completions: Sequence[Text],
    endpoint: str,
    model: str,
    rubric: str,
    api_key_env: str | None = None,
    timeout: float = 60.0,
    concurrency: int = 8,
    max_score: float = 10.0,
    max_tokens: int | None = None,
    cache: str | None = None,
    column: str | None = None,
    **columns: Any,
) -> Scores:
    """Grades from a language model behind an OpenAI-compatible server, from 0 to 1.

    Each row is one request with the rubric as the user's message. The grade is the number after the
    last "Score" in the reply, else a number that is its last line or its only number, divided by
    `max_score`. A reply without one from 0 to `max_score` gives None, and a warning counts these.
    With {ground_truth} in the rubric, a row without a reference gets None without a request.

    Replies with a grade are kept on disk by endpoint, model and message, so that the same question
    is not asked, or paid for, again.

    Args:
        endpoint: up to and including /v1.
        rubric: a file; {prompt}, {completion} and {ground_truth} in it are replaced.
        api_key_env: name of the environment variable with the API key; None = no key is sent.
        timeout: seconds for one request.
        concurrency: largest number of requests at the same time.
        max_tokens: of a reply; None = as the server decides.
        cache: folder of the replies; None = rlhf/judge in the user's cache directory.
        column: the column with the reference.
    Raises: UserError where the server fails, and for a rubric that cannot be used.
    """
    if concurrency < 1 or max_score <= 0:
        wrong = f"concurrency={concurrency}, max_score={max_score:g}"
        raise UserError(f"a judge needs both above 0 ({wrong})")
    template = read_rubric(rubric)
    references = [[""]] * len(prompts)
    if "{ground_truth}" in template:
        references = references_of(len(prompts), columns, column)
    rows = zip(prompts, completions, references)
    questions = [_rendered(template, *row) if row[2] else None for row in rows]
    request: dict[str, Any] = {"model": model, "temperature": 0}
    if max_tokens is not None:
        request["max_tokens"] = max_tokens
    server = Server(f"{endpoint.rstrip('/')}/chat/completions", timeout, api_key_env)
    asking = Asking(server, request, cache_folder(cache), concurrency)
    asked = [question for question in questions if question is not None]
    replies = await asking.ask_all(asked, lambda reply: grade(reply, max_score) is not None)
    grades = {question: (grade(reply, max_score), reply) for question, reply in replies.items()}
    _warn(list(grades.values()), max_score, server.shown)
    scores = [grades[question][0] if question is not None else None for question in questions]
    return [None if score is None else score / max_score for score in scores]


@dataclass
class Asking:
    """How questions are put to a language model, and where its replies are kept."""

    server: Server
    request: Mapping[str, Any]  # the other fields of a request
    folder: Path
    concurrency: int  # largest number of requests at the same time

    async def ask_all(
        self, questions: Sequence[str], usable: Callable[[str], bool]
    ) -> dict[str, str]:
        """The reply to each question; the same question is asked once. Usable replies are kept.

        Raises: UserError of the first request that fails, which ends all others.
        """
        free = asyncio.Semaphore(self.concurrency)
        tasks = {}
        try:
            async with self.server.open(), asyncio.TaskGroup() as group:
                for question in dict.fromkeys(questions):
                    tasks[question] = group.create_task(self._ask(question, usable, free))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return {question: task.result() for question, task in tasks.items()}

    async def _ask(
        self, question: str, usable: Callable[[str], bool], free: asyncio.Semaphore
    ) -> str:
        body = {**self.request, "messages": [{"role": "user", "content": question}]}
        key = hashlib.sha256(json.dumps([self.server.shown, body]).encode()).hexdigest()
        file = self.folder / key[:2] / f"{key}.json"
        if (reply := kept(file)) is not None:
            return reply
        async with free:
            reply = content_of(await self.server.post(body), self.server.shown)
        if usable(reply):
            keep(file, {"model": self.request["model"], "reply": reply})
        return reply


def read_rubric(path: str) -> str:
    """The text of a rubric. Raises: UserError where it cannot be read, or lacks {completion}."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the rubric (rubric={path}): {first_line(error)}") from None
    if "{completion}" not in text:
        raise UserError(
            f"the rubric has no {{completion}} (rubric={path}): write it where the response belongs"
        )
    return text


def _rendered(template: str, prompt: Text, completion: Text, references: Sequence[str]) -> str:
    """The rubric with the texts of a row; what looks like a placeholder in a text stays."""
    texts = {
        "prompt": question_text(prompt),
        "completion": text_of(completion),
        "ground_truth": " or ".join(references),
    }
    return PLACEHOLDER.sub(lambda name: texts[name[1]], template)


def grade(reply: str, max_score: float) -> float | None:
    """The grade in a judge's reply: the number after the last "Score", else a number that is the
    last line, else the only number. Not just the last one: a small model repeats the rubric, or
    solves the task ("3 + 4 = 7").

    Returns: None where there is none, or it is not from 0 to max_score.
    """
    numbers = GRADE.findall(reply) or re.findall(LAST_LINE, reply.strip())
    if not numbers and len(every := re.findall(NUMBER, reply)) == 1:
        numbers = every
    score = float(numbers[-1]) if numbers else -1.0
    return score if 0 <= score <= max_score else None


def content_of(reply: Any, url: str) -> str:
    """The text in an answer of /chat/completions. Raises: UserError where it has none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{url}: the answer has no choices[0].message.content") from None
    return content if isinstance(content, str) else ""  # null: a reply without text


def _warn(grades: Sequence[tuple[float | None, str]], max_score: float, url: str) -> None:
    """Warn of replies without a grade."""
    lacking = [reply for score, reply in grades if score is None]
    if lacking:
        log.warning(
            f"{url}: no score from 0 to {max_score:g} in {len(lacking)} of {len(grades)} replies; "
            f"one ends in {lacking[0].strip()[-80:]!r}"
        )


# ---------------------------------------------------------------------------------- replies on disk


def cache_folder(given: str | None) -> Path:
    """The folder of the replies, which is made. Raises: UserError where it cannot be."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    folder = (Path(given) if given else base / "rlhf" / "judge").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder of the judge's replies (cache={folder}): {error.strerror}: "
            "name another one"
        ) from None
    return folder


def kept(file: Path) -> str | None:
    """A reply from the disk; None where there is none that can be read."""
    try:
        reply = json.loads(file.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) else None


def keep(file: Path, reply: Mapping[str, str]) -> None:
    """Write a reply in one step. Other processes may write the same one."""
    file.parent.mkdir(exist_ok=True)
    own = file.with_suffix(f".{os.getpid()}.tmp")
    own.write_text(json.dumps(reply), encoding="utf-8")
    own.replace(file)

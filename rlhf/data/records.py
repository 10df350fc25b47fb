"""What every data source yields: turns of a conversation, and answers to them.

Records are plain text; only `template` renders them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

if TYPE_CHECKING:
    import datasets


SHORT = 200  # characters of a column that logs show


@dataclass(frozen=True)
class Turn:
    role: str  # user, assistant, system; with tools also tool, and tools for their definitions
    text: str  # of tools: JSON
    more: str = ""  # other keys of the message that a model's own template reads, as JSON


def uses_tools(turns: Sequence[Turn]) -> bool:
    """Whether some turns are of, or for, a tool."""
    return any(turn.role in ("tool", "tools") or "tool_calls" in turn.more for turn in turns)


@dataclass(frozen=True)
class Prompt:
    """What the policy responds to in online RL and evaluation."""

    turns: list[Turn]
    columns: str = ""  # the row's other columns, for reward functions, as JSON
    # the source's prompt is a list of messages, so reward functions get messages; else text
    is_messages: bool = field(default=False, compare=False)

    def short_columns(self) -> dict[str, Any]:
        """The other columns for logs: a value of more than SHORT characters is cut, visibly."""
        return {name: _shortened(value) for name, value in json.loads(self.columns or "{}").items()}


def _shortened(value: Any) -> Any:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= SHORT:
        return value
    return f"{text[:SHORT]} ... ({len(text) - SHORT:,} more characters)"


@dataclass(frozen=True)
class Demonstration:
    prompt: list[Turn]
    response: str
    calls: str = ""  # `Turn.more` of the response


@dataclass(frozen=True)
class Pair:
    prompt: list[Turn]
    chosen: str  # the answer that the label prefers
    rejected: str | None  # None where a source has no second answer
    gold_margin: float | None = None  # gold reward of chosen minus rejected, where it is known
    source: str = ""  # name of its source, where pairs are evaluated
    calls: str = ""  # `Turn.more` of the chosen answer, which may be a call of a tool
    columns: str = field(default="", compare=False)  # as in Prompt
    is_messages: bool = field(default=False, compare=False)  # as in Prompt


# those of the tables
PAIR_COLUMNS = ("prompt", "chosen", "rejected", "calls", "columns", "is_messages")


def record_features() -> dict[str, Any]:
    """The columns of a table of records, with their types."""
    import datasets

    strings = datasets.Value("string")
    turns = datasets.List({"role": strings, "text": strings, "more": strings})
    features = {"prompt": turns} | dict.fromkeys(PAIR_COLUMNS[1:], strings)
    return features | {"is_messages": datasets.Value("bool")}


class SourceReport(TypedDict):
    """Where the rows of one split of a source go, as data.json has it."""

    source: str
    split: str
    rows: int  # rows that were read
    skipped: dict[str, int]  # rows that no stage gets, by reason
    content: NotRequired[str]  # hash of the rows that could be read; files only
    files: NotRequired[list[str]]  # names of those of a folder or pattern that were read
    not_read: NotRequired[list[str]]  # other files and folders beside them
    further: NotRequired[int]  # pairs beyond the first that ranked responses of a row give
    own_system: NotRequired[int]  # rows that keep a system turn of their own: no system_prompt
    unread: NotRequired[list[str]]  # columns and parts of messages that the format does not read
    unreadable: NotRequired[dict[str, int]]  # rows by kind, the most frequent ones
    first_unreadable: NotRequired[str]  # where the first unreadable row is, and what is wrong
    examples: NotRequired[dict[str, str]]  # the first row of each kind of unreadable, skipped rows
    more_kinds: NotRequired[int]  # further kinds, which `unreadable` does not name
    separators: NotRequired[list[str]]  # between the fields of .csv files, where not commas
    sft: NotRequired[int]  # rows of each part; missing for plain text
    rm: NotRequired[int]
    ppo: NotRequired[int]
    eval: NotRequired[int]
    copies: NotRequired[int]  # rows that a weight above 1 adds
    texts: NotRequired[int]  # plain text only: rows for PPO's pretraining loss


class RowCounts(NamedTuple):
    """What the readable rows of all sources have, whatever stage gets them."""

    rows: int
    prompts: int  # distinct ones
    answers: int  # rows with an answer
    pairs: int  # rows with a rejected answer too


@dataclass(frozen=True)
class Dataset:
    """The data of all stages. No prompt is in two of sft, rm, ppo and eval_*.

    The training data are tables on disk with PAIR_COLUMNS; the evaluation data are small lists in
    memory.
    """

    sft: datasets.Dataset
    rm: datasets.Dataset
    ppo: datasets.Dataset  # each prompt once
    eval_sft: list[Demonstration]
    eval_rm: list[Pair]
    eval_prompts: list[Prompt]
    # held-out demonstrations that the unit of reward scores is measured on, whatever data.eval_rows
    score_unit: list[Demonstration] = field(default_factory=list)
    # pairs whose chosen answer fits its prompt, and whose rejected answer fits the opposite one
    eval_probe: list[Pair] = field(default_factory=list)
    gold: Callable[[list[Turn], str], float] | None = None  # gold reward of an answer, if known
    best_gold: Callable[[list[Turn]], float] | None = None  # that of the best possible answer
    texts: datasets.Dataset | None = None  # column text: for PPO's pretraining loss
    report: list[SourceReport] = field(default_factory=list)  # one of each source and split
    counts: RowCounts | None = None  # None for a built-in world


class World(NamedTuple):
    """The records of a built-in world by stage, and two functions of a prompt's turns.

    The prompts of sft, rm, ppo and evaluation are disjoint.
    """

    sft: list[Demonstration]
    rm: list[Pair]
    ppo: list[Prompt]
    eval_sft: list[Demonstration]
    eval_rm: list[Pair]  # as many of each held-out prompt
    eval_probe: list[Pair]
    eval_prompts: list[Prompt]
    score_unit: list[Demonstration]  # as in Dataset
    gold: Callable[[list[Turn], str], float]  # gold reward of an answer
    best_gold: Callable[[list[Turn]], float]  # gold reward of the best possible answer

"""Lengths of a table in tokens, what the limits do to its rows, and whether length predicts labels.

Where a table has more than SAMPLE rows, a random sample of them is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

import numpy as np

from rlhf.config.schema import Data
from rlhf.data import encoding
from rlhf.data.cache import Columns
from rlhf.data.records import SourceReport, Turn
from rlhf.data.tokenized import problem_of_row

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

SAMPLE = 20_000  # the largest number of rows of a table that are tokenized
NO_LIMIT = 10**9
Lengths = dict[str, np.ndarray]  # tokens of each prompt, chosen, rejected or text before any limit
Effect = Literal["unwritten", "dropped", "shortened", "truncated"]


class Spread(TypedDict):
    """Of lengths in tokens; each number is the length of a row."""

    median: int
    p95: int  # 95th percentile
    max: int


class Measurement(TypedDict):
    """Numbers of a table. All but `rows` and `distinct_prompts` are of the measured rows."""

    rows: int
    measured: int  # rows of the sample
    tokens: dict[str, Spread]  # by column, before any limit
    distinct_prompts: NotRequired[int]
    unwritten: NotRequired[int]  # rows with tools that the template cannot express
    dropped: NotRequired[int]  # rows without a place: the prompt's last turn alone is too long
    shortened: NotRequired[int]  # prompts that lose their first turns
    truncated: NotRequired[int]  # rows with an answer that is too long, which loses its EOS
    pairs: NotRequired[int]  # rows with two answers
    chosen_longer: NotRequired[int]  # pairs
    chosen_shorter: NotRequired[int]
    chosen_longer_by: NotRequired[float]  # mean difference in tokens
    same_truncated: NotRequired[int]  # pairs whose answers are equal after truncation


class MeasuredSource(SourceReport):
    """A source's report, its share of each part's rows, and its measurement."""

    share: dict[str, float]
    same_answers: int  # rows whose chosen and rejected answers are equal
    duplicates: int
    tokens: NotRequired[Measurement]


class ReferenceCheck(TypedDict):
    """A reward function on the reference answers of online RL's prompts."""

    reward: str  # its name in rl.rewards
    rows: int  # with a reference answer
    not_applicable: int  # of them: the function gives None
    failed: int  # a score below 1
    score: NotRequired[float]  # of the first that failed
    prompt: NotRequired[str]  # its last turn
    answer: NotRequired[str]
    without_score: NotRequired[str]  # the first answer that it does not apply to


class Inspection(TypedDict):
    """All results of stage=inspect, as result.json has them."""

    verdicts: list[str]
    template: str
    tokenizer: str
    sources: list[MeasuredSource]
    stages: dict[str, Measurement]
    leakage: dict[str, int]
    references: list[ReferenceCheck]


class _Prompts(NamedTuple):
    lengths: list[int]
    dropped: set[int]  # positions in the batch
    shortened: int


def measure(
    tokenizer: PreTrainedTokenizerBase, table: datasets.Dataset, answers: list[str], cfg: Data
) -> tuple[Measurement, Lengths]:
    """Lengths of a table's texts in tokens, and what the limits of `cfg` do to its rows.

    Args: answers: the columns of answers, null where a row has none; or ["text"] for plain text.
    """
    names = answers if answers == ["text"] else ["prompt", *answers]
    lengths: dict[str, list[int]] = {name: [] for name in names}
    counts: Counter[str] = Counter()
    sample = _sample(table, cfg.seed)
    columns = names if "text" in names else [*dict.fromkeys([*names, "chosen", "calls"])]
    for batch in sample.select_columns(columns).iter(1000):
        if "text" in names:
            ids = tokenizer(batch["text"], add_special_tokens=False).input_ids
            lengths["text"] += [len(row) for row in ids]
            continue
        turns, batch = _written(tokenizer, batch)
        counts["written"] += len(turns)
        prompts = _measure_prompts(tokenizer, turns, cfg.max_prompt_tokens)
        lengths["prompt"] += prompts.lengths
        counts["dropped"] += len(prompts.dropped)
        counts["shortened"] += prompts.shortened
        encoded = {
            name: _encode_some(
                tokenizer, batch[name], turns, batch["calls"] if name == "chosen" else None
            )
            for name in answers
        }
        for name, column in encoded.items():
            lengths[name] += [len(ids) for ids in column if ids is not None]
        for i, row in enumerate(zip(*encoded.values())):
            _count_answers(counts, row, i in prompts.dropped, cfg.max_response_tokens)
    arrays = {name: np.array(values, dtype=np.int64) for name, values in lengths.items()}
    tokens = {name: spread(values) for name, values in arrays.items() if len(values)}
    result = Measurement(rows=len(table), measured=len(sample), tokens=tokens)
    if "text" not in names:
        result["unwritten"] = len(sample) - counts["written"]
        result["dropped"], result["shortened"] = counts["dropped"], counts["shortened"]
        if answers:
            result["truncated"], result["pairs"] = counts["truncated"], counts["pairs"]
            result["chosen_longer"] = counts["chosen_longer"]
            result["chosen_shorter"] = counts["chosen_shorter"]
            result["same_truncated"] = counts["same_truncated"]
    if counts["pairs"]:
        result["chosen_longer_by"] = counts["difference"] / counts["pairs"]
    return result, arrays


def share(numbers: Measurement, effect: Effect) -> float:
    """The share of the measured rows that a limit has this effect on."""
    return numbers.get(effect, 0) / max(1, numbers["measured"])


def longer_is_better(numbers: Measurement) -> float:
    """The accuracy of "the longer answer is the better one"; equal lengths count half.

    There must be pairs.
    """
    pairs, longer, shorter = (numbers[k] for k in ("pairs", "chosen_longer", "chosen_shorter"))
    return (longer + (pairs - longer - shorter) / 2) / pairs


def spread(values: np.ndarray) -> Spread:
    """Median, 95th percentile and maximum; each is one of the values."""
    median, p95 = np.percentile(values, [50, 95], method="inverted_cdf").tolist()
    return {"median": int(median), "p95": int(p95), "max": int(values.max())}


def _sample(table: datasets.Dataset, seed: int) -> datasets.Dataset:
    if len(table) <= SAMPLE:
        return table
    rows = np.random.default_rng(seed).choice(len(table), SAMPLE, replace=False)
    return table.select(np.sort(rows))


def _written(
    tokenizer: PreTrainedTokenizerBase, batch: Columns
) -> tuple[list[list[Turn]], Columns]:
    """The prompts of a batch, and its columns, without rows with tools that cannot be expressed."""
    turns = [[Turn(**turn) for turn in prompt] for prompt in batch["prompt"]]
    rows = zip(turns, batch["chosen"], batch["calls"])
    kept = [i for i, row in enumerate(rows) if not problem_of_row(tokenizer, *row)]
    columns = {name: [values[i] for i in kept] for name, values in batch.items()}
    return [turns[i] for i in kept], columns


def _measure_prompts(
    tokenizer: PreTrainedTokenizerBase, turns: list[list[Turn]], limit: int
) -> _Prompts:
    lengths = [len(ids or []) for ids in encoding.encode_prompts(tokenizer, turns, NO_LIMIT)]
    long = [i for i, length in enumerate(lengths) if length > limit]
    fitted = encoding.encode_prompts(tokenizer, [turns[i] for i in long], limit)
    dropped = {i for i, ids in zip(long, fitted) if ids is None}
    return _Prompts(lengths, dropped, shortened=len(long) - len(dropped))


def _encode_some(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | None],
    prompts: Sequence[list[Turn]],
    calls: Sequence[str] | None,
) -> list[list[int] | None]:
    """Token ids of answers with their EOS; None where there is no answer."""
    given = [i for i, text in enumerate(texts) if text or (calls and calls[i])]
    ids = encoding.encode_responses(
        tokenizer,
        [texts[i] or "" for i in given],
        NO_LIMIT,
        [prompts[i] for i in given],
        [calls[i] for i in given] if calls else None,
    )
    encoded: list[list[int] | None] = [None] * len(texts)
    for i, row in zip(given, ids):
        encoded[i] = row
    return encoded


def _count_answers(
    counts: Counter[str], answers: tuple[list[int] | None, ...], dropped: bool, limit: int
) -> None:
    """Count the answers of one row. Args: dropped: the row's prompt is too long."""
    there = [ids for ids in answers if ids is not None]
    if not dropped and any(len(ids) > limit for ids in there):
        counts["truncated"] += 1
    if len(there) == 2:
        chosen, rejected = there
        counts["pairs"] += 1
        counts["chosen_longer"] += len(chosen) > len(rejected)
        counts["chosen_shorter"] += len(chosen) < len(rejected)
        counts["same_truncated"] += chosen[:limit] == rejected[:limit]
        counts["difference"] += len(chosen) - len(rejected)

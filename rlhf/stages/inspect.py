"""The dataset doctor: looks at the data as the stages will see them, trains nothing, and writes one page, run_dir/report.html.

Counts of rows and leakage are over all rows; whatever needs tokens is over a random sample where there are more than SAMPLE rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config.schema import Config, Data
from rlhf.data import template
from rlhf.data.load import load_data, summarize, table_of
from rlhf.data.records import Dataset, Pair, Turn
from rlhf.data.sources import read
from rlhf.data.splits import PARTS
from rlhf.models.loading import check_context, load_tokenizer
from rlhf.reporting.inspect_page import Lengths, by_length, name_of, page, share
from rlhf.runs.directory import write_json
from rlhf.runs.log import log

SAMPLE = 20_000  # rows of a part that are tokenised, at most
NO_LIMIT = 10**9


def run(cfg: Config, run_dir: Path) -> dict[str, Any]:
    """Look at the data; write run_dir/report.html and data.json. Returns what was found: verdicts, sources, stages, leakage.

    Raises: FileNotFoundError, ValueError naming the source and what is wrong with it.
    """
    tokenizer = load_tokenizer(cfg.actor.path, cfg.data.template)
    data = load_data(cfg.data)
    log.info(summarize(data))
    write_json(run_dir / "data.json", data.report)

    parts = parts_of(data)
    lengths: dict[str, Lengths] = {}
    stages: dict[str, Any] = {}
    for name, (table, answers) in parts.items():
        stages[name], lengths[name] = measure(tokenizer, table, answers, cfg.data)
    found_in_sources = []
    for entry, table in zip(of_sources(data), tables_of_sources(data, cfg.data)):
        name = name_of(entry)
        answers = ["text"] if "text" in table.column_names else ["chosen", "rejected"]
        entry["tokens"], lengths[name] = measure(tokenizer, table, answers, cfg.data)
        found_in_sources.append(entry)
    between, distinct = leakage(data)
    for name, count in distinct.items():
        if name in stages:
            stages[name]["distinct_prompts"] = count

    found: dict[str, Any] = {
        "template": cfg.data.template.name,
        "tokenizer": cfg.actor.path,
        "sources": found_in_sources,
        "stages": stages,
        "leakage": between,
    }
    found = {"verdicts": verdicts(found, cfg), **found}
    (run_dir / "report.html").write_text(
        page(found, lengths, parts, tokenizer, cfg), encoding="utf-8", errors="replace"
    )
    return found


def parts_of(data: Dataset) -> dict[str, tuple[Any, list[str]]]:
    """The table of each stage and evaluation, and the columns with the answers that it uses."""
    demonstrations = table_of(Pair(d.prompt, d.response, None) for d in data.eval_sft)
    parts: dict[str, tuple[Any, list[str]]] = {
        "sft": (data.sft, ["chosen"]),
        "rm": (data.rm, ["chosen", "rejected"]),
        "ppo": (data.ppo, []),
        "eval sft": (demonstrations, ["chosen"]),
        "eval rm": (table_of(data.eval_rm), ["chosen", "rejected"]),
    }
    return parts | ({"ppo texts": (data.texts, ["text"])} if data.texts is not None else {})


def of_sources(data: Dataset) -> list[dict[str, Any]]:
    """What load_data reports of each source and split, with its share of the rows of each stage, and two reasons by name."""
    totals = {part: sum(report.get(part, 0) for report in data.report) for part in PARTS}
    entries = []
    for report in data.report:
        share = {part: report.get(part, 0) / total for part, total in totals.items() if total}
        same = report["left_out"].get("the same answer twice", 0)
        entries.append(
            {
                **report,
                "share": share,
                "same_answers": same,
                "duplicates": report["left_out"].get("the same row again", 0),
            }
        )
    return entries


def tables_of_sources(data: Dataset, cfg: Data) -> Iterable[Any]:
    """The table of each entry of data.report: what of a source and split could be read. From the cache, since load_data was here."""
    import datasets

    if cfg.sandbox is not None:
        yield datasets.concatenate_datasets([data.sft, data.rm])
        return
    for report in data.report:
        source = cfg.sources[report["source"]]
        if Path(source.path).expanduser().is_file():
            source = dataclasses.replace(
                source, eval_split=None
            )  # as load_sources reads it, for the same key in the cache
        yield read(report["source"], source, report["split"], cfg)[0]


# ---------------------------------------------------------------------------------------------------------------------- measuring


def measure(
    tokenizer: Any, table: Any, answers: list[str], cfg: Data
) -> tuple[dict[str, Any], Lengths]:
    """Lengths in tokens of a table, what the limits do to it, and how the lengths of chosen and rejected differ.

    Args: answers: its columns with answers; null where a row has none. Or ["text"], for plain text.
    Returns: numbers of the rows `measured`, and the lengths behind them.
    """
    names = answers if answers == ["text"] else ["prompt", *answers]
    lists: dict[str, list[int]] = {name: [] for name in names}
    count = dict.fromkeys(
        ("dropped", "shortened", "cut", "pairs", "alike", "chosen_longer", "chosen_shorter"), 0
    )
    difference = 0
    sample = table
    if len(table) > SAMPLE:
        sample = table.select(
            np.sort(np.random.default_rng(cfg.seed).choice(len(table), SAMPLE, replace=False))
        )
    for batch in sample.select_columns(names).iter(1000):
        if "text" in names:
            lists["text"] += [
                len(ids) for ids in tokenizer(batch["text"], add_special_tokens=False).input_ids
            ]
            continue
        turns = [[Turn(**turn) for turn in prompt] for prompt in batch["prompt"]]
        prompts = [len(ids or []) for ids in template.encode_prompts(tokenizer, turns, NO_LIMIT)]
        lists["prompt"] += prompts
        long = [i for i, length in enumerate(prompts) if length > cfg.max_prompt_tokens]
        fitted = template.encode_prompts(tokenizer, [turns[i] for i in long], cfg.max_prompt_tokens)
        dropped = {i for i, ids in zip(long, fitted) if ids is None}
        count["dropped"] += len(dropped)
        count["shortened"] += len(long) - len(dropped)
        encoded = {name: encode_some(tokenizer, batch[name]) for name in answers}
        for name, column in encoded.items():
            lists[name] += [len(ids) for ids in column if ids is not None]
        for i, row in enumerate(zip(*encoded.values())):
            count["cut"] += i not in dropped and any(
                len(ids) > cfg.max_response_tokens for ids in row if ids is not None
            )
            if len(row) == 2 and row[0] is not None and row[1] is not None:
                chosen, rejected = row
                count["pairs"] += 1
                count["chosen_longer"] += len(chosen) > len(rejected)
                count["chosen_shorter"] += len(chosen) < len(rejected)
                count["alike"] += (
                    chosen[: cfg.max_response_tokens] == rejected[: cfg.max_response_tokens]
                )
                difference += len(chosen) - len(rejected)
    lengths = {name: np.array(values, dtype=np.int64) for name, values in lists.items()}
    numbers: dict[str, Any] = {"rows": len(table), "measured": len(sample)}
    numbers["tokens"] = {name: spread(values) for name, values in lengths.items() if len(values)}
    if "text" not in names:
        numbers |= count if answers else {key: count[key] for key in ("dropped", "shortened")}
    if count["pairs"]:
        numbers["chosen_longer_by"] = difference / count["pairs"]  # mean, in tokens
    return numbers, lengths


def encode_some(tokenizer: Any, texts: Sequence[str | None]) -> list[list[int] | None]:
    """Token ids of whole answers, EOS included; None where there is none."""
    ids = iter(
        template.encode_responses(tokenizer, [text for text in texts if text is not None], NO_LIMIT)
    )
    return [None if text is None else next(ids) for text in texts]


def spread(values: np.ndarray) -> dict[str, int]:
    """Median, 95th percentile and maximum; each is one of the values."""
    median, p95 = np.percentile(values, [50, 95], method="inverted_cdf").tolist()
    return {"median": int(median), "p95": int(p95), "max": int(values.max())}


def leakage(data: Dataset) -> tuple[dict[str, int], dict[str, int]]:
    """Prompts that two parts share, by "sft & rm" and so on: counted anew from the texts, and it must be 0. And the number of different
    prompts of each part. Two prompts are the same when they differ in case and spaces only."""
    evaluated = (
        [d.prompt for d in data.eval_sft]
        + [p.prompt for p in data.eval_rm + data.eval_probe]
        + data.eval_prompts
    )
    keys = {
        name: hashes_of(table)
        for name, table in (("sft", data.sft), ("rm", data.rm), ("ppo", data.ppo))
    }
    keys["eval"] = np.unique(
        np.array(
            [hash_of((turn.role, turn.text) for turn in prompt) for prompt in evaluated],
            dtype=np.uint64,
        )
    )
    names = list(keys)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    shared = {
        f"{a} & {b}": len(np.intersect1d(keys[a], keys[b], assume_unique=True)) for a, b in pairs
    }
    return shared, {name: len(values) for name, values in keys.items()}


def hashes_of(table: Any) -> np.ndarray:
    """Hashes of the different prompts of a table, sorted: 8 bytes each, the texts are read in pieces."""
    pieces = [
        np.array(
            [
                hash_of((turn["role"], turn["text"]) for turn in prompt)
                for prompt in batch["prompt"]
            ],
            dtype=np.uint64,
        )
        for batch in table.select_columns(["prompt"]).iter(1000)
    ]
    return np.unique(np.concatenate(pieces)) if pieces else np.array([], dtype=np.uint64)


def hash_of(turns: Iterable[tuple[str, str]]) -> int:
    text = "\0".join(f"{role}\1{' '.join(text.lower().split())}" for role, text in turns)
    return int.from_bytes(
        hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big"
    )


# ----------------------------------------------------------------------------------------------------------------------- judging


def verdicts(found: dict[str, Any], cfg: Config) -> list[str]:
    """What a user should know before training, each in one line that says what to do; empty when there is nothing to worry about."""
    lines = []
    stages = {
        name: numbers for name, numbers in found["stages"].items() if name in ("sft", "rm", "ppo")
    }
    for pair, count in found["leakage"].items():
        if count:
            lines.append(
                f"prompts that stand both in {pair.replace(' & ', ' and in ')}: {count:,}; there must be none, please report this"
            )
    for name, numbers in stages.items():
        batch_size = getattr(cfg, name).batch_size
        # what is left of the sample, scaled to all rows
        rows = int(numbers["rows"] * (1 - numbers["dropped"] / max(1, numbers["measured"])))
        if not numbers["rows"]:
            why = "no source has second answers, or they are" if name == "rm" else "the sources are"
            lines.append(f"no rows for {name}: {why} too small for data.shares")
        elif rows < batch_size:
            lines.append(
                f"{rows:,} rows for {name} are fewer than one batch: lower {name}.batch_size={batch_size}, or add data"
            )
    for name in ("eval sft", "eval rm"):
        if not found["stages"][name]["rows"] and (name == "eval sft" or stages["rm"]["rows"]):
            lines.append(
                f"no rows to evaluate {name.split()[1]} on: raise data.eval_share={cfg.data.eval_share:g}, or add data"
            )
    try:
        check_context(cfg.actor.path, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens)
    except ValueError as error:
        lines.append(str(error))

    limits = [
        ("dropped", "prompt", "max_prompt_tokens", "have too long a prompt and are left out", 0.02),
        (
            "shortened",
            "prompt",
            "max_prompt_tokens",
            "have a prompt that loses its first turns",
            0.1,
        ),
        (
            "cut",
            "answer",
            "max_response_tokens",
            "have an answer that is cut, and so without EOS",
            0.02,
        ),
    ]
    for key, what, setting, happens, enough in limits:
        many = {name: numbers for name, numbers in stages.items() if share(numbers, key) >= enough}
        if many:
            needed = max(
                s["p95"]
                for n in many.values()
                for part, s in n["tokens"].items()
                if (part == "prompt") == (what == "prompt")
            )
            where = ", ".join(
                f"{share(numbers, key):.0%} of {name}" for name, numbers in many.items()
            )
            limit = f"data.{setting}={getattr(cfg.data, setting)}"
            lines.append(
                f"rows that {happens}: {where}: raise {limit}; 95 % of the {what}s have up to {needed:,} tokens"
            )
    if alike := stages["rm"]["alike"]:
        lines.append(
            f"pairs of rm that are the same answer twice, once they are cut: {alike:,}; raise data.max_response_tokens"
        )
    if bias := length_bias(stages["rm"]):
        lines.append(bias)

    for entry in found["sources"]:
        name, rows, left_out = name_of(entry), entry["rows"], entry["left_out"]
        if "first_unreadable" in entry:
            lines.append(
                f"rows of {name} that cannot be read: {left_out['cannot be read']:,}, for instance {entry['first_unreadable']}"
            )
        if entry["same_answers"]:
            lines.append(
                f"rows of {name} with the same answer as chosen and as rejected: {entry['same_answers']:,}; they are left out"
            )
        if rows and sum(left_out.values()) > 0.2 * rows:
            reason, count = max(left_out.items(), key=lambda item: item[1])
            lines.append(
                f"{sum(left_out.values()) / rows:.0%} of the rows of {name} are left out, most of them for: {reason} ({count:,})"
            )
    return lines


def length_bias(numbers: dict[str, Any]) -> str:
    """A line when a judge that only counts tokens would guess many of the labels; "" otherwise, and where that may be chance."""
    if not numbers["pairs"]:
        return ""
    guessed = by_length(numbers)
    longer = guessed > 0.5
    # three standard errors: fewer pairs may look biased by chance
    if abs(guessed - 0.5) < max(0.1, 1.5 / numbers["pairs"] ** 0.5):
        return ""
    word, count = (
        ("longer", numbers["chosen_longer"]) if longer else ("shorter", numbers["chosen_shorter"])
    )
    meaning = f"a judge that only counts tokens is right on {max(guessed, 1 - guessed):.0%}; compare eval/accuracy of rm with that"
    watch = "and watch the length of the answers in PPO"
    return f"chosen answers are {word} in {count / numbers['pairs']:.0%} of the pairs: {meaning}, {watch}"

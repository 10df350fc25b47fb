"""Preference data from files and the hub: which columns a row has, and which stage its prompt belongs to."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.config import Data, Format, Source
from rlhf.data.records import Dataset, Demonstration, Pair, Turn
from rlhf.data.template import USER, parse_dialogue

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_sources(cfg: Data) -> Dataset:
    """Mix all sources of `data.sources`. Stage and evaluation are decided by a hash of the prompt, so that a prompt stands in
    one of them only, whatever the sources and their order. SFT learns the chosen answers.

    Raises: FileNotFoundError, ValueError naming the source and what is wrong with it.
    """
    parts: dict[str, list[Pair]] = {"sft": [], "rm": [], "ppo": [], "eval": []}
    for name, source in cfg.sources.items():
        for pair in read_pairs(name, source):
            parts[part_of(pair.prompt, cfg)].append(pair)
    empty = [part for part, pairs in parts.items() if not pairs]
    if empty:
        raise ValueError(f"data={'+'.join(cfg.sources)}: no rows fall to {', '.join(empty)}; the sources are too small for data.shares")

    def prompts(pairs: list[Pair]) -> list[list[Turn]]:
        return list({str(pair.prompt): pair.prompt for pair in pairs}.values())

    held_out = parts["eval"][: cfg.eval_rows]
    return Dataset(
        sft=[Demonstration(pair.prompt, pair.chosen) for pair in parts["sft"]],
        rm=parts["rm"],
        ppo=prompts(parts["ppo"]),
        eval_sft=[Demonstration(pair.prompt, pair.chosen) for pair in held_out],
        eval_rm=held_out,
        eval_prompts=prompts(held_out),
    )


def part_of(prompt: list[Turn], cfg: Data) -> str:
    """The part of the data that a prompt belongs to: a function of its text (case and spaces aside) and `data.seed`."""
    text = "|".join(f"{turn.role}:{' '.join(turn.text.lower().split())}" for turn in prompt)
    digest = hashlib.sha256(f"{cfg.seed}|{text}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < cfg.eval_share:
        return "eval"
    place = (place - cfg.eval_share) / (1 - cfg.eval_share) * sum(cfg.shares)
    return "sft" if place < cfg.shares[0] else "rm" if place < cfg.shares[0] + cfg.shares[1] else "ppo"


def read_pairs(name: str, source: Source) -> list[Pair]:
    """All preference pairs of a source. Raises FileNotFoundError, ValueError naming source, row and columns."""
    rows = _rows(name, source.path)
    columns, read = READERS[source.format]
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        has = ", ".join(rows.column_names)
        raise ValueError(
            f"data.sources.{name}: format {source.format.name} needs the columns {', '.join(columns)}; {source.path} has {has}"
        )
    pairs = []
    for i, row in enumerate(rows):
        try:
            pair = read(row)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(f"data.sources.{name}: row {i} of {source.path}: {error}") from None
        if pair.chosen and pair.rejected:  # HH has a few dialogues that end before the answer
            pairs.append(pair)
    if not pairs:
        raise ValueError(f"data.sources.{name}: no row of {source.path} has two answers")
    if len(pairs) < len(rows):
        logging.getLogger("rlhf").info(f"{name}: {len(rows) - len(pairs)} of {len(rows)} rows have an empty answer and are left out")
    return pairs


def _rows(name: str, path: str) -> Any:
    import datasets

    datasets.disable_progress_bars()
    file = Path(path).expanduser()
    if file.exists() or path[:1] in "/.~":
        if not file.is_file():
            raise FileNotFoundError(f"data.sources.{name}.path={path}: no such file")
        builder = BUILDERS.get(Path(path.removesuffix(".gz")).suffix)
        if builder is None:
            raise ValueError(f"data.sources.{name}.path={path}: give a file ending in {', '.join(BUILDERS)} (.gz too), or a hub id")
        try:
            return datasets.load_dataset(builder, data_files=str(file), split="train")
        except Exception as error:  # StopIteration for an empty file, and many others
            raise ValueError(f"data.sources.{name}.path={path}: cannot be read: {error.__cause__ or error or 'it is empty'}") from None
    try:
        return datasets.load_dataset(path, split="train")
    except Exception as error:  # the hub's errors are many and long
        raise FileNotFoundError(f"data.sources.{name}.path={path}: not to be had from the hub: {str(error).splitlines()[0]}") from None


def _prompt_chosen_rejected(row: dict[str, Any]) -> Pair:
    """`prompt` is a dialogue "\\n\\nHuman: ...\\n\\nAssistant:" (or a bare question), the answers stand alone."""
    text = row["prompt"]
    prompt = parse_dialogue(text) if USER in text else [Turn("user", text.strip())]
    return Pair(prompt, row["chosen"].strip(), row["rejected"].strip())


def _chosen_rejected(row: dict[str, Any]) -> Pair:
    """Two whole dialogues that differ in the last answer, as in Anthropic's HH. The answer of one that ends with the user is empty."""
    (prompt, chosen), (_, rejected) = _split_answer(row["chosen"]), _split_answer(row["rejected"])
    return Pair(prompt, chosen, rejected)


def _split_answer(dialogue: str) -> tuple[list[Turn], str]:
    turns = parse_dialogue(dialogue)
    return (turns[:-1], turns[-1].text) if turns[-1].role == "assistant" else (turns, "")


READERS: dict[Format, tuple[list[str], Callable[[dict[str, Any]], Pair]]] = {
    Format.prompt_chosen_rejected: (["prompt", "chosen", "rejected"], _prompt_chosen_rejected),
    Format.chosen_rejected: (["chosen", "rejected"], _chosen_rejected),
}

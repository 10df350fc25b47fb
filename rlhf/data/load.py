"""The data of all stages as records, and their token ids on disk; templates and batches are next door."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from rlhf.config.schema import Config, Data
from rlhf.data import template
from rlhf.data.records import Dataset, Pair, Turn
from rlhf.data.sources import cached_map, digest, load_sources
from rlhf.data.splits import PARTS
from rlhf.distributed import collectives
from rlhf.runs.directory import write_json
from rlhf.runs.log import log

Row = TypeVar("Row")


def open_data(cfg: Config, run_dir: Path) -> Dataset:
    """The records for the stage that runs; says what was read and where it went, there and in run_dir/data.json.

    Raises: ValueError when there is nothing for this stage, and what load_data raises.
    """
    data = load_data(cfg.data)
    log.info(summarize(data))
    if collectives.rank() == 0:
        known = run_dir / "data.json"  # of the attempt that this one goes on from
        if (run_dir / "checkpoints").exists() and json.loads(known.read_text()) != json.loads(
            json.dumps(data.report)
        ):
            raise ValueError(
                "the data are not those that this run has learnt from so far; add fresh=true to train it anew"
            )
        write_json(known, data.report)
    stage, pairs = cfg.stage.name, (data.rm, data.eval_rm)
    needed: tuple[Any, ...] = {"sft": (data.sft, data.eval_sft), "rm": pairs, "dpo": pairs}.get(
        stage, (data.ppo, data.eval_prompts)
    )
    if stage == "eval":
        needed = (data.eval_prompts,) if cfg.eval.policies else (data.eval_rm,)
    for part, what in zip(needed, ("", " to evaluate on")[-len(needed) :]):
        if not len(part):
            why = (
                "no source has second answers, or they are"
                if stage in ("rm", "dpo")
                else "the sources are"
            )
            raise ValueError(
                f"data={'+'.join(cfg.data.sources)}: no rows{what} for {cfg.stage.name}: {why} too small for data.shares"
            )
    return data


def load_data(cfg: Data) -> Dataset:
    """The records of all stages, from the sandbox or from the configured sources.

    Raises: FileNotFoundError, ValueError naming the source and what is wrong with it.
    """
    if cfg.sandbox is None:
        return load_sources(cfg)
    from rlhf.data.sandbox import build_world

    world = build_world(cfg.sandbox, cfg.seed, cfg.eval_rows)
    sizes = {
        "sft": len(world.sft),
        "rm": len(world.rm),
        "ppo": len(world.ppo),
        "eval": len(world.eval_sft),
    }
    return dataclasses.replace(
        world,
        sft=table_of(Pair(d.prompt, d.response, None) for d in world.sft),
        rm=table_of(world.rm),
        ppo=table_of(Pair(prompt, "", None) for prompt in world.ppo),
        report=[
            {
                "source": "sandbox",
                "split": "train",
                "rows": sum(sizes.values()),
                "left_out": {},
                **sizes,
            }
        ],
    )


def table_of(pairs: Iterable[Pair]) -> Any:
    """Records of the memory as a table."""
    import datasets

    rows = list(pairs)
    strings = datasets.Value("string")
    features = {
        "prompt": datasets.List({"role": strings, "text": strings}),
        "chosen": strings,
        "rejected": strings,
    }
    columns = {
        "prompt": [
            [{"role": turn.role, "text": turn.text} for turn in pair.prompt] for pair in rows
        ],
        "chosen": [pair.chosen for pair in rows],
        "rejected": [pair.rejected for pair in rows],
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def summarize(data: Dataset) -> str:
    """What was read and where it went, a line for each source."""
    lines = []
    for report in data.report:
        where = ", ".join(
            f"{part} {report[part]:,}" for part in (*PARTS, "texts") if part in report
        )
        where += f" ({report['copies']:,} copies by weight)" if report.get("copies") else ""
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in report["left_out"].items())
        lines.append(
            f"{report['source']}/{report['split']}: {report['rows']:,} rows: {where}"
            + (f"; left out: {left_out}" if left_out else "")
        )
        if "first_unreadable" in report:
            lines.append(f"  for instance {report['first_unreadable']}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------------------- tokens


class Rows(Sequence[Row], Generic[Row]):
    """Token ids of a part of the data, read from disk row by row.

    `lengths`: tokens of each row (of a pair, of the longer answer with its prompt).  `dropped`: rows left out because their prompt is
    too long.  `cut`: rows with an answer that was too long, and so carries no EOS.
    """

    def __init__(self, table: Any, read: Callable[[dict[str, Any]], Row]):
        kept = table.data.column("kept").to_numpy(zero_copy_only=False)
        self.lengths: Sequence[int] = table.data.column("length").to_numpy()[
            kept
        ]  # an array: a list would take ten times as much
        self.dropped, self.cut = (
            int((~kept).sum()),
            int(table.data.column("cut").to_numpy(zero_copy_only=False)[kept].sum()),
        )
        self.table = table if kept.all() else table.select(np.flatnonzero(kept))
        self.read = read

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        return (
            [self[j] for j in range(*i.indices(len(self)))]
            if isinstance(i, slice)
            else self.read(self.table[i])
        )

    def __str__(self) -> str:
        notes = [f"{self.dropped:,} with too long a prompt left out"] * bool(self.dropped) + [
            f"{self.cut:,} cut"
        ] * bool(self.cut)
        return f"{len(self):,}" + (f" ({', '.join(notes)})" if notes else "")


def demonstrations(
    tokenizer: Any, table: Any, max_prompt: int, max_response: int, workers: int | None = None
) -> Rows[tuple[list[int], list[int]]]:
    """Token ids of prompt and answer. Demonstrations with a prompt that is too long are left out, longer answers are cut."""
    done = encoded(tokenizer, table, ["chosen"], max_prompt, max_response, workers)
    return Rows(done, lambda row: (row["prompt"], row["chosen"]))


def pairs(
    tokenizer: Any, table: Any, max_prompt: int, max_response: int, workers: int | None = None
) -> Rows[tuple[list[int], list[int], list[int]]]:
    """Token ids of prompt, chosen and rejected, likewise."""
    done = encoded(tokenizer, table, ["chosen", "rejected"], max_prompt, max_response, workers)
    return Rows(done, lambda row: (row["prompt"], row["chosen"], row["rejected"]))


def prompts(
    tokenizer: Any, table: Any, max_prompt: int, workers: int | None = None
) -> Rows[tuple[list[Turn], list[int]]]:
    """Turns and token ids of each prompt that is not too long."""
    done = encoded(tokenizer, table, ["turns"], max_prompt, 0, workers)
    return Rows(done, lambda row: ([Turn(**turn) for turn in row["turns"]], row["prompt"]))


def texts(
    tokenizer: Any, table: Any, max_tokens: int, workers: int | None = None
) -> Rows[tuple[list[int], list[int]]]:
    """Token ids of plain texts, at most `max_tokens` of each, as (first token, the rest): a text predicts all but its first. Texts of
    one token are left out."""
    import datasets

    ids, integer = datasets.List(datasets.Value("int32")), datasets.Value("int32")
    features = {
        "ids": ids,
        "kept": datasets.Value("bool"),
        "cut": datasets.Value("bool"),
        "length": integer,
    }
    key = digest(
        table._fingerprint,
        template.content(tokenizer),
        str(("text", max_tokens)),
        Path(__file__).read_text(),
    )
    arguments = {"tokenizer": tokenizer, "max_tokens": max_tokens}
    done = cached_map(
        table, encode_texts, key, "tokenising", workers, arguments, datasets.Features(features)
    )
    return Rows(done, lambda row: (row["ids"][:1], row["ids"][1:]))


def encode_texts(
    batch: dict[str, list[Any]], tokenizer: Any, max_tokens: int
) -> dict[str, list[Any]]:
    ids = tokenizer(batch["text"], add_special_tokens=False).input_ids
    return {
        "ids": [row[:max_tokens] for row in ids],
        "kept": [min(len(row), max_tokens) > 1 for row in ids],
        "cut": [len(row) > max_tokens for row in ids],
        "length": [min(len(row), max_tokens) for row in ids],
    }


def encoded(
    tokenizer: Any,
    table: Any,
    columns: list[str],
    max_prompt: int,
    max_response: int,
    workers: int | None,
) -> Any:
    """A table with the token ids of the prompts and of some columns (`turns`: the prompts as they are, too)."""
    import datasets

    ids, strings = datasets.List(datasets.Value("int32")), datasets.Value("string")
    features = {
        "prompt": ids,
        "kept": datasets.Value("bool"),
        "cut": datasets.Value("bool"),
        "length": datasets.Value("int32"),
    }
    features |= {
        name: datasets.List({"role": strings, "text": strings}) if name == "turns" else ids
        for name in columns
    }
    code = Path(__file__).read_text() + Path(template.__file__).read_text()
    key = digest(
        table._fingerprint,
        template.content(tokenizer),
        str((columns, max_prompt, max_response)),
        code,
    )
    arguments = {
        "tokenizer": tokenizer,
        "columns": columns,
        "max_prompt": max_prompt,
        "max_response": max_response,
    }
    return cached_map(
        table, encode_batch, key, "tokenising", workers, arguments, datasets.Features(features)
    )


def encode_batch(
    batch: dict[str, list[Any]],
    tokenizer: Any,
    columns: list[str],
    max_prompt: int,
    max_response: int,
) -> dict[str, list[Any]]:
    turns = [[Turn(**turn) for turn in prompt] for prompt in batch["prompt"]]
    in_tokens = template.encode_prompts(tokenizer, turns, max_prompt)
    answers = {
        name: template.encode_responses(tokenizer, batch[name], max_response)
        for name in columns
        if name != "turns"
    }
    longest = (
        [max((len(ids) for ids in row), default=0) for row in zip(*answers.values())]
        if answers
        else [0] * len(turns)
    )
    ends = (
        [all(ids[-1] == tokenizer.eos_token_id for ids in row) for row in zip(*answers.values())]
        if answers
        else [True] * len(turns)
    )
    return {
        "prompt": [ids or [] for ids in in_tokens],
        "kept": [ids is not None for ids in in_tokens],
        "cut": [not end for end in ends],
        "length": [len(ids or []) + answer for ids, answer in zip(in_tokens, longest)],
        **answers,
        **({"turns": batch["prompt"]} if "turns" in columns else {}),
    }

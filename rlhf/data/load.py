"""Load the data of the stage that runs: from the sandbox, or from the configured sources."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sized
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.constants import SANDBOX_HELD_OUT
from rlhf.base.errors import UserError
from rlhf.base.log import first_few, log
from rlhf.config.schema import Config, Data
from rlhf.data.records import (
    PAIR_COLUMNS,
    Dataset,
    Pair,
    Prompt,
    SourceReport,
    record_features,
)
from rlhf.data.sources import load_sources
from rlhf.data.splits import PARTS
from rlhf.distributed import collectives
from rlhf.runs.directory import write_json

if TYPE_CHECKING:
    import datasets


def open_data(cfg: Config, run_dir: Path) -> Dataset:
    """The records for the stage that runs. Logs a summary and writes run_dir/data.json.

    Raises: UserError when the stage has no rows, when the data of a resumed run have changed, or
        when a source cannot be read.
    """
    data = load_data(cfg.data)
    log.info(summarize(data))
    if collectives.rank() == 0:
        file = run_dir / "data.json"
        if (run_dir / "checkpoints").exists() and json.loads(file.read_text()) != data.report:
            raise UserError(
                "the data have changed since this run's checkpoint (see data.json): add fresh=true"
                " to start again"
            )
        write_json(file, data.report)
    _check_rows(data, cfg)
    kept = sum(report.get("ppo", 0) for report in data.report if report.get("sft"))
    if cfg.stage.name == "sft" and kept and not len(data.rm):
        log.info(
            f"{kept:,} of these prompts are kept for online RL; data.shares=[1,0,0] trains SFT on "
            "their answers too"
        )
    return data


def _check_rows(data: Dataset, cfg: Config) -> None:
    """Raises UserError when there is nothing to train or to evaluate the stage on."""
    stage = cfg.stage.name
    train: Sized | None
    evaluation: Sized
    if stage == "sft":
        train, evaluation = data.sft, data.eval_sft
    elif stage in ("rm", "dpo"):
        train, evaluation = data.rm, data.eval_rm
    elif stage == "eval":
        train, evaluation = None, data.eval_prompts if cfg.eval.policies else data.eval_rm
    else:
        train, evaluation = data.ppo, data.eval_prompts
    where = f"data={'+'.join(cfg.data.sources)}"
    reason = "the sources are too small for data.shares"
    if stage == "sft":
        reason = (
            "no source has answers, or the sources are too small for data.shares; online RL on "
            "prompts alone starts from a policy that is trained already: rl.actor=<run or model>"
        )
    if stage in ("rm", "dpo"):
        reason = "no source has rejected answers, or the sources are too small for data.shares"
    if train is not None and not len(train):
        raise UserError(f"{where}: no rows for {stage}: {reason}")
    if not len(evaluation):
        raise UserError(f"{where}: no rows to evaluate {stage} on: {reason}")


def load_data(cfg: Data) -> Dataset:
    """The records of all stages, from the sandbox or from the configured sources.

    Raises: UserError that names the source and what is wrong with it.
    """
    if cfg.sandbox is None:
        return load_sources(cfg)
    from rlhf.data.sandbox import build_world
    from rlhf.data.sandbox.world import PAIRS_PER_PROMPT

    # what is held out does not depend on how much of it is looked at, so training does not either
    world = build_world(cfg.sandbox, cfg.seed, SANDBOX_HELD_OUT)
    looked_at = cfg.eval_rows
    report = SourceReport(source="sandbox", split="train", rows=0, skipped={})
    report["sft"], report["rm"], report["ppo"] = len(world.sft), len(world.rm), len(world.ppo)
    report["eval"] = len(world.eval_sft)
    report["rows"] = sum(report[part] for part in PARTS)
    return Dataset(
        sft=table_of(Pair(d.prompt, d.response, None) for d in world.sft),
        rm=table_of(world.rm),
        ppo=table_of(Pair(prompt, "", None) for prompt in world.ppo),
        eval_sft=world.eval_sft[:looked_at],
        eval_rm=world.eval_rm[: PAIRS_PER_PROMPT * looked_at],
        eval_prompts=[Prompt(turns) for turns in world.eval_prompts[:looked_at]],
        eval_probe=world.eval_probe[:looked_at],
        score_unit=world.eval_sft,
        gold=world.gold,
        best_gold=world.best_gold,
        report=[report],
    )


def table_of(pairs: Iterable[Pair]) -> datasets.Dataset:
    """Records in memory as a table."""
    import datasets

    rows = list(pairs)
    columns: dict[str, list[Any]] = {
        name: [getattr(pair, name) for pair in rows] for name in PAIR_COLUMNS[1:]
    }
    columns["prompt"] = [[asdict(turn) for turn in pair.prompt] for pair in rows]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(record_features()))


def summarize(data: Dataset) -> str:
    """Where the rows went, a line for each source and split."""
    lines = []
    for report in data.report:
        counts = [f"{part} {report[part]:,}" for part in PARTS if part in report]
        counts += [f"texts {report['texts']:,}"] if "texts" in report else []
        rows = f"{report['rows']:,} rows"
        if further := report.get("further"):
            rows += f" and {further:,} further pairs of ranked responses"
        line = f"{report['source']}/{report['split']}: {rows}: {', '.join(counts)}"
        if report.get("copies"):
            line += f" ({report['copies']:,} copies by weight)"
        if report["skipped"]:
            reasons = [f"{count:,} {reason}" for reason, count in report["skipped"].items()]
            line += f"; skipped: {', '.join(reasons)}"
        lines.append(line)
        if files := report.get("files"):
            lines.append(f"  files: {first_few(files)}")
        if not_read := report.get("not_read"):
            lines.append(f"  not read: {first_few(not_read)}")
        if unread := report.get("unread"):
            lines.append(
                f"  columns not read, unless a reward function asks for them: {', '.join(unread)}"
            )
            if "tools" in unread:
                lines.append("  tools are read with data.template=tokenizer")
        if "first_unreadable" in report:
            lines.append(f"  first unreadable row: {report['first_unreadable']}")
        unreadable = report.get("unreadable", {})
        if len(unreadable) > 1:
            lines += [f"  {count:,} unreadable: {reason}" for reason, count in unreadable.items()]
    return "\n".join(lines)

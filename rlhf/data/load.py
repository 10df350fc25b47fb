"""Load the data of the stage that runs: from a built-in world, or from the configured sources."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sized
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rlhf.base.constants import WORLD_HELD_OUT
from rlhf.base.errors import UserError
from rlhf.base.log import first_few, log, plural
from rlhf.config.schema import Arithmetic, Config, Data, Sandbox
from rlhf.data.records import (
    PAIR_COLUMNS,
    Dataset,
    Pair,
    RowCounts,
    SourceReport,
    World,
    record_features,
)
from rlhf.data.sources import load_sources
from rlhf.data.splits import PARTS, Part
from rlhf.data.world_cache import Records, cached_records
from rlhf.distributed import collectives
from rlhf.runs.directory import write_json
from rlhf.runs.run_files import DATA, read_file

if TYPE_CHECKING:
    import datasets


FEW_HELD_OUT = 10  # rows; a share of so few may be off by 30 %
PART_OF_STAGE: dict[str, Part] = {"sft": "sft", "rm": "rm", "dpo": "rm"}  # online RL: ppo


def check_same(report: list[SourceReport], run_dir: Path) -> None:
    """Raises: UserError where a run that resumes had other data at its start."""
    before = read_file(run_dir, DATA)
    if before is None:
        log.warning(f"{run_dir / DATA} is missing: nobody checks that the data are still the same")
    elif _as_read(before) != _as_read(report):
        raise UserError(
            "the data have changed since this run's checkpoint (see data.json): add fresh=true "
            "to start again"
        )


def _as_read(report: list[SourceReport]) -> list[dict[str, Any]]:
    """A report without what is beside the data: a new README in their folder changes nothing."""
    return [{key: one[key] for key in one if key != "not_read"} for one in map(dict, report)]


def open_data(cfg: Config, run_dir: Path) -> Dataset:
    """The records for the stage that runs. Logs a summary and writes run_dir/data.json.

    Raises: UserError when the stage has no rows, when the data of a resumed run have changed, or
        when a source cannot be read.
    """
    data = load_data(cfg.data)
    log.info(summarize(data))
    if collectives.rank() == 0:
        if (run_dir / "checkpoints").exists():
            check_same(data.report, run_dir)
        write_json(run_dir / DATA, data.report)
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
    if train is not None and not len(train):
        raise UserError(f"{where}: no rows for {stage}: {why_no_rows(data, cfg.data, stage)}")
    if not len(evaluation):
        reason = why_nothing_held_out(data, cfg.data, stage)
        raise UserError(f"{where}: no rows to evaluate {stage} on: {reason}")
    if few := few_held_out(len(evaluation), cfg.data):
        log.warning(few)


def few_held_out(rows: int, cfg: Data) -> str:
    """A line where so few rows are held out that what is measured on them is mostly chance."""
    if rows >= FEW_HELD_OUT:
        return ""
    limited = bool(cfg.world) or rows == cfg.eval_rows
    fix = (
        f"raise data.eval_rows={cfg.eval_rows}"
        if limited
        else f"raise data.eval_share={cfg.eval_share:g}, or add data"
    )
    count = plural(rows, "held-out row")
    return f"only {count}: what is measured on so few is mostly chance; {fix}"


def load_data(cfg: Data) -> Dataset:
    """The records of all stages, from a built-in world or from the configured sources.

    Raises: UserError that names the source and what is wrong with it.
    """
    return data_of_world(cfg) if cfg.world else load_sources(cfg)


def data_of_world(cfg: Data) -> Dataset:
    """The records of a built-in world, data.eval_rows of them for evaluation."""
    # what is held out does not depend on how much of it is looked at, so training does not either
    package, settings = world_of(cfg)
    world = cached_records(
        lambda: records_of(package.build_world(settings, cfg.seed, WORLD_HELD_OUT)),
        str((settings, cfg.seed, WORLD_HELD_OUT)),
        Path(str(package.__file__)).parent,
    )
    looked_at = cfg.eval_rows
    pairs_per_prompt = len(world.eval_rm) // len(world.eval_prompts)
    report = SourceReport(source=cfg.world, split="train", rows=0, skipped={})
    report["sft"], report["rm"], report["ppo"] = len(world.sft), len(world.rm), len(world.ppo)
    report["eval"] = len(world.eval_sft)
    report["rows"] = sum(report[part] for part in PARTS)
    return Dataset(
        sft=world.sft,
        rm=world.rm,
        ppo=world.ppo,
        eval_sft=world.eval_sft[:looked_at],
        eval_rm=world.eval_rm[: pairs_per_prompt * looked_at],
        eval_prompts=world.eval_prompts[:looked_at],
        eval_probe=world.eval_probe[:looked_at],
        score_unit=world.score_unit,
        gold=package.gold_of_turns,
        best_gold=package.best_gold_of_turns,
        report=[report],
    )


def world_of(cfg: Data) -> tuple[ModuleType, Sandbox | Arithmetic]:
    """The package that makes the built-in world, and its settings."""
    if cfg.sandbox is not None:
        from rlhf.data import sandbox

        return sandbox, cfg.sandbox
    from rlhf.data import arithmetic

    assert cfg.arithmetic is not None
    return arithmetic, cfg.arithmetic


def records_of(world: World) -> Records:
    """The records of a new world, its training data as tables."""
    return Records(
        sft=table_of(Pair(d.prompt, d.response, None) for d in world.sft),
        rm=table_of(world.rm),
        ppo=table_of(Pair(p.turns, "", None, columns=p.columns) for p in world.ppo),
        eval_sft=world.eval_sft,
        eval_rm=world.eval_rm,
        eval_probe=world.eval_probe,
        eval_prompts=world.eval_prompts,
        score_unit=world.score_unit,
    )


def table_of(pairs: Iterable[Pair]) -> datasets.Dataset:
    """Records in memory as a table."""
    import datasets

    rows = list(pairs)
    columns: dict[str, list[Any]] = {
        name: [getattr(pair, name) for pair in rows] for name in PAIR_COLUMNS[1:]
    }
    columns["prompt"] = [[vars(turn) for turn in pair.prompt] for pair in rows]
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
        if own := report.get("own_system"):
            lines.append(f"  system_prompt: {plural(own, 'row')} with a system turn, which stays")
        if unread := report.get("unread"):
            lines.append(f"  columns not read, except by reward functions: {', '.join(unread)}")
            if "tools" in unread:
                lines.append("  tools are read with data.template=tokenizer")
        if separators := report.get("separators"):
            lines.append(f"  fields are separated by {' or '.join(separators)}, as in the header")
        lines += [f"  {line}" for line in unreadable_rows(report)]
    return "\n".join(lines)


def unreadable_rows(report: SourceReport) -> list[str]:
    """The rows of a source that cannot be read: a line for each kind, with its first row."""
    kinds = report.get("unreadable", {})
    if len(kinds) == 1:
        return [f"first unreadable row: {report['first_unreadable']}"]
    lines = [
        f"{count:,} unreadable{', the first' if count > 1 else ''}: {report['examples'][kind]}"
        for kind, count in kinds.items()
    ]
    if more := report.get("more_kinds"):
        lines.append(f"and {more:,} further kinds of unreadable rows")
    return lines


# ---- why a stage has no rows


def why_no_rows(data: Dataset, cfg: Data, stage: str) -> str:
    """Why a stage has no rows to train on, and what to do."""
    part = PART_OF_STAGE.get(stage, "ppo")
    counts, number = data.counts, PARTS.index(part)
    if counts is None:
        return f"the built-in world is too small: raise the sizes in data.{cfg.world}"
    everything = ["data.shares=[" + ",".join("01"[i == number] for i in range(3)) + "]"]
    if part == "sft" and not counts.answers:
        return f"none of the {counts.rows:,} rows has an answer; {use_of_rows(data)}"
    if part == "rm" and not counts.pairs:
        only = [name for name, source in cfg.sources.items() if source.sft_only]
        for_sft = f" (sft_only=true of {', '.join(only)})" if only else ""
        lack = f"none of the {counts.rows:,} rows has a rejected answer{for_sft}"
        return f"{lack}; {use_of_rows(data)}"
    if part == "ppo" and all(source.sft_only for source in cfg.sources.values()):
        return "all rows are for SFT (sft_only=true): add a source with prompts for online RL"
    if counts.prompts == 1:
        return one_prompt(counts)
    rows = f"{counts.rows:,} rows with {counts.prompts:,} prompts"
    none = f"of {rows} none falls to it with data.shares={cfg.shares}"
    return f"{none}: add data, or give it all rows: {shlex.join(everything)}"


def why_nothing_held_out(data: Dataset, cfg: Data, stage: str) -> str:
    """Why there are no rows to evaluate a stage on, and what to do."""
    counts = data.counts
    if counts is None:
        return "raise data.eval_rows"
    if counts.prompts == 1:
        return one_prompt(counts)
    if held_out := sum(report.get("eval", 0) for report in data.report):
        what = "a rejected answer" if stage in ("rm", "dpo", "eval") else "an answer"
        return f"none of the {held_out:,} rows that are held out has {what}: add some that have it"
    more = min(0.5, 4 * cfg.eval_share)
    fix = f"raise it, for instance data.eval_share={more:g}, or " if more > cfg.eval_share else ""
    return (
        f"of {counts.prompts:,} prompts none is held out with data.eval_share={cfg.eval_share:g}:"
        f" {fix}add data"
    )


def one_prompt(counts: RowCounts) -> str:
    """Why rows that have the same prompt cannot be divided."""
    if counts.rows == 1:
        return "there is one row only: add data"
    return (
        f"all {counts.rows:,} rows have the same prompt, and a prompt belongs to one stage or to"
        " the evaluation: add rows with other prompts"
    )


def use_of_rows(data: Dataset) -> str:
    """What rows without pairs are for, with what to change in the command."""
    if data.counts and data.counts.answers:
        change = shlex.join(["stage=sft", "data.shares=[1,0,0]"])
        return f"SFT trains on its answers: the same command with {change}"
    change = shlex.join(["stage=grpo", "data.shares=[0,0,1]", "rl.actor=SFT_RUN"])
    return (
        "prompts alone are for online RL, which starts from a trained policy and needs a reward"
        " model of yours (rl.reward=RM_RUN) or reward functions (docs/rewards.md): the same command"
        f" with {change}"
    )

"""Results of runs as tables in the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.reporting.comparison import (
    Comparison,
    compare_best,
    compare_runs,
    format_mean,
)
from rlhf.reporting.eval_results import (
    EvalResults,
    policy_cells,
    read_results,
    scorer_cells,
    win_rate_cells,
)
from rlhf.reporting.eval_summary import summarize
from rlhf.runs.history import Run
from rlhf.runs.stage_views import KINDS, view_of

RUN_FILES = ("curves.png", "frontier.png", "metrics.jsonl", "report.html", "eval.json", "model/")


def make_table(title: str, columns: Iterable[str], left: Sequence[str] = ()) -> Table:
    """An empty table; numbers are on the right. Args: left: columns of text."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    return table


def wide_console() -> Console:
    """The terminal; a file or a pipe, which has no width, gets long lines."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def print_line(console: Console, line: str) -> None:
    """A line as it is: a path stays in one piece, and "[" is no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


# ---- the end of a command


def print_runs(paths: list[Path], seconds: float) -> None:
    """The results of a command: the final metrics of its stages, and where the files are."""
    table = Table(title=f"Finished in {seconds:.0f} s", title_justify="left")
    for column in ("stage", "result", "before", "after"):
        table.add_column(column)
    for run in paths:
        summary = json.loads((run / "summary.json").read_text())
        for label, before, after in result_rows(summary["stage"], summary["metrics"]):
            table.add_row(summary["stage"], label, before, after)
        table.add_section()
    console = Console()
    if table.rows:
        console.print(table)
    else:  # nothing was trained
        print_line(console, str(table.title))
    for run in paths:
        if (run / "eval.json").exists():
            print_evaluation(read_results(run / "eval.json"))
        files = ", ".join(name for name in RUN_FILES if (run / name).exists())
        print_line(console, f"{run}  ({files})")
    last_stage = json.loads((paths[-1] / "summary.json").read_text())["stage"]
    if view_of(last_stage).kind in ("sft", "policy"):
        print_line(console, f"Talk to it:  python chat.py --path {paths[-1]}")


def result_rows(stage: str, metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Rows of the table for one stage: label, value before training, value after."""

    def text(key: str, format_spec: str) -> str:
        return format(metrics[f"eval/{key}"], format_spec) if f"eval/{key}" in metrics else ""

    return [
        (row.label, text(row.before, row.format), text(row.metric, row.format))
        for row in view_of(stage).rows
        if f"eval/{row.metric}" in metrics
    ]


def print_evaluation(results: EvalResults) -> None:
    """What the evaluation shows; policies side by side, their win rates, and the reward models."""
    console = wide_console()
    for line in summarize(results):
        print_line(console, line)
    for title, (header, rows) in {
        "Policies on held-out prompts": policy_cells(results.policies),
        f"Win rates against {results.against}": win_rate_cells(results.win_rates),
        "Reward models on held-out pairs": scorer_cells(results.reward_models),
    }.items():
        table = make_table(title, header, ["policy", "policy (judge)", "reward model"])
        for row in rows:
            table.add_row(*map(escape, row))
        if rows:
            console.print(table)
    for name, scorer in results.reward_models.items():
        groups = [
            f"{group} {accuracy:.1%} of {pairs:,}"
            for group, (pairs, accuracy) in scorer.by_length.items()
        ]
        print_line(console, f"{name}: accuracy by length of the responses: {', '.join(groups)}")


# ---- several runs


def print_comparison(runs: Sequence[Run], page: Path | None = None) -> None:
    """Compare runs: a row each, means over seeds, and whether the best is significantly better."""
    console = wide_console()
    for kind in KINDS:
        comparison = compare_runs(runs, kind)
        if not comparison:
            continue
        console.print(runs_table(comparison))
        if comparison.has_seeds:
            console.print(seeds_table(comparison))
        if line := compare_best(comparison.groups, comparison.primary.name):
            print_line(console, line)
    if page:
        print_line(console, str(page))


def runs_table(comparison: Comparison) -> Table:
    """A row per run: label, status, steps, final metrics."""
    title = f"{', '.join(comparison.stages)}: {count_runs(comparison.runs)}"
    metrics = comparison.metrics
    names = [name.removeprefix("eval/") for name in metrics]
    table = make_table(title, ["run", "status", "steps", *names], ["run", "status"])
    for label, run in zip(comparison.labels, comparison.runs):
        values = (f"{run.metrics[name]:.3f}" if name in run.metrics else "" for name in metrics)
        table.add_row(escape(label), escape(run.status_text), str(len(run.rows)), *values)
    return table


def seeds_table(comparison: Comparison) -> Table:
    """A row per group of seeds: mean and confidence interval of each metric."""
    names = [name.removeprefix("eval/") for name in comparison.metrics]
    title = "over seeds: mean ± 95 % confidence interval"
    table = make_table(title, ["settings", "seeds", *names], ["settings"])
    for group in comparison.groups:
        means = (format_mean(group.values(name)) for name in comparison.metrics)
        table.add_row(escape(group.label), str(len(group.runs)), *means)
    return table


def print_list(runs: Sequence[Run]) -> None:
    """All runs: name, status, steps, and when their metrics were last written."""
    columns = ("run", "status", "steps", "last written")
    table = make_table(count_runs(runs), columns, columns)
    for run in runs:
        log = run.path / "metrics.jsonl"
        written = time.localtime(log.stat().st_mtime) if log.exists() else None
        when = time.strftime("%Y-%m-%d %H:%M", written) if written else ""
        table.add_row(escape(run.name), escape(run.status_text), str(len(run.rows)), when)
    wide_console().print(table)


def count_runs(runs: Sequence[Run]) -> str:
    """ "1 run", "2 runs"."""
    return f"{len(runs)} run{'' if len(runs) == 1 else 's'}"


# ---- stage=inspect


def print_inspection(inspection: dict[str, Any], page: Path) -> None:
    """The tables of stage=inspect, its warnings, and where the page is."""
    console = Console(width=130, highlight=False)
    console.print(sources_table(inspection["sources"]))
    console.print(lengths_table(inspection["stages"]))
    measured = inspection["stages"] | {
        f"{entry['source']}/{entry['split']}": entry["tokens"] for entry in inspection["sources"]
    }
    for name, numbers in measured.items():
        if numbers["measured"] < numbers["rows"]:
            rows = f"{numbers['measured']:,} rows"
            print_line(console, f"{name}: tokens of a random sample of {rows}")
    for line in inspection["verdicts"] or ["nothing to worry about"]:
        print_line(console, f"- {line}")
    print_line(console, str(page))


def sources_table(sources: Sequence[dict[str, Any]]) -> Table:
    """Rows of each source, and the share of each stage's rows that they are."""
    parts = ("sft", "rm", "ppo", "eval")
    table = Table(title="Sources", title_justify="left")
    for column in ("source/split", "rows", "skipped", "sft", "rm", "ppo", "held out"):
        table.add_column(column, justify="left" if column == "source/split" else "right")
    for entry in sources:
        stages = [
            f"{entry[part]:,} ({entry['share'].get(part, 0):.0%})" if part in entry else ""
            for part in parts
        ]
        name = escape(f"{entry['source']}/{entry['split']}")
        skipped = f"{sum(entry['skipped'].values()):,}"
        table.add_row(name, f"{entry['rows']:,}", skipped, *stages)
    return table


def lengths_table(stages: dict[str, dict[str, Any]]) -> Table:
    """Lengths in tokens of each stage's prompts and responses."""
    limits = ("dropped", "truncated")
    table = Table(title="Tokens: median / 95 % / longest", title_justify="left")
    for column in ("stage", "rows", "prompts", "chosen", "rejected", *limits, "chosen longer"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for name, numbers in stages.items():
        tokens = numbers["tokens"]
        texts = [
            tokens.get("prompt") or {},
            tokens.get("chosen") or tokens.get("text") or {},
            tokens.get("rejected") or {},
        ]
        spreads = (" / ".join(f"{n:,}" for n in spread.values()) for spread in texts)
        rows = max(1, numbers["measured"])
        shares = [f"{numbers[key] / rows:.1%}" if key in numbers else "" for key in limits]
        pairs = numbers.get("pairs")
        longer = f"{numbers['chosen_longer'] / pairs:.1%}" if pairs else ""
        table.add_row(name, f"{numbers['rows']:,}", *spreads, *shares, longer)
    return table

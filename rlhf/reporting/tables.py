"""Results of runs as tables in the terminal."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.base.commands import command_line
from rlhf.base.errors import UserError
from rlhf.base.log import cut, plural, printable
from rlhf.reporting.comparison import (
    Comparison,
    compare_runs,
    format_mean,
)
from rlhf.reporting.conclusions import conclusions
from rlhf.reporting.eval_results import (
    EvalResults,
    pass_rate_by_column_cells,
    pass_rate_cells,
    policy_cells,
    read_results,
    scorer_cells,
    win_rate_cells,
)
from rlhf.reporting.eval_summary import summarize
from rlhf.runs.directory import read_summary, read_warnings
from rlhf.runs.history import Run
from rlhf.runs.metrics import count_rows
from rlhf.runs.run_files import Summary
from rlhf.runs.stage_views import KINDS, ResultRow, view_of

TEXT_COLUMNS = ["policy", "policy (judge)", "policy (verifier)", "prompts with", "reward model"]
LONGEST_STATUS = 60  # characters in a list of runs
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
    console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


# ---- the end of a command


def print_runs(paths: list[Path], seconds: float) -> None:
    """The results of a command: the final metrics of its stages, and where the files are."""
    table = Table(title=f"Finished in {seconds:.0f} s", title_justify="left")
    for column in ("stage", "result", "before", "after"):
        table.add_column(column)
    for run in paths:
        summary = summary_of(run)
        stage = summary.get("stage", "")
        for label, before, after in result_rows(stage, summary.get("metrics", {})):
            table.add_row(stage, label, before, after)
        for line in warnings_of(run):
            table.add_row(stage, escape(f"warning: {line}"), "", "")
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
    last_stage = summary_of(paths[-1]).get("stage", "")
    if last_stage and view_of(last_stage).kind in ("sft", "policy"):
        print_line(console, f"Talk to it:  {command_line('chat.py', '--path', str(paths[-1]))}")


def summary_of(run: Path) -> Summary:
    """The summary of a finished run. Raises: UserError where it is gone or damaged."""
    summary = read_summary(run)
    if summary is None:
        raise UserError(f"{run}: its summary.json is gone; repeat the command")
    return summary


def warnings_of(run: Path) -> list[str]:
    """What a run warned of; that its file is damaged, where it is."""
    try:
        return read_warnings(run)
    except UserError as error:
        return [str(error)]


def result_rows(stage: str, metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Rows of the table for one stage: label, value before training, value after."""

    def text(key: str, format_spec: str) -> str:
        return format(metrics[f"eval/{key}"], format_spec) if f"eval/{key}" in metrics else ""

    rows = [row for row in view_of(stage).rows if f"eval/{row.metric}" in metrics]
    sources = [
        name.removeprefix("eval/score/")
        for name in metrics
        if name.startswith("eval/score/") and not name.endswith("_before")
    ]
    if rows and rows[0].metric == "score":
        of_each = [
            ResultRow(f"  {name}", f"score/{name}", before=f"score/{name}_before")
            for name in sources
        ]
        rows[1:1] = of_each
    return [(row.label, text(row.before, row.format), text(row.metric, row.format)) for row in rows]


def print_evaluation(results: EvalResults) -> None:
    """What the evaluation shows; policies side by side, their win rates, and the reward models."""
    console = wide_console()
    for line in summarize(results):
        print_line(console, line)
    for title, (header, rows) in {
        "Policies on held-out prompts": policy_cells(results.policies),
        "Verifiers: share of the held-out prompts": pass_rate_cells(results.pass_rates),
        "Verifiers by column": pass_rate_by_column_cells(results.pass_rates),
        f"Win rates against {results.against}": win_rate_cells(results.win_rates),
        "Reward models on held-out pairs": scorer_cells(results.reward_models),
    }.items():
        table = make_table(title, header, TEXT_COLUMNS)
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
    """Compare runs: a row each, means over seeds, and which is the best. Runs of one kind on the
    same data share a table."""
    console = wide_console()
    shown = [comparison for kind in KINDS for comparison in compare_runs(runs, kind)]
    for comparison in shown:
        console.print(runs_table(comparison))
        if hidden := len(comparison.settings) - len(comparison.in_label):
            where = f"see {page.name}" if page else "see the page"
            differ = "setting differs" if hidden == 1 else "settings differ"
            print_line(console, f"{hidden} more {differ}: {where}")
        for run in comparison.runs:
            if run.status_text != short_status(run):
                print_line(console, f"{run.short_name} {one_line(run.status_text)}")
        if comparison.has_seeds:
            console.print(seeds_table(comparison))
        if len(comparison.runs) > 1 and (sentences := conclusions(comparison)):
            print_line(console, " ".join(sentences))
        console.print()
    for job in runs:
        if not job.stage:
            print_line(console, f"{'/'.join([*job.sweeps, job.name])} {one_line(job.status)}")
    for line in dict.fromkeys(line for run in runs for line in run.damage):
        print_line(console, line)
    if page:
        print_line(console, str(page))


def runs_table(comparison: Comparison) -> Table:
    """A row per run: short name, sweeps, settings, status, steps, final metrics."""
    units = dict.fromkeys(view_of(stage).step_name for stage in comparison.stages)
    steps = ",\n".join(f"{unit}s" for unit in units if unit)
    labelled = any(map(settings_text, comparison.labels, comparison.runs))
    text = ["run"] + ["sweep"] * comparison.has_sweeps + ["settings"] * labelled + ["status"]
    names = [name.removeprefix("eval/").replace("_", "_\n") for name in comparison.metrics]
    title = f"{comparison.title}: {count_runs(comparison.runs)}"
    table = make_table(title, [*text, *([steps] if steps else []), *names], text)
    for label, run in zip(comparison.labels, comparison.runs):
        cells = [run.short_name]
        cells += [", ".join(run.sweeps)] if comparison.has_sweeps else []
        cells += [settings_text(label, run)] if labelled else []
        cells += [short_status(run)]
        cells += [str(len(run.rows))] if steps else []
        cells += [f"{run.metrics[m]:.3f}" if m in run.metrics else "" for m in comparison.metrics]
        table.add_row(*map(escape, cells))
    for column in table.columns:
        column.no_wrap = column.header not in ("settings", "sweep")
    return table


def settings_text(label: str, run: Run) -> str:
    """The settings in a run's label, without the stage and the name, which are in the row too."""
    return "" if label in (run.short_name, run.stage) else label.removeprefix(f"{run.stage} ")


def short_status(run: Run) -> str:
    """finished, running, stopped or failed: the status without details."""
    return re.split("[:,]", run.status)[0]


def one_line(text: str) -> str:
    """The first line of a text."""
    return (text.splitlines() or [""])[0]


def seeds_table(comparison: Comparison) -> Table:
    """A row per group of seeds: mean and confidence interval of each metric."""
    names = [name.removeprefix("eval/") for name in comparison.metrics]
    title = "over seeds: mean ± 95 % confidence interval"
    table = make_table(title, ["settings", "seeds", *names], ["settings"])
    for group in comparison.groups:
        means = (format_mean(group.values(name)) for name in comparison.metrics)
        table.add_row(escape(group.label), str(group.finished), *means)
    return table


def print_list(runs: Sequence[Run]) -> None:
    """All runs, one line each: when last written, status, steps, sweeps, directory."""
    console = Console(highlight=False)
    rows = [(when_written(run), status_in_list(run), steps_text(run)) for run in runs]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for run, row in zip(runs, rows):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths))
        sweeps = f"  (sweep {', '.join(run.sweeps)})" if run.sweeps else ""
        print_line(console, f"{cells}  {display_path(run.path)}{sweeps}")
    for run in runs:
        if run.is_unreadable:
            print_line(console, one_line(run.status))
        for line in run.named_copies:
            print_line(console, line)


def status_in_list(run: Run) -> str:
    """The status in a few words; what is wrong with an unreadable run stands below the list, why
    one has failed in its train.log."""
    if run.is_unreadable:
        return short_status(run)
    return cut(one_line(run.status_text), LONGEST_STATUS)


def when_written(run: Run) -> str:
    """When the metrics of a run were last written, local time; "" without metrics."""
    try:
        written = time.localtime((run.path / "metrics.jsonl").stat().st_mtime)
    except OSError:
        return ""
    return time.strftime("%Y-%m-%d %H:%M", written)


def steps_text(run: Run) -> str:
    """How far a run came, with the unit: 50 rollouts; "" where it has no steps."""
    unit = view_of(run.stage).step_name if run.stage else ""
    return plural(count_rows(run.path / "metrics.jsonl"), unit) if unit else ""


def display_path(path: Path) -> Path:
    """A path as one would type it: relative to the current directory, where it is below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


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

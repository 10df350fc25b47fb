"""What runs have achieved, as tables in the terminal and one HTML page.

    python -m rlhf.report [RUN, SWEEP or FOLDER ...] [--list] [--out FILE]

A RUN is a directory below outputs/, a SWEEP one below multirun/, a FOLDER one that has outputs/ (default: the present one).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

pass
from rlhf.config.stage_graph import is_policy
from rlhf.reporting.comparison import (
    REPORTED_METRICS,
    compare_best,
    distinguishing_settings,
    format_mean,
    primary_metric,
    run_label,
    seed_groups,
)
from rlhf.runs.history import Run, find_runs

TEXTS = ("prompt", "chosen", "rejected")


def print_runs(paths: list[Path], seconds: float) -> None:
    """What a command achieved: the final metrics of its stages, and where everything lies."""
    table = Table(title=f"Finished in {seconds:.0f} s", title_justify="left")
    for column in ("stage", "result", "before", "after"):
        table.add_column(column)
    for run in paths:
        summary = json.loads((run / "summary.json").read_text())
        for label, before, after in result_rows(summary["stage"], summary["metrics"]):
            table.add_row(summary["stage"], label, before, after)
        table.add_section()
    console = Console()
    console.print(table)
    for run in paths:
        if (run / "eval.json").exists():
            print_evaluation(json.loads((run / "eval.json").read_text()))
        files = (
            "curves.png",
            "frontier.png",
            "metrics.jsonl",
            "report.html",
            "eval.json",
            "model/",
        )
        console.print(
            f"{run}  ({', '.join(name for name in files if (run / name).exists())})",
            soft_wrap=True,
            highlight=False,
        )
    if is_policy(paths[-1].name.split("-")[0]):
        console.print(
            f"Talk to it:  python chat.py --path {paths[-1]}", soft_wrap=True, highlight=False
        )


def result_rows(stage: str, metrics: dict[str, float]) -> list[tuple[str, str, str]]:
    """Rows of the table for one stage: what, before, after."""
    online = [
        ("score", "score_before", "score", ".2f"),
        ("gold score", "gold_before", "gold", ".2f"),
        ("  best possible", "", "gold_best", ".2f"),
        ("KL, nats per answer", "", "kl", ".2f"),
        ("length, tokens", "length_before", "length", ".1f"),
        ("answers that end", "eos_rate_before", "eos_rate", ".1%"),
    ]
    wanted = {
        "sft": [
            ("held-out perplexity", "", "perplexity", ".3f"),
            ("answers that end", "", "eos_rate", ".1%"),
            ("gold score", "", "gold", ".2f"),
        ],
        "rm": [
            ("held-out accuracy", "", "accuracy", ".1%"),
            ("  of a perfect judge", "", "accuracy_bayes", ".1%"),
            ("  against the truth", "", "accuracy_gold", ".1%"),
            ("  fits its prompt", "", "accuracy_prompt", ".1%"),
        ],
        **dict.fromkeys(("ppo", "rloo", "grpo"), online),
        "dpo": [("held-out accuracy", "", "accuracy", ".1%"), *online[1:]],
        "eval": [
            ("win rate", "", "win_rate", ".1%"),
            ("  95 % interval from", "", "win_rate_low", ".1%"),
            ("  to", "", "win_rate_high", ".1%"),
            ("reward model: accuracy", "", "accuracy", ".1%"),
            ("  calibration error", "", "ece", ".3f"),
        ],
    }[stage]

    def show(key: str, form: str) -> str:
        return format(metrics[f"eval/{key}"], form) if f"eval/{key}" in metrics else ""

    return [
        (label, show(before, form), show(after, form))
        for label, before, after, form in wanted
        if f"eval/{after}" in metrics
    ]


def print_evaluation(found: dict[str, Any]) -> None:
    """Policies side by side, and how often each is better than the one they are compared with."""
    from rlhf.reporting.eval_page import COLUMNS

    console = wide_console()
    kept = [key for key in COLUMNS if any(key in numbers for numbers in found["policies"].values())]
    table = Table(title="Policies on held-out prompts", title_justify="left")
    for column in ("policy", *(COLUMNS[key][0] for key in kept)):
        table.add_column(column, justify="left" if column == "policy" else "right", overflow="fold")
    for name, numbers in found["policies"].items():
        table.add_row(
            escape(name),
            *(format(numbers[key], COLUMNS[key][1]) if key in numbers else "" for key in kept),
        )
    if found["policies"]:
        console.print(table)
    for duel in found["win_rates"]:
        interval = f"{duel['rate']:.1%} ({duel['low']:.1%} to {duel['high']:.1%})"
        line = f"{duel['policy']} against {duel['against']}, judged by {duel['judge']}: better in {interval} of {duel['prompts']} prompts"
        console.print(line, markup=False, soft_wrap=True)
    for name, about in found["reward_models"].items():
        parts = [
            f"{group} {accuracy:.1%} of {pairs}"
            for group, (pairs, accuracy) in about["by_length"].items()
        ]
        line = f"{name}: right on {about['accuracy']:.1%} of {about['pairs']} pairs, calibration error {about['ece']:.3f}; {', '.join(parts)}"
        console.print(line, markup=False, soft_wrap=True)


def print_comparison(found: Sequence[Run], page: Path | None = None) -> None:
    """Runs against each other: a row each; the same over seeds; whether the best setting is better by more than chance."""
    console = wide_console()
    for kind in REPORTED_METRICS:
        some = [run for run in found if run.kind == kind]
        if not some:
            continue
        keys, stages = distinguishing_settings(some), list(dict.fromkeys(run.stage for run in some))
        name_of = functools.partial(run_label, keys=keys, algorithm=len(stages) > 1)
        some = sorted(some, key=name_of)
        metrics = [
            name for name in REPORTED_METRICS[kind] if any(name in run.metrics for run in some)
        ]
        table = Table(title=f"{', '.join(stages)}: {len(some)} run(s)", title_justify="left")
        for column in ("run", "status", "steps", *(name.removeprefix("eval/") for name in metrics)):
            table.add_column(
                column, justify="left" if column in ("run", "status") else "right", overflow="fold"
            )
        for run in some:
            numbers = (
                f"{run.metrics[name]:.3f}" if name in run.metrics else "" for name in metrics
            )
            table.add_row(escape(name_of(run)), escape(run.status), str(len(run.rows)), *numbers)
        console.print(table)
        cells = seed_groups(some)
        if any(len(cell.runs) > 1 for cell in cells):
            table = Table(title="over seeds: mean ± 95 % confidence interval", title_justify="left")
            for column in ("settings", "seeds", *(name.removeprefix("eval/") for name in metrics)):
                table.add_column(
                    column, justify="left" if column == "settings" else "right", overflow="fold"
                )
            for cell in cells:
                table.add_row(
                    escape(cell.label),
                    str(len(cell.runs)),
                    *(format_mean(cell.values(name)) for name in metrics),
                )
            console.print(table)
        if line := compare_best(cells, primary_metric(some)[0]):
            console.print(line, markup=False, soft_wrap=True)
    if page:
        console.print(f"{page}", markup=False, soft_wrap=True)


def print_list(found: Sequence[Run]) -> None:
    """The runs there are."""
    table = Table(title=f"{len(found)} run(s)", title_justify="left")
    for column in ("run", "status", "steps", "last written"):
        table.add_column(column, overflow="fold")
    for run in found:
        log = run.path / "metrics.jsonl"
        when = (
            time.strftime("%Y-%m-%d %H:%M", time.localtime(log.stat().st_mtime))
            if log.exists()
            else ""
        )
        table.add_row(escape(run.name), escape(run.status), str(len(run.rows)), when)
    wide_console().print(table)


def wide_console() -> Console:
    """The terminal; a file or a pipe, which has no width, gets lines that need not be broken."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def write_page(found: Sequence[Run], file: Path, title: str) -> Path:
    """The comparison as one HTML page; plotly is loaded only here."""
    from rlhf.reporting.report_page import page

    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(page(found, title))
    os.replace(temporary, file)
    return file


def print_inspection(found: dict[str, Any], page: Path) -> None:
    """What the dataset doctor found: a table of sources, one of stages, what to worry about, and where the page lies."""
    console = Console(width=130, highlight=False)
    from_sources = Table(title="Sources", title_justify="left")
    for column in ("source/split", "rows", "left out", "sft", "rm", "ppo", "held out"):
        from_sources.add_column(column, justify="left" if column == "source/split" else "right")
    for entry in found["sources"]:
        stages = [
            f"{entry[part]:,} ({entry['share'].get(part, 0):.0%})" if part in entry else ""
            for part in ("sft", "rm", "ppo", "eval")
        ]
        name = escape(f"{entry['source']}/{entry['split']}")
        from_sources.add_row(
            name, f"{entry['rows']:,}", f"{sum(entry['skipped'].values()):,}", *stages
        )
    console.print(from_sources)
    lengths = Table(title="Tokens: median / 95 % / longest", title_justify="left")
    for column in (
        "stage",
        "rows",
        "prompts",
        "chosen",
        "rejected",
        "dropped",
        "truncated",
        "chosen longer",
    ):
        lengths.add_column(column, justify="left" if column == "stage" else "right")
    for name, numbers in found["stages"].items():
        spreads = [
            numbers["tokens"].get(key) or numbers["tokens"].get({"chosen": "text"}.get(key, ""), {})
            for key in TEXTS
        ]
        measured = max(1, numbers["measured"])
        shares = [
            f"{numbers[key] / measured:.1%}" if key in numbers else ""
            for key in ("dropped", "truncated")
        ]
        longer = (
            f"{numbers['chosen_longer'] / numbers['pairs']:.1%}" if numbers.get("pairs") else ""
        )
        tokens = (" / ".join(f"{n:,}" for n in spread.values()) for spread in spreads)
        lengths.add_row(name, f"{numbers['rows']:,}", *tokens, *shares, longer)
    console.print(lengths)
    for part in (
        found["stages"],
        {f"{e['source']}/{e['split']}": e["tokens"] for e in found["sources"]},
    ):
        for name, numbers in part.items():
            if numbers["measured"] < numbers["rows"]:
                console.print(
                    f"{name}: tokens of a random sample of {numbers['measured']:,} rows",
                    markup=False,
                )
    for line in found["verdicts"] or ["nothing to worry about"]:
        console.print(f"- {line}", markup=False, soft_wrap=True)
    console.print(f"{page}", markup=False, soft_wrap=True)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.report", description="Compare runs: tables here, and one HTML page."
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="RUN|SWEEP|FOLDER",
        help="default: the folder where outputs/ lies",
    )
    parser.add_argument("--list", action="store_true", help="only list the runs")
    parser.add_argument(
        "--out",
        type=Path,
        help="the page (default: report.html in a single run, sweep or folder, else here)",
    )
    args = parser.parse_args()
    paths = args.paths or [Path(".")]
    try:
        found = find_runs(paths)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        print_list(found)
        return 0
    file = args.out or (paths[0] if len(paths) == 1 else Path(".")) / "report.html"
    title = f"Runs of {', '.join(path.resolve().name for path in paths)}"
    print_comparison(found, write_page(found, file, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())

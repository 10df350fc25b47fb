"""Results of runs as tables in the terminal and one HTML page.

    python -m rlhf.report [RUN, SWEEP or FOLDER ...] [--list] [--watch] [--out FILE]

A RUN is a directory below outputs/, a SWEEP one below multirun/, a FOLDER one that has outputs/
(default: the current folder). The code is in rlhf/reporting/.
"""

from __future__ import annotations

import contextlib
import os
import sys

if __name__ == "__main__":  # -m would take modules from the current directory first
    with contextlib.suppress(FileNotFoundError):  # it was deleted: run_interruptible says so
        sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]

import argparse
import time
from pathlib import Path

from rlhf.base.interrupts import end_at_interrupt, raise_at_interrupt, run_interruptible

if __name__ == "__main__":
    end_at_interrupt()  # before imports that take a second

from rlhf.base.errors import UserError
from rlhf.base.files import special_kind
from rlhf.base.log import say
from rlhf.reporting.tables import print_comparison, print_list
from rlhf.runs.finding import find_runs
from rlhf.runs.history import Run
from rlhf.runs.newest import stamp
from rlhf.runs.run_files import SUMMARY

WATCH_SECONDS = 10


def check_out(file: Path | None) -> None:
    """Raises: UserError where the page cannot be written there."""
    if file is None:
        return
    if kind := special_kind(file):
        raise UserError(f"--out {file}: this is {kind}; give a file, for instance report.html")
    if file.is_dir():
        raise UserError(f"--out {file}: this is a folder; give a file in it, such as report.html")
    if not file.parent.is_dir():
        raise UserError(f"--out {file}: there is no folder {file.parent.resolve()}; make it first")


def main() -> int:
    """The command line; returns the exit code."""
    raise_at_interrupt()
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.report", description="Compare runs: tables here, and one HTML page."
    )
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="RUN|SWEEP|FOLDER",
        help="default: the current folder, with its outputs/",
    )
    parser.add_argument("--list", action="store_true", help="only list the runs")
    parser.add_argument(
        "--watch", action="store_true", help="write the page anew while runs go on, until Ctrl-C"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the page (default: report.html in a single PATH, else in the current folder)",
    )
    args = parser.parse_args()
    paths = args.paths or [Path(".")]
    try:
        check_out(args.out)
        if args.watch:
            watch(paths, args.out)
        else:
            show(paths, args.list, args.out)
    except UserError as error:
        say(f"error: {error}")
        return 2
    return 0


def show(paths: list[Path], only_list: bool, out: Path | None) -> None:
    """Print the runs at these paths; the page too, unless it is only a list.

    Raises: UserError where there are none, or the page cannot be written.
    """
    runs = find_runs(paths)
    if only_list:
        print_list(runs)
        return
    from rlhf.reporting.report_page import write_page  # its libraries take a third of a second

    file, title = page_of(paths, out)
    print_comparison(runs, write_page(runs, file, title))


def page_of(paths: list[Path], out: Path | None) -> tuple[Path, str]:
    """The file of the page, and its title."""
    file = out or (paths[0] if len(paths) == 1 else Path(".")) / "report.html"
    return file, f"Runs of {', '.join(path.resolve().name for path in paths)}"


def watch(paths: list[Path], out: Path | None) -> None:
    """Write the page anew when a run has changed, until Ctrl-C; a browser reloads it meanwhile.

    Raises: UserError where there are no runs at the start, or the page cannot be written.
    """
    from rlhf.reporting.report_page import write_page

    file, title = page_of(paths, out)
    runs, problem = find_runs(paths), ""
    shown = state_of(runs)
    write_page(runs, file, title, reload=WATCH_SECONDS)
    say(f"{file}: open it in a browser; it follows the runs until Ctrl-C")
    try:
        while True:
            try:
                if (now := state_of(runs)) != shown:
                    write_page(runs, file, title, reload=WATCH_SECONDS)
                    shown = now
                time.sleep(WATCH_SECONDS)
                runs = find_runs(paths)
            except UserError as error:  # runs have been deleted, others may come
                if str(error) != problem:
                    say(problem := str(error))
                runs = []
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        write_page(runs, file, title)  # what stays does not reload itself
        say(f"{file}: complete")


def state_of(runs: list[Run]) -> list[tuple[Path, str, list[object]]]:
    """What changes when a run has done something."""
    files = ("metrics.jsonl", "samples.jsonl", SUMMARY)
    return [(run.path, run.status, [stamp(run.path / name) for name in files]) for run in runs]


if __name__ == "__main__":
    sys.exit(run_interruptible(main))

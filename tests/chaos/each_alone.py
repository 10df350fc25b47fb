"""Run each bad input in a process of its own, which is forked, so that all share one start:
python each_alone.py FOLDER [--full], which writes FOLDER/results.json."""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bad_data import BAD_ROWS
from bad_files import BadInput
from bad_inputs import BAD_INPUTS

from rlhf import arguments, cli, compose, report
from rlhf.base.errors import UserError
from rlhf.base.log import say
from rlhf.base.streams import prepare_streams
from rlhf.chat.conversation import Conversation
from rlhf.chat.policy import Params
from rlhf.config.schema import Config
from rlhf.data import load
from rlhf.data.files import check_files

PATH = "data.sources.mine.path="
MEMORY = 6 * 2**30  # bytes of address space
SECONDS = 60  # of the clock, for a busy machine


@functools.cache
def composed(*typed: str) -> Config:
    overrides = [arguments.allow_user_names(arg) for arg in typed]
    return compose.typed_config(compose.compose_alone(overrides, []))


def data_config(arguments: list[str]) -> Config:
    """The configuration of a command for data; composed once for all files."""
    (path,) = [arg for arg in arguments if arg.startswith(PATH)]
    cfg = composed(*(f"{PATH}FILE" if arg == path else arg for arg in arguments))
    cfg.data.sources["mine"].path = path.removeprefix(PATH)
    return cfg


def read_data(cfg: Config) -> int:
    """Read the data of a command as a stage does, without its models."""
    if problems := check_files(cfg.data):
        raise UserError("\n".join(problems))
    print(load.summarize(load.load_data(cfg.data)))
    return 0


def run(program: str, arguments: list[str]) -> int:
    """Run a program as its command line does. Returns: the exit code."""
    prepare_streams()
    sys.argv = ["program", *arguments]
    try:
        match program:
            case "train":
                return cli.main()
            case "report":
                return report.main()
            case "load":
                Conversation([], Params()).load(Path(arguments[0]))
                return 0
            case _:
                return read_data(data_config(arguments))
    except UserError as error:
        say(f"error: {error}")
        return 2


def alone(folder: Path, work: Callable[[], int]) -> dict[str, Any]:
    """Run something in a process of its own, in a new folder.

    Returns: exit code, output, seconds, MiB and the names of the files then.
    """
    folder.mkdir(parents=True)
    started = time.time()
    child = os.fork()
    if not child:
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(SECONDS)  # ends the process
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"../{folder.name}.{name}", os.O_CREAT | os.O_WRONLY), number)
        code = 1
        try:
            code = work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": round(time.time() - started, 2),
        "cpu": round(used.ru_utime + used.ru_stime, 2),
        "mib": used.ru_maxrss // 1024,
        "stdout": Path(f"{folder}.stdout").read_text(encoding="utf-8"),
        "stderr": Path(f"{folder}.stderr").read_text(encoding="utf-8"),
        "trained": (folder / "outputs").exists(),
    }


def try_input(one: BadInput) -> int:
    if one.build:
        one.build()
    return run(one.program, one.arguments)


def row_arguments(file: str) -> list[str]:
    return ["data=jsonl", f"{PATH}{file}", "data.eval_share=0.2"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--full", action="store_true", help="those that are like others too")
    args = parser.parse_args()
    os.environ["HF_DATASETS_CACHE"] = str(args.folder / "cache")
    import datasets  # noqa: F401  # once for all
    import pandas  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    compose.register()
    compose.compose_alone([], [])
    results = {}
    for one in BAD_INPUTS:
        if one.program == "data":
            data_config(one.arguments)
    data_config(row_arguments("FILE"))
    for number, one in enumerate(BAD_INPUTS):
        if args.full or not one.full:
            results[one.name] = alone(args.folder / f"{number}", lambda one=one: try_input(one))
    for number, row in enumerate(BAD_ROWS):
        same = BadInput(row.name, row_arguments(row.file), [], row.build, "data")
        results[f"row: {row.name}"] = alone(
            args.folder / f"row{number}", lambda same=same: try_input(same)
        )
    (args.folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

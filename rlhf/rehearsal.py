"""Try what a pipeline's later stages need before its first stage is trained: the reward functions,
and configuration and tokenizer of the given models.

The parent process calls `rehearse`, which does it in a process of its own, python -m rlhf.rehearsal
DIRECTORY, as this imports torch.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.locations import BUILTIN
from rlhf.base.log import log, say
from rlhf.base.own_processes import end_with_parent, own_source, python_module
from rlhf.config.loading import load_config, save_config
from rlhf.config.schema import Config
from rlhf.config.stage_graph import function_sources
from rlhf.runs.checks import given_models
from rlhf.runs.command import Command
from rlhf.runs.directory import config_for_stage
from rlhf.runs.environment import QUIET
from rlhf.runs.failures import WorkerError, read_failures, write_failure
from rlhf.runs.launch import graceful_shutdown


def rehearse(command: Command, stages: Sequence[str]) -> None:
    """Call the reward functions of all stages but the first on a few real rows, and read the files
    of the models that are given for them.

    Nothing happens where they have none. The first stage does this itself at its start.

    Raises: UserError naming the stage, the key, and what failed; WorkerError where the process was
        killed, or failed by a bug.
    """
    read_by_first = {path for stage in stages[:1] for _, path in models_of(command, stage)}
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        for number, stage in enumerate(stages[1:]):
            cfg = command.for_stage(stage).cfg
            if (
                function_sources(cfg, stage)
                or {path for _, path in models_of(command, stage)} - read_by_first
            ):
                save_config(config_for_stage(cfg, stage, {}), Path(folder, f"{number}.yaml"))
        if not any(Path(folder).iterdir()):
            return
        code = run_main(Path(folder))
        for failure in read_failures(Path(folder)):
            raise UserError(failure.message)
        if code:
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else "see above"
            raise WorkerError(f"the check of later stages failed: {ended}")


def models_of(command: Command, stage: str) -> list[tuple[str, str]]:
    """Key and path of the models that are given for a stage, without those that are built in."""
    given = given_models(config_for_stage(command.for_stage(stage).cfg, stage, {}))
    return [(key, path) for key, path, _ in given if not path.startswith(BUILTIN)]


def run_main(folder: Path) -> int:
    """Run `main` in a process of its own. Returns: its exit code. Raises: KeyboardInterrupt."""
    with graceful_shutdown() as signals:
        # a session of its own, as a worker: Ctrl-C reaches this process only
        process = subprocess.Popen(
            [*python_module("rlhf.rehearsal", "-W", "ignore"), str(folder)],
            # it looks at files only
            env=QUIET | os.environ | own_source() | {"DS_ACCELERATOR": "cpu"},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        )
        try:
            while process.poll() is None and not signals:
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    if signals:
        raise KeyboardInterrupt
    return process.returncode


def main(folder: Path) -> int:
    """Try each stage whose config.yaml is in `folder`. Returns: the exit code."""
    log.setLevel(logging.ERROR)  # the stage itself says what it reads
    for file in sorted(folder.glob("*.yaml")):
        cfg = load_config(file)
        try:
            try_stage(cfg, folder / file.stem)
        except UserError as error:
            write_failure(folder, "0", UserError(f"{cfg.stage.name}: {error}"))
            return 1
    return 0


def try_stage(cfg: Config, folder: Path) -> None:
    """Read the models that are given for a stage; load its data and functions as it will, and call
    the functions.

    Raises: UserError.
    """
    for key, path, _ in given_models(cfg):
        try_model(cfg, key, path)
    if not function_sources(cfg, cfg.stage.name):
        return
    from rlhf.data.load import open_data
    from rlhf.rewards.trial import running_functions, try_functions

    names = ", ".join(function_sources(cfg, cfg.stage.name))
    say(f"{cfg.stage.name}: trying {names} ...")
    folder.mkdir()
    with running_functions(cfg) as functions:
        rows = try_functions(functions, open_data(cfg, folder))
    say(f"{cfg.stage.name}: tried {names} on {rows} held-out prompts")


def try_model(cfg: Config, key: str, path: str) -> None:
    """Read configuration and tokenizer of a model. Raises: UserError naming the key."""
    from rlhf.models.loading import load_config, load_tokenizer

    try:
        load_config(path)
        if key.split(".")[1] != "rewards":  # those may do without a tokenizer of their own
            load_tokenizer(path, cfg.data.template)
    except UserError as error:
        raise UserError(f"{key}={path}: {error}") from error


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

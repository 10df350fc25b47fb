"""Try the reward functions of a pipeline's later stages before its first stage is trained.

The parent process calls `rehearse`. The functions are called in a process of its own, python -m
rlhf.rehearsal DIRECTORY, as they and the data may import torch.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.config.loading import load_config, save_config
from rlhf.config.schema import Config
from rlhf.config.stage_graph import score_sources
from rlhf.runs.command import Command
from rlhf.runs.directory import config_for_stage
from rlhf.runs.failures import WorkerError, read_failures, write_failure
from rlhf.runs.launch import end_with_parent, graceful_shutdown


def rehearse(command: Command, stages: Sequence[str]) -> None:
    """Call the reward functions of these stages on a few real rows.

    Nothing happens where they have none.

    Raises: UserError naming the stage, the key, the row, and what failed; WorkerError where the
        process was killed, or failed by a bug.
    """
    with tempfile.TemporaryDirectory(prefix="rlhf-") as folder:
        for number, stage in enumerate(stages):
            cfg = command.for_stage(stage).cfg
            if any(source.function for source in score_sources(cfg, stage).values()):
                file = Path(folder, f"{number}.yaml")
                save_config(config_for_stage(cfg, stage, {}), file)
        if not any(Path(folder).iterdir()):
            return
        code = call_functions(Path(folder))
        for failure in read_failures(Path(folder)):
            raise UserError(failure.message)
        if code:
            ended = f"killed by {signal.Signals(-code).name}" if code < 0 else "see above"
            raise WorkerError(f"the check of the reward functions failed: {ended}")


def call_functions(folder: Path) -> int:
    """Run `main` in a process of its own. Returns: its exit code. Raises: KeyboardInterrupt."""
    with graceful_shutdown() as signals:
        # a session of its own, as a worker: Ctrl-C reaches this process only
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf.rehearsal", str(folder)],
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
    """Load the data and the functions of a stage as it will, and call the functions.

    Raises: UserError.
    """
    from rlhf.data.load import open_data
    from rlhf.rl.functions import load_functions, try_functions

    functions = load_functions(cfg)
    folder.mkdir()
    rows = try_functions(cfg, functions, open_data(cfg, folder))
    names = ", ".join(functions)
    print(f"{cfg.stage.name}: tried {names} on {rows} held-out prompts", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

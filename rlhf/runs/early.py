"""Workers that import their libraries before it is their turn. No torch here.

Imports take most of the time from Enter to the first optimizer step. So a worker starts while
something else is done: that of the first stage while Hydra composes the configuration, that of each
further stage while the stage before it runs. `python -m rlhf.worker -` reads two lines of JSON:

1. `prepare` sends the environment that its libraries read, and what to import;
2. `take` sends its place among all processes, and its run directory: now it is its turn.

Before the second line it has no lock, no GPU and no model. It ends where its standard input ends:
it never outlives this process. On several nodes workers start at their turn only.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.base.own_processes import end_with_parent, own_source, python_module
from rlhf.config.choices import WandbMode
from rlhf.config.schema import Config
from rlhf.config.stage_graph import module_of
from rlhf.runs.environment import library_settings, memory_settings, places, work_of_others

AT_ITS_TURN = "-"  # what a worker has instead of a run directory
MEASURED = 0.3  # s; at least so long the load of the machine is measured
# what is needed at the end of a stage: it has the time to import that, too, but the first stage
LATE_IMPORTS = ["matplotlib.pyplot"]


@dataclass
class Waiting:
    """The workers whose turn has not come, by rank."""

    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)  # of this process, when they started
    stage: str = ""  # that they are prepared for
    own: list[int] = field(default_factory=list)  # process numbers, also of those before them
    # when the load of the machine was last measured: the clock, and the work of others by then
    measured: tuple[float, float] = (0.0, 0.0)


waiting = Waiting()


def begin() -> None:
    """Start a worker whose settings are not known yet."""
    waiting.measured = (time.monotonic(), work_of_others(waiting.own))
    start(1)


def prepare(cfg: Config, stage: str, is_next: bool) -> None:
    """Have the workers of a stage import what it needs.

    Args: is_next: no other stage runs before it, so that somebody waits.
    """
    if waiting.stage == stage:
        return
    if cfg.deploy.hostfile or cfg.deploy.nodes > 1:
        end()
        return
    start(cfg.deploy.processes_per_node)
    waiting.stage = stage
    modules = ["deepspeed", module_of(stage)]
    if not is_next:
        modules += LATE_IMPORTS + ["wandb"] * (cfg.wandb.mode != WandbMode.disabled)
    order = {"environment": library_settings(cfg, busy_lately), "modules": modules}
    tell([order | {"announce": is_next}] * len(waiting.workers))


def take(run_dir: Path, cfg: Config) -> dict[str, subprocess.Popen[bytes]]:
    """It is the turn of the workers that are prepared for this stage: they run it.

    Returns: by "rank N"; none where none are prepared, or where they have another environment than
        this process has now.
    """
    workers = waiting.workers
    if (
        waiting.stage != cfg.stage.name
        or waiting.environment != dict(os.environ)
        or len(workers) != cfg.deploy.processes_per_node
        or any(worker.poll() is not None for worker in workers)
    ):
        end()
        return {}
    tell([{"environment": place, "run_dir": str(run_dir)} for place in places(cfg)])
    for worker in workers:
        assert worker.stdin
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.close()
    waiting.workers, waiting.stage = [], ""
    return {f"rank {rank}": worker for rank, worker in enumerate(workers)}


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """After this context no worker waits for its turn."""
    try:
        yield
    finally:
        end()


def end() -> None:
    """End the workers whose turn has not come; they hold nothing."""
    for worker in waiting.workers:
        worker.kill()
    for worker in waiting.workers:
        worker.wait()
    waiting.workers, waiting.stage = [], ""


def start(count: int) -> None:
    """Start workers until there are `count`."""
    if not waiting.workers:
        waiting.environment = dict(os.environ)
    for rank in range(len(waiting.workers), count):
        worker = subprocess.Popen(
            [*python_module("rlhf.worker"), AT_ITS_TURN],
            # malloc reads its settings when a process starts
            env=os.environ
            | own_source()
            | memory_settings()
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            start_new_session=True,  # Ctrl-C reaches this process only
            stdin=subprocess.PIPE,
            preexec_fn=end_with_parent,
        )
        waiting.workers.append(worker)
        waiting.own.append(worker.pid)


def tell(orders: Sequence[dict[str, Any]]) -> None:
    """Send each of the waiting workers a line. One that has died is noticed later: `take`, or who
    waits for its end."""
    for worker, order in zip(waiting.workers, orders, strict=True):
        assert worker.stdin
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(json.dumps(order).encode() + b"\n")
            worker.stdin.flush()


def busy_lately() -> float:
    """How many processors other programs used since this was last measured."""
    before, worked = waiting.measured
    time.sleep(max(0.0, before + MEASURED - time.monotonic()))
    waiting.measured = now, also = time.monotonic(), work_of_others(waiting.own)
    return (also - worked) / (now - before)

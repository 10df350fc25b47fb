"""Where a run reports: metrics.jsonl (always), W&B, the progress bar, samples.jsonl; rank 0 only.

Metric names are TRL's where it has one, so that existing dashboards load; docs/wandb.md lists them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from rlhf.base.errors import UserError
from rlhf.base.log import first_line, log, presentable
from rlhf.config.schema import Config
from rlhf.config.stage_graph import is_rl
from rlhf.distributed import collectives
from rlhf.runs.directory import write_json
from rlhf.runs.run_files import PROGRESS
from rlhf.training.curves_on_the_way import CurvesOnTheWay
from rlhf.training.wandb_run import WANDB_SECONDS, start_wandb

if TYPE_CHECKING:
    from wandb import Run

SHOWN_AS = {  # beside the progress bar; other metrics by their own names
    "mean_token_accuracy": "token accuracy",
    "margin": "score margin",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "implicit reward margin",
    "objective/scores": "score",
    "reward/gold/mean": "gold reward",
    "gold": "gold reward",
    "objective/kl": "KL per response",
    "tokens/response_mean": "response tokens",
    "win_rate": "win rate",
}
HUNG_SECONDS = 2.0  # for a W&B that has failed before
LOGS = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl")


class Tracker:
    """Writes the metrics of one run.

    Args:
        run_dir: where the files go.
        total: steps of the run, for the time left.
        shown: metrics to show beside the progress bar.
    """

    def __init__(self, cfg: Config, run_dir: Path, total: int, shown: list[str]):
        self.run_dir, self.shown, self.total = run_dir, shown, total
        self.unit = "rollout" if is_rl(cfg.stage.name) else "step"
        self.main = collectives.rank() == 0
        self.start, self.first = time.time(), 0
        if not self.main:
            return
        write_json(run_dir / PROGRESS, {"steps": total})
        self.picture = CurvesOnTheWay(run_dir, cfg.stage.name)
        self.file = open(run_dir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115  one line per step, flushed at once
        # it takes seconds, in which the run can begin
        self.wandb_failed = False
        self.wandb_thread = ThreadPoolExecutor(1)
        self.wandb = self.wandb_thread.submit(start_wandb, cfg, run_dir)
        # a terminal shows a bar; anything else gets a line every 10 seconds
        self.bar = tqdm(
            total=total, desc=cfg.stage.name, unit=self.unit, disable=None, dynamic_ncols=True
        )
        self.last_line = 0.0

    def start_clock(self) -> None:
        """The first step begins now: what came before does not count for the time that is left."""
        self.start = time.time()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics of `step` (from 1; optimizer step, RL: rollout)."""
        if not self.main:
            return
        metrics = {key: float(value) for key, value in metrics.items()}
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        self.send_to_wandb(lambda run: run.log({"step": step, **metrics}))
        shown = {
            SHOWN_AS.get(key, key): f"{metrics[key]:.3g}" for key in self.shown if key in metrics
        }
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(step - self.bar.n if not self.bar.disable else 0)
        elapsed, done = time.time() - self.start, step - self.first
        line = f"{self.unit} {step}/{self.total}  " + "  ".join(
            f"{key} {value}" for key, value in shown.items()
        )
        line += f"  {elapsed:.0f} s, {elapsed / done * (self.total - step):.0f} s left"
        if self.bar.disable and (time.time() - self.last_line > 10 or step == self.total):
            self.last_line = time.time()
            log.info(line)
        else:
            log.debug(line)  # train.log has every step
        self.picture.draw_when_due()

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Record sampled responses: all in samples.jsonl, 32 in the W&B table `completions`."""
        if not self.main or not rows:
            return
        append_rows(self.run_dir / "samples.jsonl", step, rows)

        def send(run: Run) -> None:
            import wandb

            names = list(dict.fromkeys(name for row in rows[:32] for name in row))
            table = wandb.Table(
                columns=names,
                data=[[cell_of(row.get(name)) for name in names] for row in rows[:32]],
            )
            run.log({"step": step, "completions": table})

        self.send_to_wandb(send)

    def responses(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append responses of a rollout, token by token, to rollouts.jsonl.

        pandas.read_json(..., lines=True) reads it.
        """
        if self.main and rows:
            append_rows(self.run_dir / "rollouts.jsonl", step, rows)

    def alert(self, title: str, text: str) -> None:
        """Warn, on the console and as a W&B alert."""
        if not self.main:
            return
        log.warning(f"{title}: {text}")
        self.send_to_wandb(lambda run: run.alert(title=title, text=text, level="WARN"))

    def send_to_wandb(self, send: Callable[[Run], None]) -> None:
        """An error of W&B does not stop the run, whose own files have everything, nor does a W&B
        that does not answer. After the first one nothing more is sent."""
        if self.wandb_failed:
            return
        try:
            if run := self.wandb.result(timeout=WANDB_SECONDS):
                self.wandb_thread.submit(send, run).result(timeout=WANDB_SECONDS)
        except UserError:  # wandb.mode=online, and no server
            raise
        except Exception as error:  # its client raises many kinds when its own process has ended
            self.wandb_failed = True
            why = f"{type(error).__name__}: {first_line(error)}"
            if isinstance(error, TimeoutError):
                why = f"no answer in {WANDB_SECONDS:g} s"
            log.warning(
                f"W&B: {why}; from here on this run is only in its own files, which have everything"
            )

    def state_dict(self) -> dict[str, int]:
        """Bytes of each file that are on the disk."""
        sizes = {}
        for name in LOGS if self.main else ():
            with contextlib.suppress(FileNotFoundError), open(self.run_dir / name, "rb") as file:
                os.fsync(file.fileno())
                sizes[name] = os.fstat(file.fileno()).st_size
        return sizes

    def load_state_dict(self, sizes: dict[str, int]) -> None:
        """Cut off what was written later: those steps are repeated."""
        for name in LOGS if self.main else ():
            cut_back(self.run_dir / name, sizes.get(name, 0))
        if self.main and sizes:
            with open(self.run_dir / "metrics.jsonl", "rb") as file:
                self.first = sum(1 for _ in file)
            self.bar.initial = self.bar.n = self.first

    def close(self, summary: dict[str, Any]) -> None:
        """End the run; `summary` holds its final metrics."""
        if not self.main:
            return
        self.bar.close()
        self.file.close()
        self.picture.stop()

        def send(run: Run) -> None:
            run.summary.update(summary)
            run.finish()

        self.send_to_wandb(send)
        if wandb := sys.modules.get("wandb"):
            # here: at the interpreter's end it would raise where W&B's own process has ended, and
            # wait for ever where that hangs
            seconds = HUNG_SECONDS if self.wandb_failed else WANDB_SECONDS
            with contextlib.suppress(Exception):
                ThreadPoolExecutor(1).submit(wandb.teardown).result(timeout=seconds)


def cut_back(file: Path, size: int) -> None:
    """Cut a file of lines to the size that it had at a checkpoint. One that has become shorter is
    cut to whole lines, with a warning: the run does not need it, its curves and tables do."""
    there = file.stat().st_size if file.exists() else 0
    if there >= size:
        if file.exists():
            os.truncate(file, size)
        return
    log.warning(
        f"{file}: {size - there:,} bytes that this run had written are missing; it continues, and "
        "its curves lack these steps"
    )
    if there:
        content = file.read_bytes()
        os.truncate(file, content.rfind(b"\n") + 1)


def cell_of(value: Any) -> Any:
    """A value for a table of W&B, whose columns have one type each: an object becomes JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def append_rows(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Append a JSON line per row, with its step."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows
        )


def set_up_logging(run_dir: Path) -> None:
    """Rank 0: messages to the console, and with every step's metrics to train.log.

    Other ranks: warnings only.
    """
    log.setLevel(logging.DEBUG if collectives.rank() == 0 else logging.WARNING)
    log.propagate = False
    logging.raiseExceptions = False  # on a full disk train.log lacks lines; it is no reason to end
    console = TqdmHandler()
    console.setLevel(logging.INFO)
    log.addHandler(console)
    if collectives.rank() == 0:
        file = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
        file.setFormatter(Presentable("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(file)


class Presentable(logging.Formatter):
    """No text of data or a model controls the terminal that shows a log, or fills the disk."""

    def format(self, record: logging.LogRecord) -> str:
        return presentable(super().format(record))


class TqdmHandler(logging.Handler):
    """Prints above a progress bar without tearing it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a full disk behind stderr: train.log has it too
            tqdm.write(presentable(self.format(record)), file=sys.stderr)

"""Checkpoints: all that a run needs to resume bit for bit.

    run_dir/checkpoints/step-N/actor/ ...     weights and optimizer of each trained engine
                               rank-R.pt      of each rank: random streams, and the stage's state
                               checkpoint.json  the step, the placement, and the size of every file
                                              (runs/directory.py::find_checkpoints reads it)
                               SHA256SUMS     the hash of every file, which resuming checks

A checkpoint is written under a temporary name, flushed to the disk and renamed, so one that has its
final name is complete.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from rlhf.base import watchdog
from rlhf.base.checksums import (
    SUMS,
    damaged_files,
    files_below,
    hash_files,
    read_sums,
    write_sums,
)
from rlhf.base.files import remove
from rlhf.base.log import announced, first_few, first_line, log
from rlhf.config.deployment import placement
from rlhf.config.schema import Config
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, read_data_only
from rlhf.runs.directory import find_checkpoints, write_json
from rlhf.sampling.cpu import kernels

_stop_requested = False


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint where it could."""


class Stateful(Protocol):
    """What changes from step to step and can be saved."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Checkpoints:
    """Saves a run when a checkpoint is due, and resumes it.

    Args:
        total: steps of the run (optimizer steps; RL: rollouts).
        engines: the trained ones, by role.
        stateful: what else changes from step to step, by name; a plain dictionary may hold numbers,
            strings and lists. The same names on every rank.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        total: int,
        engines: Mapping[str, Engine[nn.Module]],
        stateful: Mapping[str, Stateful | dict[str, Any]],
    ):
        self.settings, self.total = cfg.checkpoint, total
        self.again = "the same command" + " without fresh=true" * cfg.fresh
        self.engines, self.stateful = engines, stateful
        self.device = next(iter(engines.values())).device
        self.run_dir = run_dir
        self.directory = run_dir / "checkpoints"
        self.placement = placement(cfg)
        self.saved_at = time.monotonic()
        self.bytes = 0.0  # of the last checkpoint
        signal.signal(signal.SIGTERM, _request_stop)  # from now on there is something to save

    # -------------------------------------------------------------------------------------- resume

    def resume(self) -> int:
        """Load the newest checkpoint that is complete and undamaged.

        What was logged after it is cut off: stateful["tracker"].

        Returns: the steps that are done; 0 without a checkpoint.
        """
        complete, broken = find_checkpoints(self.run_dir)
        if collectives.rank() == 0:
            for path in broken:
                log.warning(f"{path} is incomplete: skipped")
            for path in self.directory.glob("*.tmp"):
                remove(path)
        while complete and (damaged := self._damaged_files(complete[0][0])):
            self._set_aside(complete.pop(0)[0], damaged, bool(complete))
        if not complete:
            tracker = self.stateful.get("tracker")
            if tracker is not None and not isinstance(tracker, dict):
                tracker.load_state_dict({})
            return 0
        path, about = complete[0]
        self.bytes = float(sum(about["files"].values()))
        self._load(path)
        if about.get("kernels") is not None and about["kernels"] != kernels.load():
            log.warning(
                "the compiled CPU kernels sampled before this checkpoint or will sample after it, "
                "not both: the last digits will differ"
            )
        log.info(f"resuming after step {about['step']} of {self.total}, from {path}")
        return about["step"]

    def _damaged_files(self, path: Path) -> list[str]:
        """The files of a checkpoint that are not what was written; each rank reads some of them."""
        names = sorted(read_sums(path))
        own = names[collectives.rank() :: collectives.world_size()]
        with watchdog.while_files_move():
            found = collectives.all_gather_objects(damaged_files(path, own))
        return sorted(name for names_of_rank in found for name in names_of_rank)

    def _set_aside(self, path: Path, damaged: list[str], others: bool) -> None:
        """Make a damaged checkpoint an incomplete one, and say so. Args: others: there are more."""
        collectives.barrier()
        if collectives.rank() == 0:
            then = "the one before it is used" if others else "training begins again"
            log.warning(f"{path}: damaged ({first_few(damaged)}: not what was written): {then}")
            (path / "checkpoint.json").rename(path / "damaged.json")

    def _load(self, path: Path) -> None:
        for role, engine in self.engines.items():
            # frozen weights are not in it, so not strict
            loaded, _ = engine.load_checkpoint(path, tag=role, load_module_strict=False)
            if loaded is None:
                raise RuntimeError(
                    f"{path}: DeepSpeed finds no checkpoint of {role} there; "
                    "remove it to resume from the one before"
                )
        file = path / f"rank-{collectives.rank()}.pt"
        state = read_data_only(str(file), "cpu")
        for name, part in self.stateful.items():
            if isinstance(part, dict):
                part.update(state["stateful"][name])
            else:
                part.load_state_dict(state["stateful"][name])
        set_random_state(state["random"])

    # ---------------------------------------------------------------------------------------- save

    def after(self, step: int) -> None:
        """After `step` steps: save if a checkpoint is due, and stop if that was requested.

        Raises: Stopped.
        """
        every, minutes = self.settings.every_steps, self.settings.every_minutes
        is_late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        stop_file = collectives.rank() == 0 and (self.run_dir / "stop").exists()
        # the clock or signal of one rank counts for all: 2 = stop, 1 = save
        request = 2.0 if _stop_requested or stop_file else float(is_late)
        request = collectives.all_reduce_max(request, self.device)
        is_last = step == self.total
        if is_last:
            is_due = self.settings.keep_optimizer
        else:
            is_due = request >= 1 or (every is not None and step % every == 0)
        is_saved = self.save(step) if is_due else False
        if request >= 2 and not is_last:
            outcome = f"run {self.again} to resume" if is_saved else "it has no checkpoint"
            raise Stopped(f"stopped after step {step} of {self.total}; {outcome}")

    def save(self, step: int) -> bool:
        """Write a checkpoint and drop the oldest ones.

        Where the disk has no room for it, there is a warning and no checkpoint.

        Returns: whether it is written.
        Raises: RuntimeError when writing fails; the checkpoints before stay complete.
        """
        target = self.directory / f"step-{step}"
        temporary = target.with_name(target.name + ".tmp")
        if collectives.rank() == 0:
            remove(temporary)
            temporary.mkdir(parents=True)
        collectives.barrier()
        free = shutil.disk_usage(self.directory).free
        self.saved_at = time.monotonic()  # also without room: the next attempt is as far away
        if collectives.all_reduce_max(float(free < self.bytes), self.device):
            if collectives.rank() == 0:
                temporary.rmdir()
                log.warning(
                    f"no checkpoint at step {step}: {free / 2**30:.1f} GiB are free, "
                    f"{self.bytes / 2**30:.1f} are needed"
                )
            return False
        try:
            with announced(f"writing the checkpoint of step {step}"), watchdog.while_files_move():
                self._write(temporary)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"cannot write checkpoints/{target.name} (is the disk full?): {first_line(error)}"
            ) from error
        collectives.barrier()
        with watchdog.while_files_move():
            hashes = self._hashes(temporary)
            if collectives.rank() == 0:
                self._complete(temporary, target, step, hashes)
        collectives.barrier()
        return True

    def _write(self, directory: Path) -> None:
        """Write this rank's part."""
        for role, engine in self.engines.items():
            engine.save_checkpoint(
                directory, tag=role, save_latest=False, exclude_frozen_parameters=True
            )
        stateful = {
            name: dict(part) if isinstance(part, dict) else part.state_dict()
            for name, part in self.stateful.items()
        }
        state = {"stateful": stateful, "random": random_state()}
        torch.save(state, directory / f"rank-{collectives.rank()}.pt")

    def _hashes(self, directory: Path) -> dict[str, str]:
        """The hash of each file that the ranks have written; each rank reads some of them."""
        names = collectives.all_gather_objects(files_below(directory))[0]
        own = names[collectives.rank() :: collectives.world_size()]
        parts = collectives.all_gather_objects(hash_files(directory, own))
        return {name: digest for part in parts for name, digest in part.items()}

    def _complete(
        self, temporary: Path, target: Path, step: int, hashes: Mapping[str, str]
    ) -> None:
        """Give a written checkpoint its final name, and drop the oldest ones."""
        files = {name: (temporary / name).stat().st_size for name in hashes}
        self.bytes = float(sum(files.values()))
        about = {
            "step": step,
            "placement": self.placement,
            "kernels": kernels.loaded,
            "files": files,
        }
        write_json(temporary / "checkpoint.json", about)
        write_sums(temporary, {**hashes, **hash_files(temporary, ["checkpoint.json"])})
        # without this a power cut could leave the name and lose the bytes
        for file in [*files, "checkpoint.json", SUMS]:
            with open(temporary / file, "rb") as written:
                os.fsync(written.fileno())
        remove(target)
        os.replace(temporary, target)
        complete, broken = find_checkpoints(self.run_dir)
        for path in [*broken, *(path for path, _ in complete[self.settings.keep :])]:
            remove(path)
        log.debug(f"checkpoint {target}")


def _request_stop(*_: object) -> None:
    global _stop_requested
    _stop_requested = True


# ------------------------------------------------------------------------------- random streams


def random_state() -> dict[str, Any]:
    """The random streams of this rank: torch (CPU and GPU), numpy and python."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])

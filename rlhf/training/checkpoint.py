"""Checkpoints: all that a run needs to go on, bit for bit, where it was.

    run_dir/checkpoints/step-N/actor/ ...     weights and optimizer of each trained engine, as DeepSpeed writes them
                               rank-R.pt      of each process: random streams, and what the stage remembers
                               checkpoint.json  the step, where it ran, and the size of every file (layout.checkpoints reads it)

A checkpoint is written under a temporary name, flushed to the disk and renamed: what has its name is whole.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.config.deployment import placement
from rlhf.config.schema import Config
from rlhf.distributed import collectives
from rlhf.runs.directory import find_checkpoints, write_json
from rlhf.runs.log import first_line, log
from rlhf.sampling.cpu import kernels

_asked_to_stop = False


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint."""


class Checkpoints:
    """Saves a run when it is time, and finds where it was.

    Args:
        total: steps of the run (optimizer steps, PPO: rollouts).
        engines: the trained ones, by role.
        memory: what else changes from step to step, by name: objects with state_dict and load_state_dict, or plain dictionaries of
            numbers, texts and lists. The same names on every process.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        total: int,
        engines: dict[str, Any],
        memory: dict[str, Any],
    ):
        self.settings, self.total, self.engines, self.memory = (
            cfg.checkpoint,
            total,
            engines,
            memory,
        )
        self.directory = run_dir / "checkpoints"
        self.placement = placement(cfg)
        self.saved_at = time.monotonic()
        self.bytes = 0.0  # of the last checkpoint
        signal.signal(signal.SIGTERM, _ask_to_stop)  # from now on there is something to save

    # ------------------------------------------------------------------------------------------------------------------ go on

    def resume(self) -> int:
        """Load the newest whole checkpoint. Returns: the steps that are done, 0 without any; what was logged after them is cut off
        (memory["tracker"])."""
        found, torn = find_checkpoints(self.directory.parent)
        for path in torn if collectives.rank() == 0 else ():
            log.warning(f"{path} is not whole, it is left out")
        for path in self.directory.glob("*.tmp") if collectives.rank() == 0 else ():
            shutil.rmtree(path)
        if not found:
            if "tracker" in self.memory:
                self.memory["tracker"].load_state_dict({})
            return 0
        path, about = found[0]
        self.bytes = float(sum(about["files"].values()))
        for role, engine in self.engines.items():
            loaded, _ = engine.load_checkpoint(
                path, tag=role, load_module_strict=False
            )  # frozen weights are not in it
            if loaded is None:
                raise RuntimeError(
                    f"{path}: DeepSpeed finds no checkpoint of {role} there; remove it to go on from the one before"
                )
        state = torch.load(
            path / f"rank-{collectives.rank()}.pt", map_location="cpu", weights_only=True
        )
        for name, part in self.memory.items():
            part.update(state["memory"][name]) if isinstance(part, dict) else part.load_state_dict(
                state["memory"][name]
            )
        set_random_state(state["random"])
        if about.get("kernels") is not None and about["kernels"] != kernels.load():
            log.warning(
                "our kernels for CPU sampled before this checkpoint or sample after it, not both: last digits will differ"
            )
        log.info(f"going on after step {about['step']} of {self.total}, from {path}")
        return about["step"]

    # ------------------------------------------------------------------------------------------------------------------- save

    def after(self, step: int) -> None:
        """After `step` steps: save where it is time, and stop where that was asked for.

        Raises: Stopped."""
        every, minutes = self.settings.every_steps, self.settings.every_minutes
        late = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        device = next(iter(self.engines.values())).device
        to_stop = _asked_to_stop or (
            collectives.rank() == 0 and (self.directory.parent / "stop").exists()
        )
        asked = collectives.all_reduce_max(
            2.0 * to_stop + late, device
        )  # one process's clock and signal are those of all
        last = step == self.total
        due = (
            self.settings.keep_optimizer
            if last
            else asked >= 1 or (every is not None and step % every == 0)
        )
        saved = self.save(step) if due else False
        if asked >= 2 and not last:
            goes_on = (
                "the same command goes on from there" if saved else "there is no checkpoint of it"
            )
            raise Stopped(f"asked to stop after step {step} of {self.total}; {goes_on}")

    def save(self, step: int) -> bool:
        """Write a checkpoint and drop the oldest ones. Without room on the disk for it, it is left out with a warning.

        Returns: whether it is written.
        Raises: RuntimeError when writing fails half-way; the checkpoints before are whole."""
        target = self.directory / f"step-{step}"
        temporary = target.with_name(target.name + ".tmp")
        if collectives.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        collectives.barrier()
        device = next(iter(self.engines.values())).device
        free = shutil.disk_usage(self.directory).free
        self.saved_at = time.monotonic()  # also where there is no room: the next try is as far away
        if collectives.all_reduce_max(float(free < self.bytes), device):
            if collectives.rank() == 0:
                temporary.rmdir()
                log.warning(
                    f"no checkpoint at step {step}: {free / 2**30:.1f} GiB are free, {self.bytes / 2**30:.1f} are needed"
                )
            return False
        memory = {
            name: dict(part) if isinstance(part, dict) else part.state_dict()
            for name, part in self.memory.items()
        }
        try:
            for role, engine in self.engines.items():
                engine.save_checkpoint(
                    temporary, tag=role, save_latest=False, exclude_frozen_parameters=True
                )
            torch.save(
                {"memory": memory, "random": random_state()},
                temporary / f"rank-{collectives.rank()}.pt",
            )
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"cannot write {temporary.parent.name}/{target.name} (is the disk full?): {first_line(error)}"
            ) from error
        collectives.barrier()
        if collectives.rank() == 0:
            files = {
                str(file.relative_to(temporary)): file.stat().st_size
                for file in sorted(temporary.rglob("*"))
                if file.is_file()
            }
            self.bytes = float(sum(files.values()))
            about = {
                "step": step,
                "placement": self.placement,
                "kernels": kernels.loaded,
                "files": files,
            }
            write_json(temporary / "checkpoint.json", about)
            for file in [
                *files,
                "checkpoint.json",
            ]:  # a name that appears before its bytes would be worth nothing after a power cut
                with open(temporary / file, "rb") as written:
                    os.fsync(written.fileno())
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            whole, torn = find_checkpoints(self.directory.parent)
            for path in [*torn, *(path for path, _ in whole[self.settings.keep :])]:
                shutil.rmtree(path)
            log.debug(f"checkpoint {target}")
        collectives.barrier()
        return True


def _ask_to_stop(*_: object) -> None:
    global _asked_to_stop
    _asked_to_stop = True


# ---------------------------------------------------------------------------------------------------------------- random streams


def random_state() -> dict[str, Any]:
    """The random streams of this process, of torch (CPU and GPU), numpy and python."""
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

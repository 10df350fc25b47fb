"""What is in a run directory: summary, lock, checkpoints, earlier attempts. No torch here."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from rlhf.config.deployment import placement
from rlhf.config.schema import Config, StageChoice


def read_summary(directory: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None when there is none (its presence means finished)."""
    try:
        return json.loads((directory / "summary.json").read_text())
    except FileNotFoundError:
        return None


def write_json(path: Path, value: Any) -> None:
    """Write through a temporary name, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def config_for_stage(cfg: Config, stage: str, inputs: dict[str, str]) -> Config:
    """The configuration that the workers of one stage read."""
    own = deepcopy(cfg)
    own.stage = StageChoice(name=stage, runs=[stage])
    own.root = str(Path(cfg.root).expanduser().resolve())
    own.inputs = inputs
    return own


@contextlib.contextmanager
def lock_run(directory: Path, wait: bool = False) -> Iterator[None]:
    """Hold the run directory: two processes never train the same run. The lock ends with its process, however that ends.

    Args: wait: for another process that has it, with a line now and then; else that is refused.
    Raises: RuntimeError naming the owner when another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".owner", "a+") as lock:
        start = say_at = time.monotonic()
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                who = f"{directory} is being trained by another process ({lock.read().strip()})"
            now = time.monotonic()
            if not wait and now > start + 0.3:  # not somebody who only looks (is_owned)
                raise RuntimeError(f"{who}: wait for it, or stop it")
            if wait and now >= say_at:
                print(f"waiting for {now - start:.0f} s: {who}", file=sys.stderr, flush=True)
                say_at = now + 30
            time.sleep(0.1)
        lock.seek(0)
        lock.truncate()
        lock.write(
            f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        )
        lock.flush()
        yield


def is_locked(directory: Path) -> bool:
    """Whether a process holds the run directory."""
    with contextlib.suppress(FileNotFoundError), open(directory / ".owner") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def find_checkpoints(directory: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[Path]]:
    """The checkpoints of a run: the whole ones, newest first, with what each says of itself; and those that are not whole."""
    whole, torn = [], []
    for path in (directory / "checkpoints").glob("step-*"):
        if path.suffix == ".tmp":  # the process died while it wrote
            continue
        try:
            about = json.loads((path / "checkpoint.json").read_text())
            sizes = {name: (path / name).stat().st_size for name in about["files"]}
        except (OSError, ValueError, KeyError):
            torn.append(path)
            continue
        whole.append((path, about)) if sizes == about["files"] else torn.append(path)
    return sorted(whole, key=lambda found: -found[1]["step"]), torn


def check_resumable(
    directory: Path, about: dict[str, Any], cfg: Config, parents: dict[str, str]
) -> list[str]:
    """Whether a run can go on from its checkpoint. Returns: what to warn of.

    Args: about: what the checkpoint says of itself.  parents: ids of the runs that it now stands on.
    Raises: RuntimeError with the difference and the way on.
    """
    anew = "or add fresh=true to train it anew (this attempt is then kept in its attempts/)"
    before, now = about["placement"], placement(cfg)
    differ = [key for key in before if now.get(key) != before[key]]
    if differ:
        then, instead = (
            " ".join(f"{key}={place.get(key)}" for key in differ) for place in (before, now)
        )
        raise RuntimeError(
            f"{directory} is at step {about['step']}, made with {then}, not {instead}: go on with {then}, {anew}"
        )
    stood_on = json.loads((directory / "parents.json").read_text())
    if stood_on != parents:
        raise RuntimeError(
            f"{directory} stands on other runs than there are now ({stood_on} -> {parents}): bring them back, {anew}"
        )
    old, new = (
        json.loads((directory / "env.json").read_text())["packages"],
        describe_environment()["packages"],
    )
    changed = [
        f"{name} {version} -> {new.get(name)}"
        for name, version in old.items()
        if new.get(name) != version
    ]
    return [f"going on with other versions than before: {', '.join(changed)}"] if changed else []


def archive_attempt(directory: Path) -> Path | None:
    """Move what an earlier attempt left in a run directory into its `attempts/N`; returns that, or None when it was empty."""
    left = [path for path in directory.iterdir() if path.name not in ("attempts", ".owner")]
    if not left:
        return None
    number = 1 + max(
        (int(p.name) for p in (directory / "attempts").glob("*") if p.name.isdigit()), default=0
    )
    aside = directory / "attempts" / str(number)
    aside.mkdir(parents=True)
    for path in left:
        path.rename(aside / path.name)
    return aside


def describe_environment() -> dict[str, Any]:
    """Versions and hardware that a run was made with, for env.json."""
    packages = [
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "hydra-core",
        "omegaconf",
        "wandb",
        "numpy",
    ]

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent
            )
            return done.stdout.strip() if done.returncode == 0 else ""
        except (OSError, subprocess.TimeoutExpired):
            return ""

    return {
        "git": ask("git", "rev-parse", "HEAD"),
        "git_dirty": bool(ask("git", "status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": ask(
            "nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"
        ).splitlines(),
    }

"""What is in a run directory: summary, checkpoints, earlier attempts. No torch here."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Container
from copy import deepcopy
from pathlib import Path
from typing import Any

from rlhf.base.checksums import damaged_files
from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path, special_kind
from rlhf.config.deployment import BYTES, placement
from rlhf.config.schema import Config, StageChoice
from rlhf.runs.locks import LOCK_FILE
from rlhf.runs.run_files import (
    AGAIN,
    ENVIRONMENT,
    PARENTS,
    SUMMARY,
    WARNINGS,
    Checkpoint,
    Summary,
    read_file,
    read_json,
)

# what a run directory's env.json lists
PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "datasets",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
)


RUN_FILE_SUFFIXES = (".json", ".jsonl", ".log", ".png", ".txt", ".yaml")


def read_summary(directory: Path) -> Summary | None:
    """The summary of a finished run; None where there is none (its presence means finished).

    Raises: UserError, as `read_file`.
    """
    return read_file(directory, SUMMARY)


def read_warnings(directory: Path) -> list[str]:
    """What a finished run warned of, and what to do about it; none in an older run.

    Raises: UserError, as `read_file`.
    """
    return read_file(directory, WARNINGS) or []


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that a reader never sees half-written."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def config_for_stage(cfg: Config, stage: str, inputs: dict[str, str]) -> Config:
    """The configuration that the workers of one stage read.

    Args: inputs: locations of the trained models that it starts from (`find_inputs`).
    """
    stage_cfg = deepcopy(cfg)
    stage_cfg.stage = StageChoice(name=stage, runs=[stage])
    stage_cfg.root = str(Path(cfg.root).expanduser().resolve())
    stage_cfg.inputs = inputs
    return stage_cfg


def find_checkpoints(directory: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[Path]]:
    """The checkpoints of a run.

    Returns: the intact ones with their checkpoint.json, newest first; and the incomplete ones,
        whose files are missing or have other sizes than checkpoint.json says. The content of the
        large files is not read here.
    """
    intact: list[tuple[Path, dict[str, Any]]] = []
    incomplete = []
    for path in (directory / "checkpoints").glob("step-*"):
        if path.suffix == ".tmp":  # the process died while it wrote
            continue
        try:
            description = read_json(path / "checkpoint.json", Checkpoint)
            sizes = {name: (path / name).stat().st_size for name in description["files"]}
        except (OSError, ValueError):  # ValueError: no JSON, and a NUL in a name
            incomplete.append(path)
            continue
        if sizes == description["files"] and not damaged_files(path, ["checkpoint.json"]):
            intact.append((path, description))
        else:
            incomplete.append(path)
    return sorted(intact, key=lambda checkpoint: -checkpoint[1]["step"]), incomplete


def check_resumable(
    directory: Path,
    description: dict[str, Any],
    cfg: Config,
    parents: dict[str, str],
    functions: Container[str] = (),
) -> list[str]:
    """Check that a run can resume from its checkpoint.

    Args:
        description: the checkpoint's checkpoint.json.
        parents: ids of today's parent runs and files.
        functions: those of them that are files of reward functions: one that fails in the middle of
            a run can be repaired.
    Returns: warnings.
    Raises: UserError with the difference and the fix.
    """
    before, now = description["placement"], placement(cfg)
    differ = [key for key in before if now.get(key) != before[key]]
    if differ:
        old, new = (
            " ".join(f"{key}={place.get(key)}" for key in differ) for place in (before, now)
        )
        # in 16 bits stages below 2 are not built any more
        is_gone = BYTES[cfg.deploy.precision] == 2 and before.get("deploy.zero_stage", 2) < 2
        fix = AGAIN if is_gone else f"resume it with {old}, or {AGAIN}"
        raise UserError(
            f"{directory} is at step {description['step']}, made with {old}, not {new}: {fix}"
        )
    parents_before = read_file(directory, PARENTS)
    if parents_before is None:
        raise UserError(f"{directory / PARENTS} is missing, so nobody knows its parents: {AGAIN}")
    names = {**parents_before, **parents}
    others = [name for name in names if parents_before.get(name) != parents.get(name)]
    if [name for name in others if name not in functions or name not in parents_before]:
        raise UserError(
            f"{directory} was trained from other runs or files than there are now (changed: "
            f"{', '.join(others)}): bring them back, or {AGAIN}"
        )
    warnings = [f"resuming with a file of {name} that has changed since" for name in others]
    versions_before = (read_file(directory, ENVIRONMENT) or {}).get("packages", {})
    versions = describe_environment()["packages"]
    changed = [
        f"{name} {version} -> {versions.get(name)}"
        for name, version in versions_before.items()
        if versions.get(name) != version
    ]
    if changed:
        warnings.append(f"resuming with other package versions: {', '.join(changed)}")
    return warnings


def check_file_types(directory: Path) -> None:
    """Refuse a folder where a run writes a file, and the reverse.

    Raises: UserError that names it.
    """
    for path in directory.iterdir():
        is_file_name = path.suffix in RUN_FILE_SUFFIXES or path.name == "wandb_id"
        special = special_kind(path)
        if is_file_name and (special or path.is_dir()):
            raise UserError(
                f"{path}: this is {special or 'a folder'}, where the run has a file: remove it"
            )
        if path.name in ("attempts", "checkpoints") and not path.is_dir():
            raise UserError(
                f"{path}: not a folder, but the run keeps a folder of this name: remove it"
            )


def archive_attempt(directory: Path) -> Path | None:
    """Move the files of an earlier attempt in a run directory into its `attempts/N`.

    Returns: that folder, or None where there were no files.
    """
    files = [path for path in directory.iterdir() if path.name not in ("attempts", LOCK_FILE)]
    if not files:
        return None
    numbers = [int(p.name) for p in (directory / "attempts").glob("*") if p.name.isdigit()]
    archive = directory / "attempts" / str(1 + max(numbers, default=0))
    archive.mkdir(parents=True)
    for path in files:
        path.rename(archive / path.name)
    return archive


@functools.cache  # it takes 0.1 s
def describe_environment() -> dict[str, Any]:
    """Versions and hardware that a run was made with, for env.json."""
    gpus = output_of("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return {
        "git": output_of("git", "rev-parse", "HEAD"),
        "git_dirty": bool(output_of("git", "status", "--porcelain")),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "gpus": gpus.splitlines(),
    }


def output_of(*command: str) -> str:
    """What a command prints; "" where it fails, or takes more than 5 s."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=5, cwd=folder
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""

"""The W&B run of a run directory: its mode, id and settings, its end."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.base.log import first_line, log
from rlhf.base.wandb_login import wandb_problem
from rlhf.config.choices import WandbMode
from rlhf.config.loading import plain
from rlhf.config.schema import Config

if TYPE_CHECKING:
    from wandb import Run

WANDB_SECONDS = 60.0  # in which W&B must have started, and in which it must have taken what is sent
OFF_THE_SERVER = {  # values of WANDB_MODE; dryrun is the old name of offline
    "offline": WandbMode.offline,
    "dryrun": WandbMode.offline,
    "disabled": WandbMode.disabled,
}
NOT_USED = (
    "WANDB_NAME",
    "WANDB_RUN_GROUP",
    "WANDB_RUN_ID",
    "WANDB_JOB_TYPE",
    "WANDB_TAGS",
    "WANDB_RESUME",
    "WANDB_DIR",
)


def start_wandb(cfg: Config, run_dir: Path) -> Run | None:
    """The W&B run of this run directory, or None when disabled.

    Never prompts, and never waits for a network that is down.

    Raises: UserError when wandb.mode=online and the server cannot be reached.
    """
    asked = mode_asked_for(cfg)
    if asked == WandbMode.disabled:
        return None
    say_what_is_not_used()
    use_folder_that_can_be_written(run_dir)
    import wandb

    # It watches imports to report them. Where its process has ended, this would fail any import.
    wandb.sdk.wandb_run.Run._register_telemetry_import_hooks = lambda _: None
    mode: Any = asked.name
    if asked in (WandbMode.auto, WandbMode.online):
        problem = wandb_problem(wandb.setup().settings.base_url)
        if problem and asked == WandbMode.online:
            raise UserError(f"wandb.mode=online: {problem}, or set wandb.mode=auto")
        mode = "offline" if problem else "online"
    options = wandb_options(cfg, run_dir)
    try:
        run = wandb.init(mode=mode, **options)
    except (
        wandb.errors.CommError,
        wandb.errors.UsageError,
        wandb.errors.AuthenticationError,
    ) as error:
        if asked == WandbMode.online:
            line = first_line(error).rstrip(".")
            raise UserError(
                f"wandb.mode=online: {line}: fix this, or set wandb.mode=auto"
            ) from None
        log.warning("W&B is unreachable, the run is logged offline: %s", first_line(error))
        run = wandb.init(mode="offline", **options)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def mode_asked_for(cfg: Config) -> WandbMode:
    """wandb.mode; with auto, WANDB_MODE of the environment where that keeps a run off the server:
    wandb.init would take our mode for it."""
    given = os.environ.get("WANDB_MODE", "")
    if cfg.wandb.mode != WandbMode.auto or given not in OFF_THE_SERVER:
        return cfg.wandb.mode
    mode = OFF_THE_SERVER[given]
    log.info(f"W&B: {mode.name}, as WANDB_MODE={given} is in the environment")
    return mode


def use_folder_that_can_be_written(run_dir: Path) -> None:
    """Let W&B write its own files into the run's directory where the home folder cannot be written:
    it would send no tables and print its logs. Its settings are read from the home folder."""
    if not os.access(Path.home(), os.W_OK):
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
            os.environ.setdefault(name, str(run_dir / "wandb"))


def say_what_is_not_used() -> None:
    """Name the variables of the environment that wandb would take from a script without a tracker
    of its own. Those for project, entity and notes are used, unless keys of `wandb` are set."""
    if given := [name for name in NOT_USED if os.environ.get(name)]:
        log.info(
            f"W&B: {', '.join(given)} of the environment: not used; a run's name, group, id and "
            "folder are its own, and tags are given by wandb.tags"
        )


def wandb_id(run_dir: Path) -> str:
    """The id of the W&B run, in run_dir/wandb_id; a new one where there is none that is valid."""
    file = run_dir / "wandb_id"
    if file.exists():
        found = file.read_bytes()[:100].decode(errors="replace").strip()
        if re.fullmatch("[0-9a-f]{12}", found):
            return found
        log.warning(f"{file}: {found!r:.80} is no id of a W&B run; this run gets a new one there")
    new = secrets.token_hex(6)
    with atomic_path(file) as temporary:
        temporary.write_text(new, encoding="utf-8")
    return new


def wandb_options(cfg: Config, run_dir: Path) -> dict[str, Any]:
    """The arguments of wandb.init. A resumed run has the id of run_dir/wandb_id again."""
    import wandb

    return {
        "id": wandb_id(run_dir),
        "dir": run_dir,
        "project": cfg.wandb.project,
        "entity": cfg.wandb.entity,
        "group": cfg.experiment_name,
        "job_type": cfg.stage.name,
        "name": run_dir.name,
        "tags": [cfg.actor.name, cfg.deploy.device.name, *cfg.data.sources, *cfg.wandb.tags],
        "notes": cfg.wandb.notes,
        "config": plain(cfg),
        "resume": "allow",
        "settings": wandb.Settings(
            console="off",
            silent=True,
            init_timeout=15,
            finish_timeout=WANDB_SECONDS - 10,
            x_transaction_log_flush_interval=1,
            x_disable_meta=True,
        ),
    }


def finish_wandb() -> None:
    """Send what this process has logged to W&B; a resumed run continues the same W&B run."""
    if (wandb := sys.modules.get("wandb")) and wandb.run:
        with contextlib.suppress(Exception):
            ThreadPoolExecutor(1).submit(wandb.finish).result(timeout=WANDB_SECONDS)

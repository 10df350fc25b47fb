"""Run the stages of a command: skip what is finished, resume what was interrupted.

No torch here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from rlhf.base.checksums import check_model
from rlhf.base.errors import UserError
from rlhf.base.files import remove
from rlhf.base.interrupts import raise_at_interrupt
from rlhf.base.log import first_few, say
from rlhf.base.wandb_login import check_online
from rlhf.config import keys
from rlhf.config.choices import Device, WandbMode
from rlhf.config.loading import load_config, save_config
from rlhf.config.schema import Config
from rlhf.config.stage_graph import (
    function_sources,
    idle_keys,
    is_aligned,
    is_rl,
    parent_stages,
    unused_keys,
)
from rlhf.data.changed_files import changed_files, sizes_and_times
from rlhf.data.files import check_files
from rlhf.planning.memory import make_plan
from rlhf.planning.steps import too_large_batches
from rlhf.planning.summary import one_line_summary, print_plan
from rlhf.rehearsal import rehearse
from rlhf.reporting import tables
from rlhf.runs import early
from rlhf.runs.checks import check_home
from rlhf.runs.command import Command
from rlhf.runs.continuing import is_written_since, say_how_to_continue
from rlhf.runs.directory import (
    archive_attempt,
    check_file_types,
    check_resumable,
    config_for_stage,
    describe_environment,
    find_checkpoints,
    read_summary,
    write_json,
)
from rlhf.runs.gpus import SWEEP_BEGAN
from rlhf.runs.identity import (
    evaluation_settings,
    measured_otherwise,
    run_dir_for,
    settings_to_record,
)
from rlhf.runs.inputs import Inputs, find_inputs
from rlhf.runs.launch import check_machines, run_workers
from rlhf.runs.locks import LOCK_FILE, lock_run
from rlhf.runs.model_card import write_card
from rlhf.runs.run_files import DATA, ENVIRONMENT, PARENTS, RESULT, SUMMARY, read_file


def run_command(command: Command) -> list[Path]:
    """Run the chosen stages in order, but those that are finished. Returns: the run directories.

    Raises: UserError; WorkerError when a stage failed by a bug; KeyboardInterrupt after Ctrl-C.
    """
    raise_at_interrupt()
    cfg = command.cfg
    for line in name_unused_keys(command):
        say(line)
    if cfg.plan:
        plan_stages(cfg)
        return []
    if cfg.deploy.node_rank:
        for stage in cfg.stage.runs:
            if stage != "inspect":
                help_first_node(command, stage)
        return []
    started = time.time()
    done = []
    with early.none_left():
        check_before_training(command)
        for stage in cfg.stage.runs:
            with say_how_to_continue(command, stage, started):
                if stage == "inspect":
                    inspect_data(command)
                else:
                    is_parent = stage != cfg.stage.runs[-1]
                    done.append(run_stage(command, stage, is_parent))
    if done:
        tables.print_runs(done, time.time() - started)
    return done


def check_before_training(command: Command) -> None:
    """Check what would stop this command later: files of data, W&B, and what later stages need.

    Raises: UserError.
    """
    cfg, stages = command.cfg, to_train(command)
    check_home()
    reads_data = stages or "inspect" in cfg.stage.runs
    if reads_data and (problems := check_files(cfg.data)):
        raise UserError("\n".join(problems))
    if problems := too_large_batches(cfg, stages[1:]):  # the first stage says it at its start
        raise UserError("\n".join(problems))
    if stages and cfg.wandb.mode == WandbMode.online:
        check_online()
    rehearse(command, stages)


def to_train(command: Command) -> list[str]:
    """The stages of a command that are not finished."""
    cfg = command.cfg
    return [
        stage
        for stage in cfg.stage.runs
        if stage != "inspect"
        and (
            trains_anew(command, directory := run_dir_for(command, stage))
            or not read_summary(directory)
        )
    ]


def trains_anew(command: Command, directory: Path) -> bool:
    """Whether a finished run is trained again: with fresh=true, but for one that another job of
    the same sweep has just trained."""
    began = os.environ.get(SWEEP_BEGAN)
    if began and is_written_since(directory / SUMMARY, float(began)):
        return False
    return command.cfg.fresh


def name_unused_keys(command: Command) -> list[str]:
    """Values set by hand that this algorithm, or these settings, do not read, a line each."""
    cfg = command.cfg
    unused = idle_keys(cfg, cfg.stage.runs)
    if any(map(is_rl, cfg.stage.runs)):
        unused |= dict.fromkeys(unused_keys(cfg), f"rl.advantage={cfg.rl.advantage.name}")
    now, plain = dict(keys.values(command.cfg)), dict(keys.values(command.baseline))
    changed = [key for key, value in now.items() if plain.get(key) != value]
    return [
        f"{key}={now[key]}: not used by {reason}"
        for key in changed
        for node, reason in unused.items()
        if key == node or key.startswith(f"{node}.")
    ]


def plan_stages(cfg: Config) -> None:
    """Print the plan of each stage; the data may be on another machine.

    Raises: UserError when one does not fit into memory.
    """
    plans = [make_plan(cfg, stage) for stage in cfg.stage.runs if stage != "inspect"]
    if "inspect" in cfg.stage.runs:
        print("inspect: loads no model and needs no GPU: it fits")
    for plan in plans:
        print_plan(plan, cfg)
    if too_large := [plan.stage for plan in plans if not plan.fits]:
        raise UserError(f"{', '.join(too_large)} would not fit into memory, see above")


def run_stage(command: Command, stage: str, is_parent: bool) -> Path:
    """Run one stage unless it is finished, from its last checkpoint where it has one.

    Args: is_parent: another stage of this command starts from it: where another process is training
        it, wait for that process.
    Returns: its directory.
    """
    # 1. what it starts from, and whether it is done
    for parent, given in parent_stages(command.cfg, stage).items():
        if not given:
            wait_until_finished(run_dir_for(command, parent))
    inputs = find_inputs(command, stage)
    directory = run_dir_for(command, stage)
    before = summary_bytes(directory)
    if not trains_anew(command, directory) and is_finished(command, stage, directory, inputs):
        return directory
    # 2. what it needs
    check_machines(command.cfg)
    for path in map(Path, inputs.paths.values()):
        if path.is_dir():  # else a hub id, or a file of prompts
            check_model(path)
    cfg = config_for_stage(command.cfg, stage, inputs.paths)
    early.prepare(cfg, stage, is_next=True)
    with contextlib.suppress(UserError, OSError):  # no formula for this model: no plan
        say(one_line_summary(make_plan(cfg, stage)))
    # 3. the run itself
    with lock_run(directory, wait=is_parent):
        # the process that we waited for has trained it, or has begun to
        if summary_bytes(directory) != before and is_finished(command, stage, directory, inputs):
            return directory
        prepare_directory(command, stage, inputs, directory)
        save_config(cfg, directory / "config.yaml")
        environment = describe_start(command) | describe_environment()
        data_files = sizes_and_times(cfg.data)
        write_json(directory / PARENTS, inputs.ids)
        write_json(directory / ENVIRONMENT, environment)
        asked_to_stop = run_workers(directory, cfg, next_to_run(command, stage))
        known = {"parents": inputs.ids, "data_files": data_files}
        finish(command, stage, cfg, directory, known, environment)
    if asked_to_stop:
        raise KeyboardInterrupt
    return directory


def summary_bytes(directory: Path) -> bytes | None:
    """The summary as it is, also a damaged one; None where there is none."""
    with contextlib.suppress(OSError):
        return (directory / SUMMARY).read_bytes()
    return None


def next_to_run(command: Command, stage: str) -> str | None:
    """The stage that this command trains after `stage`, where there is one."""
    runs = command.cfg.stage.runs
    after = runs[runs.index(stage) + 1 :]
    return next((one for one in to_train(command) if one in after), None)


def prepare_directory(command: Command, stage: str, inputs: Inputs, directory: Path) -> None:
    """Keep the checkpoints that the run resumes from, or move an earlier attempt aside."""
    check_file_types(directory)
    intact, _ = find_checkpoints(directory)
    if intact and not command.cfg.fresh and not read_summary(directory):
        cfg = command.for_stage(stage).cfg
        functions = {f"rewards/{name}" for name in function_sources(cfg, stage)}
        for line in check_resumable(directory, intact[0][1], command.cfg, inputs.ids, functions):
            say(f"{stage}: {line}")
        for line in name_other_evaluation(command, stage, directory):
            say(line)
        for left in ("result.json", "stop", *(p.name for p in directory.glob("error-rank*.txt"))):
            remove(directory / left)
    elif archived := archive_attempt(directory):
        say(f"{stage}: an earlier attempt is kept in {archived}")
    say(f"{stage}: {directory}")


def name_other_evaluation(command: Command, stage: str, directory: Path) -> list[str]:
    """Where a run that resumes has been evaluated before training with other settings: a line."""
    if not is_aligned(stage):  # SFT and reward model are evaluated at the end only
        return []
    with contextlib.suppress(UserError, OSError):
        began = evaluation_settings(load_config(directory / "config.yaml"), stage)
        if measured := measured_otherwise(began, command.for_stage(stage).cfg, stage):
            return [
                f"{stage}: the evaluation before training was with {measured}; those that come are "
                "with the settings of this command"
            ]
    return []


def finish(
    command: Command,
    stage: str,
    cfg: Config,
    directory: Path,
    known: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """Write the summary and the model card of a run whose workers are done.

    Args: known, environment: what it was started with; a run of days does not depend on its
        parents.json and env.json at its end.
    """
    try:
        data = read_file(directory, DATA) or []
    except UserError as error:
        say(f"{stage}: {error}")
        data = []
    summary = {
        "id": secrets.token_hex(8),
        "stage": stage,
        "status": "finished",
        **known,
        **read_file(directory, RESULT),
        "finished": local_time(),
        "data": data,
        "settings": settings_to_record(command, stage),
        "versions": environment["packages"] | {"git": environment["git"]},
    }
    if (directory / "model").exists():
        write_card(directory, cfg, summary)
    write_json(directory / SUMMARY, summary)  # last: it means finished
    if not cfg.checkpoint.keep_optimizer:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def describe_start(command: Command) -> dict[str, str]:
    """For env.json: the command that resumes a run, its folder, and when it last started."""
    return {"command": command.to_continue(), "folder": str(Path.cwd()), "started": local_time()}


def local_time() -> str:
    """Now, for people."""
    return time.strftime("%Y-%m-%d %H:%M")


def wait_until_finished(directory: Path) -> None:
    """Wait while another process trains an unfinished run."""
    if directory.exists() and not read_summary(directory):
        with lock_run(directory, wait=True):
            pass


def is_finished(command: Command, stage: str, directory: Path, inputs: Inputs) -> bool:
    """Whether a run is done. Raises: UserError when its parent runs have changed."""
    summary = read_summary(directory)
    if summary is None:
        return False
    old = summary.get("parents", {})
    if old != inputs.ids:
        changed = [name for name in {**old, **inputs.ids} if old.get(name) != inputs.ids.get(name)]
        raise UserError(
            f"{directory} was trained from other runs or files than there are now (changed: "
            f"{', '.join(changed)}): add fresh=true to train it again; the old one is kept in its "
            "attempts/"
        )
    say(f"{stage}: finished, {directory}")
    cfg = command.for_stage(stage).cfg
    before = summary.get("data_files")
    if before is not None and (changed := changed_files(before, cfg.data)):
        say(
            f"{stage}: not trained on what is in {first_few(changed)} now (another size or time): "
            "fresh=true trains it again"
        )
    if stage == "eval" and cfg.eval.save_responses:
        key = f"eval.save_responses={cfg.eval.save_responses}"
        say(f"{key}: nothing is written, as the evaluation is finished; fresh=true measures again")
    if measured := measured_otherwise(summary.get("settings", {}), cfg, stage):
        fix = "stage=eval measures it again, fresh=true trains it again"
        say(f"{stage}: it was evaluated with {measured}; {fix}")
    return True


def inspect_data(command: Command) -> None:
    """Look at the data, print the result and where the page is.

    It runs each time, as files may have changed. It takes one process and no GPU, whatever `deploy`
    is.
    """
    directory = run_dir_for(command, "inspect")
    cfg = config_for_stage(command.cfg, "inspect", {})
    cfg.deploy = dataclasses.replace(
        cfg.deploy,
        device=Device.cpu,
        processes_per_node=1,
        nodes=1,
        hostfile=None,
        node_rank=None,
        master=None,
    )
    with lock_run(directory):
        for path in directory.iterdir():
            if path.name != LOCK_FILE:
                remove(path)
        save_config(cfg, directory / "config.yaml")
        run_workers(directory, cfg)
        result = read_file(directory, RESULT)
    tables.print_inspection(result["metrics"], directory / "report.html")


def help_first_node(command: Command, stage: str) -> None:
    """Do another node's part in a stage: start its workers, which meet those of node 0.

    They read the files of node 0.
    """
    cfg, directory = command.cfg, run_dir_for(command, stage)
    if not cfg.fresh and read_summary(directory):
        return
    check_machines(cfg)
    say(f"{stage}: node {cfg.deploy.node_rank} of {cfg.deploy.nodes}, {directory}")
    run_workers(directory, config_for_stage(cfg, stage, {}))

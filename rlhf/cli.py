"""What `python train.py` does: compose and check the configuration, find what is done already, run the rest. No torch here."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path

import hydra
from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config.keys import is_known, with_suggestion
from rlhf.config.loading import register_schema, save_config, to_typed
from rlhf.config.schema import ALIGNMENT, Config, Device, Stage
from rlhf.config.stage_graph import parent_stages
from rlhf.config.validation import check_config
from rlhf.planning.memory import make_plan
from rlhf.planning.summary import one_line_summary, print_plan
from rlhf.reporting import tables
from rlhf.runs.directory import (
    archive_attempt,
    check_resumable,
    config_for_stage,
    describe_environment,
    find_checkpoints,
    read_summary,
    write_json,
)
from rlhf.runs.history import find_runs
from rlhf.runs.identity import run_dir_for, run_identity
from rlhf.runs.inputs import check_models, find_inputs
from rlhf.runs.launch import SWEEP_LOG, check_machines, end_with_parent, run_workers
from rlhf.runs.locks import LOCK_FILE, lock_run
from rlhf.runs.model_card import write_card

CONF = Path(__file__).parents[1] / "conf"
# model and online are drawn in by others: a model is chosen as actor or as reward
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()} - {"hydra", "model", "online"}

SWEEP_PROCESS = "RLHF_SWEEP_PROCESS"  # the process that started the sweep
single_error: list[Exception] = []  # of a command that is no sweep


def main() -> int:
    """Run the command line; returns the exit code: 0 done, 1 a run failed, 2 the command was wrong, 130 interrupted."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us, who print one line
    args = get_args_parser().parse_args()
    try:
        if "RANK" in os.environ:
            raise ValueError(
                "start python train.py itself, without torchrun or deepspeed: it starts its workers, deploy.gpus=N of them"
            )
        register_schema()
        problems = [line for arg in args.overrides for line in explain_override(arg)]
        if problems and not args.shell_completion:
            raise ValueError("\n".join(problems))
        if args.multirun:
            if any(arg.startswith("deploy.node_rank=") for arg in args.overrides):
                raise ValueError(
                    "-m with deploy.node_rank: the nodes would lose each other after a job that fails; use deploy.hostfile"
                )
            check_sweep(args.overrides)
            begin_sweep(args.overrides)
        run_command()
        if single_error:
            raise single_error[0]
    except KeyboardInterrupt:
        say(
            "stopped; the same command goes on from the last checkpoint, or starts the unfinished stage anew where there is none"
        )
        return 130
    except RuntimeError as error:
        if not jobs_of_sweep():
            say(f"error: {error}")
            return 1
    except AssertionError as error:
        if "Unexpected type for root" not in str(error):
            raise
        inside = [
            arg
            for arg in args.overrides
            if arg.split("=")[0].lstrip("+").rsplit(".", 1)[0].endswith(("data.sandbox", ".arch"))
        ]
        say(
            f"error: {', '.join(inside)}: is null here, nothing can be set in it (data.sandbox.* is there with data=sandbox only)"
        )
        return 2
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        if not jobs_of_sweep():
            for line in one_line_each(error):
                say(f"error: {line}")
            return 2
    jobs = jobs_of_sweep()
    for folder in sorted({Path(job["folder"]) for job in jobs}):
        try:
            from rlhf.reporting.report_page import write_page

            found = find_runs([folder])
            page = write_page(found, folder / "report.html", f"Sweep {folder.name}")
            tables.print_comparison(found, page)
        except Exception as error:  # the runs themselves are done
            say(f"error: no report of {folder}: {type(error).__name__}: {one_line_each(error)[0]}")
    for job in jobs:
        if job["error"]:
            say(f"failed: {job['job']}: {job['error']}")
    return 1 if any(job["error"] for job in jobs) else 0


def begin_sweep(overrides: list[str]) -> None:
    """Make ready for jobs that may be processes of their own, on other machines too: where they say how they ended; and leave a first
    Ctrl-C to jobs side by side, which hear it as well and save (joblib would kill them)."""
    root = next(
        (arg.removeprefix("root=") for arg in overrides if arg.startswith("root=")),
        os.environ.get("RLHF_ROOT", "."),
    )
    log = Path(root).expanduser().resolve() / "multirun" / f".sweep-{secrets.token_hex(4)}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    atexit.register(log.unlink, missing_ok=True)
    os.environ[SWEEP_LOG] = str(log)
    os.environ[SWEEP_PROCESS] = str(os.getpid())
    if any(arg.startswith("hydra/launcher=") for arg in overrides):

        def leave_to_the_jobs(*_: object) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)

        signal.signal(signal.SIGINT, leave_to_the_jobs)


def jobs_of_sweep() -> list[dict[str, str]]:
    """How the jobs of this sweep have ended so far, in order of their ends; none where it is no sweep."""
    log = os.environ.get(SWEEP_LOG)
    return [json.loads(line) for line in Path(log).read_text().splitlines()] if log else []


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------- errors


def explain_override(arg: str) -> list[str]:
    """What is wrong with one override, as lines that name the nearest right word; empty when nothing is, or Hydra knows better."""
    try:
        override = OverridesParser.create().parse_override(arg)
    except HydraException:
        return [
            f"cannot read {arg!r}: overrides look like key=value; quote values with spaces, commas or brackets: 'data=[a,b]'"
        ]
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return []
    if key in GROUPS or key == "pipeline":
        if override.is_sweep_override():
            chosen = [str(value) for value in override.sweep_string_iterator()]
        else:
            value = override.value()
            chosen = (
                [str(v) for v in value]
                if isinstance(value, list)
                else [str(value)]
                if value is not None
                else []
            )
        options = (
            sorted(path.stem for path in (CONF / key).iterdir())
            if key in GROUPS
            else [stage.name for stage in ALIGNMENT]
        )
        return [
            f"{key}={c}: no such option; choose from {', '.join(options)}"
            for c in chosen
            if c.removesuffix(".yaml") not in options
        ]
    if not is_known(key):
        return [f"unknown key {with_suggestion(key)}"]
    return []


def one_line_each(error: Exception) -> list[str]:
    """An exception as lines for the user: ours as they are, Hydra's and OmegaConf's folded into one."""
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
        kept = [
            line
            for line in lines
            if line
            and not line.startswith(("reference_type", "object_type", "full_key", "To append"))
        ]
        return ["; ".join(dict.fromkeys(kept))]
    return str(error).splitlines() or [repr(error)]


def check_sweep(overrides: list[str]) -> None:
    """Check every job of a sweep before the first one starts. Raises ValueError with all problems."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = [arg for arg in overrides if arg.split("=")[0] == "sweep"]
        params = compose("config", chosen, return_hydra_config=True).hydra.sweeper.params or {}
        swept = [f"{key}={value}" for key, value in params.items()] + overrides
        problems: dict[str, None] = {}
        for job in BasicSweeper.split_arguments(
            OverridesParser.create().parse_overrides(swept), None
        )[0]:
            cfg = typed(compose("config", job))
            problems |= dict.fromkeys(check_config(cfg) + check_models(cfg))
    if problems:
        raise ValueError("\n".join(problems))


# ------------------------------------------------------------------------------------------------------------------------- runs


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_command(composed: DictConfig) -> None:
    """One command, or one job of a sweep."""
    is_sweep = HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN
    overrides = list(HydraConfig.get().overrides.task)
    job = " ".join(overrides)
    if not is_sweep:
        try:
            run_stages(composed, overrides)
        except Exception as error:  # raised again in main(): Hydra would print a line of its own
            single_error.append(error)
        return
    say(f"\n--- job {HydraConfig.get().job.num + 1}: {job}")
    if os.environ[SWEEP_PROCESS] != str(
        os.getpid()
    ):  # side by side: a job stops, and saves, when the sweep is gone
        end_with_parent()
    folder = Path(composed.root).expanduser() / "multirun" / composed.exp

    def ended(error: str = "") -> None:
        with open(os.environ[SWEEP_LOG], "a") as log:
            log.write(
                json.dumps({"job": job, "folder": str(folder.resolve()), "error": error}) + "\n"
            )

    try:
        _, paths = run_stages(composed, overrides)
    except Exception as error:
        line = one_line_each(error)[0]
        say(f"error: {line}")
        collect(folder, overrides, None, line)
        ended(line)
        raise
    if paths:
        collect(folder, overrides, paths[-1])
        ended()


def run_stages(composed: DictConfig, overrides: list[str]) -> tuple[Config, list[Path]]:
    """Run the chosen stages in order, but those that are finished; returns the configuration and the run directories."""
    cfg = typed(composed)
    problems = check_config(cfg) + check_models(cfg)
    if problems:
        raise ValueError("\n".join(problems))
    choices = [arg for arg in overrides if arg.lstrip("+~").split("=")[0] in {*GROUPS, "pipeline"}]
    usual = (
        composed if choices == overrides else compose("config", choices)
    )  # composing takes half a second
    for key in OmegaConf.missing_keys(usual):  # what only the user can give: the file of data=jsonl
        OmegaConf.update(usual, key, OmegaConf.select(composed, key))
    baseline = to_typed(usual)
    for model, before in ((cfg.actor, baseline.actor), (cfg.reward, baseline.reward)):
        if model.path != before.path and model.arch == before.arch:
            model.arch = None  # the numbers are those of another model
    if cfg.plan:
        plans = [make_plan(cfg, stage) for stage in cfg.stage.runs if stage != Stage.inspect]
        if Stage.inspect in cfg.stage.runs:
            print("inspect: loads no model and needs no GPU: it fits")
        for each in plans:
            print_plan(each, cfg)
        if not all(each.fits for each in plans):
            raise ValueError(
                f"{', '.join(each.stage for each in plans if not each.fits)} would not fit into memory, see above"
            )
        return cfg, []
    if cfg.deploy.node_rank:
        for stage in cfg.stage.runs:
            if stage != Stage.inspect:
                help_node_0(cfg, stage, baseline)
        return cfg, []
    started = time.time()
    done = []
    for stage in cfg.stage.runs:
        if stage == Stage.inspect:
            inspect_data(cfg, baseline)
        else:
            done.append(
                run_stage(cfg, stage, baseline, overrides, upstream=stage != cfg.stage.runs[-1])
            )
    if done:
        tables.print_runs(done, time.time() - started)
    return cfg, done


def typed(composed: DictConfig) -> Config:
    """The configuration, with those stages only that the last one needs: a pipeline with pipeline=dpo trains no reward model."""
    cfg = to_typed(composed)
    last = cfg.stage.runs[-1]
    cfg.stage.runs = [
        stage for stage in cfg.stage.runs if stage == last or needed(cfg, stage, last)
    ]
    return cfg


def needed(cfg: Config, stage: Stage, last: Stage) -> bool:
    """Whether a pipeline that ends with `last` needs the result of `stage`."""
    return any(
        parent == stage or needed(cfg, stage, parent)
        for parent, given in parent_stages(cfg, last).items()
        if not given
    )


def run_stage(
    cfg: Config, stage: Stage, baseline: Config, overrides: list[str], upstream: bool
) -> Path:
    """Run one stage unless it is finished, from its last checkpoint where it has one; returns its directory.

    Args: upstream: another stage of this command stands on it: where another process trains it, that is waited for.
    """
    for parent, given in parent_stages(cfg, stage).items():
        if given:
            continue
        wait_for(run_dir_for(cfg, parent, baseline))
    inputs, parents = find_inputs(cfg, stage, baseline, overrides)
    directory = run_dir_for(cfg, stage, baseline)
    before = read_summary(directory)
    if not cfg.fresh and finished(stage, directory, parents):
        return directory
    check_machines(cfg)
    own = config_for_stage(cfg, stage, inputs)
    with contextlib.suppress(
        ValueError, OSError
    ):  # no formula for this model: it trains without a plan
        say(one_line_summary(make_plan(own, stage)))
    with lock_run(directory, wait=upstream):
        if read_summary(directory) != before:  # by the process that was waited for
            finished(stage, directory, parents)
            return directory
        whole, _ = find_checkpoints(directory)
        if whole and not before and not cfg.fresh:
            for line in check_resumable(directory, whole[0][1], cfg, parents):
                say(f"{stage.name}: {line}")
            for left in (
                directory / "result.json",
                directory / "stop",
                *directory.glob("error-rank*.txt"),
            ):
                left.unlink(missing_ok=True)
        elif aside := archive_attempt(directory):
            say(f"{stage.name}: an earlier attempt is kept in {aside}")
        say(f"{stage.name}: {directory}")
        save_config(own, directory / "config.yaml")
        write_json(directory / "parents.json", parents)
        environment = describe_environment()
        write_json(directory / "env.json", environment)
        asked_to_stop = run_workers(directory, own)
        result = json.loads((directory / "result.json").read_text())
        result["data"] = json.loads((directory / "data.json").read_text())
        result |= {
            "settings": run_identity(cfg, stage),
            "versions": environment["packages"] | {"git": environment["git"]},
        }
        summary = {
            "id": secrets.token_hex(8),
            "stage": stage.name,
            "status": "finished",
            "parents": parents,
            **result,
        }
        if (directory / "model").exists():
            write_card(directory, own, summary)
        write_json(directory / "summary.json", summary)  # last: it means finished
        if not cfg.checkpoint.keep_optimizer:
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    if asked_to_stop:
        raise KeyboardInterrupt
    return directory


def wait_for(directory: Path) -> None:
    """Until no other process trains a run that is not finished."""
    if directory.exists() and not read_summary(directory):
        with lock_run(directory, wait=True):
            pass


def finished(stage: Stage, directory: Path, parents: dict[str, str]) -> bool:
    """Whether a run is done. Raises: RuntimeError when it stands on other runs than there are now."""
    summary = read_summary(directory)
    if summary:
        if summary["parents"] != parents:
            raise RuntimeError(
                f"{directory} stands on other runs than there are now ({summary['parents']} -> {parents}): "
                "add fresh=true to train it anew; the old one is kept in its attempts/"
            )
        say(f"{stage.name}: finished, {directory}")
    return bool(summary)


def inspect_data(cfg: Config, baseline: Config) -> None:
    """Look at the data, print what was found and where the page lies. Anew each time, as files may have changed; in one process
    without a GPU, whatever `deploy` says."""
    directory = run_dir_for(cfg, Stage.inspect, baseline)
    own = config_for_stage(cfg, Stage.inspect, {})
    own.deploy = dataclasses.replace(
        own.deploy, device=Device.cpu, gpus=1, nodes=1, hostfile=None, node_rank=None, master=None
    )
    with lock_run(directory):
        for path in directory.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()
        save_config(own, directory / "config.yaml")
        run_workers(directory, own)
        result = json.loads((directory / "result.json").read_text())
    tables.print_inspection(result["metrics"], directory / "report.html")


def help_node_0(cfg: Config, stage: Stage, baseline: Config) -> None:
    """Another node's part in a stage: its workers. They wait for those of node 0, and then read what it has written."""
    directory = run_dir_for(cfg, stage, baseline)
    if read_summary(directory) and not cfg.fresh:
        return
    check_machines(cfg)
    say(f"{stage.name}: node {cfg.deploy.node_rank} of {cfg.deploy.nodes}, {directory}")
    run_workers(directory, config_for_stage(cfg, stage, {}))


def collect(folder: Path, overrides: list[str], run: Path | None, error: str = "") -> None:
    """A job's own folder below that of its sweep: copies of what its last stage wrote and a link to the run; or why it failed."""
    name = (
        re.sub(
            r"[^A-Za-z0-9._+-]+", "-", "+".join(sorted(arg.replace("=", "-") for arg in overrides))
        )[:100]
        or "default"
    )
    name += (
        "-" + hashlib.sha256(" ".join(sorted(overrides)).encode()).hexdigest()[:8]
    )  # tells cut names apart
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "overrides.txt").write_text("\n".join(overrides) + "\n")
    (folder / "error.txt").unlink(missing_ok=True)
    if run is None:
        (folder / "error.txt").write_text(error + "\n")
        return
    for file in ("config.yaml", "summary.json", "metrics.jsonl", "curves.png"):
        if (run / file).exists():
            shutil.copyfile(run / file, folder / file)
    link = folder / "run"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(run, folder))

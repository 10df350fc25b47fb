"""What `python train.py` does: understand the command line, run it, end with the right exit code.

No torch here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf import arguments, compose, help, run, sweep
from rlhf.base.errors import UserError, machine_problem
from rlhf.base.interrupts import DONE, FAILED, WRONG, interrupted
from rlhf.base.log import cut, plural, say
from rlhf.base.streams import cannot_write
from rlhf.config.keys import find_key
from rlhf.config.presets import CONF
from rlhf.runs import early
from rlhf.runs.failures import WorkerError

MOST_OF_NAME = 300  # characters of a file's name in a message
DEFAULT_NAME = "default"  # experiment_name in conf/config.yaml
# What stopped this command (not a sweep). It is raised again outside Hydra, which would add a line.
stopped_by: list[Exception] = []
HYDRA_FLAGS = ("--hydra-help", "--version", "--resolve", "--run", "-r", "--experimental-rerun")


def main() -> int:
    """Run the command line; returns the exit code: 0 done, 1 a run failed, 2 the command was wrong.

    A bug of ours keeps its traceback. Raises: KeyboardInterrupt with a line for the user.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us
    try:
        return dispatch_interruptible(sys.argv[1:])
    except WorkerError as error:
        say(f"error: {error}")
        return FAILED
    except AssertionError as error:
        inside = arguments.inside_optional(sys.argv[1:])
        if not inside or "Unexpected type for root" not in str(error):  # OmegaConf's, of null
            raise
        say(
            f"error: {', '.join(inside)}: its node is null here and has no keys; remove it, or "
            "choose an option that has this node (data.sandbox.*: data=sandbox, "
            "data.arithmetic.*: data=arithmetic)"
        )
        return WRONG
    except YAMLError as error:
        say(f"error: cannot read an option file: {' '.join(str(error).split())}")
        return WRONG
    except OSError as error:
        problem = machine_problem(error)
        if problem is None and error.filename:
            problem = f"{cut(str(error.filename), MOST_OF_NAME)}: {error.strerror}"
        if problem is None or cannot_write("\n"):
            raise
        say(f"error: {problem}")
        return FAILED
    except (UserError, HydraException, OmegaConfBaseException) as error:
        for line in lines_of(error):
            say(f"error: {line}")
        return WRONG


def dispatch_interruptible(argv: Sequence[str]) -> int:
    """dispatch, with one way to end after Ctrl-C. Raises: KeyboardInterrupt with a line; and as
    dispatch."""
    again = "Interrupted. The same command continues: finished stages are not trained again."
    try:
        return dispatch(argv)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(str(interrupt) or again) from None
    except Exception:
        if interrupted():
            raise KeyboardInterrupt(again) from None
        raise


def dispatch(argv: Sequence[str]) -> int:
    """Understand the command line and run it. Raises: UserError when it is wrong."""
    argv = [word for arg in argv for word in split_help(arg)]
    args, flags = parser().parse_known_intermixed_args(argv)
    # Hydra's own parser takes overrides only behind the options
    argv = [arg for arg in argv if arg not in args.overrides] + args.overrides
    if "RANK" in os.environ:
        raise UserError(
            "start python train.py itself, without torchrun or deepspeed: it starts its workers, "
            "deploy.processes_per_node=N of them (where a container sets RANK: env -u RANK python "
            "train.py ...)"
        )
    if args.shell_completion and (shell := query_of(args.overrides)):
        return print_completions(shell)
    folders = arguments.user_folders(args.config_dir, args.overrides)
    compose.register(folders)
    if args.help:
        return print_help(args.overrides, folders)
    problems = [line for flag in flags for line in explain_flag(flag)]
    problems += [line for arg in args.overrides for line in arguments.explain(arg, args.multirun)]
    if problems and not args.shell_completion:
        raise UserError("\n".join(problems))
    overrides = [arguments.allow_user_names(arg) for arg in args.overrides]
    if args.multirun:
        overrides = arguments.one_for_each_key(overrides)
    sys.argv[1:] = [arg for arg in argv if arg not in args.overrides] + overrides  # Hydra reads it
    if args.multirun:
        if looked := [f"--{name}" for name in ("cfg", "info") if getattr(args, name)]:
            raise UserError(
                f"{looked[0]} with -m: leave one out; plan=true shows what jobs would do"
            )
        with_flags = any((args.package, args.config_name, args.config_path, *flags))
        return run_sweep(overrides, folders, with_flags)
    with early.none_left():
        if will_train(args):
            early.begin()
        run_hydra()
    if stopped_by:
        raise stopped_by[0]
    return DONE


def will_train(args: argparse.Namespace) -> bool:
    """Whether a command may start a worker, as far as its words show."""
    only_prints = args.cfg or args.c or args.info or args.shell_completion
    return not only_prints and not {"plan=true", "stage=inspect"} & set(args.overrides)


def parser() -> argparse.ArgumentParser:
    """What we need to know of Hydra's own command line, which it reads after us."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("overrides", nargs="*")
    options.add_argument("--help", "-h", action="store_true")
    options.add_argument("--multirun", "-m", action="store_true")
    options.add_argument("--shell-completion", "-sc", action="store_true")
    options.add_argument("--config-dir", "-cd")
    for with_value in ("--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-path"):
        options.add_argument(with_value)
    options.add_argument("--info", "-i", nargs="?", const="all")
    return options


def split_help(arg: str) -> list[str]:
    """--help=KEY as it is understood: --help KEY."""
    return ["--help", arg.removeprefix("--help=")] if arg.startswith("--help=") else [arg]


def explain_flag(flag: str) -> list[str]:
    """What is wrong with a flag that is neither ours nor Hydra's: most are keys with dashes."""
    name, _, value = flag.lstrip("-").partition("=")
    if flag.partition("=")[0] in HYDRA_FLAGS:
        return []
    if name in arguments.group_names() or find_key(name):
        return [f"{flag}: keys have no dashes: {name}={value or 'VALUE'}"]
    return [f"{flag}: no such flag; keys have no dashes, as in stage=ppo (python train.py --help)"]


def query_of(overrides: Sequence[str]) -> str | None:
    """The shell that asks what a word can become; None where its completion is (un)installed."""
    return next((a.removeprefix("query=") for a in overrides if a.startswith("query=")), None)


def print_completions(shell: str) -> int:
    """What tab completion offers for COMP_LINE. Hydra's own writes KlController.fixed for fixed."""
    line = os.environ["COMP_LINE"][: int(os.environ.get("COMP_POINT") or 10**6)]
    words = line.split(" ")
    named = [b for a, b in zip(words, words[1:]) if a in ("--config-dir", "-cd")]
    folders: list[Path] = []
    with contextlib.suppress(UserError):  # a folder that is not there, which the command will say
        folders = arguments.user_folders(next(iter(named), None), words[:-1])
    compose.register(folders)
    print(("\n" if shell == "fish" else " ").join(help.complete(line, folders)))
    return DONE


def print_help(overrides: Sequence[str], folders: Sequence[Path]) -> int:
    """--help, or --help KEY ... with the values that the other overrides give."""
    names = [arg for arg in overrides if "=" not in arg]
    if not names:
        print(help.overview())
        return DONE
    given = [arguments.allow_user_names(arg) for arg in overrides if "=" in arg]
    cfg = compose.compose_alone(given, folders)
    print("\n\n".join(help.describe(name, cfg) for name in names))
    return DONE


def run_sweep(overrides: Sequence[str], folders: Sequence[Path], with_flags: bool) -> int:
    """Run all jobs of a sweep; a job that fails does not stop the others.

    Args: with_flags: the command line has flags of Hydra, which then runs the jobs itself.
    Returns: the exit code.
    """
    if any(arg.startswith("deploy.node_rank=") for arg in overrides):
        raise UserError(
            "-m with deploy.node_rank: after a failed job the nodes would wait for each other; "
            "use deploy.hostfile"
        )
    jobs = sweep.read_sweep(overrides, folders)
    say(f"sweep of {plural(len(jobs.jobs), 'job')}: checking them")
    named = []
    if sweep.check_jobs(jobs.jobs, folders) == {DEFAULT_NAME}:
        named = [f"experiment_name={jobs.name}"]
    sweep.begin(overrides, jobs, folders)
    try:
        if jobs.is_plain and not with_flags:
            sweep.run_jobs([job + named for job in jobs.jobs])
        else:
            say("Hydra composes all jobs again before its launcher starts the first one ...")
            sys.argv = [arg for arg in sys.argv if arg not in overrides] + jobs.overrides + named
            run_hydra()
    except (RuntimeError, UserError, HydraException, OmegaConfBaseException):
        if interrupted() or not sweep.ended_jobs():  # else the failed job has said why
            raise
    return FAILED if sweep.report() else DONE


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run_hydra(composed: DictConfig) -> None:
    """One command, or one job of a sweep."""
    # as typed: ${...} in them is not Hydra's to resolve
    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    if HydraConfig.get().mode == hydra.types.RunMode.MULTIRUN:
        sweep.run_job(composed, overrides, HydraConfig.get().job.num + 1)
        return
    try:
        run.run_command(compose.make_command(composed, overrides))
    except Exception as error:
        stopped_by.append(error)


def lines_of(error: Exception) -> list[str]:
    """An exception as lines for the user: ours as they are, Hydra's folded into one."""
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return str(error).splitlines() or [repr(error)]
    lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines()]
    key = getattr(error, "full_key", None)
    if key and lines and key not in lines[0]:
        lines[0] = f"{key}: {lines[0]}"
    noise = ("reference_type", "object_type", "full_key", "To append", "Config search", "provider=")
    return ["; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))]

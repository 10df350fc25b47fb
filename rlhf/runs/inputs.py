"""The trained models that a stage starts from: where they are, and how to make those that are
missing. No torch here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.base.adapter_files import (
    BASE_KEY,
    adapter_settings,
    is_adapter,
)
from rlhf.base.checksums import hash_file
from rlhf.base.commands import override_text
from rlhf.base.errors import UserError
from rlhf.base.locations import is_directory, model_directory
from rlhf.config.schema import Config
from rlhf.config.stage_graph import (
    BASE,
    is_aligned,
    is_rl,
    is_stage_name,
    parent_stages,
    score_sources,
)
from rlhf.runs.checks import function_file, prompt_file
from rlhf.runs.command import Command
from rlhf.runs.directory import read_summary
from rlhf.runs.identity import run_dir_for
from rlhf.runs.run_files import SUMMARY


@dataclass
class Inputs:
    """What a stage starts from, by parent stage, rewards/NAME, policies/N and prompts/N."""

    paths: dict[str, str] = field(default_factory=dict)  # directories, files or hub ids
    ids: dict[str, str] = field(default_factory=dict)  # of the runs, or of the content

    def add_model(self, name: str, path: str) -> None:
        self.paths[name] = str(model_directory(path).resolve()) if is_directory(path) else path
        self.ids[name] = content_id(path)

    def add_file(self, name: str, file: Path) -> None:
        self.paths[name], self.ids[name] = str(file), hash_of_file(file)


def find_inputs(command: Command, stage: str) -> Inputs:
    """The trained models that `stage` starts from.

    Raises: UserError saying where it looked, and which commands make what is missing.
    """
    command = command.for_stage(stage)
    cfg, inputs = command.cfg, Inputs()
    for name, source in score_sources(cfg, stage).items():
        if source.path:
            inputs.add_model(f"rewards/{name}", source.path)
        elif source.function and (file := function_file(source.function)):
            inputs.ids[f"rewards/{name}"] = hash_of_file(file)  # another function, another run
        elif source.judge:
            inputs.ids[f"rewards/{name}"] = hash_of_file(Path(source.judge.rubric).expanduser())
            if stage == "eval" and source.judge.pair_rubric:
                pairs = Path(source.judge.pair_rubric).expanduser()
                inputs.ids[f"rewards/{name}/pairs"] = hash_of_file(pairs)
    if stage == "eval":
        for i, policy in enumerate(cfg.eval.policies):
            if policy != BASE and not is_stage_name(policy):
                inputs.add_model(f"policies/{i}", policy)
        for i, prompts in enumerate(cfg.eval.prompts):
            inputs.add_file(f"prompts/{i}", prompt_file(prompts))
    for parent, given in parent_stages(cfg, stage).items():
        if given:
            inputs.add_model(parent, given)
            continue
        directory = run_dir_for(command, parent)
        if summary := read_summary(directory):
            inputs.paths[parent] = str((directory / "model").resolve())
            inputs.ids[parent] = summary["id"]
    if missing := missing_runs(command, stage):
        raise UserError("\n".join(how_to_make(command, stage, missing)))
    return inputs


def missing_runs(command: Command, stage: str) -> dict[str, list[str]]:
    """The runs that a stage starts from and that are not there, also those below them.

    Returns: the stages that start from each; in the order in which they are trained.
    """
    command, missing = command.for_stage(stage), dict[str, list[str]]()
    for parent, given in parent_stages(command.cfg, stage).items():
        if not given and not read_summary(run_dir_for(command, parent)):
            for name, users in missing_runs(command, parent).items():
                missing[name] = list(dict.fromkeys([*missing.get(name, []), *users]))
            missing.setdefault(parent, []).append(stage)
    return missing


def how_to_make(command: Command, stage: str, missing: dict[str, list[str]]) -> list[str]:
    """Lines for the runs that are not there, with the commands that train them, in their order.

    Where one command does it all, it is in the last line. Args: missing: as `missing_runs`.
    """
    lines = [how_to_make_one(command, users, parent) for parent, users in missing.items()]
    ends = [stage] if is_aligned(stage) else [parent for parent in missing if is_aligned(parent)]
    if any(no_rows(command.cfg, parent) for parent in missing) or len(ends) != 1:
        return lines
    last = ends[0]
    trained = [*missing_runs(command, last), last]
    if len(trained) > 1 and {*missing} <= {*trained}:
        make = command.for_stage(last).to_train(*trained)
        lines.append(f"one command trains {', '.join(trained)}: {make}")
    return lines


def how_to_make_one(command: Command, users: list[str], parent: str) -> str:
    """The line for a run that is not there. Args: users: the stages that start from it."""
    what = "reward model" if parent == "rm" else "policy"
    needs = f"{' and '.join(users)} {'needs' if len(users) == 1 else 'need'} a trained {what}"
    line = f"{needs}: not in {run_dir_for(command, parent)}"
    instead = " and ".join(
        dict.fromkeys(how_to_do_without(command.cfg, stage, parent) for stage in users)
    )
    if no_rows(command.cfg, parent):
        shares = str(command.cfg.data.shares).replace(" ", "")
        return f"{line}, and data.shares={shares} leaves it no rows to train on; {instead}"
    line += f"; make it: {command.for_stage(parent).to_train(parent)}  or {instead}"
    if newest := newest_finished(run_dir_for(command, parent).parent, parent):
        line += f" (the newest {parent} run there, of other settings: {newest})"
    return line


def newest_finished(folder: Path, stage: str) -> Path | None:
    """The run of a stage in a folder that was finished last."""
    finished = {}
    for file in folder.glob(f"{stage}-*/{SUMMARY}"):
        with contextlib.suppress(OSError):  # it has just been deleted
            finished[file.parent] = file.stat().st_mtime
    return max(finished, key=lambda run: finished[run], default=None)


def how_to_do_without(cfg: Config, stage: str, parent: str) -> str:
    """What to do where `stage` shall not start from its parent run."""
    start = cfg.rl.actor or cfg.dpo.actor
    if stage == "eval" and parent == "sft" and start:
        policies = ",".join(start if name == "sft" else name for name in cfg.eval.policies)
        given = shlex.join([f"eval.policies=[{policies}]", f"eval.against={start}"])
        return f"compare with the model that training starts from: {given}"
    if stage == "eval" and parent == "rm":
        functions = {k: one.function for k, one in cfg.rl.rewards.items() if one and one.function}
        judges = [f"eval.rewards.{k}.function={override_text(f)}" for k, f in functions.items()]
        without = shlex.join(["eval.rewards.model=null", *judges])
        return f"judge with your functions: {without}" if judges else f"remove it with {without}"
    if stage == "eval":
        return "leave it out of eval.policies"
    node, key = "rl" if is_rl(stage) else stage, "reward" if parent == "rm" else "actor"
    return f"give {node}.{key}=<run, directory or hub id>"


def no_rows(cfg: Config, stage: str) -> bool:
    """Whether data.shares leaves a stage without rows, which is known before the data are read."""
    sft, rm, rl = cfg.data.shares
    if cfg.data.world:  # its sizes decide
        return False
    if stage == "sft":  # sources without pairs have no use for the share of the reward model
        return sft + rm == 0 and not any(one.sft_only for one in cfg.data.sources.values())
    return (rl if is_rl(stage) else rm) == 0


def content_id(path: str) -> str:
    """What distinguishes a trained model from another one at the same place later.

    The id of its run, else a hash of its weights' sizes and times; a hub id as it is. An adapter's
    has its configuration in it, and what distinguishes its base.
    """
    if not is_directory(path):
        return path
    directory = Path(path).expanduser()
    summary = read_summary(directory)
    if summary is None and directory.name == "model":
        summary = read_summary(directory.parent)
    if summary:
        return str(summary["id"])
    directory = model_directory(path)
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("*.bin")])
    weights: list[object] = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    if is_adapter(path):
        settings = adapter_settings(path)
        weights += [settings, content_id(settings[BASE_KEY])]
    return f"{path}:{hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16]}"


def hash_of_file(file: Path) -> str:
    return hash_file(file)[:16]

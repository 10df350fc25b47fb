"""The trained models that a stage starts from: where they are, and checks before anything is loaded. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rlhf.config.schema import ALIGNMENT, ONLINE, Config, Stage
from rlhf.config.stage_graph import (
    is_named,
    parent_stages,
    sources_of_score,
)
from rlhf.runs.directory import read_summary
from rlhf.runs.identity import run_dir_for, run_identity
from rlhf.runs.locations import ASSETS, BUILTIN, is_directory, model_directory

PROMPTS = ASSETS / "prompts"  # one prompt per line, of each language


def check_models(cfg: Config) -> list[str]:
    """What is wrong with the base models and given inputs of the stages to run, as lines for the user. Loads nothing."""
    runs = cfg.stage.runs
    policy, scorer = "ForCausalLM", "ForSequenceClassification"
    wanted: list[tuple[str, str | None, str]] = []
    reads_base = {Stage.sft, Stage.inspect}.intersection(runs) or (
        Stage.eval in runs and "base" in cfg.eval.policies
    )
    wanted += [("actor.path", cfg.actor.path, policy)] if reads_base else []
    wanted += [("reward.path", cfg.reward.path, "")] if Stage.rm in runs else []
    for stage in runs:
        node: Any = getattr(cfg, stage.name, None)
        wanted += [(f"{stage.name}.actor", node.actor, policy)] if stage in ALIGNMENT else []
        wanted += [(f"{stage.name}.reward", node.reward, scorer)] if stage in ONLINE else []
        wanted += [
            (f"{stage.name}.rewards.{name}.path", s.path, scorer)
            for name, s in sources_of_score(cfg, stage).items()
        ]
        wanted += [
            ("eval.policies", path, policy)
            for path in cfg.eval.policies
            if stage == Stage.eval and not is_named(path)
        ]
    files = {name: prompt_file(name) for name in (cfg.eval.prompts if Stage.eval in runs else [])}
    unknown = [name for name, file in files.items() if not file.is_file()]
    problems = [
        f"eval.prompts: {name} is no file, and not one of {', '.join(sorted(p.stem for p in PROMPTS.iterdir()))}"
        for name in unknown
    ]
    for name, file in files.items():
        try:
            read_prompt_lines(file) if name not in unknown else None
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"eval.prompts: {name} cannot be read: {error}")
    return (
        problems
        + check_functions(cfg)
        + [line for key, path, role in wanted if path for line in check_model(key, path, role)]
    )


def prompt_file(name: str) -> Path:
    """The file of one of eval.prompts: of ours by its name, or the user's."""
    return (
        PROMPTS / f"{name}.txt"
        if (PROMPTS / f"{name}.txt").exists()
        else Path(name).expanduser().resolve()
    )


def read_prompt_lines(file: Path) -> list[str]:
    """The prompts of a file, one per line."""
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def check_model(key: str, path: str, role: str) -> list[str]:
    if path.startswith(BUILTIN):
        if not (ASSETS / path.removeprefix(BUILTIN) / "config.json").exists():
            return [f"{key}={path}: there is no such built-in model; there is builtin:tiny"]
    elif is_directory(path):
        config_file = model_directory(path) / "config.json"
        if not config_file.exists():
            return [
                f"{key}={path}: no model there (no {config_file}); give a run, a model directory or a hub id"
            ]
        architectures = json.loads(config_file.read_text()).get("architectures") or []
        if role and not any(role in name for name in architectures):
            kind = "a causal language model" if role == "ForCausalLM" else "a reward model"
            return [
                f"{key}={path}: this is {', '.join(architectures) or 'of unknown kind'}, not {kind} (*{role})"
            ]
    return []


def check_functions(cfg: Config) -> list[str]:
    """What is wrong with the python functions among the sources of the score, without running any of their code."""
    problems = []
    for stage in cfg.stage.runs:
        for name, source in sources_of_score(cfg, stage).items():
            if (
                source.function
                and ":" in source.function
                and function_file(source.function) is None
            ):
                where = f"neither here ({os.getcwd()}) nor among the installed packages"
                key = f"{stage.name}.rewards.{name}.function={source.function}"
                problems.append(
                    f"{key}: there is no module {source.function.split(':')[0]}, {where}"
                )
    return problems


def function_file(function: str) -> Path | None:
    """The file of "module:name", below the directory where the command is run, or of an installed package; None where there is none."""
    parts = function.split(":")[0].split(".")
    for root in (os.getcwd(), *sys.path):
        for file in (Path(root, *parts).with_suffix(".py"), Path(root, *parts, "__init__.py")):
            if file.is_file():
                return file
    return None


def content_id(path: str) -> str:
    """What tells a trained model from another one that lies there later: the id of its run, else its weights' sizes and times; the hub id
    as it is."""
    if not is_directory(path):
        return path
    directory = Path(path).expanduser()
    own = read_summary(directory) or (
        read_summary(directory.parent) if directory.name == "model" else None
    )
    if own:
        return own["id"]
    weights = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(model_directory(path).glob("*.safetensors"))
    ]
    return f"{path}:{hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16]}"


def find_inputs(
    cfg: Config, stage: Stage, baseline: Config, command: list[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The trained models that `stage` stands on: their locations, and the ids of the runs that made them, by stage name (sources of the
    score: rewards/NAME; of eval, by their places: policies/N, prompts/N).

    Args: command: what the user typed, to be repeated in the advice.
    Raises: FileNotFoundError saying where it looked and which commands make what is missing.
    """
    paths, ids, missing = {}, {}, []

    def take(name: str, path: str) -> None:
        paths[name] = str(model_directory(path).resolve()) if is_directory(path) else path
        ids[name] = content_id(path)

    for name, source in sources_of_score(cfg, stage).items():
        if source.path:
            take(f"rewards/{name}", source.path)
        elif source.function and (file := function_file(source.function)):
            ids[f"rewards/{name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[
                :16
            ]  # another function, another run
    for i, policy in enumerate(cfg.eval.policies) if stage == Stage.eval else ():
        if not is_named(policy):
            take(f"policies/{i}", policy)
    for i, name in enumerate(cfg.eval.prompts) if stage == Stage.eval else ():
        file = prompt_file(name)
        paths[f"prompts/{i}"], ids[f"prompts/{i}"] = (
            str(file),
            hashlib.sha256(file.read_bytes()).hexdigest()[:16],
        )
    for parent, given in parent_stages(cfg, stage).items():
        if given:
            take(parent.name, given)
            continue
        directory = run_dir_for(cfg, parent, baseline)
        summary = read_summary(directory)
        if summary:
            paths[parent.name], ids[parent.name] = (
                str((directory / "model").resolve()),
                summary["id"],
            )
        else:
            read = {key.split(".")[0] for key in run_identity(cfg, parent)} | (
                {"ppo"} if parent in ONLINE else set()
            )  # whose values others follow
            unread = tuple(
                f"{name}." for name in ("rollout", *Stage.__members__) if name not in read
            )
            others = [
                arg for arg in command if not arg.startswith(("stage=", "pipeline=", *unread))
            ]
            what = "reward model" if parent == Stage.rm else "policy"
            make = " ".join(["python train.py", f"stage={parent.name}", *others])
            instead = f"give {stage.name}.{'reward' if parent == Stage.rm else 'actor'}=<run, directory or hub id>"
            if stage == Stage.eval:
                instead = (
                    "leave it out with '~eval.rewards.model'"
                    if parent == Stage.rm
                    else "leave it out of eval.policies"
                )
            missing.append(
                f"{stage.name} needs a trained {what}: looked in {directory}; make it: {make}  or {instead}"
            )
    if missing:
        raise FileNotFoundError("\n".join(missing))
    return paths, ids

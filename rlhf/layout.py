"""Where runs live. The directory of a run is a function of its configuration, so the same command finds it again, and a stage
finds the ones it stands on, without a path being typed. No torch here."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Any

from rlhf import config
from rlhf.config import (
    ALIGNMENT,
    ONLINE,
    READS,
    Config,
    Stage,
    StageChoice,
    parents,
    placement,
    sources_of_score,
    uses_own_reward_model,
    world_size,
)

BUILTIN = "builtin:"
PROMPTS = Path(__file__).parent / "assets" / "prompts"  # one prompt per line, of each language


# --------------------------------------------------------------------------------------------------------------------- identity


def identity(cfg: Config, stage: Stage) -> dict[str, Any]:
    """All values that decide the result of `stage`, by dotted key: those of the nodes that it and the stages below it read. A trained
    model given by hand replaces the stage that would make it."""
    flat: dict[str, Any] = {}
    for node in READS[stage]:
        flatten(getattr(cfg, node), node, flat)
    if stage == Stage.ppo:
        flatten(cfg.reward.lora, "reward.lora", flat)  # the critic's adapter
    switches = cfg.ppo.dschat
    if (stage == Stage.sft and cfg.sft.micro_batch_means) or (stage == Stage.ppo and (switches.micro_batch_means or switches.dropout)):
        flat |= {"deploy.micro_batch": cfg.deploy.micro_batch, "processes": world_size(cfg)}  # then they do change the result
    if stage == Stage.ppo and switches.dropout:
        flat["deploy.eval_micro_batch"] = cfg.deploy.eval_micro_batch
    if stage == Stage.eval and "base" in cfg.eval.policies and cfg.actor.path.startswith(BUILTIN):
        flat["seed"] = cfg.seed  # of its random weights
    for parent, given in parents(cfg, stage).items():
        flat |= {} if given else identity(cfg, parent)
    return flat


def flatten(value: Any, key: str, out: dict[str, Any]) -> None:
    """Collect the identity fields below a node of the schema as plain values."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            if f.metadata.get("identity", True):
                flatten(getattr(value, f.name), f"{key}.{f.name}", out)
    elif isinstance(value, dict):
        for name, item in value.items():
            flatten(item, f"{key}.{name}", out)
    else:
        out[key] = value.name if isinstance(value, Enum) else value


def run_name(cfg: Config, stage: Stage, baseline: Config) -> str:
    """`<stage>-<models>[+key-value...]-<hash>`: the key-values are what differs from `baseline`, the same choices of groups
    without any value set by hand; they are for people, the hash of the whole identity decides."""
    values, plain = identity(cfg, stage), identity(baseline, stage)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    models = [cfg.actor.name] if stage != Stage.rm else []
    models += [cfg.reward.name] if stage == Stage.rm or uses_own_reward_model(cfg, stage) else []
    readable = "-".join([stage.name, *models])
    readable += "".join(f"+{key}-{value}" for key, value in sorted(values.items()) if plain.get(key) != value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", readable)[:100] + "-" + digest


def home(cfg: Config, stage: Stage, baseline: Config) -> Path:
    return Path(cfg.root).expanduser() / "outputs" / run_name(cfg, stage, baseline)


# ----------------------------------------------------------------------------------------------------------------------- inputs


def is_directory(path: str) -> bool:
    """Whether a model path means a directory (else it is a hub id, or built in)."""
    return not path.startswith(BUILTIN) and (path[:1] in "/.~" or Path(path).exists())


def check_models(cfg: Config) -> list[str]:
    """What is wrong with the base models and given inputs of the stages to run, as lines for the user. Loads nothing."""
    runs = cfg.stage.runs
    policy, scorer = "ForCausalLM", "ForSequenceClassification"
    wanted: list[tuple[str, str | None, str]] = []
    reads_base = {Stage.sft, Stage.inspect}.intersection(runs) or (Stage.eval in runs and "base" in cfg.eval.policies)
    wanted += [("actor.path", cfg.actor.path, policy)] if reads_base else []
    wanted += [("reward.path", cfg.reward.path, "")] if Stage.rm in runs else []
    for stage in runs:
        node: Any = getattr(cfg, stage.name, None)
        wanted += [(f"{stage.name}.actor", node.actor, policy)] if stage in ALIGNMENT else []
        wanted += [(f"{stage.name}.reward", node.reward, scorer)] if stage in ONLINE else []
        wanted += [(f"{stage.name}.rewards.{name}.path", s.path, scorer) for name, s in sources_of_score(cfg, stage).items()]
        wanted += [("eval.policies", path, policy) for path in cfg.eval.policies if stage == Stage.eval and not config.is_named(path)]
    files = {name: prompt_file(name) for name in (cfg.eval.prompts if Stage.eval in runs else [])}
    unknown = [name for name, file in files.items() if not file.is_file()]
    problems = [
        f"eval.prompts: {name} is no file, and not one of {', '.join(sorted(p.stem for p in PROMPTS.iterdir()))}" for name in unknown
    ]
    for name, file in files.items():
        try:
            lines_of_file(file) if name not in unknown else None
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"eval.prompts: {name} cannot be read: {error}")
    return problems + check_functions(cfg) + [line for key, path, role in wanted if path for line in check_model(key, path, role)]


def prompt_file(name: str) -> Path:
    """The file of one of eval.prompts: of ours by its name, or the user's."""
    return PROMPTS / f"{name}.txt" if (PROMPTS / f"{name}.txt").exists() else Path(name).expanduser().resolve()


def lines_of_file(file: Path) -> list[str]:
    """The prompts of a file, one per line."""
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def check_model(key: str, path: str, role: str) -> list[str]:
    if path.startswith(BUILTIN):
        if not (Path(__file__).parent / "assets" / path.removeprefix(BUILTIN) / "config.json").exists():
            return [f"{key}={path}: there is no such built-in model; there is builtin:tiny"]
    elif is_directory(path):
        config_file = model_directory(path) / "config.json"
        if not config_file.exists():
            return [f"{key}={path}: no model there (no {config_file}); give a run, a model directory or a hub id"]
        architectures = json.loads(config_file.read_text()).get("architectures") or []
        if role and not any(role in name for name in architectures):
            kind = "a causal language model" if role == "ForCausalLM" else "a reward model"
            return [f"{key}={path}: this is {', '.join(architectures) or 'of unknown kind'}, not {kind} (*{role})"]
    return []


def check_functions(cfg: Config) -> list[str]:
    """What is wrong with the python functions among the sources of the score, without running any of their code."""
    problems = []
    for stage in cfg.stage.runs:
        for name, source in sources_of_score(cfg, stage).items():
            if source.function and ":" in source.function and function_file(source.function) is None:
                where = f"neither here ({os.getcwd()}) nor among the installed packages"
                key = f"{stage.name}.rewards.{name}.function={source.function}"
                problems.append(f"{key}: there is no module {source.function.split(':')[0]}, {where}")
    return problems


def function_file(function: str) -> Path | None:
    """The file of "module:name", below the directory where the command is run, or of an installed package; None where there is none."""
    parts = function.split(":")[0].split(".")
    for root in (os.getcwd(), *sys.path):
        for file in (Path(root, *parts).with_suffix(".py"), Path(root, *parts, "__init__.py")):
            if file.is_file():
                return file
    return None


def model_directory(path: str) -> Path:
    """The model in a directory: a run's `model/`, or the directory itself."""
    directory = Path(path).expanduser()
    return directory / "model" if (directory / "model" / "config.json").exists() else directory


def content_id(path: str) -> str:
    """What tells a trained model from another one that lies there later: the id of its run, else its weights' sizes and times; the hub id
    as it is."""
    if not is_directory(path):
        return path
    directory = Path(path).expanduser()
    own = read_summary(directory) or (read_summary(directory.parent) if directory.name == "model" else None)
    if own:
        return own["id"]
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(model_directory(path).glob("*.safetensors"))]
    return f"{path}:{hashlib.sha256(json.dumps(weights).encode()).hexdigest()[:16]}"


def find_inputs(cfg: Config, stage: Stage, baseline: Config, command: list[str]) -> tuple[dict[str, str], dict[str, str]]:
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
            ids[f"rewards/{name}"] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]  # another function, another run
    for i, policy in enumerate(cfg.eval.policies) if stage == Stage.eval else ():
        if not config.is_named(policy):
            take(f"policies/{i}", policy)
    for i, name in enumerate(cfg.eval.prompts) if stage == Stage.eval else ():
        file = prompt_file(name)
        paths[f"prompts/{i}"], ids[f"prompts/{i}"] = str(file), hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    for parent, given in parents(cfg, stage).items():
        if given:
            take(parent.name, given)
            continue
        directory = home(cfg, parent, baseline)
        summary = read_summary(directory)
        if summary:
            paths[parent.name], ids[parent.name] = str((directory / "model").resolve()), summary["id"]
        else:
            read = {key.split(".")[0] for key in identity(cfg, parent)} | (
                {"ppo"} if parent in ONLINE else set()
            )  # whose values others follow
            unread = tuple(f"{name}." for name in ("rollout", *Stage.__members__) if name not in read)
            others = [arg for arg in command if not arg.startswith(("stage=", "pipeline=", *unread))]
            what = "reward model" if parent == Stage.rm else "policy"
            make = " ".join(["python train.py", f"stage={parent.name}", *others])
            instead = f"give {stage.name}.{'reward' if parent == Stage.rm else 'actor'}=<run, directory or hub id>"
            if stage == Stage.eval:
                instead = "leave it out with '~eval.rewards.model'" if parent == Stage.rm else "leave it out of eval.policies"
            missing.append(f"{stage.name} needs a trained {what}: looked in {directory}; make it: {make}  or {instead}")
    if missing:
        raise FileNotFoundError("\n".join(missing))
    return paths, ids


# ------------------------------------------------------------------------------------------------------------------------- runs


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


def config_of_stage(cfg: Config, stage: Stage, inputs: dict[str, str]) -> Config:
    """The configuration that the workers of one stage read."""
    own = deepcopy(cfg)
    own.stage = StageChoice(stage.name, [stage])
    own.root = str(Path(cfg.root).expanduser().resolve())
    own.inputs = inputs
    return own


@contextlib.contextmanager
def owned(directory: Path, wait: bool = False) -> Iterator[None]:
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
        lock.write(f"pid {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        yield


def is_owned(directory: Path) -> bool:
    """Whether a process holds the run directory."""
    with contextlib.suppress(FileNotFoundError), open(directory / ".owner") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def checkpoints(directory: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[Path]]:
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


def check_resumable(directory: Path, about: dict[str, Any], cfg: Config, parents: dict[str, str]) -> list[str]:
    """Whether a run can go on from its checkpoint. Returns: what to warn of.

    Args: about: what the checkpoint says of itself.  parents: ids of the runs that it now stands on.
    Raises: RuntimeError with the difference and the way on.
    """
    anew = "or add fresh=true to train it anew (this attempt is then kept in its attempts/)"
    before, now = about["placement"], placement(cfg)
    differ = [key for key in before if now.get(key) != before[key]]
    if differ:
        then, instead = (" ".join(f"{key}={place.get(key)}" for key in differ) for place in (before, now))
        raise RuntimeError(f"{directory} is at step {about['step']}, made with {then}, not {instead}: go on with {then}, {anew}")
    stood_on = json.loads((directory / "parents.json").read_text())
    if stood_on != parents:
        raise RuntimeError(f"{directory} stands on other runs than there are now ({stood_on} -> {parents}): bring them back, {anew}")
    old, new = json.loads((directory / "env.json").read_text())["packages"], environment()["packages"]
    changed = [f"{name} {version} -> {new.get(name)}" for name, version in old.items() if new.get(name) != version]
    return [f"going on with other versions than before: {', '.join(changed)}"] if changed else []


def set_aside(directory: Path) -> Path | None:
    """Move what an earlier attempt left in a run directory into its `attempts/N`; returns that, or None when it was empty."""
    left = [path for path in directory.iterdir() if path.name not in ("attempts", ".owner")]
    if not left:
        return None
    number = 1 + max((int(p.name) for p in (directory / "attempts").glob("*") if p.name.isdigit()), default=0)
    aside = directory / "attempts" / str(number)
    aside.mkdir(parents=True)
    for path in left:
        path.rename(aside / path.name)
    return aside


def environment() -> dict[str, Any]:
    """Versions and hardware that a run was made with, for env.json."""
    packages = ["torch", "deepspeed", "transformers", "datasets", "hydra-core", "omegaconf", "wandb", "numpy"]

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, cwd=Path(__file__).parent)
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
        "gpus": ask("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader").splitlines(),
    }

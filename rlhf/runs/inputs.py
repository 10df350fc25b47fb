"""The trained models that a stage starts from: where they are, and checks before loading.

No torch here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.base.adapter_files import (
    BASE_KEY,
    CAUSAL_LM,
    CONFIG,
    SEQ_CLS,
    adapter_problem,
    adapter_settings,
    base_of,
    has_adapter,
    has_score_head,
    has_weights,
    is_adapter,
    tokenizer_of,
)
from rlhf.base.errors import UserError
from rlhf.base.locations import ASSETS, BUILTIN, is_directory, model_directory
from rlhf.base.model_files import broken_file, score_heads, weight_names
from rlhf.config.choices import Template
from rlhf.config.schema import Config
from rlhf.config.stage_graph import (
    BASE,
    aligned_node,
    is_aligned,
    is_rl,
    is_stage_name,
    parent_stages,
    score_sources,
)
from rlhf.runs.command import Command
from rlhf.runs.directory import read_summary
from rlhf.runs.identity import run_dir_for

PROMPTS = ASSETS / "prompts"  # one prompt per line, of each language
POLICY, SCORER = "ForCausalLM", "ForSequenceClassification"  # ends of transformers' class names
GPT2 = "LMHeadModel"  # in place of ForCausalLM, in the older classes of GPT-2 and the like


# ---------------------------------------------------------------------------------------- checks


def check_inputs(cfg: Config) -> list[str]:
    """What is wrong with the models, functions and prompt files of the stages to run.

    Loads nothing and runs no code of the user. One line per problem.
    """
    lines = [line for stage in cfg.stage.runs for line in check_functions(cfg, stage)]
    lines += check_prompt_files(cfg) if "eval" in cfg.stage.runs else []
    if cfg.data.template is Template.tokenizer:
        lines += check_chat_templates(cfg)
    return lines + [line for model in given_models(cfg) for line in check_model(*model)]


def given_models(cfg: Config) -> Iterator[tuple[str, str, str]]:
    """Key, path and kind of each model that the stages to run load, of those given by the user."""
    stages = cfg.stage.runs
    reads_base = {"sft", "inspect"} & {*stages} or ("eval" in stages and BASE in cfg.eval.policies)
    models: list[tuple[str, str | None, str]] = []
    if reads_base:
        models.append(("actor.path", cfg.actor.path, POLICY))
    if "rm" in stages:
        models.append(("reward.path", cfg.reward.path, ""))
    for stage in stages:
        node = "rl" if is_rl(stage) else stage
        if is_aligned(stage):
            models.append((f"{node}.actor", aligned_node(cfg, stage).actor, POLICY))
        if is_rl(stage):
            models.append(("rl.reward", cfg.rl.reward, SCORER))
        for name, source in score_sources(cfg, stage).items():
            models.append((f"{node}.rewards.{name}.path", source.path, SCORER))
    if "eval" in stages:
        paths = [p for p in cfg.eval.policies if p != BASE and not is_stage_name(p)]
        models += [("eval.policies", path, POLICY) for path in paths]
    return ((key, path, kind) for key, path, kind in models if path)


def check_chat_templates(cfg: Config) -> Iterator[str]:
    """Policies and bases of reward models without a chat template of their own."""
    for key, path, kind in given_models(cfg):
        if kind != SCORER and not has_chat_template(path):
            yield (
                f"{key}={path}: it has no chat template, which data.template=tokenizer needs: "
                "choose data.template=hh, chatml, llama3 or none"
            )


def has_chat_template(path: str) -> bool:
    """Whether a model on disk has a chat template of its own; True where that is not known."""
    if path.startswith(BUILTIN):
        directory = ASSETS / path.removeprefix(BUILTIN)
    elif is_directory(path):
        directory = model_directory(tokenizer_of(path))
    else:
        return True
    settings = directory / "tokenizer_config.json"
    if not settings.exists():
        return True  # another check says what is missing
    try:
        own = json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError):
        return True
    files = ("chat_template.jinja", "chat_template.json")
    return bool(own) or any((directory / name).exists() for name in files)


def check_model(key: str, path: str, kind: str) -> Iterator[str]:
    """Args: kind: POLICY, SCORER, or "" where any model will do."""
    if path.startswith(BUILTIN):
        if not (ASSETS / path.removeprefix(BUILTIN) / "config.json").exists():
            yield f"{key}={path}: no such built-in model; use builtin:tiny"
        return
    if not is_directory(path):
        return
    directory = model_directory(path)
    if has_adapter(path):
        yield from (f"{key}={path}: {problem}" for problem in check_adapter(path, kind))
        return
    config_file = directory / "config.json"
    if not config_file.exists():
        where = f"no {config_file}"
        yield f"{key}={path}: no model there ({where}); give a run, a model directory or a hub id"
        return
    if problem := broken_file(directory):
        yield f"{key}={path}: {problem}"
        return
    try:
        named = json.loads(config_file.read_text()).get("architectures") or []
        architectures = [named] if isinstance(named, str) else named
    except AttributeError:  # it is JSON, but not an object
        yield f"{key}={path}: {config_file} is not the configuration of a model"
        return
    if kind == SCORER and score_heads(weight_names(directory)):
        return  # whatever its name
    ends = (POLICY, GPT2) if kind == POLICY else (kind,)
    if kind and not any(end in name for name in architectures for end in ends):
        expected = "a causal language model" if kind == POLICY else "a reward model"
        actual = ", ".join(architectures) or "of unknown kind"
        yield f"{key}={path}: this is {actual}, not {expected} (*{kind})"


def check_adapter(path: str, kind: str) -> Iterator[str]:
    """What is wrong with an adapter or its base, for a model of this kind. Args: as check_model."""
    if has_weights(path):
        yield f"a whole model and {CONFIG} are there: move one of them to another directory"
        return
    if problem := broken_file(model_directory(path)) or adapter_problem(path):
        yield problem
        return
    try:
        whole = base_of(path)
    except UserError as loop:
        yield str(loop)
        return
    settings, head = adapter_settings(path), has_score_head(path)
    base, task = settings[BASE_KEY], settings.get("task_type")
    if task not in (None, CAUSAL_LM, SEQ_CLS):
        yield f"task_type={task}: give an adapter of {CAUSAL_LM} or {SEQ_CLS}"
    elif kind == POLICY and (head or task == SEQ_CLS):
        yield f"this adapter makes a reward model (task_type={task}), not a causal language model"
    elif kind == SCORER and not head and task == CAUSAL_LM:
        yield f"this adapter makes a causal language model (task_type={task}), not a reward model"
    elif quantization := quantization_of(whole):
        yield f"its base {whole} is quantized ({quantization}): name one in {CONFIG} that is not"
    else:
        yield from check_model(BASE_KEY, base, "" if kind == SCORER and head else kind)


def quantization_of(path: str) -> str | None:
    """How the weights of a model in a directory are quantized; None where they are not."""
    file = model_directory(path) / "config.json"
    if not is_directory(path) or not file.exists() or broken_file(file.parent):
        return None
    config = json.loads(file.read_text())
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return str(found.get("quant_method", "of unknown kind")) if isinstance(found, dict) else None


def check_functions(cfg: Config, stage: str) -> Iterator[str]:
    """The python functions among the sources of the score."""
    node = "rl" if is_rl(stage) else stage
    for name, source in score_sources(cfg, stage).items():
        if not source.function or ":" not in source.function:
            continue
        module, function = source.function.split(":", 1)
        key = f"{node}.rewards.{name}.function={source.function}"
        file = function_file(source.function)
        if file is None:
            yield (
                f"{key}: there is no module {module}, neither here ({os.getcwd()}) nor among the "
                "installed packages"
            )
        elif not may_define(file, function):
            yield f"{key}: there is no {function} in {file}"


def may_define(file: Path, name: str) -> bool:
    """Whether a python file may have this name, found without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return True  # importing it says what is wrong
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    return bool(names & {name, "*"})


def check_prompt_files(cfg: Config) -> Iterator[str]:
    for name in cfg.eval.prompts:
        file = prompt_file(name)
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in PROMPTS.iterdir()))
            yield f"eval.prompts: {name} is no file, and not one of {known}"
            continue
        try:
            read_prompt_lines(file)
        except (OSError, UnicodeDecodeError) as error:
            yield f"eval.prompts: {name} cannot be read: {error}"


def prompt_file(name: str) -> Path:
    """The file of one of eval.prompts: of ours by its name, or the user's."""
    ours = PROMPTS / f"{name}.txt"
    return ours if ours.exists() else Path(name).expanduser().resolve()


def read_prompt_lines(file: Path) -> list[str]:
    """The prompts of a file, one per line."""
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def function_file(function: str) -> Path | None:
    """The file of "module:name", in the current directory or an installed package; or None."""
    parts = function.split(":")[0].split(".")
    for root in (os.getcwd(), *sys.path):
        for file in (Path(root, *parts).with_suffix(".py"), Path(root, *parts, "__init__.py")):
            if file.is_file():
                return file
    return None


# ---------------------------------------------------------------------------------------- inputs


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
    instead = " and ".join(dict.fromkeys(how_to_do_without(stage, parent) for stage in users))
    if no_rows(command.cfg, parent):
        shares = str(command.cfg.data.shares).replace(" ", "")
        return f"{line}, and data.shares={shares} leaves it no rows to train on; {instead}"
    return f"{line}; make it: {command.for_stage(parent).to_train(parent)}  or {instead}"


def how_to_do_without(stage: str, parent: str) -> str:
    """What to do where `stage` shall not start from its parent run."""
    if stage == "eval":
        removed = "remove it with eval.rewards.model=null"
        return removed if parent == "rm" else "leave it out of eval.policies"
    node, key = "rl" if is_rl(stage) else stage, "reward" if parent == "rm" else "actor"
    return f"give {node}.{key}=<run, directory or hub id>"


def no_rows(cfg: Config, stage: str) -> bool:
    """Whether data.shares leaves a stage without rows, which is known before the data are read."""
    sft, rm, rl = cfg.data.shares
    if cfg.data.sandbox is not None:  # its sizes decide
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
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]

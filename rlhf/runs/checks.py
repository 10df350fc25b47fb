"""Checks of the models, functions and prompt files that the user gives, before loading.

No torch here.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
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
    tokenizer_of,
)
from rlhf.base.errors import UserError
from rlhf.base.files import read_small_file, special_kind, why_not_small_file
from rlhf.base.locations import (
    ASSETS,
    BUILTIN,
    HUB_ID,
    hub_id_of,
    is_directory,
    model_directory,
)
from rlhf.base.log import first_line
from rlhf.base.model_files import broken_file, score_heads, weight_names
from rlhf.config.choices import Template
from rlhf.config.schema import Config
from rlhf.config.stage_graph import (
    BASE,
    aligned_node,
    is_aligned,
    is_rl,
    is_stage_name,
    score_sources,
)
from rlhf.config.stage_nodes import Judge

PROMPTS = ASSETS / "prompts"  # one prompt per line, of each language
POLICY, SCORER = "ForCausalLM", "ForSequenceClassification"  # ends of transformers' class names
GPT2 = "LMHeadModel"  # in place of ForCausalLM, in the older classes of GPT-2 and the like


def check_inputs(cfg: Config) -> list[str]:
    """What is wrong with the models, functions and prompt files of the stages to run.

    Loads nothing and runs no code of the user. One line per problem.
    """
    # stage=inspect tries the functions of online RL
    scored = [cfg.rl.name if stage == "inspect" else stage for stage in cfg.stage.runs]
    lines = [line for stage in scored for line in check_functions(cfg, stage)]
    if cfg.deploy.hostfile and (problem := why_not_small_file(Path(cfg.deploy.hostfile))):
        lines.append(f"deploy.hostfile={cfg.deploy.hostfile}: {problem}")
    if "eval" in cfg.stage.runs:
        lines += [*check_prompt_files(cfg), *check_response_file(cfg)]
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
    return ((key, path, kind) for key, path, kind in models if path is not None)


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
    what = "give a run, a model directory or a hub id (OWNER/NAME)"
    if not path.strip() or "\0" in path:
        yield f"{key}={path!r}: this is no path; {what}"
        return
    if "://" in path:
        hub = hub_id_of(path)
        fix = f"give the hub id: {key}={hub}" if hub else what
        yield f"{key}={path}: a model is not read from an address on the web; {fix}"
        return
    if not is_directory(path):
        if not HUB_ID.fullmatch(path):
            yield f"{key}={path}: neither a path that is there nor a hub id; {what}"
        return
    if kind_of_file := special_kind(Path(path).expanduser()):
        yield f"{key}={path}: this is {kind_of_file}; {what}"
        return
    if Path(path).expanduser().is_file():
        yield f"{key}={path}: this is a file; give the directory that it is in"
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
        named = json.loads(config_file.read_text(encoding="utf-8")).get("architectures") or []
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
    config = json.loads(file.read_text(encoding="utf-8"))
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return str(found.get("quant_method", "of unknown kind")) if isinstance(found, dict) else None


def check_functions(cfg: Config, stage: str) -> Iterator[str]:
    """The python functions among the sources of the score."""
    node = "rl" if is_rl(stage) else stage
    for name, source in score_sources(cfg, stage).items():
        if source.judge:
            yield from check_judge(f"{node}.rewards.{name}.judge", source.judge)
        if not source.function or ":" not in source.function:
            continue
        module, _, function = source.function.rpartition(":")
        key = f"{node}.rewards.{name}.function={source.function}"
        file = function_file(source.function)
        if file is None and module.endswith(".py"):
            yield f"{key}: there is no file {Path(module).expanduser().resolve()}"
        elif file is None:
            yield (
                f"{key}: there is no module {module}, neither here ({os.getcwd()}) nor among the "
                "installed packages"
            )
        elif not may_define(file, function):
            yield f"{key}: there is no {function} in {file}"


def check_home() -> None:
    """Libraries want a home folder: docker run --user NUMBER gives none.

    Raises: UserError.
    """
    try:
        Path.home()
    except RuntimeError:
        raise UserError(
            f"there is no home folder: HOME is not set, and this machine does not know the user "
            f"{os.getuid()}; set HOME to a folder that can be written"
        ) from None


def check_judge(key: str, judge: Judge) -> Iterator[str]:
    """The files and the key of a language model that grades responses."""
    name = judge.api_key_env
    for field, path in (("rubric", judge.rubric), ("pair_rubric", judge.pair_rubric)):
        if path is None:
            continue
        file = Path(path).expanduser()
        if problem := why_not_small_file(file):
            yield f"{key}.{field}={path}: {problem}"
        elif not file.is_file():
            yield f"{key}.{field}={path}: there is no file {file.resolve()}"
    if name is not None and not os.environ.get(name):
        yield f"{key}.api_key_env={name}: this environment variable is not set"


def may_define(file: Path, name: str) -> bool:
    """Whether a python file may have this name, found without running it."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return True  # importing it says what is wrong
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    names |= {node.name for node in tree.body if isinstance(node, defined)}
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
        if problem := why_not_small_file(file):
            yield f"eval.prompts: {name}: {problem}"
            continue
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in PROMPTS.iterdir()))
            yield f"eval.prompts: {name} is no file, and not one of {known}"
            continue
        try:
            read_prompt_lines(file)
        except (OSError, ValueError) as error:
            yield f"eval.prompts: {name} cannot be read: {first_line(error)}"


def check_response_file(cfg: Config) -> Iterator[str]:
    """Whether eval.save_responses can be written."""
    if cfg.eval.save_responses is None:
        return
    key = f"eval.save_responses={cfg.eval.save_responses}"
    file = Path(cfg.eval.save_responses).absolute()
    if kind := special_kind(file):
        yield f"{key}: this is {kind}; give a file"
    elif file.is_dir() or cfg.eval.save_responses.endswith("/"):
        yield f"{key}: this is a folder; give a file in it, for instance responses.jsonl"
    elif not file.parent.is_dir():
        yield f"{key}: there is no folder {file.parent}; make it first"
    elif not os.access(file.parent, os.W_OK | os.X_OK):
        yield f"{key}: the folder {file.parent} cannot be written; give a file elsewhere"


def prompt_file(name: str) -> Path:
    """The file of one of eval.prompts: of ours by its name, or the user's."""
    ours = PROMPTS / f"{name}.txt"
    return ours if ours.exists() else Path(name).expanduser().resolve()


def read_prompt_lines(file: Path) -> list[str]:
    """The prompts of a file, one per line."""
    return [line.strip() for line in read_small_file(file).splitlines() if line.strip()]


def function_file(function: str) -> Path | None:
    """The file of "module:name", in the current directory or an installed package, or of
    "FILE.py:name"; None where there is none."""
    place = function.rpartition(":")[0]
    if place.endswith(".py"):
        file = Path(place).expanduser()
        return file if file.is_file() else None
    parts = place.split(".")
    for root in (os.getcwd(), *sys.path):
        for file in (Path(root, *parts).with_suffix(".py"), Path(root, *parts, "__init__.py")):
            if file.is_file():
                return file
    return None

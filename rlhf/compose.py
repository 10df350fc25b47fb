"""From the command line to a checked, typed configuration. Hydra is imported here, in arguments.py
and in cli.py.

A command is composed once as typed, once without the values set by hand (the baseline of run
names), and once for each further algorithm that stage=eval names. Choosing options takes nearly all
of Hydra's time, so each choice is composed once in a process, and values are set on a copy of it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra import compose
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from rlhf import arguments
from rlhf.base.commands import override_text
from rlhf.base.errors import UserError
from rlhf.config import keys, presets
from rlhf.config.loading import to_typed
from rlhf.config.presets import CONF
from rlhf.config.schema import Config, Model
from rlhf.config.stage_graph import is_rl, is_stage_name, parent_stages
from rlhf.config.validation import check_config
from rlhf.runs.checks import check_inputs
from rlhf.runs.command import Command

# ------------------------------------------------------------------------------- what can be chosen


def register(folders: Sequence[Path] = ()) -> None:
    """Tell Hydra the schema, and the options that are made from files.

    One file per model serves the groups actor and reward; one file per preset of online RL serves
    the groups stage and pipeline.

    Args: folders: the user's own folders with option files, beside conf/.
    Raises: UserError for an option of the user's that has the name of one in conf/.
    """
    for folder in folders:
        check_names(folder)
    presets.config_dirs[:] = [CONF, *folders]
    compose_choices.cache_clear()
    store = ConfigStore.instance()
    store.store("schema", Config)
    for folder in presets.config_dirs:
        for file in folder.glob("model/*.yaml"):
            register_model(store, file)
    for name in presets.pipeline_ends():
        choose_rl = (
            [] if name in ("ppo", "dpo") else [{"override /rl": name}]
        )  # ppo is chosen anyway
        node = {"defaults": [*choose_rl, "_self_"], "pipeline": name}
        store.store(name, node, group="pipeline", package="_global_")
    for name in presets.preset_names():
        choose_rl = [{"override /rl@_global_.rl": name}]
        node = {"defaults": [*choose_rl, "_self_"], "name": name, "runs": [name]}
        store.store(name, node, group="stage")
    store.store("rl", {"name": "${rl.name}", "runs": ["${rl.name}"]}, group="stage")


def check_names(folder: Path) -> None:
    """Hydra takes the option in conf/ where a folder of the user has another one of its name.

    Raises: UserError that names the file.
    """
    for ours in CONF.glob("*/*.yaml"):
        option = ours.relative_to(CONF)
        theirs = folder / option
        if theirs.is_file() and theirs.read_bytes() != ours.read_bytes():
            raise UserError(
                f"{theirs}: conf/ has an option {option.with_suffix('')} too, and Hydra takes that "
                f"one; rename your file, for example to {option.parent}/my_{option.name}"
            )


def register_model(store: ConfigStore, file: Path) -> None:
    """Make actor=NAME and reward=NAME of conf/model/NAME.yaml."""
    paired = OmegaConf.select(OmegaConf.load(file), "pairs_with") or {}
    values = {"path": "${actor.path}"} if file.stem == "custom" else {}
    data = [{"override /data@_global_.data": paired["data"]}] if paired.get("data") else []
    reward = (
        [{"override /reward@_global_.reward": paired["reward"]}] if paired.get("reward") else []
    )
    model = [{"/model@_here_": file.stem}]
    store.store(file.stem, {"defaults": [*model, *reward, *data, "_self_"]}, group="actor")
    store.store(file.stem, {"defaults": [*model, *data, "_self_"], **values}, group="reward")


# ------------------------------------------------------------------------------------- composing


def compose_alone(overrides: Sequence[str], folders: Sequence[Path]) -> DictConfig:
    """The configuration of some overrides, equal to what Hydra composes of them all at once.

    Hydra, too, sets the values of keys after all options are merged, in the order of the command.
    """
    values = [arg for arg in overrides if is_value(arg)]
    choices = tuple(arg for arg in overrides if not is_value(arg))
    cfg = copy.deepcopy(compose_choices(choices, tuple(folders)))
    ConfigLoaderImpl._apply_overrides_to_config(parse_values(tuple(values)), cfg)
    return cfg


def compose_again(overrides: Sequence[str]) -> DictConfig:
    """The configuration of some overrides, with the user's folders."""
    return compose_alone(overrides, presets.config_dirs[1:])


@functools.cache
def compose_choices(choices: tuple[str, ...], folders: tuple[Path, ...]) -> DictConfig:
    """The configuration of some options; it is shared, so change a copy."""
    return compose_with_hydra(choices, folders, hydra_too=False)


def compose_with_hydra(
    overrides: Sequence[str], folders: Sequence[Path], hydra_too: bool = True
) -> DictConfig:
    """The configuration of some overrides, composed by Hydra alone, with its own node `hydra`."""
    is_running = GlobalHydra.instance().is_initialized()
    alone = hydra.initialize_config_dir(str(CONF), version_base="1.3") if not is_running else None
    with alone or contextlib.nullcontext():
        return compose("config", [*overrides, *search_path(folders)], return_hydra_config=hydra_too)


@functools.lru_cache(1000)
def parse_values(values: tuple[str, ...]) -> list[Override]:
    """Overrides of keys, as Hydra reads them."""
    return OverridesParser.create().parse_overrides(list(values))


def is_value(arg: str) -> bool:
    """Whether an override sets a key of the schema, and chooses no option of a group."""
    key = arguments.group_of(arg)
    return (
        key not in (*arguments.group_names(), *arguments.HIDDEN_GROUPS)
        and keys.find_key(key) is not None
    )


def search_path(folders: Sequence[Path]) -> list[str]:
    """The override that makes Hydra look into the user's folders too."""
    paths = ",".join(override_text(f"file://{folder}") for folder in folders)
    return [f"hydra.searchpath=[{paths}]"] if folders else []


def typed_config(composed: DictConfig) -> Config:
    """The configuration as typed objects, with those stages only that the last one needs.

    A pipeline that ends with dpo trains no reward model. Raises: UserError as `to_typed`.
    """
    cfg = to_typed(composed)
    for model in (cfg.actor, cfg.reward):
        if model.name == "custom":
            model.name = Path(model.path).name or model.path
    if cfg.rl.variant_of:  # stage=ppo rl=dschat means stage=dschat
        runs = [cfg.rl.name if stage == cfg.rl.variant_of else stage for stage in cfg.stage.runs]
        cfg.stage.runs = runs
        cfg.stage.name = cfg.rl.name if cfg.stage.name == cfg.rl.variant_of else cfg.stage.name
    last = cfg.stage.runs[-1]
    cfg.stage.runs = [s for s in cfg.stage.runs if s == last or is_needed(cfg, s, last)]
    return cfg


def is_needed(cfg: Config, stage: str, last: str) -> bool:
    """Whether a pipeline that ends with `last` needs the result of `stage`."""
    return any(
        parent == stage or is_needed(cfg, stage, parent)
        for parent, given in parent_stages(cfg, last).items()
        if not given
    )


def make_command(composed: DictConfig, overrides: Sequence[str]) -> Command:
    """A command. Args: overrides: those that `composed` comes from.

    Raises: UserError naming everything that is wrong with it.
    """
    cfg = typed_config(composed)
    if problems := check_config(cfg) + check_inputs(cfg):
        raise UserError("\n".join(problems))
    choices = [arg for arg in overrides if arguments.group_of(arg) in arguments.group_names()]
    if any(arguments.group_of(arg) == "experiment" for arg in choices):
        choices = without_experiment(choices)
    usual = composed if choices == list(overrides) else compose_again(choices)
    if OmegaConf.is_missing(usual.actor, "path"):  # actor=custom; reward=custom may follow it
        usual.actor.path = composed.actor.path
    for key in OmegaConf.missing_keys(usual):  # what only the user can give: the file of data=jsonl
        OmegaConf.update(usual, key, OmegaConf.select(composed, key))
    command = Command(cfg, typed_config(usual), arguments.as_user_types(overrides))
    for mine, plain in ((cfg.actor, command.baseline.actor), (cfg.reward, command.baseline.reward)):
        forget_shape(mine, plain)
    for name in other_algorithms(cfg):
        kept = [
            arg for arg in overrides if arguments.group_of(arg) not in ("stage", "pipeline", "rl")
        ]
        again = [*kept, f"stage={name}"]
        command.algorithms[name] = make_command(compose_again(again), again)
    return command


def without_experiment(choices: Sequence[str]) -> list[str]:
    """The groups that an experiment file chooses, without the values that it sets: so these are
    among the differences that a run's name shows."""
    chosen = compose_with_hydra(choices, presets.config_dirs[1:])
    groups = chosen.hydra.runtime.choices
    given = [arg for arg in choices if arguments.group_of(arg) != "experiment"]
    names = {arguments.group_of(arg) for arg in given}
    more = {"stage", "pipeline", "rl", "actor", "reward", "data", "deploy"} - names
    return given + [f"{name}={str(groups[name]).replace(' ', '')}" for name in sorted(more)]


def forget_shape(model: Model, plain: Model) -> None:
    """Drop the shape of a model whose path was set by hand: it is that of another model."""
    if model.path != plain.path and model.arch == plain.arch:
        model.arch = None


def other_algorithms(cfg: Config) -> list[str]:
    """Algorithms that eval.policies names besides that of the rl node."""
    if "eval" not in cfg.stage.runs:
        return []
    return [p for p in cfg.eval.policies if is_stage_name(p) and is_rl(p) and p != cfg.rl.name]

"""The words of a command line, `KEY=VALUE`: what they mean, and what is wrong with them.

Hydra is imported here, in compose.py and in cli.py.
"""

from __future__ import annotations

import contextlib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from rlhf.base.commands import override_text
from rlhf.base.errors import UserError
from rlhf.base.files import read_small_file
from rlhf.base.log import cut
from rlhf.config import keys, presets, suggestions
from rlhf.config.loading import wrong_values

MADE_GROUPS = ("actor", "reward", "pipeline")  # their options are made by compose.register()
OPTIONAL_GROUPS = ("recipe", "reward_recipe", "rl_recipe", "experiment", "sweep")
HIDDEN_GROUPS = ("hydra", "model")  # a model is chosen as actor or as reward
OPTION_BYTES, MOST_VALUES = 2**20, 100_000  # of an option file


def group_names() -> list[str]:
    """The groups that users choose from."""
    folders = {
        path.name for root in presets.config_dirs for path in root.iterdir() if path.is_dir()
    }
    return sorted(folders - set(HIDDEN_GROUPS) | set(MADE_GROUPS))


def group_options(group: str) -> list[str]:
    """The options of a group."""
    if group in ("actor", "reward"):
        return presets.options("model")
    if group == "pipeline":
        return presets.pipeline_ends()
    return presets.options(group) + (["rl", *presets.preset_names()] if group == "stage" else [])


def parse(arg: str) -> Override:
    """One override. Raises: UserError when it cannot be read."""
    # RecursionError: many brackets
    with contextlib.suppress(HydraException, RecursionError):
        override = OverridesParser.create().parse_override(arg)
        if override.key_or_group:
            return override
    fix = "quote values with spaces, commas or brackets: 'data=[a,b]'"
    if "=" not in arg[1:]:
        fix = "write KEY=VALUE without spaces, as in stage=ppo (python train.py --help)"
    elif arg.endswith(","):
        fix = f"remove the comma at the end: {arg.rstrip(',')}"
    raise UserError(f"cannot read {cut(repr(arg), 200)}: {fix}")


def jobs_of(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each job of a sweep, as Hydra makes them and in its order."""
    (jobs,) = BasicSweeper.split_arguments(list(overrides), None)
    return jobs


def user_folders(config_dir: str | None, overrides: Sequence[str]) -> list[Path]:
    """The user's folders with option files: --config-dir and hydra.searchpath=[file://DIR].

    Raises: UserError when one is not a folder.
    """
    folders = [Path(config_dir)] if config_dir else []
    for arg in overrides:
        if arg.lstrip("+").startswith("hydra.searchpath="):
            entries: Any = parse(arg).value()
            named = [str(entry) for entry in entries or ()]
            folders += [Path(e.removeprefix("file://")) for e in named if not e.startswith("pkg:")]
    for folder in folders:
        if not folder.expanduser().is_dir():
            raise UserError(f"{folder}: no such folder; --config-dir and hydra.searchpath name one")
        check_option_files(folder.expanduser())
    return [folder.expanduser().resolve() for folder in folders]


def check_option_files(folder: Path) -> None:
    """Check option files before Hydra reads them: it would wait for a pipe, never end with a
    device, and copy each alias.

    Raises: UserError that names the first file that cannot be read.
    """
    for depth in ("*", "*/*", "*/*/*"):
        for file in sorted(folder.glob(f"{depth}.yaml")):
            try:
                root = yaml.compose(read_small_file(file, OPTION_BYTES), Loader=yaml.SafeLoader)
                if not isinstance(root, yaml.MappingNode | None):
                    raise ValueError("it has no keys: write KEY: VALUE")
                if values_of(root, {}) > MOST_VALUES:
                    raise ValueError(f"its aliases (*NAME) make more than {MOST_VALUES:,} values")
            except RecursionError:
                raise UserError(f"cannot read an option file: {file}: nested too deeply") from None
            except (OSError, ValueError, yaml.YAMLError) as error:
                line = " ".join(str(error).replace(' in "<unicode string>"', "").split())
                raise UserError(f"cannot read an option file: {file}: {line}") from None


def values_of(node: yaml.Node | None, known: dict[int, int]) -> int:
    """The number of values below a node of YAML, with those of its aliases.

    Args: known: those of the nodes that were counted, by id.
    """
    if node is None or not isinstance(node.value, list):
        return 1
    if id(node) not in known:
        known[id(node)] = 1  # of an alias inside itself
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [value for _, value in node.value]
        known[id(node)] = 1 + sum(values_of(child, known) for child in children)
    return known[id(node)]


def explain(arg: str, multirun: bool = True) -> list[str]:
    """What is wrong with one override, as lines with the closest match; empty where nothing is.

    Args: multirun: the command has -m, so that commas separate the values of a sweep.
    """
    try:
        override = parse(arg)
    except UserError as error:
        return [str(error)]
    if override.is_sweep_override() and not multirun:
        return [explain_commas(override.key_or_group, arg)]
    key = override.key_or_group
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return []
    if key.split("@")[0] not in group_names():
        return explain_value(key, arg, override)
    options = group_options(key)
    if override.is_sweep_override() and "null" in values_of_sweep(override):
        return [f"{arg}: null cannot be one of several: run the command without {key}, too"]
    if key not in OPTIONAL_GROUPS and arg.endswith("=null"):
        return [f"{arg}: choose one of {', '.join(options)}"]
    if override.is_add():
        return [f"{arg}: leave out the +: {arg.lstrip('+')}"]
    chosen = [c.removesuffix(".yaml") for c in chosen_options(override)]
    return [suggestions.no_option(key, word, options) for word in chosen if word not in options]


def explain_value(key: str, arg: str, override: Override) -> list[str]:
    """What is wrong with an override of a key that is not a group: its name, value or prefix."""
    found = keys.find_key(key)
    if found is None:
        return [f"unknown key {suggest(key, arg)}"]
    is_named = "*" in found.name or found.is_dictionary
    if override.is_delete():
        fix = f"set another value (python train.py --help {key})"
        return [] if is_named else [f"{arg}: this key cannot be removed; {fix}"]
    if override.is_add() and not override.is_force_add() and not is_named:
        return [f"{arg}: this key exists; leave out the +: {arg[1:]}"]
    if not override.is_sweep_override():
        return wrong_values(key, unquoted(override.value()))
    if not override.is_choice_sweep():
        return []
    values = [parse(f"{key}={value}").value() for value in override.sweep_string_iterator()]
    return [line for value in values for line in wrong_values(key, unquoted(value))]


def unquoted(value: Any) -> Any:
    """A value of an override with its quoted texts as plain ones."""
    if isinstance(value, dict):
        return {str(name): unquoted(item) for name, item in value.items()}
    if isinstance(value, list):
        return [unquoted(item) for item in value]
    return value.text if isinstance(value, QuotedString) else value


def explain_commas(key: str, arg: str) -> str:
    """What to do about commas outside brackets and quotes in a command without -m."""
    value, found = arg.partition("=")[2], keys.find_key(key)
    kinds = [found.annotation, *typing.get_args(found.annotation)] if found else []
    other = "else give one value"
    if float in kinds and re.fullmatch(r"-?\d+,\d+(e-?\d+)?", value):
        other = f"for one number write a point: {key}={value.replace(',', '.')}"
    elif key in ("data", "sweep"):
        other = f"to combine them: '{key}=[{value}]'"
    elif any(typing.get_origin(kind) is list for kind in kinds):
        other = f"a list is in brackets: '{key}=[{value}]'"
    elif str in kinds:
        other = f"a text with commas is in quotes: \"{key}='{value}'\""
    return f"{arg}: several values are a sweep: add -m; {other}"


def inside_optional(args: Sequence[str]) -> list[str]:
    """The overrides of a key in a node that may be null, as data.sandbox is with your own data."""
    parents = {
        arg: keys.find_key(arg.partition("=")[0].lstrip("+~").rpartition(".")[0]) for arg in args
    }
    return [arg for arg, key in parents.items() if key and key.is_node and key.is_optional]


def suggest(key: str, arg: str) -> str:
    """An unknown key with the closest match; of earlier versions' groups, what they are now."""
    value = arg.partition("=")[2]
    if key in ("ppo", "rloo", "grpo") and value in presets.preset_names():
        return f"{key} (did you mean rl={value}?)"
    return suggestions.with_suggestion(key)


def chosen_options(override: Override) -> list[str]:
    """The options of a group that an override chooses, also of a sweep or a list."""
    group, chosen = override.key_or_group, []
    for text in values_of_sweep(override):
        value: Any = parse(f"{group}={text}").value()
        chosen += value if isinstance(value, list) else [value]
    return [str(option) for option in chosen if option is not None]


def allow_user_names(arg: str) -> str:
    """An override below a dictionary that users extend by name, in the form that Hydra accepts.

    rl.rewards.NAME.weight=2 becomes ++rl.rewards={NAME: {weight: 2}}: OmegaConf cannot add a typed
    node by the key of one of its fields. recipe=null, an error in Hydra, becomes ~recipe.
    """
    if arg in [f"{group}=null" for group in OPTIONAL_GROUPS]:
        return f"~{group_of(arg)}"
    key = arg.partition("=")[0]
    found = keys.find_key(key) if "=" in arg and not arg.startswith(("+", "~", "-")) else None
    if found and found.is_dictionary:  # rl.rewards={NAME: {...}}
        return f"++{arg}"
    if found is None or "*" not in found.name:
        return arg
    try:
        override = parse(arg)
    except UserError:
        return arg  # reported later, with all else that is wrong
    depth = found.name.split(".").index("*")
    parts = key.split(".")
    values = values_of_sweep(override)
    for name in reversed(parts[depth:]):
        values = [f"{{{name}: {value}}}" for value in values]
    return f"++{'.'.join(parts[:depth])}={','.join(values)}"


def one_for_each_key(args: Sequence[str]) -> list[str]:
    """The overrides of a sweep with those that `allow_user_names` has made of one dictionary as
    one: of several with the same key, Hydra's sweeper knows the last one only."""
    values: dict[str, list[Any]] = {}  # the choices of each dictionary
    merged = []
    for arg in args:
        override = parse(arg)
        key = override.key_or_group
        found = keys.find_key(key) if arg.startswith("++") else None
        if found is None or not found.is_dictionary:
            merged.append(arg)
            continue
        if key not in values:
            merged.append(key)  # its place
        choices = [parse(f"{key}={one}").value() for one in values_of_sweep(override)]
        values[key] = [
            merge(before, value) for before in values.get(key, [{}]) for value in choices
        ]
    return [
        f"++{arg}={','.join(map(literal, values[arg]))}" if arg in values else arg for arg in merged
    ]


def values_of_sweep(override: Override) -> list[str]:
    """The values of an override in Hydra's grammar; of one that is no sweep, its own."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [literal(override.value())]


def merge(one: Any, other: Any) -> Any:
    """A value with another one set over it; of dictionaries, key by key."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return other
    return one | {key: merge(one.get(key), value) for key, value in other.items()}


def as_user_types(args: Sequence[str]) -> list[str]:
    """Overrides that `allow_user_names` has made, in the form that users type, for advice."""
    typed = []
    for arg in args:
        override = parse(arg) if arg.startswith("++") else None
        found = keys.find_key(override.key_or_group) if override else None
        if override and found and found.is_dictionary and not override.is_sweep_override():
            typed += [of_leaf(*leaf) for leaf in leaves(override.key_or_group, override.value())]
        else:
            typed.append(arg)
    return typed


def leaves(key: str, value: Any) -> list[tuple[str, Any]]:
    """The values inside a dictionary, and its own key where it has none, or is a value itself: an
    argument of a function."""
    found = keys.find_key(key)
    if not isinstance(value, dict) or not value or (found and found.annotation is Any):
        return [(key, value)]
    return [leaf for name, item in value.items() for leaf in leaves(f"{key}.{name}", item)]


def of_leaf(key: str, value: Any) -> str:
    """An override that sets a key, with as few quotes as can be."""
    plain = f"{key}={override_text(value) if isinstance(value, str) else literal(value)}"
    return plain if parse(plain).value() == value else f"{key}={literal(value)}"


def literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, str):
        return override_text(value, always=True)
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{name}: {literal(item)}' for name, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def group_of(arg: str) -> str:
    """The group or key of an override: `data` for +data=[a,b]."""
    return arg.lstrip("+~").partition("=")[0]

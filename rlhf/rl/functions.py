"""The user's python functions among the rewards: import them, call them, try them on real rows.

No torch here.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from typing import Any

from rlhf.base.errors import UserError
from rlhf.config.schema import Config
from rlhf.config.stage_graph import is_rl, score_sources
from rlhf.data.records import Dataset, Prompt

# of the prompt's turns and a response; further parameters get the row's columns of their names
RewardFunction = Callable[..., float]
POSITIONAL_OR_KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD
TRIED_ROWS = 4  # on which a function is called before a model is loaded
SHORT_RESPONSE = "Yes."  # for prompts whose row has no answer


# ------------------------------------------------------------------------------------ loading


def node_name(cfg: Config) -> str:
    """The configuration node with the rewards of the stage that runs."""
    return "rl" if is_rl(cfg.stage.name) else cfg.stage.name


def function_key(cfg: Config, name: str) -> str:
    """KEY=VALUE of the function of a source, which begins the messages about it."""
    function = score_sources(cfg, cfg.stage.name)[name].function
    return f"{node_name(cfg)}.rewards.{name}.function={function}"


def load_functions(cfg: Config) -> dict[str, RewardFunction]:
    """The python functions among the sources, by the sources' names; before a model is loaded.

    Raises: UserError naming the key.
    """
    sys.path.insert(0, os.getcwd())  # the user's modules may be where the command is run
    return {
        name: load_function(source.function, function_key(cfg, name))
        for name, source in score_sources(cfg, cfg.stage.name).items()
        if source.function
    }


def load_function(path: str, key: str) -> RewardFunction:
    """Import "module:name". Raises: UserError naming the key."""
    module, name = path.split(":")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:
        raise UserError(f"{key}: cannot import {module}: {cause(error)}") from error
    if function is None:
        raise UserError(f"{key}: there is no {name} in {module}")
    if not callable(function):
        raise UserError(f"{key}: {name} is not a function")
    try:
        inspect.signature(function).bind_partial([], "")
    except TypeError:
        raise UserError(
            f"{key}: {name} must take the prompt's turns and the response: "
            f"def {name}(turns, response)"
        ) from None
    except ValueError:  # one in C has no signature
        pass
    return function


# ------------------------------------------------------------------------------------ calling


def score(function: RewardFunction, prompt: Prompt, response: str, where: str) -> float:
    """The score of a function.

    Args: where: begins the message: the key of the function.
    Raises: UserError with the response, and file and line of what raised.
    """
    columns = columns_for(function, prompt, where)
    try:
        value = function(prompt.turns, response, **columns)
    except (Exception, SystemExit) as error:
        what = f"failed on the response {response[:80]!r}: {cause(error)}"
        raise UserError(f"{where}: the function {what}") from error
    try:
        number = float(value)
    except Exception:  # whatever float() of it raises
        number = math.nan
    if not math.isfinite(number):
        what = f"returned {value!r:.80} for the response {response[:80]!r}"
        raise UserError(f"{where}: the function {what}, not a finite number{defined_at(function)}")
    return number


def cause(error: BaseException) -> str:
    """An exception of the user's code in one line: type, message, and file and line."""
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*libraries, "<")) and frame.filename != __file__
    ]
    return what + (f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else "")


def defined_at(function: RewardFunction) -> str:
    """` (FILE:LINE)` of a function; empty for one in C, and for an object that can be called."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""


def columns_for(function: RewardFunction, prompt: Prompt, where: str) -> dict[str, Any]:
    """The columns of a prompt's row that a function has parameters for, after its first two.

    Args: where: begins the message.
    Raises: UserError naming a column that it needs and the row does not have, or one that it cannot
        get because a parameter for the turns or the response has its name.
    """
    first, parameters = _parameters(function)
    if not parameters:
        return {}
    columns: dict[str, Any] = json.loads(prompt.columns or "{}")
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        if taken := sorted(first & columns.keys()):
            raise UserError(
                f"{where}: the function has a parameter {taken[0]} for the turns or the response, "
                "and the rows have a column of this name: rename the parameter"
            )
        wanted = columns
    else:
        wanted = {one.name: columns[one.name] for one in parameters if one.name in columns}
    needed = {
        one.name
        for one in parameters
        if one.default is one.empty and one.kind is not one.VAR_KEYWORD
    }
    if missing := sorted(needed - wanted.keys()):
        there = ", ".join(columns) or "none"
        raise UserError(
            f"{where}: the function has a parameter {missing[0]}, and a row has no such column (it "
            f"has {there}): give it a default value, or add the column to the data"
        )
    return wanted


def _parameters(function: RewardFunction) -> tuple[set[str], list[inspect.Parameter]]:
    """The names of the first two parameters as far as a keyword can reach them, and the others.

    A function in C has no signature: it gets nothing but the turns and the response.
    """
    try:
        every = list(inspect.signature(function).parameters.values())
    except ValueError:
        return set(), []
    by_place = [one for one in every if one.kind in (one.POSITIONAL_ONLY, POSITIONAL_OR_KEYWORD)]
    first = by_place[:2]
    others = [one for one in every if one not in first and one.kind is not one.VAR_POSITIONAL]
    return {one.name for one in first if one.kind is POSITIONAL_OR_KEYWORD}, others


# ------------------------------------------------------------------------------------ trying


def try_functions(cfg: Config, functions: dict[str, RewardFunction], data: Dataset) -> int:
    """Try the functions on held-out rows, before a model is loaded.

    All rows must have the columns that a function asks for. On at most TRIED_ROWS of them, spread
    over all, each function is called once, with the row's own answer as the response where it has
    one. A pipeline does this before its first stage, and each process of the stage at its start.

    Returns: the number of rows on which each function was called.
    Raises: UserError as `columns_for` and `score`, with the prompt.
    """
    prompts = data.eval_prompts
    rows = prompts[:: -(-len(prompts) // TRIED_ROWS) or 1]
    answers = {str(row.prompt): row.response for row in data.eval_sft}
    for name, function in functions.items():
        where = function_key(cfg, name)
        for prompt in prompts:
            columns_for(function, prompt, where)
        for prompt in rows:
            last = prompt.turns[-1].text[-80:]
            response = answers.get(str(prompt.turns)) or SHORT_RESPONSE
            score(function, prompt, response, f"{where}: held-out prompt {last!r}")
    return len(rows)

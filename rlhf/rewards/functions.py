"""Reward functions: import one, see which arguments it names, call it on a batch, check its values.

Two conventions are known by the parameters:

    TRL   def f(prompts, completions, **columns) -> list[float | None]     once for a batch
    verl  def f(data_source, solution_str, ground_truth, extra_info) -> float   for each response

Either may be `async def`. This runs in the helper process (rlhf/rewards/process.py). No torch here.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import importlib.util
import inspect
import math
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from rlhf.base.errors import UserError
from rlhf.rewards.batch import Batch, last_text
from rlhf.verifiers import Scores

OF_THE_BATCH = ("prompts", "completions", "completion_ids", "trainer_state")
OF_VERL = {"solution_str", "ground_truth"}  # a function with both has verl's convention
OF_VERL_ALL = {*OF_VERL, "data_source", "extra_info"}
SEARCH_SECONDS = 5.0  # to find the row on which a function fails
LARGEST = 1e30  # of a score, whose weighted sum must be finite in fp32


@dataclass(frozen=True)
class RewardFunction:
    """A function with what its signature says."""

    call: Callable[..., Any]
    parameters: frozenset[str]  # by name; without *args and **kwargs
    required: frozenset[str]  # those without a default value
    takes_all: bool  # it has **kwargs
    is_async: bool
    kwargs: dict[str, Any] = field(default_factory=dict)  # from the configuration

    @property
    def is_verl(self) -> bool:
        return self.parameters >= OF_VERL

    @property
    def columns(self) -> set[str]:
        """The columns that a row must have, by name."""
        given = {*self.kwargs, *OF_THE_BATCH}
        # verl's are looked for in several places: see verl_arguments
        return set() if self.is_verl else set(self.required - given)


class CallError(Exception):
    """What a function did wrong: the text after "the function", and the row where it is known."""

    def __init__(
        self,
        what: str,
        row: int | None = None,
        error: BaseException | None = None,
        is_timeout: bool = False,
    ):
        super().__init__(what)
        self.row = row
        self.error = error  # what the function raised
        # about the whole call: to try its rows one by one would be in vain
        self.is_whole = is_timeout or isinstance(error, UserError)

    def is_like(self, other: CallError) -> bool:
        """Whether both are the same exception with the same message."""
        return type(self.error) is type(other.error) and message(self.error) == message(other.error)


# ------------------------------------------------------------------------------------ loading


def load_function(path: str, kwargs: dict[str, Any], key: str) -> RewardFunction:
    """Import "module:name" or "FILE.py:name".

    Args: kwargs: further arguments from the configuration.  key: begins the messages.
    Raises: UserError.
    """
    place, _, name = path.rpartition(":")
    try:
        module = import_by_name(place)
        function = getattr(module, name, None)
    except BaseException as error:
        raise UserError(f"{key}: cannot import {place}: {cause(error)}") from error
    if function is None:
        raise UserError(f"{key}: there is no {name} in {place}")
    if not callable(function):
        raise UserError(f"{key}: {name} is not a function")
    if inspect.isclass(function):
        raise UserError(f"{key}: {name} is a class: name a function, or an object of the class")
    try:
        signature = inspect.signature(function)
    except ValueError:
        raise UserError(f"{key}: {name} has no signature: wrap it in a python function") from None
    return read_signature(function, signature, kwargs, f"{key}: {name}")


def import_by_name(place: str) -> ModuleType:
    """A module by its name, or by the path of its file. One in the current directory comes first:
    it is that which the user means; other modules there do not stand for libraries."""
    if place.endswith(".py"):
        return import_file(Path(place))
    here = Path(f"{place}.py")
    return import_file(here) if here.is_file() else import_module(place)


def import_file(path: Path) -> ModuleType:
    """A file as a module, once. Its name is not that of the file: that may be a library's."""
    file = path.expanduser().resolve()
    name = f"reward file {file}"
    if name in sys.modules:
        return sys.modules[name]
    sys.path.append(str(file.parent))  # for the modules beside it
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def read_signature(
    function: Callable[..., Any], signature: inspect.Signature, kwargs: dict[str, Any], where: str
) -> RewardFunction:
    """Raises: UserError for a function that cannot be called with the names of a batch."""
    every = list(signature.parameters.values())
    by_name = [p for p in every if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in every)
    names = frozenset(p.name for p in by_name)
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in every) or not (
        takes_all or names & {"completions", "completion_ids"} or names >= OF_VERL
    ):
        raise UserError(
            f"{where} has the parameters ({', '.join(p.name for p in every)}), and gets lists by "
            "name: write def f(prompts, completions, **columns) -> list[float | None]"
        )
    if taken := sorted(kwargs.keys() & {*OF_THE_BATCH, "solution_str"}):
        raise UserError(
            f"{where}: kwargs have {taken[0]}, which is an argument of its own: drop it"
        )
    if not takes_all and (unknown := sorted(kwargs.keys() - names)):
        raise UserError(
            f"{where} has no parameter {unknown[0]}, which kwargs give; it has "
            f"{', '.join(sorted(names))}"
        )
    of_object: object = type(function).__call__  # async where the function is an object
    is_async = any(inspect.iscoroutinefunction(one) for one in (function, of_object))
    required = frozenset(p.name for p in by_name if p.default is p.empty)
    return RewardFunction(function, names, required, takes_all, is_async, kwargs)


# ------------------------------------------------------------------------------------ calling


def call_function(function: RewardFunction, batch: Batch) -> Scores:
    """The scores of a batch, None where the function does not apply. Raises: CallError."""
    row: int | None = None
    try:
        if function.is_verl:
            returned = []
            for row in range(len(batch)):
                returned.append(awaited(function.call(**verl_arguments(function, batch, row))))
        else:
            returned = awaited(function.call(**arguments(function, batch)))
    except BaseException as error:
        raise CallError(failed(error, batch, row), row, error) from error
    return check_values(function, returned, batch)


async def call_async(function: RewardFunction, batch: Batch, timeout: float) -> Scores:
    """As `call_function`, for one that is `async def`. Args: timeout: in seconds."""
    limit = asyncio.timeout(timeout)
    try:
        async with limit:
            if function.is_verl:
                rows = (verl_arguments(function, batch, row) for row in range(len(batch)))
                returned = await asyncio.gather(*(function.call(**row) for row in rows))
            else:
                returned = await function.call(**arguments(function, batch))
    except TimeoutError as error:
        if not limit.expired():  # one of its own
            raise CallError(failed(error, batch, None), None, error) from error
        raise CallError(too_late(timeout, len(batch)), is_timeout=True) from error
    except BaseException as error:
        raise CallError(failed(error, batch, None), None, error) from error
    return check_values(function, returned, batch)


@functools.cache
def event_loop() -> asyncio.Runner:
    """The event loop of all calls in this process: a client that a function keeps, with its
    connections, belongs to the loop in which it was first used."""
    return asyncio.Runner()


def awaited(returned: Any) -> Any:
    """What a function returned, also one that hides an `async def` in a plain function."""

    async def result() -> Any:
        return await returned

    return event_loop().run(result()) if inspect.isawaitable(returned) else returned


def failed(error: BaseException, batch: Batch, row: int | None) -> str:
    """What an exception did, for CallError."""
    on = f" on the completion {last_text(batch.completions[row])[:80]!r}" if row is not None else ""
    return f"failed{on}: {cause(error)}"


def too_late(timeout: float, rows: int) -> str:
    """What a function did that hangs, for CallError."""
    return f"gave no answer within {timeout:g} s (timeout) for {rows} completions"


def find_row(function: RewardFunction, batch: Batch, error: CallError) -> CallError:
    """The error with the first row on which the function fails alone in the same way; as it is
    where there is none, where looking for it takes too long, and where the first and the last row
    fail alike: then it is not about a row."""
    until = time.monotonic() + SEARCH_SECONDS

    def fails(row: int) -> bool:
        alone = batch.rows([row])
        try:
            if function.is_async:
                seconds = max(0.0, until - time.monotonic())
                event_loop().run(call_async(function, alone, seconds))
            else:
                call_function(function, alone)
        except CallError as found:
            return found.is_like(error)
        return False

    last = len(batch) - 1
    if last and fails(0) and fails(last):
        return error
    for row in range(len(batch)):
        if time.monotonic() > until:
            break
        if fails(row):
            text = last_text(batch.completions[row])[:80]
            what = str(error).replace("failed:", f"failed on the completion {text!r}:", 1)
            return CallError(what, row)
    return error


def arguments(function: RewardFunction, batch: Batch) -> dict[str, Any]:
    """The arguments that a function of TRL's convention names; all of them with **kwargs."""
    given: dict[str, Any] = {
        **batch.columns,
        "prompts": batch.prompts,
        "completions": batch.completions,
        "completion_ids": batch.completion_ids,
        "trainer_state": SimpleNamespace(**batch.trainer_state),
        **function.kwargs,
    }
    names = given.keys() if function.takes_all else given.keys() & function.parameters
    # a copy, as a function may change its lists, which others read
    return {name: copy.deepcopy(given[name]) for name in names}


def verl_arguments(function: RewardFunction, batch: Batch, row: int) -> dict[str, Any]:
    """The arguments of verl's compute_score for one response.

    The ground truth is the column ground_truth, else that inside reward_model, else answer.
    """
    columns = {name: values[row] for name, values in batch.columns.items()}
    inside = columns.get("reward_model")
    truths = (
        columns.get("ground_truth"),
        inside.get("ground_truth") if isinstance(inside, dict) else None,
        columns.get("answer"),
    )
    given: dict[str, Any] = {
        "extra_info": None,
        **columns,
        "data_source": columns.get("data_source") or "",
        "solution_str": last_text(batch.completions[row]),
        "ground_truth": next((truth for truth in truths if truth is not None), None),
        **function.kwargs,
    }
    # verl gives its four and those of the configuration; columns only where they are named
    names = {*function.parameters, *OF_VERL_ALL, *function.kwargs}
    if not function.takes_all:
        names &= function.parameters
    # a copy, as a function may change what others read
    return {name: copy.deepcopy(value) for name, value in given.items() if name in names}


def check_values(function: RewardFunction, returned: Any, batch: Batch) -> Scores:
    """What a function returned as numbers. Raises: CallError."""
    at = defined_at(function.call)
    values = returned
    if hasattr(returned, "tolist"):  # an array or a tensor
        with contextlib.suppress(Exception):
            values = returned.tolist()
    if not isinstance(values, list | tuple):
        raise CallError(f"returned {written(values)}, not a list of {len(batch)} scores{at}")
    if len(values) != len(batch):
        raise CallError(f"returned {len(values)} scores for {len(batch)} completions{at}")
    return [checked(value, batch, row, at) for row, value in enumerate(values)]


def checked(value: Any, batch: Batch, row: int, at: str) -> float | None:
    """One value as a finite number, or None."""
    if isinstance(value, dict):  # verl's functions may return more than the score
        value = value.get("score", value)
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except Exception:  # whatever float() of it raises
        number = math.nan
    if not abs(number) <= LARGEST:  # nor is NaN
        text = last_text(batch.completions[row])[:80]
        wanted = f"at most {LARGEST:g}" if math.isfinite(number) else "a finite number or None"
        what = f"returned {written(value)} for the completion {text!r}, not {wanted}{at}"
        raise CallError(what, row)
    return number


def written(value: Any) -> str:
    """The beginning of a value, for messages."""
    try:
        return f"{value!r:.80}"
    except Exception:  # whatever its own code raises
        return f"a {type(value).__name__}"


def message(error: BaseException | None) -> str:
    """What an exception says, in one line."""
    try:
        return " ".join(str(error).split())
    except Exception:  # whatever its own code raises
        return "(it cannot be written)"


def cause(error: BaseException) -> str:
    """An exception in one line; of the user's code with its type, and file and line."""
    if isinstance(error, UserError):  # of our own functions: a line already
        return str(error)
    what = f"{type(error).__name__}: {message(error)}"
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*libraries, "<")) and frame.filename != __file__
    ]
    return what + (f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else "")


def defined_at(function: Callable[..., Any]) -> str:
    """` (FILE:LINE)` of a function; empty for an object that can be called."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f" ({code.co_filename}:{code.co_firstlineno})" if code else ""

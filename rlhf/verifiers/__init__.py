r"""Verifiers: rewards for responses that can be checked, such as a sum, a format or a length.

Each is a reward function in TRL's convention: it gets a batch and returns a list of scores, one per
completion. In the configuration: `rl.rewards.right={function: "rlhf.verifiers:number"}`; further
parameters of a verifier go to `kwargs`.

`exact_match`, `number` and `math` compare with a reference. It is the row's `ground_truth`, else
its `answer`, else the `ground_truth` in its `reward_model` (verl's layout);
`kwargs: {column: NAME}` names another column. A reference may be a text, a number, a list of them
(any may match), or an object with the key `ground_truth`. A row without one gets None: the verifier
does not apply to it.

A completion is a text, or a list of messages whose contents are joined. No torch here; `math` alone
uses a library, math-verify.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf.verifiers.equality import are_equal
from rlhf.verifiers.final_answers import final_answer as final_answer
from rlhf.verifiers.final_answers import final_number

Message = dict[str, Any]  # {"role": ..., "content": ...}
Text = str | list[Message]  # of a prompt or a completion
Scores = list[float | None]
Reference = TypeVar("Reference")
Setting = TypeVar("Setting")

REFERENCES = ("ground_truth", "answer", "reward_model")  # columns, the first that a row has
NOT_COLUMNS = ("prompts", "completion_ids", "trainer_state")  # what else a function is given
LENGTH_UNITS = ("tokens", "characters")


# ------------------------------------------------------------------------------- with a reference


def exact_match(
    completions: Sequence[Text],
    ground_truth: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    column: str | None = None,
    **columns: Any,
) -> Scores:
    """1 where the completion is the reference, letter for letter; space around both is ignored.

    >>> exact_match(["Paris", " Paris\\n", "It is Paris"], answer=["Paris"] * 3)
    [1.0, 1.0, 0.0]
    """
    columns |= {"ground_truth": ground_truth, "answer": answer}
    references = references_of(len(completions), columns, column)
    return _compare(completions, references, str.strip, lambda text, truth: text.strip() == truth)


def number(
    completions: Sequence[Text],
    ground_truth: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    column: str | None = None,
    **columns: Any,
) -> Scores:
    r"""1 where the final answer of the completion is the number in the reference.

    The final answer is as in `final_answer`, in both. Numbers are compared exactly, as fractions:
    1,234.50 is 1234.5 and 2/4 is 0.5, but 0.33 is not 1/3. A dollar or percent sign and units do
    not count. None where the reference has no number.

    >>> number(["7+2=9. So 739.", "#### 1,000", "I think 5"], answer=["739", "... #### 1000", "6"])
    [1.0, 1.0, 0.0]
    >>> number([r"so \boxed{\frac{1}{2}} of it, not 3"], ground_truth=[0.5])
    [1.0]
    """
    columns |= {"ground_truth": ground_truth, "answer": answer}
    references = references_of(len(completions), columns, column)
    return _compare(completions, references, final_number, lambda t, n: final_number(t) == n)


def math(
    completions: Sequence[Text],
    ground_truth: Sequence[Any] | None = None,
    answer: Sequence[Any] | None = None,
    column: str | None = None,
    **columns: Any,
) -> Scores:
    r"""1 where the final answer of the completion is mathematically equal to the reference.

    The library math-verify finds the answer (in \boxed{} or $...$, else the last number) and
    compares it by SymPy: formulas, fractions, sets, intervals; numbers with 6 decimals. None where
    it finds nothing in the reference. 0 for an answer that takes longer than 2 s of CPU time to
    check, like 9^(9^9) (see rlhf/verifiers/equality.py). The first call takes seconds, as SymPy is
    imported.

    >>> math(["It is $2x(x+1)$.", r"\boxed{0.5}", "So 3."], ground_truth=["2x^2+2x", "1/2", "4"])
    [1.0, 1.0, 0.0]
    """
    columns |= {"ground_truth": ground_truth, "answer": answer}
    references = references_of(len(completions), columns, column)
    return are_equal(references, [text_of(completion) for completion in completions])


# ------------------------------------------------------------------------------ without a reference


def regex(completions: Sequence[Text], pattern: str, **columns: Any) -> Scores:
    r"""1 where Python's `re.search` finds the pattern. `^` and `$` are the ends of the completion.

    Raises: ValueError for a pattern that is none.

    >>> regex(["#### 42", "It is 42"], pattern=r"^#### -?\d+$")
    [1.0, 0.0]
    """
    if setting(pattern) is None:
        raise ValueError(
            "the data have a column pattern: give the pattern in kwargs: {pattern: ...}"
        )
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression (pattern={pattern}): {error}") from None
    return [float(bool(compiled.search(text_of(completion)))) for completion in completions]


def json_valid(
    completions: Sequence[Text], required_keys: Sequence[str] | None = None, **columns: Any
) -> Scores:
    """1 where the whole completion is JSON (RFC 8259: no NaN); with `required_keys`, an object that
    has them.

    >>> json_valid(['{"name": "Ada"}', '{"name": }', "[1]"])
    [1.0, 0.0, 1.0]
    >>> json_valid(['{"name": "Ada"}', '{"name": "Ada", "age": 36}'], required_keys=["age"])
    [0.0, 1.0]
    """

    def valid(text: str) -> bool:
        try:
            value = json.loads(text, parse_constant=_refuse, parse_int=str)
        except (ValueError, RecursionError):
            return False
        return not required_keys or (isinstance(value, dict) and value.keys() >= set(required_keys))

    return [float(valid(text_of(completion))) for completion in completions]


def think_format(completions: Sequence[Text], **columns: Any) -> Scores:
    """1 where the completion is <think>...</think> and then an answer, with each tag once.

    >>> think_format(["<think>3 + 4 = 7</think> 7", "<think>3 + 4 = 7</think>", "7"])
    [1.0, 0.0, 0.0]
    """

    def well_formed(text: str) -> bool:
        once = text.count("<think>") == text.count("</think>") == 1
        return once and bool(re.match(r"\s*<think>.*</think>\s*\S", text, re.DOTALL))

    return [float(well_formed(text_of(completion))) for completion in completions]


def length(
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]] | None = None,
    target: float | None = None,
    max: float | None = None,
    unit: str | None = None,
    **columns: Any,
) -> Scores:
    """A penalty for the length, from 0 (as wished) to -1; give `target` or `max`, in `unit`.

    With `target` it is -|length - target| / target. With `max` it is 0 up to `max`, and then
    -(length - max) / max. It is never below -1, which is reached at twice the length given.

    Args: unit: tokens (None is the same) or characters.
    Raises: ValueError without exactly one positive number, or for another unit.

    >>> length(["four", "four four"], target=8, unit="characters")
    [-0.5, -0.125]
    >>> length(["a", "b", "c"], completion_ids=[[5] * 3, [5] * 5, [5] * 20], max=4)
    [0.0, -0.25, -1.0]
    """
    target, max = setting(target), setting(max)
    unit = setting(unit) or "tokens"
    limit = target if max is None else max
    if limit is None or limit <= 0 or (target is not None and max is not None):
        raise ValueError(f"give either target or max above 0 (target={target}, max={max})")
    if unit not in LENGTH_UNITS:
        raise ValueError(f"no such unit (unit={unit}): it is {' or '.join(LENGTH_UNITS)}")
    if unit == "characters":
        lengths = [len(text_of(completion)) for completion in completions]
    elif completion_ids is None:
        raise ValueError("no completion_ids: unit=tokens needs them; unit=characters does not")
    else:
        lengths = [len(ids) for ids in completion_ids]
    excess = [n - limit if max is not None and n < limit else abs(n - limit) for n in lengths]
    return [0.0 - sorted((0.0, share / limit, 1.0))[1] for share in excess]  # no -0.0


def setting(value: Setting | None) -> Setting | None:
    """A setting; None where the data have a column of its name, whose values are a list."""
    return None if isinstance(value, list) else value


# ----------------------------------------------------------------------------- texts and references


def text_of(text: Text) -> str:
    """The text of a completion: itself, or the contents of its messages."""
    if isinstance(text, str):
        return text
    return "".join(message["content"] or "" for message in text)


def references_of(count: int, columns: dict[str, Any], column: str | None) -> list[list[str]]:
    """The references of each row; none for a row to which the verifier does not apply.

    Args:
        count: number of rows.
        columns: values by column, a list with one per row; None = the data have no such column.
        column: the only one to read; None = the first of REFERENCES that a row has.
    Raises: ValueError where the data have none of the columns, or an object cannot be read.
    """
    column = setting(column)
    names = (column,) if column else REFERENCES
    found = {name: columns[name] for name in names if columns.get(name) is not None}
    if not found:
        others = [n for n, v in columns.items() if v is not None and n not in NOT_COLUMNS]
        there = ", ".join(others) or "none"
        raise ValueError(
            f"the data have no column {' or '.join(names)} (they have {there}): name the one with "
            "the reference in kwargs: {column: NAME}"
        )
    rows = []
    for i in range(count):
        given = ((name, values[i]) for name, values in found.items() if values[i] is not None)
        name, value = next(given, ("", None))
        rows.append(reference_texts(value, name))
    return rows


def reference_texts(value: Any, name: str) -> list[str]:
    """The references in a column's value, as texts; none for None.

    Raises: ValueError naming the column, for an object without ground_truth.
    """
    if isinstance(value, dict):
        if "ground_truth" not in value:
            keys = ", ".join(value) or "none"
            raise ValueError(
                f"column {name} holds an object without ground_truth (it has {keys}): name the "
                "column with the reference in kwargs: {column: NAME}"
            )
        value = value["ground_truth"]
    values = value if isinstance(value, list | tuple) else [value]
    return [str(one) for one in values if one is not None]


def _compare(
    completions: Sequence[Text],
    references: Sequence[list[str]],
    read: Callable[[str], Reference | None],
    equal: Callable[[str, Reference], bool],
) -> Scores:
    """1 where any reference matches, else 0; None where there is none that can be read."""
    scores: Scores = []
    for completion, texts in zip(completions, references):
        truths = [truth for text in texts if (truth := read(text)) is not None]
        text = text_of(completion)
        scores.append(float(any(equal(text, truth) for truth in truths)) if truths else None)
    return scores


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")

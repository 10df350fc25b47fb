"""How a field of the schema says what it means."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

REQUIRED: Any = dataclasses.MISSING


def key(
    meaning: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    hashed: bool = True,
    default: Any = REQUIRED,
    factory: Any = REQUIRED,
) -> Any:
    """A field of the schema.

    Args:
        meaning: one sentence with the unit, and the source of the idea where there is one.
        above, at_least, below, at_most: the range of a number (each element of a list); null and
            infinity are outside every range, except null where the type allows it.
        hashed: False where the key cannot change the result of a run, so that it is not a part of
            the run's identity.
        default, factory: only where users add nodes by a name of their choice.
    """
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most}
    metadata = {"meaning": meaning, "hashed": hashed, **limits}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def placement(meaning: str, **limits: Any) -> Any:
    """A field that cannot change the result of a run."""
    return key(meaning, hashed=False, **limits)


def node_type(annotation: Any) -> Any:
    """The dataclass behind an annotation, also behind Optional and dict[str, ...]; else itself."""
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return node_type(inner[-1]) if inner else annotation

"""A built-in world on disk: made once, then read by every stage.

DIRECTORY/{sft,rm,ppo} are tables of the `datasets` library; evaluation.json has the small lists.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.checksums import damaged_files, write_sums
from rlhf.base.files import atomic_path
from rlhf.base.log import first_line, log
from rlhf.data.cache import cache_folder, digest, show_progress
from rlhf.data.records import Demonstration, Pair, Prompt, Turn

if TYPE_CHECKING:
    import datasets

TABLES = ("sft", "rm", "ppo")
LISTS = {
    "eval_sft": Demonstration,
    "eval_rm": Pair,
    "eval_probe": Pair,
    "eval_prompts": Prompt,
    "score_unit": Demonstration,
}


@dataclass(frozen=True)
class Records:
    """The records of a built-in world: training data as tables, evaluation data in memory."""

    sft: datasets.Dataset
    rm: datasets.Dataset
    ppo: datasets.Dataset
    eval_sft: list[Demonstration]
    eval_rm: list[Pair]
    eval_probe: list[Pair]
    eval_prompts: list[Prompt]
    score_unit: list[Demonstration]


def cached_records(make: Callable[[], Records], settings: str, package: Path) -> Records:
    """The records of a world, from the cache where it has them.

    Args: make: makes them.  settings: all that they depend on, but the code in `package`.
    """
    import datasets
    from filelock import FileLock

    code = [path.read_text(encoding="utf-8") for path in sorted(package.glob("*.py"))]
    here = [
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("records.py", "load.py")
    ]
    key = digest(
        settings, datasets.__version__, Path(__file__).read_text(encoding="utf-8"), *code, *here
    )
    folder = cache_folder() / f"world-{key}"
    with FileLock(f"{folder}.lock"):  # another process of this run may be making the same
        if folder.exists():
            try:
                return read(folder)
            except Exception as error:  # of many kinds: a file is missing, cut, or of another user
                log.warning(f"{folder}: cannot be read ({first_line(error)}); it is made again")
        with atomic_path(folder) as temporary:
            write(make(), temporary)
        return read(folder)


def write(records: Records, folder: Path) -> None:
    """Write the records of a world into a new folder."""
    show_progress(False)
    for name in TABLES:
        getattr(records, name).save_to_disk(folder / name)
    lists = {name: [asdict(one) for one in getattr(records, name)] for name in LISTS}
    (folder / "evaluation.json").write_text(json.dumps(lists), encoding="utf-8")
    write_sums(folder)


def read(folder: Path) -> Records:
    """Read what `write` has written. Raises: ValueError where it has changed since."""
    import datasets

    if damaged := damaged_files(folder):
        raise ValueError(f"{damaged[0]} has changed")
    tables = {name: datasets.load_from_disk(folder / name) for name in TABLES}
    lists = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return Records(
        **tables,
        **{name: [record_of(kind, row) for row in lists[name]] for name, kind in LISTS.items()},
    )


def record_of(kind: type[Any], row: dict[str, Any]) -> Any:
    """A record whose turns are dictionaries."""
    turns = "turns" if kind is Prompt else "prompt"
    return kind(**row | {turns: [Turn(**turn) for turn in row[turns]]})

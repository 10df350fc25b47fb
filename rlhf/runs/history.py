"""A run read from the disk, to be compared: status, settings, metrics. No torch here."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rlhf.base.errors import UserError
from rlhf.base.files import special_kind
from rlhf.base.log import first_line, valid_text
from rlhf.config.keys import find_key
from rlhf.config.loading import load_config
from rlhf.runs.command import Command
from rlhf.runs.directory import find_checkpoints, read_summary
from rlhf.runs.failures import read_failures
from rlhf.runs.identity import settings_to_record
from rlhf.runs.locks import is_locked
from rlhf.runs.metrics import Metrics, read_metrics
from rlhf.runs.newest import Newest
from rlhf.runs.run_files import AGAIN, PARENTS, SUMMARY, read_file
from rlhf.runs.stage_views import view_of

HASHED_NAME = re.compile(r"-[0-9a-f]{8}$")  # as train.py names a run directory
# metrics that are drawn against each other, besides those of a stage's panels
OF_FRONTIER = ("objective/kl", "objective/scores", "reward/gold/mean", "eval/*")

# what reading a damaged config.yaml raises
UNREADABLE = (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException)


class Description(NamedTuple):
    """What the files of a run say of it."""

    stage: str
    settings: dict[str, Any]
    metrics: dict[str, float]
    parents: dict[str, str]
    id: str


# a page that follows runs reads them every few seconds
DESCRIPTIONS: Newest[Description] = Newest()
ROWS: Newest[Metrics] = Newest()


@dataclass
class Run:
    """One run, read from its directory."""

    path: Path
    stage: str  # "" where it is unknown: a job without a run, an unreadable run
    status: str  # finished, running, stopped, failed: why, unreadable: file and fix
    # all that decides its result, by dotted key; empty where it is unknown
    settings: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # final ones
    parents: dict[str, str] = field(default_factory=dict)
    id: str = ""
    sweeps: list[str] = field(default_factory=list)  # folders below multirun/ that it is a job of
    earlier_version: bool = False  # its keys are not those of today; `settings` then is empty
    copies: list[Path] = field(default_factory=list)  # directories with the same id; not counted

    @functools.cached_property
    def rows(self) -> Metrics:
        """The metrics of each step, as far as a report shows them; read when they are asked for."""
        return read_shown(self.path / "metrics.jsonl", self.stage)

    @property
    def damage(self) -> list[str]:
        """What is skipped of the run, a line each."""
        return self.named_copies + self.rows.damage

    @property
    def named_copies(self) -> list[str]:
        """A line for each copy of the run's directory."""
        same = f"is a copy of {self.name} (summary.json has the same id): counted once"
        return [f"{copy}: {same}" for copy in self.copies]

    @property
    def status_text(self) -> str:
        """The status, and that a run was made by an earlier version."""
        return self.status + (", made by an earlier version" if self.earlier_version else "")

    @property
    def is_unreadable(self) -> bool:
        """Whether it is so damaged that only its directory is known."""
        return self.status.startswith("unreadable:")

    @property
    def kind(self) -> str:
        """Kind of the runs that it is compared with; "" for a job without a run."""
        return view_of(self.stage).kind if self.stage else ""

    @property
    def name(self) -> str:
        """Its directory's name, as text: a page cannot have what is not UTF-8."""
        is_attempt = self.path.parent.name == "attempts"
        return valid_text("/".join(self.path.parts[-3:]) if is_attempt else self.path.name)

    @property
    def short_name(self) -> str:
        """Stage and hash of the name: ppo-1d89f312; the name where it has no hash."""
        name, *attempt = self.name.split("/", 1)
        found = HASHED_NAME.search(name)
        short = self.stage + found.group() if found and self.stage else name
        return "/".join([short, *attempt])


def read_run(path: Path) -> Run:
    """Read a run directory. One that is damaged has the status `unreadable`, with file and fix."""
    try:
        return read_sound_run(path)
    except UserError as error:
        return Run(path, "", f"unreadable: {error}")
    except OSError as error:
        return Run(path, "", f"unreadable: {error.filename or path}: {first_line(error)}")


def read_sound_run(path: Path) -> Run:
    """Read a run directory. Raises: UserError and OSError that name the file that is damaged."""
    for file in path.iterdir():
        if kind := special_kind(file):  # reading it would wait, or never end
            raise UserError(f"{file}: this is {kind}, not a file: remove it")
    files = [path / name for name in (SUMMARY, "config.yaml", PARENTS)]
    known = DESCRIPTIONS.get(path, files, lambda: describe_run(path))
    return Run(
        path,
        known.stage,
        run_status(path),
        dict(known.settings),
        known.metrics,
        known.parents,
        known.id,
        earlier_version=not known.settings,
    )


def describe_run(path: Path) -> Description:
    """What the files of a run say of it. Raises: UserError that names the file that is damaged."""
    summary: Any = read_summary(path) or {}
    stage = summary.get("stage") or stage_of(path / "config.yaml")
    return Description(
        stage,
        known_settings(path, summary, stage),
        summary.get("metrics", {}),
        summary.get("parents") or read_file(path, PARENTS) or {},
        summary.get("id", ""),
    )


def stage_of(file: Path) -> str:
    """The stage that a config.yaml names. Raises: UserError where it cannot be read."""
    try:
        stage = OmegaConf.select(OmegaConf.load(file), "stage.name")
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}): {AGAIN}") from None
    if not isinstance(stage, str):
        raise UserError(f"{file}: cannot be read (it has no stage.name): {AGAIN}")
    return stage


def known_settings(path: Path, summary: dict[str, Any], stage: str) -> dict[str, Any]:
    """The settings of a run; empty for one that was made by an earlier version with other keys."""
    settings: dict[str, Any] = summary.get("settings", {})
    if settings:
        return settings if all(is_known_setting(key, stage) for key in settings) else {}
    with contextlib.suppress(UserError, KeyError, *UNREADABLE):
        cfg = load_config(path / "config.yaml")
        return settings_to_record(Command(cfg, cfg, []), stage)
    return {}


def is_known_setting(key: str, stage: str) -> bool:
    """Whether this version has a key of a run's settings. In those of eval, the keys of an
    algorithm that it is trained from stand below the algorithm's name: ppo.lr for rl.lr."""
    if find_key(key):
        return True
    return stage == "eval" and find_key(f"rl.{key.partition('.')[2]}") is not None


def read_shown(file: Path, stage: str) -> Metrics:
    """The metrics of each step that the curves of a stage show. What is damaged is in `damage`."""
    view = view_of(stage)
    names = [name for panel in view.panels for name in panel.metrics]
    shown = re.compile("|".join(map(fnmatch.translate, [*names, *OF_FRONTIER])))
    try:
        return ROWS.get(
            file, [file], lambda: read_metrics(file, lambda name: shown.match(name) is not None)
        )
    except OSError as error:
        return Metrics(damage=[f"{file}: cannot be read ({error.strerror}): it has no curves"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file of texts, such as samples.jsonl; none where there is no file, a
    half-written or damaged row is skipped."""
    if not path.exists():
        return []
    rows = []
    # not splitlines: texts may contain other line ends
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def run_status(path: Path) -> str:
    """finished, running (another process holds its lock), failed: why, or stopped: where."""
    if (path / SUMMARY).exists():
        return "finished"
    if is_locked(path):
        return "running"
    for failure in read_failures(path):
        return f"failed: {failure.cause}"
    intact, _ = find_checkpoints(path)
    return f"stopped, resumes after step {intact[0][1]['step']}" if intact else "stopped"

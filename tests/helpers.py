"""What test files share: the command line as a user calls it, and what its runs leave."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from rlhf import arguments, compose
from rlhf.config import presets
from rlhf.config.schema import Config
from rlhf.config.stage_nodes import Rl
from rlhf.runs.command import Command

REPO = Path(__file__).parents[1]
CONF = REPO / "conf"
TRAIN = shlex.quote(str(REPO / "train.py"))  # as a command for the shell names it
VLLM = Path(os.environ.get("RLHF_VLLM", REPO / ".venv-vllm" / "bin" / "vllm"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
PRESETS = sorted(path.stem for path in (CONF / "rl").glob("*.yaml"))  # of online RL
STAGES = sorted([*(path.stem for path in (CONF / "stage").glob("*.yaml")), *PRESETS])
# a pipeline of seconds: everything real, only few and small
SMALL = [
    "data.sandbox.demonstrations=64",
    "data.sandbox.pairs=64",
    "data.eval_rows=16",
    "sft.max_steps=3",
    "rm.max_steps=3",
    "rl.max_steps=2",
    "rl.batch_size=16",
    "rollout.max_new_tokens=16",
    "wandb.mode=disabled",
    "deploy.threads=1",  # other tests run beside it
]


# an SFT run that lasts long enough to be stopped
SLOW = [
    "stage=sft",
    "deterministic=true",
    *SMALL,
    "sft.max_steps=30",
    "sft.epochs=100",
    "sft.batch_size=8",
    "checkpoint.every_steps=2",
]


# as the README has it
SWEEP = "python train.py -m rl.kl.coef=0.02,0.1 seed=1,2 experiment_name=kl_study"


def train(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python train.py args` in `cwd`."""
    command = [sys.executable, str(REPO / "train.py"), *args]
    plain = {
        name: value for name, value in os.environ.items() if name != "RANK"
    }  # which tests with engines of their own set
    return subprocess.run(
        command, cwd=cwd, env=plain | env, capture_output=True, text=True, timeout=1500
    )


def page_commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def runs_in(root: Path) -> dict[str, list[Path]]:
    """Run directories below root/outputs by stage."""
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((root / "outputs").iterdir()):
        found[path.name.split("-")[0]].append(path)
    return found


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def found(run: Path) -> dict[str, Any]:
    return json.loads((run / "eval.json").read_text())


@dataclass
class Demo:
    root: Path
    seconds: float
    stdout: str
    stderr: str
    sft: Path
    rm: Path
    ppo: Path


def composed(*overrides: str) -> Config:
    """The configuration of a command line, checked for unknown keys only."""
    return copy.deepcopy(compose_once(os.environ.get("RLHF_ROOT"), *overrides))


@functools.cache
def compose_once(root: str | None, *overrides: str) -> Config:
    """root: which the configuration reads."""
    typed = [arguments.allow_user_names(arg) for arg in overrides]
    values = [arg for arg in typed if "." in arg.split("=")[0] and "@" not in arg.split("=")[0]]
    node = copy.deepcopy(compose_options(root, *(arg for arg in typed if arg not in values)))
    parsed = OverridesParser.create().parse_overrides(values)
    ConfigLoaderImpl._apply_overrides_to_config(parsed, node)
    return compose.typed_config(node)


@functools.cache
def compose_options(root: str | None, *choices: str) -> DictConfig:
    """Choosing options takes most of Hydra's time. It sets values of keys after that; so do we."""
    register()
    return compose.compose_alone(choices, [])


def register(folders: Sequence[Path] = ()) -> None:
    """compose.register, which reads conf/ only once in a test process."""
    if folders:
        compose.register(folders)
    else:
        register_own()
        presets.config_dirs[:] = [CONF]


@functools.cache
def register_own() -> None:
    compose.register()


def write_option(folder: Path, option: str, text: str) -> None:
    """An option file of the user. Args: option: group/name."""
    file = folder / f"{option}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def some(cases: Iterable[Any], every: int) -> list[Any]:
    """Cases for parametrize: every n-th one in the quick tests, the others in make test-all."""
    return [
        pytest.param(*case, marks=[] if i % every == 0 else pytest.mark.full)
        for i, case in enumerate(case if isinstance(case, tuple) else (case,) for case in cases)
    ]


def rl_node(**values: Any) -> Rl:
    """The rl node of stage=ppo with some fields changed."""
    return dataclasses.replace(composed("stage=ppo").rl, **values)


def command(*overrides: str, folders: Sequence[Path] = ()) -> Command:
    """What `python train.py OVERRIDES` would run. Args: folders: the user's, with option files.

    Raises: UserError as the command line does.
    """
    register(folders)
    typed = [arguments.allow_user_names(arg) for arg in overrides]
    return compose.make_command(compose.compose_again(typed), typed)


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def running(
    *args: str, cwd: Path, until: int = 3, stage: str = "sft", **options: object
) -> tuple[subprocess.Popen, Path]:
    """train.py, when a stage of it has made some steps; and the run's directory."""
    parent = subprocess.Popen(
        [sys.executable, str(REPO / "train.py"), *args],
        cwd=cwd,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        **options,
    )
    deadline = time.time() + 120
    while True:
        found = [
            path for path in cwd.glob(f"outputs/{stage}-*/metrics.jsonl") if lines(path) >= until
        ]
        if found:
            return parent, found[0].parent
        assert time.time() < deadline and parent.poll() is None, parent.stderr
        time.sleep(0.01)


def read_offline_run(run: Path, *flags: str) -> str:
    """What W&B's own reader prints of the offline run of a run directory."""
    (directory,) = (run / "wandb").glob("offline-run-*")
    wandb = Path(sys.executable).parent / "wandb"
    done = subprocess.run(
        [wandb, "leet", "inspect", *flags, "--json", str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def undocumented(names: set[str]) -> list[str]:
    """Metrics that stand in none of the pages that explain them."""
    page = "".join((REPO / "docs" / name).read_text() for name in ("wandb.md", "ppo.md"))
    missing = []
    for name in names - {"step", "time"}:
        short = (
            "`_" + name.rsplit("_", 1)[-1] + "`"
        )  # families are written `objective/scores`, `_std`
        families = ("timing_s/", "reward/difficulty/")
        family = next((f"`{f}*`" for f in families if name.startswith(f)), f"`{name}`")
        if family not in page and not (short in page and f"`{name.rsplit('_', 1)[0]}`" in page):
            missing.append(name)
    return missing

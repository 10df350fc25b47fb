"""Shared by all tests: the command line as a user calls it, and one full run of the pipeline that many tests look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# a pipeline of seconds: everything real, only few and small
SMALL = [
    "data.sandbox.demonstrations=64",
    "data.sandbox.pairs=64",
    "data.eval_rows=16",
    "sft.max_steps=3",
    "rm.max_steps=3",
    "ppo.max_steps=2",
    "ppo.batch_size=16",
    "rollout.max_new_tokens=16",
    "wandb.mode=disabled",
]


def train(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python train.py args` in `cwd`."""
    command = [sys.executable, str(REPO / "train.py"), *args]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=1500)


def runs_in(root: Path) -> dict[str, list[Path]]:
    """Run directories below root/outputs by stage."""
    found: dict[str, list[Path]] = {"sft": [], "rm": [], "ppo": []}
    for path in sorted((root / "outputs").iterdir()):
        found[path.name.split("-")[0]].append(path)
    return found


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Demo:
    root: Path
    seconds: float
    stdout: str
    stderr: str
    sft: Path
    rm: Path
    ppo: Path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """`python train.py`, whole, called from a directory that is not the repository; W&B offline, and one thread because other
    tests run beside it."""
    root = tmp_path_factory.mktemp("demo")
    started = time.time()
    done = train("deploy.threads=1", cwd=root, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    runs = runs_in(root)
    return Demo(root, time.time() - started, done.stdout, done.stderr, runs["sft"][0], runs["rm"][0], runs["ppo"][0])


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first. What looks at one training run stays in one of the parallel processes, so that it is made once."""

    def cost(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", [])
        slow = item.path.name in ("test_stages.py", "test_sweep.py", "test_docs.py", "test_gold.py")
        return 2 * ("demo" in names) + slow

    items.sort(key=cost)
    for item in items:
        for shared in ("demo", "alone"):
            if shared in getattr(item, "fixturenames", []):
                item.add_marker(pytest.mark.xdist_group(shared))

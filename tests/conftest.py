"""Shared by all tests: the command line as a user calls it, and one full run of the pipeline that many tests look at."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import REPO, Demo, runs_in

DEMO = pytest.StashKey[subprocess.Popen]()


def demo_root(config: pytest.Config) -> Path:
    """Where the demo runs: one place for all parallel test processes."""
    base = config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "demo"


RUN_DEMO = """
import json, os, subprocess, sys, time
started = time.time()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
result = {"code": done.returncode, "stdout": done.stdout, "stderr": done.stderr, "seconds": time.time() - started}
open("result.tmp", "w").write(json.dumps(result))
os.rename("result.tmp", "result.json")
"""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start `python train.py` at once where a test wants its result, so that it is done by the time of those tests."""
    root = demo_root(session.config)
    if (
        any("demo" in getattr(item, "fixturenames", []) for item in session.items)
        and not session.config.option.collectonly
    ):
        with contextlib.suppress(FileExistsError):  # another test process has started it
            root.mkdir()
            command = [
                sys.executable,
                "-c",
                RUN_DEMO,
                sys.executable,
                str(REPO / "train.py"),
                "deploy.threads=1",
            ]
            environment = os.environ | {"WANDB_MODE": "offline"}
            session.config.stash[DEMO] = subprocess.Popen(
                command, cwd=root, env=environment, start_new_session=True
            )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    process = session.config.stash.get(DEMO, None)
    if (
        process and process.poll() is None and exitstatus == pytest.ExitCode.INTERRUPTED
    ):  # else another process still waits for it
        os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="session")
def demo(pytestconfig: pytest.Config) -> Demo:
    """`python train.py`, whole, called from a directory that is not the repository; W&B offline, and one thread because other
    tests run beside it."""
    root = demo_root(pytestconfig)
    deadline = time.time() + 1500
    while not (root / "result.json").exists() and time.time() < deadline:
        time.sleep(0.2)
    done = json.loads((root / "result.json").read_text())
    assert done["code"] == 0, done["stderr"]
    runs = runs_in(root)
    return Demo(
        root,
        done["seconds"],
        done["stdout"],
        done["stderr"],
        runs["sft"][0],
        runs["rm"][0],
        runs["ppo"][0],
    )


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of one for the engines. It stays: DeepSpeed cannot join twice in a process. The environment does not."""
    import torch

    from rlhf.distributed.engine import init_distributed

    values = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        if not torch.distributed.is_initialized():
            patch.setenv("MASTER_PORT", "0")  # any free one
            init_distributed()
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """That of the built-in model."""
    from rlhf.models.loading import load_tokenizer

    return load_tokenizer("builtin:tiny")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The directory of a random base model of a family."""
    from families import save_base

    root = tmp_path_factory.mktemp("base")

    def directory(family: str) -> str:
        if not (root / family).exists():
            save_base(root / family, family)
        return str(root / family)

    return directory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first: those that need the whole pipeline, and those that start training themselves, come last."""
    tiers = ["unit", "integration", "learning"]

    def cost(item: pytest.Item) -> tuple[bool, int]:
        return "demo" in getattr(item, "fixturenames", []), tiers.index(item.path.parent.name)

    items.sort(key=cost)

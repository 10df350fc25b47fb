"""Shared by all tests: the command line as a user calls it, and one full run of the pipeline that
many tests read."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from helpers import REPO, Demo, runs_in

from rlhf.base.files import atomic_path
from rlhf.runs.environment import SPIN_NAMES

# Tests run side by side, so their threads must not spin. Torch reads this when it is imported.
if not set(SPIN_NAMES) & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "passive"

# Commands of the tests buffer their output, as a user's do.
os.environ.pop("PYTHONUNBUFFERED", None)

# A shell starts what it puts into the background with Ctrl-C ignored, and commands that the tests
# start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, which its parallel processes share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def wants_demo(item: pytest.Item) -> bool:
    return "demo" in getattr(item, "fixturenames", [])


def finish_demo(process: subprocess.Popen[str], root: Path, lock: FileLock) -> None:
    """Wait for the demo; write down how it ended, in one step; let the others have it."""
    started = time.time()
    stdout, stderr = process.communicate()
    result = {"code": process.returncode, "stdout": stdout, "stderr": stderr}
    with atomic_path(root / "result.json") as file:
        file.write_text(json.dumps(result | {"seconds": time.time() - started}))
    lock.release()


@pytest.fixture(scope="session", autouse=True)
def demo_root(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Where `python train.py` runs, for all parallel test processes.

    The first of them starts it at once and in the background if any test wants it, so that it has
    finished by the time of those tests.
    """
    root = shared_folder(tmp_path_factory) / "demo"
    root.mkdir(exist_ok=True)
    lock = FileLock(root / "lock", thread_local=False)
    started = False
    if any(wants_demo(item) for item in request.session.items):
        with contextlib.suppress(Timeout):  # another test process runs it
            lock.acquire(timeout=0)
            started = not (root / "result.json").exists()
    if not started:
        lock.release()
        yield root
        return
    command = [sys.executable, str(REPO / "train.py"), "deploy.threads=1"]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=os.environ | {"WANDB_MODE": "offline"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    waiting = threading.Thread(target=finish_demo, args=(process, root, lock))
    waiting.start()
    yield root
    if request.session.shouldfail:  # after a failure with -x nobody wants it any more
        process.terminate()
    waiting.join()


@pytest.fixture(scope="session")
def demo(demo_root: Path) -> Demo:
    """The full `python train.py`, called from a directory that is not the repository.

    W&B is offline, and there is one thread because other tests run at the same time.
    """
    with FileLock(demo_root / "lock", timeout=1500):
        done = json.loads((demo_root / "result.json").read_text())
    assert done["code"] == 0, done["stderr"]
    runs = runs_in(demo_root)
    return Demo(
        demo_root,
        done["seconds"],
        done["stdout"],
        done["stderr"],
        runs["sft"][0],
        runs["rm"][0],
        runs["ppo"][0],
    )


@pytest.fixture(scope="session")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of sft and rm that short runs start from (worker_runs.FIVE_STEPS), trained once for
    all parallel test processes; nobody writes into them."""
    from worker_runs import prepare, work

    root = shared_folder(tmp_path_factory) / "parents"
    runs = {stage: root / f"up-{stage}" for stage in ("sft", "rm")}
    with FileLock(f"{root}.lock", timeout=600):
        if not (runs["rm"] / "result.json").exists():  # written last
            shutil.rmtree(root, ignore_errors=True)  # of a process that failed
            root.mkdir()
            work([prepare(root, "up", stage, {}, []) for stage in runs], 1)
    return runs


@pytest.fixture(scope="session")
def inputs(parents: dict[str, Path]) -> dict[str, str]:
    """The models of `parents`, as a run's inputs."""
    return {stage: str(run / "model") for stage, run in parents.items()}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of one for the engines.

    It stays, as DeepSpeed cannot join twice in a process; the environment variables do not.
    """
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


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was() -> Iterator[None]:
    """DeepSpeed's ZeRO 3 replaces torch's linear function for as long as the process lives."""
    yield
    if torch := sys.modules.get("torch"):
        torch.nn.functional.linear = torch._C._nn.linear


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
    """Quick tests first.

    Parallel test processes get one file after the other. There the long files are first, so that
    all end at about the same time. Files that wait for the demo come after others of their tier.
    """
    tiers = ["unit", "pretend", "integration", "learning", "gpu", "chaos"]
    if "PYTEST_XDIST_WORKER" in os.environ:
        tiers = ["chaos", "gpu", "integration", "learning", "pretend", "unit"]
    waiting = {item.path for item in items if wants_demo(item)}

    def place(item: pytest.Item) -> tuple[int, bool, bool]:
        tier = tiers.index(item.path.parent.name)
        return tier, item.path in waiting, wants_demo(item)

    items.sort(key=place)

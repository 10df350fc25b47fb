"""Worker processes: how they are placed on one node and on several, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, composed

from rlhf.base.errors import UserError
from rlhf.base.processors import processors
from rlhf.runs import environment, launch
from rlhf.runs.directory import config_for_stage
from rlhf.runs.environment import thread_settings, worker_environments
from rlhf.runs.failures import WorkerError


def test_places_number_all_processes_of_all_nodes() -> None:
    cfg = composed(
        "deploy=multi_node",
        "deploy.nodes=3",
        "deploy.processes_per_node=2",
        "deploy.node_rank=1",
        "deploy.master=head:1234",
    )
    there = worker_environments(cfg)
    assert [(p["RANK"], p["LOCAL_RANK"]) for p in there] == [("2", "0"), ("3", "1")]
    assert {(p["WORLD_SIZE"], p["MASTER_ADDR"], p["MASTER_PORT"]) for p in there} == {
        ("6", "head", "1234")
    }
    assert there[0]["DS_ACCELERATOR"] == "cuda"
    assert there[0]["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    (alone,) = worker_environments(composed())
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"], alone["DS_ACCELERATOR"]) == (
        "0",
        "1",
        "127.0.0.1",
        "cpu",
    )


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_of_a_gpu_is_as_the_user_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    (place,) = worker_environments(composed("deploy=single_gpu"))
    assert "PYTORCH_ALLOC_CONF" not in place


def test_two_runs_of_a_hostfile_have_other_ports(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    cfg = composed("deploy=multi_node", f"deploy.hostfile={tmp_path}/hosts")
    commands = [launch.launcher_command(tmp_path, cfg) for _ in range(2)]
    ports = [command[command.index("--master_port") + 1] for command in commands]
    assert ports[0] != ports[1] and "29500" not in ports
    cfg.deploy.master = "head:1234"
    assert launch.launcher_command(tmp_path, cfg)[-6:-4] == ["--master_port", "1234"]


def test_workers_keep_freed_memory_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    there = worker_environments(composed("deploy.processes_per_node=2"))
    assert all(names <= place.keys() for place in there)
    assert all(int(there[0][name]) >= 2**30 for name in names if name.startswith("MALLOC"))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    (place,) = worker_environments(composed())
    assert names & place.keys() == names - {"MALLOC_MMAP_THRESHOLD_"}, "what the user has set stays"


def test_the_cause_is_who_was_killed_or_who_failed_first(tmp_path: Path) -> None:
    assert launch.first_failure({"rank 3": 1}, tmp_path) == "rank 3: exit code 1"
    for rank, age in ((0, 5), (2, 9)):
        message = tmp_path / f"error-rank{rank}.txt"
        message.write_text(f"rank {rank}: ValueError: no\n\nTraceback ...")
        os.utime(message, (time.time() - age,) * 2)
    assert launch.first_failure({"rank 0": 1}, tmp_path) == "rank 2: ValueError: no"
    assert (
        launch.first_failure({"rank 0": 1, "rank 1": -signal.SIGSEGV}, tmp_path)
        == "rank 1: killed by SIGSEGV"
    )


@pytest.mark.parametrize(
    "overrides, hosts, expected",
    [
        (
            ["deploy.nodes=2"],
            None,
            "deploy.nodes=2: how are they reached? Give deploy.hostfile=FILE",
        ),
        (
            ["deploy.nodes=2", "deploy.hostfile=hosts"],
            None,
            "hosts: no such file; it needs a line per node: HOST slots=1",
        ),
        (
            ["deploy.nodes=2", "deploy.hostfile=hosts"],
            "a slots=8\n# b slots=8\n",
            "1 node, 1 with enough slots, for deploy.nodes=2",
        ),
        (
            ["deploy.nodes=2", "deploy.processes_per_node=4", "deploy.hostfile=hosts"],
            "a slots=8\nb slots=2\n",
            "2 nodes, 1 with enough slots",
        ),
        (
            ["deploy=single_node", "deploy.processes_per_node=64"],
            None,
            "deploy.processes_per_node=64, but this machine shows",
        ),
    ],
)
def test_machines_that_are_not_there_are_refused(
    overrides: list, hosts: str | None, expected: str, tmp_path: Path
) -> None:
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    overrides = [arg.replace("=hosts", f"={tmp_path}/hosts") for arg in overrides]
    with pytest.raises(UserError) as error:
        launch.check_machines(composed(*overrides))
    assert expected in str(error.value)


def test_without_pdsh_a_hostfile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing is installed there
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    with pytest.raises(UserError, match="pdsh, which is not installed"):
        launch.check_machines(composed("deploy.nodes=2", f"deploy.hostfile={tmp_path}/hosts"))


FAILING_WORKER = """
import os, pathlib, sys
from rlhf.base.errors import UserError
from rlhf.runs.failures import write_failure
try:
    raise {error}
except Exception as error:
    write_failure(pathlib.Path(sys.argv[1]), os.environ["RANK"], error)
    os._exit(1)
"""


@pytest.mark.parametrize(
    "error, kind, message",
    [
        ("UserError('sft.lr=9: lower it')", UserError, "sft: sft.lr=9: lower it"),
        ("KeyError('x')", WorkerError, "sft failed, rank 0: KeyError: 'x'; the traceback is in "),
    ],
)
def test_a_users_error_in_a_worker_is_raised_as_it_is_and_a_bug_names_the_log(
    error: str,
    kind: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "a_worker.py").write_text(FAILING_WORKER.format(error=error))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{REPO}")
    monkeypatch.setattr(launch, "WORKER", "a_worker")
    cfg = config_for_stage(composed("stage=sft"), "sft", {})
    with pytest.raises(kind) as raised:
        launch.run_workers(tmp_path, cfg)
    assert str(raised.value).startswith(message)
    assert ("train.log" in str(raised.value)) == (kind is WorkerError)


@pytest.mark.parametrize(
    "codes, outcome",
    [
        ((75, 75), KeyboardInterrupt),
        ((75, 1), WorkerError),
        ((0, 1), WorkerError),
        ((0, 0), None),
    ],
)
def test_workers_that_were_asked_to_stop_on_another_node_end_the_command(
    codes: tuple[int, int],
    outcome: type[BaseException] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They end with a code of their own; nobody asked this process. A failure beside it is told."""
    (tmp_path / "a_worker.py").write_text(
        f"import os\nos._exit({list(codes)}[int(os.environ['RANK'])])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "WORKER", "a_worker")
    (tmp_path / "result.json").write_text("{}")
    if outcome is None:
        assert launch.run_workers(tmp_path, composed("deploy.processes_per_node=2")) is False
    else:
        with pytest.raises(outcome):
            launch.run_workers(tmp_path, composed("deploy.processes_per_node=2"))


@pytest.fixture
def no_spin_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings of libgomp."""
    for name in environment.SPIN_NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "threads, processes, busy, expected",
    [
        (1, 1, 9.0, None),  # one thread waits for nobody
        (1, 8, 9.0, None),
        (4, 1, 0.0, environment.SPIN_IDLE),
        (4, 1, 0.3, environment.SPIN_IDLE),
        (4, 1, 1.0, environment.SPIN_BUSY),
        (2, 1, 2.0, environment.SPIN_IDLE),
        (2, 2, 1.0, environment.SPIN_BUSY),
        (8, 1, 0.0, environment.SPIN_BUSY),
    ],
)
def test_threads_spin_for_long_if_each_has_a_processor(
    threads: int,
    processes: int,
    busy: float,
    expected: str | None,
    no_spin_settings: pytest.MonkeyPatch,
) -> None:
    no_spin_settings.setattr(environment, "processors", lambda: [0, 1, 2, 3])
    no_spin_settings.setattr(environment, "busy_processors", lambda: busy)
    wanted = {} if expected is None else {"GOMP_SPINCOUNT": expected}
    assert thread_settings(threads, processes) == wanted
    for name, value in (("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            assert thread_settings(threads, processes) == {}, "the user's setting stays"


def test_busy_processors_are_counted() -> None:
    """One process that never sleeps, besides all others on this machine."""
    code = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as spin:
        assert spin.stdout
        spin.stdout.readline()  # it has started
        busy = environment.busy_processors(0.2)
        spin.kill()
    assert 0.2 < busy <= len(processors()) + 0.2


@pytest.mark.parametrize("busy", [0.0, 99.0])
def test_workers_get_the_thread_settings(busy: float, no_spin_settings: pytest.MonkeyPatch) -> None:
    no_spin_settings.setattr(environment, "processors", lambda: [0, 1])
    no_spin_settings.setattr(environment, "busy_processors", lambda: busy)
    wanted = environment.SPIN_BUSY if busy else environment.SPIN_IDLE
    (worker,) = worker_environments(composed("deploy.threads=2"))
    assert worker["GOMP_SPINCOUNT"] == wanted
    (worker,) = worker_environments(composed("deploy.threads=1"))
    assert "GOMP_SPINCOUNT" not in worker

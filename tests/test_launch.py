"""Worker processes: how they are placed on one node and on several, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, SMALL, metrics, runs_in, train
from test_config import composed

from rlhf.config.loading import save_config
from rlhf.config.schema import Stage
from rlhf.runs import launch
from rlhf.runs.directory import config_for_stage

SFT = ["stage=sft", *SMALL, "deploy.zero_stage=3", "sft.adam_eps=1e-5"]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SFT in one process."""
    root = tmp_path_factory.mktemp("one_node")
    done = train(*SFT, cwd=root)
    assert done.returncode == 0, done.stderr
    return runs_in(root)["sft"][0]


def same_losses(one: Path, two: Path) -> None:
    rows, others = metrics(one), metrics(two)
    assert [row["loss"] for row in others] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    assert len(rows) == 3


@pytest.mark.full
def test_two_nodes_started_by_hand_are_one_run(one_node: Path, tmp_path: Path) -> None:
    """The same command on both, each with its number; the second one comes first, and waits."""
    nodes = [*SFT, "deploy.nodes=2", f"deploy.master=127.0.0.1:{launch.free_port()}"]
    command = [sys.executable, str(REPO / "train.py"), *nodes]
    second = subprocess.Popen(
        [*command, "deploy.node_rank=1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    time.sleep(2)
    first = train(*nodes, "deploy.node_rank=0", cwd=tmp_path)
    said = second.communicate(timeout=60)[1]
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + said
    assert said.startswith("sft: node 1 of 2")
    (run,) = runs_in(tmp_path)["sft"]
    assert run.name == one_node.name  # where it ran is not part of a run's identity
    same_losses(one_node, run)
    assert (
        train(*nodes, "deploy.node_rank=1", cwd=tmp_path).returncode == 0
    )  # finished: nothing to wait for


@pytest.mark.full
def test_deepspeeds_launcher_starts_the_same_run(one_node: Path, tmp_path: Path) -> None:
    """The command for a hostfile, on two "nodes" that are both this machine; without ssh each is told its number."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    overrides = [
        *SFT,
        "deploy.nodes=2",
        f"deploy.hostfile={hostfile}",
        f"deploy.master=127.0.0.1:{launch.free_port()}",
    ]
    cfg = composed(*overrides, f"root={tmp_path}")
    run = tmp_path / "sft-by-launcher"
    run.mkdir()
    own = config_for_stage(cfg, Stage.sft, {})
    save_config(own, run / "config.yaml")
    command = launch.launcher_command(run, own)
    at = command.index("--no_local_rank")
    nodes = [
        subprocess.Popen(
            [*command[:at], "--no_ssh", f"--node_rank={rank}", *command[at:]],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    same_losses(one_node, run)


def test_a_worker_that_dies_takes_the_others_along(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(REPO / "train.py"),
        "stage=sft",
        "wandb.mode=disabled",
        "deploy.gpus=2",
        "deploy.threads=1",
    ]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not [*tmp_path.glob("outputs/sft-*/metrics.jsonl")] and time.time() < deadline:
        time.sleep(0.1)
    workers = workers_of(tmp_path)
    assert sorted(workers.values()) == ["0", "1"]
    killed = time.time()
    os.kill(next(pid for pid, rank in workers.items() if rank == "1"), signal.SIGKILL)
    said = parent.communicate(timeout=60)[1]
    seconds = time.time() - killed
    print(f"ended {seconds:.1f} s after the death of a worker")
    assert parent.returncode == 1 and seconds < 15 and not workers_of(tmp_path)
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "sft failed, rank 1: killed by SIGKILL (out of memory?)" in line and "train.log" in line


@pytest.mark.full
def test_an_interrupted_run_starts_anew_and_keeps_what_was(tmp_path: Path) -> None:
    """SIGKILL of the parent takes the worker along; the same command then finishes the run."""
    command = [
        sys.executable,
        str(REPO / "train.py"),
        "stage=sft",
        "wandb.mode=disabled",
        "deploy.threads=1",
    ]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    log = None
    for _ in range(600):
        log = next(tmp_path.glob("outputs/sft-*/metrics.jsonl"), None)
        if log and len(log.read_text().splitlines()) > 2:
            break
        time.sleep(0.1)
    assert log
    parent.kill()
    parent.wait()
    deadline = time.time() + 10
    while workers_of(tmp_path) and time.time() < deadline:
        time.sleep(0.1)
    assert not workers_of(tmp_path), "the worker outlived its parent"
    run = log.parent
    before = log.read_text()
    stopped = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (run / "attempts" / "1" / "metrics.jsonl").exists() and log.exists() and log.read_text():
            break
        time.sleep(0.1)
    assert (run / "attempts" / "1" / "metrics.jsonl").read_text() == before
    # a second owner is refused while the first one works
    second = train("stage=sft", "wandb.mode=disabled", "deploy.threads=1", cwd=tmp_path)
    assert (
        second.returncode == 1
        and f"pid {stopped.pid}" in second.stderr
        and "being trained by another process" in second.stderr
    )
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(20) == 130
    assert not workers_of(tmp_path)


def test_a_failing_worker_is_one_line_with_rank_cause_and_log(tmp_path: Path) -> None:
    done = train("stage=sft", *SMALL, "data.max_prompt_tokens=1", cwd=tmp_path)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert (
        len(errors) == 1
        and "sft failed, rank 0: ValueError" in errors[0]
        and "train.log" in errors[0]
    )
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    assert "Traceback" in (run / "train.log").read_text() and not (run / "summary.json").exists()


def workers_of(root: Path) -> dict[int, str]:
    """Process numbers and ranks of the workers started in `root`."""
    found = {}
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if b"rlhf.worker" in (proc / "cmdline").read_bytes() and os.readlink(
                proc / "cwd"
            ) == str(root):
                environment = dict(
                    entry.split("=", 1)
                    for entry in (proc / "environ").read_bytes().decode().split("\0")
                    if "=" in entry
                )
                found[int(proc.name)] = environment["RANK"]
        except OSError:
            continue
    return found


def test_nodes_of_different_runs_refuse_each_other(tmp_path: Path) -> None:
    nodes = [*SFT, "deploy.nodes=2", f"deploy.master=127.0.0.1:{launch.free_port()}"]
    command = [sys.executable, str(REPO / "train.py"), *nodes]
    second = subprocess.Popen(
        [*command, "deploy.node_rank=1", "seed=5"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    first = train(*nodes, "deploy.node_rank=0", cwd=tmp_path)
    assert "the processes do not agree on the run" in first.stderr and first.returncode == 1
    assert second.wait(60) == 1
    refused = train("-m", *nodes, "deploy.node_rank=1", cwd=tmp_path)
    assert refused.returncode == 2 and "use deploy.hostfile" in refused.stderr


def test_places_number_all_processes_of_all_nodes() -> None:
    cfg = composed(
        "deploy=multi_node",
        "deploy.nodes=3",
        "deploy.gpus=2",
        "deploy.node_rank=1",
        "deploy.master=head:1234",
    )
    there = launch.worker_environments(cfg)
    assert [(p["RANK"], p["LOCAL_RANK"]) for p in there] == [("2", "0"), ("3", "1")]
    assert {(p["WORLD_SIZE"], p["MASTER_ADDR"], p["MASTER_PORT"]) for p in there} == {
        ("6", "head", "1234")
    }
    assert "DS_ACCELERATOR" not in there[0]
    (alone,) = launch.worker_environments(composed())
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"], alone["DS_ACCELERATOR"]) == (
        "0",
        "1",
        "127.0.0.1",
        "cpu",
    )


def test_workers_keep_freed_memory_unless_the_user_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    there = launch.worker_environments(composed("deploy.gpus=2"))
    assert all(names <= place.keys() for place in there)
    assert all(int(there[0][name]) >= 2**30 for name in names if name.startswith("MALLOC"))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    (place,) = launch.worker_environments(composed())
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
            "hosts: no such file; it has a line for each node: HOST slots=1",
        ),
        (
            ["deploy.nodes=2", "deploy.hostfile=hosts"],
            "a slots=8\n# b slots=8\n",
            "1 node(s), 1 with enough slots, for deploy.nodes=2",
        ),
        (
            ["deploy.nodes=2", "deploy.gpus=4", "deploy.hostfile=hosts"],
            "a slots=8\nb slots=2\n",
            "2 node(s), 1 with enough slots",
        ),
        (["deploy=single_node", "deploy.gpus=64"], None, "deploy.gpus=64, but this machine shows"),
    ],
)
def test_machines_that_are_not_there_are_refused(
    overrides: list, hosts: str | None, expected: str, tmp_path: Path
) -> None:
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    overrides = [arg.replace("=hosts", f"={tmp_path}/hosts") for arg in overrides]
    with pytest.raises(ValueError, match=".*") as error:
        launch.check_machines(composed(*overrides))
    assert expected in str(error.value)


def test_without_pdsh_a_hostfile_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # nothing is installed there
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    with pytest.raises(ValueError, match="pdsh, which is not installed"):
        launch.check_machines(composed("deploy.nodes=2", f"deploy.hostfile={tmp_path}/hosts"))


@pytest.mark.parametrize(
    "codes, outcome",
    [
        ((75, 75), KeyboardInterrupt),
        ((75, 1), RuntimeError),
        ((0, 1), RuntimeError),
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
        assert launch.run_workers(tmp_path, composed("deploy.gpus=2")) is False
    else:
        with pytest.raises(outcome):
            launch.run_workers(tmp_path, composed("deploy.gpus=2"))

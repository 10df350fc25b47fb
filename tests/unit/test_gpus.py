"""Which GPUs a run takes, without a GPU: their names are numbers, and locks are files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, composed

from rlhf.base.errors import UserError
from rlhf.runs import gpus

HOLD = """
import sys, time
from helpers import composed
from rlhf.runs import gpus
{setup}
with gpus.claim_gpus(composed("deploy=single_node", "deploy.processes_per_node=2")) as claimed:
    print(",".join(claimed), flush=True)
    time.sleep(float(sys.argv[1]))
"""


def test_jobs_side_by_side_take_gpus_of_their_own(tmp_path: Path) -> None:
    """Four GPUs, two for each job: the first two jobs get two each, and a third one waits until one
    is done."""
    place = {
        "CUDA_VISIBLE_DEVICES": "4,5,6,7",
        gpus.SWEEP_LOG: "there",
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": f"{REPO}:{REPO / 'tests'}",
    }
    options = {"env": os.environ | place, "stdout": subprocess.PIPE, "text": True}

    def job(seconds: float) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", HOLD.format(setup=""), str(seconds)], **options
        )

    one = job(60)
    assert one.stdout.readline().strip() == "4,5"
    two = job(60)
    assert two.stdout.readline().strip() == "6,7"
    three = job(0)
    time.sleep(2)
    assert three.poll() is None
    one.kill()  # a lock ends with its process
    assert three.stdout.readline().strip() == "4,5" and three.wait(20) == 0
    two.kill()
    for process in (one, two):
        process.wait()
    before = dict(os.environ)
    with gpus.claim_gpus(composed()):
        assert dict(os.environ) == before  # on CPU


def test_runs_by_hand_take_other_gpus_and_wait_or_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two GPUs: the second run takes the other one; a third shares what it has named."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    monkeypatch.setattr(gpus, "visible_gpus", lambda: ["0", "1"])
    one_gpu = composed("deploy=single_gpu")
    with gpus.claim_gpus(one_gpu) as first, gpus.claim_gpus(one_gpu) as second:
        assert (first, second) == (["0"], ["1"])
        assert os.environ[gpus.VISIBLE] == "1"
    assert gpus.VISIBLE not in os.environ and capfd.readouterr().err == ""
    with gpus.claim_gpus(one_gpu):
        assert gpus.VISIBLE not in os.environ  # the first one is taken without it
    monkeypatch.undo()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(gpus.VISIBLE, "1")
    with gpus.claim_gpus(one_gpu), gpus.claim_gpus(one_gpu) as shared:
        assert shared == ["1"]
    assert capfd.readouterr().err == (
        "another run uses GPU 1, too (CUDA_VISIBLE_DEVICES names it)\n"
    )


def test_a_run_that_waits_says_so_and_goes_on(tmp_path: Path) -> None:
    code = HOLD.format(setup="gpus.visible_gpus = lambda: ['0', '1']")
    place = {"TMPDIR": str(tmp_path), "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"}
    environment = {k: v for k, v in os.environ.items() if k != gpus.VISIBLE} | place

    def job(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(seconds)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environment, text=True, **pipes)

    one = job(60)
    assert one.stdout and one.stdout.readline() == "0,1\n"
    two = job(0)
    assert two.stderr and two.stderr.readline() == (
        "waiting: other runs use 2 GPUs of 2; CUDA_VISIBLE_DEVICES=0,1 shares with them\n"
    )
    one.kill()
    one.wait()
    assert two.communicate(timeout=60)[0] == "0,1\n"


def fake_driver(folder: Path, monkeypatch: pytest.MonkeyPatch, listed: str, memory: str) -> None:
    """An nvidia-smi that says this."""
    script = folder / "nvidia-smi"
    script.write_text(
        f"#!/bin/sh\ncase $1 in -L) printf '{listed}';; *) printf '{memory}';; esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv(gpus.VISIBLE, raising=False)


TWO = "GPU 0: NVIDIA A100 (UUID: GPU-1)\\nGPU 1: NVIDIA A100 (UUID: GPU-2)\\n"
DIVIDED = "GPU 0: NVIDIA A100 (UUID: GPU-1)\\n  MIG 1g.5gb Device 0: (UUID: MIG-1)\\n"


def test_gpus_under_wsl2_are_counted_by_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, monkeypatch, TWO, "")
    assert gpus.visible_gpus() == []  # no file of a GPU is there
    (tmp_path / "dxg").touch()
    monkeypatch.setattr(gpus, "WSL2", tmp_path / "dxg")
    assert gpus.visible_gpus() == ["0", "1"]


def test_instances_of_a_gpu_serve_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, monkeypatch, DIVIDED, "")
    assert gpus.has_instances()
    monkeypatch.setenv(gpus.VISIBLE, "MIG-1,MIG-2")
    gpus.check_gpus(composed("deploy=single_gpu"))
    two = composed("deploy=single_gpu", "deploy.processes_per_node=2")
    with pytest.raises(UserError, match=r"deploy.processes_per_node=2: .*\(MIG\).*_node=1"):
        gpus.check_gpus(two)
    fake_driver(tmp_path, monkeypatch, TWO, "")
    assert not gpus.has_instances()


@pytest.mark.parametrize(
    "memory, line",
    [
        ("81559\\n81559\\n", ""),
        ("", ""),
        ("[N/A]\\n", ""),
        (
            "81559\\n24564\\n",
            "deploy.gpu_memory_gb=80, but the smallest GPU of this machine has 24.0 GiB: the plan "
            "needs the right number, deploy.gpu_memory_gb=23",
        ),
    ],
)
def test_another_memory_than_the_plan_counts_on_is_named(
    memory: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_driver(tmp_path, monkeypatch, TWO, memory)
    assert gpus.memory_mismatch(composed("deploy=single_gpu")) == line

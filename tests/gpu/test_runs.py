"""Whole commands on the GPU: no warnings, the numbers of the CPU, resume, and how a run fails."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
from families import save_base
from gpu_device import (
    CLOSE,
    ON_GPU,
    STEADY,
    error_line,
    little_memory,
    placed,
    responses,
    without_tf32,
)
from helpers import SLOW, SMALL, metrics, running, runs_in, summary, train
from worker_runs import same

from rlhf.models.loading import load_tokenizer

pytestmark = pytest.mark.gpu

LOSSES = {
    "sft": ["loss", "grad_norm"],
    "rm": ["loss", "grad_norm"],
    "ppo": ["loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "objective/kl"],
}


def test_the_tiny_pipeline_runs_without_warnings(tmp_path: Path) -> None:
    done = train(*SMALL, *placed(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower(), done.stderr
    for stage, (run,) in runs_in(tmp_path).items():
        assert summary(run)["status"] == "finished", stage
        assert "warn" not in (run / "train.log").read_text().lower(), stage


def test_in_fp32_the_gpu_computes_what_the_cpu_does(tmp_path: Path) -> None:
    """The same tokens are sampled, and losses agree."""
    runs = {}
    deployments = {"cpu": ["deploy=cpu"], "gpu": [*placed("fp32"), "deploy.micro_batch=3"]}
    for name, deployment in deployments.items():
        (tmp_path / name).mkdir()
        done = train(*SMALL, *STEADY, *deployment, cwd=tmp_path / name, **without_tf32())
        assert done.returncode == 0, done.stderr
        runs[name] = {stage: found[0] for stage, found in runs_in(tmp_path / name).items()}
    for stage, names in LOSSES.items():
        rows = [metrics(runs[name][stage]) for name in ("cpu", "gpu")]
        for one, other in zip(*rows, strict=True):
            for name in names:
                assert other[name] == pytest.approx(one[name], **CLOSE), (stage, name)
    cpu, gpu = (responses(runs[name]["ppo"]) for name in ("cpu", "gpu"))
    assert [row["tokens"] for row in cpu] == [row["tokens"] for row in gpu] and len(cpu) == 16
    for one, other in zip(cpu, gpu):
        assert other["logp"] == pytest.approx(one["logp"], **CLOSE)


# what is killed: an SFT run, and one of PPO, which also remembers random streams
RUNS = {
    "sft": [*SLOW, *placed()],
    "ppo": [
        "deterministic=true",
        *SMALL,
        *placed(),
        "rl.max_steps=6",
        "rl.ema=0.5",
        "checkpoint.every_steps=2",
        "rollout.log_responses=2",
    ],
}


@pytest.mark.parametrize("stage", RUNS if ON_GPU else ["ppo"])
def test_a_killed_worker_ends_in_one_line_and_the_run_resumes_bit_for_bit(
    stage: str, tmp_path: Path
) -> None:
    command = RUNS[stage]
    done = train(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole = runs_in(tmp_path)[stage][0].rename(tmp_path / "whole")
    parent, run = running(*command, cwd=tmp_path, until=3, stage=stage)
    worker = next(p for p in psutil.Process(parent.pid).children() if "rlhf.worker" in p.cmdline())
    worker.kill()
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 1
    assert "rank 0: killed by SIGKILL (out of memory?)" in error_line(said)
    done = train(*command, cwd=tmp_path)
    assert done.returncode == 0 and "resuming after step" in done.stderr, done.stderr
    same(whole, run)


def test_what_is_not_finite_ends_in_one_line(tmp_path: Path) -> None:
    done = train(*SLOW, *placed(), "sft.lr=1e30", "sft.warmup_steps=4", cwd=tmp_path)
    line = error_line(done.stderr)
    assert done.returncode == 1 and "lower the learning rate" in line, line


def test_too_little_memory_ends_in_one_line(tmp_path: Path) -> None:
    """100 million weights take 0.2 GB in bf16, and 1.8 GB when they are trained."""
    shape = {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096}
    save_base(tmp_path / "large", "opt", num_hidden_layers=8, num_attention_heads=16, **shape)
    load_tokenizer("builtin:tiny").save_pretrained(tmp_path / "large")
    command = ["stage=sft", *SMALL, *placed(), f"actor.path={tmp_path / 'large'}"]
    with little_memory(on_gpu=1.5, on_cpu=4):
        done = train(*command, cwd=tmp_path)
    assert done.returncode, done.stderr
    line = error_line(done.stderr).lower()
    assert "memory" in line, line


def test_offload_needs_no_compiler(tmp_path: Path) -> None:
    """The optimizer steps on the CPU with torch's AdamW; DeepSpeed's own would be compiled."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    done = train(
        *("stage=sft", *SMALL, *placed()),
        "deploy.zero_stage=2",
        "deploy.offload.optimizer=true",
        cwd=tmp_path,
        PATH=str(tmp_path / "bin"),
        CC="none",
        CXX="none",
        CUDA_HOME="/nonexistent",
        TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"),
    )
    assert done.returncode == 0, done.stderr
    assert not [*tmp_path.glob("extensions/**/*.so")]
    assert len(metrics(runs_in(tmp_path)["sft"][0])) == 3

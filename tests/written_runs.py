"""Run directories that are written without training, with texts that attack a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import command

from rlhf.config.loading import save_config
from rlhf.config.stage_graph import is_rl
from rlhf.runs.directory import config_for_stage, write_json
from rlhf.runs.identity import run_identity, run_name

HOSTILE = "</script><script>document.title='run'</script>"


def write_run(
    root: Path, *overrides: str, gold: float = 1.0, steps: int = 12, finished: bool = True
) -> Path:
    """A PPO run directory: a score that rises to `gold`, responses, and a summary if finished."""
    final = {"gold": gold, "gold_before": 0.0, "score": gold / 2, "kl": 2.0}
    final |= {"length": 20.0, "eos_rate": 1.0}
    run = write_stage(root, "ppo", overrides, ppo_rows(gold, steps), final if finished else None)
    samples = [
        {
            "step": steps,
            "prompt": f"p{i}",
            "before": "b",
            "after": f"{HOSTILE} {gold}",
            "score_before": 0.0,
            "score_after": 1.0,
        }
        for i in range(3)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return run


def ppo_rows(gold: float, steps: int) -> list[dict[str, float]]:
    """Metrics of rollouts in which the rewards rise to `gold`."""
    return [
        {
            "step": i + 1,
            "objective/scores": gold * i / steps,
            "reward/gold/mean": gold * i / steps,
            "objective/kl": 0.2 * i,
            "loss/policy_avg": -0.1,
            "loss/value_avg": 1 / (i + 1),
            "tokens/response_mean": 20.0,
            "policy/entropy_avg": 0.4,
            "policy/clipfrac_avg": 0.05,
            "val/explained_variance": 0.9,
        }
        for i in range(steps)
    ]


def write_stage(
    root: Path,
    stage: str,
    overrides: Sequence[str],
    rows: Sequence[dict[str, float]],
    final: dict[str, float] | None,
) -> Path:
    """The directory of a run, as train.py leaves it.

    Args: rows: of metrics.jsonl.  final: its last metrics, without eval/; None: unfinished.
    """
    own = command(f"stage={stage}", *overrides)
    own.cfg.root = str(root)
    run = root / "outputs" / run_name(own, stage)
    run.mkdir(parents=True)
    save_config(config_for_stage(own.cfg, stage, {}), run / "config.yaml")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parents = {"sft": "abc"} if is_rl(stage) or stage == "dpo" else {}
    data: list[dict[str, Any]] = [
        {"source": name, "split": "train", "rows": 60, "skipped": {}, "sft": 12, "rm": 24}
        for name in own.cfg.data.sources
    ]
    write_json(run / "parents.json", parents)
    write_json(run / "data.json", data)
    write_json(
        run / "env.json",
        {
            "command": f"python train.py stage={stage} '{HOSTILE}'",
            "started": "2026-01-02 03:04",
            "git": "0123456789abcdef0123456789abcdef01234567",
            "git_dirty": False,
            "packages": {},
        },
    )
    if final is not None:
        summary = {
            "id": run.name[-8:],
            "stage": stage,
            "status": "finished",
            "finished": "2026-01-02 04:05",
            "parents": parents,
            "metrics": {f"eval/{name}": value for name, value in final.items()},
            "seconds": 3661.0,
            "data": data,
            "settings": run_identity(own, stage),
        }
        write_json(run / "summary.json", summary)
    return run


def write_sweep(root: Path) -> Path:
    """A sweep, multirun/study: three coefficients, three seeds each; one job that failed."""
    folder = root / "multirun" / "study"
    golds = {0.02: (2.0, 2.2, 2.4), 0.05: (3.0, 3.1, 2.9), 0.2: (2.5, 2.4, 2.6)}
    for coef, values in golds.items():
        for seed, gold in enumerate(values, 1):
            run = write_run(root, f"rl.kl.coef={coef}", f"seed={seed}", gold=gold)
            job = folder / f"{coef}-{seed}"
            job.mkdir(parents=True)
            (job / "overrides.txt").write_text("")
            (job / "run").symlink_to(run)
    failed = folder / "failed"
    failed.mkdir()
    (failed / "overrides.txt").write_text("")
    (failed / "error.txt").write_text("ppo failed, rank 0: it is broken\n")
    return folder


def write_mixed(root: Path) -> list[Path]:
    """Ten runs of different stages, data and models, as a folder has them after some weeks."""
    pairs = root / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    mine = ("data=jsonl", f"data.sources.mine.path={pairs}")
    many = (
        "data=rm_static",
        "data.max_prompt_tokens=128",
        "rl.batch_size=32",
        "rl.minibatches=2",
        "rl.epochs=2",
        "rl.clip_low=0.1",
        "rl.critic.lr=1e-5",
        "rollout.max_new_tokens=96",
    )
    steps = [{"step": i, "loss": 1 / i, "accuracy": 0.5} for i in range(1, 5)]
    policy = {"score": 0.8, "kl": 4.0, "length": 60.0, "eos_rate": 0.9}
    failed = write_stage(root, "ppo", [*mine, "rl.kl.coef=0.2"], [], None)
    (failed / "error-rank0.txt").write_text("rank 0: ValueError: it is broken\n\nTraceback")
    hub = "data=rm_static"
    return [
        write_stage(root, "sft", [], steps, {"perplexity": 1.6, "gold": 1.2, "eos_rate": 1.0}),
        write_stage(root, "sft", ["actor=opt125m", hub], steps, {"perplexity": 9.5}),
        write_stage(root, "sft", ["actor=opt350m", hub], steps, {"perplexity": 8.1}),
        write_stage(root, "rm", mine, steps, {"accuracy": 0.64}),
        write_run(root, "seed=1", gold=2.8),
        write_run(root, "seed=2", gold=2.9),
        write_run(root, "rl.kl.coef=0.2", gold=2.1),
        write_stage(root, "ppo", ["actor=opt125m", *many], ppo_rows(1.0, 5), policy),
        write_stage(root, "dpo", ["actor=opt125m", hub], steps, {"accuracy": 0.6, "kl": 3.0}),
        failed,
    ]

"""Run directories that are written without training, with texts that attack a page."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import command

from rlhf.config.loading import save_config
from rlhf.runs.directory import config_for_stage, write_json
from rlhf.runs.identity import run_name

HOSTILE = "</script><script>document.title='run'</script>"


def write_run(
    root: Path, *overrides: str, gold: float = 1.0, steps: int = 12, finished: bool = True
) -> Path:
    """A PPO run directory: a score that rises to `gold`, responses, and a summary if finished."""
    own = command("stage=ppo", *overrides)
    own.cfg.root = str(root)
    run = root / "outputs" / run_name(own, "ppo")
    run.mkdir(parents=True)
    save_config(config_for_stage(own.cfg, "ppo", {}), run / "config.yaml")
    rows = [
        {
            "step": i + 1,
            "objective/scores": gold * i / steps,
            "reward/gold/mean": gold * i / steps,
            "objective/kl": 0.2 * i,
        }
        | {"loss/policy_avg": -0.1, "loss/value_avg": 1 / (i + 1), "tokens/response_mean": 20.0}
        for i in range(steps)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    write_json(run / "parents.json", {"sft": "abc"})
    if finished:
        final = {
            "eval/gold": gold,
            "eval/gold_before": 0.0,
            "eval/score": gold / 2,
            "eval/kl": 2.0,
            "eval/length": 20.0,
            "eval/eos_rate": 1.0,
        }
        write_json(
            run / "summary.json",
            {
                "id": run.name[-8:],
                "stage": "ppo",
                "status": "finished",
                "parents": {"sft": "abc"},
                "metrics": final,
            },
        )
    return run

"""One process that does many runs, one after the other: python several_runs.py RUN_DIR...

It works as rlhf.worker, which does one run. Imports are most of the time of a small run.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path


def main(run_dirs: list[Path]) -> None:
    from rlhf.worker import prepare_environment

    prepare_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from rlhf.config.loading import load_config
    from rlhf.distributed.engine import init_distributed
    from rlhf.runs.directory import write_json
    from rlhf.stages import dpo, evaluate, rl, rm, sft

    logging.getLogger("rlhf").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    init_distributed()
    for run_dir in run_dirs:
        cfg = load_config(run_dir / "config.yaml")
        torch.manual_seed(cfg.seed)
        stages = {
            "sft": sft,
            "rm": rm,
            "ppo": rl,
            "rloo": rl,
            "grpo": rl,
            "dpo": dpo,
            "eval": evaluate,
        }
        metrics = stages[cfg.stage.name].run(cfg, run_dir)
        if int(os.environ["RANK"]) == 0:
            write_json(run_dir / "result.json", {"metrics": metrics})


if __name__ == "__main__":
    main([Path(arg) for arg in sys.argv[1:]])

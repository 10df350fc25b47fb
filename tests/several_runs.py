"""One process that does many runs, one after the other: several_runs.py [--smooth] RUN_DIR...

Like rlhf.worker, which does one run; imports take most of the time of a small run. Each run also
saves the gradient of its first optimizer step: RUN_DIR/first_gradient_<class of model>.safetensors.

--smooth replaces ReLU by GELU. The gradient of a ReLU jumps where its input is zero, so rounding
alone can switch a unit on or off. GELU has no such jump.

RUN_DIR=CHANGE changes what a run computes:

last_bit_<seed>   each initial weight is moved to the next float32 number, above or below it
unscaled_<step>   from this optimizer step on, the loss of the last process lacks the world size
dropped_<step>    from this optimizer step on, the last process drops its first micro-batch
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any


class Changes:
    """Changes and records a run by wrapping the functions of DeepSpeed that all stages call."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world
        self.kind, self.number, self.run_dir = "", 0, Path()
        self.steps: dict[int, int] = {}  # optimizer steps of each engine, by its id
        self.first_of_step = True  # whether a step's first micro-batch is next

    def begin(self, run_dir: Path, change: str) -> None:
        kind, _, number = change.rpartition("_")
        self.kind, self.number = kind, int(number or 0)
        self.run_dir, self.steps, self.first_of_step = run_dir, {}, True

    def install(self) -> None:
        import deepspeed
        from deepspeed.runtime.engine import DeepSpeedEngine

        initialize = deepspeed.initialize
        backward, step = DeepSpeedEngine.backward, DeepSpeedEngine.step

        def changed_initialize(*args: Any, model: Any, **options: Any) -> Any:
            if self.kind == "last_bit":
                move_last_bits(model, self.number)
            return initialize(*args, model=model, **options)

        def changed_backward(engine: Any, loss: Any, **options: Any) -> Any:
            first, self.first_of_step = self.first_of_step, False
            if self.rank == self.world - 1 and self.steps.get(id(engine), 0) + 1 >= self.number:
                if self.kind == "unscaled":
                    loss = loss / self.world
                if self.kind == "dropped" and first:
                    loss = loss * 0
            return backward(engine, loss, **options)

        def recorded_step(engine: Any, *args: Any, **options: Any) -> Any:
            self.first_of_step = True
            done = self.steps[id(engine)] = self.steps.get(id(engine), 0) + 1
            if done == 1:
                self.save_gradient(engine.module)
            return step(engine, *args, **options)

        deepspeed.initialize = changed_initialize
        DeepSpeedEngine.backward, DeepSpeedEngine.step = changed_backward, recorded_step

    def save_gradient(self, module: Any) -> None:
        """Save the gradient of the whole step, before clipping. All processes take part; the first
        one writes."""
        from deepspeed.utils import safe_get_full_grad
        from safetensors.torch import save_file

        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        gradient = {name: safe_get_full_grad(p).detach().clone() for name, p in trained.items()}
        if self.rank == 0:
            name = f"first_gradient_{type(module).__name__}.safetensors"
            save_file(gradient, self.run_dir / name)


def move_last_bits(model: Any, seed: int) -> None:
    """Move each weight to the next number above or below it. Equal models stay equal."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            up = torch.rand(p.shape, generator=generator) < 0.5
            p.copy_(torch.nextafter(p, torch.where(up, torch.inf, -torch.inf)))


def main(arguments: list[str]) -> None:
    from rlhf.worker import prepare_environment

    prepare_environment()
    os.environ["DS_ACCELERATOR"] = "cpu"
    smooth = arguments[0] == "--smooth"
    if smooth:
        arguments = arguments[1:]
        # a cache of its own: the other one has log-probabilities of the same weights with ReLU
        first_run = Path(arguments[0].partition("=")[0])
        os.environ["HF_DATASETS_CACHE"] = str(first_run.parent / "smooth_cache")
    import torch

    from rlhf.config.loading import load_config
    from rlhf.distributed.engine import init_distributed
    from rlhf.runs.directory import write_json
    from rlhf.worker import run_stage

    if smooth:
        from transformers.activations import ACT2CLS, ACT2FN

        ACT2FN["relu"] = ACT2CLS["gelu"]
    logging.getLogger("rlhf").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    init_distributed()
    changes = Changes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    changes.install()
    for argument in arguments:
        path, _, change = argument.partition("=")
        run_dir = Path(path)
        changes.begin(run_dir, change)
        cfg = load_config(run_dir / "config.yaml")
        torch.manual_seed(cfg.seed)
        metrics = run_stage(cfg, run_dir)
        if changes.rank == 0:
            write_json(run_dir / "result.json", {"metrics": metrics})


if __name__ == "__main__":
    main(sys.argv[1:])

"""Run the real stages with deploy.device=gpu on a pretended GPU, and count.

    python tests/pretend/stages.py DIR [CASE ...]

In place of DeepSpeed's engine is plain AdamW. The runs go to DIR, the counts to DIR/counts.json: a
list of what `Phase` says. A case needs the models of those before it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from device import COUNTS, Counts, move_module, pretended_gpu
from plain_engine import initialize

TESTS = Path(__file__).resolve().parents[1]
NEW_TOKENS = 32
SETTINGS = [
    "deploy=single_gpu",
    "deploy.micro_batch=2",
    "deploy.eval_micro_batch=8",
    "data.eval_rows=8",
    f"rollout.max_new_tokens={NEW_TOKENS}",
    "sft.max_steps=2",
    "sft.batch_size=16",
    "rm.max_steps=2",
    "rm.batch_size=16",
    "dpo.max_steps=2",
    "dpo.batch_size=16",
]
ONLINE = ["rl.batch_size=16", "rl.minibatches=2", "rl.epochs=1"]
PPO = ["rl.ema=0.9", "rl.ptx.coef=1", "rl.entropy_coef=0.01", "rl.evaluation.every=1"]
LORA = ["rl.max_steps=1", "actor.lora.rank=4", "reward.lora.rank=4"]
GROUPS = ["rl.responses_per_prompt=4", "rl.max_steps=1"]
EVAL = ["eval.policies=[sft,ppo]", "eval.prompts=[]", "eval.best_of=2", "eval.best_of_prompts=4"]
# stage, the runs whose models it reads, and settings
CASES: dict[str, tuple[str, list[str], list[str]]] = {
    "sft": ("sft", [], []),
    "rm": ("rm", [], []),
    "ppo": ("ppo", ["sft", "rm"], [*ONLINE, *PPO]),
    "grpo": ("grpo", ["sft", "rm"], [*ONLINE, *GROUPS]),
    "dpo": ("dpo", ["sft"], []),
    "lora": ("ppo", ["sft", "rm"], [*ONLINE, *LORA]),
    "eval": ("eval", ["sft", "rm", "ppo"], EVAL),
}


@dataclass
class Phase:
    """A part of a case, and what happened in it."""

    case: str
    part: str
    unit: str  # micro-batch, or sampled token
    units: int = 0
    kernels: int = 0
    synchronisations: int = 0
    lines: dict[str, int] = field(default_factory=dict)  # synchronisations by line

    def add(self, counts: Counts, units: int) -> None:
        self.units += units
        self.kernels += counts.kernels.total()
        self.synchronisations += counts.synchronisations.total()
        for line, count in counts.synchronisations.items():
            self.lines[line] = self.lines.get(line, 0) + count


PHASES: dict[tuple[str, str], Phase] = {}
case_now = ""


def count_calls(
    owner: Any, name: str, unit: str, part_and_units: Callable[..., tuple[str, int]]
) -> None:
    """Replace a function of a module or class by itself, counted.

    Args: part_and_units: of the phase, from the result and the arguments of a call.
    """
    function = getattr(owner, name)

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        before = COUNTS.copy()
        result = function(*args, **kwargs)
        counts = COUNTS.since(before)
        part, units = part_and_units(result, *args, **kwargs)
        PHASES.setdefault((case_now, part), Phase(case_now, part, unit)).add(counts, units)
        if (
            unit == "model"
        ):  # once in a run, so it does not count for the phase that it is a part of
            COUNTS.reset(before)
        return result

    setattr(owner, name, counted)


def training(norm: float, engine: Any, losses: list[Any], lr: float) -> tuple[str, int]:
    """Micro-batches of an optimizer step."""
    return f"optimizer steps of the {type(engine.module).__name__.lower()}", len(losses)


def sampling(responses: Any, *args: Any, **kwargs: Any) -> tuple[str, int]:
    """Sampled tokens of the longest response of a batch."""
    return "sampling", int(responses.mask.cpu().sum(1).max())


def measuring(experience: Any, *args: Any, **kwargs: Any) -> tuple[str, int]:
    return "making experience", len(experience.response_ids)


def install_counters() -> None:
    """Count in the functions that all stages call."""
    from rlhf.config.choices import RolloutEngine
    from rlhf.evaluation import policy
    from rlhf.models import wrappers
    from rlhf.rl import experience, update
    from rlhf.sampling import sampler
    from rlhf.stages import dpo, rl, rm, sft

    for module, step in (
        (sft, "train_step"),
        (rm, "train_step"),
        (dpo, "train_step"),
        (update, "train_minibatch"),
    ):
        count_calls(module, "optimizer_step", "micro-batch", training)
        count_calls(module, step, "step", lambda *_: ("whole steps", 1))
    check = "checking that packing works"
    count_calls(wrappers.Model, "packing_matches_unpacked", "model", lambda *_: (check, 1))
    count_calls(sampler, "read_prompts", "batch", lambda *_: ("reading prompts", 1))
    count_calls(experience, "sample", "token", sampling)
    experience.GENERATE[RolloutEngine.native] = experience.sample
    for module in (rl, policy):
        count_calls(module, "make_experience", "response", measuring)


def run_case(root: Path, case: str, finished: dict[str, Path]) -> Path:
    """Run a stage in this process. Returns: its run directory."""
    from worker_runs import prepare

    from rlhf.config.loading import load_config
    from rlhf.worker import run_stage

    stage, needs, settings = CASES[case]
    inputs = {name: str(finished[name] / "model") for name in needs}
    run_dir = prepare(root, case, stage, inputs, [*SETTINGS, *settings])
    cfg = load_config(run_dir / "config.yaml")
    torch.manual_seed(cfg.seed)
    with pretended_gpu():
        run_stage(cfg, run_dir)
    return run_dir


def run_chat(finished: dict[str, Path]) -> None:
    """A response in a conversation, its score, and its trace against a reference."""
    from rlhf.chat import feedback, models
    from rlhf.chat.policy import Params, Policy, Reply
    from rlhf.data.records import Turn

    with pretended_gpu():
        loaded = []
        for name, option in (("ppo", "--path"), ("sft", "--reference"), ("rm", "--reward")):
            model, tokenizer = models.load_model(str(finished[name] / "model"), "cpu", option)
            move_module(model)
            loaded.append((model, tokenizer))
        policy, judge = Policy(*loaded[0]), feedback.Judge(*loaded[2])
        params = Params(top_p=0.9, top_k=50, max_new_tokens=8)
        reply = Reply(*policy.fit([Turn("user", "Hi")], params.max_new_tokens))
        policy.respond(reply, params, 1, lambda text: None)
        judge.score(policy, reply)
        feedback.trace(policy, *loaded[1], reply)


def main(root: Path, cases: list[str]) -> None:
    global case_now
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "DS_ACCELERATOR": "cpu",
        # with the reference's log-probabilities of DPO, which other runs must not read
        "HF_DATASETS_CACHE": str(root / "cache"),
    }
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    warnings.filterwarnings("ignore")
    import deepspeed

    deepspeed.initialize = initialize
    torch.set_num_threads(1)
    install_counters()
    finished: dict[str, Path] = {}
    for case in cases:
        case_now = case
        if case == "chat":
            run_chat(finished)
        else:
            finished[case] = run_case(root, case, finished)
    phases = [dataclasses.asdict(phase) for phase in PHASES.values()]
    (root / "counts.json").write_text(json.dumps(phases, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [*CASES, "chat"])

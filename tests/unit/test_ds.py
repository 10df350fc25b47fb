"""DeepSpeed's configurations, pinned in ds_configs.txt.

It has one line per (overrides, processes, stage, role).

After a change that is meant: PYTHONPATH=tests python tests/unit/test_ds.py
writes it anew; read the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import composed

from rlhf.distributed.deepspeed_config import build_ds_config

PINNED = Path(__file__).with_name("ds_configs.txt")
ROLES = {"sft": ["actor"], "rm": ["reward_trained"], "ppo": ["actor", "critic", "ref", "reward"]}
CASES: list[tuple[str, int, list[str]]] = [
    *(
        (f"actor=opt1.3b deploy={deploy}", world, ["sft", "rm", "ppo"])
        for deploy, world in (("single_gpu", 1), ("single_node", 8))
    ),
    ("actor=opt66b deploy=multi_node deploy.nodes=8", 64, ["sft", "rm", "ppo"]),
    ("deploy=cpu", 1, ["sft", "rm", "ppo"]),
    ("deploy=cpu deploy.processes_per_node=2 deploy.zero_stage=1", 2, ["sft"]),
    ("deploy=single_node deploy.zero_stage=0", 8, ["ppo"]),
    ("deploy=single_node deploy.zero_stage=1 deploy.offload.optimizer=true", 8, ["ppo"]),
    ("deploy=single_node deploy.zero_stage=2 deploy.offload.frozen=true", 8, ["ppo"]),
    (
        "deploy=single_node deploy.zero_stage=3 "
        "deploy.offload={optimizer:true,parameters:true,frozen:true}",
        8,
        ["ppo"],
    ),
    ("deploy=single_gpu deploy.precision=fp16", 1, ["sft", "rm"]),
    ("deploy=single_gpu deploy.precision=autocast", 1, ["ppo"]),
    ("deploy=single_gpu deploy.precision=fp32 deploy.micro_batch=2", 1, ["ppo"]),
]


QUICK = CASES[:1] + CASES[3:5]


def configurations(cases: list[tuple[str, int, list[str]]] = CASES) -> list[str]:
    lines = []
    for overrides, world, stages in cases:
        for stage in stages:
            cfg = composed(f"stage={stage}", *overrides.split())
            for role in ROLES[stage]:
                built = json.dumps(build_ds_config(cfg, role, world), separators=(", ", ": "))
                lines.append(f"{overrides} | {world} | {stage} {role} | {built}")
    return lines


@pytest.mark.full
def test_all_configurations_are_as_pinned() -> None:
    assert configurations() == PINNED.read_text().splitlines()


def test_some_configurations_are_as_pinned() -> None:
    assert set(configurations(QUICK)) < set(PINNED.read_text().splitlines())


def test_deepspeed_knows_every_key() -> None:
    """DeepSpeed's code reads every key of the configurations.

    It checks some sections itself. The keys of the others are listed here.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
        "zero_optimization",
        "bf16",
        "fp16",
    }
    known |= {
        "torch_autocast",
        "data_types",
        "zero_allow_untested_optimizer",
        "steps_per_print",
        "gradient_clipping",
        "optimizer",
    }
    for line in PINNED.read_text().splitlines():
        built = json.loads(line.rsplit(" | ", 1)[1])
        assert set(built) <= known
        zero = DeepSpeedZeroConfig(**built["zero_optimization"])
        assert zero.stage == built["zero_optimization"]["stage"]
        assert built["train_batch_size"] == built["train_micro_batch_size_per_gpu"] * int(
            line.split(" | ")[1]
        )


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="role 'judge': must be one of actor, critic"):
        build_ds_config(composed(), "judge", 1)


if __name__ == "__main__":
    PINNED.write_text("\n".join(configurations()) + "\n")

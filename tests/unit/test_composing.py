"""Options are composed once and values set on a copy: the same as Hydra makes of all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import register, write_option
from omegaconf import OmegaConf

from rlhf import arguments, cli, compose, sweep
from rlhf.base.errors import UserError

SWEEPS = [
    ["seed=range(0,3)"],
    ["stage=sft", "sft.lr=1e-3,1e-4", "seed=1,2"],
    ["pipeline=ppo,grpo,dpo", "rl.kl.coef=0.1"],
    ["rl=ppo,rloo", "actor=tiny,opt125m", "experiment_name=x"],
    ["rl.kl.coef=0.3", "recipe=null", "actor=opt1.3b", "deploy=single_gpu,cpu"],
    ["data=[sandbox],jsonl", "data.sources.mine.path=f.jsonl"],
    ["rl.rewards.model=null", "rl.rewards.mine.function=a:b,c:d"],
    ["+rl.rewards={mine: {function: 'a:b'}}", "++seed=4,5"],
    ["~rl.rewards.model", "+rl.rewards={mine: {function: 'a:b'}}", "seed=1,2"],
    ["data.shares=[1,0,0],[0,1,1]", "wandb.notes='a, b'"],
    ["experiment=overoptimisation", "rl.max_steps=1,2"],
    ["sweep=[kl,seeds]", "seed=7,8"],
    ["rl.lr=1e-4", "stage=ppo", "rl.lr=2e-4,3e-4"],  # the last one counts
    ["eval.policies=[sft,ppo]", "stage=eval", "eval.against=sft"],
]


@pytest.mark.parametrize("overrides", SWEEPS, ids=" ".join)
def test_a_job_is_composed_as_by_hydra(overrides: list[str]) -> None:
    register()
    typed = [arguments.allow_user_names(arg) for arg in overrides]
    for job in sweep.read_sweep(typed, []).jobs[-2:]:
        ours = compose.compose_alone(job, [])
        hydras = compose.compose_with_hydra(job, [], hydra_too=False)
        assert OmegaConf.to_container(ours) == OmegaConf.to_container(hydras), "also what is linked"
        assert outcome(ours) == outcome(hydras)


def outcome(composed: object) -> object:
    """The typed configuration, or what is wrong."""
    try:
        return compose.typed_config(composed)
    except UserError as error:
        return str(error)


def test_a_copy_is_changed_and_not_what_is_shared() -> None:
    register()
    first = compose.compose_alone(["stage=sft", "sft.lr=0.5"], [])
    first.seed = 99
    second = compose.compose_alone(["stage=sft"], [])
    assert (second.seed, second.sft.lr) == (1, 3e-3)


def test_the_jobs_of_a_sweep_are_those_of_hydra(tmp_path: Path) -> None:
    register()
    both = sweep.read_sweep(["sweep=seeds", "seed=1,2", "stage=sft"], [])
    assert both.jobs == [
        ["seed=1", "sweep=seeds", "stage=sft"],
        ["seed=2", "sweep=seeds", "stage=sft"],
    ]
    assert both.name == "seed" and both.is_plain
    assert sweep.read_sweep(["stage=sft"], []).name == "one_job"
    parallel = sweep.read_sweep(["seed=1,2", "hydra/launcher=parallel"], [])
    assert parallel.jobs == [["seed=1"], ["seed=2"]] and not parallel.is_plain
    text = (
        "# @package _global_\nhydra: {job: {env_set: {A: b}}, sweeper: {params: {seed: '3,4'}}}\n"
    )
    write_option(tmp_path, "experiment/mine", text)
    register([tmp_path])
    own = sweep.read_sweep(["experiment=mine"], [tmp_path])
    assert own.jobs == [["seed=3", "experiment=mine"], ["seed=4", "experiment=mine"]]
    assert not own.is_plain, "Hydra sets the environment of its jobs"
    register()


def test_a_look_at_one_job_is_no_sweep() -> None:
    with pytest.raises(UserError, match="--cfg with -m: leave one out"):
        cli.dispatch(["-m", "seed=1,2", "--cfg", "job"])

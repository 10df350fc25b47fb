"""Composition, types and checks of the configuration, and the messages that a wrong one gets."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import pytest
from helpers import CONF, STAGES, composed
from omegaconf import OmegaConf

from rlhf.config import schema
from rlhf.config.choices import Device, Schedule
from rlhf.config.field import node_type
from rlhf.config.loading import load_config, register_schema, save_config
from rlhf.config.schema import Checkpoint, Deploy, Offload, Source
from rlhf.config.stage_graph import parent_stages
from rlhf.config.stage_nodes import DsChat, Optim, RewardSource
from rlhf.config.validation import check_config
from rlhf.runs.identity import run_name

GROUPS = sorted(
    p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "stage", "model")
)
# actors, rewards and recipes: test_recipes.py
COMBINED = ("data", "deploy", "experiment", "sft", "rm", "ppo", "rollout")
OPTIONS = [(g, path.stem) for g in COMBINED for path in sorted((CONF / g).glob("*.yaml"))]


# each option with one of the stages (those of data: test_formats.py), and in make test-all with each of them
COMPOSED = [
    pytest.param(
        group,
        option,
        stage,
        marks=() if STAGES[i % len(STAGES)] == stage and group != "data" else (pytest.mark.full,),
    )
    for i, (group, option) in enumerate(OPTIONS)
    for stage in STAGES
]


@pytest.mark.parametrize("group, option, stage", COMPOSED, ids=lambda x: x)
def test_every_option_composes_with_every_stage(group: str, option: str, stage: str) -> None:
    path = ["data.sources.mine.path=mine.jsonl"] if option == "jsonl" else []
    cfg = composed(f"stage={stage}", f"{group}={option}", *path)
    assert check_config(cfg) == []
    assert cfg.stage.name == stage


def test_defaults_are_the_embedded_pipeline() -> None:
    cfg = composed()
    assert [stage.name for stage in cfg.stage.runs] == ["sft", "rm", "ppo"]
    assert (cfg.actor.name, cfg.reward.name, list(cfg.data.sources)) == (
        "tiny",
        "tiny",
        ["sandbox"],
    )
    assert (cfg.deploy.device, cfg.deploy.processes_per_node) == (Device.cpu, 1)


def test_an_actor_brings_its_reward_model_and_data_and_the_command_line_wins() -> None:
    cfg = composed("stage=ppo", "actor=opt1.3b", "deploy=single_gpu")
    assert (cfg.reward.name, list(cfg.data.sources)) == ("opt350m", ["rm_static"])
    cfg = composed("actor=opt1.3b", "reward=tiny", "data=sandbox")
    assert (cfg.reward.name, list(cfg.data.sources)) == ("tiny", ["sandbox"])
    assert list(composed("reward=opt350m").data.sources) == ["rm_static"]


def test_data_sources_combine() -> None:
    assert list(composed("actor=opt1.3b", "data=[rm_static,full_hh]").data.sources) == [
        "rm_static",
        "full_hh",
    ]


def test_recipe_files_name_existing_options() -> None:
    for group, model_group in (("recipe", "actor"), ("reward_recipe", "reward")):
        for path in (CONF / group).glob("*.yaml"):
            model, deploy = path.stem.rsplit("-", 1)
            assert (CONF / model_group / f"{model}.yaml").exists(), path
            assert (CONF / "deploy" / f"{deploy}.yaml").exists(), path


def test_ppo_defaults_are_those_promised() -> None:
    register_schema()
    ppo = OmegaConf.merge(
        *(OmegaConf.load(CONF / node / "default.yaml") for node in ("online", "ppo"))
    )
    assert (rl.epochs, rl.minibatches, rl.kl.coef, rl.gamma, rl.gae_lambda) == (
        4,
        4,
        0.05,
        1.0,
        0.95,
    )
    assert (rl.clip_low, rl.critic.value_clip, rl.adam_eps, rl.missing_eos_penalty) == (
        0.2,
        0.2,
        1e-5,
        1.0,
    )


def test_the_critics_optimizer_is_the_actors_but_for_its_rate_unless_told_otherwise() -> None:
    ppo = composed(
        "rl.schedule=cosine",
        "rl.warmup_steps=7",
        "rl.betas=[0.8,0.9]",
        "rl.grad_clip=0.5",
        "rl.weight_decay=0.1",
    ).ppo
    shared = [f.name for f in dataclasses.fields(Optim) if f.name != "lr"]
    assert [getattr(rl.critic, key) for key in shared] == [getattr(ppo, key) for key in shared]
    other = composed("rl.critic.schedule=constant", "rl.lr=1e-4").ppo
    assert (other.critic_optim.schedule, other.critic_optim.lr) == (Schedule.constant, 1e-3)
    assert (other.schedule, other.lr) == (Schedule.linear, 1e-4)


def test_keys_that_follow_another_do_so_until_they_are_set() -> None:
    cfg = composed("rl.clip_low=0.3", "rollout.temperature=0.7", "data.max_response_tokens=33")
    assert (cfg.rl.clip_high, cfg.rl.evaluation.temperature, cfg.rollout.max_new_tokens) == (
        0.3,
        0.7,
        33,
    )
    cfg = composed(
        "rl.clip_high=0.28", "rl.evaluation.temperature=0.5", "rollout.max_new_tokens=20"
    )
    assert (cfg.rl.clip_low, cfg.rollout.temperature, cfg.data.max_response_tokens) == (
        0.2,
        1.0,
        64,
    )


def test_every_key_is_documented_and_has_its_value_in_yaml_only() -> None:
    nodes = [node for node in vars(schema).values() if dataclasses.is_dataclass(node)]
    source = (CONF.parent / "rlhf" / "config" / "schema.py").read_text()
    for node in nodes:
        hints = typing.get_type_hints(node)
        for f in dataclasses.fields(node):
            # a source has no file of its own in conf/
            named_by_user = (node is Source and f.name != "path") or node is RewardSource
            no_switches = DsChat in (
                node,
                hints[f.name],
            )  # all off, for the stages that have none, too
            assert named_by_user or no_switches or f.default == "???", (
                f"{node.__name__}.{f.name} has a default in Python"
            )
            is_node = dataclasses.is_dataclass(node_type(hints[f.name]))
            documented = re.search(rf"^    {f.name}: .*#", source, re.MULTILINE)
            assert is_node or documented, f"{node.__name__}.{f.name} has no comment"


def test_fields_without_effect_on_results() -> None:
    """Placement, labels and logging do not change a run's identity; everything else does."""
    nodes = [node for node in vars(schema).values() if dataclasses.is_dataclass(node)]
    free = {
        f"{node.__name__}.{f.name}"
        for node in nodes
        for f in dataclasses.fields(node)
        if not f.metadata.get("identity", True)
    }
    assert free == {
        *(
            f"Config.{name}"
            for name in (
                "stage",
                "pipeline",
                "inputs",
                "exp",
                "root",
                "plan",
                "fresh",
                "deterministic",
            )
        ),
        "Config.checkpoint",
        "Config.wandb",
        *(f"Checkpoint.{f.name}" for f in dataclasses.fields(Checkpoint)),
        *(f"Deploy.{f.name}" for f in dataclasses.fields(Deploy) if f.name != "precision"),
        *(f"Offload.{f.name}" for f in dataclasses.fields(Offload)),
        "Model.arch",
        "Data.workers",
        "Evaluation.every",
        "Evaluation.best_by",
        "Dpo.eval_every",
        "Rollout.engine",
        "Rollout.log_answers",
        *(f"Wandb.{name}" for name in ("mode", "project", "entity", "tags", "notes")),
    }


def test_config_survives_saving(tmp_path: Path) -> None:
    cfg = composed("rl.kl.coef=0.07", "deploy.threads=3")
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_keys_that_nobody_knows_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown key ppo.lrr \(did you mean rl.lr\?\)"):
        composed("+ppo.lrr=1")
    with pytest.raises(ValueError, match="unknown key ppo.x"):
        composed("+ppo.x=1")
    with pytest.raises(ValueError, match="unknown key nonsense"):
        composed("+nonsense.deep=1")


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            ["rl.batch_size=100", "rl.minibatches=3"],
            "rl.batch_size=100 is not divisible by rl.minibatches=3 x deploy.processes_per_node=1 = 3: try rl.batch_size=99",
        ),
        (
            ["deploy.processes_per_node=3"],
            "sft.batch_size=16 is not divisible by deploy.processes_per_node=3: try 15",
        ),
        (
            ["deploy.nodes=3"],
            "sft.batch_size=16 is not divisible by deploy.processes_per_node=1 x deploy.nodes=3: try 15",
        ),
        (
            ["deploy.offload.optimizer=true"],
            "DeepSpeed offers it from deploy.zero_stage=1 on, not at 0",
        ),
        (
            ["deploy.offload.parameters=true", "deploy.zero_stage=2"],
            "needs deploy.zero_stage=3, not 2",
        ),
        (["deploy.precision=fp16"], "deploy.precision=fp16: not on CPU"),
        (
            ["deploy=single_gpu", "deploy.precision=fp16"],
            "deploy.precision=fp16: the ratios of ppo overflow and underflow in it; use bf16",
        ),
        (["deploy.node_rank=1"], "deploy.node_rank=1: must be below deploy.nodes=1"),
        (
            ["deploy.nodes=2", "deploy.node_rank=1", "deploy.hostfile=h"],
            "deploy.hostfile and deploy.node_rank: give one",
        ),
        (["deploy.master=here"], "deploy.master=here: give host:port"),
        (["deploy.master=here:99999"], "deploy.master=here:99999: give host:port"),
        (["seed=-1"], "seed=-1: must not be negative"),
        (["rl.lr=inf"], "rl.lr=inf: must be above 0"),
        (["exp=../away"], "exp=../away: give a plain name"),
        (
            ["data.sources.sandbox.path=/mine.jsonl"],
            "path=builtin:sandbox and format=sandbox go together, not with /mine.jsonl",
        ),
        (
            ["data.sources.sandbox.path=/a", "data.sources.sandbox.format=chosen_rejected"],
            "choose data=... instead of data=sandbox",
        ),
        (["deploy.bucket_mb=0"], "deploy.bucket_mb=0.0: must be above 0"),
        (["actor.lora.rank=-1"], "actor.lora.rank=-1: must not be negative"),
        (["reward.lora.alpha=0"], "reward.lora.alpha=0.0: must be above 0"),
        (["actor.lora.dropout=1"], "actor.lora.dropout=1.0: must be at least 0 and below 1"),
        (["actor.lora.targets=[]"], "actor.lora.targets=[]: name layers"),
        (["sft.lr=0"], "sft.lr=0.0: must be above 0"),
        (["rm.epochs=-1"], "rm.epochs=-1: must be above 0"),
        (["rl.gamma=1.5"], "rl.gamma=1.5: must be between 0 and 1"),
        (["deploy.zero_stage=4"], "deploy.zero_stage=4: must be between 0 and 3"),
        (["rollout.temperature=0"], "rollout.temperature=0.0: must be above 0"),
        (
            ["data.sandbox.label_noise=0.5"],
            "data.sandbox.label_noise=0.5: must be above 0 and below 0.5",
        ),
        (["data.sandbox=null"], "data.sandbox=null: the built-in source needs its sizes"),
        (["data.shares=[1,2]"], "data.shares=[1, 2]: give three parts above 0"),
        (["data=[sandbox,rm_static]"], "the sandbox cannot be mixed with other sources"),
        (["data=shp", "data.sources.shp.weight=0"], "data.sources.shp.weight=0.0: must be above 0"),
        (["data=shp", "data.sources.shp.rows=-1"], "data.sources.shp.rows=-1: must be above 0"),
        (
            ["data=shp", "data.sources.shp.min_score_ratio=0.5"],
            "data.sources.shp.min_score_ratio=0.5: must be at least 1",
        ),
        (["data.workers=0"], "data.workers=0: must be above 0"),
        (["sft.betas=[0.9]"], "sft.betas=[0.9]: give two numbers"),
        (["rl.missing_eos_penalty=-1"], "rl.missing_eos_penalty=-1.0: it is subtracted"),
        (
            ["rl.length_penalty=-0.01"],
            "rl.length_penalty=-0.01: it is subtracted, must not be negative",
        ),
        (["rl.length_penalty=inf"], "rl.length_penalty=inf: it is subtracted"),
        (
            ["rl.kl.estimator=k1", "rl.kl.applied_to=loss"],
            "rl.kl.estimator=k1 with rl.kl.applied_to=loss: the gradient of log pi - log ref is zero",
        ),
        (
            ["rl.kl.controller=adaptive", "rl.kl.coef=0"],
            "rl.kl.coef=0 with rl.kl.controller=adaptive: it multiplies the coefficient",
        ),
        (["rl.kl.coef=-0.1"], "rl.kl.coef=-0.1: must not be negative"),
        (["rl.kl.final_coef=-0.1"], "rl.kl.final_coef=-0.1: must not be negative"),
        (["rl.kl.target=0"], "rl.kl.target=0.0: must be above 0"),
        (["rl.kl.horizon=0"], "rl.kl.horizon=0.0: must be above 0"),
        (["rl.critic.lr=0"], "rl.critic.lr=0.0: must be above 0"),
        (["rl.critic.betas=[0.9,1]"], "rl.critic.betas=[0.9, 1.0]: give two numbers"),
        (["rl.critic.final_lr=2"], "rl.critic.final_lr=2.0: must be between 0 and 1"),
        (["rl.critic.warmup_rollouts=-1"], "rl.critic.warmup_rollouts=-1: must not be negative"),
        (["sft.warmup_steps=-1"], "sft.warmup_steps=-1: must not be negative"),
        (["rl.warmup_steps=-1"], "rl.critic.warmup_steps=-1: must not be negative"),
        (["rl.clip_high=0"], "rl.clip_high=0.0: must be above 0"),
        (["rl.critic.value_clip=0"], "rl.critic.value_clip=0.0: must be above 0"),
        (["rl.score_clip=0"], "rl.score_clip=0.0: must be above 0"),
        (["rl.target_kl=0"], "rl.target_kl=0.0: must be above 0"),
        (["rl.entropy_coef=-1"], "rl.entropy_coef=-1.0: must not be negative"),
        (["rl.ptx.coef=-1"], "rl.ptx.coef=-1.0: must not be negative"),
        (["rl.ptx.max_tokens=0"], "rl.ptx.max_tokens=0: must be above 0"),
        (["rl.gae_lambda=-0.1"], "rl.gae_lambda=-0.1: must be between 0 and 1"),
        (["rl.ema=1"], "rl.ema=1.0: must be above 0 and below 1, or null for none"),
        (["rl.ema=0"], "rl.ema=0.0: must be above 0 and below 1"),
        (["rl.dschat.dropout=1"], "rl.dschat.dropout=1.0: must be at least 0 and below 1"),
        (["rl.evaluation.every=0"], "rl.evaluation.every=0: must be above 0"),
        (["rl.evaluation.temperature=0"], "rl.evaluation.temperature=0.0: must be above 0"),
        (["rl.evaluation.top_p=0"], "rl.evaluation.top_p=0.0: must be above 0 and at most 1"),
        (["rl.evaluation.top_p=1.1"], "rl.evaluation.top_p=1.1: must be above 0 and at most 1"),
        (["rl.evaluation.top_k=-1"], "rl.evaluation.top_k=-1: must not be negative"),
        (
            ["rollout.top_p=0.9"],
            "rollout.top_p=0.9: must be 1 in training, the log-probabilities that ppo learns from would not be those",
        ),
        (
            ["stage=ppo", "rollout.top_p=0.9"],
            "it can be set for evaluations and chat: rl.evaluation.top_p, chat.py --top-p",
        ),
        (["rollout.top_k=50"], "rollout.top_k=50: must be 0 in training, the log-probabilities"),
        (["rollout.top_k=50"], "rl.evaluation.top_k, chat.py --top-k"),
        (["rl.responses_per_prompt=0"], "rl.responses_per_prompt=0: must be above 0"),
        (
            ["rollout.log_answers=-2"],
            "rollout.log_answers=-2: give a number of answers, or -1 for all",
        ),
        (["~rl.rewards.model"], "rl.rewards is empty: there is nothing to learn"),
        (["rl.rewards.model.weight=0"], "rl.rewards: all weights are 0"),
        (["rl.rewards.model.weight=inf"], "rl.rewards.model.weight=inf: must be a number"),
        (["rl.rewards.model.weight=nan"], "rl.rewards.model.weight=nan: must be a number"),
        (
            ["rl.rewards.model.path=/m", "rl.rewards.model.function='a:b'"],
            "rl.rewards.model: path and function are both given",
        ),
        (
            ["+rl.rewards={gold: {function: gold}}"],
            "rl.rewards.gold.function=gold: give module:function, for instance rlhf.data.sandbox:gold",
        ),
        (
            [
                '+rl.rewards={gold: {function: "mine.py:f"}}',
                "+rl.rewards={b: {function: 'a:b c'}}",
            ],
            "rl.rewards.b.function=a:b c: give module:",
        ),
        (
            ['+rl.rewards={gold: {function: ":gold"}}'],
            "rl.rewards.gold.function=:gold: give module:function",
        ),
        (
            ["+rl.rewards={second: {weight: 0.5}}"],
            "rl.rewards: model and second are both the reward model of this configuration",
        ),
        (
            ["rl.batch_size=5", "rl.responses_per_prompt=2"],
            "rl.batch_size=5 x rl.responses_per_prompt=2 is not divisible by rl.minibatches=4 x deploy.processes_per_node=1 = 4: try rl.batch_size=4",
        ),
        (
            [
                "stage=ppo",
                "rl.batch_size=50",
                "rl.responses_per_prompt=3",
                "deploy.processes_per_node=2",
                "deploy.nodes=2",
            ],
            "rl.minibatches=4 x deploy.processes_per_node=2 x deploy.nodes=2 = 16: try rl.batch_size=48",
        ),
    ],
)
def test_bad_values_are_named_with_numbers_and_fix(overrides: list[str], expected: str) -> None:
    assert any(expected in problem for problem in check_config(composed(*overrides))), check_config(
        composed(*overrides)
    )


def test_all_problems_at_once() -> None:
    assert (
        len(check_config(composed("sft.lr=0", "rl.gae_lambda=2", "deploy.processes_per_node=3")))
        >= 3
    )


def test_only_chosen_stages_are_checked_for_divisibility() -> None:
    assert check_config(composed("stage=sft", "rl.batch_size=7")) == []


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "stage=sft",
            "rollout.top_p=0.9",
            "rollout.top_k=50",
        ],  # which sample nothing that is learnt from
        ["stage=rm", "rollout.top_p=0.9", "rollout.top_k=50"],
        ["rl.evaluation.top_p=0.9", "rl.evaluation.top_k=50", "rl.evaluation.every=1"],
        ["rl.kl.estimator=k1", "rl.kl.applied_to=reward"],
        ["rl.kl.estimator=k2", "rl.kl.applied_to=loss"],
        ["rl.kl.estimator=k3", "rl.kl.applied_to=loss", "rl.kl.coef=0"],
        ["rl.kl.controller=linear", "rl.kl.coef=0", "rl.kl.final_coef=0.1"],
        ["rl.batch_size=2", "rl.responses_per_prompt=4"],
        [
            "rl.batch_size=2",
            "rl.responses_per_prompt=4",
            "rl.minibatches=2",
            "deploy.processes_per_node=4",
            "stage=ppo",
        ],
        ['+rl.rewards={gold: {function: "rlhf.data.sandbox:gold"}}'],
        [
            '+rl.rewards={gold: {function: "rlhf.data.sandbox:gold"}, other: {path: /m, weight: -1}}',
            "rl.rewards.model.weight=0",
        ],
        ["~rl.rewards.model", '+rl.rewards={gold: {function: "rlhf.data.sandbox:gold"}}'],
        [
            "rl.critic.value_clip=null",
            "rl.score_clip=null",
            "rl.target_kl=null",
            "rl.ema=null",
            "rl.evaluation.every=null",
        ],
        [
            "rl.ema=0.992",
            "rl.ptx.coef=1",
            "rl.entropy_coef=0.01",
            "rl.critic.warmup_rollouts=3",
            "rl.target_kl=0.03",
            "rl.loss_aggregation=constant",
        ],
        ["rollout.log_answers=-1"],
        ["rollout.log_answers=0", "rl.warmup_steps=0"],
    ],
    ids=" ".join,
)
def test_what_may_be_chosen_together(overrides: list[str]) -> None:
    assert check_config(composed(*overrides)) == []


# ----------------------------------------------------------------------------------------------------------------------- naming


def name(stage: str, *overrides: str) -> str:
    groups = [o for o in overrides if o.split("=")[0] in (*GROUPS, "stage")]
    return run_name(composed(*overrides), stage, composed(*groups))


def test_a_run_is_named_by_what_decides_its_result() -> None:
    assert re.fullmatch(r"ppo-tiny-tiny-[0-9a-f]{8}", name("ppo"))
    assert re.fullmatch(
        r"ppo-tiny-tiny\+rl.kl.coef-0.1\+seed-2-[0-9a-f]{8}",
        name("ppo", "seed=2", "rl.kl.coef=0.1"),
    )
    assert name("ppo", "rl.kl.coef=0.05") == name("ppo"), (
        "a value equal to the default is no difference"
    )
    assert name("ppo", "rl.kl.coef=5e-2") == name("ppo"), "values are compared typed"


def test_stages_are_shared_where_nothing_they_read_differs() -> None:
    assert name("sft", "rl.kl.coef=0.1", "rm.lr=1e-4", "rollout.temperature=0.7") == name("sft")
    assert name("rm", "sft.lr=1e-4", "actor=opt125m", "reward=tiny", "data=sandbox") == name("rm")
    assert name("sft", "sft.lr=1e-4") != name("sft")
    assert name("ppo", "sft.lr=1e-4") != name("ppo"), "PPO stands on SFT"
    for free in (
        "experiment_name=other",
        "deploy.threads=1",
        "wandb.mode=offline",
        "deploy.micro_batch=4",
        "deploy.processes_per_node=2",
        "root=/x",
    ):
        assert name("ppo", free) == name("ppo"), free
    assert name("sft", "deploy.precision=bf16") != name("sft")


def test_what_does_not_change_the_policy_does_not_change_the_name() -> None:
    for free in ("rl.evaluation.every=4", "rl.evaluation.best_by=gold", "rollout.log_answers=-1"):
        assert name("ppo", free) == name("ppo"), free
    for key in (
        "rl.evaluation.top_k=4",
        "rl.kl.applied_to=loss",
        "rl.responses_per_prompt=2",
        "rl.ema=0.9",
        "rl.rewards.model.weight=2",
    ):
        assert name("ppo", key) != name("ppo"), key
    means = "rl.dschat.micro_batch_means=true"  # then a micro-batch is more than a matter of memory
    assert (
        name("ppo", means, "deploy.micro_batch=4")
        != name("ppo", means)
        != name("ppo", means, "deploy.processes_per_node=2")
    )
    means = "sft.micro_batch_means=true"
    assert (
        name("sft", means, "deploy.micro_batch=4")
        != name("sft", means)
        != name("ppo", means, "deploy.micro_batch=4")
    )
    assert name("rm", means, "deploy.micro_batch=4") == name("rm")


def test_ppo_stands_on_a_reward_model_only_where_its_score_has_one() -> None:
    gold = ["~rl.rewards.model", '+rl.rewards={gold: {function: "rlhf.data.sandbox:gold"}}']
    assert name("ppo", *gold, "rm.lr=1e-4", "reward=opt125m", "data=sandbox") == name("ppo", *gold)
    assert name("ppo", *gold).startswith("ppo-tiny+rl.rewards.gold.function-")
    assert list(parent_stages(composed(*gold), "ppo")) == ["sft"]
    both = gold[1]
    assert name("ppo", both, "rm.lr=1e-4") != name("ppo", both)
    assert list(parent_stages(composed(both), "ppo")) == ["sft", "rm"]


def test_given_inputs_replace_the_stages_that_would_make_them() -> None:
    assert (
        name("ppo", "rl.actor=/m", "sft.lr=1e-4").rsplit("-", 1)[1]
        == name("ppo", "rl.actor=/m").rsplit("-", 1)[1]
    )
    assert name("ppo", "rl.actor=/m") != name("ppo")


def test_names_are_safe_and_short() -> None:
    long = name("sft", "actor.path='/a/b=c,d/" + "x" * 200 + "'")
    assert len(long) <= 109 and not set("=,/ ") & set(long)
    assert long != name("sft", "actor.path='/a/b=c,d/" + "x" * 199 + "'"), (
        "the hash tells cut names apart"
    )


def test_what_is_wrong_is_said_once_and_only_of_what_runs() -> None:
    (line,) = check_config(composed("stage=ppo", "rl.lr=-1", "rl.critic.lr=1e-5"))
    assert line == "rl.lr=-1.0: must be above 0"
    lines = check_config(composed("stage=rloo", "rl.lr=-1"))
    assert lines == ["rl.lr=-1.0: must be above 0"]

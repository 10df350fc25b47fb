"""Composition, types and checks of the configuration, and the messages that a wrong one gets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers import CONF, STAGES, composed
from omegaconf import OmegaConf

from rlhf.base.errors import UserError
from rlhf.config.choices import Device, Schedule
from rlhf.config.field import node_type
from rlhf.config.keys import schema
from rlhf.config.loading import load_config, save_config
from rlhf.config.schema import Checkpoint, Config, Deploy, Offload
from rlhf.config.stage_nodes import Optim
from rlhf.config.validation import check_config

# actors, rewards and recipes: test_recipes.py; presets of rl: integration/test_command_line.py
COMBINED = ("data", "deploy", "experiment", "sft", "rm", "rollout")
OPTIONS = [(g, path.stem) for g in COMBINED for path in sorted((CONF / g).glob("*.yaml"))]


# Each option with one of the stages; with every stage in make test-all.
# The options of data: test_public_sets.py.
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
    named = {"jsonl": "mine", "verl": "verl"}  # these options need a file
    path = [f"data.sources.{named[option]}.path=mine.jsonl"] if option in named else []
    cfg = composed(f"stage={stage}", f"{group}={option}", *path)
    assert check_config(cfg) == []
    assert cfg.stage.name == stage


def test_defaults_are_the_embedded_pipeline() -> None:
    cfg = composed()
    assert cfg.stage.runs == ["sft", "rm", "ppo"]
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
    for group in ("recipe", "reward_recipe"):
        for path in (CONF / group).glob("*.yaml"):
            model, deploy = path.stem.rsplit("-", 1)
            assert (CONF / "model" / f"{model}.yaml").exists(), path
            assert (CONF / "deploy" / f"{deploy}.yaml").exists(), path


def test_values_for_a_model_with_an_algorithm_win_over_its_recipe_and_lose_to_the_command() -> None:
    for path in (CONF / "rl_recipe").glob("*.yaml"):
        preset, model = path.stem.split("-", 1)
        assert (CONF / "rl" / f"{preset}.yaml").exists(), path
        assert (CONF / "model" / f"{model}.yaml").exists(), path
    assert composed("stage=grpo").rl.lr == composed("stage=ppo").rl.lr == 3e-4
    assert composed("stage=dapo").rl.lr == composed("pipeline=dapo").rl.lr == 8e-5
    assert composed("stage=dapo", "rl.lr=1e-5").rl.lr == 1e-5
    assert composed("stage=dapo", "rl_recipe=null").rl.lr == 3e-4


def test_ppo_defaults_are_those_promised() -> None:
    rl = OmegaConf.load(CONF / "rl" / "ppo.yaml")
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
    rl = composed(
        "rl.schedule=cosine",
        "rl.warmup_steps=7",
        "rl.betas=[0.8,0.9]",
        "rl.grad_clip=0.5",
        "rl.weight_decay=0.1",
    ).rl
    shared = [f.name for f in dataclasses.fields(Optim) if f.name != "lr"]
    assert [getattr(rl.critic, key) for key in shared] == [getattr(rl, key) for key in shared]
    other = composed("rl.critic.schedule=constant", "rl.lr=1e-4").rl
    assert (other.critic.schedule, other.critic.lr) == (Schedule.constant, 1e-3)
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
    for name, key in schema().items():
        if key.field is None:
            continue
        assert key.meaning and key.meaning == key.meaning.strip(), name
        no_default = key.field.default is key.field.default_factory is dataclasses.MISSING
        # a source has no file of its own in conf/, and most models have no partner
        named_by_user = "*" in name or ".pairs_with." in name
        assert no_default or named_by_user, f"{name} has a default in Python"


def test_fields_without_effect_on_results() -> None:
    """Placement, labels and logging do not change a run's identity; everything else does."""
    nodes = {Config} | {node_type(k.annotation) for k in schema().values() if k.is_node}
    free = {
        f"{node.__name__}.{f.name}"
        for node in nodes
        for f in dataclasses.fields(node)
        if not f.metadata["hashed"]
    }
    assert free == {
        *(
            f"Config.{name}"
            for name in (
                "stage",
                "pipeline",
                "inputs",
                "experiment_name",
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
        "Model.pairs_with",
        "Data.max_row_mb",
        "Eval.save_responses",
        "RewardSource.timeout",
        "Judge.concurrency",
        "Judge.cache",
        "Rl.name",
        "Rl.variant_of",
        "Data.workers",
        "Evaluation.every",
        "Evaluation.best_by",
        "Dpo.eval_every",
        "Rollout.log_responses",
        "Rollout.vllm",
        *(f"Vllm.{name}" for name in ("url", "command", "weights_dir")),
        *(f"Wandb.{name}" for name in ("mode", "project", "entity", "tags", "notes")),
    }


def test_config_survives_saving(tmp_path: Path) -> None:
    cfg = composed("rl.kl.coef=0.07", "deploy.threads=3")
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_keys_that_nobody_knows_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown key rl.lrr \(did you mean rl.lr\?\)"):
        composed("+rl.lrr=1")
    with pytest.raises(UserError, match=r"unknown key ppo \(did you mean rl\?\)"):
        composed("+ppo.x=1")
    with pytest.raises(UserError, match="unknown key nonsense"):
        composed("+nonsense.deep=1")


@pytest.mark.parametrize(
    "text",
    [
        "${seed}",
        "costs ${5}",
        r"\${seed} \\${seed}",
        "Write math as ${formula}$",
        "a ${ b",
        "$x$ {}",
    ],
)
def test_texts_with_a_dollar_and_a_brace_stay_as_they_are(tmp_path: Path, text: str) -> None:
    cfg = composed("stage=ppo", "data=jsonl", "data.sources.mine.path=a.jsonl")
    cfg.wandb.notes = cfg.data.sources["mine"].system_prompt = text
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg

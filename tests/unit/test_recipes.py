"""What conf/ says of models and machines.

Every combination composes. The recipes have the values of DeepSpeed-Chat's scripts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers import CONF, MODELS, PRESETS, STAGES, composed, some
from omegaconf import OmegaConf

from rlhf.config.choices import KlController, Normalize, RmLoss, Schedule, TrainOn
from rlhf.config.keys import lookup
from rlhf.config.stage_nodes import DsChat
from rlhf.config.validation import check_config

ACTORS = [name for name in MODELS if name != "custom"]  # whose path the user gives
REWARDS = ACTORS
DEPLOYMENTS = sorted(path.stem for path in (CONF / "deploy").glob("*.yaml"))
PROMISED = (
    "tiny opt125m opt350m opt1.3b opt2.7b opt6.7b opt13b opt30b opt66b "
    "llama2-7b llama2-13b llama3.2-1b llama3.2-3b "
    "qwen2.5-0.5b qwen2.5-1.5b qwen2.5-7b smollm2-135m smollm2-360m smollm2-1.7b "
    "pythia-160m pythia-410m pythia-1b pythia-1.4b pythia-6.9b gpt2 bloom-560m bloom-1b1"
)


def test_all_promised_models_are_there() -> None:
    assert set(PROMISED.split()) == set(ACTORS)


def pairs(models: list[str]) -> list:
    """Every model on every deployment; the quick tests take every ninth model on one."""
    everything = [(model, deploy) for model in models for deploy in DEPLOYMENTS]
    some = [(model, DEPLOYMENTS[i % len(DEPLOYMENTS)]) for i, model in enumerate(models[::9])]
    return [
        pytest.param(*pair, marks=[] if pair in some else pytest.mark.full) for pair in everything
    ]


@pytest.mark.parametrize("actor, deploy", pairs(ACTORS))
def test_every_actor_composes_on_every_deployment(actor: str, deploy: str) -> None:
    cfg = composed(f"actor={actor}", f"deploy={deploy}")
    assert check_config(cfg) == []
    assert cfg.actor.name == actor and cfg.reward.name in REWARDS


@pytest.mark.parametrize("reward, deploy", pairs(REWARDS))
def test_every_reward_model_composes_on_every_deployment(reward: str, deploy: str) -> None:
    cfg = composed("stage=rm", f"reward={reward}", f"deploy={deploy}")
    assert check_config(cfg) == [] and cfg.reward.name == reward


@pytest.mark.parametrize("stage", some(STAGES, every=3))
def test_the_stage_only_chooses_what_runs(stage: str) -> None:
    cfg, other = (
        composed(f"stage={s}", "actor=opt1.3b", "deploy=single_node") for s in ("pipeline", stage)
    )
    assert check_config(other) == []
    other.stage = cfg.stage
    if stage in PRESETS:  # which chooses its rl preset, too
        other.rl = cfg.rl
    assert other == cfg


# sft: per GPU x accumulation x GPUs, learning rate, weight decay, epochs;
# ppo: prompts per optimizer step, learning rate, weight decay;
# both: ZeRO stage, LoRA rank, activation checkpointing
SCRIPTS = {
    ("opt1.3b", "single_gpu"): ((16 * 8, 5e-4, 0.0, 1), (16 * 2, 5e-4, 0.0), (0, 128, True)),
    ("opt6.7b", "single_gpu"): ((8 * 16, 5e-4, 0.0, 16), (8 * 16, 5e-4, 0.0), (0, 128, True)),
    ("opt1.3b", "single_node"): ((8 * 8, 9.65e-6, 0.0, 16), (4 * 8, 9.65e-6, 0.0), (2, 0, False)),
    ("opt6.7b", "single_node"): ((6 * 8, 9.65e-6, 0.0, 16), (4 * 8, 9.65e-6, 0.1), (3, 0, True)),
    ("opt13b", "single_node"): ((4 * 8, 5e-4, 0.0, 16), (16 * 8, 5e-4, 0.0), (3, 128, True)),
    ("opt30b", "single_node"): ((4 * 8, 5e-4, 0.0, 16), (4 * 8, 5e-4, 0.0), (3, 128, True)),
    ("opt66b", "multi_node"): ((4 * 64, 5e-4, 0.1, 2), (4 * 64, 5e-4, 0.1), (3, 128, True)),
    ("llama2-7b", "single_node"): ((4 * 8, 9.65e-6, 0.0, 4), (1 * 8, 9.65e-6, 0.1), (3, 0, True)),
}
REWARD_SCRIPTS = {
    ("opt350m", "single_gpu"): (16 * 4, 5e-5),
    ("opt350m", "single_node"): (4 * 8, 5e-5),
    ("opt350m", "multi_node"): (2 * 64, 5e-5),
    ("llama2-7b", "single_node"): (8 * 8, 9.65e-6),
}


@pytest.mark.parametrize("actor, deploy", some(SCRIPTS, every=4))
def test_recipes_have_the_values_of_deepspeed_chats_scripts(actor: str, deploy: str) -> None:
    cfg = composed(f"actor={actor}", f"deploy={deploy}")
    sft, ppo, placed = SCRIPTS[actor, deploy]
    assert (cfg.sft.batch_size, cfg.sft.lr, cfg.sft.weight_decay, cfg.sft.epochs) == sft
    assert (cfg.rl.batch_size // cfg.rl.minibatches, cfg.rl.lr, cfg.rl.weight_decay) == ppo
    assert (
        cfg.deploy.zero_stage,
        cfg.actor.lora.rank,
        cfg.deploy.activation_checkpointing,
    ) == placed
    assert cfg.rl.critic.lr == 5e-6 and cfg.sft.schedule == cfg.rl.schedule == Schedule.cosine


@pytest.mark.parametrize(
    "actor, deploy",
    [
        pytest.param(*pair, marks=[] if pair == ("opt1.3b", "single_gpu") else pytest.mark.full)
        for pair in SCRIPTS
    ],
)
def test_the_other_algorithms_sample_as_many_answers_as_ppo_and_fit_the_machines(
    actor: str, deploy: str
) -> None:
    ppo = composed("stage=ppo", f"actor={actor}", f"deploy={deploy}").rl
    for stage in (*PRESETS, "dpo"):
        cfg = composed(f"stage={stage}", f"actor={actor}", f"deploy={deploy}")
        assert check_config(cfg) == []
        assert (cfg.rl.lr, cfg.rl.batch_size) == (ppo.lr, ppo.batch_size)


@pytest.mark.parametrize("reward, deploy", REWARD_SCRIPTS, ids=lambda x: x)
def test_reward_recipes_have_the_values_of_deepspeed_chats_scripts(
    reward: str, deploy: str
) -> None:
    rm = composed("stage=rm", f"reward={reward}", f"deploy={deploy}").rm
    assert (rm.batch_size, rm.lr) == REWARD_SCRIPTS[reward, deploy]
    assert (rm.weight_decay, rm.epochs, rm.warmup_ratio) == (0.1, 1, 0.0)


@pytest.mark.parametrize("group", ["recipe", "reward_recipe"])
def test_recipes_set_what_is_theirs_and_name_their_source(group: str) -> None:
    own = {
        "recipe": {"actor", "sft", "rl", "dpo", "deploy"},
        "reward_recipe": {"reward", "rm"},
    }[group]
    for path in (CONF / group).glob("*.yaml"):
        keys = {
            line.split(":")[0] for line in path.read_text().splitlines() if line[:1].isalpha()
        } - {"defaults"}
        assert keys <= own, path
        if not path.stem.startswith("tiny"):
            assert "DeepSpeed-Chat, step" in path.read_text(), path


# --------------------------------------------------------------------------- bug for bug, rl=dschat

DSCHAT = ["rl=dschat", "rm=dschat", "sft=dschat"]


def leaves(node: dict, prefix: str = "") -> set[str]:
    """Dotted keys of all values of a file."""
    nodes = {key: value for key, value in node.items() if isinstance(value, dict)}
    below = (leaves(value, f"{prefix}{key}.") for key, value in nodes.items())
    return {f"{prefix}{key}" for key in node if key not in nodes and key != "defaults"}.union(
        *below
    )


def keys_of(path: Path) -> set[str]:
    return leaves(OmegaConf.to_container(OmegaConf.load(path)))  # type: ignore[arg-type]


def test_no_recipe_sets_what_the_dschat_options_set() -> None:
    """Recipes are read last: they would undo the comparison unseen."""
    taken = {
        f"{node}.{key}"
        for node in ("sft", "rm", "rl")
        for key in keys_of(CONF / node / "dschat.yaml")
    }
    assert {
        "rl.kl.coef",
        "rl.dschat.greedy",
        "rl.epochs",
        "rm.loss",
        "sft.train_on",
    } <= taken
    for group in ("recipe", "reward_recipe"):
        for path in (CONF / group).glob("*.yaml"):
            assert not keys_of(path) & taken, path


@pytest.mark.parametrize(
    "actor, deploy",
    some(
        sorted(tuple(path.stem.rsplit("-", 1)) for path in (CONF / "recipe").glob("*.yaml")),
        every=4,
    ),
)
def test_the_dschat_options_hold_with_every_recipe(actor: str, deploy: str) -> None:
    chosen = [f"actor={actor}", f"deploy={deploy}"]
    plain, cfg = composed(*chosen), composed(*chosen, *DSCHAT)
    assert check_config(cfg) == []
    assert cfg.rl.dschat == DsChat(greedy=True, pad_is_eos=True)
    assert (cfg.sft.train_on, cfg.rm.loss) == (TrainOn.everything, RmLoss.per_token)
    rl = cfg.rl
    assert (rl.kl.coef, rl.score_clip, rl.clip_low, rl.clip_high, rl.critic.value_clip) == (
        0.1,
        5,
        0.2,
        0.2,
        0.2,
    )
    assert (rl.gamma, rl.gae_lambda, rl.epochs, rl.minibatches) == (1, 0.95, 1, 1)
    assert (
        rl.adam_eps,
        rl.critic.adam_eps,
        rl.missing_eos_penalty,
        rl.length_penalty,
    ) == (1e-8, 1e-8, 0, 0)
    assert not (rl.normalize_score or rl.whiten_rewards or rl.scale_score)
    assert rl.normalize == Normalize.none
    assert (
        rl.kl == dataclasses.replace(plain.rl.kl, coef=0.1)
        and rl.kl.controller == KlController.fixed
    )
    for key in (
        "rl.lr",
        "rl.schedule",
        "rl.batch_size",
        "rl.critic.lr",
        "sft.lr",
        "sft.batch_size",
        "rm.lr",
        "rm.batch_size",
    ):
        assert lookup(cfg, key) == lookup(plain, key), f"{key} is the recipe's"


def test_lora_experiments_choose_their_machine() -> None:
    cfg = composed("experiment=opt1.3b_lora")
    assert (
        cfg.actor.name,
        cfg.deploy.processes_per_node,
        cfg.actor.lora.rank,
        cfg.actor.lora.alpha,
    ) == (
        "opt1.3b",
        8,
        128,
        1,
    )
    assert (cfg.reward.name, list(cfg.data.sources), cfg.sft.batch_size) == (
        "opt350m",
        ["rm_static"],
        64,
    )
    cfg = composed("experiment=llama2-7b_lora")
    assert (cfg.actor.name, cfg.actor.lora.rank, cfg.reward.lora.rank, cfg.deploy.zero_stage) == (
        "llama2-7b",
        64,
        64,
        3,
    )

"""Wrong keys, options, values and flags get one line with the fix; unused keys are named."""

from __future__ import annotations

import pytest
from helpers import command

from rlhf import arguments, cli, run
from rlhf.config import keys, suggestions

pytestmark = pytest.mark.usefixtures("options")


@pytest.mark.parametrize(
    "override, suggestion",
    [
        ("ppo.kl.coef=1", "ppo.kl.coef (did you mean rl.kl.coef?)"),
        ("rloo.lr=1", "rloo.lr (did you mean rl.lr?)"),
        ("grpo.normalize_std=1", "grpo.normalize_std (did you mean rl.normalize?)"),
        ("ppo.whiten_advantages=1", "ppo.whiten_advantages (did you mean rl.normalize?)"),
        ("ppo.critic_optim.lr=1", "ppo.critic_optim.lr (did you mean rl.critic.lr?)"),
        ("ppo.critic_warmup=1", "(did you mean rl.critic.warmup_rollouts?)"),
        ("ppo.value_clip=1", "(did you mean rl.critic.value_clip?)"),
        ("ppo.lam=1", "ppo.lam (did you mean rl.gae_lambda?)"),
        ("grpo.kl.place=loss", "grpo.kl.place (did you mean rl.kl.applied_to?)"),
        ("grpo.clip=1", "grpo.clip (did you mean rl.clip_low?)"),
        ("ppo.loss_over=token", "(did you mean rl.loss_aggregation?)"),
        ("grpo.batch_size=8", "(did you mean rl.batch_size, which counts responses?)"),
        ("online.lr=1", "online.lr (did you mean rl.lr?)"),
        ("ppo.dschat.dropout=1", "(did you mean rl.dschat?)"),
        ("ppo=dschat", "ppo (did you mean rl=dschat?)"),
        ("data.source.mine.path=a", "data.source.mine.path (did you mean data.sources.mine.path?)"),
        ("rl.reward.mine.function=a:b", "(did you mean rl.rewards.mine.function?)"),
        ("exp=study", "exp (did you mean experiment_name?)"),
        (
            "sft.train_on_prompt=true",
            "(did you mean sft.train_on=everything in place of true, and sft.train_on=last in "
            "place of false?)",
        ),
        ("deploy.gpus=2", "deploy.gpus (did you mean deploy.processes_per_node?)"),
        # other frameworks
        ("kl_coef=1", "kl_coef (did you mean rl.kl.coef?)"),
        ("cliprange=1", "cliprange (did you mean rl.clip_low?)"),
        ("rl.num_generations=4", "(did you mean rl.responses_per_prompt?)"),
        ("sft.learning_rate=1", "sft.learning_rate (did you mean sft.lr?)"),
        ("learning_rate=1", "(did you mean sft.lr, rm.lr, dpo.lr or rl.lr?)"),
        ("bf16=true", "bf16 (did you mean deploy.precision?)"),
        ("adv_estimator=grpo", "(did you mean rl.advantage?)"),
        ("run_name=x", "run_name (did you mean experiment_name?)"),
        ("lr=1", "lr (did you mean sft.lr, rm.lr, dpo.lr or rl.lr?)"),
        ("rl.kl_coef=1", "(did you mean rl.kl.coef?)"),
        ("ppo.learning_rate=1", "(did you mean rl.lr?)"),
        ("SFT.LR=1", "(did you mean sft.lr?)"),
        ("sft.batch-size=1", "(did you mean sft.batch_size?)"),
        (
            "max_steps=3",
            "(did you mean sft.max_steps, rm.max_steps, dpo.max_steps or rl.max_steps?)",
        ),
        ("model=opt1.3b", "model (did you mean actor?)"),
        ("dataset=x", "dataset (did you mean data?)"),
        ("rl.foo=1", "rl.foo (see python train.py --help rl)"),
        ("data.sources.mine.paht=x", "(did you mean data.sources.mine.path?)"),
        # typing errors
        ("rl.lrr=1", "rl.lrr (did you mean rl.lr?)"),
        ("rl.kl.koef=1", "rl.kl.koef (did you mean rl.kl.coef?)"),
        ("gae_lambda=1", "gae_lambda (did you mean rl.gae_lambda?)"),
        ("qqqqq=1", "qqqqq (see python train.py --help)"),
    ],
)
def test_an_unknown_key_gets_the_closest_one(override: str, suggestion: str) -> None:
    (line,) = arguments.explain(override)
    assert line.startswith("unknown key ") and line.endswith(suggestion)


def test_every_renamed_key_leads_to_a_key_that_exists() -> None:
    for new in suggestions.RENAMED.values():
        assert keys.find_key(new), new
    for name in suggestions.FOREIGN.values():
        assert keys.find_key(name) or keys.find_key(f"rl.{name}"), name


@pytest.mark.parametrize(
    "override, line",
    [
        ("stage=grppo", "stage=grppo: no such option (did you mean grpo?)"),
        ("pipeline=sft", "pipeline=sft: no such option; choose from"),
        ("actor=opt1.3", "actor=opt1.3: no such option (did you mean opt1.3b?)"),
        ("rl=ppo,grpoo", "rl=grpoo: no such option (did you mean grpo?)"),
        ("data=[sandbox,shpp]", "data=shpp: no such option (did you mean shp?)"),
        ("actor=opt-1.3b", "actor=opt-1.3b: no such option (did you mean opt1.3b?)"),
        ("actor=OPT13B", "actor=OPT13B: no such option (did you mean opt13b?)"),
        ("data=rm-static", "data=rm-static: no such option (did you mean rm_static?)"),
        ("deploy=gpu", "deploy=gpu: no such option (did you mean single_gpu or small_gpu?)"),
        ("stage=reward", "stage=reward: no such option (did you mean rm?)"),
        ("rl=null", "rl=null: choose one of cispo, dapo, dr_grpo"),
        ("+actor=tiny", "+actor=tiny: leave out the +: actor=tiny"),
        ("rl.kl.coef=[", "cannot read 'rl.kl.coef=['"),
        ("stage", "cannot read 'stage': write KEY=VALUE without spaces, as in stage=ppo"),
        ("=", "cannot read '=': write KEY=VALUE without spaces"),
        ("rl.lr=1e-5,", "cannot read 'rl.lr=1e-5,': remove the comma at the end: rl.lr=1e-5"),
        ("data=a.jsonl", "data=a.jsonl: no such option; a file or hub id: data=jsonl data.sources"),
        ("actor=/m/x", "actor=/m/x: no such option; a path or hub id: actor=custom actor.path=/m/"),
        ("data.sources.path=x", "data.sources.path=x: a name of your choice is missing: data.sour"),
    ],
)
def test_an_option_that_is_not_there_gets_the_closest_one(override: str, line: str) -> None:
    (said,) = arguments.explain(override)
    assert said.startswith(line)


@pytest.mark.parametrize(
    "override, line",
    [
        ("sft.lr=", "sft.lr=: has no value; give a number"),
        ("sft.lr=null", "sft.lr=null: cannot be null; give a number"),
        ("sft.max_steps=x", "sft.max_steps=x: must be a whole number or null"),
        ("rl.max_steps=inf", "rl.max_steps=inf: must be a whole number or null"),
        ("seed=1.5", "seed=1.5: must be a whole number"),
        ("seed=true", "seed=true: must be a whole number"),
        ("seed=inf", "seed=inf: must be a whole number"),
        ("fresh=3", "fresh=3: must be true or false"),
        ("sft.epochs=[1,2]", "to try several: python train.py -m sft.epochs=1,2"),
        ("sft.betas=0.9", "sft.betas=0.9: must be a list; in quotes: 'sft.betas=[0.9]'"),
        ("deploy.precision=FP16", "fp32, bf16, fp16, autocast (did you mean fp16?)"),
        (
            "rl.kl=3",
            "rl.kl=3: rl.kl is not a single key; set one in it, such as rl.kl.coef (python",
        ),
        ("data.sources=x", "not a single key; set one in it, such as data.sources.mine.path ("),
        (
            "data.sources.me=x",
            "set one in it, such as data.sources.me.path (python train.py --help",
        ),
        ("actor.path=", "actor.path=: has no value; give a text"),
        ("rl.rewards={m: {weight: x}}", "rl.rewards.m.weight=x: must be a number"),
        ("+sft.lr=1", "+sft.lr=1: this key exists; leave out the +: sft.lr=1"),
        ("~rl.lr", "~rl.lr: this key cannot be removed; set another value"),
        ("sft.lr=1e-4,x", "sft.lr=x: must be a number"),
    ],
)
def test_a_value_of_the_wrong_kind_gets_one_line(override: str, line: str) -> None:
    (said,) = arguments.explain(override)
    assert line in said


@pytest.mark.parametrize(
    "flag, fix",
    [
        ("--stage=ppo", "keys have no dashes: stage=ppo"),
        ("--plan", "keys have no dashes: plan=VALUE"),
        ("-rl.lr=1e-5", "keys have no dashes: rl.lr=1e-5"),
        ("--learning_rate", "no such flag; keys have no dashes, as in stage=ppo"),
    ],
)
def test_a_key_with_dashes_gets_one_line(flag: str, fix: str) -> None:
    (line,) = cli.explain_flag(flag)
    assert line.startswith(f"{flag}: {fix}")


def test_flags_of_hydra_are_not_refused() -> None:
    for flag in cli.HYDRA_FLAGS:
        assert cli.explain_flag(flag) == []


def test_commas_without_m_get_the_fix() -> None:
    for override, fix in (
        ("seed=1,2", "add -m; else give one value"),
        ("sft.lr=1,5e-4", "for one number write a point: sft.lr=1.5e-4"),
        ("data=a,b", "to combine them: 'data=[a,b]'"),
        ("rl.betas=0.9,0.95", "a list is in brackets: 'rl.betas=[0.9,0.95]'"),
        ("wandb.notes=a,b", "a text with commas is in quotes: \"wandb.notes='a,b'\""),
    ):
        (line,) = arguments.explain(override, multirun=False)
        assert line.endswith(fix), line


def test_what_exists_gets_no_remark() -> None:
    for override in (
        "stage=rl",
        "stage=grpo",
        "pipeline=dpo",
        "rl.rewards.mine.weight=1",
        "data.sources.mine.path=x.jsonl",
        "hydra.verbose=true",
        "~rl.rewards.model",
        "+rl.rewards={a: {weight: 1}}",
        "recipe=null",
        "~recipe",
        "sft.max_steps=null",
        "sft.lr=1e-4,2e-4",
        "sft.epochs=range(1,3)",
        "data.eval_rows='12'",
        "rl.lr=${rl.critic.lr}",
        "+data.sources.mine.columns={prompt: q}",
        "wandb.notes='a, b'",
        "fresh=yes",
    ):
        assert arguments.explain(override) == [], override


def test_keys_that_the_algorithm_does_not_read_are_named() -> None:
    unused = ["rl.critic.lr=1e-4", "rl.gamma=0.9", "rl.whiten_rewards=true", "rl.gae_lambda=0.9"]
    lines = run.name_unused_keys(command("stage=grpo", *unused, "rl.lr=1e-4"))
    assert sorted(lines) == [
        "rl.critic.lr=0.0001: not used by rl.advantage=group",
        "rl.gae_lambda=0.9: not used by rl.advantage=group",
        "rl.gamma=0.9: not used by rl.advantage=group",
        "rl.whiten_rewards=True: not used by rl.advantage=group",
    ]
    assert run.name_unused_keys(command("stage=ppo", *unused)) == []
    lines = run.name_unused_keys(command("stage=ppo", "rl.advantage=return", *unused))
    assert sorted(line.split("=")[0] for line in lines) == ["rl.critic.lr", "rl.gae_lambda"]
    assert run.name_unused_keys(command("stage=sft", *unused)) == []
    assert run.name_unused_keys(command("stage=grpo", "actor=opt1.3b")) == [], "a recipe's values"


def test_keys_that_another_value_switches_off_are_named() -> None:
    idle = [
        "rl.kl.target=4",
        "rl.kl.final_coef=0.1",
        "actor.lora.alpha=8",
        "reward.lora.dropout=0.1",
    ]
    assert sorted(run.name_unused_keys(command("stage=ppo", *idle))) == [
        "actor.lora.alpha=8.0: not used by actor.lora.rank=0",
        "reward.lora.dropout=0.1: not used by reward.lora.rank=0",
        "rl.kl.final_coef=0.1: not used by rl.kl.controller=fixed",
        "rl.kl.target=4.0: not used by rl.kl.controller=fixed",
    ]
    on = ["actor.lora.rank=4", "reward.lora.rank=4", "rl.kl.controller=adaptive"]
    lines = run.name_unused_keys(command("stage=ppo", *idle, *on))
    assert lines == ["rl.kl.final_coef=0.1: not used by rl.kl.controller=adaptive"]
    assert run.name_unused_keys(command("stage=sft", "rl.kl.target=4")) == [], "not of this stage"
    shares = ["data.shares=[1,0,0]", "data.eval_share=0.3"]
    assert run.name_unused_keys(command("stage=sft", *shares)) == [
        "data.shares=[1, 0, 0]: not used by the built-in sandbox",
        "data.eval_share=0.3: not used by the built-in sandbox",
    ]
    own_file = ["data=jsonl", "data.sources.mine.path=x.jsonl"]
    assert run.name_unused_keys(command("stage=sft", *own_file, *shares)) == []

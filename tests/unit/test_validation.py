"""What is wrong with values, named with the number and the fix; and what may be chosen together."""

from __future__ import annotations

import pytest
from helpers import composed

from rlhf.config.validation import check_config


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (
            ["rl.batch_size=100", "rl.minibatches=3"],
            "rl.batch_size=100 (responses): must be a multiple of rl.responses_per_prompt=1 "
            "and of rl.minibatches=3 x deploy.processes_per_node=1 = 3; try rl.batch_size=99",
        ),
        (
            ["deploy.processes_per_node=3"],
            "sft.batch_size=16: not divisible by deploy.processes_per_node=3; try 15",
        ),
        (
            ["deploy.nodes=3"],
            "sft.batch_size=16: not divisible by deploy.processes_per_node=1 x "
            "deploy.nodes=3; try 15",
        ),
        (
            ["deploy.offload.optimizer=true"],
            "deploy.offload.optimizer=true: needs deploy.zero_stage=1 or more, not 0",
        ),
        (
            ["deploy.offload.parameters=true", "deploy.zero_stage=2"],
            "needs deploy.zero_stage=3, not 2",
        ),
        (["deploy.precision=fp16"], "deploy.precision=fp16: not on CPU"),
        (
            ["deploy=single_gpu", "deploy.precision=fp16"],
            "deploy.precision=fp16: the ratios of ppo overflow in it; use bf16",
        ),
        (["deploy.node_rank=1"], "deploy.node_rank=1: must be below deploy.nodes=1"),
        (
            ["deploy.nodes=2", "deploy.node_rank=1", "deploy.hostfile=h"],
            "deploy.hostfile and deploy.node_rank: give one",
        ),
        (["deploy.master=here"], "deploy.master=here: give host:port"),
        (["deploy.master=here:99999"], "deploy.master=here:99999: give host:port"),
        (["seed=-1"], "seed=-1: must be at least 0"),
        (
            ["rl=cispo", "stage=cispo", "rl.dual_clip=3"],
            "rl.dual_clip=3 with rl.policy_loss=cispo: it bounds PPO's clipped loss; set it to "
            "null, or use rl.policy_loss=clip",
        ),
        (["rl.dual_clip=1"], "rl.dual_clip=1.0: must be above 1"),
        (
            ["rl.dynamic_sampling=3"],
            "rl.dynamic_sampling=3 with rl.responses_per_prompt=1: it compares responses to a "
            "prompt, so there must be at least 2; or set it to null",
        ),
        (["rl.dynamic_sampling=1"], "rl.dynamic_sampling=1: must be at least 2"),
        (
            ["rl.overlong_penalty=64"],
            "rl.overlong_penalty=64: must be below rollout.max_new_tokens=64, of which it is the "
            "last part; try 12",
        ),
        (["rl.lr=inf"], "rl.lr=inf: must be a finite number, above 0"),
        (["experiment_name=../away"], "experiment_name=../away: give a plain name"),
        ([f"root={__file__}"], f"root={__file__}: {__file__} is a file; give a directory"),
        ([f"root={__file__}/mine/here"], f"/mine/here: {__file__} is a file; give a directory"),
        (
            ["data.sources.sandbox.path=/mine.jsonl"],
            "path=builtin:sandbox and format=sandbox go together, not /mine.jsonl",
        ),
        (
            ["data.sources.sandbox.path=/a", "data.sources.sandbox.format=chosen_rejected"],
            "no source is the built-in world: choose data=..., or set data.sandbox=null",
        ),
        (["deploy.bucket_mb=0"], "deploy.bucket_mb=0.0: must be above 0"),
        (["actor.lora.rank=-1"], "actor.lora.rank=-1: must be at least 0"),
        (["reward.lora.alpha=0"], "reward.lora.alpha=0.0: must be above 0"),
        (["actor.lora.dropout=1"], "actor.lora.dropout=1.0: must be at least 0, below 1"),
        (["actor.lora.targets=[]"], "actor.lora.targets=[]: name layers"),
        (["sft.lr=0"], "sft.lr=0.0: must be above 0"),
        (["rm.epochs=-1"], "rm.epochs=-1: must be above 0"),
        (["rl.gamma=1.5"], "rl.gamma=1.5: must be at least 0, at most 1"),
        (["deploy.zero_stage=4"], "deploy.zero_stage=4: must be at least 0, at most 3"),
        (["rollout.temperature=0"], "rollout.temperature=0.0: must be above 0"),
        (
            ["data.sandbox.label_noise=0.5"],
            "data.sandbox.label_noise=0.5: must be above 0, below 0.5",
        ),
        (["data.sandbox=null"], "data.sandbox=null: the built-in source needs its sizes"),
        (["data.shares=[1,2]"], "data.shares=[1, 2]: give three parts, for sft, rm"),
        (["data.shares=[0,0,0]"], "data.shares=[0, 0, 0]: give three parts, for sft, rm"),
        (["data=[sandbox,rm_static]"], "data: the built-in sandbox cannot be mixed"),
        (["data=[arithmetic,rm_static]"], "data: the built-in arithmetic cannot be mixed"),
        (["data=[arithmetic,sandbox]"], "built-in sandbox cannot be mixed with arithmetic"),
        (["data=arithmetic", "data.arithmetic=null"], "data.arithmetic=null: the built-in source"),
        (
            ["data=arithmetic", "data.sources.arithmetic.format=prompts"],
            "path=builtin:arithmetic and format=arithmetic go together",
        ),
        (["data=arithmetic", "data.eval_rows=257"], "arithmetic are held out; give at most 256"),
        (["data=arithmetic", "data.arithmetic.wrong=1"], "data.arithmetic.wrong=1.0: must be"),
        (
            ["data=arithmetic", "data.sources.arithmetic.system_prompt=Hm"],
            "data.sources.arithmetic.system_prompt=Hm: format=arithmetic does not use it",
        ),
        (
            ["data=shp", "data.sources.shp.system_prompt=Hm", "data.template=none"],
            "data.sources.shp.system_prompt: data.template=none has no roles",
        ),
        (["data=shp", "data.sources.shp.system_prompt=''"], "system_prompt: it is empty"),
        (["data=shp", "data.sources.shp.weight=0"], "data.sources.shp.weight=0.0: must be above 0"),
        (["data=shp", "data.sources.shp.rows=-1"], "data.sources.shp.rows=-1: must be above 0"),
        (
            ["data=shp", "data.sources.shp.min_score_ratio=0.5"],
            "data.sources.shp.min_score_ratio=0.5: must be at least 1",
        ),
        (["data.workers=0"], "data.workers=0: must be above 0"),
        (["sft.betas=[0.9]"], "sft.betas=[0.9]: give two numbers"),
        (["rl.missing_eos_penalty=-1"], "rl.missing_eos_penalty=-1.0: must be at least 0"),
        (
            ["rl.length_penalty=-0.01"],
            "rl.length_penalty=-0.01: must be at least 0",
        ),
        (["rl.length_penalty=inf"], "rl.length_penalty=inf: must be a finite number, at least 0"),
        (
            ["rl.kl.estimator=k1", "rl.kl.applied_to=loss"],
            "rl.kl.estimator=k1 with rl.kl.applied_to=loss: its gradient is zero in expectation",
        ),
        (
            ["rl.kl.controller=adaptive", "rl.kl.coef=0"],
            "rl.kl.coef=0 with rl.kl.controller=adaptive: the controller multiplies the "
            "coefficient",
        ),
        (["rl.kl.coef=-0.1"], "rl.kl.coef=-0.1: must be at least 0"),
        (["rl.kl.final_coef=-0.1"], "rl.kl.final_coef=-0.1: must be at least 0"),
        (["rl.kl.target=0"], "rl.kl.target=0.0: must be above 0"),
        (["rl.kl.horizon=0"], "rl.kl.horizon=0.0: must be above 0"),
        (["rl.critic.lr=0"], "rl.critic.lr=0.0: must be above 0"),
        (["rl.critic.betas=[0.9,1]"], "rl.critic.betas=[0.9, 1.0]: must be at least 0, below 1"),
        (["rl.critic.final_lr=2"], "rl.critic.final_lr=2.0: must be at least 0, at most 1"),
        (["rl.critic.warmup_rollouts=-1"], "rl.critic.warmup_rollouts=-1: must be at least 0"),
        (["sft.warmup_steps=-1"], "sft.warmup_steps=-1: must be at least 0"),
        (["rl.warmup_steps=-1"], "rl.critic.warmup_steps=-1: must be at least 0"),
        (["rl.clip_high=0"], "rl.clip_high=0.0: must be above 0"),
        (["rl.critic.value_clip=0"], "rl.critic.value_clip=0.0: must be above 0"),
        (["rl.score_clip=0"], "rl.score_clip=0.0: must be above 0"),
        (["rl.target_kl=0"], "rl.target_kl=0.0: must be above 0"),
        (["rl.entropy_coef=-1"], "rl.entropy_coef=-1.0: must be at least 0"),
        (["rl.ptx.coef=-1"], "rl.ptx.coef=-1.0: must be at least 0"),
        (["rl.ptx.max_tokens=0"], "rl.ptx.max_tokens=0: must be above 0"),
        (["rl.gae_lambda=-0.1"], "rl.gae_lambda=-0.1: must be at least 0, at most 1"),
        (["rl.ema=1"], "rl.ema=1.0: must be above 0, below 1"),
        (["rl.ema=0"], "rl.ema=0.0: must be above 0, below 1"),
        (["rl.evaluation.every=0"], "rl.evaluation.every=0: must be above 0"),
        (["rl.evaluation.temperature=0"], "rl.evaluation.temperature=0.0: must be above 0"),
        (["rl.evaluation.top_p=0"], "rl.evaluation.top_p=0.0: must be above 0, at most 1"),
        (["rl.evaluation.top_p=1.1"], "rl.evaluation.top_p=1.1: must be above 0, at most 1"),
        (["rl.evaluation.top_k=-1"], "rl.evaluation.top_k=-1: must be at least 0"),
        (
            ["rl.evaluation.best_by=objective", "rl.evaluation.top_p=0.9"],
            "rl.evaluation.best_by=objective with rl.evaluation.top_p=0.9: the KL in it can only "
            "be estimated from samples of the full distribution; use rl.evaluation.top_p=1, or "
            "rl.evaluation.best_by=score",
        ),
        (
            ["rl.evaluation.best_by=objective", "rl.evaluation.top_k=50"],
            "rl.evaluation.best_by=objective with rl.evaluation.top_k=50: the KL in it can only "
            "be estimated from samples of the full distribution; use rl.evaluation.top_k=0, or",
        ),
        (
            ["rollout.top_p=0.9"],
            "rollout.top_p=0.9: must be 1 in training: the loss uses the log-probabilities of "
            "the full distribution",
        ),
        (
            ["stage=ppo", "rollout.top_p=0.9"],
            "for evaluations set rl.evaluation.top_p, in chat --top-p",
        ),
        (
            ["rollout.top_k=50"],
            "rollout.top_k=50: must be 0 in training: the loss uses the log-probabilities",
        ),
        (["rollout.top_k=50"], "for evaluations set rl.evaluation.top_k, in chat --top-k"),
        (
            ["stage=grpo", "rl.responses_per_prompt=1"],
            "rl.responses_per_prompt=1: rl.advantage=group compares a response with the others",
        ),
        (
            ["stage=rloo", "rl.responses_per_prompt=1"],
            "rl.responses_per_prompt=1: rl.advantage=leave_one_out compares a response with the",
        ),
        (
            ["stage=ppo", "rl.normalize=group"],
            "rl.normalize=group with rl.advantage=gae: only group and leave_one_out compare",
        ),
        (
            ["stage=ppo", "rl.advantage=return", "rl.normalize=group"],
            "rl.normalize=group with rl.advantage=return: only group and leave_one_out compare",
        ),
        (["rl.responses_per_prompt=0"], "rl.responses_per_prompt=0: must be above 0"),
        (
            ["rollout.log_responses=-2"],
            "rollout.log_responses=-2: must be at least -1",
        ),
        (["~rl.rewards.model"], "rl.rewards is empty: nothing to train on"),
        (["rl.rewards.model.weight=0"], "rl.rewards: all weights are 0"),
        (
            ["rl.rewards.model.weight=inf"],
            "rl.rewards.model.weight=inf: must be a finite number, at least -1,000,000",
        ),
        (
            ["rl.rewards.model.weight=nan"],
            "rl.rewards.model.weight=nan: must be a finite number, at least -1,000,000",
        ),
        (
            ["rl.rewards.model.path=/m", "rl.rewards.model.function='a:b'"],
            "rl.rewards.model: path and function are both given",
        ),
        (
            ["+rl.rewards={gold: {function: gold}}"],
            "rl.rewards.gold.function=gold: give module:function or FILE.py:function, for instance "
            "rlhf.data.sandbox:gold",
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
            "rl.batch_size=5 (responses): must be a multiple of rl.responses_per_prompt=2 and "
            "of rl.minibatches=4 x deploy.processes_per_node=1 = 4; try rl.batch_size=4",
        ),
        (
            [
                "stage=ppo",
                "rl.batch_size=50",
                "rl.responses_per_prompt=3",
                "deploy.processes_per_node=2",
                "deploy.nodes=2",
            ],
            "rl.minibatches=4 x deploy.processes_per_node=2 x deploy.nodes=2 = 16; try "
            "rl.batch_size=48",
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
        ["rl.evaluation.best_by=objective", "rl.evaluation.temperature=0.5"],
        ["rl.kl.estimator=k1", "rl.kl.applied_to=reward"],
        ["rl.kl.estimator=k2", "rl.kl.applied_to=loss"],
        ["rl.kl.estimator=k3", "rl.kl.applied_to=loss", "rl.kl.coef=0"],
        ["rl.kl.controller=linear", "rl.kl.coef=0", "rl.kl.final_coef=0.1"],
        ["rl.batch_size=8", "rl.responses_per_prompt=4"],
        [
            "rl.batch_size=8",
            "rl.responses_per_prompt=4",
            "rl.minibatches=2",
            "deploy.processes_per_node=4",
            "stage=ppo",
        ],
        ['+rl.rewards={gold: {function: "rlhf.data.sandbox:gold"}}'],
        [
            '+rl.rewards={gold: {function: "rlhf.data.sandbox:gold"}}',
            "+rl.rewards={other: {path: /m, weight: -1}}",
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
        ["rollout.log_responses=-1"],
        ["rollout.log_responses=0", "rl.warmup_steps=0"],
        ["stage=grpo", "rl.normalize=none"],
        ["stage=rloo", "rl.normalize=group"],
        ["stage=grpo", "rl.normalize=batch", "rl.policy_loss=cispo"],
        ["stage=grpo", "rl.importance=sequence", "rl.clip_low=3e-4", "rl.clip_high=4e-4"],
        ["stage=ppo", "rl.advantage=return", "rl.normalize=none"],
    ],
    ids=" ".join,
)
def test_what_may_be_chosen_together(overrides: list[str]) -> None:
    assert check_config(composed(*overrides)) == []


def test_what_is_wrong_is_said_once_and_only_of_what_runs() -> None:
    (line,) = check_config(composed("stage=ppo", "rl.lr=-1", "rl.critic.lr=1e-5"))
    assert line == "rl.lr=-1.0: must be above 0"
    lines = check_config(composed("stage=rloo", "rl.lr=-1"))
    assert lines == ["rl.lr=-1.0: must be above 0"]

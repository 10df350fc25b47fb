"""What can be wrong with the values of a configuration, before anything is loaded.

Ranges of single numbers are on their fields (schema.py); here are the rules across fields. Each
function yields one line per problem: key=value, what is wrong, the fix. Nothing is repaired.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf.base.constants import WORLD_HELD_OUT
from rlhf.base.log import plural
from rlhf.base.processors import usable_cores
from rlhf.base.urls import wrong_address
from rlhf.config.choices import (
    COMPARES_RESPONSES,
    WORLDS,
    BestBy,
    Decoding,
    Device,
    DpoLoss,
    Format,
    KlAppliedTo,
    KlController,
    KlEstimator,
    Normalize,
    PolicyLoss,
    Precision,
    Template,
)
from rlhf.config.deployment import built_stage, describe_processes, world_size
from rlhf.config.keys import out_of_range
from rlhf.config.limits import MOST_BATCH, MOST_NODES, MOST_PROCESSES, THREADS_PER_CORE
from rlhf.config.schema import Config, Source
from rlhf.config.stage_graph import (
    function_sources,
    is_rl,
    optimizer_nodes,
    score_sources,
    verifiers,
)
from rlhf.config.stage_nodes import RewardSource
from rlhf.config.vllm import check_vllm

GOLD = "rlhf.data.sandbox:gold"
FUNCTION = r"([A-Za-z_][\w.]*|.+\.py):[A-Za-z_]\w*"


def check_config(cfg: Config) -> list[str]:
    """All that is wrong with the values, one line per problem."""
    checks = [check_outputs, check_deploy, check_models, check_data, check_batches]
    checks += [check_rl, check_rollouts, check_vllm, check_dpo, check_eval]
    return out_of_range(cfg) + [line for check in checks for line in check(cfg)]


def check_outputs(cfg: Config) -> Iterator[str]:
    """Where the outputs go."""
    root = Path(os.path.abspath(os.path.expanduser(cfg.root)))
    there = next(filter(os.path.exists, [root, *root.parents]), root)
    if not os.path.isdir(there):
        yield f"root={cfg.root}: {there} is a file; give a directory, which need not exist"
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", cfg.experiment_name):
        yield f"experiment_name={cfg.experiment_name}: give a plain name, it becomes a folder"


def check_deploy(cfg: Config) -> Iterator[str]:
    deploy, offload = cfg.deploy, cfg.deploy.offload
    if offload.optimizer and built_stage(deploy) == 0:
        yield "deploy.offload.optimizer=true: needs deploy.zero_stage=1 or more, not 0"
    if offload.parameters and deploy.zero_stage != 3:
        yield f"deploy.offload.parameters=true: needs deploy.zero_stage=3, not {deploy.zero_stage}"
    cores = usable_cores()
    if deploy.threads is not None and deploy.threads > THREADS_PER_CORE * cores:
        yield (
            f"deploy.threads={deploy.threads}: {plural(cores, 'core')} can be used here; give at "
            f"most {THREADS_PER_CORE * cores}, or null for cores / processes"
        )
    if deploy.precision == Precision.fp16:
        if deploy.device != Device.gpu:
            yield "deploy.precision=fp16: not on CPU; use bf16 or fp32"
        for stage in filter(is_rl, cfg.stage.runs):
            yield f"deploy.precision=fp16: the ratios of {stage} overflow in it; use bf16"
    if deploy.node_rank is not None:
        if deploy.node_rank >= deploy.nodes:
            rank, nodes = f"deploy.node_rank={deploy.node_rank}", f"deploy.nodes={deploy.nodes}"
            yield f"{rank}: must be below {nodes}"
        if deploy.hostfile is not None:
            yield "deploy.hostfile and deploy.node_rank: give one; a hostfile starts all nodes"
        if deploy.master is None:
            yield f"deploy.node_rank={deploy.node_rank}: give deploy.master=host:port of node 0 too"
    if deploy.master is not None:
        address = re.fullmatch(r"[^:\s]+:(\d{1,5})", deploy.master)
        if address is None or not 0 < int(address[1]) < 2**16:
            yield f"deploy.master={deploy.master}: give host:port of node 0"


def check_models(cfg: Config) -> Iterator[str]:
    for role, model in (("actor", cfg.actor), ("reward", cfg.reward)):
        if model.lora.targets == []:
            yield f"{role}.lora.targets=[]: name layers, or null for all linear layers but the head"
    for name, optim in optimizer_nodes(cfg).items():
        if len(optim.betas) != 2:
            yield f"{name}.betas={optim.betas}: give two numbers, each at least 0 and below 1"


def check_data(cfg: Config) -> Iterator[str]:
    sources = cfg.data.sources
    if len(cfg.data.shares) != 3 or not any(cfg.data.shares):
        yield f"data.shares={cfg.data.shares}: give three parts, for sft, rm, online RL, not all 0"
    if not sources:
        yield "data.sources is empty: choose data=..., or give data.sources.NAME.path and .format"
    for name, source in sources.items():
        yield from check_used(name, source)
        if source.system_prompt is not None and cfg.data.template is Template.none:
            yield (
                f"data.sources.{name}.system_prompt: data.template=none has no roles; choose "
                "another data.template, or write it into the prompts"
            )
        if source.system_prompt is not None and not source.system_prompt.strip():
            yield f"data.sources.{name}.system_prompt: it is empty; give a text, or null"
    for world in WORLDS:
        yield from check_world(cfg, world)


def check_world(cfg: Config, world: Format) -> Iterator[str]:
    """A built-in world has its sizes, and is the only source."""
    name, path = world.name, f"builtin:{world.name}"
    sources, has_sizes = cfg.data.sources, getattr(cfg.data, world.name) is not None
    for key, source in sources.items():
        if (source.path == path) != (source.format == world):
            yield (
                f"data.sources.{key}: path={path} and format={name} go together, not {source.path}"
            )
    if has_sizes and not any(source.format == world for source in sources.values()):
        yield (
            f"data.{name} has sizes, but no source is the built-in world: choose data=..., or set "
            f"data.{name}=null"
        )
    if not any(source.path == path for source in sources.values()):
        return
    if not has_sizes:
        yield f"data.{name}=null: the built-in source needs its sizes, see conf/data/{name}.yaml"
    if cfg.data.eval_rows > WORLD_HELD_OUT:
        yield (
            f"data.eval_rows={cfg.data.eval_rows}: {WORLD_HELD_OUT} prompts of the built-in {name} "
            f"are held out; give at most {WORLD_HELD_OUT}"
        )
    if others := [other for other, source in sources.items() if source.path != path]:
        yield (
            f"data: the built-in {name} cannot be mixed with {', '.join(others)}: its ground truth "
            "covers its own prompts only; your own file alone: data=jsonl "
            "data.sources.mine.path=FILE"
        )


# keys of a source that rows of a format do not use
UNUSED = {
    # all but path and format
    **dict.fromkeys(WORLDS, [field.name for field in dataclasses.fields(Source)][2:]),
    Format.text: ["eval_split", "weight", "sft_only", "system_prompt"],
    Format.prompts: ["sft_only"],
}


def check_used(name: str, source: Source) -> Iterator[str]:
    """Keys of a source that are set, and that its format does not use; none without a format."""
    if source.format is None:
        return
    unused = UNUSED.get(source.format, [])
    if source.format != Format.scored_answers:
        unused = list(dict.fromkeys([*unused, "min_score_ratio"]))
    plain = Source(path=source.path)
    where, reason = f"data.sources.{name}", f"format={source.format.name} does not use it"
    for key in unused:
        value = getattr(source, key)
        if value != getattr(plain, key):
            text = str(value).lower() if isinstance(value, bool) else value
            yield f"{where}.{key}={text}: {reason}; leave it out"
    if source.format == Format.prompts and source.weight > 1:
        yield (
            f"{where}.weight={source.weight:g}: online RL takes each prompt once; leave it out, or"
            " raise rl.prompt_epochs"
        )


def check_batches(cfg: Config) -> Iterator[str]:
    """Batches that all processes can share evenly."""
    world = world_size(cfg)
    too_many = (
        cfg.deploy.processes_per_node > MOST_PROCESSES
        or cfg.deploy.nodes > MOST_NODES
        or cfg.rl.minibatches > MOST_BATCH
    )
    if min(world, cfg.rl.minibatches, cfg.rl.responses_per_prompt) < 1 or too_many:
        return  # out of range, and already named
    for stage, node in (("sft", cfg.sft), ("rm", cfg.rm), ("dpo", cfg.dpo)):
        if stage in cfg.stage.runs and node.batch_size % world:
            fitting = nearest_multiple(node.batch_size, world)
            yield (
                f"{stage}.batch_size={node.batch_size}: not divisible by "
                f"{describe_processes(cfg)}; try {fitting}"
            )
    if any(map(is_rl, cfg.stage.runs)):
        rl = cfg.rl
        parts = rl.minibatches * world
        divisor = math.lcm(parts, rl.responses_per_prompt)
        if rl.batch_size % divisor:
            yield (
                f"rl.batch_size={rl.batch_size} (responses): must be a multiple of "
                f"rl.responses_per_prompt={rl.responses_per_prompt} and of "
                f"rl.minibatches={rl.minibatches} x {describe_processes(cfg)} = {parts}; "
                f"try rl.batch_size={nearest_multiple(rl.batch_size, divisor)}"
            )


def check_rl(cfg: Config) -> Iterator[str]:
    """Values of online RL, whether it runs or not."""
    rl, kl = cfg.rl, cfg.rl.kl
    if kl.applied_to == KlAppliedTo.loss and kl.estimator == KlEstimator.k1:
        yield (
            "rl.kl.estimator=k1 with rl.kl.applied_to=loss: its gradient is zero in expectation, "
            "so it would not hold the policy; use k2 (the gradient of the KL) or k3 (GRPO)"
        )
    if kl.controller == KlController.adaptive:
        if kl.coef == 0:
            yield (
                "rl.kl.coef=0 with rl.kl.controller=adaptive: the controller multiplies the "
                "coefficient, which would stay 0; start above 0"
            )
        if rl.batch_size >= 5 * kl.horizon:
            yield (
                f"rl.kl.horizon={kl.horizon:g}: the coefficient could fall to 0 in one rollout of "
                f"{rl.batch_size} responses; give at least {rl.batch_size}"
            )
    if rl.normalize == Normalize.group and rl.advantage not in COMPARES_RESPONSES:
        fitting = " and ".join(sorted(advantage.name for advantage in COMPARES_RESPONSES))
        yield (
            f"rl.normalize=group with rl.advantage={rl.advantage.name}: only {fitting} compare "
            "the responses to a prompt; use batch or none"
        )
    if rl.dual_clip is not None and rl.policy_loss != PolicyLoss.clip:
        yield (
            f"rl.dual_clip={rl.dual_clip:g} with rl.policy_loss={rl.policy_loss.name}: it bounds "
            "PPO's clipped loss; set it to null, or use rl.policy_loss=clip"
        )
    if rl.dynamic_sampling is not None and rl.responses_per_prompt == 1:
        yield (
            f"rl.dynamic_sampling={rl.dynamic_sampling} with rl.responses_per_prompt=1: it "
            "compares responses to a prompt, so there must be at least 2; or set it to null"
        )
    longest = cfg.rollout.max_new_tokens
    if rl.overlong_penalty is not None and rl.overlong_penalty >= longest:
        yield (
            f"rl.overlong_penalty={rl.overlong_penalty}: must be below "
            f"rollout.max_new_tokens={longest}, of which it is the last part; "
            f"try {max(1, longest // 5)}"
        )
    for key, value, plain in (
        ("top_p", rl.evaluation.top_p, 1),
        ("top_k", rl.evaluation.top_k, 0),
    ):
        if rl.evaluation.best_by == BestBy.objective and value != plain:
            yield (
                f"rl.evaluation.best_by=objective with rl.evaluation.{key}={value}: the KL in it "
                "can only be estimated from samples of the full distribution; use "
                f"rl.evaluation.{key}={plain}, or rl.evaluation.best_by=score"
            )
    if not rl.rewards:
        yield "rl.rewards is empty: nothing to train on; give a source, see conf/rl/ppo.yaml"
    elif not any(source and source.weight for source in rl.rewards.values()):
        yield "rl.rewards: all weights are 0, there is nothing to train on; give one a weight"
    yield from check_sources(cfg, "rl", rl.name)


def check_rollouts(cfg: Config) -> Iterator[str]:
    """Values of the rollouts of online RL, where it runs."""
    rl, rollout = cfg.rl, cfg.rollout
    for stage in filter(is_rl, cfg.stage.runs):
        if stage != rl.name:
            yield (
                f"stage={stage} with rl={rl.name}: that is another algorithm; use stage={rl.name}, "
                f"or leave out rl={rl.name}"
            )
        if rl.advantage in COMPARES_RESPONSES and rl.responses_per_prompt == 1:
            yield (
                f"rl.responses_per_prompt=1: rl.advantage={rl.advantage.name} compares a response "
                "with the others to its prompt, so there must be at least 2"
            )
        for key, value, plain in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, 0)):
            if value != plain:
                yield (
                    f"rollout.{key}={value}: must be {plain} in training: the loss uses the "
                    f"log-probabilities of the full distribution; for evaluations set "
                    f"rl.evaluation.{key}, in chat --{key.replace('_', '-')}"
                )
    for stage in ("dpo", "eval"):
        if stage in cfg.stage.runs and (rollout.top_p != 1 or rollout.top_k != 0):
            yield (
                f"rollout.top_p, rollout.top_k: not used by {stage}; set eval.top_p, eval.top_k, "
                "in chat --top-p, --top-k"
            )


def check_dpo(cfg: Config) -> Iterator[str]:
    dpo = cfg.dpo
    if dpo.label_smoothing and dpo.loss != DpoLoss.sigmoid:
        yield (
            f"dpo.label_smoothing={dpo.label_smoothing}: only with dpo.loss=sigmoid, "
            f"not {dpo.loss.name}"
        )


def check_eval(cfg: Config) -> Iterator[str]:
    node, policies = cfg.eval, cfg.eval.policies
    sources = score_sources(cfg, "eval")
    yield from check_sources(cfg, "eval", "eval")
    if not policies and len(function_sources(cfg, "eval")) == len(sources):
        yield "eval.policies is empty and eval.rewards has no reward model: nothing to measure"
    if twice := sorted({policy for policy in policies if policies.count(policy) > 1}):
        yield f"eval.policies: {', '.join(twice)} is there twice"
    if policies and node.against is not None and node.against not in policies:
        yield (
            f"eval.against={node.against}: not among eval.policies ({', '.join(policies)}); "
            "name one of them, or null to compare with none"
        )
    if node.judge is not None and node.judge not in (*sources, "gold"):
        yield f"eval.judge={node.judge}: give one of eval.rewards ({', '.join(sources)}), or gold"
    if node.judge == "gold" and not cfg.data.world:
        yield "eval.judge=gold: these data have no ground truth; name a source of eval.rewards"
    if node.samples > 1 and node.decoding != Decoding.sample:
        yield (
            f"eval.samples={node.samples} with eval.decoding={node.decoding.name}: all responses "
            "to a prompt would be the same; use eval.decoding=sample, or eval.samples=1"
        )
    if node.by and not verifiers(cfg):
        yield (
            f"eval.by=[{','.join(node.by)}]: it divides the pass rates of functions, and there are "
            "none; give eval.rewards.NAME.function, or leave it out"
        )
    if node.best_of == 1:
        yield "eval.best_of=1: the best of one is that one; give more, or 0 for no curve"


def check_sources(cfg: Config, node: str, stage: str) -> Iterator[str]:
    """The parts of a score. Args: node: rl or eval.  stage: one that reads this node."""
    sources = score_sources(cfg, stage)
    for name, source in sources.items():
        key = f"{node}.rewards.{name}"
        yield from check_kind(key, source)
        if name == "gold" and source.function != GOLD:
            yield f"{key}: gold is the name of the built-in ground truth; choose another name"
    functions = function_sources(cfg, stage)
    trained = [name for name, s in sources.items() if s.path is None and name not in functions]
    if len(trained) > 1:
        yield (
            f"{node}.rewards: {' and '.join(trained)} are both the reward model of this "
            "configuration: give one a path or function"
        )


def check_kind(key: str, source: RewardSource) -> Iterator[str]:
    """What one part of a score is: a reward model, a function, a server or a judge."""
    kinds = ("path", "function", "url", "judge")
    given = [kind for kind in kinds if getattr(source, kind) is not None]
    if len(given) > 1:
        yield f"{key}: {' and '.join(given)} are both given: a source is one of them"
    if source.function and not re.fullmatch(FUNCTION, source.function):
        yield (
            f"{key}.function={source.function}: give module:function or FILE.py:function, for "
            f"instance {GOLD}"
        )
    endpoint = source.judge.endpoint if source.judge else None
    for name, address in {"url": source.url, "judge.endpoint": endpoint}.items():
        if problem := wrong_address(f"{key}.{name}", address):
            yield problem
    if source.kwargs and given in ([], ["path"]):
        yield f"{key}.kwargs: they are arguments of a function, and this is a reward model"
    unknown = source.kwargs.keys() - {"column"}
    if unknown and given in (["url"], ["judge"]):
        yield f"{key}.kwargs.{min(unknown)}: of a server only `column` is read, the reference's"


def nearest_multiple(value: int, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least `divisor`."""
    return max(1, round(value / divisor)) * divisor

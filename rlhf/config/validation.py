"""What can be wrong with the values of a configuration, before anything is loaded. No torch here."""

from __future__ import annotations

import math
import re

from rlhf.config.deployment import describe_processes, world_size
from rlhf.config.keys import lookup
from rlhf.config.schema import (
    ONLINE,
    Config,
    Device,
    DpoLoss,
    Format,
    KlController,
    KlEstimator,
    KlPlace,
    Precision,
    Stage,
)
from rlhf.config.stage_graph import sources_of_score


class Problems:
    """Lines that say what is wrong, and the questions that find them."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.lines: list[str] = []

    def need(self, ok: bool, line: str) -> None:
        if not ok:
            self.lines.append(line)

    def positive(self, *keys: str) -> None:
        for key in keys:
            value = lookup(self.cfg, key)
            self.need(value is None or 0 < value < math.inf, f"{key}={value}: must be above 0")

    def not_negative(self, *keys: str) -> None:
        for key in keys:
            value = lookup(self.cfg, key)
            self.need(
                value is None or 0 <= value < math.inf, f"{key}={value}: must not be negative"
            )

    def within(self, key: str, low: float, high: float) -> None:
        value = lookup(self.cfg, key)
        self.need(low <= value <= high, f"{key}={value}: must be between {low:g} and {high:g}")

    def sampled(self, node: str) -> None:
        """How answers of evaluations are sampled."""
        self.positive(f"{node}.temperature")
        self.not_negative(f"{node}.top_k")
        top_p = lookup(self.cfg, f"{node}.top_p")
        self.need(0 < top_p <= 1, f"{node}.top_p={top_p}: must be above 0 and at most 1")

    def sources(self, stage: Stage) -> None:
        """The parts of a score."""
        rewards = sources_of_score(self.cfg, stage)
        for name, source in rewards.items():
            key = f"{stage.name}.rewards.{name}"
            self.need(
                math.isfinite(source.weight), f"{key}.weight={source.weight}: must be a number"
            )
            self.need(
                source.path is None or source.function is None,
                f"{key}: path and function are both given: a source is one of them",
            )
            self.need(
                source.function is None
                or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source.function) is not None,
                f"{key}.function={source.function}: give module:function, for instance rlhf.data.sandbox:gold",
            )
        truth = rewards.get("gold")
        self.need(
            truth is None or truth.function == "rlhf.data.sandbox:gold",
            f"{stage.name}.rewards.gold: gold is the name of the sandbox's truth; give your source another name",
        )
        plain = [
            name
            for name, source in rewards.items()
            if source.path is None and source.function is None
        ]
        both = f"{stage.name}.rewards: {' and '.join(plain)} are both the reward model of this configuration"
        self.need(len(plain) < 2, f"{both}: give one a path or function")


def check_config(cfg: Config) -> list[str]:
    """All that is wrong with the values, as lines that name key, value and fix. Nothing is repaired."""
    found = Problems(cfg)
    need, positive, not_negative, within = (
        found.need,
        found.positive,
        found.not_negative,
        found.within,
    )
    for key in ("seed", "data.seed"):
        need(0 <= lookup(cfg, key) < 2**63, f"{key}={lookup(cfg, key)}: must not be negative")
    need(
        re.fullmatch(r"[\w.+-]*\w[\w.+-]*", cfg.exp) is not None,
        f"exp={cfg.exp}: give a plain name, it becomes a folder",
    )
    world = world_size(cfg)
    positive("deploy.gpus", "deploy.threads", "deploy.micro_batch", "deploy.eval_micro_batch")
    positive("deploy.nodes", "deploy.gpu_memory_gb", "deploy.bucket_mb")
    positive(
        "data.max_prompt_tokens", "data.max_response_tokens", "data.eval_rows", "data.eval_share"
    )
    positive("data.workers")
    within("deploy.zero_stage", 0, 3)
    within("data.eval_share", 0, 0.5)
    deploy, offload = cfg.deploy, cfg.deploy.offload
    need(
        not offload.optimizer or deploy.zero_stage > 0,
        f"deploy.offload.optimizer=true: DeepSpeed offers it from deploy.zero_stage=1 on, not at {deploy.zero_stage}",
    )
    need(
        not offload.parameters or deploy.zero_stage == 3,
        f"deploy.offload.parameters=true: needs deploy.zero_stage=3, not {deploy.zero_stage}",
    )
    if deploy.precision == Precision.fp16:
        need(deploy.device == Device.gpu, "deploy.precision=fp16: not on CPU; use bf16 or fp32")
        ratios = ", ".join(stage.name for stage in cfg.stage.runs if stage in ONLINE)
        need(
            not ratios,
            f"deploy.precision=fp16: the ratios of {ratios} overflow and underflow in it; use bf16",
        )
    if deploy.node_rank is not None:
        need(
            0 <= deploy.node_rank < deploy.nodes,
            f"deploy.node_rank={deploy.node_rank}: must be below deploy.nodes={deploy.nodes}",
        )
        need(
            deploy.hostfile is None,
            "deploy.hostfile and deploy.node_rank: give one; a hostfile starts all nodes from here",
        )
        need(
            deploy.master is not None,
            f"deploy.node_rank={deploy.node_rank}: give deploy.master=host:port of node 0 as well",
        )
    if deploy.master is not None:
        address = re.fullmatch(r"[^:\s]+:(\d{1,5})", deploy.master)
        need(
            address is not None and 0 < int(address[1]) < 2**16,
            f"deploy.master={deploy.master}: give host:port of node 0",
        )
    for role, model in (("actor", cfg.actor), ("reward", cfg.reward)):
        lora = model.lora
        need(lora.rank >= 0, f"{role}.lora.rank={lora.rank}: must not be negative (0 = no adapter)")
        need(lora.alpha > 0, f"{role}.lora.alpha={lora.alpha}: must be above 0")
        need(
            0 <= lora.dropout < 1,
            f"{role}.lora.dropout={lora.dropout}: must be at least 0 and below 1",
        )
        need(
            lora.targets is None or bool(lora.targets),
            f"{role}.lora.targets=[]: name layers, or null for all linear layers but the head",
        )
    shares, sources, sandbox = cfg.data.shares, cfg.data.sources, cfg.data.sandbox
    need(
        len(shares) == 3 and min(shares) > 0,
        f"data.shares={shares}: give three parts above 0, for sft, rm, ppo",
    )
    need(
        bool(sources),
        "data.sources is empty: choose data=..., or give data.sources.NAME.path and .format",
    )
    for name, source in sources.items():
        need(
            (source.path == "builtin:sandbox") == (source.format == Format.sandbox),
            f"data.sources.{name}: path=builtin:sandbox and format=sandbox go together, not with {source.path}",
        )
        need(
            0 < source.weight < math.inf,
            f"data.sources.{name}.weight={source.weight}: must be above 0",
        )
        need(
            source.rows is None or source.rows > 0,
            f"data.sources.{name}.rows={source.rows}: must be above 0",
        )
        ratio = source.min_score_ratio
        need(
            ratio >= 1,
            f"data.sources.{name}.min_score_ratio={ratio}: must be at least 1 (1: only ties are left out)",
        )
    if sandbox is not None:
        builtin = any(source.format == Format.sandbox for source in sources.values())
        need(
            builtin,
            "data.sandbox has sizes, but no source is the built-in world: choose data=... instead of data=sandbox",
        )
    if any(source.path == "builtin:sandbox" for source in sources.values()):
        need(
            sandbox is not None,
            "data.sandbox=null: the built-in source needs its sizes, see conf/data/sandbox.yaml",
        )
        need(
            len(sources) == 1,
            "data: the sandbox cannot be mixed with other sources, its truth covers its own prompts only",
        )
    if sandbox is not None:
        positive("data.sandbox.demonstrations", "data.sandbox.pairs")
        noise = sandbox.label_noise
        need(0 < noise < 0.5, f"data.sandbox.label_noise={noise}: must be above 0 and below 0.5")
    positive("checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep")
    online = [
        stage for stage in ONLINE if stage == Stage.ppo or stage in cfg.stage.runs
    ]  # else what is wrong with ppo is said thrice
    for node in ("sft", "rm", "dpo", "ppo.critic_optim", *(stage.name for stage in online)):
        positive(*(f"{node}.{key}" for key in ("lr", "grad_clip", "adam_eps")))
        within(f"{node}.warmup_ratio", 0, 1)
        within(f"{node}.final_lr", 0, 1)
        not_negative(f"{node}.weight_decay", f"{node}.warmup_steps")
        betas = lookup(cfg, f"{node}.betas")
        need(
            len(betas) == 2 and all(0 <= b < 1 for b in betas),
            f"{node}.betas={betas}: give two numbers in [0, 1)",
        )
    for stage in (Stage.sft, Stage.rm, Stage.dpo, *online):
        positive(*(f"{stage.name}.{key}" for key in ("epochs", "batch_size", "max_steps")))
        size = lookup(cfg, f"{stage.name}.batch_size")
        if stage in cfg.stage.runs and world > 0 and size > 0 and stage not in ONLINE:
            need(
                size % world == 0,
                f"{stage.name}.batch_size={size} is not divisible by {describe_processes(cfg)}: try {nearest_multiple(size, world)}",
            )
    positive("rollout.max_new_tokens", "rollout.temperature")
    need(
        cfg.rollout.log_answers >= -1,
        f"rollout.log_answers={cfg.rollout.log_answers}: give a number of answers, or -1 for all",
    )
    for unused in {Stage.dpo, Stage.eval}.intersection(cfg.stage.runs):
        plain = cfg.rollout.top_p == 1 and cfg.rollout.top_k == 0
        need(
            plain,
            f"rollout.top_p, rollout.top_k: not used by {unused.name}; there are eval.top_p, eval.top_k, chat.py --top-p, --top-k",
        )
    return (
        found.lines
        + [line for stage in online for line in check_online(cfg, stage)]
        + check_ppo(cfg)
        + check_dpo(cfg)
        + check_eval(cfg)
    )


def check_online(cfg: Config, stage: Stage) -> list[str]:
    """What is wrong with the values of a stage that learns from its own answers; those of its rollouts only where it runs."""
    found = Problems(cfg)
    name, node, rollout = stage.name, getattr(cfg, stage.name), cfg.rollout
    need, kl = found.need, node.kl

    def of(*keys: str) -> list[str]:
        return [f"{name}.{key}" for key in keys]

    found.positive(
        *of(
            "prompt_epochs",
            "minibatches",
            "clip",
            "clip_high",
            "target_kl",
            "score_clip",
            "responses_per_prompt",
        )
    )
    found.positive(*of("kl.target", "kl.horizon", "ptx.max_tokens", "evaluation.every"))
    found.not_negative(*of("kl.coef", "kl.final_coef", "entropy_coef", "ptx.coef"))
    found.sampled(f"{name}.evaluation")
    for key in of("missing_eos_penalty", "length_penalty"):
        need(
            0 <= lookup(cfg, key) < math.inf,
            f"{key}={lookup(cfg, key)}: it is subtracted, must not be negative",
        )
    need(
        node.ema is None or 0 < node.ema < 1,
        f"{name}.ema={node.ema}: must be above 0 and below 1, or null for none",
    )
    need(
        not (kl.place == KlPlace.loss and kl.estimator == KlEstimator.k1),
        f"{name}.kl.estimator=k1 with {name}.kl.place=loss: the gradient of log pi - log ref is zero in expectation, "
        "it would hold nothing; use k2 (the gradient of the KL) or k3 (GRPO)",
    )
    need(
        not (kl.controller == KlController.adaptive and kl.coef == 0),
        f"{name}.kl.coef=0 with {name}.kl.controller=adaptive: it multiplies the coefficient, which would stay 0; start above 0",
    )
    each = node.responses_per_prompt
    answers = node.batch_size * each
    need(
        not (kl.controller == KlController.adaptive and answers >= 5 * kl.horizon > 0),
        f"{name}.kl.horizon={kl.horizon:g}: the coefficient could fall to 0 in one rollout of {answers} answers; give at least {answers}",
    )
    need(
        bool(node.rewards),
        f"{name}.rewards is empty: there is nothing to learn; give a source, see conf/online/default.yaml",
    )
    need(
        not node.rewards or any(source.weight for source in node.rewards.values()),
        f"{name}.rewards: all weights are 0: there is nothing to learn; give one source a weight",
    )
    found.sources(stage)
    if stage not in cfg.stage.runs:
        return found.lines
    need(
        stage == Stage.ppo or each != 1,
        f"{name}.responses_per_prompt=1: an answer is compared with the others to its prompt, so there must be at least 2",
    )
    why = f"the log-probabilities that {name} learns from would not be those of the sampler; it can be set for evaluations and chat:"
    need(
        rollout.top_p == 1,
        f"rollout.top_p={rollout.top_p}: must be 1 in training, {why} {name}.evaluation.top_p, chat.py --top-p",
    )
    need(
        rollout.top_k == 0,
        f"rollout.top_k={rollout.top_k}: must be 0 in training, {why} {name}.evaluation.top_k, chat.py --top-k",
    )
    world = world_size(cfg)
    if world > 0 and node.minibatches > 0 and node.batch_size > 0 and each > 0:
        parts = node.minibatches * world
        times = f" x {name}.responses_per_prompt={each}" if each > 1 else ""
        fitting = nearest_multiple(node.batch_size, parts // math.gcd(parts, each))
        need(
            answers % parts == 0,
            f"{name}.batch_size={node.batch_size}{times} is not divisible by {name}.minibatches={node.minibatches} x {describe_processes(cfg)} = "
            f"{parts}: try {name}.batch_size={fitting}",
        )
    return found.lines


def check_ppo(cfg: Config) -> list[str]:
    """What is wrong with the values that PPO alone has."""
    found, ppo = Problems(cfg), cfg.ppo
    found.positive("ppo.value_clip")
    found.not_negative("ppo.critic_warmup")
    found.within("ppo.gamma", 0, 1)
    found.within("ppo.lam", 0, 1)
    found.need(
        0 <= ppo.dschat.dropout < 1,
        f"ppo.dschat.dropout={ppo.dschat.dropout}: must be at least 0 and below 1",
    )
    return found.lines


def check_dpo(cfg: Config) -> list[str]:
    """What is wrong with the values of DPO."""
    found, dpo = Problems(cfg), cfg.dpo
    found.positive("dpo.beta", "dpo.eval_every")
    smooth = dpo.label_smoothing
    found.need(0 <= smooth < 0.5, f"dpo.label_smoothing={smooth}: must be at least 0 and below 0.5")
    found.need(
        not smooth or dpo.loss == DpoLoss.sigmoid,
        f"dpo.label_smoothing={smooth}: only with dpo.loss=sigmoid, not {dpo.loss.name}",
    )
    return found.lines


def check_eval(cfg: Config) -> list[str]:
    """What is wrong with the values of stage=eval."""
    found, node = Problems(cfg), cfg.eval
    need, policies = found.need, node.policies
    found.sampled("eval")
    found.not_negative("eval.best_of")
    found.positive("eval.best_of_prompts")
    found.sources(Stage.eval)
    scorer = any(source.function is None for source in node.rewards.values())
    need(
        bool(policies or scorer),
        "eval.policies is empty, and there is no reward model in eval.rewards: there is nothing to measure",
    )
    twice = sorted({policy for policy in policies if policies.count(policy) > 1})
    need(not twice, f"eval.policies: {', '.join(twice)} is there twice")
    need(
        not policies or node.against is None or node.against in policies,
        f"eval.against={node.against} is not among eval.policies ({', '.join(policies)}): name one of them, or null to compare with none",
    )
    need(
        node.judge is None or node.judge in (*node.rewards, "gold"),
        f"eval.judge={node.judge}: give one of eval.rewards ({', '.join(node.rewards)}), or gold",
    )
    need(
        node.judge != "gold" or cfg.data.sandbox is not None,
        "eval.judge=gold: these data do not know the truth; name a source of eval.rewards",
    )
    need(node.beams >= 2, f"eval.beams={node.beams}: must be at least 2")
    need(
        node.best_of != 1,
        "eval.best_of=1: the best of one is that one; give more, or 0 for no curve",
    )
    return found.lines


def nearest_multiple(value: int, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least `divisor`."""
    return max(1, round(value / divisor)) * divisor

"""What a run needs, before it starts: memory on each GPU, batches, steps, tokens. Formulas only: no torch, weights or network.

Counted are the tensors that DeepSpeed and the loops hold at once. Model states are exact (tests compare them with measured
tensors); activations are what transformers' blocks save for the backward pass, measured per family (`ACTIVATIONS`); the rest of
a GPU (context, kernels' workspaces, fragmentation) is the flat `LIBRARIES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf.config.choices import Decoding, Device, Precision
from rlhf.config.deployment import world_size
from rlhf.config.schema import Arch, Config, Model
from rlhf.config.stage_graph import (
    adapter_only,
    is_stage_name,
    parent_stages,
    stage_node,
    trains_critic,
    uses_trained_reward_model,
)
from rlhf.distributed.deepspeed_config import BYTES
from rlhf.planning.shapes import ACTIVATIONS, arch_of, lora_parameters, parameters
from rlhf.planning.steps import count_steps

GIB = 2**30
LIBRARIES = {
    Device.gpu: 1.5 * GIB,
    Device.cpu: 0.5 * GIB,
}  # CUDA context, cuBLAS and NCCL; on CPU the imported libraries (450 MiB)
MAX_LIVE = (
    10**9
)  # weights that DeepSpeed holds gathered at stage 3, at most (its stage3_max_live_parameters)

PADDED = ("bloom",)  # families whose attention needs padding
CHUNK, SMALLEST, LOGITS, KEPT = 512, 64, 2**21, 2**22  # of rlhf/logprobs.py, which needs torch


@dataclass
class Role:
    """One model on one GPU; everything in bytes but the counts."""

    name: str
    model: str
    parameters: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    host: float  # of these, in host memory

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer - self.host


@dataclass
class Plan:
    """A stage's needs on one GPU (on CPU: in one process), bytes."""

    stage: str
    roles: list[Role]
    phases: dict[
        str, dict[str, float]
    ]  # what comes to the models' states at the fullest moment of each phase
    libraries: float
    limit: float
    batch: str
    steps: int | None
    tokens: int | None  # at most
    files: float  # of the saved models
    checkpoints: float  # at most, while it trains: those that are kept and the one that is written
    notes: list[str]
    gathers: bool  # while sampling, weights that ZeRO-3 partitions are whole

    @property
    def states(self) -> float:
        return sum(role.total for role in self.roles) + self.libraries

    @property
    def fullest(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return self.states + sum(self.phases[self.fullest].values())

    @property
    def host(self) -> float:
        return sum(role.host for role in self.roles)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def role_memory(cfg: Config, name: str, model: str, count: int, trained: int) -> Role:
    """States of one model, as DeepSpeed holds them: weights and gradients in the training precision; Adam's two moments in fp32
    and an fp32 copy of the weights (none at stage 0 in fp32). Stage 1 partitions the optimizer, 2 the gradients, 3 the weights.
    Source: Rajbhandari 2020, arXiv:1910.02054, section 3."""
    deploy, size, world = cfg.deploy, BYTES[cfg.deploy.precision], world_size(cfg)
    zero, offload = deploy.zero_stage, deploy.offload
    if not trained:
        weights = size * count / (world if zero == 3 or offload.frozen else 1)
        return Role(name, model, count, 0, weights, 0, 0, weights if offload.frozen else 0)
    weights = size * count / (world if zero == 3 else 1)
    gradients = size * trained / (world if zero >= 2 else 1)
    copies = 8 if zero == 0 and size == 4 else 12
    optimizer = copies * trained / (world if zero >= 1 else 1)
    host = (optimizer if offload.optimizer else 0) + (weights if offload.parameters else 0)
    return Role(name, model, count, trained, weights, gradients, optimizer, host)


def activations(arch: Arch, cfg: Config, rows: int, tokens: int) -> float:
    """Bytes that the blocks keep for the backward pass of `rows` sequences of `tokens` tokens. With checkpointing: the input of
    each block, and all of one."""
    size = 4 if cfg.deploy.precision == Precision.fp32 else 2
    of_ffn, fp32, bf16 = ACTIVATIONS[arch.family]
    per_token = of_ffn * arch.ffn + (fp32 if size == 4 else bf16) * arch.hidden
    per_token += tokens * (arch.heads * (1 if size == 4 else 3) if arch.family == "bloom" else 1)
    block = size * rows * tokens * per_token
    if cfg.deploy.activation_checkpointing:
        return arch.layers * size * rows * tokens * arch.hidden + block
    return arch.layers * block


def logits(arch: Arch, cfg: Config, rows: int, positions: int, trained: bool) -> float:
    """Bytes of the logits of (rows, positions) and their probabilities, fp32: of a chunk, and where they are trained on of the
    probabilities that are kept (rlhf/logprobs.py); with the families that are padded of all tokens, and in the training precision too."""
    tokens = rows * positions
    if arch.family in PADDED:
        return tokens * arch.vocab * (8 + (4 if cfg.deploy.precision == Precision.fp32 else 2))
    chunk = min(tokens, CHUNK, max(SMALLEST, LOGITS // arch.vocab))
    return 8 * chunk * arch.vocab + (min(4 * KEPT, 4 * tokens * arch.vocab) if trained else 0)


def kv_cache(arch: Arch, cfg: Config, rows: int, tokens: int) -> float:
    size = 4 if cfg.deploy.precision == Precision.fp32 or cfg.deploy.device == Device.cpu else 2
    return 2 * arch.layers * arch.kv_heads * arch.head_dim * rows * tokens * size


def make_plan(cfg: Config, stage: str) -> Plan:
    """The needs of one stage.

    Raises: ValueError when the shape of a model is not known: a hub id without `arch`, or a family without formula.
    """
    deploy, world = cfg.deploy, world_size(cfg)
    size = BYTES[deploy.precision]

    def shape(model: Model, trained: str | None) -> Arch | None:
        return arch_of(trained, None) if trained else arch_of(model.path, model.arch)

    node: Any = stage_node(cfg, stage)
    given = parent_stages(cfg, stage)
    actor = shape(cfg.actor, cfg.inputs.get("sft") or given.get("sft")) if stage != "rm" else None
    own_reward = uses_trained_reward_model(cfg, stage)
    reward = (
        shape(cfg.reward, cfg.inputs.get("rm") or given.get("rm"))
        if stage == "rm" or own_reward
        else None
    )
    for arch, name, needed in (
        (actor, "actor", stage != "rm"),
        (reward, "reward", stage == "rm" or own_reward),
    ):
        if arch is None and needed:
            raise ValueError(
                f"the shape of {name} is not known before it is loaded: give its numbers as {name}.arch (see conf/model/)"
            )

    def role(name: str, arch: Arch, model: Model, scorer: bool, trained: bool) -> Role:
        count = parameters(arch, scorer)
        learning = (
            0
            if not trained
            else lora_parameters(arch, model.lora, scorer)
            if model.lora.rank
            else count
        )
        extra = (
            lora_parameters(arch, model.lora, False) if trained and model.lora.rank else 0
        )  # the adapter comes to the weights
        extra -= arch.vocab * (arch.embed or arch.hidden) if extra and model.lora.embeddings else 0
        return role_memory(cfg, name, model.name, count + extra, learning)

    def update(arch: Arch, own: Role, rows: int, tokens: int, positions: int) -> dict[str, float]:
        parts = {
            "activations": activations(arch, cfg, rows, tokens),
            "logits": logits(arch, cfg, rows, positions, True),
        }
        parts["buckets"] = 2 * deploy.bucket_mb * 2**20 if deploy.zero_stage else 0
        parts["gathered weights"] = live_weights(own)
        return parts

    def live_weights(own: Role) -> float:
        """Of a partitioned model, the weights that are whole at a time."""
        partitioned = deploy.zero_stage == 3 or (deploy.offload.frozen and not own.trained)
        if not partitioned or (world == 1 and not own.host):  # the only part is the whole
            return 0
        return size * min(own.parameters, MAX_LIVE)

    def sampling(
        arch: Arch, own: Role, tokens: int, states: float
    ) -> tuple[dict[str, float], bool]:
        """The phase, and whether partitioned weights are whole in it: as set, or where they fit."""
        rows = deploy.eval_micro_batch
        parts = {
            "kv cache": kv_cache(arch, cfg, rows, tokens),
            "logits": rows * arch.vocab * (size + 16),
        }  # probabilities, their sum in fp64
        if deploy.zero_stage < 3:
            return parts, True
        whole = (
            size * own.parameters
        )  # DeepSpeed puts them together in new memory, beside the own part
        fits = states + sum(parts.values()) + whole <= deploy.gpu_memory_gb * GIB
        if deploy.gather_for_rollout or (deploy.gather_for_rollout is None and fits):
            return parts | {"gathered weights": whole}, True
        return parts | {"gathered weights": live_weights(own)}, False

    prompt, answer = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    libraries = LIBRARIES[deploy.device]
    roles: list[Role] = []
    phases: dict[str, dict[str, float]] = {}
    notes: list[str] = []
    gathers = True
    if stage == "sft" and actor:
        roles = [role("actor", actor, cfg.actor, False, True)]
        phases["update"] = update(
            actor, roles[0], deploy.micro_batch, prompt + answer, prompt + answer
        )
        phases["sampling"], gathers = sampling(
            actor, roles[0], prompt + answer, roles[0].total + libraries
        )
        files = size * roles[0].parameters
    elif stage == "rm" and reward:
        roles = [role("reward", reward, cfg.reward, True, True)]
        phases["update"] = update(reward, roles[0], 2 * deploy.micro_batch, prompt + answer, 0)
        files = size * roles[0].parameters
    elif stage == "dpo" and actor:
        roles = [role("actor", actor, cfg.actor, False, True)]
        if not adapter_only(cfg.actor):
            roles.append(role("ref", actor, cfg.actor, False, False))
        phases["update"] = update(actor, roles[0], 2 * deploy.micro_batch, prompt + answer, answer)
        longest = prompt + cfg.rollout.max_new_tokens
        phases["sampling"], gathers = sampling(
            actor, roles[0], longest, sum(r.total for r in roles) + libraries
        )
        files = size * roles[0].parameters
    elif stage == "eval":
        answer = cfg.rollout.max_new_tokens
        if actor and node.policies:  # one at a time, beside the one it is compared with
            roles = [role("policy", actor, cfg.actor, False, False)]
            roles += [role("against", actor, cfg.actor, False, False)] if node.against else []
        if reward:
            roles.append(role("reward", reward, cfg.reward, True, False))
        phases["scoring"] = {"gathered weights": max(map(live_weights, roles), default=0.0)}
        if actor and node.policies:
            phases["scoring"]["logits"] = logits(actor, cfg, deploy.eval_micro_batch, answer, False)
            phases["sampling"], gathers = sampling(
                actor, roles[0], prompt + answer, sum(r.total for r in roles) + libraries
            )
            phases["sampling"]["kv cache"] *= node.beams if node.decoding == Decoding.beam else 1
        notes += [
            f"eval.rewards.{name}: not counted"
            for name, source in node.rewards.items()
            if source.path
        ]
        given_by_path = not all(map(is_stage_name, cfg.eval.policies))
        notes += (
            ["eval.policies given by path are taken to be as large as the actor"]
            if given_by_path
            else []
        )
        files = 0
    elif actor:
        answer = cfg.rollout.max_new_tokens
        roles = [role("actor", actor, cfg.actor, False, True)]
        if not adapter_only(cfg.actor):
            roles.append(role("ref", actor, cfg.actor, False, False))
        critic = reward or actor
        if reward:
            roles.append(role("reward", reward, cfg.reward, True, False))
            if (
                actor.family != reward.family or abs(actor.vocab - reward.vocab) > 256
            ):  # fewer may be padding and special tokens
                critic = actor
                notes += [
                    "reward model and actor have other tokenizers: the critic starts from the actor"
                ] * trains_critic(cfg, stage)
        elif trains_critic(cfg, stage):
            notes.append(
                "no reward model of this configuration is used: the critic starts from the actor"
            )
        for name, source in node.rewards.items():
            if source.path and (other := cfg.inputs.get(f"rewards/{name}", source.path)):
                found = arch_of(other, None)
                if found:
                    roles.append(role(name, found, cfg.reward, True, False))
                else:
                    notes.append(
                        f"rl.rewards.{name}: its shape is not known before it is loaded, it is not counted"
                    )
        if trains_critic(cfg, stage):
            roles.append(role("critic", critic, cfg.reward, True, True))
        if node.ema:  # fp32; partitioned with the weights, else on the first process alone, which is the fullest
            average = 4.0 * roles[0].trained / (world if deploy.zero_stage == 3 else 1)
            roles.insert(1, Role("average", cfg.actor.name, roles[0].trained, 0, average, 0, 0, 0))
        phases["sampling"], gathers = sampling(
            actor, roles[0], prompt + answer, sum(r.total for r in roles) + libraries
        )
        phases["scoring"] = {
            "logits": logits(actor, cfg, deploy.eval_micro_batch, answer, False),
            "gathered weights": max(map(live_weights, roles)),
        }
        # a text of the pretraining loss, or a demonstration with its prompt; it has logits at all its positions
        text = (
            max(
                node.ptx.max_tokens, prompt + min(node.ptx.max_tokens, cfg.data.max_response_tokens)
            )
            if node.ptx.coef
            else 0
        )
        longest, read = max(prompt + answer, text), max(answer, text)
        phases["actor's update"] = update(actor, roles[0], deploy.micro_batch, longest, read)
        policies = 1 + bool(node.ema) + bool(node.evaluation.every)
        files = size * policies * roles[0].parameters
        if trains_critic(cfg, stage):
            phases["critic's update"] = update(
                critic, roles[-1], deploy.micro_batch, prompt + answer, 0
            )
            files += size * roles[-1].parameters
    if size == 2 and stage != "eval":  # gradients are copied to fp32, where the optimizer is
        trained = max(r.trained for r in roles)
        here = 0 if deploy.offload.optimizer else 4 * trained / (world if deploy.zero_stage else 1)
        phases["optimizer's step"] = {"fp32 gradients": here}
    if not gathers:
        moved = size * roles[0].parameters / GIB
        notes.append(
            f"sampling fetches all {moved:.1f} GiB of the actor's weights from the other processes for every token"
        )
    batch, steps, tokens = count_steps(cfg, stage)
    one = sum(role.trained for role in roles if role.optimizer) * (
        size + (12 if size == 2 else 8)
    )  # Adam's two moments, fp32 weights
    saved = (cfg.checkpoint.keep + 1) * one
    return Plan(
        stage,
        roles,
        phases,
        libraries,
        deploy.gpu_memory_gb * GIB,
        batch,
        steps,
        tokens,
        files,
        saved,
        notes,
        gathers,
    )


def gather_for_rollout(cfg: Config) -> bool:
    """Whether the actor's partitioned weights are made whole for sampling: as set, or where the plan says that they fit."""
    try:
        return make_plan(cfg, cfg.stage.name).gathers
    except ValueError:  # a shape that there is no formula for
        return cfg.deploy.gather_for_rollout is not False

"""The plan of a stage, made before it starts: memory of each process, batches, steps and tokens.

Formulas only (rlhf/planning/formulas.py): no torch, weights or network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

from rlhf.base.errors import UserError
from rlhf.config.choices import Decoding, RolloutEngine
from rlhf.config.deployment import BYTES, built_stage, world_size
from rlhf.config.schema import Arch, Config, Model
from rlhf.config.stage_graph import (
    BASE,
    adapter_only,
    is_rl,
    is_stage_name,
    node_name,
    parent_stages,
    stage_node,
    trains_critic,
    uses_trained_reward_model,
)
from rlhf.planning.formulas import (
    GIB,
    LIBRARIES,
    MAX_LIVE,
    SUB_GROUP,
    Role,
    activations,
    kv_cache,
    logits,
    role_memory,
)
from rlhf.planning.shapes import adapted_weights, arch_of, lora_parameters, parameters
from rlhf.planning.steps import Steps, count_steps

ROOM = 0.9  # share of the memory that a plan should use at most


@dataclass
class Plan:
    """What a stage needs on one GPU (on CPU: in one process), in bytes."""

    stage: str
    roles: list[Role]
    # phase -> what it adds to the model states at its fullest moment, by name
    phases: dict[str, dict[str, float]]
    libraries: float
    limit: float
    steps: Steps
    files: float  # of the saved models
    checkpoints: float  # at most, during training: those that are kept and the one being written
    notes: list[str]
    gathers: bool  # weights that ZeRO-3 partitions are gathered for sampling
    merges: bool  # an adapter is merged for sampling

    @property
    def states(self) -> float:
        """Model states and libraries, on the device."""
        return sum(role.total for role in self.roles) + self.libraries

    @property
    def fullest(self) -> str:
        """The phase with the highest peak."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return self.states + sum(self.phases[self.fullest].values())

    @property
    def host(self) -> float:
        """Model states in host memory."""
        return sum(role.host for role in self.roles)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    @property
    def is_tight(self) -> bool:
        """Whether it fits by little: formulas miss what allocators waste."""
        return self.fits and self.peak > ROOM * self.limit


def make_plan(cfg: Config, stage: str) -> Plan:
    """The needs of one stage.

    Raises: UserError when the shape of a model is unknown: a hub id without `arch`, or a family
        without a formula.
    """
    needs = StageNeeds(cfg, stage)
    if stage == "sft":
        needs.add_sft()
    elif stage == "rm":
        needs.add_reward_model()
    elif stage == "dpo":
        needs.add_dpo()
    elif stage == "eval":
        needs.add_evaluation()
    else:
        needs.add_online_roles()
        needs.add_online_phases()
    if stage != "eval":
        needs.add_optimizer_step()
    steps = count_steps(cfg, stage)
    return Plan(
        stage=stage,
        roles=needs.roles,
        phases=needs.phases,
        libraries=needs.libraries,
        limit=needs.limit,
        steps=steps,
        files=needs.files,
        checkpoints=needs.checkpoint_bytes(),
        notes=needs.all_notes(),
        gathers=needs.gathers,
        merges=needs.merges,
    )


class SamplingChoices(TypedDict):
    """How the actor's weights are held while sampling; fields of rl.experience.Models."""

    gather: bool  # partitioned weights are gathered
    merge: bool  # an adapter is merged


def sampling_choices(cfg: Config) -> SamplingChoices:
    """Weights are gathered as deploy.gather_for_rollout says, or where it is null and the plan says
    that they fit; an adapter is merged where the plan has room for a copy of its layers."""
    try:
        plan = make_plan(cfg, cfg.stage.name)
    except UserError:  # a shape that there is no formula for
        return {"gather": cfg.deploy.gather_for_rollout is not False, "merge": True}
    return {"gather": plan.gathers, "merge": plan.merges}


class StageNeeds:
    """Collects the models that a stage holds, and what each of its phases adds to their states."""

    def __init__(self, cfg: Config, stage: str) -> None:
        """Raises: UserError when the shape of a model is unknown."""
        self.cfg, self.stage, self.deploy = cfg, stage, cfg.deploy
        self.settings: Any = stage_node(cfg, stage)
        self.size, self.world = BYTES[cfg.deploy.precision], world_size(cfg)
        self.prompt, self.response = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
        self.libraries = LIBRARIES[cfg.deploy.device]
        self.limit = cfg.deploy.gpu_memory_gb * GIB
        self.uses_reward = stage == "rm" or uses_trained_reward_model(cfg, stage)
        self.roles: list[Role] = []
        self.phases: dict[str, dict[str, float]] = {}
        self.notes: list[str] = []
        self.files = 0.0  # bytes of the saved models
        self.gathers = self.merges = True

    # ------------------------------------------------------------------------------- stages

    def add_sft(self) -> None:
        actor, tokens = self.actor, self.prompt + self.response
        role = self.add_role("actor", actor, self.cfg.actor, trained=True)
        self.phases["update"] = self.update(actor, role, self.deploy.micro_batch, tokens, tokens)
        self.phases["sampling"] = self.sampling(actor, tokens)
        self.files = self.size * role.parameters

    def add_reward_model(self) -> None:
        reward, tokens = self.reward, self.prompt + self.response
        role = self.add_role("reward", reward, self.cfg.reward, scorer=True, trained=True)
        self.phases["update"] = self.update(reward, role, 2 * self.deploy.micro_batch, tokens, 0)
        self.files = self.size * role.parameters

    def add_dpo(self) -> None:
        actor = self.actor
        role = self.add_role("actor", actor, self.cfg.actor, trained=True)
        if not adapter_only(self.cfg.actor):
            self.add_role("ref", actor, self.cfg.actor)
        rows, tokens = 2 * self.deploy.micro_batch, self.prompt + self.response
        self.phases["update"] = self.update(actor, role, rows, tokens, self.response)
        longest = self.prompt + self.cfg.rollout.max_new_tokens
        self.phases["sampling"] = self.sampling(actor, longest)
        self.files = self.size * role.parameters

    def add_evaluation(self) -> None:
        """One policy at a time, beside the one that it is compared with."""
        cfg, node, new = self.cfg, self.settings, self.cfg.rollout.max_new_tokens
        actor = self.actor
        if node.policies:
            self.add_role("policy", actor, cfg.actor)
        if node.policies and node.against:
            self.add_role("against", actor, cfg.actor)
        if self.uses_reward:
            self.add_role("reward", self.reward, cfg.reward, scorer=True)
        gathered = max(map(self.live_weights, self.roles), default=0.0)
        self.phases["scoring"] = {"gathered weights": gathered}
        if node.policies:
            rows = self.deploy.eval_micro_batch
            self.phases["scoring"]["logits"] = logits(actor, cfg, rows, new, trained=False)
            sampling = self.sampling(actor, self.prompt + new)
            sampling["kv cache"] *= node.beams if node.decoding == Decoding.beam else 1
            self.phases["sampling"] = sampling
        for name, source in node.rewards.items():
            if source.path:
                self.notes.append(f"eval.rewards.{name}: not counted")
        if any(one != BASE and not is_stage_name(one) for one in node.policies):
            self.notes.append("eval.policies given by path: counted as large as the actor")

    def add_online_roles(self) -> None:
        """Models of an online algorithm, in the order of the table; the actor is the first."""
        cfg, stage = self.cfg, self.stage
        actor = self.actor
        role = self.add_role("actor", actor, cfg.actor, trained=True)
        if self.settings.ema:  # fp32; partitioned with the weights, else on the first process alone
            average = 4.0 * role.trained / (self.world if self.deploy.zero_stage == 3 else 1)
            self.roles.append(Role("average", cfg.actor.name, role.trained, 0, average, 0, 0, 0))
        if not adapter_only(cfg.actor):
            self.add_role("ref", actor, cfg.actor)
        if self.uses_reward:
            self.add_role("reward", self.reward, cfg.reward, scorer=True)
        buffer, longest = cfg.rl.overlong_penalty, cfg.rollout.max_new_tokens
        if buffer and cfg.rl.name == "dapo" and not 0.1 < buffer / longest < 0.4:
            self.notes.append(
                f"rl.overlong_penalty={buffer} is {buffer / longest:.0%} of "
                f"rollout.max_new_tokens={longest}; DAPO takes a fifth"
            )
        if trains_critic(cfg, stage) and not self.uses_reward:
            self.notes.append(
                "this configuration uses no reward model: the critic starts from the actor"
            )
        elif trains_critic(cfg, stage) and self.critic is not self.reward:
            self.notes.append(
                "reward model and actor have other tokenizers: the critic starts from the actor"
            )
        for name, source in self.settings.rewards.items():
            if source.path:
                self.add_further_reward(name, cfg.inputs.get(f"rewards/{name}", source.path))
        if trains_critic(cfg, stage):
            self.add_role("critic", self.critic, cfg.reward, scorer=True, trained=True)

    def add_online_phases(self) -> None:
        cfg, settings = self.cfg, self.settings
        actor, actor_role = self.actor, self.roles[0]
        micro_batch, new = self.deploy.micro_batch, cfg.rollout.max_new_tokens
        tokens = self.prompt + new
        self.phases["sampling"] = self.sampling(actor, tokens)
        self.phases["scoring"] = {
            "logits": logits(actor, cfg, self.deploy.eval_micro_batch, new, trained=False),
            "gathered weights": max(map(self.live_weights, self.roles)),
        }
        # a text of the pretraining loss, or a demonstration with its prompt: logits at each token
        text = 0
        if settings.ptx.coef:
            response = min(settings.ptx.max_tokens, self.response)
            text = max(settings.ptx.max_tokens, self.prompt + response)
        self.phases["actor's update"] = self.update(
            actor, actor_role, micro_batch, max(tokens, text), max(new, text)
        )
        saved_policies = 1 + bool(settings.ema) + bool(settings.evaluation.every)
        self.files = self.size * saved_policies * actor_role.parameters
        if trains_critic(cfg, self.stage):
            critic_role = self.roles[-1]
            update = self.update(self.critic, critic_role, micro_batch, tokens, 0)
            self.phases["critic's update"] = update
            self.files += self.size * critic_role.parameters

    def add_optimizer_step(self) -> None:
        """At stage 3 DeepSpeed copies the gradients of this process, a group at a time."""
        if built_stage(self.deploy) < 3 or self.deploy.offload.optimizer:
            return
        trained = max(role.trained for role in self.roles)
        self.phases["optimizer's step"] = {
            "copied gradients": 4 * min(trained / self.world, SUB_GROUP)
        }

    # ------------------------------------------------------------------------------- models

    @cached_property
    def actor(self) -> Arch:
        return self.shape_of("actor")

    @cached_property
    def reward(self) -> Arch:
        return self.shape_of("reward")

    def shape_of(self, name: str) -> Arch:
        """The shape of `cfg.actor` or `cfg.reward`, from the run it comes from where there is one.

        Raises: UserError when it is unknown.
        """
        stage = "sft" if name == "actor" else "rm"
        trained = self.cfg.inputs.get(stage) or parent_stages(self.cfg, self.stage).get(stage)
        model: Model = getattr(self.cfg, name)
        arch = arch_of(trained, None) if trained else arch_of(model.path, model.arch)
        if arch is None:
            raise UserError(
                f"the shape of {name} is not known before it is loaded: "
                f"give its numbers as {name}.arch (see conf/model/)"
            )
        return arch

    @cached_property
    def critic(self) -> Arch:
        """The shape of the reward model, or of the actor where their tokenizers differ."""
        if not self.uses_reward:
            return self.actor
        # a smaller difference may be padding and special tokens
        similar = abs(self.actor.vocab - self.reward.vocab) <= 256
        return self.reward if similar and self.actor.family == self.reward.family else self.actor

    def add_role(
        self, name: str, arch: Arch, model: Model, scorer: bool = False, trained: bool = False
    ) -> Role:
        """Add a model. Args: scorer: with one score in place of the logits."""
        count, lora = parameters(arch, scorer), model.lora
        learning = count if trained else 0
        if trained and lora.rank:
            learning = lora_parameters(arch, lora, scorer)
            count += lora_parameters(arch, lora, False)  # the adapter is added to the weights
            count -= arch.vocab * (arch.embed or arch.hidden) if lora.embeddings else 0
        role = role_memory(self.cfg, name, model.name, count, learning)
        self.roles.append(role)
        return role

    def add_further_reward(self, name: str, path: str) -> None:
        """Add a reward model that is given by its path."""
        arch = arch_of(path, None)
        if arch:
            self.add_role(name, arch, self.cfg.reward, scorer=True)
        else:
            self.notes.append(
                f"{node_name(self.stage)}.rewards.{name}: not counted, its shape is not known "
                "before it is loaded"
            )

    # ------------------------------------------------------------------------------- phases

    def update(
        self, arch: Arch, role: Role, rows: int, tokens: int, positions: int
    ) -> dict[str, float]:
        """A forward and backward pass of a micro-batch.

        Args: rows, tokens: shape of the micro-batch.  positions: tokens per row that need logits.
        """
        return {
            "activations": activations(arch, self.cfg, rows, tokens),
            "logits": logits(arch, self.cfg, rows, positions, trained=True),
            "buckets": 2 * self.deploy.bucket_mb * 2**20 if built_stage(self.deploy) else 0,
            "gathered weights": self.live_weights(role),
        }

    def live_weights(self, role: Role) -> float:
        """Bytes of the weights of a partitioned model that are gathered at a time."""
        partitioned = self.deploy.zero_stage == 3 or (
            self.deploy.offload.frozen and not role.trained
        )
        if not partitioned or (self.world == 1 and not role.host):  # a single partition
            return 0
        return self.size * min(role.parameters, MAX_LIVE)

    def sampling(self, arch: Arch, tokens: int) -> dict[str, float]:
        """Sampling from the first role. Sets `gathers` and `merges`: as configured, or where the
        weights fit."""
        deploy, rows, role = self.deploy, self.deploy.eval_micro_batch, self.roles[0]
        needs = {
            "kv cache": kv_cache(arch, self.cfg, rows, tokens),
            "logits": rows * arch.vocab * (self.size + 16),  # probabilities, their sum in fp64
        }
        used = sum(role.total for role in self.roles) + self.libraries + sum(needs.values())
        if deploy.zero_stage == 3:
            # DeepSpeed gathers into new memory, beside the partition of this process
            gathered, choice = self.size * role.parameters, deploy.gather_for_rollout
            self.gathers = bool(choice or (choice is None and used + gathered <= self.limit))
            needs["gathered weights"] = gathered if self.gathers else self.live_weights(role)
            used += needs["gathered weights"]
        has_adapter = self.cfg.actor.lora.rank and role.trained  # stage=eval loads merged weights
        if has_adapter and (deploy.zero_stage < 3 or self.world == 1):
            # in the gathered weights of several processes an adapter is merged in place
            merged = self.size * adapted_weights(arch, self.cfg.actor.lora)
            self.merges = used + merged <= ROOM * self.limit
            if self.merges:
                needs["merged weights"] = merged
        return needs

    # ------------------------------------------------------------------------------- totals

    def checkpoint_bytes(self) -> float:
        """Of all checkpoints: weights and Adam's two moments; in 16 bits also the fp32 weights."""
        per_weight = self.size + (12 if self.size == 2 else 8)
        one = sum(role.trained for role in self.roles if role.optimizer) * per_weight
        return (self.cfg.checkpoint.keep + 1) * one

    def all_notes(self) -> list[str]:
        if self.cfg.rollout.engine == RolloutEngine.vllm and is_rl(self.stage):
            return [*self.notes, "the memory of the vLLM server is not counted"]
        if self.gathers:
            return self.notes
        moved = self.size * self.roles[0].parameters / GIB
        return [
            *self.notes,
            f"sampling fetches all {moved:.1f} GiB of the actor's weights from the other "
            "processes for every token",
        ]

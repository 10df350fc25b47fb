"""What a run needs, before it starts: memory on each GPU, batches, steps, tokens. Formulas only: no torch, weights or network.

Counted are the tensors that DeepSpeed and the loops hold at once. Model states are exact (tests compare them with measured
tensors); activations are what transformers' blocks save for the backward pass, measured per family (`ACTIVATIONS`); the rest of
a GPU (context, kernels' workspaces, fragmentation) is the flat `LIBRARIES`.
"""

from __future__ import annotations

import itertools
import json
import math
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf import checks, config, layout
from rlhf.config import ALIGNMENT, ONLINE, Arch, Config, Device, Lora, Precision, Stage
from rlhf.ds import BYTES

GIB = 2**30
LIBRARIES = {Device.gpu: 1.5 * GIB, Device.cpu: 0.5 * GIB}  # CUDA context, cuBLAS and NCCL; on CPU the imported libraries (450 MiB)
MAX_LIVE = 10**9  # weights that DeepSpeed holds gathered at stage 3, at most (its stage3_max_live_parameters)
ROWS = {"Dahoas/rm-static": 76256, "Dahoas/full-hh-rlhf": 112052, "Anthropic/hh-rlhf": 160800}  # preference pairs, from their cards

PADDED = ("bloom",)  # families whose attention needs padding
CHUNK, SMALLEST, LOGITS, KEPT = 512, 64, 2**21, 2**22  # of rlhf/logprobs.py, which needs torch

# Elements that one block keeps per token for the backward pass: (x ffn, x hidden in fp32, x hidden in bf16). The norms of the
# llama family compute in fp32, which a bf16 block keeps beside its own. To these comes the attention mask: one per key; BLOOM
# keeps its attention matrix, for each head once in fp32 and three times in bf16.
ACTIVATIONS = {
    "opt": (1, 8, 8),
    "gpt2": (5, 8, 8),
    "gpt_neox": (2, 10, 10),
    "llama": (4, 10, 12),
    "qwen2": (4, 10, 12),
    "gemma3_text": (4, 17, 28),
    "bloom": (1, 12, 12),
}


# ----------------------------------------------------------------------------------------------------------------------- shapes


def linear_layers(arch: Arch) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers of one block, by transformers' names. Raises ValueError for an unknown family."""
    h, f, q, kv = arch.hidden, arch.ffn, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    if arch.family == "opt":
        return {"q_proj": (h, h), "k_proj": (h, h), "v_proj": (h, h), "out_proj": (h, h), "fc1": (h, f), "fc2": (f, h)}
    if arch.family == "gpt2":
        return {"attn.c_attn": (h, 3 * h), "attn.c_proj": (h, h), "mlp.c_fc": (h, f), "mlp.c_proj": (f, h)}
    if arch.family in ("gpt_neox", "bloom"):
        return {"query_key_value": (h, 3 * h), "dense": (h, h), "dense_h_to_4h": (h, f), "dense_4h_to_h": (f, h)}
    if arch.family in ("llama", "qwen2", "gemma3_text"):
        mlp = {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}
        return {"q_proj": (h, q), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (q, h)} | mlp
    raise ValueError(f"arch.family={arch.family}: must be one of {', '.join(ACTIVATIONS)}")


def block_parameters(arch: Arch) -> int:
    """Weights of one block, biases and norms included."""
    layers = linear_layers(arch)
    weights = sum(i * o for i, o in layers.values())
    outputs = sum(o for _, o in layers.values())
    h = arch.hidden
    if arch.family in ("opt", "gpt2", "gpt_neox", "bloom"):  # biases everywhere, two norms with bias
        return weights + outputs + 4 * h
    if arch.family == "qwen2":  # biases on queries, keys and values
        return weights + (arch.heads + 2 * arch.kv_heads) * arch.head_dim + 2 * h
    if arch.family == "gemma3_text":  # four norms, and one each for queries and keys
        return weights + 4 * h + 2 * arch.head_dim
    return weights + 2 * h


def parameters(arch: Arch, scorer: bool = False) -> int:
    """Number of weights of a causal language model; `scorer`: of the sequence-classification model with one label."""
    h, width = arch.hidden, arch.embed or arch.hidden
    total = arch.vocab * width + arch.layers * block_parameters(arch)
    if arch.family == "opt":  # positions with an offset of 2; no final norm where the embeddings are projected
        total += (arch.positions + 2) * h + (2 * h if width == h else 2 * width * h)
    elif arch.family == "gpt2":
        total += arch.positions * h + 2 * h
    elif arch.family == "bloom":  # a norm behind the embeddings too; no positions (ALiBi)
        total += 4 * h
    else:
        total += 2 * h if arch.family == "gpt_neox" else h
    if scorer:
        return total + width
    return total if arch.tied else total + arch.vocab * width


def lora_parameters(arch: Arch, lora: Lora, scorer: bool = False) -> int:
    """Number of trained weights with an adapter: rank x (inputs + outputs) of each adapted layer, head, embeddings."""
    width = arch.embed or arch.hidden

    def adapted(name: str) -> bool:
        return lora.targets is None or any(name == t or name.endswith("." + t) or t.endswith("." + name) for t in lora.targets)

    total = arch.layers * sum(lora.rank * (i + o) for name, (i, o) in linear_layers(arch).items() if adapted(name))
    if width != arch.hidden:
        total += sum(lora.rank * (width + arch.hidden) for name in ("project_in", "project_out") if adapted(name))
    return total + (width if scorer else 0) + (arch.vocab * width if lora.embeddings else 0)


def arch_of(path: str, given: Arch | None) -> Arch | None:
    """The numbers of a model: from its config.json where `path` is a directory or built in, else those given, or None.
    Raises: ValueError for a family that there is no formula for."""
    if path.startswith(layout.BUILTIN):
        file = Path(__file__).parent / "assets" / path.removeprefix(layout.BUILTIN) / "config.json"
    elif layout.is_directory(path):
        file = layout.model_directory(path) / "config.json"
    else:
        return given
    saved = json.loads(file.read_text())

    def get(*names: str, default: Any = None) -> Any:
        return next((saved[name] for name in names if saved.get(name) is not None), default)

    family, hidden = saved.get("model_type"), get("hidden_size", "n_embd", "n_embed")
    if family not in ACTIVATIONS:
        raise ValueError(f"{path}: there is no memory formula for models of type {family}; it trains without a plan")
    heads, width = get("num_attention_heads", "n_head"), get("word_embed_proj_dim", default=hidden)
    return Arch(
        family=family,
        layers=get("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=get("num_key_value_heads", default=heads),
        head_dim=get("head_dim", default=hidden // heads),
        ffn=get("ffn_dim", "intermediate_size", "n_inner", default=4 * hidden),
        vocab=saved["vocab_size"],
        positions=get("max_position_embeddings", "n_positions", "seq_length", default=2048),
        tied=get("tie_word_embeddings", default=family in ("opt", "gpt2", "bloom", "gemma3_text")),
        embed=width if width != hidden else None,
    )


# ----------------------------------------------------------------------------------------------------------------------- memory


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
    phases: dict[str, dict[str, float]]  # what comes to the models' states at the fullest moment of each phase
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
    deploy, size, world = cfg.deploy, BYTES[cfg.deploy.precision], config.world_size(cfg)
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


def make_plan(cfg: Config, stage: Stage) -> Plan:
    """The needs of one stage.

    Raises: ValueError when the shape of a model is not known: a hub id without `arch`, or a family without formula.
    """
    deploy, world = cfg.deploy, config.world_size(cfg)
    size = BYTES[deploy.precision]

    def shape(model: config.Model, trained: str | None) -> Arch | None:
        return arch_of(trained, None) if trained else arch_of(model.path, model.arch)

    node, given = getattr(cfg, stage.name), config.parents(cfg, stage)
    actor = shape(cfg.actor, cfg.inputs.get("sft") or given.get(Stage.sft)) if stage != Stage.rm else None
    own_reward = config.uses_own_reward_model(cfg, stage)
    reward = shape(cfg.reward, cfg.inputs.get("rm") or given.get(Stage.rm)) if stage == Stage.rm or own_reward else None
    for arch, name, needed in ((actor, "actor", stage != Stage.rm), (reward, "reward", stage == Stage.rm or own_reward)):
        if arch is None and needed:
            raise ValueError(f"the shape of {name} is not known before it is loaded: give its numbers as {name}.arch (see conf/model/)")

    def role(name: str, arch: Arch, model: config.Model, scorer: bool, trained: bool) -> Role:
        count = parameters(arch, scorer)
        learning = 0 if not trained else lora_parameters(arch, model.lora, scorer) if model.lora.rank else count
        extra = lora_parameters(arch, model.lora, False) if trained and model.lora.rank else 0  # the adapter comes to the weights
        extra -= arch.vocab * (arch.embed or arch.hidden) if extra and model.lora.embeddings else 0
        return role_memory(cfg, name, model.name, count + extra, learning)

    def update(arch: Arch, own: Role, rows: int, tokens: int, positions: int) -> dict[str, float]:
        parts = {"activations": activations(arch, cfg, rows, tokens), "logits": logits(arch, cfg, rows, positions, True)}
        parts["buckets"] = 2 * deploy.bucket_mb * 2**20 if deploy.zero_stage else 0
        parts["gathered weights"] = live_weights(own)
        return parts

    def live_weights(own: Role) -> float:
        """Of a partitioned model, the weights that are whole at a time."""
        partitioned = deploy.zero_stage == 3 or (deploy.offload.frozen and not own.trained)
        if not partitioned or (world == 1 and not own.host):  # the only part is the whole
            return 0
        return size * min(own.parameters, MAX_LIVE)

    def sampling(arch: Arch, own: Role, tokens: int, states: float) -> tuple[dict[str, float], bool]:
        """The phase, and whether partitioned weights are whole in it: as set, or where they fit."""
        rows = deploy.eval_micro_batch
        parts = {
            "kv cache": kv_cache(arch, cfg, rows, tokens),
            "logits": rows * arch.vocab * (size + 16),
        }  # probabilities, their sum in fp64
        if deploy.zero_stage < 3:
            return parts, True
        whole = size * own.parameters  # DeepSpeed puts them together in new memory, beside the own part
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
    if stage == Stage.sft and actor:
        roles = [role("actor", actor, cfg.actor, False, True)]
        phases["update"] = update(actor, roles[0], deploy.micro_batch, prompt + answer, prompt + answer)
        phases["sampling"], gathers = sampling(actor, roles[0], prompt + answer, roles[0].total + libraries)
        files = size * roles[0].parameters
    elif stage == Stage.rm and reward:
        roles = [role("reward", reward, cfg.reward, True, True)]
        phases["update"] = update(reward, roles[0], 2 * deploy.micro_batch, prompt + answer, 0)
        files = size * roles[0].parameters
    elif stage == Stage.dpo and actor:
        roles = [role("actor", actor, cfg.actor, False, True)]
        if not config.adapter_only(cfg.actor):
            roles.append(role("ref", actor, cfg.actor, False, False))
        phases["update"] = update(actor, roles[0], 2 * deploy.micro_batch, prompt + answer, answer)
        longest = prompt + cfg.rollout.max_new_tokens
        phases["sampling"], gathers = sampling(actor, roles[0], longest, sum(r.total for r in roles) + libraries)
        files = size * roles[0].parameters
    elif stage == Stage.eval:
        answer = cfg.rollout.max_new_tokens
        if actor and node.policies:  # one at a time, beside the one it is compared with
            roles = [role("policy", actor, cfg.actor, False, False)]
            roles += [role("against", actor, cfg.actor, False, False)] if node.against else []
        if reward:
            roles.append(role("reward", reward, cfg.reward, True, False))
        phases["scoring"] = {"gathered weights": max(map(live_weights, roles), default=0.0)}
        if actor and node.policies:
            phases["scoring"]["logits"] = logits(actor, cfg, deploy.eval_micro_batch, answer, False)
            phases["sampling"], gathers = sampling(actor, roles[0], prompt + answer, sum(r.total for r in roles) + libraries)
            phases["sampling"]["kv cache"] *= node.beams if node.decoding == config.Decoding.beam else 1
        notes += [f"eval.rewards.{name}: not counted" for name, source in node.rewards.items() if source.path]
        given_by_path = not all(map(config.is_named, cfg.eval.policies))
        notes += ["eval.policies given by path are taken to be as large as the actor"] if given_by_path else []
        files = 0
    elif actor:
        answer = cfg.rollout.max_new_tokens
        roles = [role("actor", actor, cfg.actor, False, True)]
        if not config.adapter_only(cfg.actor):
            roles.append(role("ref", actor, cfg.actor, False, False))
        critic = reward or actor
        if reward:
            roles.append(role("reward", reward, cfg.reward, True, False))
            if actor.family != reward.family or abs(actor.vocab - reward.vocab) > 256:  # fewer may be padding and special tokens
                critic = actor
                notes += ["reward model and actor have other tokenizers: the critic starts from the actor"] * (stage == Stage.ppo)
        elif stage == Stage.ppo:
            notes.append("no reward model of this configuration is used: the critic starts from the actor")
        for name, source in node.rewards.items():
            if source.path and (other := cfg.inputs.get(f"rewards/{name}", source.path)):
                found = arch_of(other, None)
                if found:
                    roles.append(role(name, found, cfg.reward, True, False))
                else:
                    notes.append(f"{stage.name}.rewards.{name}: its shape is not known before it is loaded, it is not counted")
        if stage == Stage.ppo:
            roles.append(role("critic", critic, cfg.reward, True, True))
        if node.ema:  # fp32; partitioned with the weights, else on the first process alone, which is the fullest
            average = 4.0 * roles[0].trained / (world if deploy.zero_stage == 3 else 1)
            roles.insert(1, Role("average", cfg.actor.name, roles[0].trained, 0, average, 0, 0, 0))
        phases["sampling"], gathers = sampling(actor, roles[0], prompt + answer, sum(r.total for r in roles) + libraries)
        phases["scoring"] = {
            "logits": logits(actor, cfg, deploy.eval_micro_batch, answer, False),
            "gathered weights": max(map(live_weights, roles)),
        }
        # a text of the pretraining loss, or a demonstration with its prompt; it has logits at all its positions
        text = max(node.ptx.max_tokens, prompt + min(node.ptx.max_tokens, cfg.data.max_response_tokens)) if node.ptx.coef else 0
        longest, read = max(prompt + answer, text), max(answer, text)
        phases["actor's update"] = update(actor, roles[0], deploy.micro_batch, longest, read)
        policies = 1 + bool(node.ema) + bool(node.evaluation.every)
        files = size * policies * roles[0].parameters
        if stage == Stage.ppo:
            phases["critic's update"] = update(critic, roles[-1], deploy.micro_batch, prompt + answer, 0)
            files += size * roles[-1].parameters
    if size == 2 and stage != Stage.eval:  # gradients are copied to fp32, where the optimizer is
        trained = max(r.trained for r in roles)
        here = 0 if deploy.offload.optimizer else 4 * trained / (world if deploy.zero_stage else 1)
        phases["optimizer's step"] = {"fp32 gradients": here}
    if not gathers:
        moved = size * roles[0].parameters / GIB
        notes.append(f"sampling fetches all {moved:.1f} GiB of the actor's weights from the other processes for every token")
    batch, steps, tokens = arithmetic(cfg, stage)
    one = sum(role.trained for role in roles if role.optimizer) * (size + (12 if size == 2 else 8))  # Adam's two moments, fp32 weights
    saved = (cfg.checkpoint.keep + 1) * one
    return Plan(stage.name, roles, phases, libraries, deploy.gpu_memory_gb * GIB, batch, steps, tokens, files, saved, notes, gathers)


# ------------------------------------------------------------------------------------------------------------------- arithmetic


def share_of(stage: Stage) -> str:
    """Whose share of the data a stage learns from."""
    return "rm" if stage == Stage.dpo else "ppo" if stage in ALIGNMENT else stage.name


def rows_of(cfg: Config, stage: Stage) -> int | None:
    """Training rows of a stage, before any is dropped for its length; None where that is known only when the data are there."""
    part = share_of(stage)
    if cfg.data.sandbox:
        rest = 7200 - cfg.data.eval_rows  # rlhf/data/sandbox.py makes so many prompts, and leaves PPO a fifth
        return {"sft": cfg.data.sandbox.demonstrations, "rm": cfg.data.sandbox.pairs, "ppo": rest - int(0.8 * rest)}[part]
    total = 0
    for source in cfg.data.sources.values():
        path = Path(source.path).expanduser()
        if source.path in ROWS:
            total += ROWS[source.path]
        elif path.suffix == ".jsonl" and path.is_file():
            with open(path, "rb") as file:
                total += sum(1 for _ in file)
        else:
            return None
    share = cfg.data.shares[["sft", "rm", "ppo"].index(part)] / sum(cfg.data.shares)
    return int(total * (1 - cfg.data.eval_share) * share)


def arithmetic(cfg: Config, stage: Stage) -> tuple[str, int | None, int | None]:
    """How a batch is cut, the number of steps (PPO: rollouts) and of tokens, at most."""
    if stage == Stage.eval:
        return "nothing is trained", 0, 0
    node: Any = getattr(cfg, stage.name)
    online, pairs = stage in ONLINE, stage in (Stage.rm, Stage.dpo)
    world, rows = config.world_size(cfg), rows_of(cfg, stage)
    each = node.responses_per_prompt if online else 1
    per_step = each * node.batch_size // node.minibatches if online else node.batch_size
    forwards = math.ceil(per_step / world / cfg.deploy.micro_batch)
    what = "pairs" if pairs else "answers" if online else "demonstrations"
    text = f"{per_step} {what} per optimizer step = {world} process(es) x {forwards} forward(s)"
    text += f" of {min(cfg.deploy.micro_batch, max(1, per_step // world))}"
    if online:
        text += f"; {node.batch_size} prompts per rollout, " + (f"{each} answers to each, " if each > 1 else "")
        text += f"{node.epochs} x {node.minibatches} steps on each rollout"
    epochs = node.prompt_epochs if online else node.epochs
    steps = None if rows is None else rows // node.batch_size * epochs
    if node.max_steps:
        steps = node.max_steps if steps is None else min(steps, node.max_steps)
    longest = cfg.data.max_prompt_tokens + (cfg.rollout.max_new_tokens if online else cfg.data.max_response_tokens)
    sequences = node.batch_size * (2 if pairs else each)
    return text, steps, None if steps is None else steps * sequences * longest


# ------------------------------------------------------------------------------------------------------------- what would make it fit


def cheapest_changes(cfg: Config, stage: Stage, count: int = 3) -> list[str]:
    """The `count` cheapest changes that make a stage fit, each as overrides in one line. Cheap is what costs little speed: few
    changes before many, and in the order below; none contains another."""
    deploy, several = cfg.deploy, config.world_size(cfg) > 1
    single_gpu = deploy.device == Device.gpu and deploy.gpus < 8
    to_host: dict[str, Any] = {"deploy.zero_stage": 2} if deploy.zero_stage == 0 else {}  # stage 0 cannot offload; one GPU may have 2
    offers: list[tuple[dict[str, Any], bool]] = [
        ({"deploy.eval_micro_batch": 1}, deploy.eval_micro_batch > 1),
        ({"deploy.micro_batch": 1}, deploy.micro_batch > 1),
        ({"deploy.zero_stage": 2}, several and deploy.zero_stage < 2),
        ({"deploy.precision": Precision.bf16}, BYTES[deploy.precision] == 4),
        ({"deploy.activation_checkpointing": True}, not deploy.activation_checkpointing),
        ({"deploy.zero_stage": 3}, several and deploy.zero_stage < 3),
        ({"deploy.gather_for_rollout": False}, deploy.zero_stage == 3 and deploy.gather_for_rollout is True),
        ({"deploy.offload.frozen": True}, not deploy.offload.frozen and stage not in (Stage.sft, Stage.rm)),
        (to_host | {"deploy.offload.optimizer": True}, not deploy.offload.optimizer),
        ({"actor.lora.rank": 16}, stage not in (Stage.rm, Stage.eval) and not cfg.actor.lora.rank),
        ({"reward.lora.rank": 16}, stage in (Stage.rm, Stage.ppo) and not cfg.reward.lora.rank),
        ({f"{stage.name}.ema": None}, stage in ONLINE and getattr(cfg, stage.name).ema is not None),
        ({"deploy.gpus": 8, "deploy.zero_stage": 2}, single_gpu),  # costs no speed, but has to be there
        ({"deploy.gpus": 8, "deploy.zero_stage": 3}, single_gpu),
    ]
    changes = [change for change, possible in offers if possible]

    def changed(overrides: dict[str, Any]) -> Config:
        other = deepcopy(cfg)
        for key, value in overrides.items():
            node, name = key.rsplit(".", 1)
            setattr(config.lookup(other, node), name, value)
        return other

    def fits(overrides: dict[str, Any]) -> bool:
        other = changed(overrides)
        return not checks.check(other) and make_plan(other, stage).fits

    sets = [chosen for n in (1, 2, 3, 4) for chosen in itertools.combinations(range(len(changes)), n)]
    found: list[tuple[int, ...]] = []
    lines: list[str] = []
    for chosen in sorted(sets, key=lambda s: (len(s), sum(s))):
        together: dict[str, Any] = {}
        for i in chosen:
            together |= changes[i]
        repeats = len(together) < sum(len(changes[i]) for i in chosen)  # two values for one key
        if repeats or any(set(smaller) <= set(chosen) for smaller in found) or not fits(together):
            continue
        for key in ("deploy.eval_micro_batch", "deploy.micro_batch"):  # no smaller than it need be
            while key in together and 2 * together[key] < config.lookup(cfg, key) and fits(together | {key: 2 * together[key]}):
                together[key] *= 2
        found.append(chosen)
        shown = {k: "null" if v is None else getattr(v, "name", str(v).lower()) for k, v in together.items()}
        lines.append(" ".join(f"{key}={value}" for key, value in shown.items()))
        if len(lines) == count:
            break
    return lines


def gather_for_rollout(cfg: Config) -> bool:
    """Whether the actor's partitioned weights are made whole for sampling: as set, or where the plan says that they fit."""
    try:
        return make_plan(cfg, Stage[cfg.stage.name]).gathers
    except ValueError:  # a shape that there is no formula for
        return cfg.deploy.gather_for_rollout is not False


# --------------------------------------------------------------------------------------------------------------------- printing


def short(plan: Plan) -> str:
    """One line."""
    unit = "rollouts" if Stage[plan.stage] in ONLINE else "steps"
    steps = f"{plan.steps:,} {unit}" if plan.steps else "nothing is trained"
    if plan.steps is None:
        steps = f"{unit} known when the data are read"
    fit = "".join(f"; {note}" for note in plan.notes) + ("" if plan.fits else "; may not fit, see plan=true")
    return f"{plan.stage}: plan {plan.peak / GIB:.1f} of {plan.limit / GIB:g} GiB per process ({plan.fullest}), {steps}{fit}"


def print_plan(plan: Plan, cfg: Config) -> None:
    """The whole of it, as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def gib(value: float) -> str:
        return f"{value / GIB:.2f}" if value else ""

    where = f"{config.world_size(cfg)} process(es), ZeRO {cfg.deploy.zero_stage}, {cfg.deploy.precision.name}"
    table = Table(title=f"{plan.stage}: GiB on each {'GPU' if cfg.deploy.device == Device.gpu else 'process'} of {where}", box=box.SIMPLE)
    for column in ("role", "model", "weights, M", "trained, M", "weights", "gradients", "optimizer", "in host memory", "here"):
        table.add_column(column, justify="left" if column in ("role", "model") else "right")
    for r in plan.roles:
        counts = [f"{r.parameters / 1e6:,.1f}", f"{r.trained / 1e6:,.1f}" if r.trained else ""]
        table.add_row(r.name, r.model, *counts, *map(gib, (r.weights, r.gradients, r.optimizer, r.host, r.total)))
    table.add_row("libraries", "", "", "", "", "", "", "", gib(plan.libraries))
    table.add_row("together", "", "", "", "", "", "", gib(plan.host), gib(plan.states), style="bold")
    phases = Table(box=box.SIMPLE)
    for column in ("phase", "comes to that", "peak"):
        phases.add_column(column, justify="right" if column == "peak" else "left")
    for name, parts in plan.phases.items():
        text = ", ".join(f"{part} {gib(value)}" for part, value in parts.items() if value / GIB >= 0.005)
        phases.add_row(name, text, gib(plan.states + sum(parts.values())), style="bold" if name == plan.fullest else "")
    console = Console(width=130, highlight=False)
    console.print(table)
    console.print(phases)
    unknown = "known when the data are read"
    console.print(f"  batch    {plan.batch}")
    console.print(f"  steps    {unknown if plan.steps is None else format(plan.steps, ',')}")
    console.print(f"  tokens   {unknown if plan.tokens is None else f'at most {plan.tokens:,}'}")
    console.print(f"  on disk  {gib(plan.files)} GiB of models, {gib(plan.checkpoints)} of checkpoints while it trains")
    for note in plan.notes:
        console.print(f"  note     {note}")
    size = f"{gib(plan.peak)} of {plan.limit / GIB:g} GiB (deploy.gpu_memory_gb)"
    if plan.fits:
        console.print(f"  fits     {size}")
    else:
        console.print(f"  does not fit: {size}. Cheapest changes that make it fit:")
        for line in cheapest_changes(cfg, Stage[plan.stage]) or ["none of those known here: a smaller model, or more machines"]:
            console.print(f"    {line}")

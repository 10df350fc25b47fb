"""The configuration: every key with its type, meaning, unit and range. Values live in conf/, and only there.

No torch here, and Hydra only in `register`: help, errors and completion must answer at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING, DictConfig, OmegaConf


class Stage(Enum):
    sft = "sft"
    rm = "rm"
    ppo = "ppo"
    inspect = "inspect"  # trains nothing: looks at the data


class Device(Enum):
    cpu = "cpu"
    gpu = "gpu"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # weights and computation; fp32 master weights in the optimizer
    fp16 = "fp16"  # likewise, with loss scaling; not for PPO
    autocast = "autocast"  # fp32 weights, bf16 computation where torch's autocast allows it


class Format(Enum):
    """How a row of a source becomes turns and answers: rlhf/data/formats.py."""

    sandbox = "sandbox"
    prompt_chosen_rejected = "prompt_chosen_rejected"  # a prompt and two answers; without `rejected` for SFT only
    chosen_rejected = "chosen_rejected"  # two whole dialogues that differ in the last answer
    scored_answers = "scored_answers"  # a prompt and two answers with a score each
    instruction = "instruction"  # instruction, perhaps an input, output; for SFT only
    messages = "messages"  # a conversation whose last turn is the answer; for SFT only
    text = "text"  # plain text, for PPO's pretraining loss


class Template(Enum):
    """How turns are written as text: rlhf/data/template.py."""

    hh = "hh"  # "\\n\\nHuman: ...\\n\\nAssistant: ..."
    chatml = "chatml"  # <|im_start|>role ... <|im_end|>
    llama3 = "llama3"  # <|start_header_id|>role<|end_header_id|> ... <|eot_id|>
    tokenizer = "tokenizer"  # the model's own chat template


class BadRow(Enum):
    skip = "skip"  # leave it out, count it, show the first
    refuse = "refuse"  # end with one line that names it


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


def no_effect() -> Any:
    """A field that cannot change the result of a run, so it is not part of the run's identity."""
    return field(default=MISSING, metadata={"identity": False})


@dataclass
class StageChoice:
    name: str = MISSING  # what was chosen with stage=
    runs: list[Stage] = MISSING  # the stages it runs, in order


@dataclass
class Lora:
    rank: int = MISSING  # of the low-rank updates; 0 = none, all weights are trained
    alpha: float = MISSING  # the update is scaled by alpha / rank, > 0
    dropout: float = MISSING  # on the input of the update, in [0, 1); PPO itself trains without
    targets: Optional[list[str]] = MISSING  # names of linear layers; null = all of them but the head
    embeddings: bool = MISSING  # train the embeddings as well, in full


@dataclass
class Arch:
    family: str = MISSING  # transformers' model_type: opt, gpt2, gpt_neox, llama, qwen2, gemma3_text, bloom
    layers: int = MISSING  # blocks
    hidden: int = MISSING  # width of the residual stream
    heads: int = MISSING  # of the queries
    kv_heads: int = MISSING  # of keys and values; fewer than `heads` with grouped queries
    head_dim: int = MISSING  # width of one head
    ffn: int = MISSING  # width of the feed-forward layer
    vocab: int = MISSING  # rows of the embedding matrix
    positions: int = MISSING  # longest sequence
    tied: bool = MISSING  # one matrix for embedding and output
    embed: Optional[int] = MISSING  # width of the embeddings; null = `hidden`. Else projected, without a final norm (OPT 350m)


@dataclass
class Model:
    name: str = MISSING  # short name, used in run names
    path: str = MISSING  # base model: hub id, directory, or builtin:NAME (a shape with random weights)
    lora: Lora = MISSING
    arch: Optional[Arch] = no_effect()  # numbers for plan=true; read from config.json where `path` is a directory


@dataclass
class Source:
    """Users add sources by name, so all but the path has a value here."""

    path: str = MISSING  # hub id; local .jsonl/.json/.parquet/.csv file (.gz too) or save_to_disk directory; or builtin:sandbox
    format: Optional[Format] = None  # null = by the columns it has
    columns: dict[str, str] = field(default_factory=dict)  # field of the format -> column; dots lead inside: question.full_text, answers.0
    config: Optional[str] = None  # configuration of a hub data set that has several
    split: str = "train"  # of a hub data set or a directory; a file is one
    eval_split: Optional[str] = None  # its own held-out split; null, and for a file = data.eval_share of the prompts
    weight: float = 1.0  # of its rows in the mix: 0.5 = every second one, 2 = each twice
    rows: Optional[int] = None  # the first so many rows at most; null = all
    sft_only: bool = False  # not for the reward model, whatever it has
    min_score_ratio: float = 1.0  # scored_answers: leave out pairs whose scores are nearer, >= 1 (1: only ties)


@dataclass
class Sandbox:
    demonstrations: int = MISSING  # answers for SFT, > 0
    pairs: int = MISSING  # preference pairs for the reward model, > 0
    label_noise: float = MISSING  # expected share of labels against the gold order, in (0, 0.5)


@dataclass
class Data:
    seed: int = MISSING  # makes the sandbox's world and decides splits; not covered by `seed`
    shares: list[int] = MISSING  # parts of the prompts for SFT, reward model, PPO
    eval_share: float = MISSING  # of the prompts, held out from all three, in (0, 0.5]
    eval_rows: int = MISSING  # held-out rows to evaluate on, at most
    max_prompt_tokens: int = MISSING  # longer prompts lose their first turns, or are dropped
    max_response_tokens: int = MISSING  # longer answers are cut (and then carry no EOS)
    template: Template = MISSING  # how turns are written
    on_bad_row: BadRow = MISSING  # rows that cannot be read
    workers: Optional[int] = no_effect()  # processes that prepare the data; null = one per core, at most 8
    sources: dict[str, Source] = MISSING  # by a name of your choice; several are mixed
    sandbox: Optional[Sandbox] = MISSING  # sizes of the built-in world; null where no source is builtin:sandbox


@dataclass
class Optim:
    lr: float = MISSING  # peak learning rate, > 0
    schedule: Schedule = MISSING  # after the warm-up; linear and cosine end at `final_lr`
    warmup_ratio: float = MISSING  # share of the optimizer steps, in [0, 1]
    final_lr: float = MISSING  # at the last step, as a share of lr, in [0, 1]
    weight_decay: float = MISSING  # decoupled; not on biases and norms
    betas: list[float] = MISSING  # Adam's, each in [0, 1)
    adam_eps: float = MISSING  # added to Adam's denominator, > 0
    grad_clip: float = MISSING  # global norm, > 0


@dataclass
class Sft(Optim):
    epochs: int = MISSING  # passes over the demonstrations
    batch_size: int = MISSING  # demonstrations per optimizer step, over all processes
    train_on_prompt: bool = MISSING  # learn the prompt's tokens too, not only the answer's
    packing: bool = no_effect()  # short demonstrations share a row, where padding would be; the loss is the same
    max_steps: Optional[int] = MISSING  # stop after so many optimizer steps; null = no limit


@dataclass
class Rm(Optim):
    epochs: int = MISSING  # passes over the pairs
    batch_size: int = MISSING  # pairs per optimizer step, over all processes
    max_steps: Optional[int] = MISSING  # stop after so many optimizer steps; null = no limit


@dataclass
class Kl:
    coef: float = MISSING  # beta: weight of the per-token penalty log pi - log ref in the reward, >= 0


@dataclass
class Ppo(Optim):
    critic_lr: float = MISSING  # peak learning rate of the critic, > 0
    batch_size: int = MISSING  # prompts per rollout, over all processes
    prompt_epochs: int = MISSING  # passes over the prompts; decides the number of rollouts
    max_steps: Optional[int] = MISSING  # stop after so many rollouts; null = no limit
    epochs: int = MISSING  # passes over each rollout
    minibatches: int = MISSING  # optimizer steps per pass
    kl: Kl = MISSING
    gamma: float = MISSING  # discount per token, in [0, 1]
    lam: float = MISSING  # GAE lambda, in [0, 1]
    clip: float = MISSING  # policy ratio clip, > 0
    value_clip: float = MISSING  # value clip around the old value, in normalised score units, > 0
    missing_eos_penalty: float = MISSING  # subtracted from the score of an answer without EOS, normalised score units, >= 0
    actor: Optional[str] = MISSING  # trained policy (run, directory, hub id) in place of the SFT run derived from the config
    reward: Optional[str] = MISSING  # trained reward model, likewise


@dataclass
class Rollout:
    max_new_tokens: int = MISSING  # sampled tokens per answer, at most
    temperature: float = MISSING  # divides the logits of policy, old policy and reference alike, > 0


@dataclass
class Offload:
    optimizer: bool = no_effect()  # optimizer states in host memory; needs zero_stage >= 1
    parameters: bool = no_effect()  # weights of trained models in host memory; needs zero_stage=3
    frozen: bool = no_effect()  # weights of reference and reward model in host memory while they are not used


@dataclass
class Deploy:
    device: Device = no_effect()  # cpu or gpu (NVIDIA)
    gpus: int = no_effect()  # processes per node: one per GPU, on CPU too
    nodes: int = no_effect()  # machines
    hostfile: Optional[str] = no_effect()  # DeepSpeed's: lines "host slots=N"; this command then starts the workers on all nodes
    node_rank: Optional[int] = no_effect()  # number of this node; the same command is then started on each of them (SLURM)
    master: Optional[str] = no_effect()  # "host:port" of node 0, where the nodes meet
    gpu_memory_gb: float = no_effect()  # of one GPU, GiB; on CPU of one process: what plan=true compares with
    threads: Optional[int] = no_effect()  # CPU threads per process; null = cores / processes
    zero_stage: int = no_effect()  # what DeepSpeed partitions: 0 nothing, 1 optimizer states, 2 + gradients, 3 + weights
    precision: Precision = MISSING  # of weights and computation; it does change results
    micro_batch: int = no_effect()  # sequences (RM: pairs) per process and forward in training: cuts batches for memory only
    eval_micro_batch: int = no_effect()  # sequences per process and forward without gradients, and per generation batch
    activation_checkpointing: bool = no_effect()  # compute activations again in the backward pass: less memory, a third slower
    offload: Offload = no_effect()
    gather_for_rollout: Optional[bool] = no_effect()  # ZeRO-3: whole weights while sampling; null = where the plan says they fit
    overlap_comm: bool = no_effect()  # reduce gradients while the backward pass goes on
    bucket_mb: float = no_effect()  # gradients and weights travel in messages of this size, MiB


@dataclass
class Wandb:
    mode: WandbMode = no_effect()  # auto: online if there is a key and the server answers, else offline
    project: str = no_effect()  # where the runs appear
    entity: Optional[str] = no_effect()  # user or team; null = your default one
    tags: list[str] = no_effect()  # besides actor, deployment and data


@dataclass
class Config:
    stage: StageChoice = no_effect()
    actor: Model = MISSING
    reward: Model = MISSING
    data: Data = MISSING
    sft: Sft = MISSING
    rm: Rm = MISSING
    ppo: Ppo = MISSING
    rollout: Rollout = MISSING
    deploy: Deploy = MISSING
    wandb: Wandb = no_effect()
    seed: int = MISSING  # initialisation, order, sampling
    exp: str = no_effect()  # label of the experiment: W&B group, folder of a sweep
    root: str = no_effect()  # where outputs/ and multirun/ are made
    plan: bool = no_effect()  # print memory, steps and tokens, and end; exit code 2 when it does not fit
    fresh: bool = no_effect()  # move a run that exists aside and start it anew
    inputs: dict[str, str] = no_effect()  # filled in by train.py: directories or hub ids of the trained models a stage stands on


# The nodes that a stage reads itself, and the stages whose results it stands on.
READS = {
    Stage.sft: ["actor", "data", "sft", "deploy", "seed"],
    Stage.rm: ["reward", "data", "rm", "deploy", "seed"],
    Stage.ppo: ["actor", "reward", "data", "sft", "rm", "ppo", "rollout", "deploy", "seed"],
    Stage.inspect: ["actor", "data"],
}
PARENTS = {Stage.sft: [], Stage.rm: [], Stage.ppo: [Stage.sft, Stage.rm], Stage.inspect: []}


def register() -> None:
    """Make the schema known to Hydra, under the name that conf/config.yaml starts with."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store("schema", Config)


def to_typed(cfg: DictConfig) -> Config:
    """The composed configuration as plain typed objects. Raises ValueError naming all unknown and all missing keys."""
    problems = [f"unknown key {unknown(key)}" for key in unknown_keys(cfg)]
    problems += [f"{key} has no value: give one, {key}=..." for key in sorted(OmegaConf.missing_keys(cfg))]
    if problems:
        raise ValueError("\n".join(problems))
    return typing.cast(Config, OmegaConf.to_object(cfg))


def load(path: Path) -> Config:
    """Read a run's resolved config.yaml."""
    return to_typed(typing.cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))))


def save(cfg: Config, path: Path) -> None:
    """Write the resolved configuration of a run, through a temporary name."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(cfg), resolve=True))
    os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------------------------------- keys


def _node_type(annotation: Any) -> Any:
    """The dataclass behind an annotation, also behind Optional and dict[str, ...]; else the annotation."""
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    return _node_type(inner[-1]) if inner else annotation


@functools.cache
def schema_keys(node: Any = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the schema, nodes included; a name that the user chooses stands as `*`."""
    keys = []
    for name, annotation in typing.get_type_hints(node).items():
        key = prefix + name
        keys.append(key)
        star = ".*" if typing.get_origin(annotation) is dict else ""
        keys += [key + star] if star else []
        if dataclasses.is_dataclass(child := _node_type(annotation)):
            keys += schema_keys(typing.cast(type, child), f"{key}{star}.")
    return keys


def is_known(key: str) -> bool:
    parts = key.split(".")
    return any(
        len(known := pattern.split(".")) == len(parts) and all(a in (b, "*") for a, b in zip(known, parts)) for pattern in schema_keys()
    )


def unknown(key: str) -> str:
    """`key` with the nearest known name: "ppo.lrr (did you mean ppo.lr?)"."""
    names = schema_keys()
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    last = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    guesses = near or last
    return f"{key} (did you mean {guesses[0]}?)" if guesses else f"{key} (see python train.py --help)"


def unknown_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Keys that are in `cfg` but not in the schema: `+key=value` puts them there unasked."""
    found = []
    for name in cfg:
        key = f"{prefix}{name!s}"
        if not is_known(key):
            found.append(key)
        elif not OmegaConf.is_missing(cfg, name) and isinstance(child := cfg._get_node(name), DictConfig) and not child._is_none():
            found += unknown_keys(child, f"{key}.")
    return found


# ----------------------------------------------------------------------------------------------------------------------- checks


def check(cfg: Config) -> list[str]:
    """All that is wrong with the values, as lines that name key, value and fix. Nothing is repaired."""
    problems = []

    def need(ok: bool, line: str) -> None:
        if not ok:
            problems.append(line)

    def positive(*keys: str) -> None:
        for key in keys:
            value = lookup(cfg, key)
            need(value is None or 0 < value < math.inf, f"{key}={value}: must be above 0")

    def within(key: str, low: float, high: float) -> None:
        value = lookup(cfg, key)
        need(low <= value <= high, f"{key}={value}: must be between {low:g} and {high:g}")

    for key in ("seed", "data.seed"):
        need(0 <= lookup(cfg, key) < 2**63, f"{key}={lookup(cfg, key)}: must not be negative")
    need(re.fullmatch(r"[\w.+-]*\w[\w.+-]*", cfg.exp) is not None, f"exp={cfg.exp}: give a plain name, it becomes a folder")
    world = world_size(cfg)
    positive("deploy.gpus", "deploy.threads", "deploy.micro_batch", "deploy.eval_micro_batch", "rollout.max_new_tokens")
    positive("deploy.nodes", "deploy.gpu_memory_gb", "deploy.bucket_mb")
    positive("rollout.temperature", "data.max_prompt_tokens", "data.max_response_tokens", "data.eval_rows", "data.eval_share")
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
        need(Stage.ppo not in cfg.stage.runs, "deploy.precision=fp16: PPO's ratios overflow and underflow in it; use bf16")
    if deploy.node_rank is not None:
        need(0 <= deploy.node_rank < deploy.nodes, f"deploy.node_rank={deploy.node_rank}: must be below deploy.nodes={deploy.nodes}")
        need(deploy.hostfile is None, "deploy.hostfile and deploy.node_rank: give one; a hostfile starts all nodes from here")
        need(deploy.master is not None, f"deploy.node_rank={deploy.node_rank}: give deploy.master=host:port of node 0 as well")
    if deploy.master is not None:
        address = re.fullmatch(r"[^:\s]+:(\d{1,5})", deploy.master)
        need(address is not None and 0 < int(address[1]) < 2**16, f"deploy.master={deploy.master}: give host:port of node 0")
    for role, model in (("actor", cfg.actor), ("reward", cfg.reward)):
        lora = model.lora
        need(lora.rank >= 0, f"{role}.lora.rank={lora.rank}: must not be negative (0 = no adapter)")
        need(lora.alpha > 0, f"{role}.lora.alpha={lora.alpha}: must be above 0")
        need(0 <= lora.dropout < 1, f"{role}.lora.dropout={lora.dropout}: must be at least 0 and below 1")
        need(lora.targets is None or bool(lora.targets), f"{role}.lora.targets=[]: name layers, or null for all linear layers but the head")
    shares, sources, sandbox = cfg.data.shares, cfg.data.sources, cfg.data.sandbox
    need(len(shares) == 3 and min(shares) > 0, f"data.shares={shares}: give three parts above 0, for sft, rm, ppo")
    need(bool(sources), "data.sources is empty: choose data=..., or give data.sources.NAME.path and .format")
    for name, source in sources.items():
        need(
            (source.path == "builtin:sandbox") == (source.format == Format.sandbox),
            f"data.sources.{name}: path=builtin:sandbox and format=sandbox go together, not with {source.path}",
        )
        need(0 < source.weight < math.inf, f"data.sources.{name}.weight={source.weight}: must be above 0")
        need(source.rows is None or source.rows > 0, f"data.sources.{name}.rows={source.rows}: must be above 0")
        ratio = source.min_score_ratio
        need(ratio >= 1, f"data.sources.{name}.min_score_ratio={ratio}: must be at least 1 (1: only ties are left out)")
    if sandbox is not None:
        builtin = any(source.format == Format.sandbox for source in sources.values())
        need(builtin, "data.sandbox has sizes, but no source is the built-in world: choose data=... instead of data=sandbox")
    if any(source.path == "builtin:sandbox" for source in sources.values()):
        need(sandbox is not None, "data.sandbox=null: the built-in source needs its sizes, see conf/data/sandbox.yaml")
        need(len(sources) == 1, "data: the sandbox cannot be mixed with other sources, its truth covers its own prompts only")
    if sandbox is not None:
        positive("data.sandbox.demonstrations", "data.sandbox.pairs")
        noise = sandbox.label_noise
        need(0 < noise < 0.5, f"data.sandbox.label_noise={noise}: must be above 0 and below 0.5")
    for stage in (Stage.sft, Stage.rm, Stage.ppo):
        node = stage.name
        positive(*(f"{node}.{key}" for key in ("lr", "grad_clip", "epochs", "batch_size", "max_steps", "adam_eps")))
        within(f"{node}.warmup_ratio", 0, 1)
        within(f"{node}.final_lr", 0, 1)
        need(lookup(cfg, f"{node}.weight_decay") >= 0, f"{node}.weight_decay={lookup(cfg, f'{node}.weight_decay')}: must not be negative")
        betas = lookup(cfg, f"{node}.betas")
        need(len(betas) == 2 and all(0 <= b < 1 for b in betas), f"{node}.betas={betas}: give two numbers in [0, 1)")
        size = lookup(cfg, f"{node}.batch_size")
        if stage in cfg.stage.runs and world > 0 and size > 0 and stage != Stage.ppo:
            need(size % world == 0, f"{node}.batch_size={size} is not divisible by {processes(cfg)}: try {nearest(size, world)}")
    positive("ppo.critic_lr", "ppo.prompt_epochs", "ppo.minibatches", "ppo.clip", "ppo.value_clip")
    within("ppo.gamma", 0, 1)
    within("ppo.lam", 0, 1)
    need(cfg.ppo.kl.coef >= 0, f"ppo.kl.coef={cfg.ppo.kl.coef}: must not be negative")
    need(cfg.ppo.missing_eos_penalty >= 0, f"ppo.missing_eos_penalty={cfg.ppo.missing_eos_penalty}: it is subtracted, must not be negative")
    if Stage.ppo in cfg.stage.runs and world > 0 and cfg.ppo.minibatches > 0 and cfg.ppo.batch_size > 0:
        size, parts = cfg.ppo.batch_size, cfg.ppo.minibatches * world
        need(
            size % parts == 0,
            f"ppo.batch_size={size} is not divisible by ppo.minibatches={cfg.ppo.minibatches} x {processes(cfg)} = {parts}: "
            f"try ppo.batch_size={nearest(size, parts)}",
        )
    return problems


def adapter_only(model: Model) -> bool:
    """Whether switching a policy's adapter off switches off all that is trained: it then is its own reference."""
    return model.lora.rank > 0 and not model.lora.embeddings


def world_size(cfg: Config) -> int:
    """Processes on all nodes."""
    return cfg.deploy.gpus * cfg.deploy.nodes


def processes(cfg: Config) -> str:
    """The number of processes as the user set it."""
    nodes = f" x deploy.nodes={cfg.deploy.nodes}" if cfg.deploy.nodes > 1 else ""
    return f"deploy.gpus={cfg.deploy.gpus}{nodes}"


def lookup(cfg: Any, key: str) -> Any:
    for name in key.split("."):
        cfg = getattr(cfg, name)
    return cfg


def nearest(value: int, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least `divisor`."""
    return max(1, round(value / divisor)) * divisor

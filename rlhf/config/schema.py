"""The configuration as a whole: every key with its type, meaning, unit and range.

`key(...)` says what a field means; `--help KEY`, docs/keys.md and the check of ranges read it.
Values live in conf/, and only there. No torch here, and no Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from rlhf.config.choices import WORLDS, BadRow, Device, Format, Precision, Template, WandbMode
from rlhf.config.field import key, placement
from rlhf.config.limits import (
    MOST_BATCH,
    MOST_MINUTES,
    MOST_NODES,
    MOST_PROCESSES,
    MOST_ROWS,
    MOST_TOKENS,
    MOST_WEIGHT,
)
from rlhf.config.stage_nodes import Dpo, Eval, Rl, Rm, Rollout, Sft


@dataclass(kw_only=True)
class StageChoice:
    name: str = key("what stage=NAME chose")
    runs: list[str] = key("the stages to run, in this order")


@dataclass(kw_only=True)
class Lora:
    rank: int = key(
        "rank of the low-rank updates; 0: no adapter, all weights are trained",
        at_least=0,
        at_most=65_536,
    )
    alpha: float = key("the update is scaled by alpha / rank", above=0)
    dropout: float = key(
        "probability of dropout on the update's input; SFT and reward model only",
        at_least=0,
        below=1,
    )
    targets: Optional[list[str]] = key("names of linear layers; null: all of them but the head")
    embeddings: bool = key("train the embeddings too, in full")


@dataclass(kw_only=True)
class Arch:
    family: str = key(
        "transformers' model_type: opt, gpt2, gpt_neox, llama, qwen2, gemma3_text, bloom"
    )
    layers: int = key("number of blocks", above=0)
    hidden: int = key("width of the residual stream", above=0)
    heads: int = key("query heads", above=0)
    kv_heads: int = key("key and value heads; fewer than heads with grouped queries", above=0)
    head_dim: int = key("width of one head", above=0)
    ffn: int = key("width of the feed-forward layer", above=0)
    vocab: int = key("rows of the embedding matrix", above=0)
    positions: int = key("context length, tokens", above=0)
    tied: bool = key("one matrix for embedding and output")
    embed: Optional[int] = key(
        "width of the embeddings; null: hidden. Else projected, without a final norm (OPT 350M)",
        above=0,
    )


@dataclass(kw_only=True)
class Pairing:
    reward: Optional[str] = key("reward model that actor=NAME brings; null: none", default=None)
    data: Optional[str] = key("data that the model brings; null: none", default=None)


@dataclass(kw_only=True)
class Model:
    name: str = key("short name, used in run names")
    path: str = key(
        "base model: hub id, directory (also of an adapter), or builtin:NAME (random weights)"
    )
    lora: Lora = key("low-rank adapter")
    arch: Optional[Arch] = placement(
        "shape, for plan=true; read from config.json where path is local"
    )
    pairs_with: Optional[Pairing] = placement("what actor=NAME and reward=NAME bring along")


@dataclass(kw_only=True)
class Source:
    path: str = key(
        "hub id; .jsonl, .json, .parquet or .csv file (.gz too); folder or pattern (DIR/*.jsonl) "
        "of such files; save_to_disk directory; builtin:sandbox or builtin:arithmetic"
    )
    format: Optional[Format] = key(
        "how a row is read; null: detected from its columns", default=None
    )
    columns: dict[str, str] = key(
        "field of the format -> column; dots lead inside: question.full_text, answers.0, answers.*",
        factory=dict,
    )
    config: Optional[str] = key("configuration of a hub data set that has several", default=None)
    split: str = key("split of a hub data set or directory; a file has one", default="train")
    eval_split: Optional[str] = key(
        "its own held-out split; for files other files; null: data.eval_share of the prompts",
        default=None,
    )
    weight: float = key(
        "of its rows in the mix: 0.5 = every second one, 2 = each twice",
        above=0,
        at_most=MOST_WEIGHT,
        default=1.0,
    )
    rows: Optional[int] = key("at most the first N rows; null: all", above=0, default=None)
    sft_only: bool = key("not for the reward model, whatever columns it has", default=False)
    system_prompt: Optional[str] = key(
        "first turn, the system's, of each row that has none; null: none is added", default=None
    )
    min_score_ratio: float = key(
        "scored_answers: drop pairs whose scores are nearer; 1: only ties", at_least=1, default=1.0
    )


@dataclass(kw_only=True)
class Sandbox:
    demonstrations: int = key("demonstrations for SFT", above=0, at_most=MOST_ROWS)
    pairs: int = key("preference pairs for the reward model", above=0, at_most=MOST_ROWS)
    label_noise: float = key("expected share of labels against the gold order", above=0, below=0.5)


@dataclass(kw_only=True)
class Arithmetic:
    demonstrations: int = key("demonstrations for SFT", above=0, at_most=MOST_ROWS)
    wrong: float = key("share of the demonstrations with a mistake", at_least=0, below=1)
    prompts: int = key("distinct prompts for online RL", above=0, at_most=100_000)
    pairs: int = key(
        "pairs of a right and a wrong solution, for the reward model", above=0, at_most=MOST_ROWS
    )
    harder: bool = key("evaluate on problems with one more digit; training does not depend on it")


@dataclass(kw_only=True)
class Data:
    seed: int = key("makes a built-in world and decides splits; not covered by seed", at_least=0)
    shares: list[int] = key("parts of the prompts for SFT, reward model, online RL", at_least=0)
    eval_share: float = key("share of the prompts held out from all three", above=0, at_most=0.5)
    eval_rows: int = key(
        "held-out rows to evaluate on, at most (built-in: 256); training does not depend on it",
        above=0,
    )
    max_prompt_tokens: int = key(
        "longer prompts lose their first turns, or are dropped", above=0, at_most=MOST_TOKENS
    )
    max_response_tokens: int = key(
        "longer answers are truncated, and then have no EOS", above=0, at_most=MOST_TOKENS
    )
    template: Template = key(
        "how turns are written, saved with the model; tokenizer: the model's own; none: raw text"
    )
    on_bad_row: BadRow = key("what happens to rows that cannot be read")
    max_row_mb: int = placement(
        "length of a row (.csv: of a field) in a file of text, at most, MiB", above=0, at_most=1024
    )
    workers: Optional[int] = placement(
        "processes that prepare the data; null: one per core, at most 8",
        above=0,
        at_most=MOST_PROCESSES,
    )
    sources: dict[str, Source] = key("by a name of your choice; several are mixed")
    sandbox: Optional[Sandbox] = key("sizes of this built-in world; null without builtin:sandbox")
    arithmetic: Optional[Arithmetic] = key("the same of builtin:arithmetic")

    @property
    def world(self) -> str:
        """The name of the built-in world that these data are; "" for others."""
        return next((world.name for world in WORLDS if getattr(self, world.name) is not None), "")


@dataclass(kw_only=True)
class Offload:
    optimizer: bool = placement("optimizer states in host memory; needs zero_stage >= 1")
    parameters: bool = placement("weights of trained models in host memory; needs zero_stage=3")
    frozen: bool = placement("weights of reference and reward model in host memory between uses")


@dataclass(kw_only=True)
class Deploy:
    device: Device = placement("cpu or gpu (NVIDIA)")
    processes_per_node: int = placement(
        "one per GPU; on CPU they share the cores", above=0, at_most=MOST_PROCESSES
    )
    nodes: int = placement("number of machines", above=0, at_most=MOST_NODES)
    hostfile: Optional[str] = placement(
        'DeepSpeed\'s hostfile, lines "host slots=N"; this command then starts all nodes'
    )
    node_rank: Optional[int] = placement(
        "number of this node; the same command is then started on each (SLURM)", at_least=0
    )
    master: Optional[str] = placement('"host:port" of node 0, where the nodes meet')
    gpu_memory_gb: float = placement(
        "memory of one GPU (CPU: of one process), GiB, for plan=true", above=0
    )
    threads: Optional[int] = placement(
        "CPU threads per process, at most 4 x cores; null: OMP_NUM_THREADS, else cores / "
        "processes, of the cores that can be used (docker --cpus, SLURM, taskset)",
        above=0,
    )
    zero_stage: int = placement(
        "what DeepSpeed partitions: 0 nothing, 1 optimizer states, 2 + gradients, 3 + weights; in "
        "bf16 and fp16 at least 2 is built (docs/deployment.md)",
        at_least=0,
        at_most=3,
    )
    precision: Precision = key("of weights and computation; it does change results")
    micro_batch: int = placement(
        "sequences (RM, DPO: pairs) of full length per process and forward pass in training",
        above=0,
        at_most=MOST_BATCH,
    )
    eval_micro_batch: int = placement(
        "sequences per process and forward pass without gradients, and per generation batch",
        above=0,
        at_most=MOST_BATCH,
    )
    activation_checkpointing: bool = placement(
        "recompute activations in the backward pass (gradient checkpointing): less memory, slower"
    )
    offload: Offload = placement("what lies in host memory")
    gather_for_rollout: Optional[bool] = placement(
        "ZeRO-3: gather the weights while sampling; null: where the plan says they fit"
    )
    overlap_comm: bool = placement("reduce gradients during the backward pass")
    bucket_mb: float = placement(
        "size of messages with gradients and weights, MiB", above=0, at_most=100_000
    )
    watchdog_minutes: Optional[float] = placement(
        "minutes without progress after which a worker ends with the stacks of its threads; longer "
        "than the 30 of collective operations; null: never",
        above=0,
        at_most=MOST_MINUTES,
    )


@dataclass(kw_only=True)
class Checkpoint:
    every_steps: Optional[int] = placement(
        "optimizer steps (online RL: rollouts) between checkpoints; null: by time only", above=0
    )
    every_minutes: Optional[float] = placement(
        "minutes between checkpoints; null: by steps only", above=0
    )
    keep: int = placement("number of recent checkpoints to keep", above=0)
    keep_optimizer: bool = placement(
        "a finished run keeps its last checkpoint, else its models only"
    )


@dataclass(kw_only=True)
class Wandb:
    mode: WandbMode = placement(
        "auto: online if there is a key and the server answers, else offline"
    )
    project: str = placement("where the runs appear")
    entity: Optional[str] = placement("user or team; null: your default one")
    tags: list[str] = placement("besides actor, deployment and data")
    notes: Optional[str] = placement("a sentence about the run")


@dataclass(kw_only=True)
class Config:
    stage: StageChoice = placement("what to do")
    pipeline: str = placement("algorithm of stage=pipeline, and what stage=eval looks at")
    actor: Model = key("base model of the policy")
    reward: Model = key("base model of the reward model")
    data: Data = key("what to train on")
    sft: Sft = key("supervised fine-tuning")
    rm: Rm = key("reward model")
    rl: Rl = key("online RL: PPO, RLOO, GRPO and their variants")
    dpo: Dpo = key("direct preference optimization")
    eval: Eval = key("evaluation of policies and reward models")
    rollout: Rollout = key("how responses are sampled")
    deploy: Deploy = key("where it runs: processes, ZeRO, precision, micro-batches")
    checkpoint: Checkpoint = placement("when checkpoints are written")
    wandb: Wandb = placement("Weights & Biases")
    seed: int = key("initialisation, order, sampling", at_least=0)
    deterministic: bool = placement(
        "on GPUs: kernels that add in a fixed order where there are any"
    )
    experiment_name: str = placement("label: W&B group, and folder of a sweep below multirun/")
    root: str = placement("where outputs/ and multirun/ are made")
    plan: bool = placement(
        "print memory, steps and tokens, and end; exit code 2 if it does not fit"
    )
    fresh: bool = placement("move an existing run aside and train it again")
    inputs: dict[str, str] = placement(
        "filled in by train.py: the trained models a stage starts from"
    )

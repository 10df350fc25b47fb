"""The configuration: every key with its type, meaning, unit and range. Values live in conf/, and only there.

No torch here, and Hydra only in `register`: help, errors and completion must answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING


class Stage(Enum):
    sft = "sft"
    rm = "rm"
    ppo = "ppo"
    rloo = "rloo"
    grpo = "grpo"
    dpo = "dpo"
    eval = "eval"  # trains nothing: measures policies and reward models
    inspect = "inspect"  # trains nothing: looks at the data


ONLINE = (Stage.ppo, Stage.rloo, Stage.grpo)  # learn from answers that they sample themselves
ALIGNMENT = (*ONLINE, Stage.dpo)  # what can end a pipeline: a policy that stands on SFT
POLICIES = (Stage.sft, *ALIGNMENT)


class Device(Enum):
    cpu = "cpu"
    gpu = "gpu"


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # weights and computation; fp32 master weights in the optimizer
    fp16 = "fp16"  # likewise, with loss scaling; not for PPO
    autocast = "autocast"  # fp32 weights, bf16 computation where torch's autocast allows it


class RolloutEngine(Enum):
    """What samples the answers: the same ones, up to rounding."""

    native = "native"  # rlhf/decode.py
    hf = "hf"  # transformers' generate, slower


class Format(Enum):
    """How a row of a source becomes turns and answers: rlhf/data/formats.py."""

    sandbox = "sandbox"
    prompt_chosen_rejected = (
        "prompt_chosen_rejected"  # a prompt and two answers; without `rejected` for SFT only
    )
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


class KlController(Enum):
    """How beta, the weight of the KL penalty, changes from rollout to rollout: rlhf/controllers.py."""

    fixed = "fixed"  # not at all
    adaptive = "adaptive"  # towards a KL that is held
    linear = "linear"  # from kl.coef at the first rollout to kl.final_coef at the last


class KlEstimator(Enum):
    """Per-token estimate of KL(policy || reference) from one sample: objectives.kl_estimate."""

    k1 = "k1"  # log pi - log ref: unbiased
    k2 = "k2"  # half its square: biased, never negative; its gradient is that of the KL
    k3 = "k3"  # e^-d - 1 + d: unbiased, never negative; its gradient is not that of the KL


class KlPlace(Enum):
    reward = "reward"  # subtracted from the reward of each token (Ziegler 2019)
    loss = "loss"  # added to the policy loss (GRPO)


class LossOver(Enum):
    """What a loss is a mean over: objectives.token_weights."""

    token = "token"  # all response tokens of the optimizer step alike
    sequence = "sequence"  # all answers alike: a token of a short one weighs more
    constant = "constant"  # answers x rollout.max_new_tokens: no bias by length (Dr. GRPO)


class RmLoss(Enum):
    sequence = "sequence"  # one score per answer, at its last token (InstructGPT)
    per_token = "per_token"  # mean over tokens from the first difference on, and scores read before the EOS (DeepSpeed-Chat)


class DpoLoss(Enum):
    sigmoid = "sigmoid"  # DPO, with label_smoothing the conservative one
    ipo = "ipo"  # squared distance of the margin from 1 / (2 beta)


class Decoding(Enum):
    sample = "sample"
    greedy = "greedy"
    beam = "beam"


class BestBy(Enum):
    """What an evaluation ranks policies by; higher is better."""

    score = "score"  # of the reward model
    objective = "objective"  # score - kl.coef x KL
    gold = "gold"  # the truth, where it is known


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


def not_hashed() -> Any:
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
    dropout: float = MISSING  # on the input of the update, in [0, 1); only SFT and the reward model train with it
    targets: Optional[list[str]] = (
        MISSING  # names of linear layers; null = all of them but the head
    )
    embeddings: bool = MISSING  # train the embeddings as well, in full


@dataclass
class Arch:
    family: str = (
        MISSING  # transformers' model_type: opt, gpt2, gpt_neox, llama, qwen2, gemma3_text, bloom
    )
    layers: int = MISSING  # blocks
    hidden: int = MISSING  # width of the residual stream
    heads: int = MISSING  # of the queries
    kv_heads: int = MISSING  # of keys and values; fewer than `heads` with grouped queries
    head_dim: int = MISSING  # width of one head
    ffn: int = MISSING  # width of the feed-forward layer
    vocab: int = MISSING  # rows of the embedding matrix
    positions: int = MISSING  # longest sequence
    tied: bool = MISSING  # one matrix for embedding and output
    embed: Optional[int] = (
        MISSING  # width of the embeddings; null = `hidden`. Else projected, without a final norm (OPT 350m)
    )


@dataclass
class Model:
    name: str = MISSING  # short name, used in run names
    path: str = (
        MISSING  # base model: hub id, directory, or builtin:NAME (a shape with random weights)
    )
    lora: Lora = MISSING
    arch: Optional[Arch] = (
        not_hashed()
    )  # numbers for plan=true; read from config.json where `path` is a directory


@dataclass
class Source:
    """Users add sources by name, so all but the path has a value here."""

    path: str = MISSING  # hub id; local .jsonl/.json/.parquet/.csv file (.gz too) or save_to_disk directory; or builtin:sandbox
    format: Optional[Format] = None  # null = by the columns it has
    columns: dict[str, str] = field(
        default_factory=dict
    )  # field of the format -> column; dots lead inside: question.full_text, answers.0
    config: Optional[str] = None  # configuration of a hub data set that has several
    split: str = "train"  # of a hub data set or a directory; a file is one
    eval_split: Optional[str] = (
        None  # its own held-out split; null, and for a file = data.eval_share of the prompts
    )
    weight: float = 1.0  # of its rows in the mix: 0.5 = every second one, 2 = each twice
    rows: Optional[int] = None  # the first so many rows at most; null = all
    sft_only: bool = False  # not for the reward model, whatever it has
    min_score_ratio: float = (
        1.0  # scored_answers: leave out pairs whose scores are nearer, >= 1 (1: only ties)
    )


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
    workers: Optional[int] = (
        not_hashed()
    )  # processes that prepare the data; null = one per core, at most 8
    sources: dict[str, Source] = MISSING  # by a name of your choice; several are mixed
    sandbox: Optional[Sandbox] = (
        MISSING  # sizes of the built-in world; null where no source is builtin:sandbox
    )


@dataclass
class Optim:
    lr: float = MISSING  # peak learning rate, > 0
    schedule: Schedule = MISSING  # after the warm-up; linear and cosine end at `final_lr`
    warmup_ratio: float = (
        MISSING  # linear warm-up over this share of the optimizer steps (PPO: rollouts), in [0, 1]
    )
    warmup_steps: Optional[int] = MISSING  # or over so many of them, >= 0; null = by warmup_ratio
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
    micro_batch_means: bool = MISSING  # DeepSpeed-Chat: the mean of the micro-batches' means, not the mean over all tokens
    max_steps: Optional[int] = MISSING  # stop after so many optimizer steps; null = no limit


@dataclass
class Rm(Optim):
    epochs: int = MISSING  # passes over the pairs
    batch_size: int = MISSING  # pairs per optimizer step, over all processes
    loss: RmLoss = MISSING  # what of two answers is compared
    max_steps: Optional[int] = MISSING  # stop after so many optimizer steps; null = no limit


@dataclass
class Kl:
    coef: float = MISSING  # beta at the first rollout, score units per nat, >= 0
    controller: KlController = MISSING  # how beta goes on
    target: float = MISSING  # adaptive: the KL to hold, nats per answer (sum over its tokens), > 0
    horizon: float = MISSING  # adaptive: answers over which beta may change by a fifth, > 0
    final_coef: float = MISSING  # linear: beta at the last rollout, >= 0
    estimator: KlEstimator = MISSING  # of the penalty; the logged objective/kl is always k1
    place: KlPlace = MISSING  # where the penalty goes


@dataclass
class RewardSource:
    """One part of the score: a reward model or a python function. Users add sources by name, so all has a value here."""

    path: Optional[str] = (
        None  # reward model: run, directory or hub id; null (and no function) = `ppo.reward`, or the derived run
    )
    function: Optional[str] = (
        None  # "module:name" of f(turns, answer) -> float; the module is looked for where the command is run, too
    )
    weight: float = 1.0  # in the sum of all sources; 0 = only measured and logged


@dataclass
class Ptx:
    coef: float = (
        MISSING  # weight of the language-model loss, mean over its tokens in nats, >= 0; 0 = off
    )
    max_tokens: int = MISSING  # of a text; the rest of it is left out


@dataclass
class Sampled:
    """How answers are sampled where nothing is learnt from them."""

    temperature: float = MISSING  # of the answers in evaluations, > 0
    top_p: float = MISSING  # sample from the likeliest tokens that together have this probability, in (0, 1]; 1 = all
    top_k: int = MISSING  # sample from so many of the likeliest tokens; 0 = all


@dataclass
class Evaluation(Sampled):
    # what a run keeps, not what it learns: a finished run is returned as it is; fresh=true makes it anew
    every: Optional[int] = (
        not_hashed()
    )  # rollouts between evaluations on held-out prompts; null = before and after training only
    best_by: BestBy = (
        not_hashed()
    )  # model_best/ is the policy of the evaluation where this was highest


@dataclass
class DsChat:
    """What DeepSpeed-Chat does differently, as switches for comparison only; `ppo=dschat` turns them all on. docs/ppo.md, section 5."""

    greedy: bool = False  # answers are the likeliest tokens, not samples
    pad_is_eos: bool = False  # masks guessed from ids: EOS counts as padding, so it is never learnt
    dropout: float = 0.0  # probability, in actor and critic while they train, in [0, 1)
    train_mode_logp: bool = False  # old log-probabilities and values with that dropout on
    micro_batch_means: bool = False  # losses are the mean of the micro-batches' means: deploy.micro_batch then changes results


@dataclass
class Online(Optim):
    """What PPO, RLOO and GRPO share; lr, schedule and so on are the actor's."""

    batch_size: int = MISSING  # prompts per rollout, over all processes
    responses_per_prompt: int = MISSING  # answers sampled to each prompt: RLOO and GRPO compare them with each other, so at least 2
    prompt_epochs: int = MISSING  # passes over the prompts; decides the number of rollouts
    max_steps: Optional[int] = MISSING  # stop after so many rollouts; null = no limit
    epochs: int = MISSING  # passes over each rollout
    minibatches: int = MISSING  # optimizer steps per pass
    target_kl: Optional[float] = (
        MISSING  # no further pass once policy/approxkl of one is above this, nats per token; null = never
    )
    kl: Kl = MISSING
    rewards: dict[str, RewardSource] = MISSING  # parts of the score, by a name of your choice
    normalize_score: bool = MISSING  # reward models in units of their standard deviation over SFT answers, with mean 0; else raw
    missing_eos_penalty: float = (
        MISSING  # subtracted from the score of an answer without EOS, score units, >= 0
    )
    length_penalty: float = (
        MISSING  # subtracted from the score for each token of the answer, score units, >= 0
    )
    scale_score: bool = MISSING  # divide scores by their running standard deviation
    score_clip: Optional[float] = MISSING  # then limit them to +- this, > 0; null = no limit
    clip: float = (
        MISSING  # the ratio pi / pi_old counts down to 1 - clip, in (0, 1) or more for no limit
    )
    clip_high: float = MISSING  # and up to 1 + clip_high, > 0
    loss_over: LossOver = MISSING  # what the losses of actor and critic are means over
    entropy_coef: float = MISSING  # weight of the entropy bonus, score units per nat, >= 0
    ptx: Ptx = MISSING
    ema: Optional[float] = (
        MISSING  # decay per optimizer step of the policy's moving average (model_ema/), in (0, 1); null = none
    )
    evaluation: Evaluation = MISSING
    actor: Optional[str] = (
        MISSING  # trained policy (run, directory, hub id) in place of the SFT run derived from the config
    )
    reward: Optional[str] = MISSING  # trained reward model, likewise


@dataclass
class Ppo(Online):
    critic_optim: Optim = (
        MISSING  # the critic's optimizer; lr, schedule and so on above are the actor's
    )
    critic_warmup: int = MISSING  # first rollouts, in which only the critic learns
    whiten_rewards: bool = MISSING  # divide the tokens' rewards by their standard deviation over the rollout; the mean stays
    gamma: float = MISSING  # discount per token, in [0, 1]
    lam: float = MISSING  # GAE lambda, in [0, 1]
    whiten_advantages: bool = (
        MISSING  # to mean 0 and variance 1 over all tokens of the rollout, of all processes
    )
    value_clip: Optional[float] = (
        MISSING  # value clip around the old value, score units, > 0; null = none
    )
    dschat: DsChat = field(default_factory=DsChat)


@dataclass
class Rloo(Online):
    """The advantage of an answer is its reward minus the mean of those of the other answers to its prompt."""


@dataclass
class Grpo(Online):
    """The advantage of an answer is its reward minus the mean of those of all answers to its prompt."""

    normalize_std: bool = (
        MISSING  # and divided by their standard deviation; Dr. GRPO: false, with loss_over=constant
    )


@dataclass
class Dpo(Optim):
    epochs: int = MISSING  # passes over the pairs
    batch_size: int = MISSING  # pairs per optimizer step, over all processes
    beta: float = MISSING  # how far from the reference, per nat: larger is nearer, > 0
    loss: DpoLoss = MISSING  # what of the two answers' margin is minimised
    label_smoothing: float = (
        MISSING  # assumed share of labels that are wrong, in [0, 0.5); only with loss=sigmoid
    )
    max_steps: Optional[int] = MISSING  # stop after so many optimizer steps; null = no limit
    eval_every: Optional[int] = (
        not_hashed()
    )  # optimizer steps between evaluations on held-out prompts; null = before and after only
    actor: Optional[str] = (
        MISSING  # trained policy (run, directory, hub id) in place of the SFT run derived from the config
    )


@dataclass
class Eval(Sampled):
    policies: list[str] = (
        MISSING  # base, the name of a stage (sft, ppo, ...), or a run, directory or hub id; side by side, in this order
    )
    against: Optional[str] = (
        MISSING  # that one of them which the others are compared with: win rate, KL; null = with none
    )
    rewards: dict[str, RewardSource] = (
        MISSING  # what scores answers, as in ppo.rewards; weights do not matter
    )
    normalize_score: bool = MISSING  # as ppo.normalize_score
    judge: Optional[str] = (
        MISSING  # eval/win_rate is by this source, or by `gold`; null = by gold where it is known, else the first source
    )
    decoding: Decoding = MISSING  # how the answers are made
    beams: int = MISSING  # with decoding=beam, >= 2
    prompts: list[str] = (
        MISSING  # fixed prompts that are answered besides the held-out ones: en, zh, ja, or a file with one per line
    )
    best_of: int = MISSING  # answers to each prompt for the best-of-n curve, of the policy `against`; 0 = no curve
    best_of_prompts: int = MISSING  # held-out prompts for it, at most


@dataclass
class Rollout:
    engine: RolloutEngine = (
        not_hashed()
    )  # what samples: the same answers from the same random numbers
    max_new_tokens: int = MISSING  # sampled tokens per answer, at most
    temperature: float = (
        MISSING  # divides the logits of policy, old policy and reference alike, > 0
    )
    top_p: float = (
        MISSING  # must be 1 in training; in evaluations ppo.evaluation.top_p, in chat --top-p
    )
    top_k: int = MISSING  # must be 0 in training, likewise
    log_answers: int = (
        not_hashed()
    )  # answers of each rollout written to rollouts.jsonl, token by token; -1 = all


@dataclass
class Offload:
    optimizer: bool = not_hashed()  # optimizer states in host memory; needs zero_stage >= 1
    parameters: bool = not_hashed()  # weights of trained models in host memory; needs zero_stage=3
    frozen: bool = (
        not_hashed()
    )  # weights of reference and reward model in host memory while they are not used


@dataclass
class Deploy:
    device: Device = not_hashed()  # cpu or gpu (NVIDIA)
    gpus: int = not_hashed()  # processes per node: one per GPU, on CPU too
    nodes: int = not_hashed()  # machines
    hostfile: Optional[str] = (
        not_hashed()
    )  # DeepSpeed's: lines "host slots=N"; this command then starts the workers on all nodes
    node_rank: Optional[int] = (
        not_hashed()
    )  # number of this node; the same command is then started on each of them (SLURM)
    master: Optional[str] = not_hashed()  # "host:port" of node 0, where the nodes meet
    gpu_memory_gb: float = (
        not_hashed()
    )  # of one GPU, GiB; on CPU of one process: what plan=true compares with
    threads: Optional[int] = not_hashed()  # CPU threads per process; null = cores / processes
    zero_stage: int = (
        not_hashed()
    )  # what DeepSpeed partitions: 0 nothing, 1 optimizer states, 2 + gradients, 3 + weights
    precision: Precision = MISSING  # of weights and computation; it does change results
    micro_batch: int = not_hashed()  # sequences (RM, DPO: pairs) of full length per process and forward in training, more of shorter ones
    eval_micro_batch: int = (
        not_hashed()
    )  # sequences per process and forward without gradients, and per generation batch
    activation_checkpointing: bool = (
        not_hashed()
    )  # compute activations again in the backward pass: less memory, a third slower
    offload: Offload = not_hashed()
    gather_for_rollout: Optional[bool] = (
        not_hashed()
    )  # ZeRO-3: whole weights while sampling; null = where the plan says they fit
    overlap_comm: bool = not_hashed()  # reduce gradients while the backward pass goes on
    bucket_mb: float = not_hashed()  # gradients and weights travel in messages of this size, MiB


@dataclass
class Checkpoint:
    every_steps: Optional[int] = (
        not_hashed()
    )  # optimizer steps (PPO: rollouts) between checkpoints, > 0; null = by time only
    every_minutes: Optional[float] = (
        not_hashed()
    )  # minutes between checkpoints, > 0; null = by steps only
    keep: int = not_hashed()  # the newest so many, > 0; older ones are deleted
    keep_optimizer: bool = (
        not_hashed()
    )  # a finished run keeps its last checkpoint, optimizer states included; else its models only


@dataclass
class Wandb:
    mode: WandbMode = (
        not_hashed()
    )  # auto: online if there is a key and the server answers, else offline
    project: str = not_hashed()  # where the runs appear
    entity: Optional[str] = not_hashed()  # user or team; null = your default one
    tags: list[str] = not_hashed()  # besides actor, deployment and data
    notes: Optional[str] = not_hashed()  # a sentence about the run


@dataclass
class Config:
    stage: StageChoice = not_hashed()
    pipeline: str = (
        not_hashed()
    )  # how stage=pipeline ends, and what stage=eval looks at: ppo, rloo, grpo or dpo
    actor: Model = MISSING
    reward: Model = MISSING
    data: Data = MISSING
    sft: Sft = MISSING
    rm: Rm = MISSING
    ppo: Ppo = MISSING
    rloo: Rloo = MISSING
    grpo: Grpo = MISSING
    dpo: Dpo = MISSING
    eval: Eval = MISSING
    rollout: Rollout = MISSING
    deploy: Deploy = MISSING
    checkpoint: Checkpoint = not_hashed()
    wandb: Wandb = not_hashed()
    seed: int = MISSING  # initialisation, order, sampling
    deterministic: bool = not_hashed()  # on GPUs: kernels that add in a fixed order, where there are any, slower; on CPU it is so anyway
    exp: str = not_hashed()  # label of the experiment: W&B group, folder of a sweep
    root: str = not_hashed()  # where outputs/ and multirun/ are made
    plan: bool = (
        not_hashed()
    )  # print memory, steps and tokens, and end; exit code 2 when it does not fit
    fresh: bool = not_hashed()  # move a run that exists aside and start it anew
    inputs: dict[str, str] = (
        not_hashed()
    )  # filled in by train.py: directories or hub ids of the trained models a stage stands on

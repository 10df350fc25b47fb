"""The configuration nodes of the stages: hyper-parameters of SFT, reward model, DPO, online RL,
evaluation and sampling. Values live in conf/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from rlhf.config.choices import (
    Advantage,
    BestBy,
    CorrectionMode,
    Decoding,
    DpoLoss,
    Importance,
    KlAppliedTo,
    KlController,
    KlEstimator,
    LossAggregation,
    Normalize,
    OnError,
    PolicyLoss,
    RmLoss,
    RolloutEngine,
    Schedule,
    TrainOn,
)
from rlhf.config.field import key, placement
from rlhf.config.limits import (
    MOST_BATCH,
    MOST_EPOCHS,
    MOST_SAMPLES,
    MOST_SECONDS,
    MOST_TOKENS,
)


@dataclass(kw_only=True)
class Optim:
    lr: float = key("peak learning rate", above=0)
    schedule: Schedule = key("after the warm-up; linear and cosine end at final_lr")
    warmup_ratio: float = key(
        "linear warm-up over this share of the optimizer steps (online RL: rollouts)",
        at_least=0,
        at_most=1,
    )
    warmup_steps: Optional[int] = key("warm-up in steps; null: by warmup_ratio", at_least=0)
    final_lr: float = key("at the last step, as a share of lr", at_least=0, at_most=1)
    weight_decay: float = key("decoupled; not on biases and norms", at_least=0)
    betas: list[float] = key("Adam's two decay rates", at_least=0, below=1)
    adam_eps: float = key("added to Adam's denominator", above=0)
    grad_clip: float = key("maximum global gradient norm", above=0)


@dataclass(kw_only=True)
class Sft(Optim):
    epochs: int = key("passes over the demonstrations", above=0, at_most=MOST_EPOCHS)
    batch_size: int = key(
        "demonstrations per optimizer step, over all processes", above=0, at_most=MOST_BATCH
    )
    train_on: TrainOn = key("the tokens in the loss: the last answer, all answers, or everything")
    max_steps: Optional[int] = key("stop after N optimizer steps; null: no limit", above=0)


@dataclass(kw_only=True)
class Rm(Optim):
    epochs: int = key("passes over the pairs", above=0, at_most=MOST_EPOCHS)
    batch_size: int = key(
        "pairs per optimizer step, over all processes", above=0, at_most=MOST_BATCH
    )
    loss: RmLoss = key("what is compared of two answers")
    max_steps: Optional[int] = key("stop after N optimizer steps; null: no limit", above=0)


@dataclass(kw_only=True)
class Dpo(Optim):
    epochs: int = key("passes over the pairs", above=0, at_most=MOST_EPOCHS)
    batch_size: int = key(
        "pairs per optimizer step, over all processes", above=0, at_most=MOST_BATCH
    )
    beta: float = key("strength of the pull to the reference, per nat", above=0)
    loss: DpoLoss = key("loss of the margin between the two answers")
    label_smoothing: float = key(
        "assumed share of wrong labels; only with dpo.loss=sigmoid", at_least=0, below=0.5
    )
    max_steps: Optional[int] = key("stop after N optimizer steps; null: no limit", above=0)
    eval_every: Optional[int] = placement(
        "optimizer steps between evaluations; null: before and after training only", above=0
    )
    actor: Optional[str] = key("trained policy (run, directory, hub id) instead of the SFT run")


@dataclass(kw_only=True)
class Kl:
    coef: float = key("KL coefficient at the first rollout, score units per nat", at_least=0)
    controller: KlController = key("how the coefficient changes")
    target: float = key("adaptive: KL to hold, nats per response (sum over its tokens)", above=0)
    horizon: float = key("adaptive: responses over which it may change by a fifth", above=0)
    final_coef: float = key("linear: coefficient at the last rollout", at_least=0)
    estimator: KlEstimator = key("of the penalty; the logged objective/kl is always k1")
    applied_to: KlAppliedTo = key("whether the penalty is part of the reward or of the loss")


@dataclass(kw_only=True)
class Judge:
    endpoint: str = key("OpenAI-compatible server, http://HOST:PORT/v1")
    model: str = key("its name there")
    rubric: str = key("text file with {prompt}, {completion} and, if needed, {ground_truth}")
    pair_rubric: Optional[str] = key(
        "text file with {prompt}, {first} and {second} by which stage=eval compares two responses, "
        "and verdicts [[A]], [[B]], [[C]]; null: built in",
        default=None,
    )
    api_key_env: Optional[str] = key(
        "name of the environment variable with the key; null: none", default=None
    )
    max_score: float = key(
        "highest grade of the rubric, which is a reward of 1", above=0, default=10.0
    )
    max_tokens: Optional[int] = key(
        "of a reply; null: the server decides", above=0, at_most=MOST_TOKENS, default=None
    )
    concurrency: int = placement(
        "largest number of requests at the same time", above=0, at_most=1_000, default=8
    )
    cache: Optional[str] = placement(
        "folder of the replies; null: rlhf/judge in the user's cache folder", default=None
    )


@dataclass(kw_only=True)
class RewardSource:
    path: Optional[str] = key(
        "reward model (run, directory, hub id); null with none of the others: rl.reward, or the rm "
        "run",
        default=None,
    )
    function: Optional[str] = key(
        '"module:name" or "FILE.py:name" of f(prompts, completions, **columns) -> list[float | '
        "None] (docs/rewards.md); modules are also looked for in the current directory",
        default=None,
    )
    url: Optional[str] = key(
        "server that scores responses, by OpenRLHF's remote reward protocol", default=None
    )
    judge: Optional[Judge] = key("language model that grades responses", default=None)
    kwargs: dict[str, Any] = key("further arguments of the function, by name", factory=dict)
    timeout: float = placement(
        "seconds that a call of the function may take", above=0, at_most=MOST_SECONDS, default=60.0
    )
    on_error: OnError = key(
        "what an error of the function does: stop the run, or leave its responses without a score",
        default=OnError.stop,
    )
    weight: float = key(
        "in the sum of all sources; 0: only measured and logged",
        at_least=-1e6,
        at_most=1e6,
        default=1.0,
    )


@dataclass(kw_only=True)
class Ptx:
    coef: float = key(
        "weight of the language-model loss, mean over tokens in nats; 0: off", at_least=0
    )
    max_tokens: int = key("tokens per text; the rest is dropped", above=0, at_most=MOST_TOKENS)


@dataclass(kw_only=True)
class EvalSampling:
    """How responses are sampled where nothing is trained on them."""

    temperature: float = key("of the responses in evaluations", above=0)
    top_p: float = key(
        "sample from the likeliest tokens of this total probability; 1: all", above=0, at_most=1
    )
    top_k: int = key("sample from the k likeliest tokens; 0: all", at_least=0)


@dataclass(kw_only=True)
class Evaluation(EvalSampling):
    every: Optional[int] = placement(
        "rollouts between evaluations; null: before and after training only", above=0
    )
    best_by: BestBy = placement(
        "model_best/ is the policy of the evaluation where this was highest"
    )


@dataclass(kw_only=True)
class Critic(Optim):
    """Only rl.advantage=gae has a critic."""

    warmup_rollouts: int = key("first rollouts, in which only the critic is trained", at_least=0)
    value_clip: Optional[float] = key(
        "clip of the value around its old value, score units; null: none", above=0
    )


@dataclass(kw_only=True)
class DsChat:
    """Design choices of DeepSpeed-Chat, for comparison only: rl=dschat. docs/ppo.md, section 5."""

    greedy: bool = key("responses are the likeliest tokens, not samples")
    pad_is_eos: bool = key(
        "masks guessed from ids: EOS counts as padding, so it is never in the loss"
    )


@dataclass(kw_only=True)
class ImportanceCorrection:
    mode: Optional[CorrectionMode] = key(
        "what the ratio pi / pi of the sampler is taken over; null: token with "
        "rollout.engine=continuous and vllm, none with native and hf, which compute pi"
    )
    cap: float = key("the ratio counts up to this", at_least=1)


@dataclass(kw_only=True)
class Rl(Optim):
    """Online RL; lr, schedule and so on are the actor's. A file in conf/rl is a preset."""

    name: str = key("name of the preset; also of its stage and its runs", hashed=False)
    variant_of: Optional[str] = key(
        "stage that may also run this preset (stage=ppo rl=dschat); null: only its own",
        hashed=False,
    )
    advantage: Advantage = key("how advantages are estimated")
    normalize: Normalize = key("how advantages are normalised")
    policy_loss: PolicyLoss = key("surrogate objective")
    importance: Importance = key("what the ratio pi / pi_old is taken over")
    batch_size: int = key(
        "responses per rollout, over all processes; a multiple of responses_per_prompt",
        above=0,
        at_most=MOST_BATCH,
    )
    responses_per_prompt: int = key("responses sampled per prompt", above=0, at_most=MOST_SAMPLES)
    dynamic_sampling: Optional[int] = key(
        "groups whose rewards are all equal are replaced by responses to the next prompts; the "
        "prompts of a rollout are drawn N times at most; null: off",
        at_least=2,
        at_most=1_000,
    )
    prompt_epochs: int = key(
        "passes over the prompts; decides the number of rollouts", above=0, at_most=MOST_EPOCHS
    )
    max_steps: Optional[int] = key("stop after N rollouts; null: no limit", above=0)
    epochs: int = key("passes over each rollout", above=0, at_most=MOST_EPOCHS)
    minibatches: int = key("optimizer steps per pass", above=0, at_most=MOST_BATCH)
    target_kl: Optional[float] = key(
        "no further pass once policy/approxkl is above this, nats per token; null: never", above=0
    )
    kl: Kl = key("penalty for leaving the reference policy")
    rewards: dict[str, Optional[RewardSource]] = key(
        "parts of the score, by a name of your choice; null removes one"
    )
    normalize_score: bool = key(
        "reward models in units of their standard deviation over held-out demonstrations, mean 0; "
        "else raw"
    )
    missing_eos_penalty: float = key(
        "subtracted from the score of a response without EOS, score units", at_least=0
    )
    length_penalty: float = key("subtracted from the score per response token", at_least=0)
    overlong_penalty: Optional[int] = key(
        "soft length penalty: over the last N tokens before rollout.max_new_tokens the score falls "
        "by up to 1; null: off",
        above=0,
    )
    mask_truncated: bool = key(
        "responses without EOS are not in the loss; they still count for the others' advantages"
    )
    scale_score: bool = key("divide scores by their running standard deviation")
    score_clip: Optional[float] = key("then limit them to +- this; null: no limit", above=0)
    clip_low: float = key("the ratio counts down to 1 - clip_low; 1 or more: no limit", above=0)
    clip_high: float = key("the ratio counts up to 1 + clip_high", above=0)
    dual_clip: Optional[float] = key(
        "a negative advantage counts up to this ratio; policy_loss=clip only; null: no limit",
        above=1,
    )
    importance_correction: ImportanceCorrection = key(
        "weights of the policy loss for what sampler and training compute differently"
    )
    loss_aggregation: LossAggregation = key("what the losses of actor and critic are means over")
    entropy_coef: float = key("weight of the entropy bonus, score units per nat", at_least=0)
    gamma: float = key("discount per token; gae and return only", at_least=0, at_most=1)
    gae_lambda: float = key("lambda of GAE; gae only", at_least=0, at_most=1)
    whiten_rewards: bool = key(
        "divide token rewards by their standard deviation over the rollout; gae and return only"
    )
    critic: Critic = key("the critic's optimizer and loss; gae only")
    ptx: Ptx = key("pretraining loss (InstructGPT's PPO-ptx)")
    ema: Optional[float] = key(
        "decay per optimizer step of the policy's moving average (model_ema/); null: none",
        above=0,
        below=1,
    )
    evaluation: Evaluation = key(
        "evaluations while training; they change no policy, so they are not part of its identity"
    )
    dschat: DsChat = key("switches of DeepSpeed-Chat")
    actor: Optional[str] = key("trained policy (run, directory, hub id) instead of the SFT run")
    reward: Optional[str] = key(
        "trained reward model (run, directory, hub id) instead of the rm run"
    )


@dataclass(kw_only=True)
class Eval(EvalSampling):
    policies: list[str] = key("base, names of stages (sft, ppo, ...), runs, directories or hub ids")
    against: Optional[str] = key(
        "policy that the others are compared with: win rate, KL; null: none"
    )
    rewards: dict[str, Optional[RewardSource]] = key(
        "what scores responses, as in rl.rewards; weights do not matter"
    )
    normalize_score: bool = key("as rl.normalize_score")
    judge: Optional[str] = key(
        "eval/win_rate is by this source, or by gold; null: gold where known, else the first source"
    )
    samples: int = key(
        "responses per held-out prompt; with functions in eval.rewards pass@k and maj@k up to this",
        above=0,
        at_most=MOST_SAMPLES,
    )
    by: list[str] = key("columns of the rows; pass rates are also given for each of their values")
    save_responses: Optional[str] = placement(
        "file (JSON lines) for all responses with their prompts and scores; null: none"
    )
    decoding: Decoding = key("how responses are generated")
    beams: int = key("number of beams with eval.decoding=beam", at_least=2, at_most=1_000)
    prompts: list[str] = key(
        "fixed prompts answered besides the held-out ones: en, zh, ja, or a file with one per line"
    )
    best_of: int = key(
        "responses per prompt for the best-of-n curve of `against`; 0: no curve",
        at_least=0,
        at_most=MOST_SAMPLES,
    )
    best_of_prompts: int = key("held-out prompts for that curve, at most", above=0)


@dataclass(kw_only=True)
class Vllm:
    url: Optional[str] = placement("a server that runs, http://HOST:PORT; null: `command`")
    command: Optional[str] = placement(
        'what starts a server on this machine, as ".venv-vllm/bin/vllm serve", with options that '
        "are added to ours; null: `url`"
    )
    weights_dir: Optional[str] = placement(
        "folder that the run writes weights to and the server reads; null: /dev/shm, or where that "
        "is too small the run directory"
    )


@dataclass(kw_only=True)
class Rollout:
    engine: RolloutEngine = key(
        "what samples; native and hf: the same responses from the same random numbers"
    )
    vllm: Vllm = placement("the server of engine=vllm")
    max_new_tokens: int = key("sampled tokens per response, at most", above=0, at_most=MOST_TOKENS)
    temperature: float = key(
        "divides the logits of policy, old policy and reference alike", above=0
    )
    top_p: float = key("1 in training; for evaluations rl.evaluation.top_p, in chat --top-p")
    top_k: int = key("0 in training; for evaluations rl.evaluation.top_k, in chat --top-k")
    log_responses: int = placement(
        "responses per rollout written to rollouts.jsonl, token by token; -1: all", at_least=-1
    )

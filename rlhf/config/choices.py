"""The values that a key may have where it is a choice."""

from __future__ import annotations

from enum import Enum


class Device(Enum):
    cpu = "cpu"
    gpu = "gpu"  # NVIDIA


class Precision(Enum):
    fp32 = "fp32"
    bf16 = "bf16"  # weights and computation; fp32 master weights in the optimizer
    fp16 = "fp16"  # likewise, with loss scaling; not for online RL
    autocast = "autocast"  # fp32 weights, bf16 computation where torch's autocast allows it


class RolloutEngine(Enum):
    """What samples the responses. The first two sample the same ones, up to rounding."""

    native = "native"  # rlhf/sampling/sampler.py
    hf = "hf"  # transformers' generate, slower
    continuous = "continuous"  # transformers' continuous batching, with random numbers of its own
    vllm = "vllm"  # a server, in online RL; elsewhere native

    @property
    def is_foreign(self) -> bool:
        """Whether it computes log pi otherwise than our forward pass, so that it is measured."""
        return self in (RolloutEngine.continuous, RolloutEngine.vllm)


class CorrectionMode(Enum):
    """What the weight pi / pi_sampler of a sampled token is taken over."""

    token = "token"
    sequence = "sequence"  # all tokens of its response
    none = "none"


class Format(Enum):
    """How a row of a source becomes a prompt and answers: rlhf/data/formats."""

    sandbox = "sandbox"  # a built-in world, as arithmetic
    arithmetic = "arithmetic"
    prompt_chosen_rejected = "prompt_chosen_rejected"  # without `rejected` for SFT only
    chosen_rejected = "chosen_rejected"  # two dialogues that differ in the last answer
    scored_answers = "scored_answers"  # a prompt and two answers with a score each
    ranked = "ranked"  # a prompt and several responses with ranks or scores
    instruction = "instruction"  # instruction, optional input, output; for SFT only
    messages = "messages"  # a conversation whose last turn is the answer; for SFT only
    prompts = "prompts"  # prompts without answers, for online RL only
    text = "text"  # plain text, for the pretraining loss of online RL


WORLDS = (Format.sandbox, Format.arithmetic)  # built in: data that code makes, without files


class Template(Enum):
    """How turns are written as text: rlhf/data/template.py."""

    hh = "hh"  # "\\n\\nHuman: ...\\n\\nAssistant: ..."
    chatml = "chatml"  # <|im_start|>role ... <|im_end|>
    llama3 = "llama3"  # <|start_header_id|>role<|end_header_id|> ... <|eot_id|>
    tokenizer = "tokenizer"  # the model's own chat template
    none = "none"  # no roles: the prompt's text and then the answer's, as they are


class TrainOn(Enum):
    """Which tokens of a conversation are in the loss of SFT."""

    last = "last"  # the last answer
    all = "all"  # every answer: each is a demonstration, with the turns before it as its prompt
    everything = "everything"  # the last answer and its prompt


class BadRow(Enum):
    skip = "skip"  # drop it, count it, show the first
    refuse = "refuse"  # stop with one line that names it


class OnError(Enum):
    """What an error of a reward function does."""

    stop = "stop"  # the run ends with one line: function, row, response
    skip = "skip"  # these responses have no score of this source; their share is logged


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


# How advantages are estimated: rlhf/rl/advantages.py. (`return` is a keyword, so no class body.)
Advantage = Enum(
    "Advantage",
    [
        "gae",  # per token, against the critic's values (PPO)
        "leave_one_out",  # reward minus the mean of the other responses (RLOO)
        "group",  # reward minus the mean of all responses to the prompt (GRPO)
        "return",  # discounted rewards from the token on, without a baseline (REINFORCE)
    ],
)
# What each of them reads; every member is in one of the last two (tests/unit/test_advantages.py).
NEEDS_CRITIC = {Advantage["gae"]}
PER_TOKEN = {Advantage["gae"], Advantage["return"]}  # rl.gamma and rl.whiten_rewards
COMPARES_RESPONSES = {Advantage["leave_one_out"], Advantage["group"]}  # several to each prompt


class Normalize(Enum):
    """How advantages are normalised."""

    none = "none"
    group = "group"  # the standard deviation of the rewards of the prompt's responses (GRPO)
    batch = "batch"  # mean 0 and variance 1 over all tokens of the rollout (PPO)


class PolicyLoss(Enum):
    """The surrogate objective: rlhf/rl/losses.py."""

    clip = "clip"  # PPO's clipped ratio
    cispo = "cispo"  # clipped ratio as a constant weight of the log-probability (MiniMax-M1)


class Importance(Enum):
    """What the ratio pi / pi_old is taken over."""

    token = "token"
    sequence = "sequence"  # the geometric mean over the response's tokens (GSPO)


class KlController(Enum):
    """How the KL coefficient changes from rollout to rollout: rlhf/rl/controllers.py."""

    fixed = "fixed"  # it does not
    adaptive = "adaptive"  # towards a target KL
    linear = "linear"  # from kl.coef at the first rollout to kl.final_coef at the last


class KlEstimator(Enum):
    """Per-token estimate of KL(policy || reference) from one sample: losses.kl_estimate."""

    k1 = "k1"  # log pi - log ref: unbiased
    k2 = "k2"  # half its square: biased, never negative; its gradient is that of the KL
    k3 = "k3"  # e^-d - 1 + d: unbiased, never negative; its gradient is not that of the KL


class KlAppliedTo(Enum):
    reward = "reward"  # subtracted from the reward of each token (Ziegler 2019)
    loss = "loss"  # added to the policy loss (GRPO)


class LossAggregation(Enum):
    """What a loss is a mean over: losses.token_weights."""

    token = "token"  # all response tokens of the optimizer step alike
    sequence = "sequence"  # all responses alike: a token of a short one weighs more
    constant = "constant"  # responses x rollout.max_new_tokens: no bias by length (Dr. GRPO)


class RmLoss(Enum):
    sequence = "sequence"  # one score per answer, at its last token (InstructGPT)
    per_token = "per_token"  # mean over tokens, scores read before the EOS (DeepSpeed-Chat)


class DpoLoss(Enum):
    sigmoid = "sigmoid"  # DPO; with label_smoothing conservative DPO
    ipo = "ipo"  # squared distance of the margin from 1 / (2 beta)


class Decoding(Enum):
    sample = "sample"
    greedy = "greedy"
    beam = "beam"


class BestBy(Enum):
    """What an evaluation ranks policies by; higher is better."""

    score = "score"  # of the reward model
    objective = "objective"  # score - kl.coef x KL
    gold = "gold"  # the ground truth, where it is known


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"

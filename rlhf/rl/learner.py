"""What online RL trains, and the rows of one of its optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from rlhf.config.schema import Config
from rlhf.data import tokenized
from rlhf.rl.controllers import MovingAverage
from rlhf.rl.experience import Experience, Models
from rlhf.rl.guards import Guards
from rlhf.rl.losses import token_weights
from rlhf.rl.rewards import Rewards
from rlhf.training.schedule import learning_rate
from rlhf.training.stats import Stats

Texts = tokenized.Rows[tuple[list[int], list[int]]]


@dataclass
class Learner:
    """What is trained, and what stays the same from rollout to rollout."""

    cfg: Config
    models: Models
    guards: Guards
    rollouts: int  # of the run
    ema: MovingAverage | None = None
    texts: Texts | None = None  # of the pretraining loss

    @property
    def rewards(self) -> Rewards:
        """What scores responses."""
        assert self.models.rewards is not None  # is missing only where nothing is trained with it
        return self.models.rewards

    def actor_trains(self, rollout: int) -> bool:
        """Whether the actor is trained at a rollout, or only the critic (warm-up)."""
        return rollout >= self.warmup

    @property
    def steps_critic_first(self) -> bool:
        """Whether the critic's step also gives the values (`step_critic_first`).

        On a GPU it does not: the host would estimate returns while the GPU waits.
        """
        rl, critic = self.cfg.rl, self.models.critic
        on_cpu = critic is not None and critic.device.type == "cpu"
        return on_cpu and rl.epochs == rl.minibatches == 1

    @property
    def warmup(self) -> int:
        """First rollouts, in which only the critic is trained."""
        return self.cfg.rl.critic.warmup_rollouts if self.models.critic is not None else 0

    def actor_lr(self, rollout: int) -> float:
        """The actor's learning rate; its warm-up begins when the actor begins."""
        return learning_rate(rollout - self.warmup, self.rollouts - self.warmup, self.cfg.rl)

    def critic_lr(self, rollout: int) -> float:
        """The critic's learning rate."""
        return learning_rate(rollout, self.rollouts, self.cfg.rl.critic)


@dataclass
class Minibatch:
    """The rows of one optimizer step of actor and critic, and what the step leaves behind."""

    experience: Experience  # of the whole rollout
    rollout: int  # number of the rollout, from 0
    epoch: int  # number of the pass over the rollout, from 0
    number: int  # of the minibatch in its pass, from 0
    rows: list[int]  # row numbers of the experience, those of all ranks
    micro_batches: list[Sequence[int]]  # the same, of this rank only
    tokens: float  # tokens in the loss, over all ranks
    sequences: int  # responses with such tokens, over all ranks
    kl_coef: float  # weight of the KL in the loss; 0 where it is part of the reward
    # rewards and mask of all tokens, where the critic's step measures values (`step_critic_first`)
    scored: tuple[Tensor, Tensor] | None = None
    # filled in by the step
    stats: Stats = field(default_factory=Stats)  # of this rank
    sums: dict[str, float] = field(default_factory=dict)  # of all ranks
    actor_grad_norm: float | None = None  # before clipping
    critic_grad_norm: float | None = None
    critic_is_done: bool = False  # its step is made

    @property
    def is_first(self) -> bool:
        """Whether the policy is still the one that sampled."""
        return self.epoch == 0 and self.number == 0

    def weights(self, part: Experience, cfg: Config) -> Tensor:
        """Weight of each token of a micro-batch in the step's loss, (b, r)."""
        aggregation, longest = cfg.rl.loss_aggregation, cfg.rollout.max_new_tokens
        return token_weights(part.loss_mask, aggregation, self.tokens, self.sequences, longest)

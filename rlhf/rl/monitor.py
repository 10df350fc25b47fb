"""Warn about training that goes wrong although the arithmetic is right: once per kind and run.

The warnings of a run are kept in warnings.json, and its table repeats them at the end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

Metrics = dict[str, float]
WINDOW = 8  # rollouts that a mean or median is taken over


class Monitor:
    """Checks the metrics of each rollout, and warns through alert(title, text)."""

    def __init__(self, alert: Callable[[str, str], None]):
        self.alert = alert
        self.rows: list[Metrics] = []
        self.alerted: dict[str, str] = {}  # title: the whole line, with the rollout

    def check(self, metrics: Metrics) -> bool:
        """Add the metrics of a rollout, and warn of what is new. Returns: whether anything is."""
        self.rows.append(metrics)
        before = len(self.alerted)
        for title, text in warnings_of(self.rows):
            if title not in self.alerted:
                self.alerted[title] = f"{title} at rollout {len(self.rows)}: {text}"
                self.alert(title, text)
        return len(self.alerted) > before

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "alerted": self.alerted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.alerted = list(state["rows"]), dict(state["alerted"])


def warnings_of(rows: Sequence[Metrics]) -> list[tuple[str, str]]:
    """What is wrong at the end of a run's metrics so far: title, and what to do about it.

    KL blow-up         above 1 nat per token, or above 5 nats per response and 4 x the median of the
                       8 rollouts before
    entropy collapse   policy/entropy_avg below a tenth of its first value
    critic broken      val/explained_variance below 0 in each of the last 10 rollouts
    all responses truncated   no response of a rollout has an EOS
    over-optimization  over the last 16 rollouts (means of halves) the score rose by more than 0.1,
                       and score - kl_coef x KL fell by more than 0.1
    equal rewards      in more than half of the groups of the last 8 rollouts
    responses without a score   more than half of a rollout
    """
    checks = (
        kl_blow_up,
        entropy_collapse,
        broken_critic,
        truncation,
        over_optimization,
        equal_rewards,
        missing_scores,
    )
    return [warning for check in checks if (warning := check(rows))]


def kl_blow_up(rows: Sequence[Metrics]) -> tuple[str, str] | None:
    now, before = rows[-1], [row["objective/kl"] for row in rows[-WINDOW - 1 : -1]]
    kl, usual = now["objective/kl"], statistics.median(before) if before else 0.0
    jumped = len(before) == WINDOW and kl > max(5.0, 4 * usual)
    if now["objective/kl_per_token"] <= 1 and not jumped:
        return None
    text = f"objective/kl is {kl:.1f} nats per response, before {usual:.1f}"
    return "KL blow-up", f"{text}: raise rl.kl.coef or lower rl.lr"


def entropy_collapse(rows: Sequence[Metrics]) -> tuple[str, str] | None:
    entropies = [row["policy/entropy_avg"] for row in rows if "policy/entropy_avg" in row]
    if not entropies or entropies[-1] >= 0.1 * entropies[0]:
        return None
    text = f"policy/entropy_avg fell from {entropies[0]:.3g} to {entropies[-1]:.3g} nats per token"
    text += ", responses to a prompt hardly differ. Fine where each prompt has one right answer and"
    fix = "raise rl.kl.coef or rl.entropy_coef, or lower rl.lr"
    return "entropy collapse", f"{text} the score is high; else {fix}"


def broken_critic(rows: Sequence[Metrics]) -> tuple[str, str] | None:
    last = [row.get("val/explained_variance", math.nan) for row in rows[-10:]]
    if len(last) < 10 or not all(value < 0 for value in last):  # NaN says nothing
        return None
    text = "val/explained_variance was below 0 in the last 10 rollouts"
    fix = "raise rl.critic.lr or rl.critic.value_clip, or set rl.critic.warmup_rollouts"
    return "critic broken", f"{text}, the critic is worse than a constant: {fix}"


def truncation(rows: Sequence[Metrics]) -> tuple[str, str] | None:
    if rows[-1]["objective/eos_rate"] > 0:
        return None
    fix = "raise rollout.max_new_tokens, rl.missing_eos_penalty or rl.length_penalty"
    return "all responses truncated", f"no response of the rollout has an EOS: {fix}"


def over_optimization(rows: Sequence[Metrics]) -> tuple[str, str] | None:
    if len(rows) < 2 * WINDOW:
        return None
    coef = rows[-1]["objective/kl_coef"]
    halves = (rows[-2 * WINDOW : -WINDOW], rows[-WINDOW:])
    before, now = (statistics.fmean(row["objective/scores"] for row in half) for half in halves)
    kl_before, kl_now = (statistics.fmean(row["objective/kl"] for row in half) for half in halves)
    objective_before, objective_now = before - coef * kl_before, now - coef * kl_now
    if now <= before + 0.1 or objective_now >= objective_before - 0.1:
        return None
    text = f"score {before:.2f} to {now:.2f}, but score - kl_coef x KL "
    text += f"{objective_before:.2f} to {objective_now:.2f}"
    return "over-optimization", f"{text}: raise rl.kl.coef, lower rl.lr, or stop here"


def equal_rewards(rows: Sequence[Metrics]) -> tuple[str, str] | None:
    shares = [row.get("frac_reward_zero_std", 0.0) for row in rows[-WINDOW:]]
    if len(shares) < WINDOW or statistics.fmean(shares) <= 0.5:
        return None
    text = f"in {statistics.fmean(shares):.0%} of the groups of the last {WINDOW} rollouts all "
    text += "responses have the same reward, so nothing is learned from them. Where nearly all are "
    text += "right, stop here or give harder prompts; else set or raise rl.dynamic_sampling, raise "
    return "equal rewards", f"{text}rl.responses_per_prompt or give easier prompts"


def missing_scores(rows: Sequence[Metrics]) -> tuple[str, str] | None:
    share = rows[-1].get("objective/unscored_frac", 0.0)
    if share <= 0.5:
        return None
    text = f"{share:.0%} of the responses of a rollout have no score, and are not in the loss"
    fix = "look at the reward functions, or add a source of rl.rewards that applies to them"
    return "responses without a score", f"{text}: {fix}"

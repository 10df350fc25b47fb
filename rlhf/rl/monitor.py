"""Warn about training that goes wrong although the arithmetic is right: `Monitor`, once per kind and run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any


class Monitor:
    """Looks at the metrics of each rollout and says what goes wrong, each kind once per run, through alert(title, text). `stage` names the
    keys that mend it."""

    def __init__(self, alert: Callable[[str, str], None], stage: str = "ppo"):
        self.alert, self.stage = alert, stage
        self.rows: list[dict[str, float]] = []
        self.said: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "said": sorted(self.said)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.said = list(state["rows"]), set(state["said"])

    def look(self, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)
        for title, text in warnings_of(self.rows, self.stage):
            if title not in self.said:
                self.said.add(title)
                self.alert(title, text)


def warnings_of(rows: Sequence[dict[str, float]], stage: str = "ppo") -> list[tuple[str, str]]:
    """What is wrong at the end of a run's metrics so far: pairs of a title and what to do about it.

    KL blow-up           above 1 nat per token, or above 4 x the median of the 8 rollouts before and above 5 nats per answer
    entropy collapse     policy/entropy_avg below a tenth of its first value
    critic               val/explained_variance below 0 in each of the last 10 rollouts
    truncation           no answer of a rollout ended
    over-optimisation    over the last 16 rollouts the score rose by more than 0.1, and score - beta KL fell by more than 0.1 (means of
                         halves)
    """
    now, found = rows[-1], []
    kl, before = now["objective/kl"], [row["objective/kl"] for row in rows[-9:-1]]
    usual = statistics.median(before) if before else 0.0
    if now["objective/kl_per_token"] > 1 or (len(before) == 8 and kl > max(5.0, 4 * usual)):
        found.append(
            (
                "KL blow-up",
                f"objective/kl is {kl:.1f} nats per answer, before {usual:.1f}: raise {stage}.kl.coef or lower {stage}.lr",
            )
        )
    entropies = [row["policy/entropy_avg"] for row in rows if "policy/entropy_avg" in row]
    if entropies and entropies[-1] < 0.1 * entropies[0]:
        text = f"policy/entropy_avg fell from {entropies[0]:.3g} to {entropies[-1]:.3g} nats per token: answers repeat themselves; "
        found.append(
            (
                "entropy collapse",
                text + f"raise {stage}.kl.coef or {stage}.entropy_coef, or lower {stage}.lr",
            )
        )
    if len(rows) >= 10 and all(row.get("val/explained_variance", 0) < 0 for row in rows[-10:]):
        text = "val/explained_variance was below 0 in the last 10 rollouts: the critic is worse than a constant; "
        found.append(
            (
                "critic broken",
                text + "raise ppo.critic_optim.lr or ppo.value_clip, or give it ppo.critic_warmup",
            )
        )
    if now["objective/eos_rate"] == 0:
        text = "no answer of the rollout ended: raise rollout.max_new_tokens, or the penalties "
        text += f"{stage}.missing_eos_penalty, {stage}.length_penalty"
        found.append(("all answers truncated", text))
    if len(rows) >= 16:
        halves, beta = (rows[-16:-8], rows[-8:]), now["objective/kl_coef"]
        score, score_now = (
            statistics.fmean(row["objective/scores"] for row in half) for half in halves
        )
        kl, kl_now = (statistics.fmean(row["objective/kl"] for row in half) for half in halves)
        objective, objective_now = score - beta * kl, score_now - beta * kl_now
        if score_now > score + 0.1 and objective_now < objective - 0.1:
            text = f"score {score:.2f} to {score_now:.2f}, but score - beta KL {objective:.2f} to {objective_now:.2f}: "
            found.append(
                (
                    "over-optimisation",
                    text + f"raise {stage}.kl.coef, lower {stage}.lr, or stop here",
                )
            )
    return found

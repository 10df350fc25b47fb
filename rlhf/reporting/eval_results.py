"""The results of stage=eval, as eval.json holds them. No torch here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.runs.directory import write_json
from rlhf.runs.stage_views import EVALUATED_METRICS


@dataclass(frozen=True)
class WinRate:
    """How often a policy's response is better than another policy's to the same prompt."""

    policy: str
    against: str
    judge: str  # a source of the score, or gold
    rate: float  # share of the prompts; a tie counts half
    low: float  # 95 % Wilson interval
    high: float
    wins: int
    ties: int
    prompts: int

    @property
    def losses(self) -> int:
        return self.prompts - self.wins - self.ties


@dataclass(frozen=True)
class PassRate:
    """How often a policy's responses to held-out prompts pass a verifier."""

    policy: str
    verifier: str  # a function among the sources of the score
    measure: Literal["pass", "maj"]
    k: int  # pass: one of k responses passes; maj: the majority answer of k responses does
    rate: float  # mean over the prompts
    low: float  # 95 % Wilson interval
    high: float
    prompts: int
    column: str = ""  # of the rows: only prompts with this value of it
    value: str = ""

    @property
    def metric(self) -> str:
        """Its name among the metrics, after the policy's."""
        name = f"{self.measure}@{self.k}/{self.verifier}"
        return f"{name}/{self.column}/{self.value}" if self.column else name


@dataclass(frozen=True)
class CalibrationBin:
    """Held-out pairs on which a reward model has about the same confidence in its choice."""

    low: float  # edges of the bin
    high: float
    pairs: int
    probability: float  # mean confidence: the probability that the model gives its choice
    accuracy: float


@dataclass(frozen=True)
class ScorerResults:
    """A reward model on held-out pairs."""

    pairs: int
    accuracy: float
    ece: float  # expected calibration error
    reliability: list[CalibrationBin]
    by_source: dict[str, tuple[int, float]]  # number of pairs and accuracy
    by_length: dict[str, tuple[int, float]]
    margins: list[float]  # raw score of chosen minus that of rejected
    accuracy_gold: float | None = None  # share of pairs in the order of the gold reward

    @property
    def confidence(self) -> float:
        """Mean confidence over all pairs."""
        return sum(bin.pairs * bin.probability for bin in self.reliability) / self.pairs


@dataclass(frozen=True)
class BestOfPoint:
    """What choosing the best of n responses by the score reaches."""

    n: int
    score: float
    kl: float  # upper bound of the KL to the policy, nats
    gold: float | None = None


@dataclass
class EvalResults:
    """Everything that stage=eval measures."""

    policies: dict[str, dict[str, float]]  # metrics of each policy
    against: str | None  # the policy that the others are compared with
    judge: str | None  # of the win rate in the summary
    win_rates: list[WinRate]
    best_of: list[BestOfPoint]
    best_of_policy: str | None
    reward_models: dict[str, ScorerResults]
    decoding: str
    where: dict[str, str]  # path or hub id of each policy
    answers: list[dict[str, Any]] = field(default_factory=list)  # rows of `side_by_side`
    fixed: list[dict[str, Any]] = field(default_factory=list)  # the same for fixed prompts
    samples: int = 1  # responses of each policy to each prompt; win rates compare the first ones
    pass_rates: list[PassRate] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """Write eval.json."""
        write_json(file, dataclasses.asdict(self))


def read_results(file: Path) -> EvalResults:
    """Read eval.json."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    content["win_rates"] = [WinRate(**rate) for rate in content["win_rates"]]
    content["pass_rates"] = [PassRate(**rate) for rate in content.get("pass_rates", [])]
    content["best_of"] = [BestOfPoint(**point) for point in content["best_of"]]
    for name, scorer in content["reward_models"].items():
        scorer["reliability"] = [CalibrationBin(**bin) for bin in scorer["reliability"]]
        content["reward_models"][name] = ScorerResults(**scorer)
    return EvalResults(**content)


def policy_cells(policies: dict[str, dict[str, float]]) -> tuple[list[str], list[list[str]]]:
    """The policies' metrics as text: the header, and a row for each policy."""
    shown = [
        column
        for column in EVALUATED_METRICS
        if any(column.metric in metrics for metrics in policies.values())
    ]
    rows = [
        [
            name,
            *(
                format(metrics[column.metric], column.format) if column.metric in metrics else ""
                for column in shown
            ),
        ]
        for name, metrics in policies.items()
    ]
    return ["policy", *(column.label for column in shown)], rows


def win_rate_cells(rates: Sequence[WinRate]) -> tuple[list[str], list[list[str]]]:
    """The win rates as text: the header, and a row for each policy and judge."""
    header = ["policy (judge)", "win rate", "95 % interval", "wins", "ties", "losses", "prompts"]
    rows = [
        [
            f"{rate.policy} ({rate.judge})",
            f"{rate.rate:.1%}",
            f"{rate.low:.1%} to {rate.high:.1%}",
            *(f"{count:,}" for count in (rate.wins, rate.ties, rate.losses, rate.prompts)),
        ]
        for rate in rates
    ]
    return header, rows


def pass_rate_cells(rates: Sequence[PassRate]) -> tuple[list[str], list[list[str]]]:
    """The pass rates on all prompts as text: the header, and a row for each policy and verifier."""
    every = [rate for rate in rates if not rate.column]
    shown = {(rate.measure, rate.k): f"{rate.measure}@{rate.k}" for rate in every}
    rows = []
    for name in dict.fromkeys((rate.policy, rate.verifier) for rate in every):
        found = {(r.measure, r.k): r for r in every if (r.policy, r.verifier) == name}
        first = found["pass", 1]
        rest = [f"{found[one].rate:.1%}" if one in found else "" for one in list(shown)[1:]]
        rows.append(
            [
                f"{name[0]} ({name[1]})",
                f"{first.prompts:,}",
                f"{first.rate:.1%}",
                f"{first.low:.1%} to {first.high:.1%}",
                *rest,
            ]
        )
    header = ["policy (verifier)", "prompts", "pass@1", "95 % interval"]
    return [*header, *list(shown.values())[1:]], rows


def pass_rate_by_column_cells(
    rates: Sequence[PassRate],
) -> tuple[list[str], list[list[str]]]:
    """pass@1 by a column of the rows as text: the header, and a row for each value."""
    header = ["policy (verifier)", "prompts with", "prompts", "pass@1", "95 % interval"]
    rows = [
        [
            f"{rate.policy} ({rate.verifier})",
            f"{rate.column} = {rate.value}",
            f"{rate.prompts:,}",
            f"{rate.rate:.1%}",
            f"{rate.low:.1%} to {rate.high:.1%}",
        ]
        for rate in rates
        if rate.column
    ]
    return header, rows


def scorer_cells(scorers: dict[str, ScorerResults]) -> tuple[list[str], list[list[str]]]:
    """The reward models as text: the header, and a row for each."""
    header = ["reward model", "pairs", "accuracy", "agreement with gold"]
    header += ["mean confidence", "calibration error (ECE)"]
    rows = [
        [
            name,
            f"{scorer.pairs:,}",
            f"{scorer.accuracy:.1%}",
            "" if scorer.accuracy_gold is None else f"{scorer.accuracy_gold:.1%}",
            f"{scorer.confidence:.1%}",
            f"{scorer.ece:.3f}",
        ]
        for name, scorer in scorers.items()
    ]
    return header, rows


def side_by_side(
    responses: dict[str, list[dict[str, Any]]], order: Sequence[str]
) -> list[dict[str, Any]]:
    """A row per prompt: `prompt`, `columns` where the prompt has any, and under `answers` each
    policy's response with its scores.

    Args: responses: a row per prompt of each policy, as evaluate_policy gives them.
    """
    of_policies = {name: responses[name] for name in order if name in responses}
    rows = []
    for of_prompt in zip(*of_policies.values()):
        of_all = {key: of_prompt[0][key] for key in ("prompt", "columns") if key in of_prompt[0]}
        answers = {
            name: {key: value for key, value in row.items() if key not in of_all}
            for name, row in zip(of_policies, of_prompt)
        }
        rows.append({**of_all, "answers": answers})
    return rows


def summary_metrics(results: EvalResults) -> dict[str, float]:
    """The metrics of summary.json: of each policy, the pass rates, win rates, reward models.

    eval/win_rate by the main judge and eval/pass@1 by the first verifier are those of the last
    policy that is not the one that others are compared with.
    """
    metrics = {
        f"eval/{name}/{key}": value
        for name, policy in results.policies.items()
        for key, value in policy.items()
    }
    metrics |= {f"eval/{rate.policy}/{rate.metric}": rate.rate for rate in results.pass_rates}
    others = [name for name in results.policies if name != results.against]
    last = next(reversed(others or list(results.policies)), None)
    if first_of_last := [rate.rate for rate in results.pass_rates if rate.policy == last]:
        metrics["eval/pass@1"] = first_of_last[0]
    for rate in results.win_rates:
        metrics[f"eval/{rate.policy}/win_rate/{rate.judge}"] = rate.rate
        if (rate.policy, rate.judge) == (last, results.judge):
            metrics |= main_win_rate(rate)
    for name, scorer in results.reward_models.items():
        prefix = "eval" if len(results.reward_models) == 1 else f"eval/{name}"
        metrics |= {f"{prefix}/accuracy": scorer.accuracy, f"{prefix}/ece": scorer.ece}
    return metrics


def main_win_rate(rate: WinRate) -> dict[str, float]:
    """A win rate and its interval, under the names that runs are compared by."""
    return {
        "eval/win_rate": rate.rate,
        "eval/win_rate_low": rate.low,
        "eval/win_rate_high": rate.high,
    }


def sample_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `side_by_side` for samples.jsonl: a response in place of a policy's `answers`."""
    return [
        {key: value for key, value in row.items() if key != "answers"}
        | {name: response["completion"] for name, response in row["answers"].items()}
        for row in rows
    ]

"""What each stage shows: result rows, curves, metrics compared, W&B panels, text of the model card.

One StageView per stage, and one for all online RL presets. Used by runs/ and reporting/; no torch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple


@dataclass(frozen=True)
class ResultRow:
    """A row of the table that a command prints at its end. Metrics are named without "eval/"."""

    label: str
    metric: str  # at the end of the run
    format: str = "z.2f"
    before: str = ""  # the same at its start; "" = not measured there


@dataclass(frozen=True)
class Panel:
    """A chart of metrics over the steps of a run."""

    title: str
    metrics: tuple[str, ...]  # as in metrics.jsonl; * stands for any name
    unit: str = ""  # of the y axis
    without: str = ""  # a metric that * does not stand for
    at_least: int = 1  # it is drawn where so many of its metrics are logged

    def drawn(self, logged: Collection[str]) -> list[str]:
        """Its metrics among those that are logged, in order."""
        others = sorted(set(logged) - {self.without})
        found = [name for one in self.metrics for name in others if fnmatchcase(name, one)]
        return found if len(found) >= self.at_least else []


class PrimaryMetric(NamedTuple):
    """A metric that decides which run is the best."""

    name: str
    label: str  # in a sentence
    higher_is_better: bool = True
    # beginnings of the settings that decide what it means: runs that differ there are not ranked
    defined_by: tuple[str, ...] = ()
    caution: str = ""  # a sentence: why the best by this metric need not be the best


@dataclass(frozen=True)
class StageView:
    """What the runs of a stage show."""

    kind: str  # runs of one kind are compared with each other: sft, rm, policy, eval
    rows: tuple[ResultRow, ...] = ()
    panels: tuple[Panel, ...] = ()  # of curves.png and of the report page
    metrics: tuple[str, ...] = ()  # final metrics in a comparison; the same for all of one kind
    primary: tuple[PrimaryMetric, ...] = ()  # the first one that all compared runs have
    step_name: str = "step"  # what a row of metrics.jsonl is about; "" = there are none
    dashboard_section: str = ""  # of the W&B workspace; stages may share one
    dashboard: tuple[Panel, ...] = ()  # of that section; none = `panels`
    card: str = ""  # first sentence of the model card; {algorithm} is the stage's name

    @property
    def x_axis(self) -> str:
        """The name of the x axis of curves."""
        return "optimizer step" if self.step_name == "step" else self.step_name

    def card_text(self, stage: str) -> str:
        """The sentence that says what a model trained by `stage` is."""
        return self.card.format(algorithm=stage.upper())


POLICY_METRICS = (
    "eval/score",
    "eval/gold",
    "eval/kl",
    "eval/length",
    "eval/eos_rate",
    "eval/accuracy",
)
POLICY_PRIMARY = (
    PrimaryMetric("eval/gold", "gold reward"),
    PrimaryMetric(
        "eval/score",
        "score",
        defined_by=("reward.", "rm.", "rl.reward", "rl.normalize_score"),
        caution="The score is a proxy: what the reward says, which a policy learns to exploit "
        "(reward hacking). No gold reward is known here; read the responses, or compare with "
        "stage=eval.",
    ),
    PrimaryMetric(
        "eval/accuracy",
        "held-out accuracy",
        caution="The accuracy is a proxy: how well a policy ranks recorded answers, not how good "
        "its responses are; compare those with stage=eval.",
    ),
)
POLICY_ROWS = (
    ResultRow("gold reward", "gold", before="gold_before"),
    ResultRow("  best possible", "gold_best"),
    ResultRow("KL, nats per response", "kl"),
    ResultRow("length, tokens", "length", "z.1f", before="length_before"),
    ResultRow("finished responses (EOS rate)", "eos_rate", "z.1%", before="eos_rate_before"),
)

SFT = StageView(
    kind="sft",
    rows=(
        ResultRow("held-out perplexity", "perplexity", "z.3f"),
        ResultRow("finished responses (EOS rate)", "eos_rate", "z.1%"),
        ResultRow("gold reward", "gold"),
    ),
    panels=(
        Panel("Loss", ("loss",), "nats per token"),
        Panel("Accuracy", ("mean_token_accuracy",), "share of tokens"),
    ),
    metrics=("eval/perplexity", "eval/gold", "eval/eos_rate"),
    primary=(
        PrimaryMetric(
            "eval/perplexity",
            "held-out perplexity",
            higher_is_better=False,
            # tokens of another tokenizer, or other ones
            defined_by=("actor.path", "data.template", "data.max_"),
        ),
    ),
    dashboard_section="SFT and reward model",
    card="A policy: a causal language model, fine-tuned on demonstrations.",
)
RM = StageView(
    kind="rm",
    rows=(
        ResultRow("held-out accuracy", "accuracy", "z.1%"),
        ResultRow("  upper bound (noisy labels)", "accuracy_bayes", "z.1%"),
        ResultRow("  accuracy against gold", "accuracy_gold", "z.1%"),
        ResultRow("  prompt-sensitivity accuracy", "accuracy_prompt", "z.1%"),
    ),
    panels=(
        Panel("Loss", ("loss",), "nats per pair"),
        Panel("Accuracy", ("accuracy",), "share of pairs"),
        Panel("Margin", ("margin",), "raw score"),
    ),
    metrics=("eval/accuracy", "eval/accuracy_gold"),
    primary=(PrimaryMetric("eval/accuracy", "held-out accuracy"),),
    dashboard_section="SFT and reward model",
    card="A reward model: it scores complete responses. Scores are raw; `score_mean` and "
    "`score_std` in config.json are their unit.",
)
ONLINE_RL = StageView(  # whatever preset: ppo, grpo, a user's own
    kind="policy",
    rows=(ResultRow("score", "score", before="score_before"), *POLICY_ROWS),
    panels=(
        Panel("Score", ("objective/scores",), "weighted sum of rl.rewards"),
        Panel("Each reward", ("reward/*/mean",), without="reward/gold/mean", at_least=2),
        Panel("Gold reward", ("reward/gold/mean",), "points"),
        Panel("KL to the SFT policy", ("objective/kl",), "nats per response"),
        Panel("Length", ("tokens/response_mean",), "tokens per response"),
        Panel("Entropy", ("policy/entropy_avg",), "nats per token"),
        Panel("Clip fraction", ("policy/clipfrac_avg",), "share of tokens"),
        Panel("Policy loss", ("loss/policy_avg",)),
        Panel("Value loss", ("loss/value_avg",)),
        Panel("Explained variance of the critic", ("val/explained_variance",), "1 = exact"),
    ),
    metrics=POLICY_METRICS,
    primary=POLICY_PRIMARY,
    step_name="rollout",
    dashboard_section="Online RL",
    dashboard=(
        Panel("Score and gold reward", ("objective/scores", "reward/gold/mean")),
        Panel("KL to the SFT policy, nats per response", ("objective/kl",)),
        Panel("score - beta KL", ("objective/rlhf_reward",)),
        Panel("Policy and value loss", ("loss/policy_avg", "loss/value_avg")),
        Panel("Length, tokens", ("tokens/response_mean",)),
        Panel("Explained variance of the critic", ("val/explained_variance",)),
    ),
    card="A policy: a causal language model, trained by {algorithm} against a reward, "
    "kept near its SFT policy.",
)
DPO = StageView(
    kind="policy",
    rows=(ResultRow("held-out accuracy", "accuracy", "z.1%"), *POLICY_ROWS),
    panels=(
        Panel("Loss", ("loss",), "nats per pair"),
        Panel("Accuracy", ("rewards/accuracies",), "share of pairs"),
        Panel("Implicit reward", ("rewards/chosen", "rewards/rejected"), "beta x log-ratio, nats"),
    ),
    metrics=POLICY_METRICS,
    primary=POLICY_PRIMARY,
    dashboard_section="DPO",
    card="A policy: a causal language model, trained by DPO on preference pairs, "
    "kept near its SFT policy.",
)
SAMPLING = ("eval.decoding", "eval.temperature", "eval.top_", "eval.beams")
EVAL = StageView(
    kind="eval",  # no rows: nothing is trained, and its tables are printed as they are on the page
    step_name="",
    metrics=(
        "eval/win_rate",
        "eval/win_rate_low",
        "eval/win_rate_high",
        "eval/pass@1",
        "eval/accuracy",
        "eval/ece",
    ),
    primary=(
        PrimaryMetric(
            "eval/win_rate",
            "win rate",
            defined_by=("reward.", "rm.", "eval.against", "eval.judge", "eval.rewards", *SAMPLING),
        ),
        PrimaryMetric("eval/pass@1", "pass@1", defined_by=("eval.rewards", *SAMPLING)),
        PrimaryMetric("eval/accuracy", "accuracy of the reward model"),
    ),
)
EVALUATED_METRICS = (  # of each policy that stage=eval measures
    ResultRow("perplexity", "perplexity", "z.3f"),
    ResultRow("score", "score", "z.3f"),
    ResultRow("gold reward", "gold", "z.3f"),
    ResultRow("KL (estimate), nats per response", "kl"),
    ResultRow("length, tokens", "length", "z.1f"),
    ResultRow("finished responses (EOS rate)", "eos_rate", "z.1%"),
    ResultRow("repetition", "repetition", "z.1%"),
)
INSPECT = StageView(kind="")  # makes a page about data, and no run to compare

VIEWS = {"sft": SFT, "rm": RM, "dpo": DPO, "eval": EVAL, "inspect": INSPECT}
KINDS = ("sft", "rm", "policy", "eval")  # in the order of the tables


def view_of(stage: str) -> StageView:
    """The view of a stage by its name. Every other name is that of an online RL preset."""
    return VIEWS.get(stage, ONLINE_RL)

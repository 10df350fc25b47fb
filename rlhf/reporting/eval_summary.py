"""What an evaluation shows, in sentences: which policy is best, how far a reward model is right."""

from __future__ import annotations

from rlhf.reporting.eval_results import EvalResults, PassRate, ScorerResults, WinRate

WORTH_TELLING = 0.05  # difference between two shares
MORE_PROMPTS = "More held-out prompts (data.eval_rows, data.eval_share, more data)"
CHANCE = 0.5  # win rate of two policies that are equally good; accuracy of guesses


def summarize(results: EvalResults) -> list[str]:
    """Sentences for the top of the page and of the terminal's tables."""
    lines = []
    rates = [rate for rate in results.win_rates if rate.judge == results.judge]
    if rates:
        lines.append(best_by_win_rate(rates, results))
    elif results.policies:
        lines.append(best_by_mean(results))
    lines += passing(results.pass_rates)
    lines += [trust(name, scorer, results) for name, scorer in results.reward_models.items()]
    return lines


def best_by_win_rate(rates: list[WinRate], results: EvalResults) -> str:
    """Which policy is best by the main judge, by how much, and whether it may be chance."""
    best = max(rates, key=lambda rate: rate.rate)
    judge, mean = name_of_judge(best.judge), means(best, results)
    wins = f"{best.policy} wins {best.rate:.1%} of {best.prompts:,} prompts against {best.against}"
    wins += f" (95 % interval {best.low:.1%} to {best.high:.1%}; a tie counts half{mean})"
    if best.low > CHANCE:
        meaning = "The interval is above 50 %, so the difference is more than chance"
        rivals = [f"{r.policy} ({r.rate:.1%})" for r in rates if r != best and r.high >= best.low]
        if rivals:
            meaning += f". The intervals of {', '.join(rivals)} overlap with it"
            return f"{best.policy} leads by {judge}, but is not clearly best: {wins}. {meaning}."
        return f"{best.policy} is best by {judge}: {wins}. {meaning}."
    if best.high < CHANCE:
        meaning = "The interval is below 50 %, so the difference is more than chance"
        closest = "; the closest one" if len(results.policies) > 2 else ""
        return f"{best.against} is best by {judge}{closest}: {wins}. {meaning}."
    if best.rate == CHANCE:
        return (
            f"No policy is best by {judge}; neither {best.policy} nor {best.against} leads: {wins}."
            f" {MORE_PROMPTS} may show a difference."
        )
    leads = best.policy if best.rate > CHANCE else best.against
    return (
        f"No policy is clearly best by {judge}; {leads} leads: {wins}. The interval contains 50 %,"
        f" so the difference may be chance. {MORE_PROMPTS} make it narrower."
    )


def means(best: WinRate, results: EvalResults) -> str:
    """The mean scores behind a win rate, in words; "" where they are not known."""
    metric = metric_of(best.judge, results)
    values = [results.policies[policy].get(metric) for policy in (best.policy, best.against)]
    if None in values:
        return ""
    label = "gold reward" if best.judge == "gold" else "score"
    return f"; mean {label} {values[0]:.2f} against {values[1]:.2f}"


def metric_of(judge: str, results: EvalResults) -> str:
    """The metric that is the mean of a judge's scores; "" where no policy has it."""
    known = known_metrics(results)
    is_only_source = not any(metric.startswith("score/") for metric in known)
    of_source = "score" if is_only_source else f"score/{judge}"
    metric = "gold" if judge == "gold" else of_source
    return metric if metric in known else ""


def known_metrics(results: EvalResults) -> set[str]:
    """The metrics that at least one policy has."""
    return {metric for metrics in results.policies.values() for metric in metrics}


def best_by_mean(results: EvalResults) -> str:
    """Which policy has the best mean, where the main judge has no win rates.

    The mean of the main judge; where no response has its score, the gold reward or the whole score.
    """
    judge, known = results.judge, known_metrics(results)
    of_judge = metric_of(judge, results) if judge else ""
    metric = next((name for name in (of_judge, "gold", "score") if name in known), "")
    if not metric:
        names = ", ".join(results.policies)
        if judge:
            return f"{names}: no response has a score, so no policy is best."
        return f"{names}: nothing judges the responses, so no policy is best: give eval.rewards."
    unknown = f"The judge {judge} scores no response. " if judge and not of_judge else ""
    label = "gold reward" if metric == "gold" else "score"
    label += f" of {judge}" if metric.startswith("score/") else ""
    values = {name: one[metric] for name, one in results.policies.items() if metric in one}
    best = max(values, key=lambda name: values[name])
    if len(values) == 1:
        has = "has one" if len(results.policies) > 1 else "is evaluated"
        return f"{unknown}{best} has a mean {label} of {values[best]:.2f}; no other policy {has}."
    others = ", ".join(f"{name} {value:.2f}" for name, value in values.items() if name != best)
    return (
        f"{unknown}{best} has the highest mean {label}, {values[best]:.2f} ({others}). "
        f"{why_no_win_rate(results)}: the difference may be chance."
    )


def why_no_win_rate(results: EvalResults) -> str:
    """Why the main judge has no win rate."""
    if results.against is None:
        return "Without eval.against there is no win rate and no interval"
    by = f" by {name_of_judge(results.judge)}" if results.judge else ""
    return f"No pair of responses could be compared{by}, so there is no win rate and no interval"


def passing(rates: list[PassRate]) -> list[str]:
    """A sentence for each verifier: the pass rates of the policies, the best one first."""
    first = [rate for rate in rates if (rate.measure, rate.k, rate.column) == ("pass", 1, "")]
    lines = []
    for verifier in dict.fromkeys(rate.verifier for rate in first):
        ranked = sorted(
            (rate for rate in first if rate.verifier == verifier), key=lambda rate: -rate.rate
        )
        best = ranked[0]
        line = f"{verifier}: {best.rate:.1%} of the responses of {best.policy} pass (95 % interval "
        line += f"{best.low:.1%} to {best.high:.1%})"
        if others := [f"{rate.policy} {rate.rate:.1%}" for rate in ranked[1:]]:
            line += f"; {', '.join(others)}"
        lines.append(f"{line}.")
    return lines


def trust(name: str, scorer: ScorerResults, results: EvalResults) -> str:
    """How far a reward model is right, on held-out pairs and about the policies."""
    model = "The reward model" if name == "model" else f"The reward model {name}"
    text = f"{model} has an accuracy of {scorer.accuracy:.1%} on {scorer.pairs:,}"
    text += " held-out pairs (chance: 50 %)"
    if scorer.accuracy_gold is not None:
        text += f" and agrees with the gold reward on {scorer.accuracy_gold:.1%} of them"
    text += f"; its mean confidence is {scorer.confidence:.1%}"
    gap = scorer.confidence - scorer.accuracy
    if abs(gap) >= WORTH_TELLING:
        text += f": it is {'overconfident' if gap > 0 else 'underconfident'}"
    rates = {(rate.policy, rate.judge): rate.rate for rate in results.win_rates}
    overrated = [
        f"{policy} {rates[policy, name]:.1%} (gold {rates[policy, 'gold']:.1%})"
        for policy in results.policies
        if {(policy, name), (policy, "gold")} <= rates.keys()
        and rates[policy, name] - rates[policy, "gold"] >= WORTH_TELLING
    ]
    if overrated:
        text += f". Its win rates are too high: {', '.join(overrated)}"
    return text + "."


def name_of_judge(judge: str) -> str:
    return "the gold reward" if judge == "gold" else f"the score of {judge}"

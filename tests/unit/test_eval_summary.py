"""The sentences at the top of an evaluation, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses

from rlhf.reporting.eval_page import page
from rlhf.reporting.eval_results import (
    CalibrationBin,
    EvalResults,
    PassRate,
    ScorerResults,
    WinRate,
    summary_metrics,
)
from rlhf.reporting.eval_summary import summarize
from rlhf.reporting.tables import print_evaluation


def rate(policy: str, wins: int, low: float, high: float, judge: str = "gold") -> WinRate:
    """Of 100 prompts, without ties."""
    return WinRate(policy, "sft", judge, wins / 100, low, high, wins, 0, 100)


def results(*rates: WinRate, **policies: dict[str, float]) -> EvalResults:
    return EvalResults(
        policies=policies,
        against="sft" if rates else None,
        judge="gold" if rates else None,
        win_rates=list(rates),
        best_of=[],
        best_of_policy=None,
        reward_models={},
        decoding="sample",
        where=dict.fromkeys(policies, "somewhere"),
    )


THREE = {"sft": {"gold": 1.0}, "ppo": {"gold": 2.5}, "dpo": {"gold": 1.5}}
# 300 pairs: mean confidence (100 x 0.6 + 200 x 0.9) / 300 = 0.8
SCORER = ScorerResults(
    pairs=300,
    accuracy=0.7,
    ece=0.1,
    reliability=[
        CalibrationBin(0.5, 0.75, 100, 0.6, 0.5),
        CalibrationBin(0.75, 1.0, 200, 0.9, 0.8),
    ],
    by_source={"mine": (300, 0.7)},
    by_length={"chosen longer": (300, 0.7)},
    margins=[1.0, -1.0],
    accuracy_gold=0.65,
)


def test_the_best_policy_with_its_interval() -> None:
    [line] = summarize(results(rate("dpo", 60, 0.5, 0.69), rate("ppo", 80, 0.71, 0.87), **THREE))
    assert line == (
        "ppo is best by the gold reward: ppo wins 80.0% of 100 prompts against sft (95 % interval "
        "71.0% to 87.0%; a tie counts half; mean gold reward 2.50 against 1.00). The interval is "
        "above 50 %, so the difference is more than chance."
    )


def test_of_policies_whose_intervals_overlap_none_is_the_best() -> None:
    rates = (rate("dpo", 75, 0.66, 0.82), rate("ppo", 80, 0.71, 0.87))
    [line] = summarize(results(*rates, **THREE))
    assert line.startswith("ppo leads by the gold reward, but is not clearly best: ppo wins 80.0%")
    assert line.endswith("more than chance. The intervals of dpo (75.0%) overlap with it.")


def test_what_may_be_chance_is_called_that() -> None:
    for wins, leader in ((55, "ppo"), (45, "sft")):
        [line] = summarize(results(rate("ppo", wins, 0.4, 0.6), **THREE))
        assert line.startswith(f"No policy is clearly best by the gold reward; {leader} leads: ppo")
        assert "The interval contains 50 %, so the difference may be chance" in line


def test_at_exactly_half_of_the_prompts_neither_policy_leads() -> None:
    [line] = summarize(results(rate("dpo", 40, 0.31, 0.5), rate("ppo", 50, 0.4, 0.6), **THREE))
    assert line == (
        "No policy is best by the gold reward; neither ppo nor sft leads: ppo wins 50.0% of 100 "
        "prompts against sft (95 % interval 40.0% to 60.0%; a tie counts half; mean gold reward "
        "2.50 against 1.00). More held-out prompts (data.eval_rows, data.eval_share, more data) "
        "may show a difference."
    )


def test_the_policy_that_the_others_are_compared_with_may_be_the_best() -> None:
    rates = (rate("dpo", 10, 0.05, 0.17), rate("ppo", 30, 0.22, 0.4))
    [line] = summarize(results(*rates, **THREE))
    assert line.startswith("sft is best by the gold reward; the closest one: ppo wins 30.0%")
    assert line.endswith("The interval is below 50 %, so the difference is more than chance.")


def test_without_a_win_rate_the_means_are_compared() -> None:
    [line] = summarize(results(**THREE))
    assert line == (
        "ppo has the highest mean gold reward, 2.50 (sft 1.00, dpo 1.50). Without eval.against "
        "there is no win rate and no interval: the difference may be chance."
    )
    [line] = summarize(results(ppo={"score": 0.5}))
    assert line == "ppo has a mean score of 0.50; no other policy is evaluated."
    [line] = summarize(results(ppo={"length": 5.0}))
    assert "nothing judges the responses" in line


def by(judge: str, against: str | None = None, **policies: dict[str, float]) -> EvalResults:
    """Results without a win rate."""
    return dataclasses.replace(results(**policies), judge=judge, against=against)


def test_the_means_are_those_of_the_judge() -> None:
    of_both = {
        "sft": {"gold": 1.0, "score": 0.5, "score/model": 0.1, "score/short": 0.9},
        "ppo": {"gold": 2.0, "score": 0.7, "score/model": 0.9, "score/short": 0.5},
    }
    for judge, start in {
        "gold": "ppo has the highest mean gold reward, 2.00 (sft 1.00). Without eval.against ",
        "model": "ppo has the highest mean score of model, 0.90 (sft 0.10). Without eval.against ",
        "short": "sft has the highest mean score of short, 0.90 (ppo 0.50). Without eval.against ",
    }.items():
        [line] = summarize(by(judge, **of_both))
        assert line.startswith(start)
    only = {"sft": {"gold": 1.0, "score": 0.5}, "ppo": {"gold": 2.0, "score": 0.3}}
    [line] = summarize(by("model", **only))
    assert line.startswith("sft has the highest mean score, 0.50 (ppo 0.30). Without ")


def test_why_there_is_no_win_rate_is_true() -> None:
    """The judge scores no response, or none to the same prompt of both policies."""
    scored = {"sft": {"score": 0.5, "score/model": 0.5}, "ppo": {"score": 0.7, "score/model": 0.7}}
    [line] = summarize(by("code", "sft", **scored))
    assert line == (
        "The judge code scores no response. ppo has the highest mean score, 0.70 (sft 0.50). No "
        "pair of responses could be compared by the score of code, so there is no win rate and no "
        "interval: the difference may be chance."
    )
    [line] = summarize(by("code", "sft", sft={"score": 0.5}, ppo={"score": 0.7}))
    assert line.startswith("ppo has the highest mean score, 0.70 (sft 0.50). No pair of responses")
    [line] = summarize(by("code", "sft", sft={"score": 0.5}, ppo={"length": 1.0}))
    assert line == "sft has a mean score of 0.50; no other policy has one."
    [line] = summarize(by("code", "sft", sft={"length": 1.0}, ppo={"length": 1.0}))
    assert line == "sft, ppo: no response has a score, so no policy is best."


def test_how_far_a_reward_model_is_right() -> None:
    rates = (rate("ppo", 80, 0.71, 0.87), rate("ppo", 90, 0.83, 0.94, "model"))
    both = dataclasses.replace(results(*rates, **THREE), reward_models={"model": SCORER})
    assert summarize(both)[1] == (
        "The reward model has an accuracy of 70.0% on 300 held-out pairs (chance: 50 %) and agrees "
        "with the gold reward on 65.0% of them; its mean confidence is 80.0%: it is overconfident. "
        "Its win rates are too high: ppo 90.0% (gold 80.0%)."
    )
    unknown = dataclasses.replace(SCORER, accuracy_gold=None, accuracy=0.8)
    alone = dataclasses.replace(results(), reward_models={"other": unknown})
    assert summarize(alone) == [
        "The reward model other has an accuracy of 80.0% on 300 held-out pairs (chance: 50 %); its"
        " mean confidence is 80.0%."
    ]


def test_page_and_terminal_say_the_same(capsys: object) -> None:
    rates = (rate("ppo", 80, 0.71, 0.87), rate("ppo", 90, 0.83, 0.94, "model"))
    both = dataclasses.replace(results(*rates, **THREE), reward_models={"model": SCORER})
    print_evaluation(both)
    printed = capsys.readouterr().out  # type: ignore[attr-defined]
    html = page(both, "Evaluation")
    for line in summarize(both):
        assert line in printed and line in html
    for word in ("win rate", "95 % interval", "ppo (gold)", "71.0% to 87.0%", "losses"):
        assert word in printed and word in html
    for word in ("accuracy", "agreement with gold", "mean confidence", "calibration error (ECE)"):
        assert word in printed and word in html
    assert "before" not in printed and 'name="viewport"' in html


def test_the_numbers_that_runs_are_compared_by_are_of_one_policy() -> None:
    """Also where the policy that others are compared with comes last."""
    of_eval = results(rate("ppo", 80, 0.71, 0.87), ppo={}, sft={})
    of_eval.pass_rates = [
        PassRate(policy, "right", "pass", 1, share, 0.0, 1.0, 100)
        for policy, share in (("ppo", 0.6), ("sft", 0.3))
    ]
    metrics = summary_metrics(of_eval)
    assert (metrics["eval/win_rate"], metrics["eval/pass@1"]) == (0.8, 0.6)
    of_eval.against = None
    assert summary_metrics(of_eval)["eval/pass@1"] == 0.3

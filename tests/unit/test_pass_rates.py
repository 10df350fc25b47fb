"""pass@k, maj@k and accuracy by column: against enumeration of all subsets, and by hand."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from typing import Any

import pytest
from formulas import SEEDS
from torch import Generator, randint

from rlhf.base.errors import UserError
from rlhf.data.records import Prompt, Turn
from rlhf.evaluation.pass_rates import check_columns, pass_rates
from rlhf.evaluation.statistics import majority_at_k, pass_at_k, vote, wilson_interval
from rlhf.reporting.eval_page import page
from rlhf.reporting.eval_results import EvalResults, PassRate, read_results, summary_metrics
from rlhf.reporting.eval_summary import summarize
from rlhf.reporting.tables import print_evaluation

# ------------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_equals_the_share_of_all_subsets_with_a_passing_response(samples: int) -> None:
    for passed in range(samples + 1):
        responses = [i < passed for i in range(samples)]
        for k in range(1, samples + 1):
            subsets = [any(subset) for subset in itertools.combinations(responses, k)]
            wanted = sum(subsets) / len(subsets)
            assert pass_at_k(samples, passed, k) == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25 and pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs contain the one that passes
    assert pass_at_k(10, 0, 5) == 0.0 and pass_at_k(10, 10, 5) == 1.0


def test_pass_at_k_of_very_many_samples_is_the_product_of_the_paper() -> None:
    """Chen 2021 computes 1 - prod(1 - k / i), as the binomials overflow floats."""
    samples, passed, k = 100_000, 30, 10_000
    product = 1.0
    for i in range(samples - passed + 1, samples + 1):
        product *= 1 - k / i
    assert pass_at_k(samples, passed, k) == pytest.approx(1 - product, rel=1e-9)


def test_the_majority_by_hand() -> None:
    assert vote(["7", "7", "8"], [True, True, False]) == 1.0
    assert vote(["7", "8", "8"], [True, False, False]) == 0.0
    assert vote(["7", "8"], [True, False]) == 0.5, "a tie of two answers"
    assert vote(["7", "8", "9", "7", "8", "9"], [True, False, False] * 2) == pytest.approx(1 / 3)
    assert vote(["7", None, None, None], [True] + [False] * 3) == 1.0, "no answer is no vote"
    assert vote([None, None], [False, False]) == 0.0
    assert vote(["7", "7"], [True, False]) == 0.5, "the same answer, in a form that does not pass"


def test_the_majority_of_k_is_the_mean_over_groups() -> None:
    answers = ["7", "7", "8", "8", "8", "7", "7"]
    passed = [answer == "7" for answer in answers]
    assert majority_at_k(answers, passed, 7) == 1.0
    assert majority_at_k(answers, passed, 3) == 0.5  # 778, 887; the last 7 is left out
    assert majority_at_k(answers, passed, 2) == pytest.approx((1 + 0 + 0.5) / 3)
    assert majority_at_k(answers, passed, 1) == pytest.approx(4 / 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_vote_equals_loops(seed: int) -> None:
    generator = Generator().manual_seed(seed)
    answers = [str(int(n)) for n in randint(0, 4, (9,), generator=generator)]
    right = str(seed % 4)
    best = max(answers.count(answer) for answer in answers)
    winners = {answer for answer in answers if answers.count(answer) == best}
    wanted = (right in winners) / len(winners)
    assert vote(answers, [answer == right for answer in answers]) == pytest.approx(wanted)


# ---------------------------------------------------------------------------- of the responses


def prompt(text: str, **columns: Any) -> Prompt:
    return Prompt([Turn("user", text)], json.dumps(columns) if columns else "")


def responses(*scored: tuple[str, float | None]) -> list[dict[str, Any]]:
    return [{"prompt": "", "completion": text, "score": score} for text, score in scored]


PROMPTS = [
    prompt("3 + 4", level="2 digits", n=10),
    prompt("3 + 5", level="2 digits", n=9),
    prompt("3 + 6", level="1 digit"),
]
ROWS = responses(
    *(("7", 1.0), ("so 7", 1.0), ("8", 0.0), ("7.", 2.0)),
    *(("9", 0.0), ("8", 0.9), ("9", 0.0), ("none", 0.0)),
    *(("9", None), ("9", None), ("9", None), ("9", None)),
)


def test_the_rates_of_four_responses_to_each_prompt_by_hand() -> None:
    rates = {r.metric: r for r in pass_rates("sft", PROMPTS, ROWS, ["number"], ["level", "n"])}
    # 3 of 4 and 0 of 4 pass; the last prompt has no score, so it does not count
    wanted = {
        "pass@1/number": 0.375,
        "pass@2/number": 0.5,
        "pass@4/number": 0.5,
        "maj@2/number": (1 + 0.5) / 2 / 2,  # 77: right; 87: a tie; the others are wrong
        "maj@4/number": 0.5,
        "pass@1/number/level/2 digits": 0.375,
        "pass@1/number/n/9": 0.0,
        "pass@1/number/n/10": 0.75,
    }
    assert {name: rate.rate for name, rate in rates.items()} == pytest.approx(wanted)
    assert list(rates)[-2:] == ["pass@1/number/n/9", "pass@1/number/n/10"], "numbers by their size"
    first = rates["pass@1/number"]
    assert first.prompts == 2 and (first.low, first.high) == wilson_interval(0.75, 2)


def test_a_response_that_a_verifier_does_not_apply_to_is_left_out() -> None:
    rows = responses(("7", 1.0), ("7", None), ("8", 0.0), ("8", 0.0))
    rates = pass_rates("sft", PROMPTS[:2], rows, ["number"])
    assert [(r.k, r.rate, r.prompts) for r in rates if r.measure == "pass"] == [
        (1, 0.5, 2),
        (2, 0.0, 1),
    ]


def test_one_response_to_each_prompt_has_an_accuracy_only() -> None:
    rates = pass_rates("sft", PROMPTS, ROWS[::4], ["number"])
    assert [(r.measure, r.k, r.rate, r.prompts) for r in rates] == [("pass", 1, 0.5, 2)]


def test_each_of_several_verifiers_has_its_own_scores() -> None:
    rows = [
        {"completion": "no number", "score": 1.5, "score/a": 1.0, "score/b": 0.5} for _ in range(4)
    ]
    rates = pass_rates("sft", PROMPTS[:2], rows, ["a", "b"])
    assert {(r.verifier, r.measure, r.k): r.rate for r in rates} == {
        ("a", "pass", 1): 1.0,
        ("a", "pass", 2): 1.0,
        ("b", "pass", 1): 0.0,
        ("b", "pass", 2): 0.0,
    }, "no majority where no response has a final answer"


def test_a_verifier_that_applies_to_nothing_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "rlhf"):
        assert pass_rates("sft", PROMPTS[2:], ROWS[8:], ["number"]) == []
    assert "sft: number applies to none of the responses: no pass rate" in caplog.text


@pytest.mark.parametrize(
    "columns, line",
    [
        (["difficulty"], "eval.by=[difficulty]: the rows of the held-out prompts have no such col"),
        (["level", "other"], "eval.by=[other]: the rows of the held-out prompts have no such"),
    ],
)
def test_an_unknown_column_is_named_with_those_that_there_are(
    columns: list[str], line: str
) -> None:
    with pytest.raises(UserError, match=re.escape(line)) as error:
        check_columns(PROMPTS, columns)
    assert str(error.value).endswith("they have level, n")


def test_a_column_must_divide_the_prompts_into_few_groups() -> None:
    check_columns(PROMPTS, ["level", "n"])
    many = [prompt(str(i), answer=i) for i in range(51)]
    with pytest.raises(UserError, match=re.escape("eval.by=[answer]: it has 51 values in 51 rows")):
        check_columns(many, ["answer"])
    with pytest.raises(UserError, match="they have none"):
        check_columns([prompt("a")], ["answer"])


# ------------------------------------------------------------------------------ where it is shown


def results(rates: list[PassRate], samples: int) -> EvalResults:
    return EvalResults(
        policies={"sft": {"score": 0.4}, "grpo": {"score": 0.8}},
        against=None,
        judge=None,
        win_rates=[],
        best_of=[],
        best_of_policy=None,
        reward_models={},
        decoding="sample",
        where={"sft": "a", "grpo": "b"},
        samples=samples,
        pass_rates=rates,
    )


def test_terminal_page_file_and_metrics_have_them_all(tmp_path: Any, capsys: Any) -> None:
    prompts = [prompt("3 + 4", level="<script>alert(1)</script>"), prompt("3 + 5", level="[b]x")]
    rates = [
        *pass_rates("sft", prompts, ROWS[:8], ["number"], ["level"]),
        *pass_rates("grpo", prompts, responses(*[("7", 1.0)] * 8), ["number"], ["level"]),
    ]
    shown = results(rates, 4)
    assert summarize(shown)[1] == (
        "number: 100.0% of the responses of grpo pass (95 % interval 34.2% to 100.0%); sft 37.5%."
    )
    print_evaluation(shown)
    printed, html = capsys.readouterr().out, page(shown, "Evaluation")
    for word in ("pass@1", "pass@4", "maj@4", "sft (number)", "37.5%", "[b]x", summarize(shown)[1]):
        assert word in printed and word in html, word
    assert "level = &lt;script&gt;" in html and "<script>alert(1)" not in html
    assert "pass@k: grpo (number)" in html and "4 responses to each held-out prompt" in html
    metrics = summary_metrics(shown)
    assert metrics["eval/pass@1"] == 1.0, "of the last policy"
    assert metrics["eval/grpo/pass@4/number"] == 1.0 and metrics["eval/sft/maj@4/number"] == 0.5
    shown.write(tmp_path / "eval.json")
    assert read_results(tmp_path / "eval.json") == shown
    assert "Verifiers" not in page(dataclasses.replace(shown, pass_rates=[]), "Evaluation")

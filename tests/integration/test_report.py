"""Runs compared: numbers by hand, and the page in a real browser where one is installed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats
from written_runs import HOSTILE, write_mixed, write_run, write_stage, write_sweep

from rlhf.reporting import eval_page, report_page, tables
from rlhf.reporting.comparison import (
    SeedGroup,
    compare_runs,
    confidence_half_width,
    differing_settings,
    format_mean,
    primary_metric,
    run_label,
    seed_groups,
)
from rlhf.reporting.conclusions import compare_best, conclusions, welch
from rlhf.reporting.eval_results import (
    BestOfPoint,
    CalibrationBin,
    EvalResults,
    ScorerResults,
    WinRate,
)
from rlhf.runs.finding import find_runs
from rlhf.runs.history import Run
from rlhf.runs.stage_views import PrimaryMetric, view_of


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


GOLD = PrimaryMetric("m", "gold reward")


def groups_of(values: dict[str, list[float]], **more: float) -> list[SeedGroup]:
    """Groups of finished runs with these values of the metric m, the best one first."""
    return [
        SeedGroup(
            name, [Run(Path(name), "ppo", "finished", metrics={"m": x, **more}) for x in some]
        )
        for name, some in values.items()
    ]


def test_means_and_intervals_by_hand() -> None:
    values = [3.0, 3.1, 2.9]
    assert confidence_half_width(values) == pytest.approx(
        4.302653 * 0.1 / math.sqrt(3), rel=1e-6
    )  # t of 2 degrees of freedom at 97.5 %
    assert (
        format_mean(values) == "3.000 ± 0.248"
        and format_mean([2.0]) == "2.000"
        and math.isnan(confidence_half_width([2.0]))
    )


def test_the_sentence_answers_which_by_how_much_and_whether_it_is_chance() -> None:
    # means 3 and 2.5, both variances 0.01, so t = 0.5 / sqrt(0.02 / 3) with 4 degrees of freedom
    error = math.sqrt(0.02 / 3)
    p, half = 2 * stats.t.sf(0.5 / error, 4), stats.t.ppf(0.975, 4) * error
    cells = groups_of({"a": [3.0, 3.1, 2.9], "b": [2.5, 2.4, 2.6], "c": [1.0]})
    assert compare_best(cells, GOLD) == (
        "Best of 3 settings by gold reward: a with 3.000 ± 0.248 (mean over 3 seeds), 0.500 higher "
        f"than b (95 % confidence interval of the difference: {0.5 - half:.3f} to "
        f"{0.5 + half:.3f}). Significant at 5 %: p = {p:.2g} (Welch's t-test over 3 and 3 seeds, "
        "not corrected for choosing the best of 3)."
    )
    # lower is better: the interval is that of how much lower
    low = compare_best(cells[1::-1], PrimaryMetric("m", "perplexity", higher_is_better=False))
    assert "b with 2.500" in low and "0.500 lower than a (95 % confidence interval of the" in low
    assert f"difference: {0.5 - half:.3f} to {0.5 + half:.3f})" in low
    chance = compare_best(groups_of({"a": [3.0, 2.0], "b": [2.5, 2.0]}), GOLD)
    assert "Not significant at 5 %" in chance and "difference: -" in chance
    for values in ({"a": [3.0], "b": [2.0]}, {"a": [3.0, 3.1], "b": [2.0]}):
        assert "with one seed: repeat with -m seed=1,2,3." in compare_best(groups_of(values), GOLD)
    equal = compare_best(groups_of({"a": [3.0, 3.0], "b": [2.0, 2.0]}), GOLD)
    assert "the seeds have equal values" in equal
    assert "a with 3.000, equal to b." in compare_best(groups_of({"a": [3.0], "b": [3.0]}), GOLD)


def test_a_setting_with_an_infinite_value_is_shown_and_not_ranked(tmp_path: Path) -> None:
    for coef, values in {"0.1": [1.0, 2.0], "0.2": [9.0, math.inf], "0.3": [3.0, math.nan]}.items():
        for seed, gold in enumerate(values, 1):
            write_run(tmp_path, f"rl.kl.coef={coef}", f"seed={seed}", gold=gold)
    (comparison,) = compare_runs(find_runs([tmp_path]), "policy")
    assert comparison.groups[0].label == "kl.coef=0.1"
    one, others = conclusions(comparison)
    assert one.startswith("Only one setting")
    assert others == "Not compared, as their gold reward is not finite: kl.coef=0.2, kl.coef=0.3."
    assert format_mean([9.0, math.inf]) == "inf"


@pytest.mark.parametrize("seed", range(20))
def test_welch_agrees_with_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (list(random.normal(size=random.integers(2, 9)) * scale) for scale in (1.0, 3.0))
    expected = stats.ttest_ind(a, b, equal_var=False)
    low, high, p = welch(a, b)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-9)
    assert p == pytest.approx(float(expected.pvalue), rel=1e-9)


def test_a_much_larger_kl_is_said() -> None:
    near, far = groups_of({"a": [2.0]}, **{"eval/kl": 2.0}), groups_of({"b": [3.0]})
    far[0].runs[0].metrics["eval/kl"] = 12.0
    line = compare_best(far + near, GOLD)
    assert "The KL differs: 12.00 nats per response, not 2.00, so compare them at equal KL" in line
    far[0].runs[0].metrics["eval/kl"] = 2.5
    assert "KL" not in compare_best(far + near, GOLD)


def test_a_sweep_is_grouped_over_seeds_and_the_best_comes_first(sweep: Path) -> None:
    found = find_runs([sweep])
    good = [run for run in found if run.stage]
    assert len(good) == 9 and differing_settings(good) == ["rl.kl.coef", "seed"]
    cells = seed_groups(good)
    assert [cell.label for cell in cells] == [
        "kl.coef=0.05",
        "kl.coef=0.2",
        "kl.coef=0.02",
    ] and all(len(cell.runs) == 3 for cell in cells)
    assert primary_metric(good).name == "eval/gold"
    (failed,) = [run for run in found if not run.stage]
    assert failed.status == "failed: ppo failed, rank 0: it is broken"


def test_the_command_prints_tables_and_writes_one_page(sweep: Path, tmp_path: Path) -> None:
    def call(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "rlhf.report", *map(str, args)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    done = call(sweep)
    assert done.returncode == 0, done.stderr
    assert (
        "kl.coef=0.05 seed=2" in done.stdout
        and "3.000 ± 0.248" in done.stdout
        and "Best of 3 settings by gold reward: kl.coef=0.05" in done.stdout
        and "Significant at 5 %" in done.stdout
        and "study/failed failed: ppo failed, rank 0: it is broken" in done.stdout
    )
    assert str(sweep / "report.html") in done.stdout
    listed = call("--list")
    assert listed.returncode == 0 and listed.stdout.count("finished") == 9
    lines = listed.stdout.splitlines()
    assert len(lines) == 10 and all("(sweep study)" in line for line in lines)
    folder_of_sweeps = call(tmp_path / "multirun", "--out", tmp_path / "page.html")
    assert folder_of_sweeps.stdout.splitlines()[:-1] == done.stdout.splitlines()[:-1]
    assert (
        call(tmp_path / "outputs", "--out", tmp_path / "page.html").returncode == 0
        and (tmp_path / "page.html").exists()
    )
    (tmp_path / "empty").mkdir()
    nothing = call(tmp_path / "empty")
    assert (
        nothing.returncode == 2
        and nothing.stderr.startswith("error: ")
        and "no run there" in nothing.stderr
    )


def test_ten_mixed_runs_are_compared_like_with_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = write_mixed(tmp_path)
    found = find_runs([tmp_path])
    monkeypatch.setattr(tables, "wide_console", lambda: Console(width=110, highlight=False))
    tables.print_comparison(found, tmp_path / "report.html")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    for title in (
        "ppo on sandbox: 3 runs",
        "ppo, dpo on rm-static: 2 runs",
        "ppo on pairs.jsonl: 1 run",
    ):
        assert any(line.strip() == title for line in lines), title
    for run in runs:
        stage, digest = run.name.split("-")[0], run.name[-8:]
        assert f"│ {stage}-{digest} " in printed, "a row can be found by the run's name"
    rows = [line for line in lines if line.startswith("│ ")]
    assert len(rows) <= 16, "one or two lines each, and two rows over seeds"
    assert "Best of 2 settings by gold reward: kl.coef=0.05 with 2.850" in printed
    assert printed.count("Best of") == 1, "the others differ in what their metric means"
    assert "Runs with different actor.name are not ranked against each other" not in printed
    assert "Runs with different actor.path are not ranked against each other" in printed
    assert "Not compared, as they have no score: dpo" in printed and "is a proxy" in printed
    assert re.search(r"ppo-\w{8} failed: ValueError: it is broken", printed)
    tables.print_list(found)
    assert len(capsys.readouterr().out.splitlines()) == 10, "one line for each run"
    page = report_page.page(found, "mixed", tmp_path)
    assert page.count('class="answer"') == 5 and 'href="outputs/ppo-' in page


def test_scores_of_different_reward_models_are_not_ranked(tmp_path: Path) -> None:
    """Without a gold reward the score decides, and its meaning is that of the reward model."""
    hub = ("actor=opt125m", "data=rm_static")
    for overrides in (("rm.epochs=1",), ("rm.epochs=2",), ("rm.epochs=2", "rl.kl.coef=0.3")):
        final = {"score": 1.0 + len(overrides), "kl": 1.0}
        write_stage(tmp_path, "ppo", [*hub, *overrides], [], final)
    (comparison,) = compare_runs(find_runs([tmp_path]), "policy")
    best, why, proxy = conclusions(comparison)
    assert best.startswith("Best of 2 settings by score: kl.coef=0.3 rm.epochs=2 with 3.000, 1.000")
    assert why.startswith("Runs with different rm.epochs are not ranked against each other")
    assert proxy.startswith("The score is a proxy")


@pytest.mark.parametrize(
    "stage, one, other, apart",
    [
        ("rm", [], ["data.eval_share=0.2"], "data.eval_share"),
        ("sft", [], ["data.max_response_tokens=32"], "data.max_response_tokens"),
        ("sft", [], ["sft.epochs=2"], ""),
        ("ppo", [], ["data.shares=[8,1,1]"], "data.shares"),
        ("ppo", [], ["rl.kl.coef=0.3"], ""),
        ("eval", ["eval.against=sft"], ["eval.against=sft", "sft.epochs=2"], "sft.epochs"),
        ("eval", ["eval.against=sft"], ["eval.against=sft", "rl.kl.coef=0.3"], ""),
        ("eval", ["eval.against=ppo"], ["eval.against=ppo", "rl.kl.coef=0.3"], "ppo.kl.coef"),
        ("eval", ["eval.against=base"], ["eval.against=base", "sft.epochs=2"], ""),
        ("eval", [], ["eval.decoding=greedy"], "eval.decoding"),
    ],
)
def test_what_does_not_mean_the_same_is_not_ranked(
    tmp_path: Path, stage: str, one: list[str], other: list[str], apart: str
) -> None:
    """Held-out rows, tokens, reward models, opponents and decoding decide what a metric means."""
    hub = ["actor=opt125m", "data=rm_static"]
    final = {"sft": "perplexity", "rm": "accuracy", "ppo": "score", "eval": "win_rate"}
    for value, overrides in enumerate((one, other), 1):
        write_stage(tmp_path, stage, [*hub, *overrides], [], {final[stage]: float(value)})
    runs = find_runs([tmp_path])
    (comparison,) = compare_runs(runs, view_of(stage).kind)
    said = " ".join(conclusions(comparison))
    assert (f"Runs with different {apart} are not ranked" in said) == bool(apart), said
    assert ("Best of 2 settings" in said) == (not apart)


def test_the_adapter_of_a_critic_does_not_change_what_a_score_means(tmp_path: Path) -> None:
    """PPO has a critic and RLOO has none; both are scored by the same given reward model."""
    given = ("actor=opt125m", "data=rm_static", "rl.reward=builtin:tiny")
    for stage, score in (("ppo", 1.0), ("rloo", 2.0)):
        write_stage(tmp_path, stage, given, [], {"score": score, "kl": 1.0})
    (comparison,) = compare_runs(find_runs([tmp_path]), "policy")
    assert conclusions(comparison)[0].startswith("Best of 2 settings by score: rloo with 2.000")


def test_settings_that_split_the_runs_alike_are_named_once(tmp_path: Path) -> None:
    """Two recipes differ in many values; one of them, set by hand, stands for all."""
    recipe = ["rl.lr=1e-5", "rl.epochs=2", "rl.critic.lr=1e-5", "sft.lr=1e-4", "rl.ema=0.9"]
    for overrides in ([], recipe, [*recipe, "seed=2"]):
        write_run(tmp_path, *overrides)
    (comparison,) = compare_runs(find_runs([tmp_path]), "policy")
    assert len(comparison.settings) == 6 and comparison.in_label[1:] == ["seed"]
    assert len(comparison.groups) == 2 and all(len(label) < 40 for label in comparison.labels)


def test_jobs_that_differ_in_where_they_ran_keep_their_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for zero, steps in ((0, 3), (2, 5)):
        job = tmp_path / "multirun" / "places" / f"zero{zero}"
        job.mkdir(parents=True)
        (job / "overrides.txt").write_text(f"deploy.zero_stage={zero}\nfresh=true\n")
        for name in ("config.yaml", "summary.json"):
            shutil.copy(run / name, job / name)
        (job / "metrics.jsonl").write_text('{"step": 1, "objective/kl": 0.1}\n' * steps)
        (job / "run").symlink_to(run)
    found = find_runs([tmp_path / "multirun" / "places"])
    assert [len(run.rows) for run in found] == [3, 5]
    assert [run_label(run, differing_settings(found)) for run in found] == [
        "deploy.zero_stage=0",
        "deploy.zero_stage=2",
    ]


def test_the_page_of_an_evaluation_escapes_all_texts() -> None:
    rate = WinRate(HOSTILE, "sft", HOSTILE, 0.5, 0.4, 0.6, 1, 0, 2)
    row = {"prompt": HOSTILE, "answers": {HOSTILE: {"completion": HOSTILE, "score": 1.0}}}
    bins = [CalibrationBin(0.5, 0.55, 2, 0.52, 0.5)]
    groups = {HOSTILE: (2, 0.5)}
    scorer = ScorerResults(2, 0.5, 0.1, bins, groups, groups, [0.1, -0.1], 0.5)
    results = EvalResults(
        policies={HOSTILE: {"score": 1.0}, "sft": {"score": 0.0}},
        against="sft",
        judge=HOSTILE,
        win_rates=[rate],
        best_of=[BestOfPoint(1, 0.5, 0.0), BestOfPoint(2, 0.7, 0.2)],
        best_of_policy=HOSTILE,
        reward_models={HOSTILE: scorer},
        decoding="sample",
        where={HOSTILE: HOSTILE, "sft": HOSTILE},
        answers=[row],
        fixed=[row],
    )
    page = eval_page.page(results, HOSTILE)
    assert HOSTILE not in page and page.count("&lt;/script&gt;") > 8
    for word in (
        "mean confidence",
        "agrees with the gold reward on 50.0% of them",
        "Responses to fixed prompts",
    ):
        assert word in page, word

"""Runs compared: numbers by hand, and the page in a real browser where one is installed."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Demo
from scipy import stats
from written_runs import HOSTILE, write_run

from rlhf.reporting import curves, eval_page, report_page, tables
from rlhf.reporting.comparison import (
    SeedGroup,
    compare_best,
    confidence_half_width,
    differing_settings,
    format_mean,
    primary_metric,
    run_label,
    seed_groups,
)
from rlhf.reporting.eval_results import (
    BestOfPoint,
    CalibrationBin,
    EvalResults,
    ScorerResults,
    WinRate,
)
from rlhf.runs.history import Run, find_runs


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three coefficients, three seeds each; one job that failed."""
    folder = tmp_path / "multirun" / "study"
    golds = {0.02: (2.0, 2.2, 2.4), 0.05: (3.0, 3.1, 2.9), 0.2: (2.5, 2.4, 2.6)}
    for coef, values in golds.items():
        for seed, gold in enumerate(values, 1):
            run = write_run(tmp_path, f"rl.kl.coef={coef}", f"seed={seed}", gold=gold)
            job = folder / f"{coef}-{seed}"
            job.mkdir(parents=True)
            (job / "overrides.txt").write_text("")
            (job / "run").symlink_to(run)
    failed = folder / "failed"
    failed.mkdir()
    (failed / "overrides.txt").write_text("")
    (failed / "error.txt").write_text("ppo failed, rank 0: it is broken\n")
    return folder


def test_means_intervals_and_significance_by_hand() -> None:
    values = [3.0, 3.1, 2.9]
    assert confidence_half_width(values) == pytest.approx(
        4.302653 * 0.1 / math.sqrt(3), rel=1e-6
    )  # t of 2 degrees of freedom at 97.5 %
    assert (
        format_mean(values) == "3.000 ± 0.248"
        and format_mean([2.0]) == "2.000"
        and math.isnan(confidence_half_width([2.0]))
    )
    cells = [
        SeedGroup(
            name, [Run(Path(name), "ppo", "finished", metrics={"m": value}) for value in some]
        )
        for name, some in (("a", values), ("b", [2.5, 2.4, 2.6]))
    ]
    # Welch by hand: means 3 and 2.5, both variances 0.01, so t = 0.5 / sqrt(0.02 / 3) with 4
    # degrees of freedom
    p = 2 * stats.t.sf(0.5 / math.sqrt(0.02 / 3), 4)
    line = compare_best(cells, "m")
    assert f"p = {p:.2g}, significant" in line and line.startswith(
        "best by m: a (3.000 ± 0.248), then b (2.500 ± 0.248)"
    )
    single = [SeedGroup(cell.label, cell.runs[:1]) for cell in cells]
    assert (
        "one seed: significance cannot be tested" in compare_best(single, "m")
        and compare_best(cells[:1], "m") == ""
    )


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
    assert primary_metric(good) == ("eval/gold", True)
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
        and "significant at 5 %" in done.stdout
    )
    assert str(sweep / "report.html") in done.stdout
    listed = call("--list")
    assert listed.returncode == 0 and listed.stdout.count("finished") == 9
    assert (
        call(tmp_path / "outputs", "--out", tmp_path / "page.html").returncode == 0
        and (tmp_path / "page.html").exists()
    )
    nothing = call(tmp_path / "multirun")
    assert (
        nothing.returncode == 2
        and nothing.stderr.startswith("error: ")
        and "no run there" in nothing.stderr
    )


def test_the_page_holds_everything_and_escapes_what_models_say(sweep: Path) -> None:
    page = report_page.page(find_runs([sweep]), f"Sweep {HOSTILE}")
    assert HOSTILE not in page and "&lt;/script&gt;" in page
    assert "https://" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL), (
        "it needs no other file"
    )
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for word in (
        "Curves",
        "Reward against KL",
        "Settings that differ",
        "Responses to the same held-out prompts",
        "Lineage",
        "it is broken",
    ):
        assert word in text, word
    assert page.count("plotly.js v") == 1, "the library once"
    assert curves.smooth([1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, 11 / 3, 4.5] and curves.smooth(
        [1.0, 5.0], 1
    ) == [1.0, 5.0]


def test_a_real_pipeline_shows_its_lineage(demo: Demo, tmp_path: Path) -> None:
    found = find_runs([demo.root])
    assert [run.stage for run in found] == ["sft", "rm", "ppo"] and all(
        run.status == "finished" for run in found
    )
    page = report_page.page(found, "demo")
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert f"{demo.sft.name} (eval/perplexity" in text and f"{demo.rm.name} (eval/accuracy" in text
    tables.print_comparison(found)


BROWSER = (
    shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_draws_the_page(sweep: Path, tmp_path: Path) -> None:
    from matplotlib import image

    file = report_page.write_page(find_runs([sweep]), sweep / "report.html", "Sweep study")
    picture = tmp_path / "page.png"
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    flags += [
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1500,2600",
        "--virtual-time-budget=8000",
    ]
    dom = subprocess.run(
        [BROWSER, *flags, "--dump-dom", f"file://{file}"],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert dom.count('class="scatterlayer') >= 7 and "<title>Sweep study</title>" in dom, (
        "six panels and the frontier are drawn"
    )
    subprocess.run(
        [BROWSER, *flags, f"--screenshot={picture}", f"file://{file}"],
        capture_output=True,
        timeout=120,
    )
    pixels = image.imread(picture)
    blue = (abs(pixels[..., :3] - [0.12, 0.47, 0.71]).sum(-1) < 0.15).sum()
    assert pixels.shape[:2] == (2600, 1500) and blue > 500, "lines in the first run's colour"


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
        policies={HOSTILE: {"score": 1.0}},
        against=HOSTILE,
        judge=HOSTILE,
        win_rates=[rate],
        best_of=[BestOfPoint(1, 0.5, 0.0), BestOfPoint(2, 0.7, 0.2)],
        best_of_policy=HOSTILE,
        reward_models={HOSTILE: scorer},
        decoding="sample",
        where={HOSTILE: HOSTILE},
        answers=[row],
        fixed=[row],
    )
    page = eval_page.page(results, HOSTILE)
    assert HOSTILE not in page and page.count("&lt;/script&gt;") > 8
    for word in ("mean confidence", "accuracy against gold 50.0%", "Responses to fixed prompts"):
        assert word in page, word

"""Runs compared: numbers by hand, statuses, the page in a real browser where one is installed."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import Demo, command
from scipy import stats

from rlhf.base.errors import UserError
from rlhf.config.loading import save_config
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
from rlhf.runs.directory import config_for_stage, write_json
from rlhf.runs.history import Run, find_runs, read_lines, run_status
from rlhf.runs.identity import run_name
from rlhf.runs.locks import lock_run
from rlhf.runs.stage_views import KINDS, ONLINE_RL, view_of

HOSTILE = "</script><script>document.title='run'</script>"


def write_run(
    root: Path, *overrides: str, gold: float = 1.0, steps: int = 12, finished: bool = True
) -> Path:
    """A PPO run directory: a score that rises to `gold`, responses, and a summary if finished."""
    own = command("stage=ppo", *overrides)
    own.cfg.root = str(root)
    run = root / "outputs" / run_name(own, "ppo")
    run.mkdir(parents=True)
    save_config(config_for_stage(own.cfg, "ppo", {}), run / "config.yaml")
    rows = [
        {
            "step": i + 1,
            "objective/scores": gold * i / steps,
            "reward/gold/mean": gold * i / steps,
            "objective/kl": 0.2 * i,
        }
        | {"loss/policy_avg": -0.1, "loss/value_avg": 1 / (i + 1), "tokens/response_mean": 20.0}
        for i in range(steps)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        {
            "step": steps,
            "prompt": f"p{i}",
            "before": "b",
            "after": f"{HOSTILE} {gold}",
            "score_before": 0.0,
            "score_after": 1.0,
        }
        for i in range(3)
    ]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    write_json(run / "parents.json", {"sft": "abc"})
    if finished:
        final = {
            "eval/gold": gold,
            "eval/gold_before": 0.0,
            "eval/score": gold / 2,
            "eval/kl": 2.0,
            "eval/length": 20.0,
            "eval/eos_rate": 1.0,
        }
        write_json(
            run / "summary.json",
            {
                "id": run.name[-8:],
                "stage": "ppo",
                "status": "finished",
                "parents": {"sft": "abc"},
                "metrics": final,
            },
        )
    return run


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


def test_every_status_is_told(tmp_path: Path) -> None:
    done, left, broken, held = (
        write_run(tmp_path, f"seed={i}", finished=i == 1) for i in range(1, 5)
    )
    whole = left / "checkpoints" / "step-8"
    whole.mkdir(parents=True)
    (whole / "a.pt").write_text("xyz")
    write_json(whole / "checkpoint.json", {"step": 8, "placement": {}, "files": {"a.pt": 3}})
    torn = left / "checkpoints" / "step-10"
    torn.mkdir()
    write_json(torn / "checkpoint.json", {"step": 10, "placement": {}, "files": {"a.pt": 3}})
    (broken / "error-rank0.txt").write_text("rank 0: ValueError: no data\n\nTraceback")
    with lock_run(held):
        statuses = [run_status(run) for run in (done, left, broken, held)]
        with pytest.raises(UserError, match="being trained by another process"), lock_run(held):
            pass
    assert statuses == [
        "finished",
        "stopped, resumes after step 8",
        "failed: ValueError: no data",
        "running",
    ]
    assert run_status(held) == "stopped"


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


def test_what_other_versions_wrote_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    """An old configuration has other keys; its seed is unknown, so it is in no group of seeds.

    The stage of an attempt is read from its files.
    """
    new, *old = (write_run(tmp_path, f"seed={seed}") for seed in (1, 2, 3))
    for run in old:
        config_file = run / "config.yaml"
        config_file.write_text(config_file.read_text().replace("checkpoint:", "of_old:"))
    attempt = new / "attempts" / "1"
    attempt.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(new / name, attempt / name)
    found = find_runs([tmp_path, attempt])
    assert [run.stage for run in found] == ["ppo"] * 4 and found[
        -1
    ].name == f"{new.name}/attempts/1"
    assert [bool(run.settings) for run in found] == [True, False, False, True]
    assert sorted(len(cell.runs) for cell in seed_groups(found)) == [1, 1, 2]
    report_page.page(found, "old and new")


def test_answers_with_line_ends_of_their_own_are_read_whole(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b\u0085c", "after": "d\x1ce"}, {"prompt": "f"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(text + '{"prompt": "torn')
    assert read_lines(tmp_path / "samples.jsonl") == rows


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


def test_a_run_of_an_earlier_version_is_shown_and_named_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its keys were ppo.*: results and curves are shown, settings are not compared."""
    new = write_run(tmp_path)
    old = tmp_path / "outputs" / "ppo-tiny-tiny+ppo.max_steps-4-ea611aa4"
    old.mkdir()
    (old / "config.yaml").write_text(
        "stage: {name: ppo, runs: [ppo]}\nppo: {lam: 0.95, clip: 0.2}\n"
    )
    (old / "metrics.jsonl").write_text('{"step": 1, "objective/kl": 0.1, "objective/scores": 0}\n')
    assert find_runs([old])[0].status_text == "stopped, made by an earlier version"
    settings = {"ppo.lam": 0.95, "ppo.kl.place": "reward", "sft.lr": 0.001, "seed": 1}
    final = {"eval/gold": 2.0, "eval/score": 1.0}
    about = {"id": "ea611aa4", "stage": "ppo", "parents": {"sft": "x"}, "metrics": final}
    write_json(old / "summary.json", {**about, "settings": settings})
    runs = find_runs([tmp_path])
    assert {run.name: run.earlier_version for run in runs} == {new.name: False, old.name: True}
    tables.print_list(runs)
    tables.print_comparison(runs)
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert printed.count("made by an earlier version") == 2 and "best by eval/gold: ppo-" in printed
    page = report_page.page(runs, "old and new")
    assert "finished, made by an earlier version" in page and old.name in page


def test_every_name_that_is_no_other_stage_is_an_online_rl_preset() -> None:
    assert view_of("ppo") is view_of("dr_grpo") is view_of("my_own") is ONLINE_RL
    assert view_of("dpo").kind == "policy" and "MY_OWN" in view_of("my_own").card_text("my_own")
    for stage in ("sft", "rm", "ppo", "dpo", "eval"):
        view = view_of(stage)
        assert (
            view.rows
            and view.primary
            and {metric.name for metric in view.primary} <= {*view.metrics}
        )
    assert {view_of(stage).kind for stage in ("sft", "rm", "ppo", "dpo", "eval")} == {*KINDS}


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

"""Runs read from disk: their status, and what other versions wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from written_runs import write_run

from rlhf.base.checksums import write_sums
from rlhf.base.errors import UserError
from rlhf.reporting import report_page, tables
from rlhf.reporting.comparison import seed_groups
from rlhf.runs.directory import write_json
from rlhf.runs.finding import find_runs
from rlhf.runs.history import read_lines, run_status
from rlhf.runs.locks import lock_run
from rlhf.runs.stage_views import KINDS, ONLINE_RL, view_of


def test_every_status_is_told(tmp_path: Path) -> None:
    done, left, broken, held = (
        write_run(tmp_path, f"seed={i}", finished=i == 1) for i in range(1, 5)
    )
    whole = left / "checkpoints" / "step-8"
    whole.mkdir(parents=True)
    (whole / "a.pt").write_text("xyz")
    write_json(whole / "checkpoint.json", {"step": 8, "placement": {}, "files": {"a.pt": 3}})
    write_sums(whole)
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


def test_what_other_versions_wrote_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    """A configuration with other keys: its seed is unknown, so it is in no group of seeds.

    The stage of an attempt is read from its files.
    """
    new, *old = (write_run(tmp_path, f"seed={seed}") for seed in (1, 2, 3))
    for run in old:
        config_file = run / "config.yaml"
        config_file.write_text(config_file.read_text().replace("checkpoint:", "of_old:"))
        about = json.loads((run / "summary.json").read_text())
        write_json(run / "summary.json", about | {"settings": {}})
    attempt = new / "attempts" / "1"
    attempt.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        shutil.copy(new / name, attempt / name)
    about = json.loads((new / "summary.json").read_text())
    write_json(attempt / "summary.json", about | {"id": "the id of the attempt"})
    found = find_runs([tmp_path, attempt])
    assert [run.stage for run in found] == ["ppo"] * 4 and found[
        -1
    ].name == f"{new.name}/attempts/1"
    assert [bool(run.settings) for run in found] == [True, False, False, True]
    assert sorted(len(cell.runs) for cell in seed_groups(found)) == [1, 1, 2]
    report_page.page(found, "old and new", tmp_path)


def test_answers_with_line_ends_of_their_own_are_read_whole(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b\u0085c", "after": "d\x1ce"}, {"prompt": "f"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(text + '{"prompt": "torn')
    assert read_lines(tmp_path / "samples.jsonl") == rows


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
    assert printed.count("made by an earlier version") == 2
    assert "Best of" not in printed, "on which data it was made is unknown"
    page = report_page.page(runs, "old and new", tmp_path)
    assert "finished, made by an earlier version" in page and old.name in page


def test_a_long_reason_of_a_failure_is_cut_in_the_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").unlink()
    what = "very " * 100 + "wrong"
    (run / "error-rank0.txt").write_text(f"rank 0: RuntimeError: {what}\n\nTraceback ...\n")
    tables.print_list(find_runs([tmp_path]))
    (line,) = capsys.readouterr().out.splitlines()
    assert "very very" in line and len(line.partition(str(run))[0]) < 120


def test_runs_of_a_folder_know_the_sweeps_that_they_are_jobs_of(tmp_path: Path) -> None:
    """A sweep's job that failed before it had a run is there too; one run in two sweeps is one."""
    runs = [write_run(tmp_path, f"seed={seed}") for seed in (1, 2, 3)]
    for sweep, some in (("a", runs[:2]), ("b", runs[1:2])):
        for number, run in enumerate(some):
            job = tmp_path / "multirun" / sweep / f"job-{number}"
            job.mkdir(parents=True)
            (job / "overrides.txt").write_text("")
            (job / "run").symlink_to(run)
    failed = tmp_path / "multirun" / "b" / "failed"
    failed.mkdir()
    (failed / "overrides.txt").write_text("")
    (failed / "error.txt").write_text("it is broken\n")
    found = find_runs([tmp_path])
    assert [run.path for run in found] == [*runs, failed]
    assert [run.sweeps for run in found] == [["a"], ["a", "b"], [], ["b"]]
    of_sweeps = find_runs([tmp_path / "multirun"])
    assert {run.path: run.sweeps for run in of_sweeps} == {
        run.path: run.sweeps for run in found if run.sweeps
    }
    assert found[0].short_name == f"ppo-{runs[0].name[-8:]}" and found[3].short_name == "failed"


def job_of(run: Path, name: str, *overrides: str) -> Path:
    """A job's folder with copies of what its run wrote."""
    job = run.parents[1] / "multirun" / "a" / name
    shutil.copytree(run, job)
    (job / "overrides.txt").write_text("\n".join(overrides))
    (job / "run").symlink_to(os.path.relpath(run, job))
    return job


def test_a_run_is_one_seed_however_many_jobs_lead_to_it(tmp_path: Path) -> None:
    """As after the same sweep with fresh=true; jobs that ran elsewhere are compared."""
    one, two = (write_run(tmp_path, f"seed={seed}") for seed in (1, 2))
    for run in (one, two):
        job_of(run, f"{run.name}-a", "stage=ppo")
        job_of(run, f"{run.name}-b", "fresh=true", "stage=ppo")
    sweep = tmp_path / "multirun" / "a"
    assert sorted(run.path for run in find_runs([sweep])) == sorted([one, two])
    job_of(one, "elsewhere", "deploy.threads=1")
    places = [run.settings.get("deploy.threads") for run in find_runs([sweep])]
    assert len(places) == 3 and places.count("1") == 1


def test_a_job_that_was_copied_without_its_run_has_its_results(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    job = job_of(run, "job", "stage=ppo")
    shutil.rmtree(run)
    (found,) = find_runs([tmp_path / "multirun"])
    assert (found.path, found.status) == (job, "finished")


def test_all_jobs_of_a_copied_sweep_are_there_without_its_runs(tmp_path: Path) -> None:
    for number in range(3):
        job = tmp_path / "multirun" / "a" / f"job-{number}"
        job.mkdir(parents=True)
        (job / "overrides.txt").write_text("")
        (job / "run").symlink_to(tmp_path / "outputs" / "elsewhere")
    assert [run.status for run in find_runs([tmp_path])] == ["failed: no run"] * 3


def test_every_name_that_is_no_other_stage_is_an_online_rl_preset() -> None:
    assert view_of("ppo") is view_of("dr_grpo") is view_of("my_own") is ONLINE_RL
    assert view_of("dpo").kind == "policy" and "MY_OWN" in view_of("my_own").card_text("my_own")
    for stage in ("sft", "rm", "ppo", "dpo", "eval"):
        view = view_of(stage)
        assert (
            bool(view.rows) is (stage != "eval")  # which prints tables of its own
            and view.primary
            and {metric.name for metric in view.primary} <= {*view.metrics}
        )
    assert {view_of(stage).kind for stage in ("sft", "rm", "ppo", "dpo", "eval")} == {*KINDS}

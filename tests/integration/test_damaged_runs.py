"""A damaged run hides no other one, and each command names the file and the fix."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from helpers import command
from written_runs import write_run

from rlhf import report
from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.reporting import report_page, tables
from rlhf.run import prepare_directory
from rlhf.runs.directory import check_resumable, read_summary, read_warnings, write_json
from rlhf.runs.finding import find_runs
from rlhf.runs.history import Run, read_run
from rlhf.runs.identity import run_dir_for
from rlhf.runs.inputs import Inputs, find_inputs
from rlhf.runs.run_files import read_file

HALF = b'{"id": "a", "metr'
DAMAGES = {
    "half": HALF,
    "empty": b"",
    "list": b"[1, 2]",
    "null": b"null",
    "foreign": b'{"name": "x"}',
    "binary": b"\x00\xff\xfe\x80",
    "deep": b"[" * 100_000,
}


def shown(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[Run], str]:
    """The runs below a folder, and what the list and the comparison print of them."""
    runs = find_runs([root])
    report_page.write_page(runs, root / "report.html", "all")
    tables.print_list(runs)
    tables.print_comparison(runs)
    return runs, capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_summary_is_named_and_hides_nothing(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (write_run(tmp_path, f"seed={seed}") for seed in (1, 2))
    (bad / "summary.json").write_bytes(DAMAGES[damage])
    runs, printed = shown(tmp_path, capsys)
    status = {run.path: run.status for run in runs}
    assert status[good] == "finished" and status[bad].startswith(f"unreadable: {bad}/summary.json:")
    assert "delete it" in status[bad] and "fresh=true" in status[bad]
    assert printed.count(status[bad]) == 2, "once below the list, once below the tables"
    assert "  unreadable  " in printed and f"ppo-{good.name[-8:]}" in printed
    assert bad.name in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=r"summary\.json: cannot be read .*fresh=true"):
        read_summary(bad)


@pytest.mark.parametrize("value", ['"abc"', "[1]", "null", "{}"])
def test_a_final_metric_that_is_no_number_is_named(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (write_run(tmp_path, f"seed={seed}", gold=2.5) for seed in (1, 2))
    file = bad / "summary.json"
    file.write_text(file.read_text().replace('"eval/gold": 2.5', f'"eval/gold": {value}'))
    _, printed = shown(tmp_path, capsys)
    assert f"{file}: cannot be read (metrics: eval/gold must be a number)" in printed
    assert good.name[-8:] in printed


@pytest.mark.parametrize("value", ["NaN", "1e400", "-Infinity"])
def test_a_final_metric_that_is_not_finite_is_shown(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_run(tmp_path, "seed=2", gold=2.5)
    file = bad / "summary.json"
    file.write_text(file.read_text().replace('"eval/gold": 2.5', f'"eval/gold": {value}'))
    (run,), printed = shown(tmp_path, capsys)
    assert run.status == "finished" and str(float(value)) in printed


def test_values_in_the_curves_that_are_no_numbers_are_skipped_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path)
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(
            b'{"step": 13, "objective/scores": "abc"}\n{"step": 14, "loss/value_avg": [1]}\n'
        )
        file.write(b'{"step": 15, "objective/scores": null, "objective/kl": NaN}\n')
        file.write(b'{"step": 16, "objective/kl": 1e400, "eval/gold": 1' + b"0" * 400 + b"}\n")
        file.write(b'\x00\x00\n[3]\n{"step": 17, "objective/scores": 4.5}\n{"step": 18, "obj')
    (found,), printed = shown(tmp_path, capsys)
    assert len(found.rows) == 17 and found.rows.curve("objective/scores").y[-1] == 4.5
    assert found.status == "finished"
    assert f"{run}/metrics.jsonl: values that are no numbers: 3 (the first: objective" in printed
    assert f"{run}/metrics.jsonl: lines that are no JSON objects: 2" in printed


@pytest.mark.parametrize("damage", [*DAMAGES, "a directory"])
@pytest.mark.parametrize(
    "name",
    ["config.yaml", "parents.json", "env.json", "data.json", "warnings.json", "samples.jsonl"],
)
def test_no_other_file_hides_a_run(
    name: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that is finished and of one that is not."""
    good, *bad = (write_run(tmp_path, f"seed={i}", finished=i < 3) for i in (1, 2, 3))
    for run in bad:
        (run / name).unlink(missing_ok=True)
        if damage == "a directory":
            (run / name).mkdir()
        else:
            (run / name).write_bytes(DAMAGES[damage])
    runs, printed = shown(tmp_path, capsys)
    assert {run.path for run in runs} == {good, *bad}
    status = {run.path: run.status for run in runs}
    assert status[good] == status[bad[0]] == "finished"
    if name == "config.yaml":
        assert status[bad[1]].startswith(f"unreadable: {bad[1]}/config.yaml: cannot be read")
        assert "fresh=true" in printed
    if name == "env.json":
        text = (tmp_path / "report.html").read_text()
        assert ("env.json: cannot be read" in text) == (damage != "foreign"), "all keys may lack"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_runs_without_permission_are_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good, closed, file = (write_run(tmp_path, f"seed={seed}") for seed in (1, 2, 3))
    for folder in (tmp_path, *tmp_path.parents):
        if os.stat(folder).st_uid == 0 and len(folder.parts) > 2:
            os.chmod(folder, 0o755)
    closed.chmod(0o700)
    (file / "summary.json").chmod(0o600)
    child = os.fork()
    if child == 0:  # a process of its own, as the permission of root cannot be given up and taken
        os.seteuid(65534)
        tables.print_list(find_runs([tmp_path]))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    printed = capfd.readouterr().out
    assert printed.count("unreadable: ") == 2 and printed.count("ermission denied") == 2
    assert good.name in printed


def test_commands_name_the_file_of_a_parent_and_the_fix(tmp_path: Path) -> None:
    typed = ("stage=ppo", f"root={tmp_path}", "seed=5")
    sft = run_dir_for(command(*typed), "sft")
    sft.mkdir(parents=True)
    (sft / "summary.json").write_bytes(HALF)
    with pytest.raises(
        UserError, match=r"sft-.*summary\.json: cannot be read \(it is no JSON.*: d"
    ):
        find_inputs(command(*typed), "ppo")


def test_what_a_run_resumes_with_is_checked(tmp_path: Path) -> None:
    run = write_run(tmp_path, finished=False)
    made = {"step": 2, "placement": {}, "files": {}}
    for name in ("parents.json", "env.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(HALF)
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            check_resumable(run, made, command("stage=ppo").cfg, {"sft": "abc"})
        (run / name).write_bytes(before)
    (run / "warnings.json").write_bytes(b'{"a": 1}')
    with pytest.raises(UserError, match=r"warnings\.json: cannot be read \(it must be a list\)"):
        read_warnings(run)
    write_json(run / "result.json", {"metrics": {}})
    with pytest.raises(UserError, match="seconds is missing"):
        read_file(run, "result.json")


def test_a_reward_function_may_be_mended_in_the_middle_of_a_run(tmp_path: Path) -> None:
    run = write_run(tmp_path, finished=False)
    made, cfg = {"step": 2, "placement": {}, "files": {}}, command("stage=ppo").cfg
    before = {"sft": "abc", "rewards/mine": "1", "rewards/model": "2"}
    write_json(run / "parents.json", before)

    def resume(**changed: str) -> list[str]:
        now = before | {name.replace("_", "/"): value for name, value in changed.items()}
        return [
            line
            for line in check_resumable(run, made, cfg, now, {"rewards/mine", "rewards/new"})
            if "package" not in line
        ]

    assert resume() == []
    line = "resuming with a file of rewards/mine that has changed since"
    assert resume(rewards_mine="3") == [line]
    for other in ("rewards_model", "sft", "rewards_new"):
        name = other.replace("_", "/")
        with pytest.raises(UserError, match=rf"other runs or files .* \(changed: {name}\)"):
            resume(**{other: "3"})


def test_fresh_true_moves_a_damaged_run_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ("stage=sft", f"root={tmp_path}", "fresh=true")
    run = run_dir_for(command(*typed), "sft")
    run.mkdir(parents=True)
    (run / "summary.json").write_bytes(HALF)
    prepare_directory(command(*typed), "sft", Inputs(), run)
    assert (run / "attempts" / "1" / "summary.json").read_bytes() == HALF
    assert "an earlier attempt is kept" in capsys.readouterr().err


# ---- copies, and where the page is written


def test_a_copied_run_is_no_second_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    copies = [tmp_path / "outputs" / "before", tmp_path / "outputs" / f"{run.name} (copy)"]
    for copy in copies:
        shutil.copytree(run, copy)
    (found,), printed = shown(tmp_path, capsys)
    assert found.path == run and sorted(found.copies) == sorted(copies)
    for copy in copies:
        assert printed.count(f"{copy}: is a copy of {run.name}") == 2
    assert "over seeds" not in printed


def test_the_page_is_a_regular_file_in_a_directory_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    device = os.stat("/dev/full").st_rdev
    for out, line in {
        "/dev/full": "this is a device; give a file",
        str(tmp_path / "pipe"): "this is a pipe; give a file",
        str(tmp_path): "this is a folder; give a file in it",
        str(tmp_path / "none" / "page.html"): "there is no folder",
    }.items():
        monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--out", out])
        assert report.main() == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(f"error: --out {out}: ") and line in error
    assert os.stat("/dev/full").st_rdev == device and (tmp_path / "pipe").is_fifo()


def test_two_reports_at_once_do_not_collide(tmp_path: Path) -> None:
    """Each has a temporary file of its own; one that a killed process has left goes after a day."""
    page = tmp_path / "report.html"
    (tmp_path / "report.html.0123.tmp").write_text("old")
    os.utime(tmp_path / "report.html.0123.tmp", (0, 0))
    (tmp_path / "report.html.4567.tmp").write_text("of another process")
    barrier, errors = threading.Barrier(8), []

    def write(text: str) -> None:
        try:
            with atomic_path(page) as temporary:
                barrier.wait()
                temporary.write_text(text * 100_000)
                barrier.wait()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(set(page.read_text())) == 1 and page.stat().st_size == 100_000
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.html.4567.tmp"}


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "config.yaml", "parents.json"])
def test_a_pipe_in_a_run_is_named_and_not_waited_for(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path)
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert f"{name}: this is a pipe, not a file: remove it" in read_run(run).status

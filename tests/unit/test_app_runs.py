"""What the Runs tab shows: table, curves, details; of running, hostile and deleted runs."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from written_runs import HOSTILE, ppo_rows, write_mixed, write_run, write_stage, write_sweep

pytest.importorskip("gradio", reason="the extra `app` is not installed")

from rlhf.app import data_tab, policies, runs_tab, runs_view
from rlhf.reporting.report_page import write_page
from rlhf.runs.directory import write_json
from rlhf.runs.history import read_run
from rlhf.runs.locks import lock_run
from rlhf.runs.newest import Newest
from rlhf.runs.progress import duration, progress_of
from rlhf.runs.run_files import PROGRESS, WARNINGS

NOTHING = {
    "words": "",
    "group_by": [],
    "chosen": [],
    "follow": True,
    "window": 1,
    "log_axis": False,
    "by_seed": False,
}


def column(rows: list[list[str]], name: str) -> list[str]:
    return [row[runs_view.HEADER.index(name)] for row in rows]


def test_the_table_filters_by_words_and_groups_by_settings(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    listed = runs_view.list_runs([tmp_path])
    rows = runs_view.table(listed, "", [], [listed.names[0]])
    assert len(rows) == 10 and column(rows, "")[:2] == [runs_view.CHOSEN, ""]
    assert len(set(column(rows, "run"))) == 10
    assert "failed: ppo failed, rank 0: it is broken" in column(rows, "status")
    assert any("gold 3.1" in text for text in column(rows, "metrics"))
    assert len(runs_view.table(listed, "KL.COEF=0.2 seed=3 finished", [], [])) == 1
    assert runs_view.settings_that_differ(listed.runs) == ["rl.kl.coef"]
    grouped = column(runs_view.table(listed, "finished", ["rl.kl.coef"], []), "settings")
    coefs = [text.split()[0] for text in grouped]
    assert coefs == sorted(coefs) and len(set(coefs)) == 3


def test_curves_have_a_line_with_a_band_for_each_group(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    runs = runs_view.list_runs([tmp_path]).runs
    drawing = runs_view.draw(runs, [], 1, False, False)
    titles = [title for title, _ in drawing.figures]
    assert titles[:3] == [
        "Score, weighted sum of rl.rewards",
        "Gold reward, points",
        "KL to the SFT policy, nats per response",
    ]
    kinds = [trace["meta"]["kind"] for trace in drawing.figures[0][1]["data"]]
    assert kinds == ["band", "band", "mean", "seed", "seed", "seed"] * 3
    single = runs_view.draw(runs, [], 1, False, True)
    assert [t["meta"]["kind"] for t in single.figures[0][1]["data"]] == ["mean"] * 9
    everything = runs_view.draw(runs, ["rl.gamma"], 3, True, False)
    figure = everything.figures[0][1]
    assert [t["meta"]["kind"] for t in figure["data"]][:3] == ["band", "band", "mean"]
    assert len(figure["data"]) == 3 + 9 and figure["layout"]["yaxis"]["type"] == "log"
    first, raw = figure["data"][3]["y"], drawing.figures[0][1]["data"][3]["y"]
    assert first[0] == pytest.approx((raw[0] + raw[1]) / 2, 1e-4), "a running mean over 3"


def test_the_report_and_the_app_draw_the_same_figures(tmp_path: Path) -> None:
    from rlhf.reporting.comparison import compare_runs
    from rlhf.reporting.report_figures import curves_figure, drawn_settings, subplots_of

    write_sweep(tmp_path)
    runs = runs_view.list_runs([tmp_path]).runs
    (comparison,) = compare_runs(runs, "policy")
    drawn = drawn_settings(comparison)
    expected = [curves_figure(drawn, one) for one in subplots_of(drawn, comparison.stages)]
    shown = [figure for _, figure in runs_view.draw(runs, [], 1, False, False).figures]
    assert shown == expected


def test_details_have_warnings_guards_command_and_samples_as_text(tmp_path: Path) -> None:
    run = write_run(tmp_path, gold=2.0)
    write_json(run / WARNINGS, ["KL blow-up at rollout 3: raise rl.kl.coef"])
    (run / "train.log").write_text("10:11:12 guards: log-probs differ by 1e-7\n10:11:13 other\n")
    (run / "curves.png").write_bytes(b"png")
    html = runs_view.details([read_run(run)])
    assert HOSTILE not in html and "&lt;/script&gt;" in html
    for text in (
        "KL blow-up at rollout 3",
        "guards: log-probs differ by 1e-7",
        "Repeat it",
        "fresh=true",
        "Newest evaluation, after step 12: 3 of 3 samples",
        f'href="/page{run}/curves.png"',
    ):
        assert text in html, text
    assert "other" not in html
    (run / "summary.json").unlink()
    assert "Resume it" in runs_view.details([read_run(run)])


def test_labels_are_no_markup_for_plotly(tmp_path: Path) -> None:
    for name in ("<b>x</b>", "<a href='https://example.org'>y</a>"):
        file = write_run(tmp_path, f"seed={len(name)}") / "summary.json"
        summary = json.loads(file.read_text())
        summary["settings"]["actor.path"] = name
        file.write_text(json.dumps(summary))
    listed = runs_view.list_runs([tmp_path])
    drawing = runs_view.draw(listed.runs, [], 1, False, False)
    assert "<a href='https" not in drawing.legend and "<b>x" not in drawing.legend
    names = [trace["name"] for _, figure in drawing.figures for trace in figure["data"]]
    assert any("&lt;/a&gt;" in name for name in names) and not any("<" in n for n in names)


def test_a_running_run_has_progress_and_time_left(tmp_path: Path) -> None:
    rows = [{**row, "time": 100.0 + 2 * row["step"]} for row in ppo_rows(1.0, 10)]
    run = write_stage(tmp_path, "ppo", [], rows, None)
    write_json(run / PROGRESS, {"steps": 40})
    with lock_run(run):
        progress = progress_of(read_run(run))
        assert (str(progress), progress.time_left) == ("10/40", "60 s")
        rows[5]["time"] -= 36_000  # it was stopped for ten hours, or its clock was set back
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert progress_of(read_run(run)).time_left == "60 s"
        listed = runs_view.list_runs([tmp_path])
        (row,) = runs_view.table(listed, "", [], [])
        assert "running" in row and "objective/scores 0.9" in " ".join(row)
        now = runs_tab.state_of(listed, **NOTHING)
        assert len(now["figures"]) == 9 and now["table"][0][0] == runs_view.CHOSEN
    assert str(progress_of(read_run(run))) == "10/40" and not progress_of(read_run(run)).time_left
    assert [duration(s) for s in (40, 700, 12600)] == ["40 s", "12 min", "3.5 h"]


def test_a_run_that_is_deleted_while_it_is_shown_breaks_nothing(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"seed={seed}") for seed in (1, 2)]
    listed = runs_view.list_runs([tmp_path])
    chosen = listed.names
    shutil.rmtree(runs[0])
    assert runs_view.details(listed.runs) and runs_view.draw(listed.runs, [], 1, False, False)
    assert len(runs_view.table(listed, "", [], [])) == 2
    now = runs_tab.state_of(runs_view.list_runs([tmp_path]), **NOTHING | {"chosen": chosen})
    assert len(now["chosen"]) == 1 and "no longer there: ppo-" in now["note"]
    shutil.rmtree(tmp_path / "outputs")
    now = runs_tab.state_of(runs_view.list_runs([tmp_path]), **NOTHING | {"chosen": chosen})
    assert now["table"] == [] and "No runs yet" in now["note"]


def test_a_line_says_that_a_run_is_gone_until_another_choice(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"seed={seed}") for seed in (1, 2)]
    update = runs_tab.updater([tmp_path])
    name = read_run(runs[0]).short_name

    def look(before: dict[str, Any], chosen: list[str]) -> tuple[str, dict[str, Any]]:
        sent = update(before, *(NOTHING | {"chosen": chosen}).values())
        return "".join(text for text in sent if isinstance(text, str)), sent[-1]

    _, before = look({}, [name])
    shutil.rmtree(runs[0])
    text, before = look(before, [name])
    assert f"no longer there: {name}" in text and before["chosen"] == []
    _, before = look(before, [])  # the list of chosen runs has changed by that
    assert before["gone"] == [name]
    _, before = look(before, [read_run(runs[1]).short_name])
    assert before["gone"] == []

    write_run(tmp_path, "seed=1", finished=False)
    with lock_run(runs[0]):
        _, before = look(before, [])
    shutil.rmtree(runs[0])
    text, _ = look(before, [])
    assert f"no longer there: {name}" in text, "it was running, and not chosen"


def test_names_that_are_not_utf8_are_shown_without_links(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"seed={seed}") for seed in (1, 2)]
    (runs[0] / "summary.json").rename(runs[0] / "gone.json")
    bad = [tmp_path / "outputs" / os.fsdecode(b"ppo-bad%d\xff" % i) for i in range(2)]
    for run, other in zip(runs, bad):
        run.rename(other)
        (other / "curves.png").write_bytes(b"png")
        (other / "model").mkdir()
    (bad[1] / "config.yaml").write_text("{")  # its status is that of its summary
    broken = bad[0].with_name(os.fsdecode(b"inspect-\xff"))
    bad[0].with_name(broken.name).mkdir()
    (broken / "report.html").write_text("page")
    listed = runs_view.list_runs([tmp_path])
    assert sorted(listed.names) == ["ppo-bad0\ufffd", "ppo-bad1\ufffd"]
    now = runs_tab.state_of(listed, **NOTHING | {"chosen": listed.names})
    json.dumps(now, ensure_ascii=False).encode()  # as it is sent
    assert "ppo-bad0\ufffd" in now["details"] and "curves.png" in now["details"]
    assert "<a href" not in now["details"]
    text = write_page(listed.runs, tmp_path / "report.html", "runs").read_text()
    assert "ppo-bad0\ufffd" in text and '<a href="outputs' not in text
    assert policies.choices([tmp_path]) == ([], []) and data_tab.page_choices([tmp_path]) == []
    assert "no page there" in data_tab.frame_of(str(broken / "report.html"), [tmp_path])


def test_a_run_with_one_step_is_a_mark(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_run(tmp_path, f"seed={seed}", steps=1)
    runs = runs_view.list_runs([tmp_path]).runs
    data = runs_view.draw(runs, [], 1, False, False).figures[0][1]["data"]
    modes = {trace["meta"]["kind"]: trace["mode"] for trace in data}
    assert modes == {"band": "lines", "mean": "lines+markers", "seed": "lines+markers"}


def test_progress_is_never_more_than_the_total(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=2, finished=False)
    write_json(run / PROGRESS, {"steps": 3})
    with open(run / "metrics.jsonl", "a") as file:
        file.write("no row\n" * 790)
    assert str(progress_of(read_run(run))) == "2/3"
    with open(run / "metrics.jsonl", "a") as file:
        file.write("{no row\n" * 790)
    assert str(progress_of(read_run(run))) == "2/3"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2}\n' * 8)
    assert str(progress_of(read_run(run))) == "3/3"


def test_why_a_run_is_unreadable_is_below_the_table(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").write_text("{")
    listed = runs_view.list_runs([tmp_path])
    assert column(runs_view.table(listed, "", [], []), "status") == ["unreadable"]
    assert f"unreadable: {run}/summary.json: " in runs_view.details(listed.runs)


def test_runs_of_all_stages_and_damaged_ones_are_shown(tmp_path: Path) -> None:
    runs = write_mixed(tmp_path)
    (runs[0] / "summary.json").write_text("{")
    (runs[1] / "metrics.jsonl").write_text("no json\n")
    listed = runs_view.list_runs([tmp_path])
    assert len(listed.runs) == len(runs) == len(runs_view.table(listed, "", [], []))
    drawing = runs_view.draw(listed.runs, [], 1, False, False)
    assert len(drawing.figures) == runs_view.MAX_FIGURES and drawing.hidden > 0
    assert "unreadable" in runs_view.details(listed.runs[::-1])


def test_only_what_has_changed_is_sent(tmp_path: Path) -> None:
    import gradio

    run = write_run(tmp_path, finished=False)
    update = runs_tab.updater([tmp_path])
    name = runs_view.list_runs([tmp_path]).names
    values = list((NOTHING | {"chosen": name}).values())
    *first, before = update({}, *values)
    *second, before = update(before, *values)
    assert second == [gradio.skip()] * len(first)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 13, "objective/scores": 9.0}) + "\n")
    *third, before = update(before, *values)
    sent = [update for update in third if update != gradio.skip()]
    assert 0 < len(sent) < len(first) and any("13" in str(update) for update in sent)


def test_five_hundred_runs_are_listed_in_a_second(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for i in range(499):
        shutil.copytree(run, run.with_name(f"ppo-tiny-{i:08x}"))
    for copy in (tmp_path / "outputs").iterdir():
        file = copy / "summary.json"
        summary = json.loads(file.read_text())
        file.write_text(json.dumps(summary | {"id": copy.name}))
    seconds = []
    for _ in range(3):
        start = time.process_time()
        listed = runs_view.list_runs([tmp_path])
        assert len(runs_view.table(listed, "", [], [])) == 500
        seconds.append(time.process_time() - start)
    print("seconds of a look at 500 runs:", seconds)
    assert min(seconds[1:]) < 1, "later looks read no file again"


def test_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    file, newest = tmp_path / "a", Newest[str]()
    file.write_text("one")
    assert newest.get(file, [file], file.read_text) == "one"
    assert newest.get(file, [file], lambda: "not read") == "one"
    file.write_text("three")
    assert newest.get(file, [file], file.read_text) == "three"
    file.unlink()
    assert newest.get(file, [file], lambda: "gone") == "gone"

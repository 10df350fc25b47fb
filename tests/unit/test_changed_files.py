"""Data files that have changed since a run was trained on them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import command

from rlhf.data.changed_files import changed_files, sizes_and_times
from rlhf.run import is_finished
from rlhf.runs.directory import write_json
from rlhf.runs.identity import run_dir_for
from rlhf.runs.inputs import Inputs


def test_a_finished_run_says_that_its_data_have_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("{}\n")
    typed = ["stage=sft", "data=jsonl", f"data.sources.mine.path={pairs}", f"root={tmp_path}"]
    sft = command(*typed)
    data, directory = sft.cfg.data, run_dir_for(sft, "sft")
    before = sizes_and_times(data)
    assert list(before) == [str(pairs)]
    directory.mkdir(parents=True)
    summary = {"id": "a", "status": "finished", "parents": {}, "data_files": before}
    write_json(directory / "summary.json", summary)

    def said() -> str:
        assert is_finished(sft, "sft", directory, Inputs())
        return capsys.readouterr().err

    assert "not trained on" not in said()
    pairs.write_text("{}\n{}\n")
    assert "sft: not trained on what is in pairs.jsonl now (another size or time)" in said()
    pairs.write_text("[]\n")  # as many bytes
    os.utime(pairs, (1, 1))
    assert "not trained on what is in pairs.jsonl" in said()
    write_json(directory / "summary.json", {"id": "a", "parents": {}})  # of an earlier version
    assert "not trained on" not in said()


def test_a_folder_that_was_moved_has_not_changed(tmp_path: Path) -> None:
    file = tmp_path / "old" / "pairs.jsonl"
    file.parent.mkdir()
    file.write_text("{}\n")
    path = "data.sources.mine.path={}/{}/*.jsonl"
    before = sizes_and_times(command("data=jsonl", path.format(tmp_path, "old")).cfg.data)
    file.parent.rename(tmp_path / "new")
    moved = command("data=jsonl", path.format(tmp_path, "new")).cfg.data
    assert changed_files(before, moved) == []
    more = tmp_path / "new" / "more.jsonl"
    more.write_text("{}\n")
    assert changed_files(before, moved) == ["more.jsonl"]
    with_it = sizes_and_times(moved)
    more.unlink()
    assert changed_files(with_it, moved) == ["more.jsonl"], "it is not there any more"


def test_a_file_of_held_out_rows_has_changed(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    paths = [f"data.sources.mine.path={tmp_path}/train.jsonl"]
    data = command("data=jsonl", *paths, f"data.sources.mine.eval_split={tmp_path}/test.jsonl").cfg
    before = sizes_and_times(data.data)
    (tmp_path / "test.jsonl").write_text("{}\n{}\n")
    assert changed_files(before, data.data) == ["test.jsonl"]

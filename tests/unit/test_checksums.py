"""SHA256SUMS beside what is saved: every changed file is named, as the program sha256sum does."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.checksums import SUMS, check_model, damaged_files, read_sums
from rlhf.base.errors import UserError
from rlhf.base.files import atomic_path
from rlhf.models.loading import save_engine
from rlhf.runs.locks import LOCK_FILE, lock_run


@pytest.fixture(scope="module")
def saved(actor: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_engine(actor, tokenizer, directory)
    return directory


def test_the_standard_program_agrees(saved: Path) -> None:
    there = {file.name for file in saved.iterdir()} - {SUMS}
    assert read_sums(saved).keys() == there and "model.safetensors" in there
    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", SUMS], cwd=saved, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_each_changed_file_is_named(saved: Path) -> None:
    check_model(saved)
    for name in read_sums(saved):
        file = saved / name
        before = file.read_bytes()
        for content in (before[:-1], b"", bytes(len(before)), bytes([before[0] ^ 1]) + before[1:]):
            file.write_bytes(content)
            assert damaged_files(saved) == [name]
            with pytest.raises(UserError, match=f"{name}: it is not the file that was saved"):
                check_model(saved)
        file.unlink()
        assert damaged_files(saved) == [name]
        file.write_bytes(before)
    check_model(saved)


def test_a_model_without_sums_or_with_a_new_file_is_taken_as_it_is(saved: Path) -> None:
    (saved / "README.md").write_text("a card")
    check_model(saved)
    sums = (saved / SUMS).read_text()
    (saved / SUMS).unlink()
    (saved / "config.json").touch()
    check_model(saved)
    (saved / SUMS).write_text(sums)


def test_damaged_sums_are_damage(saved: Path) -> None:
    sums = (saved / SUMS).read_bytes()
    for at in range(0, len(sums), 37):
        (saved / SUMS).write_bytes(sums[:at] + bytes([sums[at] ^ 1]) + sums[at + 1 :])
        assert damaged_files(saved), at
    (saved / SUMS).write_bytes(sums)


@pytest.mark.parametrize(
    "lines", ["0" * 64 + "  /dev/zero\n", "0" * 64 + "  ../secret\n", "0" * 64 + "  a\0b\n", "\xff"]
)
def test_hostile_sums_are_damage_and_nothing_else_is_read(tmp_path: Path, lines: str) -> None:
    (tmp_path / SUMS).write_text(lines, encoding="latin-1")
    assert damaged_files(tmp_path)


@pytest.mark.parametrize("what", ["folder", "pipe", "loop"])
def test_sums_or_files_that_are_no_files_are_damage(tmp_path: Path, what: str) -> None:
    make = {
        "folder": Path.mkdir,
        "pipe": os.mkfifo,
        "loop": lambda path: path.symlink_to(path),
    }[what]
    make(tmp_path / SUMS)
    assert damaged_files(tmp_path) == [SUMS]
    other = tmp_path / "model"
    other.mkdir()
    make(other / "weights")
    (other / SUMS).write_text("0" * 64 + "  weights\n")
    assert damaged_files(other) == ["weights"]


def test_a_file_and_a_folder_replace_each_other(tmp_path: Path) -> None:
    place = tmp_path / "model"
    for is_folder in (True, False, True, True, False, False):
        with atomic_path(place) as temporary:
            temporary.mkdir() if is_folder else temporary.write_text("x")
        assert place.is_dir() == is_folder and [*tmp_path.iterdir()] == [place]


def test_what_is_in_the_way_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "owned" / LOCK_FILE).mkdir(parents=True)
    for directory in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "owned"):
        with pytest.raises(UserError, match="no run can be in .* root=DIR"), lock_run(directory):
            pass

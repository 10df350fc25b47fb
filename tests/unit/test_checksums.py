"""SHA256SUMS beside what is saved: every changed file is named, as the program sha256sum does."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.checksums import SUMS, check_model, damaged_files, read_sums
from rlhf.base.errors import UserError
from rlhf.models.loading import save_engine


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

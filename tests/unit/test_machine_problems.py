"""What a machine runs out of or forbids is named, and another user's files are not touched."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.base.errors import UserError, machine_problem
from rlhf.base.files import private_folder
from rlhf.runs.failures import Failure, read_failures, write_failure
from rlhf.runs.locks import LOCK_FILE, is_locked, lock_run


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(28, "No space left on device", "x"), "the disk is full"),
        (OSError(122, "Disk quota exceeded", "x"), "the disk quota is used up"),
        (OSError(24, "Too many open files"), "too many open files (ulimit -n)"),
        (RuntimeError("gloo: device.cc:186] -1 vs -1. Too many open files"), "(ulimit -n)"),
        (ValueError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (RuntimeError("can't start new thread"), "(ulimit -u)"),
        (caused(RuntimeError("cannot write"), OSError(27, "File too large")), "(ulimit -f)"),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79"),
            "out of GPU memory: CUDA out of memory",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            "deploy.activation_checkpointing=true",
        ),
        (RuntimeError("CUDA driver error: out of memory"), "out of GPU memory: CUDA driver error"),
        (
            RuntimeError(
                "NCCL error, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"
            ),
            "out of GPU memory: Cuda failure 2",
        ),
        (OSError(2, "No such file or directory", "x"), None),
        (ConnectionError("Resource temporarily unavailable"), None),
        (RuntimeError(""), None),
    ],
)
def test_what_a_machine_has_run_out_of_is_named(error: Exception, expected: str | None) -> None:
    problem = machine_problem(error)
    assert (problem is None) == (expected is None)
    assert expected is None or (expected in str(problem) and "continues" in str(problem))


def fail(run_dir: Path, error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        write_failure(run_dir, "0", raised)


def test_a_failure_is_told_where_its_file_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fail(tmp_path, OSError(28, "No space left on device"))
    assert read_failures(tmp_path)[0].is_user_error
    fail(tmp_path / "missing", ValueError("why"))
    assert capsys.readouterr().err == "rank 0: ValueError: why\n"


def test_an_empty_or_foreign_error_file_hides_no_failure(tmp_path: Path) -> None:
    contents = [b"", b"\n", b"\xff\xfe", b"rank 3", b"rank 4: ValueError: no\n\nTraceback"]
    for rank, content in enumerate(contents):
        (tmp_path / f"error-rank{rank}.txt").write_bytes(content)
    *unknown, last = read_failures(tmp_path)
    assert last == Failure("4", "ValueError", "no")
    assert [failure.rank for failure in unknown] == ["?"] * 4


def test_a_folder_that_others_prepared_is_refused(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    mine = tmp_path / "mine"
    assert private_folder(mine) == private_folder(mine) and mine.stat().st_mode & 0o777 == 0o700
    link, open_to_all = tmp_path / "link", tmp_path / "open"
    link.symlink_to(victim)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    (tmp_path / "file").touch()
    for folder in (link, open_to_all, tmp_path / "file"):
        with pytest.raises(OSError):
            private_folder(folder)
    if os.getuid() == 0:
        os.chown(victim, 12345, -1)
        with pytest.raises(OSError, match="only you"):
            private_folder(victim)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Lustre without its option flock."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    line = f"{tmp_path / LOCK_FILE}: this file system has no locks .*: set root="
    with pytest.raises(UserError, match=line), lock_run(tmp_path):
        pass
    assert not is_locked(tmp_path)


def test_a_lock_holds_when_its_file_is_deleted(tmp_path: Path) -> None:
    """A real second process, which must not train the same run."""
    code = (
        "import sys; from pathlib import Path; from rlhf.runs.locks import lock_run\n"
        "with lock_run(Path(sys.argv[1])): print('two trainers')"
    )
    second = [sys.executable, "-c", code, str(tmp_path)]
    with lock_run(tmp_path):
        for _ in range(2):
            done = subprocess.run(second, capture_output=True, text=True)
            assert "is being trained by another process" in done.stderr and not done.stdout
            assert is_locked(tmp_path)
            (tmp_path / LOCK_FILE).unlink()
        with pytest.raises(UserError, match="its file .owner was deleted"), lock_run(tmp_path):
            pass
    assert not is_locked(tmp_path)
    assert subprocess.run(second, capture_output=True, text=True).stdout == "two trainers\n"

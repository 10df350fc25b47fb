"""Write files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from rlhf.base.errors import UserError

UMASK = os.umask(0)  # which can only be read by setting it
os.umask(UMASK)
OLD = 86400.0  # s

SMALL_FILE = 16 * 2**20  # bytes; the files that are read as a whole are smaller
SPECIAL = {  # what is no file to read or replace: reading it would wait, or never end
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def special_kind(path: Path) -> str:
    """What a path is that is neither a file nor a folder: "a device"; "" for others, and where
    nothing is there."""
    try:
        return SPECIAL.get(stat.S_IFMT(path.stat().st_mode), "")
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""


def why_not_small_file(path: Path, most: int = SMALL_FILE) -> str:
    """Why a path cannot be read as a whole: "this is a folder"; "" where it can.

    Args: most: bytes that it may have.
    """
    if kind := special_kind(path):
        return f"this is {kind}, not a file"
    if path.is_dir():
        return "this is a folder, not a file"
    if path.is_file() and (size := path.stat().st_size) > most:
        return f"it has {size / 2**20:,.1f} MiB; such a file has at most {most // 2**20} MiB"
    return ""


def read_small_file(path: Path, most: int = SMALL_FILE, errors: str = "strict") -> str:
    """The text of a file that the user names, which is UTF-8.

    Args: most: bytes that it may have.  errors: as of open().
    Raises: OSError, and ValueError for what is no text or no small file.
    """
    if problem := why_not_small_file(path, most):
        raise ValueError(problem)
    return path.read_text(encoding="utf-8", errors=errors)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, it is renamed to `path`.

    The block writes a file or makes a directory there. Its name is new each time: several processes
    may write the same `path`, and the last one wins. After an exception the temporary path is
    deleted and `path` is as it was. An existing directory at `path` is replaced. Files get the
    permissions that the umask gives new files. What a killed process has left is deleted after a
    day.

    Raises: UserError where `path` is a device or the like, which a file would replace.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: is no regular file, and is not replaced; give another name")
    remove_old(path)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        allow_others(temporary)
        if path.is_dir() or temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def private_folder(folder: Path) -> Path:
    """Make a folder that only this user may write to.

    Raises: OSError where it is another user's, or a link, or others can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.lstat()
    others_write = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or others_write:
        raise OSError(
            f"{folder}: it must be a folder that only you can write to: chmod go-w, or delete it"
        )
    return folder


def remove_old(path: Path) -> None:
    """Delete the temporary files of `path` that a killed process has left."""
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # another process has just renamed it
            if left.stat().st_mtime < time.time() - OLD:
                remove(left)


def allow_others(path: Path) -> None:
    """Give a file, or all files of a directory, the permissions that the umask gives new files.

    safetensors writes through a temporary file, which only its owner may read.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | (0o666 & ~UMASK))


def remove(path: Path) -> None:
    """Delete a file or directory, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

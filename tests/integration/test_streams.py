"""Standard streams that are closed or full, other locales, and a home that cannot be written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from data_files import rows
from helpers import REPO, TRAIN, train

from rlhf.base.errors import UserError, machine_problem
from rlhf.data.cache import cache_folder

FULL = "error: cannot write to standard output: No space left on device\n"


def shell(redirections: str, argument: str = "--help", **env: str) -> tuple[int, str]:
    """train.py with redirections of a shell. Returns: exit code, and what is on stderr."""
    command = f"{shlex.quote(sys.executable)} {TRAIN} {argument} {redirections}"
    done = subprocess.run(
        command, shell=True, env=os.environ | env, capture_output=True, encoding="utf-8"
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "redirections, expected",
    [
        (">&-", (0, "")),
        (">&- 2>&- <&-", (0, "")),
        (">/dev/full", (1, FULL)),
        (">/dev/full 2>/dev/full", (1, "")),
    ],
)
def test_help_with_streams_that_are_closed_or_full(
    redirections: str, expected: tuple[int, str], unbuffered: str
) -> None:
    assert shell(redirections, PYTHONUNBUFFERED=unbuffered) == expected


def test_a_wrong_command_with_nowhere_to_say_so() -> None:
    assert shell("2>/dev/full", "sft.lr=x") == (2, "")
    assert shell("2>&-", "sft.lr=x") == (2, "")


@pytest.mark.parametrize(
    "program",
    [
        [str(REPO / "train.py")],
        [str(REPO / "chat.py")],
        *(["-m", f"rlhf.{name}"] for name in ("report", "app", "dashboard", "planning")),
    ],
    ids=lambda words: Path(words[-1]).name,
)
def test_a_current_folder_that_was_deleted(tmp_path: Path, program: list[str]) -> None:
    (tmp_path / "gone").mkdir()
    words = shlex.join([sys.executable, *program])
    done = subprocess.run(
        f"rmdir ../gone; {words}",
        shell=True,
        cwd=tmp_path / "gone",
        capture_output=True,
        text=True,
    )
    line = "error: the current folder was deleted: cd to another one\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, line, "")


@pytest.mark.skipif(
    subprocess.run("unshare -rn true", shell=True, capture_output=True).returncode != 0,
    reason="no network namespaces here",
)
def test_a_sandbox_without_a_loopback_device(tmp_path: Path) -> None:
    command = ["unshare", "-rn", sys.executable, REPO / "train.py", "stage=sft"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    line = (
        "error: processes of this machine cannot meet at 127.0.0.1 (Network is unreachable): turn "
        "its loopback device on (ip link set lo up)"
    )
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == line


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    code, stderr = shell("", "stage=café", LC_ALL="C", PYTHONUTF8="0")
    assert code == 2 and "'stage=caf\\udcc3" in stderr and stderr.count("\n") == 1


def test_data_are_read_and_reported_in_an_ascii_locale(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(row | {"prompt": f"{row['prompt']} 日本"}) for row in rows(*range(60))]
    file.write_text("\n".join(lines).replace("\\u65e5\\u672c", "日本"), encoding="utf-8")
    command = ["stage=inspect", "data=jsonl", f"data.sources.mine.path={file}"]
    done = train(*command, cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("outputs/inspect-*/report.html")
    assert "本" in page.read_text(encoding="utf-8")


def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="Not a directory.*: set HOME, or HF_DATASETS_CACHE"):
        cache_folder()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_user_without_a_home_folder_gets_one_line() -> None:
    """As with docker run --user 54321."""
    code = (
        "import os; from rlhf.base.errors import UserError; from rlhf.runs.checks import check_home"
    )
    code += "\ndel os.environ['HOME']\nos.setuid(54321)\ntry: check_home()"
    code += "\nexcept UserError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True
    )
    line = "there is no home folder: HOME is not set, and this machine does not know the user 54321"
    assert done.stdout == f"{line}; set HOME to a folder that can be written\n"


@pytest.mark.parametrize(
    "message",
    [
        "Unable to allocate 246. GiB for an array with shape (33000000000,) and data type int64",
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried",
    ],
)
def test_memory_that_is_used_up_gets_the_keys_that_need_less(message: str) -> None:
    line = machine_problem(RuntimeError(message))
    assert line and line.startswith("the memory is used up (plan=true shows what is needed")
    assert "deploy.micro_batch" in line and message in line


@pytest.mark.parametrize("protected", [True, False])
def test_work_goes_on_when_its_terminal_is_closed(protected: bool) -> None:
    """A closed terminal refuses what is written to it, as a progress bar does all the time."""
    wrap = "sys.stderr = StderrThatMayClose(sys.stderr)" if protected else ""
    code = f"""
import sys
from rlhf.base.streams import StderrThatMayClose
{wrap}
sys.stdin.readline()
for _ in range(3):
    sys.stderr.write("10 %")
    sys.stderr.flush()
print("done", flush=True)
"""
    master, terminal = os.openpty()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    work = subprocess.Popen(command, cwd=REPO, stderr=terminal, text=True, **pipes)
    os.close(terminal)
    os.close(master)
    assert (work.communicate("go\n", timeout=60)[0] == "done\n") == protected

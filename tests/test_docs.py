"""Every command of the README runs. Those that need a GPU or a hub are composed and checked (`--cfg job`)."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, SMALL, Demo, train
from test_sweep import SWEEP  # runs there

BLOCKS = re.findall(r"```bash\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
FAR = ("opt1.3b", "opt125m", "gpu")  # needs a GPU, or a model from the hub


def test_the_readme_is_short_and_has_commands() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 250
    assert len(COMMANDS) >= 15 and SWEEP in COMMANDS
    assert all(command.startswith(("python train.py", "python chat.py", "make ")) for command in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets(command: str) -> None:
    """What they run is what the other tests run; here, that they exist and are set up."""
    done = subprocess.run([*shlex.split(command), "-n"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and {"make demo": "train.py", "make test": "pytest"}[command] in done.stdout


TRAINING = [c for c in COMMANDS if c.startswith("python train.py") and c != SWEEP]


@pytest.mark.parametrize("command", [pytest.param(c, marks=pytest.mark.full if "experiment" in c else []) for c in TRAINING])
def test_training_commands(command: str, tmp_path: Path) -> None:
    args = shlex.split(command)[2:]
    if any(word in command for word in FAR) and "--cfg" not in args:
        done = train(*args, "--cfg", "job", cwd=tmp_path)
    elif "--help" in args or "--cfg" in args:
        done = train(*args, cwd=tmp_path)
    else:
        done = train(*args, *[o for o in SMALL if o.split("=")[0] not in command], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python chat.py")])
def test_chat_commands(command: str, demo: Demo) -> None:
    args = [sys.executable, str(REPO / "chat.py"), *shlex.split(command)[2:]]
    done = subprocess.run(args, cwd=demo.root, env=os.environ, input="Hello there\n/quit\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_links_and_named_files_exist() -> None:
    for page in (REPO / "README.md", REPO / "CONTRIBUTING.md", *(REPO / "docs").glob("*.md")):
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:rlhf|conf|tests|docs)/[\w./*-]+)`", text):
            assert "NAME" in path or list(REPO.glob(path.rstrip("/"))), f"{page.name}: {path}"


def test_every_logged_metric_is_documented(demo: Demo) -> None:
    import json

    page = (REPO / "docs" / "wandb.md").read_text()
    for run in (demo.sft, demo.rm, demo.ppo):
        logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        final = json.loads((run / "summary.json").read_text())["metrics"]
        for name in {*logged, *final} - {"step", "time"}:
            short = "`_" + name.rsplit("_", 1)[-1] + "`"  # families are written `objective/scores`, `_std`
            family = "`timing_s/*`" if name.startswith("timing_s/") else f"`{name}`"
            assert family in page or (short in page and f"`{name.rsplit('_', 1)[0]}`" in page), name

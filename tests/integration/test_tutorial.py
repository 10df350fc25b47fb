"""docs/tutorial.md: its commands run in order, in one folder, as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, composed, page_commands, runs_in, summary

from rlhf.data.load import load_data

PAGE = REPO / "docs" / "tutorial.md"
COMMANDS = page_commands(PAGE)
# make test looks at data and plans; make test-all also trains
LATER = re.compile(r"pairs.csv|stage=eval|-m |chat.py|pipeline=dpo|experiment=first stage=\w+$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader works: the repository's files, and those that the page tells to write."""
    root = tmp_path_factory.mktemp("tutorial")
    for name in ("docs", "train.py", "chat.py"):
        (root / name).symlink_to(REPO / name)
    for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (name,) = re.findall(r"^# (my_options/\S+)$", text, re.MULTILINE)
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.full if LATER.search(c) else []) for c in COMMANDS],
)
def test_the_commands_in_their_order(command: str, folder: Path) -> None:
    words = shlex.split(command)
    assert words[0] == "python"
    usual = {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=os.environ | usual,
        input="How do I clean a kite?\n/quit\n",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    if command == COMMANDS[0]:
        (longer,) = re.findall(r"longer in (\d+)% of the pairs", done.stdout)
        assert f"*chosen longer*, here {longer} %" in PAGE.read_text()
    if "stage=ppo" in words and "plan=true" not in words:
        (sft,), (rm,), (ppo,) = (runs_in(folder)[stage] for stage in ("sft", "rm", "ppo"))
        # what the page says of them
        assert summary(sft)["metrics"]["eval/eos_rate"] >= 0.8
        assert summary(rm)["metrics"]["eval/accuracy"] >= 0.75
        rewards = summary(ppo)["metrics"]
        assert rewards["eval/score"] > rewards["eval/score_before"]


def test_the_numbers_of_the_page_are_those_of_the_pairs_that_ship(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (row,) = re.findall(r"```json\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
    lines = (REPO / "docs" / "examples" / "pairs.jsonl").read_text().splitlines()
    page = " ".join(PAGE.read_text().split())
    assert row in lines and f"({len(lines)} short pairs" in page
    mine = ["stage=sft", "data=jsonl", "data.sources.mine.path=docs/examples/pairs.jsonl"]
    data = load_data(composed(*mine).data)
    assert f"Here {len(data.sft)} of {len(lines)} rows are left" in page
    data = load_data(composed(*mine, "data.eval_share=0.2").data)
    rollouts = len(data.ppo) // 32 * 5
    assert f"5 passes over {len(data.ppo)} prompts: {rollouts} rollouts of 32" in page
    assert f"With {len(data.eval_prompts)} held-out prompts" in page

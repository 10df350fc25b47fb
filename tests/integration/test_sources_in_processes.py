"""Several processes read the same files at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from data_files import jsonl, rows
from helpers import REPO, metrics, runs_in, summary, train

pytestmark = pytest.mark.full


def test_two_processes_train_on_a_file(tmp_path: Path) -> None:
    """D4, D6: one of them prepares, the other waits; both read the same."""
    file = jsonl(tmp_path / "a.jsonl", rows(*range(400)))
    source = [
        "stage=sft",
        "data=jsonl",
        f"data.sources.mine.path={file}",
        "data.eval_share=0.1",
        "data.max_response_tokens=16",
    ]
    done = train(
        *source,
        "sft.max_steps=2",
        "deploy.processes_per_node=2",
        "wandb.mode=disabled",
        cwd=tmp_path,
        HF_DATASETS_CACHE=str(tmp_path / "own"),
    )
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)["sft"]
    assert summary(run)["status"] == "finished" and len(metrics(run)) == 2


PREPARE = """
import hashlib, sys
sys.path.insert(0, "tests")
import datasets
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
from helpers import composed
from rlhf.config.schema import Source
from rlhf.config.choices import Template
from rlhf.data import sources, tokenized
from rlhf.models.loading import load_tokenizer
settings = composed("data.eval_share=0.1", "data.eval_rows=10000").data
settings.sandbox, settings.sources = None, {"mine": Source(path=sys.argv[1])}
data = sources.load_sources(settings)
rows = tokenized.pairs(load_tokenizer("builtin:tiny", Template.hh), data.rm, 99, 99)
print(len(rows), hashlib.sha256(str(list(rows)).encode()).hexdigest())
"""


def test_two_processes_prepare_the_same_at_once(tmp_path: Path) -> None:
    """T15, D4, D6."""
    file = jsonl(tmp_path / "a.jsonl", rows(*range(3000)))
    command = [sys.executable, "-c", PREPARE, str(file), str(tmp_path / "cache")]
    both = [
        subprocess.Popen(
            command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0] and int(said[0][0].split()[0]) > 900
    assert len(list((tmp_path / "cache" / "rlhf").glob("*/rows*.arrow"))) == 2

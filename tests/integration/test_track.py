"""Weights & Biases in offline mode, read back with its own reader; what mode=auto decides;
pictures."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from helpers import Demo, metrics, read_offline_run, summary

from rlhf.base.wandb_login import wandb_problem


def test_an_offline_run_holds_every_row_on_one_axis(demo: Demo) -> None:
    for run in (demo.sft, demo.ppo):
        records = [json.loads(line) for line in read_offline_run(run).splitlines()]
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        logged = metrics(run)
        by_step = {item["step"]: item for item in items if "completions._type" not in item}
        assert sorted(by_step) == [row["step"] for row in logged]
        for row in logged:
            for key, value in row.items():
                if key not in ("step", "time"):
                    assert by_step[row["step"]][key] == pytest.approx(value, nan_ok=True)
        assert any("completions._type" in item for item in items), "a table of completions"


def test_an_offline_run_is_grouped_and_named(demo: Demo) -> None:
    for stage, run in (("sft", demo.sft), ("rm", demo.rm), ("ppo", demo.ppo)):
        text = read_offline_run(run, "--summary")
        for word in (run.name, "default", stage, "tiny", "sandbox", (run / "wandb_id").read_text()):
            assert word in text, word


def test_run_ids_are_random(demo: Demo) -> None:
    ids = [(run / "wandb_id").read_text() for run in (demo.sft, demo.rm, demo.ppo)]
    assert len(set(ids)) == 3 and all(len(i) == 12 for i in ids)
    assert len({summary(run)["id"] for run in (demo.sft, demo.rm, demo.ppo)}) == 3


def test_curves_are_pictures_with_ink(demo: Demo) -> None:
    from matplotlib import image

    pictures = [
        *(run / "curves.png" for run in (demo.sft, demo.rm, demo.ppo)),
        demo.ppo / "frontier.png",
    ]
    for picture in pictures:
        pixels = image.imread(picture)
        assert pixels.shape[1] > 600 and pixels.std() > 0.05


def test_samples_are_kept(demo: Demo) -> None:
    rows = [json.loads(line) for line in (demo.ppo / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 256
    assert {
        "step",
        "prompt",
        "before",
        "after",
        "score_before",
        "score_after",
        "gold_before",
        "gold_after",
        "kl",
    } <= set(rows[0])


def test_auto_is_offline_without_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert "there is no key" in wandb_problem("https://127.0.0.1:1")


def test_auto_never_waits_for_a_dead_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert "does not answer" in wandb_problem("http://127.0.0.1:9"), "nobody listens there"
    with socket.socket() as full:  # a server that never answers: its queue is full
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        started = time.time()
        assert wandb_problem(f"http://127.0.0.1:{full.getsockname()[1]}")
        assert 1 < time.time() - started < 6  # promised: 2
        for client in waiting:
            client.close()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        assert not wandb_problem(f"http://127.0.0.1:{server.getsockname()[1]}")

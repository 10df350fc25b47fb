"""curves.png is drawn while a run trains, by a process of its own."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from written_runs import write_run

from rlhf.training import curves_on_the_way
from rlhf.training.curves_on_the_way import CurvesOnTheWay


def test_the_picture_is_drawn_once_a_minute_and_disturbs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, finished=False)
    drawing = CurvesOnTheWay(run, "ppo")
    drawing.draw_when_due()
    assert drawing.process is None, "the first one after a minute"
    monkeypatch.setattr(curves_on_the_way, "EVERY", 0.0)
    # it has the lowest priority: beside other work it may take minutes
    monkeypatch.setattr(curves_on_the_way, "PATIENCE", 600.0)
    before = random.getstate(), np.random.get_state()[1].tolist()
    start = time.perf_counter()
    drawing.draw_when_due()
    print(f"to start drawing took {time.perf_counter() - start:.3f} s of the training")
    process = drawing.process
    drawing.draw_when_due()
    assert drawing.process is process, "one at a time"
    drawing.stop()
    assert process and process.returncode == 0
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in run.glob("*.tmp")] == []
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_run_that_is_deleted_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves_on_the_way, "EVERY", 0.0)
    drawing = CurvesOnTheWay(tmp_path / "gone", "sft")
    drawing.draw_when_due()
    drawing.stop()
    evaluation = CurvesOnTheWay(tmp_path, "eval")
    evaluation.draw_when_due()
    assert evaluation.process is None, "nothing to draw"

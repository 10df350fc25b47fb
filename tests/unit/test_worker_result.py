"""The result of a finished run does not depend on its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import composed

from rlhf.reporting import curves
from rlhf.worker import write_result


def test_a_run_whose_curves_cannot_be_drawn_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("eval/score")

    monkeypatch.setattr(curves, "plot_run", broken)
    write_result(composed("stage=sft"), tmp_path, {"eval/nll": 1.5}, 2.0)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result == {"metrics": {"eval/nll": 1.5}, "seconds": 2.0}
    assert "the curves are not drawn: KeyError: 'eval/score'" in caplog.text

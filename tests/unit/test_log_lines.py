"""Lines of train.log: each step once, and the time left without what came before the first step."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import composed

from rlhf.base.log import announced, is_listening, log, say
from rlhf.training.tracker import Tracker, set_up_logging


@pytest.fixture
def logging_to(tmp_path: Path) -> Iterator[Path]:
    before = log.handlers[:], log.level, log.propagate
    set_up_logging(tmp_path)
    yield tmp_path / "train.log"
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


def test_each_step_is_there_once(logging_to: Path, tmp_path: Path) -> None:
    cfg = composed("stage=sft", "wandb.mode=disabled")
    tracker = Tracker(cfg, tmp_path, 4, ["loss"])
    tracker.start -= 1000  # an evaluation before training
    tracker.start_clock()
    for step in range(1, 5):
        tracker.log(step, {"loss": 1 / step})
    tracker.close({})
    text = logging_to.read_text()
    assert re.findall(r" step (\d)/4", text) == ["1", "2", "3", "4"]
    left = [int(seconds) for seconds in re.findall(r"(\d+) s left", text)]
    assert len(left) == 4 and max(left) < 100


def test_the_words_beside_the_bar_name_what_they_show(logging_to: Path, tmp_path: Path) -> None:
    for stage, shown, line in (
        ("ppo", ["objective/scores", "reward/gold/mean"], "rollout 1/1  score 1  gold reward 1"),
        ("rm", ["accuracy", "margin"], "step 1/1  accuracy 1  score margin 1"),
    ):
        tracker = Tracker(composed(f"stage={stage}", "wandb.mode=disabled"), tmp_path, 1, shown)
        tracker.log(1, dict.fromkeys(shown, 1.0))
        tracker.close({})
        assert line in logging_to.read_text()


def test_what_is_slow_is_named_and_what_is_quick_is_not(
    logging_to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.base.log.SILENCE", 0.05)
    with announced("reading"):
        pass
    with announced("loading"):
        time.sleep(0.3)
    assert "loading ..." in logging_to.read_text() and "reading" not in logging_to.read_text()


def test_no_text_of_a_file_controls_the_terminal(
    logging_to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say("role \x1b[31mred\x07, 日本\u3000語 👩\u200d🔬")
    log.info("role \x1b[31mred")
    assert capsys.readouterr().err == "role �[31mred�, 日本\u3000語 👩\u200d🔬\nrole �[31mred\n"


def test_where_a_proxy_is_set_it_is_what_has_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"127.0.0.1:{server.getsockname()[1]}"
        assert not is_listening("https://nowhere.invalid")
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        assert is_listening("https://nowhere.invalid")
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy}")
        assert is_listening("https://nowhere.invalid")
        monkeypatch.setenv("NO_PROXY", "nowhere.invalid")
        assert not is_listening("https://nowhere.invalid")

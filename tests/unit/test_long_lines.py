"""Texts of data and models in lines for the user: cut, and without codes for the terminal."""

from __future__ import annotations

import logging

import pytest

from rlhf.base.log import LONGEST, cut, first_line, presentable, say
from rlhf.training.tracker import Presentable


def test_a_long_line_ends_with_its_length() -> None:
    assert cut("a" * LONGEST) == "a" * LONGEST
    assert cut("a" * 3_000_000) == "a" * LONGEST + " ... (3,000,000 characters)"
    assert first_line(ValueError("b" * 10**6)).endswith(" ... (1,000,000 characters)")


def test_each_line_is_cut() -> None:
    first, second = presentable("a\x1b[2J\n" + "b" * 9999).split("\n")
    assert first == "a\ufffd[2J" and second.endswith(" ... (9,999 characters)")


def test_say_and_train_log_are_presentable(capsys: pytest.CaptureFixture[str]) -> None:
    text = "\x1b]0;title\x07" + "x" * 10**6
    say(text)
    record = logging.LogRecord("rlhf", logging.INFO, "", 0, text, None, None)
    for line in (capsys.readouterr().err, Presentable("%(message)s").format(record)):
        assert "\x1b" not in line and "\x07" not in line and len(line) < LONGEST + 100

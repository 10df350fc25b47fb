"""Fixtures of the tests of chat.py: two policies, a reward model, and a user who types; and of the
command line: options that are made from files."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers import register

if TYPE_CHECKING:
    from chats import Chat


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chats import save_policy

    return save_policy(tmp_path_factory.mktemp("chat") / "model", 0)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chats import save_policy

    return save_policy(tmp_path_factory.mktemp("other") / "model", 1)


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chats import UNIT, save_reward

    from rlhf.models.loading import load_tokenizer

    directory = tmp_path_factory.mktemp("reward") / "model"
    return save_reward(
        directory, load_tokenizer("builtin:tiny"), score_mean=UNIT[0], score_std=UNIT[1]
    )


@pytest.fixture
def talk_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Chat:
    """Runs chat.py in this process, with lines typed by the user.

    Returns what it writes on standard output and on standard error.
    """
    import chat

    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path, lines: list[str] | bytes) -> tuple[str, str]:
        typed = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
        monkeypatch.setattr(
            sys, "argv", ["chat.py", *map(str, args), "--max-new-tokens", "6", "--seed", "3"]
        )
        assert chat.main() == 0
        return capsys.readouterr()

    return run


# ------------------------------------------------------------------------------- the command line


@pytest.fixture
def options() -> None:
    """The options that are made from files, as train.py makes them."""
    register()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for the user's option files; what Hydra learns of it is forgotten afterwards."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    from rlhf import compose

    Plugins.instance()  # stores options of its own, once in a process
    store = ConfigStore.instance()
    before = copy.deepcopy(store.repo)
    yield tmp_path
    store.repo = before
    compose.register()

"""chat.py: one answer for scripts, whole conversations, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPO

import chat
from rlhf.config import Precision, Template
from rlhf.data import template
from rlhf.data.records import Turn
from rlhf.models import load_policy, load_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with random weights, as a run saves it."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    torch.manual_seed(0)
    tokenizer = load_tokenizer("builtin:tiny")
    load_policy("builtin:tiny", tokenizer, Precision.fp32).hf.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def run_chat(*args: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "chat.py"), *args]
    return subprocess.run(command, cwd=cwd, env=os.environ, input=text, capture_output=True, text=True, timeout=120)


def conversation(model: Path, max_new_tokens: int = 8) -> chat.Conversation:
    return chat.Conversation(*chat.load(str(model), "cpu"), 1.0, 1.0, 0, max_new_tokens, 7)


def test_prompt_prints_the_answer_and_only_that(model: Path, tmp_path: Path) -> None:
    args = ["--path", str(model), "--prompt", "How do I look after my rose?", "--max-new-tokens", "6", "--seed", "3"]
    one, two = run_chat(*args, cwd=tmp_path), run_chat(*args, cwd=tmp_path)
    assert one.returncode == 0 and one.stdout.strip() and one.stdout == two.stdout
    assert "loading" in one.stderr and "loading" not in one.stdout


def test_the_newest_finished_policy_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, (name, stage) in enumerate([("ppo-b", "ppo"), ("sft-a", "sft"), ("rm-c", "rm"), ("ppo-old", "ppo")]):
        run = tmp_path / "outputs" / name
        run.mkdir(parents=True)
        (run / "summary.json").write_text(json.dumps({"stage": stage, "status": "finished"}))
        os.utime(run / "summary.json", (1000, 1000 + (100 if name == "rm-c" else -age)))
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    assert chat.newest_policy().name == "ppo-b"


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], "make one with  python train.py"),
        (["--path", "./nowhere"], "there is no such directory"),
        (["--path", "reward"], "this is a reward model"),
        (["--temperature", "-1"], "must be 0 (greedy)"),
        (["--top-p", "0"], "must be above 0"),
        (["--prompt", ""], "is empty"),
    ],
)
def test_bad_input_gets_one_clear_line(args: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text(json.dumps({"architectures": ["OPTForSequenceClassification"]}))
    done = run_chat(*args, cwd=tmp_path)
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_commands(model: Path, tmp_path: Path) -> None:
    done = run_chat("--path", str(model), "--max-new-tokens", "4", cwd=tmp_path, text="Hello\n/what\n/clear\n\n/quit\nnever read\n")
    assert done.returncode == 0
    assert "unknown command /what" in done.stderr and "(forgotten)" in done.stderr


def test_the_model_sees_what_it_was_trained_on(model: Path) -> None:
    talk = conversation(model)
    turns = [Turn("user", "Any advice about the fern?"), Turn("assistant", "Water it."), Turn("user", "Is that all?")]
    talk.turns = turns[:2]
    assert talk.fit("Is that all?") == (turns, template.encode_prompts(talk.tokenizer, [turns], 512)[0])


@pytest.mark.parametrize("style", [Template.chatml, Template.llama3], ids=lambda style: style.name)
def test_a_saved_model_is_talked_to_in_the_style_it_was_trained_with(tmp_path: Path, style: Template) -> None:
    tokenizer = load_tokenizer("builtin:tiny", style)
    load_policy("builtin:tiny", tokenizer, Precision.fp32).hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    talk = conversation(tmp_path)
    turns = [Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Any advice?")]
    talk.turns = turns[:2]
    assert talk.fit("Any advice?")[1] == template.encode_prompts(tokenizer, [turns], 512)[0]
    assert talk.stops == [] and tokenizer.eos_token_id in talk.options["eos_token_id"]

    answer = "I see.\n\nHuman: is a word here."  # and no mark of a turn
    sampled = template.encode_responses(tokenizer, [answer], 512)[0]

    def generate(prompt: Any, stopping_criteria: list[Any], **_: Any) -> None:
        for n in range(len(sampled)):
            stopping_criteria[0](torch.cat([prompt, torch.tensor([sampled[: n + 1]])], 1), None)

    talk.model.generate = generate
    shown: list[str] = []
    assert talk.ask("Any advice?", shown.append) == "".join(shown) == answer


def test_fifty_turns_do_not_overflow_and_are_cut_at_turns(model: Path) -> None:
    talk = conversation(model)
    for number in range(50):
        talk.ask(f"What does my violin need in week {number}?", lambda piece: None)
        turns, ids = talk.fit("And now?")
        assert turns[0].role == "user" and turns[-1].text == "And now?"
        assert len(ids) + 8 <= 512
    assert len(talk.fit("And now?")[0]) < 101, "something was dropped"
    with pytest.raises(ValueError, match="too long"):
        talk.fit("rose " * 600)


def test_a_stop_string_is_never_shown_not_even_in_part() -> None:
    text = "Water it.\n\nHuman: and then?"
    pieces = [chat.visible(text[:n], [template.USER]) for n in range(len(text) + 1)]
    assert pieces[-1] == "Water it."
    assert all(later.startswith(sooner) for sooner, later in zip(pieces, pieces[1:]))
    assert all("Human" not in piece for piece in pieces)


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    chat.show("a\x1b[31mb\n")
    assert "\x1b" not in capsys.readouterr().out


def test_help_is_instant(tmp_path: Path) -> None:
    started = time.time()
    assert run_chat("--help", cwd=tmp_path).returncode == 0
    assert time.time() - started < 3  # promised: 1

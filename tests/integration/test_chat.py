"""The command line of chat.py, its commands, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from chats import Chat
from helpers import REPO, TRAIN

from rlhf.chat.models import load_model, newest_policy
from rlhf.chat.session import COMMANDS
from rlhf.config.presets import preset_names
from rlhf.runs import environment


def run_chat(*args: str, cwd: Path, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "chat.py"), *args]
    return subprocess.run(
        command, cwd=cwd, env=os.environ, input=text, capture_output=True, text=True, timeout=120
    )


def test_threads_get_their_setting_before_torch_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libgomp reads its settings when torch loads it, and prints those it uses if asked to."""
    for name in environment.SPIN_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    done = run_chat("--path", str(model), "--prompt", "Hi", "--max-new-tokens", "1", cwd=tmp_path)
    (used,) = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    assert done.returncode == 0
    assert used in (environment.SPIN_IDLE, environment.SPIN_BUSY)


# --------------------------------------------------------------------------------- the command line


def test_prompt_prints_the_response_and_only_that(model: Path, tmp_path: Path) -> None:
    args = ["--path", str(model), "--prompt", "How do I look after my rose?"]
    args += ["--max-new-tokens", "6", "--seed", "3"]
    one, two = run_chat(*args, cwd=tmp_path), run_chat(*args, cwd=tmp_path)
    assert one.returncode == 0 and one.stdout.strip() and one.stdout == two.stdout
    assert "loading" in one.stderr and "loading" not in one.stdout
    assert "(cut after 6 tokens: --max-new-tokens)" in one.stderr


@pytest.mark.parametrize("stage", ["sft", "dpo", *preset_names()])
def test_the_newest_finished_policy_is_chosen(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = [("new", stage, 0), ("old", "sft", -1), ("ppo-e", "ppo", -2)]
    others = [("rm-c", "rm", 100), ("eval-d", "eval", 100)]
    for name, stage_of_run, age in policies + others:
        run = tmp_path / "outputs" / name
        run.mkdir(parents=True)
        (run / "summary.json").write_text(
            json.dumps({"id": "a", "stage": stage_of_run, "status": "finished"})
        )
        os.utime(run / "summary.json", (1000, 1000 + age))
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    assert newest_policy().name == "new"


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], f"make one with  python {TRAIN}"),
        (["--path", "./nowhere"], "there is no such directory"),
        (["--path", "no/where<b>"], "there is no such directory, and it is no hub id"),
        (["--path", "scorer"], "this is a reward model"),
        (["--compare", "policy", "scorer"], "--compare scorer: this is a reward model"),
        (
            ["--path", "policy", "--reward", "policy"],
            "--reward policy: this is OPTForCausalLM, not a reward model",
        ),
        (
            ["--path", "policy", "--reference", "scorer"],
            "--reference scorer: this is a reward model",
        ),
        (["--path", "policy", "--compare", "a", "b"], "not allowed with argument --path"),
        (["--temperature", "-1"], "must be 0 (greedy)"),
        (["--top-p", "0"], "must be above 0"),
        (["--prompt", ""], "is empty"),
        (["--preferences", "notes.txt"], "must end in .jsonl"),
    ],
)
def test_bad_input_gets_one_clear_line(args: list[str], expected: str, tmp_path: Path) -> None:
    for name, architecture in (
        ("scorer", "OPTForSequenceClassification"),
        ("policy", "OPTForCausalLM"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    done = run_chat(*args, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_help_is_instant(tmp_path: Path) -> None:
    started = time.time()
    assert run_chat("--help", cwd=tmp_path).returncode == 0
    assert time.time() - started < 3  # promised: 1


def test_a_model_without_safetensors_is_refused(model: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle may run code
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(tmp_path), "cpu")


# ------------------------------------------------------------------------------------- the commands


def test_commands(model: Path, tmp_path: Path) -> None:
    text = "Hello\n/what\n/clear\n\n/quit\nnever read\n"
    done = run_chat("--path", str(model), "--max-new-tokens", "4", cwd=tmp_path, text=text)
    assert done.returncode == 0
    assert "unknown command /what" in done.stderr and "(forgotten)" in done.stderr


def test_a_command_that_cannot_be_done_gets_one_line(model: Path, talk_to: Chat) -> None:
    lines = ["/tarce", "/trace", "/retry", "/good", "/prefer 1", "/save", "/clear all", "Hello"]
    lines += ["/prefer 1", "/params top_p=2", "/params heat=1", "/help"]
    messages = talk_to("--path", model, lines=lines)[1]
    for line in (
        "(unknown command /tarce: did you mean /trace? /help lists all)",
        "(there is no response yet: type a message first)",
        "(/prefer is for --compare; here mark responses with /good and /bad)",
        "(/save takes FILE)",
        "(/clear takes no argument)",
        "(top_p=2: must be above 0, at most 1)",
        "(no parameter heat; there are temperature, top_p, top_k, max_new_tokens, seed)",
    ):
        assert line in messages.splitlines()
    assert all(command in messages for command in COMMANDS)

"""Commands that the product prints can be pasted into a shell, and do what they are printed for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import REPO, SMALL, command, runs_in, train

from rlhf.base.commands import command_line, override_text
from rlhf.base.errors import UserError
from rlhf.config.stage_graph import score_sources
from rlhf.runs.identity import run_dir_for
from rlhf.runs.inputs import find_inputs, missing_runs

NASTY = 'a {b}, c\'s "d" $e [f]\\'
OPTIONS = (
    "# @package _global_\ndata:\n  sources: {mine: {path: pairs.jsonl}}\n  sandbox: null\n"
    "  shares: [1, 1, 2]\n"
)


@pytest.fixture
def no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the folder that the tests run in, such as those of make demo, are not found."""
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))


def pasted(line: str) -> list[str]:
    """What a shell makes of a command at the end of a line, without `python train.py`."""
    script = re.escape(str(REPO / "train.py"))
    (text,) = re.findall(rf"python (?:'?{script}'?|train\.py) (.*?)(?:  or .*)?$", line)
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {text}"], capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("stage", ["ppo", "dpo", "eval"])
@pytest.mark.parametrize("how", ["--config-dir", "data.sources"])
def test_the_advice_makes_what_is_missing(
    stage: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command, as a shell passes it, names the directory that is missing."""
    monkeypatch.setenv("RLHF_ROOT", str(tmp_path))
    folder = tmp_path / NASTY
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "ours.yaml").write_text(OPTIONS)
    if how == "--config-dir":
        given, folders = ["data=ours"], [folder]
    else:
        path = override_text(str(folder / "pairs.jsonl"))
        given, folders = ["data=jsonl", f"data.sources.mine.path={path}"], []
    given += ["sft.lr=1e-4", "rl.lr=1e-5", "dpo.beta=0.2", "eval.against=null", "fresh=true"]
    mine = command(f"stage={stage}", *given, "eval.policies=[sft,ppo]", folders=folders)
    missing = list(missing_runs(mine, stage))
    with pytest.raises(UserError) as error:
        find_inputs(mine, stage)
    lines = str(error.value).splitlines()
    for line, run in zip(lines, [*missing, ""]):
        args = pasted(line)
        if how == "--config-dir":
            assert args[-2:] == ["--config-dir", str(folder)]
            args = args[:-2]
        advised = command(*args, folders=folders)
        assert not advised.cfg.fresh
        if run:
            assert advised.cfg.stage.runs == [run]
        else:
            assert {*missing} <= {*advised.cfg.stage.runs}
        for trained in advised.cfg.stage.runs:
            assert run_dir_for(advised, trained) == run_dir_for(mine, trained)
    assert missing == {"ppo": ["sft", "rm"], "dpo": ["sft"], "eval": ["sft", "rm", "ppo"]}[stage]
    assert lines[-1].startswith("one command trains sft, ")


@pytest.mark.parametrize("text", [NASTY, "plain", "a\\", "a\\'", 'a\\"b', "ümlaut", "1e5", "null"])
def test_a_text_is_quoted_for_hydra_and_for_the_shell(text: str, tmp_path: Path) -> None:
    """The path after bash, Hydra and our own rewriting."""
    file = tmp_path / f"{text}.jsonl"
    path = override_text(str(file))
    args = shlex.split(command_line("train.py", "data=jsonl", f"data.sources.mine.path={path}"))
    cfg = command("stage=rm", *args[2:]).cfg
    assert cfg.data.sources["mine"].path == str(file)


def test_what_data_shares_leaves_without_rows_is_not_advised() -> None:
    given = ["data=jsonl", "data.sources.mine.path=pairs.jsonl", "data.shares=[0,0,1]"]
    with pytest.raises(UserError) as error:
        find_inputs(command("stage=ppo", *given), "ppo")
    sft, rm = str(error.value).splitlines()
    for line, key in ((sft, "rl.actor"), (rm, "rl.reward")):
        assert line.endswith(
            "and data.shares=[0,0,1] leaves it no rows to train on; "
            f"give {key}=<run, directory or hub id>"
        )


def test_the_newest_run_of_other_settings_is_named(tmp_path: Path) -> None:
    """It may be the one that was meant, with settings that this command has forgotten."""
    for number, name in enumerate(("sft-tiny-tiny-old", "sft-tiny-tiny-new")):
        run = tmp_path / "outputs" / name
        run.mkdir(parents=True)
        (run / "summary.json").write_text('{"id": "1"}')
        os.utime(run / "summary.json", (number, number))
    with pytest.raises(UserError) as error:
        find_inputs(command("stage=ppo", f"root={tmp_path}"), "ppo")
    sft, rm = str(error.value).splitlines()[:2]
    assert sft.endswith(f"(the newest sft run there, of other settings: {run})")
    assert "the newest" not in rm


@pytest.mark.usefixtures("no_runs")
def test_an_evaluation_without_a_reward_model_judges_with_the_functions_of_training() -> None:
    functions = ["rl.rewards.model=null", "rl.rewards.right.function=rlhf.verifiers:number"]
    with pytest.raises(UserError) as error:
        find_inputs(command("stage=eval", "pipeline=grpo", *functions), "eval")
    (rm,) = [line for line in str(error.value).splitlines() if "trained reward model" in line]
    given = shlex.split(rm.partition("judge with your functions: ")[2])
    cfg = command("stage=eval", "pipeline=grpo", *functions, *given).cfg
    assert list(score_sources(cfg, "eval")) == ["right"]
    assert cfg.eval.rewards["right"].function == "rlhf.verifiers:number"


@pytest.mark.usefixtures("no_runs")
def test_an_evaluation_without_sft_compares_with_the_start_of_training() -> None:
    mine = command("stage=eval", "rl.actor=builtin:tiny", "eval.rewards.model=null")
    with pytest.raises(UserError) as error:
        find_inputs(mine, "eval")
    (sft, ppo, *_) = str(error.value).splitlines()
    text = "compare with the model that training starts from: "
    given = shlex.split(sft.partition(text)[2])
    assert given == ["eval.policies=[base,builtin:tiny,ppo]", "eval.against=builtin:tiny"]


def test_a_script_is_named_with_its_folder_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    assert command_line("chat.py", "--path", "a b") == "python chat.py --path 'a b'"
    monkeypatch.chdir(tmp_path)
    assert command_line("chat.py") == f"python {shlex.quote(str(REPO / 'chat.py'))}"


def run_pasted(line: str, cwd: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a printed command in a shell, with this Python."""
    text = line.replace("python ", f"{shlex.quote(sys.executable)} ", 1)
    text = " ".join([text, *map(shlex.quote, more)])
    return subprocess.run(
        ["bash", "-c", text], cwd=cwd, capture_output=True, text=True, timeout=900
    )


@pytest.mark.full
def test_the_advice_is_followed_for_real(tmp_path: Path) -> None:
    """In a folder whose name needs quotes: the pipeline, and a word with its policy."""
    here = tmp_path / "a {b}, c's"
    here.mkdir()
    refused = train("stage=ppo", *SMALL, cwd=here)
    assert refused.returncode == 2
    advice = refused.stderr.splitlines()[-1].partition(": one command trains sft, rm, ppo: ")[2]
    done = run_pasted(advice, here)
    assert done.returncode == 0, done.stderr
    assert {name for name, runs in runs_in(here).items() if runs} == {"sft", "rm", "ppo"}
    again = train("stage=ppo", *SMALL, cwd=here)
    assert again.returncode == 0 and "ppo: finished" in again.stderr
    talk = again.stdout.splitlines()[-1].removeprefix("Talk to it:  ")
    said = run_pasted(talk, here, "--prompt", "Hello", "--max-new-tokens", "8")
    assert said.returncode == 0, said.stderr

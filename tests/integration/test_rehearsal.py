"""What later stages of a pipeline need is tried before its first stage is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import REPO, SMALL, runs_in, train
from wandb_server import Server

TINY = REPO / "rlhf" / "assets" / "tiny"
FUNCTIONS = (
    "def fails(completions):\n    table = {}\n    return [table[c] for c in completions]\n\n"
    "def needs_truth(completions, truth):\n    return [0.0] * len(completions)\n\n"
    "def leaves(completions):\n    raise SystemExit('no key')\n\n"
    "def good(completions):\n    return [-len(c) for c in completions]\n"
)


@pytest.mark.parametrize(
    "name, said",
    [
        ("fails", ": KeyError: '"),
        pytest.param("needs_truth", "has a parameter truth, and no row of", marks=pytest.mark.full),
        pytest.param("leaves", ": SystemExit: no key (", marks=pytest.mark.full),
    ],
)
def test_a_wrong_function_stops_the_pipeline_before_its_first_stage(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    done = train(*SMALL, f"rl.rewards.mine.function=my_rewards:{name}", cwd=tmp_path)
    trying, line = done.stderr.splitlines()
    assert trying == "ppo: trying mine ..."
    assert done.returncode == 2
    assert line.startswith(f"error: ppo: rl.rewards.mine.function=my_rewards:{name}: ")
    assert said in line
    if name == "fails":
        assert ": prompt '" in line and f"({tmp_path}/my_rewards.py:3)" in line
    assert not (tmp_path / "outputs").exists()


@pytest.mark.full
def test_functions_that_work_are_named_and_the_stage_alone_checks_for_itself(
    tmp_path: Path,
) -> None:
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    function = "rl.rewards.mine.function=my_rewards"
    two = "deploy.processes_per_node=2"
    done = train(*SMALL, f"{function}:good", "rl.rewards.model=null", two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = ["ppo: trying mine ...", "ppo: tried mine on 4 held-out prompts"]
    assert done.stderr.splitlines()[:2] == said
    wrong = ["stage=ppo", *SMALL, f"{function}:fails", "rl.rewards.model=null", two]
    done = train(*wrong, cwd=tmp_path)
    assert done.returncode == 2 and "tried mine" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: ppo: rl.rewards.mine.function=my_rewards:fails: prompt")
    sft = f"eval.policies=[{runs_in(tmp_path)['sft'][0]}]"
    judge = ["eval.rewards={mine: {function: 'my_rewards:fails'}}", "eval.rewards.model=null"]
    judge.append("eval.against=null")
    done = train("stage=eval", sft, *judge, *SMALL, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "error: eval: eval.rewards.mine.function=my_rewards:fails: prompt" in done.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "file, content, said",
    [
        (
            "config.json",
            {"model_type": "foo9"},
            "its configuration cannot be read (ValueError: The checkpoint you are trying to load "
            "has model type `foo9`",
        ),
        ("tokenizer.json", {"model": {}}, "its tokenizer cannot be read ("),
    ],
)
def test_a_model_that_cannot_be_read_stops_the_pipeline_before_its_first_stage(
    file: str, content: dict, said: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(TINY, model)
    whole = json.loads((model / file).read_text())
    new = whole | content if file == "config.json" else content
    (model / file).write_text(json.dumps(new))
    done = train("reward=custom", f"reward.path={model}", *SMALL, cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert line.startswith(f"error: rm: reward.path={model}: {model}: {said}"), line
    assert not (tmp_path / "outputs").exists()
    done = train("stage=rm", "reward=custom", f"reward.path={model}", *SMALL, cwd=tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and line.startswith(f"error: rm: {model}: {said}"), line


def test_wandb_online_without_a_key_or_a_server_stops_at_once(tmp_path: Path) -> None:
    online = ["stage=sft", *SMALL, "wandb.mode=online"]
    nothing = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    with Server() as server:
        done = train(*online, cwd=tmp_path, **server.environment | nothing)
        assert done.returncode == 2 and done.stderr.splitlines() == [
            f"error: wandb.mode=online: there is no key for http://127.0.0.1:{server.port}: log in "
            "with `wandb login` or set WANDB_API_KEY, or set wandb.mode=auto"
        ]
    done = train(*online, cwd=tmp_path, **server.environment)
    assert done.returncode == 2 and done.stderr.splitlines() == [
        f"error: wandb.mode=online: http://127.0.0.1:{server.port} does not answer: check the "
        "network and WANDB_BASE_URL, or set wandb.mode=auto"
    ]
    assert not (tmp_path / "outputs").exists()


@pytest.mark.full
def test_wandb_online_with_a_key_reports_there(tmp_path: Path) -> None:
    with Server() as server:
        online = ["stage=sft", *SMALL, "wandb.mode=online"]
        done = train(*online, cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stderr
        assert len(server.runs) == 1

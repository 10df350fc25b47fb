"""--help and tab completion: groups with their options, and what each key means."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import composed, train
from omegaconf import OmegaConf

from rlhf import cli, compose, help

pytestmark = pytest.mark.usefixtures("options")


def test_help_lists_groups_with_their_options_and_the_nodes() -> None:
    text = help.overview()
    for part in ("stage", "pipeline", "rl", "actor", "reward", "data", "deploy", "sweep"):
        assert any(line.split()[:1] == [part] for line in text.splitlines()), part
    assert "dr_grpo" in text and "opt1.3b" in text and "hydra" not in text.split("Keys")[0]


def test_help_of_a_group_lists_its_options() -> None:
    for name in ("stage", "experiment"):
        assert f"{name}=OPTION chooses one of " in help.describe(name, OmegaConf.create({}))
    assert cli.split_help("--help=rl.kl") == ["--help", "rl.kl"]


def test_help_of_a_node_has_meaning_type_range_and_value_of_its_keys() -> None:
    cfg = compose.compose_alone(["stage=grpo"], [])
    text = help.describe("rl.kl", cfg)
    first, *blocks = text.split("\n\n")
    assert first.startswith("rl.kl: ")
    by_key = {block.splitlines()[0]: block for block in blocks}
    assert list(by_key) == [f"rl.kl.{name}" for name in vars(composed("stage=grpo").rl.kl)]
    assert "number, at least 0" in by_key["rl.kl.coef"] and "value: 0.3" in by_key["rl.kl.coef"]
    assert "one of fixed, adaptive, linear" in by_key["rl.kl.controller"]
    assert "value: loss" in by_key["rl.kl.applied_to"]


def test_help_of_one_key_and_of_one_that_is_not_there() -> None:
    cfg = compose.compose_alone([], [])
    assert "changes no result" in help.describe("deploy.micro_batch", cfg)
    assert "or null" in help.describe("rl.max_steps", cfg)
    assert help.describe("rl.lrr", cfg) == "unknown key rl.lrr (did you mean rl.lr?)"
    assert "by a name of your choice" not in help.describe("rl.rewards.mine.weight", cfg)


def test_help_of_a_key_shows_the_value_that_a_command_would_have(tmp_path: Path) -> None:
    done = train("--help", "rl.lrr", "rl.kl.coef", "stage=grpo", cwd=tmp_path)
    assert done.returncode == 0 and "did you mean rl.lr?" in done.stdout
    assert "value: 0.3" in done.stdout


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("rl.kl.controller=", "rl.kl.controller=adaptive rl.kl.controller=fixed"),
        ("rl.kl.controller=fixed,a", "rl.kl.controller=fixed,adaptive"),
        ("fresh=", "fresh=false fresh=true"),
        ("sft.max_steps=", "sft.max_steps=null"),
        ("actor=opt1", "actor=opt1.3b actor=opt125m actor=opt13b"),
        ("reward=tin", "reward=tiny"),
        ("data=rm", "data=rm_static"),
        ("stage=gr", "stage=grpo"),
        ("pipeline=d", "pipeline=dapo pipeline=dpo pipeline=dr_grpo pipeline=dschat"),
        ("rl=g", "rl=grpo rl=gspo"),
        ("deploy=s", "deploy=single_gpu deploy=single_node deploy=small_gpu"),
        ("sweep=s", "sweep=seeds"),
        ("experiment=o", "experiment=opt1.3b_lora experiment=overoptimisation"),
        ("rl.rewards.", "rl.rewards.model."),
        ("rl.rewards.gold.function=m:f rl.rewards.gold.w", "rl.rewards.gold.weight="),
        ("data=jsonl 'data.sources.mine.path=x' data.sources.mine.f", "data.sources.mine.format="),
        ("data=jsonl data.sand", "data.sandbox="),
        ("--help rl.kl.c", "rl.kl.coef rl.kl.controller"),
        ("nonsense=1 wandb.mode=o", "wandb.mode=offline wandb.mode=online"),
        ("+rl.rew", "+rl.reward= +rl.rewards."),
        ("act", "actor. actor="),
        ("nothing.here", ""),
    ],
)
def test_tab_completion_offers_plain_values(typed: str, offered: str) -> None:
    completions = help.complete(f"python train.py {typed}", [])
    assert set(offered.split()) <= set(completions) and bool(offered) == bool(completions)
    assert not any("Kl" in word for word in completions)


def test_tab_completion_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    key = "data.sources.mine.path="
    assert help.complete(f"train.py data=jsonl {key}{tmp_path}/pa", []) == [
        f"{key}{tmp_path}/pairs.jsonl",
        f"{key}{tmp_path}/parts/",
    ]

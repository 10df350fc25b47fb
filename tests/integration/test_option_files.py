"""The user's own option files: in a folder that a command names, options like ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import command, train, write_option
from omegaconf import OmegaConf

from rlhf import arguments, sweep
from rlhf.base.errors import UserError
from rlhf.config.presets import CONF

pytestmark = pytest.mark.usefixtures("options")
GOLD = "rlhf.data.sandbox:gold"
PRESET = "defaults: [grpo, _self_]\nname: wide\nresponses_per_prompt: 16\n"
MODEL = (
    "name: mine\npath: org/mine\npairs_with: {reward: tiny, data: stories}\n"
    "arch: {family: opt, layers: 2, hidden: 64, heads: 2, kv_heads: 2, head_dim: 32, ffn: 256,\n"
    "  vocab: 512, positions: 128, tied: true, embed: null}\n"
)


def user_options(folder: Path) -> None:
    write_option(folder, "rl/wide", PRESET)
    write_option(folder, "model/mine", MODEL)
    write_option(folder, "data/stories", "sources: {stories: {path: stories.jsonl}}\n")
    write_option(
        folder,
        "experiment/study",
        "# @package _global_\ndefaults:\n  - override /actor: mine\nseed: 7\n",
    )
    write_option(
        folder,
        "sweep/few",
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      rl.lr: 1e-4,1e-3\n",
    )


def test_option_files_of_the_user_are_options_like_ours(folder: Path) -> None:
    user_options(folder)
    cfg = command("stage=wide", folders=[folder]).cfg
    assert (cfg.stage.runs, cfg.rl.responses_per_prompt) == (["wide"], 16)
    assert command("pipeline=wide", folders=[folder]).cfg.stage.runs == ["sft", "rm", "wide"]
    cfg = command("actor=mine", folders=[folder]).cfg
    assert (cfg.actor.path, cfg.reward.name, list(cfg.data.sources)) == (
        "org/mine",
        "tiny",
        ["stories"],
    )
    assert command("reward=mine", "stage=rm", folders=[folder]).cfg.reward.path == "org/mine"
    cfg = command("experiment=study", folders=[folder]).cfg
    assert (cfg.actor.name, cfg.seed) == ("mine", 7)
    assert len(sweep.read_sweep(["sweep=few", "seed=1,2,3"], [folder]).jobs) == 6
    for group, option in (
        ("rl", "wide"),
        ("stage", "wide"),
        ("pipeline", "wide"),
        ("actor", "mine"),
        ("reward", "mine"),
        ("data", "stories"),
        ("experiment", "study"),
        ("sweep", "few"),
    ):
        assert option in arguments.group_options(group)
        assert arguments.explain(f"{group}={option}") == []


@pytest.mark.parametrize("how", ["--config-dir", "hydra.searchpath"])
def test_the_folder_is_given_in_either_way(tmp_path: Path, how: str) -> None:
    user_options(tmp_path)
    given = (
        ["--config-dir", str(tmp_path)]
        if how == "--config-dir"
        else [f"hydra.searchpath=[file://{tmp_path}]"]
    )
    done = train(*given, "stage=wide", "experiment=study", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cfg = OmegaConf.create(done.stdout)
    assert (cfg.stage.runs, cfg.rl.responses_per_prompt, cfg.seed) == (["wide"], 16, 7)
    assert (cfg.actor.path, list(cfg.data.sources)) == ("org/mine", ["stories"])
    by_hand = ["stage=sft", "data=stories", "actor=tiny", "sft.epochs=3", "plan=true"]
    done = train(*given, *by_hand, cwd=tmp_path)  # it is composed twice, for the name of the run
    assert done.returncode == 0 and "fits" in done.stdout, done.stderr


def test_a_folder_that_is_not_there_is_named() -> None:
    for config_dir, overrides in (("/nowhere", []), (None, ["hydra.searchpath=[file:///nowhere]"])):
        with pytest.raises(UserError, match="/nowhere: no such folder; --config-dir and hydra"):
            arguments.user_folders(config_dir, overrides)
    assert arguments.user_folders(None, ["hydra.searchpath=[pkg://some.package]"]) == []


def test_an_option_with_the_name_of_ours_is_refused(folder: Path) -> None:
    """Hydra would take ours without a word. A copy of ours may be there."""
    write_option(folder, "data/math", "sources: {math: {path: mine.jsonl}}\n")
    done = train("--config-dir", str(folder), "data=math", "--cfg", "job", cwd=folder)
    assert done.returncode == 2 and done.stdout == "", done
    line = f"{folder}/data/math.yaml: conf/ has an option data/math too, and Hydra takes that one;"
    assert line in done.stderr and done.stderr.endswith("to data/my_math.yaml\n"), done.stderr
    write_option(folder, "data/math", (CONF / "data" / "math.yaml").read_text())
    command("data=math", folders=[folder])


def test_data_of_the_user_bring_their_reward_and_win_over_the_recipe(folder: Path) -> None:
    write_option(
        folder,
        "data/sums",
        "# @package _global_\n"
        "data:\n"
        "  sources: {sums: {path: sums.jsonl}}\n"
        "rl:\n"
        "  batch_size: 32\n"
        f"  rewards: {{model: null, check: {{function: '{GOLD}'}}}}\n",
    )
    cfg = command("data=sums", folders=[folder]).cfg
    assert list(cfg.data.sources) == ["sums"] and list(cfg.rl.rewards) == ["check"]
    assert cfg.rl.batch_size == 32, "the recipe tiny-cpu has 64"
    assert cfg.stage.runs == ["sft", "ppo"]
    assert command("data=sums", "rl.batch_size=128", folders=[folder]).cfg.rl.batch_size == 128

"""A run's identity and name: functions of the values that decide its result."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from helpers import PRESETS, command, composed

from rlhf.arguments import group_names
from rlhf.base.errors import UserError
from rlhf.config.stage_graph import parent_stages
from rlhf.runs.command import Command
from rlhf.runs.identity import (
    measured_otherwise,
    run_dir_for,
    run_identity,
    run_name,
    settings_to_record,
    short_name,
    source_label,
)
from rlhf.runs.inputs import find_inputs


def name(stage: str, *overrides: str) -> str:
    choices = [o for o in overrides if o.split("=")[0] in group_names()]
    return run_name(Command(composed(*overrides), composed(*choices), list(overrides)), stage)


def test_a_run_is_named_by_what_decides_its_result() -> None:
    assert re.fullmatch(r"ppo-tiny-tiny-[0-9a-f]{8}", name("ppo"))
    assert re.fullmatch(
        r"ppo-tiny-tiny\+rl.kl.coef-0.1\+seed-2-[0-9a-f]{8}",
        name("ppo", "seed=2", "rl.kl.coef=0.1"),
    )
    assert name("ppo", "rl.kl.coef=0.05") == name("ppo"), (
        "a value equal to the default is no difference"
    )
    assert name("ppo", "rl.kl.coef=5e-2") == name("ppo"), "values are compared typed"


def test_the_command_of_a_run_repeats_it(tmp_path: Path) -> None:
    """It is pasted into a shell, with the user's folder of option files, and names the same run."""
    folder = tmp_path / "my options"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "mine.yaml").write_text("name: mine\npath: builtin:tiny\n")
    pairs = tmp_path / "a b, {c}.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    typed = ["stage=ppo", "actor=mine", "data=jsonl", f"data.sources.mine.path='{pairs}'"]
    typed += ["rl.rewards.again.path=builtin:tiny", "fresh=true", "seed=3"]
    own = command(*typed, folders=[folder])
    python, script, flag, given, *again = shlex.split(own.to_continue())
    assert [python, script, flag, given] == ["python", "train.py", "--config-dir", str(folder)]
    assert "fresh=true" not in again, "it would move the run aside"
    assert run_name(command(*again, folders=[folder]), "ppo") == run_name(own, "ppo")


def test_stages_are_shared_where_nothing_they_read_differs() -> None:
    assert name("sft", "rl.kl.coef=0.1", "rm.lr=1e-4", "rollout.temperature=0.7") == name("sft")
    assert name("rm", "sft.lr=1e-4", "actor=opt125m", "reward=tiny", "data=sandbox") == name("rm")
    assert name("sft", "sft.lr=1e-4") != name("sft")
    assert name("ppo", "sft.lr=1e-4") != name("ppo"), "PPO stands on SFT"
    for free in (
        "experiment_name=other",
        "deploy.threads=1",
        "wandb.mode=offline",
        "deploy.micro_batch=4",
        "deploy.processes_per_node=2",
        "root=/x",
    ):
        assert name("ppo", free) == name("ppo"), free
    assert name("sft", "deploy.precision=bf16") != name("sft")


def test_what_does_not_change_the_policy_does_not_change_the_name() -> None:
    for free in (
        "data.eval_rows=16",
        "rl.evaluation.every=4",
        "rl.evaluation.best_by=gold",
        "rl.evaluation.top_k=4",
        "rollout.log_responses=-1",
    ):
        assert name("ppo", free) == name("ppo"), free
    for key in (
        "rl.kl.applied_to=loss",
        "rl.responses_per_prompt=2",
        "rl.ema=0.9",
        "rl.rewards.model.weight=2",
    ):
        assert name("ppo", key) != name("ppo"), key


def test_how_a_run_is_measured_is_part_of_the_identity_of_an_evaluation_only() -> None:
    free = ["data.eval_rows=64", "rl.evaluation.top_k=4", "rl.evaluation.temperature=0.5"]
    for stage in ("sft", "rm", "dpo", "ppo", "grpo"):
        for key in free:
            assert name(stage, key) == name(stage), (stage, key)
    assert name("dpo", "rollout.temperature=0.5") == name("dpo"), "DPO samples to evaluate only"
    assert name("ppo", "rollout.temperature=0.5") != name("ppo")
    for key in ("data.eval_rows=64", "rollout.temperature=0.5", "eval.best_of=4"):
        assert name("eval", key) != name("eval"), key
    changed = composed("data.eval_rows=64", "rl.evaluation.top_p=0.5")
    before = settings_to_record(Command(composed(), composed(), []), "ppo")
    assert before["data.eval_rows"] == 256, "a comparison of runs shows it"
    said = measured_otherwise(before, changed, "ppo")
    assert said == "data.eval_rows=256, rl.evaluation.top_p=1.0"
    assert measured_otherwise(before, composed(), "ppo") == ""


@pytest.mark.parametrize(
    "path, label",
    [
        ("/x/pairs.jsonl", "pairs"),
        ("pairs.csv.gz", "pairs"),
        ("/x/math/train.parquet", "math-train"),
        ("/x/good/*.jsonl", "good"),
        ("./parts/", "parts"),
        ("/x/**/part-*.csv", "x"),
        ("org/some-set", "some-set"),
        ("../", "mine"),
    ],
)
def test_the_data_of_a_run_are_in_its_name(path: str, label: str) -> None:
    assert source_label("mine", path) == label


def test_other_data_have_another_name_and_the_sandbox_none() -> None:
    def readable(*overrides: str) -> str:
        return run_name(command("stage=sft", *overrides), "sft").rsplit("-", 1)[0]

    for file in ("pairs", "others"):
        mine = readable("data=jsonl", f"data.sources.mine.path=/x/{file}.jsonl")
        assert mine == f"sft-tiny-{file}"
    assert readable() == "sft-tiny"
    assert readable("data=rm_static") == "sft-tiny-rm_static"
    assert readable("data=[webgpt,rm_static]") == "sft-tiny-webgpt-rm_static"
    other = readable("data=rm_static", "data.sources.rm_static.path=org/other")
    assert other == "sft-tiny-rm_static+data.sources.rm_static.path-org-other"
    assert readable("data=dschat_six") == "sft-tiny-rm_static-full_hh-4more"
    assert readable("data=rm_static", "data.sources.rm_static.rows=9") == (
        "sft-tiny-rm_static+data.sources.rm_static.rows-9"
    )


def test_a_long_name_keeps_stage_models_data_and_seed() -> None:
    long = [f"sft.{key}" for key in ("lr=1e-4", "epochs=3", "batch_size=8", "weight_decay=0.1")]
    long += ["data.max_prompt_tokens=99", "data.max_response_tokens=99", "seed=3"]
    full = name("sft", "data=rm_static", *long)
    assert re.fullmatch(r"sft-tiny-rm_static\+.*\+\dmore\+seed-3-[0-9a-f]{8}", full), full
    assert len(full) <= 109
    assert short_name("", ["seed-12", "x-1"]) == "x-1+seed-12"
    assert short_name("sft-m", ["a-" + "b" * 200, "seed-1"]).endswith("b+seed-1")
    longest = short_name("m" * 120, ["a-1", "seed-1"])
    assert longest.endswith("m+1more+seed-1") and len(longest) == 100


def test_the_values_of_an_experiment_file_are_in_the_name() -> None:
    run = command("experiment=opt1.3b_lora")
    assert "+actor.lora.rank-128" in run_name(run, "sft")
    assert run_name(run, "sft").startswith("sft-opt1.3b-rm_static+")


def test_ppo_stands_on_a_reward_model_only_where_its_score_has_one() -> None:
    gold = ["rl.rewards.model=null", "rl.rewards.gold.function=rlhf.data.sandbox:gold"]
    assert name("ppo", *gold, "rm.lr=1e-4", "reward=opt125m", "data=sandbox") == name("ppo", *gold)
    assert name("ppo", *gold).startswith("ppo-tiny+rl.rewards.gold.function-")
    assert list(parent_stages(composed(*gold), "ppo")) == ["sft"]
    both = gold[1]
    assert name("ppo", both, "rm.lr=1e-4") != name("ppo", both)
    assert list(parent_stages(composed(both), "ppo")) == ["sft", "rm"]


def test_given_inputs_replace_the_stages_that_would_make_them() -> None:
    assert (
        name("ppo", "rl.actor=/m", "sft.lr=1e-4").rsplit("-", 1)[1]
        == name("ppo", "rl.actor=/m").rsplit("-", 1)[1]
    )
    assert name("ppo", "rl.actor=/m") != name("ppo")


def test_names_are_safe_and_short() -> None:
    long = name("sft", "actor.path='/a/b=c,d/" + "x" * 200 + "'")
    assert len(long) <= 109 and not set("=,/ ") & set(long)
    assert long != name("sft", "actor.path='/a/b=c,d/" + "x" * 199 + "'"), (
        "the hash tells cut names apart"
    )


# ---------------------------------------------------------------------- algorithms of the rl node


def test_keys_that_an_algorithm_does_not_read_are_not_part_of_its_identity() -> None:
    critic = ["rl.critic.lr=1e-4", "rl.critic.value_clip=9", "rl.gae_lambda=0.5"]
    by_token = ["rl.gamma=0.5", "rl.whiten_rewards=true"]
    for key in critic + by_token:
        assert name("grpo", "stage=grpo", key) == name("grpo", "stage=grpo"), key
        assert name("ppo", "stage=ppo", key) != name("ppo", "stage=ppo"), key
    plain = ["stage=ppo", "rl.advantage=return"]
    for key in critic:
        assert name("ppo", *plain, key) == name("ppo", *plain), key
    for key in by_token:
        assert name("ppo", *plain, key) != name("ppo", *plain), key
    lora = "reward.lora.alpha=7"  # the critic has an adapter of the reward model's shape
    gold = ["rl.rewards.model=null", "rl.rewards.gold.function=rlhf.data.sandbox:gold"]
    for stage, same in (("grpo", True), ("ppo", False)):
        chosen = [f"stage={stage}", *gold]
        assert (name(stage, *chosen, lora) == name(stage, *chosen)) == same


@pytest.mark.parametrize("preset", PRESETS)
def test_the_name_of_a_preset_is_the_stage_of_its_runs(preset: str) -> None:
    assert name(preset, f"stage={preset}").startswith(f"{preset}-tiny-tiny-")
    keys = run_identity(Command(composed(f"stage={preset}"), composed(), []), preset)
    assert "rl.advantage" in keys and not {"rl.name", "rl.variant_of"} & set(keys)


@pytest.mark.full
def test_an_evaluation_of_several_algorithms_has_the_settings_of_each() -> None:
    policies = "eval.policies=[sft,ppo,grpo,rloo]"
    several = command("stage=eval", policies, "rl.lr=2e-4")
    assert set(several.algorithms) == {"grpo", "rloo"}, "ppo is that of the rl node"
    for preset, other in several.algorithms.items():
        assert (other.cfg.stage.runs, other.cfg.rl.name) == ([preset], preset)
        assert other.cfg.rl.lr == 2e-4
        assert several.for_stage(preset) is other
        alone = command(f"stage={preset}", policies, "rl.lr=2e-4")
        assert run_dir_for(several, preset) == run_dir_for(alone, preset)
    assert several.for_stage("ppo") is several.for_stage("sft") is several
    keys = run_identity(several, "eval")
    assert [keys[f"{p}.advantage"] for p in ("ppo", "grpo", "rloo")] == [
        "gae",
        "group",
        "leave_one_out",
    ]
    assert not any(key.startswith("rl.") for key in keys)
    one = command("stage=eval", "eval.policies=[sft,ppo]")
    other = command("stage=eval", "eval.policies=[sft,grpo]", "pipeline=grpo")
    assert run_identity(one, "eval") != run_identity(other, "eval")
    assert command("stage=ppo", policies).algorithms == {}, "only stage=eval looks at them"


def test_the_inputs_of_an_evaluation_are_the_runs_of_each_algorithm(tmp_path: Path) -> None:
    several = command(
        "stage=eval", "eval.policies=[ppo,grpo]", "eval.against=ppo", f"root={tmp_path}"
    )
    for stage in ("ppo", "grpo", "rm"):
        directory = run_dir_for(several, stage)
        (directory / "model").mkdir(parents=True)
        if stage != "grpo":
            (directory / "summary.json").write_text(f'{{"id": "id of {stage}"}}')
    with pytest.raises(UserError) as error:
        find_inputs(several, "eval")
    sft, line, together = str(error.value).splitlines()
    assert sft.startswith("grpo needs a trained policy: not in ") and "give rl.actor=" in sft
    assert line.startswith("eval needs a trained policy: not in ") and "/grpo-tiny-" in line
    assert "train.py stage=grpo" in line and "leave it out of eval.policies" in line
    assert together.startswith("one command trains sft, grpo: ")
    assert "train.py pipeline=grpo" in together
    grpo = run_dir_for(several, "grpo")
    (grpo / "summary.json").write_text('{"id": "id of grpo"}')
    inputs = find_inputs(several, "eval")
    assert {inputs.ids[stage] for stage in ("ppo", "grpo", "rm")} == {
        f"id of {stage}" for stage in ("ppo", "grpo", "rm")
    }
    assert inputs.paths["grpo"] == str(grpo / "model")

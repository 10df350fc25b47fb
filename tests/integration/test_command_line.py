"""What a command line means: stages and presets, models and data, rewards, sweeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import MODELS, PRESETS, command, composed, write_option
from omegaconf import DictConfig, OmegaConf

from rlhf import arguments, cli, compose, sweep
from rlhf.base.errors import UserError
from rlhf.config import keys
from rlhf.config.schema import Config
from rlhf.runs.identity import run_name

pytestmark = pytest.mark.usefixtures("options")
GOLD = "rlhf.data.sandbox:gold"


def stages(cfg: Config) -> list[str]:
    return cfg.stage.runs


# ---------------------------------------------------------------------------- stages and presets


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_stage_and_a_pipeline_and_an_option_of_stage_rl(name: str) -> None:
    for overrides in ([f"stage={name}"], ["stage=rl", f"rl={name}"]):
        cfg = command(*overrides).cfg
        assert (cfg.stage.name, stages(cfg), cfg.rl.name) == (name, [name], name)
    cfg = command(f"pipeline={name}").cfg
    assert (stages(cfg), cfg.rl.name) == (["sft", "rm", name], name)
    assert run_name(command(f"pipeline={name}"), name).startswith(f"{name}-tiny")


def test_pipeline_dpo_trains_no_reward_model() -> None:
    assert stages(command("pipeline=dpo").cfg) == ["sft", "dpo"]


def test_another_algorithm_than_that_of_the_stage_is_refused() -> None:
    with pytest.raises(UserError, match="stage=ppo with rl=grpo: that is another algorithm"):
        command("stage=ppo", "rl=grpo")
    with pytest.raises(UserError, match="stage=grpo with rl=dr_grpo: .* use stage=dr_grpo"):
        command("stage=grpo", "rl=dr_grpo")


def test_a_preset_that_varies_the_algorithm_of_the_stage_replaces_it() -> None:
    long, short = command("stage=ppo", "rl=dschat"), command("stage=dschat")
    assert (long.cfg.stage.name, stages(long.cfg)) == ("dschat", ["dschat"])
    assert run_name(long, "dschat") == run_name(short, "dschat")
    assert stages(command("pipeline=ppo", "rl=dschat").cfg) == ["sft", "rm", "dschat"]
    assert stages(command("rl=dschat").cfg) == ["sft", "rm", "dschat"]


def test_presets_differ_from_ppo_in_what_their_files_say_only() -> None:
    ppo = dict(keys.values(composed("stage=ppo").rl))
    for name in PRESETS:
        node = OmegaConf.load(compose.CONF / "rl" / f"{name}.yaml")
        said = {"name", "variant_of"}
        while node is not None:
            said |= set(dict(keys.values(OmegaConf.to_container(node))))
            parents = [p for p in node.get("defaults") or [] if p not in ("_self_", "ppo")]
            node = OmegaConf.load(compose.CONF / "rl" / f"{parents[0]}.yaml") if parents else None
        recipe = compose.CONF / "rl_recipe" / f"{name}-tiny.yaml"
        if recipe.exists():
            of_model = OmegaConf.to_container(OmegaConf.load(recipe))
            said |= {key.removeprefix("rl.") for key in dict(keys.values(of_model))}
        now = dict(keys.values(composed(f"stage={name}").rl))
        changed = {key for key in now if now[key] != ppo.get(key)}
        follow = {"clip_high", "critic.adam_eps"}  # they follow a key that the file sets
        assert changed <= said | follow, name


def test_recipes_win_over_presets_and_the_command_line_over_both() -> None:
    for name in ("ppo", "grpo", "dschat"):
        cfg = composed(f"stage={name}", "actor=opt1.3b", "deploy=single_gpu")
        assert (cfg.rl.lr, cfg.rl.batch_size, cfg.rl.schedule.name) == (5e-4, 128, "cosine")
    cfg = composed("stage=grpo", "actor=opt1.3b", "deploy=single_gpu", "rl.lr=1e-6")
    assert (cfg.rl.lr, cfg.rl.batch_size, cfg.rl.responses_per_prompt) == (1e-6, 128, 8)
    cfg = composed("stage=grpo")  # the recipe tiny-cpu
    assert (cfg.rl.lr, cfg.rl.critic.lr, cfg.rl.batch_size) == (3e-4, 1e-3, 64)


# --------------------------------------------------------------------------------- models and data


def test_a_model_of_the_user_has_the_name_of_its_directory_and_no_shape(tmp_path: Path) -> None:
    cfg = command("stage=ppo", "actor=custom", f"actor.path={tmp_path}/my-model").cfg
    assert (cfg.actor.name, cfg.actor.arch) == ("my-model", None)
    assert (cfg.reward.name, cfg.reward.path) == ("my-model", f"{tmp_path}/my-model")
    cfg = command("stage=ppo", "actor=custom", "actor.path=org/small", "reward=opt350m").cfg
    assert (cfg.actor.name, cfg.reward.name) == ("small", "opt350m")
    assert run_name(command("stage=sft", "actor=custom", "actor.path=org/small"), "sft").startswith(
        "sft-small"
    )
    with pytest.raises(UserError, match="actor.path has no value"):
        command("actor=custom")


def test_a_path_set_by_hand_is_without_the_shape_of_the_chosen_model() -> None:
    assert command("stage=sft", "actor=opt125m").cfg.actor.arch is not None
    assert command("stage=sft", "actor=opt125m", "actor.path=org/other").cfg.actor.arch is None
    shape = "actor.arch.layers=3"
    kept = command("stage=sft", "actor=opt125m", "actor.path=org/other", shape).cfg.actor.arch
    assert kept is not None and kept.layers == 3, "a shape set by hand is kept"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if i % 7 == 0 else pytest.mark.full)
        for i, name in enumerate(MODELS)
        if name not in ("tiny", "custom")
    ],
)
def test_every_model_is_an_actor_and_a_reward_model_with_existing_partners(name: str) -> None:
    actor, reward = composed(f"actor={name}").actor, composed(f"reward={name}").reward
    assert (actor.path, actor.arch) == (reward.path, reward.arch) and actor.name == name
    pair = actor.pairs_with
    assert pair is not None and pair.reward in MODELS


# ----------------------------------------------------------------------------------------- rewards


def test_a_source_of_the_score_is_added_by_its_key_and_removed_by_null() -> None:
    both = command(f"rl.rewards.gold.function={GOLD}", "rl.rewards.gold.weight=0.5").cfg
    assert list(both.rl.rewards) == ["model", "gold"] and stages(both) == ["sft", "rm", "ppo"]
    gold = both.rl.rewards["gold"]
    assert gold is not None and (gold.function, gold.weight, gold.path) == (GOLD, 0.5, None)
    only = command(f"rl.rewards.gold.function={GOLD}", "rl.rewards.model=null").cfg
    assert list(only.rl.rewards) == ["gold"] and stages(only) == ["sft", "ppo"]
    evaluated = command("stage=eval", f"eval.rewards.gold.function={GOLD}").cfg
    assert "gold" in evaluated.eval.rewards


def test_arguments_of_a_function_may_be_anything() -> None:
    json = "rl.rewards.json.function=rlhf.verifiers:json_valid"
    for typed in (
        ["rl.rewards.json.kwargs.keys=[a,b]", "rl.rewards.json.kwargs.strict=true"],
        ["rl.rewards.json.kwargs={keys: [a, b], strict: true}"],
    ):
        source = command(json, *typed).cfg.rl.rewards["json"]
        assert source is not None and source.kwargs == {"keys": ["a", "b"], "strict": True}
    judge = "{endpoint: 'http://localhost:8000/v1', model: m, rubric: README.md}"
    of_judge = command(f"rl.rewards.j.judge={judge}").cfg.rl.rewards["j"]
    assert of_judge is not None and of_judge.judge is not None
    assert of_judge.judge.model == "m" and of_judge.judge.api_key_env is None


def test_all_sources_of_the_score_are_added_at_once_and_the_others_stay() -> None:
    cfg = command("rl.rewards={gold: {function: 'rlhf.data.sandbox:gold'}}").cfg
    assert list(cfg.rl.rewards) == ["model", "gold"]


@pytest.mark.parametrize(
    "typed",
    [
        "data.sources.mine.path=docs/pairs.jsonl",
        'data.sources.mine.path="a b, {c}.jsonl"',
        "data.sources.mine.columns.prompt=question",
        'data.sources.mine.path="12"',
        "rl.rewards.model=null",
        "rl.rewards.mine.weight=0.5",
        "++rl.kl.coef=2",
        "seed=1,2",
    ],
)
def test_commands_that_are_printed_have_overrides_as_they_are_typed(typed: str) -> None:
    assert arguments.as_user_types([arguments.allow_user_names(typed)]) == [typed]


def sweep_of(*typed: str) -> sweep.Sweep:
    """What a command with -m sweeps, as the command line reads it."""
    args = [arguments.allow_user_names(arg) for arg in typed]
    return sweep.read_sweep(arguments.one_for_each_key(args), [])


NUMBER = "rlhf.verifiers:number"


@pytest.mark.parametrize(
    "typed, swept",
    [
        (["rl.rewards.model=null", f"rl.rewards.gold.function={GOLD}"], "rl.kl.coef=0.1,0.3"),
        ([f"rl.rewards.gold.function={GOLD}", "rl.rewards.model=null"], "seed=1,2"),
        ([f"rl.rewards.gold.function={GOLD}", "rl.rewards.model.weight=0.1"], "seed=1,2"),
        ([f"rl.rewards.gold.function={GOLD}"], "rl.rewards.gold.weight=0.1,0.5"),
        (["rl.rewards.model=null"], f"rl.rewards.mine.function={GOLD},{NUMBER}"),
        (["rl.rewards={model: null}"], f"rl.rewards.mine.function={GOLD},{NUMBER}"),
        (["data=jsonl", "data.sources.mine.path=a.jsonl"], "data.sources.mine.rows=20,30"),
        (["data=jsonl", "data.sources.mine.path=a.jsonl", "seed=1"], "data.shares=[1,0,0],[0,1,0]"),
        (["data.sources.a.path=a.jsonl", "data.sources.b.path=b.jsonl"], "seed=1,2"),
        (["data.sources.a.path=a.jsonl", "+data.sources.a.columns={prompt: q}"], "seed=1,2"),
    ],
)
def test_a_sweep_means_what_its_jobs_mean_alone(typed: list[str], swept: str) -> None:
    key = swept.partition("=")[0]
    values = re.split(r",(?![^\[]*\])", swept.partition("=")[2])
    alone = [composed_options(*typed, f"{key}={value}") for value in values]
    found = sweep_of(*typed, swept)
    assert [compose.compose_alone(job, []) for job in found.jobs] == alone
    assert found.name == key
    for job, value in zip(found.jobs, values):  # for the line above a job, and its folder's name
        words = arguments.as_user_types(job)
        assert f"{key}={value}" in [word.replace('"', "") for word in words]
        again = [arguments.allow_user_names(arg) for arg in words]
        assert compose.compose_alone(again, []) == compose.compose_alone(job, [])


def composed_options(*typed: str) -> DictConfig:
    """The configuration of a command without -m."""
    return compose.compose_alone([arguments.allow_user_names(arg) for arg in typed], [])


def test_arguments_of_a_function_may_be_dictionaries(tmp_path: Path) -> None:
    key = "rl.rewards.mine.kwargs"
    given = f"{key}={{limits: {{low: 1, high: 2}}, none: {{}}}}"
    mine = command("stage=ppo", f"rl.rewards.mine.function={NUMBER}", given)
    source = mine.cfg.rl.rewards["mine"]
    assert source is not None and source.kwargs == {"limits": {"low": 1, "high": 2}, "none": {}}
    assert f"{key}.limits={{low: 1,high: 2}}" in mine.overrides, "as it can be typed"
    others = [f"{key}={{limits: {{low: 1, high: 3}}, none: {{}}}}", f"{key}={{limits: {{low: 1}}}}"]
    names = {
        run_name(command("stage=ppo", f"rl.rewards.mine.function={NUMBER}", one), "ppo")
        for one in (given, *others, f"{key}={{limits: {{low: 1, high: 2}}}}")
    }
    assert len(names) == 4


def test_a_sweep_over_lists_of_sources() -> None:
    found = sweep_of("data=[rm_static,full_hh],[webgpt]")
    assert [job for (job,) in found.jobs] == ["data=[rm_static,full_hh]", "data=[webgpt]"]
    assert arguments.explain("data=[rm_static,full_hh],[webgpt]") == []
    assert arguments.explain("data=[rm_static,nope],[webgpt]")[0].startswith("data=nope: no such")
    (line,) = arguments.explain("recipe=null,tiny-cpu")
    assert "null cannot be one of several" in line


def test_a_sweep_over_two_keys_of_one_dictionary() -> None:
    keys = ("rl.rewards.gold.weight", "rl.rewards.model.weight")
    found = sweep_of(f"rl.rewards.gold.function={GOLD}", *(f"{key}=1,2" for key in keys))
    weights = [
        tuple(OmegaConf.select(compose.compose_alone(job, []), key) for key in keys)
        for job in found.jobs
    ]
    assert weights == [(1, 1), (1, 2), (2, 1), (2, 2)] and found.swept == list(keys)


# ------------------------------------------------------------------------------------------ sweeps


def test_a_sweep_over_a_source_of_the_score() -> None:
    weights = arguments.allow_user_names("rl.rewards.model.weight=1,2")
    jobs = sweep.read_sweep([weights, "seed=1,2"], []).jobs
    assert len(jobs) == 4 and sweep.check_jobs(jobs, []) == {"default"}
    wrong = [arguments.allow_user_names("rl.rewards.model.weight=1,0")]
    with pytest.raises(UserError, match="rl.rewards: all weights are 0"):
        sweep.check_jobs(sweep.read_sweep(wrong, []).jobs, [])


def test_a_sweep_without_a_name_has_that_of_its_keys() -> None:
    typed = ["seed=1,2", "rl.kl.coef=0.02,0.1", "sft.lr=1"]
    assert sweep.read_sweep(typed, []).name == "rl.kl.coef+seed"
    assert sweep.read_sweep(["sweep=kl", "seed=1,2"], []).name == "rl.kl.coef+seed"


def test_a_sweep_keeps_the_name_that_it_is_given_in_any_way(folder: Path) -> None:
    write_option(folder, "sweep/named", "# @package _global_\nexperiment_name: of_the_file\n")
    for given, name in (
        ("seed=1,2", cli.DEFAULT_NAME),
        ("++experiment_name=mine", "mine"),
        ("experiment=overoptimisation", "overoptimisation"),
        ("sweep=named", "of_the_file"),
    ):
        assert sweep.check_jobs(sweep.read_sweep([given], [folder]).jobs, [folder]) == {name}

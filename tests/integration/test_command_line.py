"""What a command line means: stages and presets, the user's own option files, and wrong keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import MODELS, PRESETS, command, composed, register, train
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from rlhf import cli, compose, help, run, sweep
from rlhf.base.errors import UserError
from rlhf.config import keys
from rlhf.config.schema import Config
from rlhf.runs.identity import run_name

GOLD = "rlhf.data.sandbox:gold"


@pytest.fixture(autouse=True)
def options() -> None:
    """The options that are made from files, as train.py makes them."""
    register()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for the user's option files; what Hydra learns of it is forgotten afterwards."""
    store = ConfigStore.instance()
    before = copy.deepcopy(store.repo)
    yield tmp_path
    store.repo = before
    compose.register()


def write(folder: Path, option: str, text: str) -> None:
    """An option file. Args: option: group/name."""
    file = folder / f"{option}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


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


def test_data_of_the_user_bring_their_reward_and_win_over_the_recipe(folder: Path) -> None:
    write(
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
    assert stages(cfg) == ["sft", "ppo"]
    assert command("data=sums", "rl.batch_size=128", folders=[folder]).cfg.rl.batch_size == 128


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


def test_a_sweep_over_a_source_of_the_score() -> None:
    weights = compose.allow_user_names("rl.rewards.model.weight=1,2")
    assert len(sweep.check_jobs([weights, "seed=1,2"], [])) == 4
    with pytest.raises(UserError, match="rl.rewards: all weights are 0"):
        sweep.check_jobs([compose.allow_user_names("rl.rewards.model.weight=1,0")], [])


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
    assert compose.as_user_types(compose.allow_user_names(typed)) == typed


# ------------------------------------------------------------------------- the user's option files

PRESET = "defaults: [grpo, _self_]\nname: wide\nresponses_per_prompt: 16\n"
MODEL = (
    "name: mine\npath: org/mine\npairs_with: {reward: tiny, data: stories}\n"
    "arch: {family: opt, layers: 2, hidden: 64, heads: 2, kv_heads: 2, head_dim: 32, ffn: 256,\n"
    "  vocab: 512, positions: 128, tied: true, embed: null}\n"
)


def user_options(folder: Path) -> None:
    write(folder, "rl/wide", PRESET)
    write(folder, "model/mine", MODEL)
    write(folder, "data/stories", "sources: {stories: {path: stories.jsonl}}\n")
    write(
        folder,
        "experiment/study",
        "# @package _global_\ndefaults:\n  - override /actor: mine\nseed: 7\n",
    )
    write(
        folder,
        "sweep/few",
        "# @package _global_\nhydra:\n  sweeper:\n    params:\n      rl.lr: 1e-4,1e-3\n",
    )


def test_option_files_of_the_user_are_options_like_ours(folder: Path) -> None:
    user_options(folder)
    cfg = command("stage=wide", folders=[folder]).cfg
    assert (stages(cfg), cfg.rl.responses_per_prompt) == (["wide"], 16)
    assert stages(command("pipeline=wide", folders=[folder]).cfg) == ["sft", "rm", "wide"]
    cfg = command("actor=mine", folders=[folder]).cfg
    assert (cfg.actor.path, cfg.reward.name, list(cfg.data.sources)) == (
        "org/mine",
        "tiny",
        ["stories"],
    )
    assert command("reward=mine", "stage=rm", folders=[folder]).cfg.reward.path == "org/mine"
    cfg = command("experiment=study", folders=[folder]).cfg
    assert (cfg.actor.name, cfg.seed) == ("mine", 7)
    assert len(sweep.check_jobs(["sweep=few", "seed=1,2,3"], [folder])) == 6
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
        assert option in compose.group_options(group)
        assert compose.explain(f"{group}={option}") == []


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
            compose.user_folders(config_dir, overrides)
    assert compose.user_folders(None, ["hydra.searchpath=[pkg://some.package]"]) == []


# ------------------------------------------------------------------------- wrong keys and options


@pytest.mark.parametrize(
    "override, suggestion",
    [
        ("ppo.kl.coef=1", "ppo.kl.coef (did you mean rl.kl.coef?)"),
        ("rloo.lr=1", "rloo.lr (did you mean rl.lr?)"),
        ("grpo.normalize_std=1", "grpo.normalize_std (did you mean rl.normalize?)"),
        ("ppo.whiten_advantages=1", "ppo.whiten_advantages (did you mean rl.normalize?)"),
        ("ppo.critic_optim.lr=1", "ppo.critic_optim.lr (did you mean rl.critic.lr?)"),
        ("ppo.critic_warmup=1", "(did you mean rl.critic.warmup_rollouts?)"),
        ("ppo.value_clip=1", "(did you mean rl.critic.value_clip?)"),
        ("ppo.lam=1", "ppo.lam (did you mean rl.gae_lambda?)"),
        ("grpo.kl.place=loss", "grpo.kl.place (did you mean rl.kl.applied_to?)"),
        ("grpo.clip=1", "grpo.clip (did you mean rl.clip_low?)"),
        ("ppo.loss_over=token", "(did you mean rl.loss_aggregation?)"),
        ("grpo.batch_size=8", "(did you mean rl.batch_size, which counts responses?)"),
        ("online.lr=1", "online.lr (did you mean rl.lr?)"),
        ("ppo.dschat.dropout=1", "(did you mean rl.dschat?)"),
        ("ppo=dschat", "ppo (did you mean rl=dschat?)"),
        ("exp=study", "exp (did you mean experiment_name?)"),
        (
            "sft.train_on_prompt=true",
            "(did you mean sft.train_on=everything in place of true, and sft.train_on=last in "
            "place of false?)",
        ),
        ("deploy.gpus=2", "deploy.gpus (did you mean deploy.processes_per_node?)"),
        # other frameworks
        ("kl_coef=1", "kl_coef (did you mean rl.kl.coef?)"),
        ("cliprange=1", "cliprange (did you mean rl.clip_low?)"),
        ("rl.num_generations=4", "(did you mean rl.responses_per_prompt?)"),
        ("sft.learning_rate=1", "sft.learning_rate (did you mean sft.lr?)"),
        ("learning_rate=1", "(did you mean sft.lr, rm.lr, dpo.lr or rl.lr?)"),
        ("bf16=true", "bf16 (did you mean deploy.precision?)"),
        ("adv_estimator=grpo", "(did you mean rl.advantage?)"),
        ("run_name=x", "run_name (did you mean experiment_name?)"),
        ("lr=1", "lr (did you mean sft.lr, rm.lr, dpo.lr or rl.lr?)"),
        ("rl.kl_coef=1", "(did you mean rl.kl.coef?)"),
        ("ppo.learning_rate=1", "(did you mean rl.lr?)"),
        ("SFT.LR=1", "(did you mean sft.lr?)"),
        ("sft.batch-size=1", "(did you mean sft.batch_size?)"),
        (
            "max_steps=3",
            "(did you mean sft.max_steps, rm.max_steps, dpo.max_steps or rl.max_steps?)",
        ),
        ("model=opt1.3b", "model (did you mean actor?)"),
        ("dataset=x", "dataset (did you mean data?)"),
        ("rl.foo=1", "rl.foo (see python train.py --help rl)"),
        ("data.sources.mine.paht=x", "(did you mean data.sources.mine.path?)"),
        # typing errors
        ("rl.lrr=1", "rl.lrr (did you mean rl.lr?)"),
        ("rl.kl.koef=1", "rl.kl.koef (did you mean rl.kl.coef?)"),
        ("gae_lambda=1", "gae_lambda (did you mean rl.gae_lambda?)"),
        ("qqqqq=1", "qqqqq (see python train.py --help)"),
    ],
)
def test_an_unknown_key_gets_the_closest_one(override: str, suggestion: str) -> None:
    (line,) = compose.explain(override)
    assert line.startswith("unknown key ") and line.endswith(suggestion)


def test_every_renamed_key_leads_to_a_key_that_exists() -> None:
    for new in keys.RENAMED.values():
        assert keys.find_key(new), new
    for name in keys.FOREIGN.values():
        assert keys.find_key(name) or keys.find_key(f"rl.{name}"), name


@pytest.mark.parametrize(
    "override, line",
    [
        ("stage=grppo", "stage=grppo: no such option (did you mean grpo?)"),
        ("pipeline=sft", "pipeline=sft: no such option; choose from"),
        ("actor=opt1.3", "actor=opt1.3: no such option (did you mean opt1.3b?)"),
        ("rl=ppo,grpoo", "rl=grpoo: no such option (did you mean grpo?)"),
        ("data=[sandbox,shpp]", "data=shpp: no such option (did you mean shp?)"),
        ("actor=opt-1.3b", "actor=opt-1.3b: no such option (did you mean opt1.3b?)"),
        ("actor=OPT13B", "actor=OPT13B: no such option (did you mean opt13b?)"),
        ("data=rm-static", "data=rm-static: no such option (did you mean rm_static?)"),
        ("deploy=gpu", "deploy=gpu: no such option (did you mean single_gpu?)"),
        ("stage=reward", "stage=reward: no such option (did you mean rm?)"),
        ("rl=null", "rl=null: choose one of cispo, dapo, dr_grpo"),
        ("+actor=tiny", "+actor=tiny: leave out the +: actor=tiny"),
        ("rl.kl.coef=[", "cannot read 'rl.kl.coef=['"),
        ("stage", "cannot read 'stage': write KEY=VALUE without spaces, as in stage=ppo"),
        ("=", "cannot read '=': write KEY=VALUE without spaces"),
        ("rl.lr=1e-5,", "cannot read 'rl.lr=1e-5,': remove the comma at the end: rl.lr=1e-5"),
        ("data=a.jsonl", "data=a.jsonl: no such option; a file or hub id: data=jsonl data.sources"),
        ("actor=/m/x", "actor=/m/x: no such option; a path or hub id: actor=custom actor.path=/m/"),
        ("data.sources.path=x", "data.sources.path=x: a name of your choice is missing: data.sour"),
    ],
)
def test_an_option_that_is_not_there_gets_the_closest_one(override: str, line: str) -> None:
    (said,) = compose.explain(override)
    assert said.startswith(line)


@pytest.mark.parametrize(
    "override, line",
    [
        ("sft.lr=", "sft.lr=: has no value; give a number"),
        ("sft.lr=null", "sft.lr=null: cannot be null; give a number"),
        ("sft.max_steps=x", "sft.max_steps=x: must be a whole number or null"),
        ("rl.max_steps=inf", "rl.max_steps=inf: must be a whole number or null"),
        ("seed=1.5", "seed=1.5: must be a whole number"),
        ("seed=true", "seed=true: must be a whole number"),
        ("seed=inf", "seed=inf: must be a whole number"),
        ("fresh=3", "fresh=3: must be true or false"),
        ("sft.epochs=[1,2]", "to try several: python train.py -m sft.epochs=1,2"),
        ("sft.betas=0.9", "sft.betas=0.9: must be a list; in quotes: 'sft.betas=[0.9]'"),
        ("deploy.precision=FP16", "fp32, bf16, fp16, autocast (did you mean fp16?)"),
        (
            "rl.kl=3",
            "rl.kl=3: rl.kl is not a single key; set one in it, such as rl.kl.coef (python",
        ),
        ("data.sources=x", "not a single key; set one in it, such as data.sources.mine.path ("),
        (
            "data.sources.me=x",
            "set one in it, such as data.sources.me.path (python train.py --help",
        ),
        ("actor.path=", "actor.path=: has no value; give a text"),
        ("rl.rewards={m: {weight: x}}", "rl.rewards.m.weight=x: must be a number"),
        ("+sft.lr=1", "+sft.lr=1: this key exists; leave out the +: sft.lr=1"),
        ("~rl.lr", "~rl.lr: this key cannot be removed; set another value"),
        ("sft.lr=1e-4,x", "sft.lr=x: must be a number"),
    ],
)
def test_a_value_of_the_wrong_kind_gets_one_line(override: str, line: str) -> None:
    (said,) = compose.explain(override)
    assert line in said


@pytest.mark.parametrize(
    "flag, fix",
    [
        ("--stage=ppo", "keys have no dashes: stage=ppo"),
        ("--plan", "keys have no dashes: plan=VALUE"),
        ("-rl.lr=1e-5", "keys have no dashes: rl.lr=1e-5"),
        ("--learning_rate", "no such flag; keys have no dashes, as in stage=ppo"),
    ],
)
def test_a_key_with_dashes_gets_one_line(flag: str, fix: str) -> None:
    (line,) = cli.explain_flag(flag)
    assert line.startswith(f"{flag}: {fix}")


def test_flags_of_hydra_are_not_refused() -> None:
    for flag in cli.HYDRA_FLAGS:
        assert cli.explain_flag(flag) == []


def test_help_of_a_group_lists_its_options() -> None:
    for name in ("stage", "experiment"):
        assert f"{name}=OPTION chooses one of " in help.describe(name, OmegaConf.create({}))
    assert cli.split_help("--help=rl.kl") == ["--help", "rl.kl"]


def test_commas_without_m_get_the_fix() -> None:
    for override, fix in (
        ("seed=1,2", "add -m; else give one value"),
        ("data=a,b", "to combine them: 'data=[a,b]'"),
        ("rl.betas=0.9,0.95", "a list is in brackets: 'rl.betas=[0.9,0.95]'"),
        ("wandb.notes=a,b", "a text with commas is in quotes: \"wandb.notes='a,b'\""),
    ):
        (line,) = compose.explain(override, multirun=False)
        assert line.endswith(fix), line


def test_a_sweep_without_a_name_has_that_of_its_keys() -> None:
    assert sweep.name_of(["seed=1,2", "rl.kl.coef=0.02,0.1", "sft.lr=1"], []) == ("rl.kl.coef+seed")
    assert sweep.name_of(["sweep=kl", "seed=1,2"], []) == "rl.kl.coef+seed"


def test_a_sweep_keeps_the_name_that_it_is_given_in_any_way(folder: Path) -> None:
    write(folder, "sweep/named", "# @package _global_\nexperiment_name: of_the_file\n")
    for given, name in (
        ("seed=1,2", cli.DEFAULT_NAME),
        ("++experiment_name=mine", "mine"),
        ("experiment=overoptimisation", "overoptimisation"),
        ("sweep=named", "of_the_file"),
    ):
        (first, *_) = sweep.check_jobs([given], [folder])
        assert first.experiment_name == name


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
        ("deploy=s", "deploy=single_gpu deploy=single_node"),
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


def test_what_exists_gets_no_remark() -> None:
    for override in (
        "stage=rl",
        "stage=grpo",
        "pipeline=dpo",
        "rl.rewards.mine.weight=1",
        "data.sources.mine.path=x.jsonl",
        "hydra.verbose=true",
        "~rl.rewards.model",
        "+rl.rewards={a: {weight: 1}}",
        "recipe=null",
        "~recipe",
        "sft.max_steps=null",
        "sft.lr=1e-4,2e-4",
        "sft.epochs=range(1,3)",
        "data.eval_rows='12'",
        "rl.lr=${rl.critic.lr}",
        "+data.sources.mine.columns={prompt: q}",
        "wandb.notes='a, b'",
        "fresh=yes",
    ):
        assert compose.explain(override) == [], override


# ------------------------------------------------------------------------------------------- help


def test_help_lists_groups_with_their_options_and_the_nodes() -> None:
    text = help.overview()
    for part in ("stage", "pipeline", "rl", "actor", "reward", "data", "deploy", "sweep"):
        assert any(line.split()[:1] == [part] for line in text.splitlines()), part
    assert "dr_grpo" in text and "opt1.3b" in text and "hydra" not in text.split("Keys")[0]


def test_help_of_a_node_has_meaning_type_range_and_value_of_its_keys() -> None:
    cfg = compose.compose_alone(["stage=grpo"], [], hydra_too=False)
    text = help.describe("rl.kl", cfg)
    first, *blocks = text.split("\n\n")
    assert first.startswith("rl.kl: ")
    by_key = {block.splitlines()[0]: block for block in blocks}
    assert list(by_key) == [f"rl.kl.{name}" for name in vars(composed("stage=grpo").rl.kl)]
    assert "number, at least 0" in by_key["rl.kl.coef"] and "value: 0.3" in by_key["rl.kl.coef"]
    assert "one of fixed, adaptive, linear" in by_key["rl.kl.controller"]
    assert "value: loss" in by_key["rl.kl.applied_to"]


def test_help_of_one_key_and_of_one_that_is_not_there() -> None:
    cfg = compose.compose_alone([], [], hydra_too=False)
    assert "changes no result" in help.describe("deploy.micro_batch", cfg)
    assert "or null" in help.describe("rl.max_steps", cfg)
    assert help.describe("rl.lrr", cfg) == "unknown key rl.lrr (did you mean rl.lr?)"
    assert "by a name of your choice" not in help.describe("rl.rewards.mine.weight", cfg)


def test_help_of_a_key_shows_the_value_that_a_command_would_have(tmp_path: Path) -> None:
    done = train("--help", "rl.lrr", "rl.kl.coef", "stage=grpo", cwd=tmp_path)
    assert done.returncode == 0 and "did you mean rl.lr?" in done.stdout
    assert "value: 0.3" in done.stdout


# ------------------------------------------------------------------------------------ unused keys


def test_keys_that_the_algorithm_does_not_read_are_named() -> None:
    unused = ["rl.critic.lr=1e-4", "rl.gamma=0.9", "rl.whiten_rewards=true", "rl.gae_lambda=0.9"]
    lines = run.name_unused_keys(command("stage=grpo", *unused, "rl.lr=1e-4"))
    assert sorted(lines) == [
        "rl.critic.lr=0.0001: not used by rl.advantage=group",
        "rl.gae_lambda=0.9: not used by rl.advantage=group",
        "rl.gamma=0.9: not used by rl.advantage=group",
        "rl.whiten_rewards=True: not used by rl.advantage=group",
    ]
    assert run.name_unused_keys(command("stage=ppo", *unused)) == []
    lines = run.name_unused_keys(command("stage=ppo", "rl.advantage=return", *unused))
    assert sorted(line.split("=")[0] for line in lines) == ["rl.critic.lr", "rl.gae_lambda"]
    assert run.name_unused_keys(command("stage=sft", *unused)) == []
    assert run.name_unused_keys(command("stage=grpo", "actor=opt1.3b")) == [], "a recipe's values"

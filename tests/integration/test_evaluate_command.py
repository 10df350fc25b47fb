"""stage=eval as a command: after a pipeline, on runs and directories, and with bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import SMALL, TRAIN, Demo, command, composed, found, runs_in, summary, train

from rlhf.config.stage_graph import policy_labels
from rlhf.runs.checks import check_inputs
from rlhf.runs.directory import write_json
from rlhf.runs.identity import run_identity
from rlhf.runs.inputs import content_id


@pytest.mark.full
def test_after_the_pipeline_the_win_rate_of_ppo_is_in_the_summary(
    demo: Demo, tmp_path: Path
) -> None:
    shutil.copytree(demo.root / "outputs", tmp_path / "outputs")
    args = ["stage=eval", "eval.best_of_prompts=16", "deploy.threads=1", "wandb.mode=disabled"]
    done = train(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)["eval"]
    about = summary(run)
    final = about["metrics"]
    assert (
        final["eval/win_rate_low"] > 0.5
        and final["eval/win_rate_low"] < final["eval/win_rate"] < final["eval/win_rate_high"] <= 1
    )
    assert about["parents"].keys() == {"sft", "ppo", "rm", "prompts/0", "prompts/1", "prompts/2"}
    assert about["parents"]["ppo"] == summary(demo.ppo)["id"]
    printed = ("ppo is best by the gold reward", "Win rates against sft", "ppo (gold)", "ECE")
    for word in (*printed, "The reward model has an accuracy of", "report.html"):
        assert word in done.stdout
    assert "before" not in done.stdout, "nothing was trained"
    again = train(*args, cwd=tmp_path)
    assert again.returncode == 0 and "eval: finished" in again.stderr
    score = json.loads((demo.ppo / "summary.json").read_text())["metrics"]["eval/score"]
    assert final["eval/ppo/score"] == pytest.approx(score, abs=1e-3), (
        "as PPO itself has measured at its end"
    )


@pytest.mark.full
def test_runs_and_directories_are_evaluated_by_their_path(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("Is tea warm?\n\nAnd soup?\n")
    policies = f"eval.policies=[{demo.sft},{demo.ppo}/model]"
    few = [
        "eval.best_of=0",
        "data.eval_rows=16",
        "deploy.threads=1",
        "wandb.mode=disabled",
        "eval.rewards.model=null",
    ]
    done = train(
        "stage=eval",
        policies,
        f"eval.against={demo.sft}",
        "eval.prompts=[mine.txt]",
        *few,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(tmp_path)["eval"]
    about = found(run)
    names = [f"sft-{demo.sft.name[-8:]}", f"ppo-{demo.ppo.name[-8:]}"]
    assert list(about["policies"]) == names and about["against"] == names[0]
    assert [row["prompt"] for row in about["fixed"]] == ["Is tea warm?", "And soup?"] and about[
        "judge"
    ] == "gold"
    assert summary(run)["parents"][f"policies/{0}"] == summary(demo.sft)["id"]


WRONG = [
    (
        ["eval.against=ppo", "eval.policies=[sft]"],
        "eval.against=ppo: not among eval.policies (sft)",
    ),
    (["eval.policies=[sft,sft]"], "eval.policies: sft is there twice"),
    (
        ["eval.policies=[]", "eval.rewards.model=null"],
        "eval.policies is empty and eval.rewards has no reward model",
    ),
    (
        ["eval.policies=[base]", "eval.against=null", "actor.path=/nowhere"],
        "actor.path=/nowhere: no model there",
    ),
    (["rollout.top_p=0.5"], "rollout.top_p, rollout.top_k: not used by eval"),
    (["eval.judge=other"], "eval.judge=other: give one of eval.rewards (model), or gold"),
    (["eval.beams=1"], "eval.beams=1: must be at least 2"),
    (["eval.best_of=1"], "eval.best_of=1: the best of one is that one"),
    (["eval.best_of=-1"], "eval.best_of=-1: must be at least 0"),
    (["eval.temperature=0"], "eval.temperature=0.0: must be above 0"),
    (["eval.top_p=2"], "eval.top_p=2.0: must be above 0, at most 1"),
    (
        ["data=jsonl", "data.sources.mine.path=a.jsonl", "eval.judge=gold"],
        "eval.judge=gold: these data have no ground truth",
    ),
    (
        ["eval.prompts=[nowhere.txt]"],
        "eval.prompts: nowhere.txt is no file, and not one of en, ja, zh",
    ),
    (["eval.policies=[./nowhere]", "eval.against=null"], "eval.policies=./nowhere: no model there"),
]


@pytest.mark.parametrize(
    "overrides, said", WRONG, ids=[said.split(":")[0][:40] for _, said in WRONG]
)
def test_bad_values_get_one_clear_line(overrides: list[str], said: str) -> None:
    from rlhf.config.validation import check_config

    cfg = composed("stage=eval", *overrides)
    assert any(line.startswith(said) for line in check_config(cfg) + check_inputs(cfg)), said


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    done = train("stage=eval", "pipeline=dpo", *SMALL, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"{TRAIN} stage=dpo" in done.stderr and "leave it out of eval.policies" in done.stderr
    assert (
        f"{TRAIN} stage=rm" in done.stderr
        and "remove it with eval.rewards.model=null" in done.stderr
    )


def test_the_identity_holds_the_settings_of_the_named_policies() -> None:
    def keys(*overrides: str) -> set[str]:
        return {
            key.split(".")[0] for key in run_identity(command("stage=eval", *overrides), "eval")
        }

    assert keys("pipeline=dpo") >= {"dpo", "sft", "rm", "eval"} and "ppo" not in keys(
        "pipeline=dpo"
    )
    assert "ppo" in keys() and "rm" not in keys("eval.policies=[sft]", "eval.rewards.model=null")


def test_a_model_that_has_been_replaced_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_text("a")
    plain = content_id(str(model))
    (model / "model.safetensors").write_text("abc")
    assert content_id(str(model)) != plain
    for id in ("one", "two"):
        write_json(tmp_path / "run" / "summary.json", {"id": id})
        assert content_id(str(model)) == content_id(str(tmp_path / "run")) == id
    assert content_id("owner/model") == "owner/model"


def test_labels_are_short_where_they_can_be() -> None:
    assert policy_labels(["sft", "/a/run/model", "owner/x"]) == {
        "sft": "sft",
        "run": "/a/run/model",
        "x": "owner/x",
    }
    assert list(
        policy_labels(["outputs/ppo-tiny-tiny+seed-2-3f2a9c1b/", "x/sft-tiny-0a1b2c3d/model"])
    ) == [
        "ppo-3f2a9c1b",
        "sft-0a1b2c3d",
    ]
    assert list(policy_labels(["a/llama", "b/llama"])) == ["a/llama", "b/llama"]

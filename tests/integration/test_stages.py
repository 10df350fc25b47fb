"""The stages as real processes: one and two of them, twice with the same seed, with failures, and
their results read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import SMALL, metrics, runs_in, summary, train
from safetensors.torch import load_file

# The gradient of a key's bias is exactly zero in theory and a rounding error in practice. Adam
# turns it into a step of the learning rate unless its epsilon is above that error. Without a larger
# epsilon, no two orders of addition would train the same weights.
ROBUST = ["sft.adam_eps=1e-5", "rm.adam_eps=1e-5"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pipeline in one process."""
    root = tmp_path_factory.mktemp("alone")
    done = train(*SMALL, *ROBUST, cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def without_time(rows: list[dict]) -> list[dict]:
    return [
        {
            k: v
            for k, v in row.items()
            if k != "time" and not k.startswith("timing_s/") and k != "responses_per_second"
        }
        for row in rows
    ]


@pytest.mark.full
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_the_same_seed_gives_the_same_metrics_and_weights(
    alone: Path, tmp_path: Path, stage: str
) -> None:
    (one,) = runs_in(alone)[stage]
    for parent in ("sft", "rm"):  # PPO again stands on the same ones
        shutil.copytree(
            runs_in(alone)[parent][0], tmp_path / "outputs" / runs_in(alone)[parent][0].name
        )
    done = train(
        f"stage={stage}", *SMALL, *ROBUST, "experiment_name=again", "fresh=true", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (two,) = runs_in(tmp_path)[stage]
    assert one.name == two.name
    assert without_time(metrics(one)) == without_time(metrics(two))
    assert summary(one)["metrics"] == summary(two)["metrics"]
    if stage == "ppo":
        assert (one / "rollouts.jsonl").read_text() == (two / "rollouts.jsonl").read_text()
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.full  # test_deployments.py holds two processes to one in the quick tests
@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_two_processes_do_what_one_does(alone: Path, tmp_path: Path, zero_stage: int) -> None:
    """Same samples, same losses up to the order of additions, same weights.

    PPO here starts from models that differ by rounding, which it amplifies (a token at the edge of
    a clip); test_deployments.py holds it to 1e-4 when the models are the same.
    """
    done = train(
        *SMALL,
        *ROBUST,
        "deploy.processes_per_node=2",
        f"deploy.zero_stage={zero_stage}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for stage in ("sft", "rm", "ppo"):
        (one,), (two,) = runs_in(alone)[stage], runs_in(tmp_path)[stage]
        for row, other in zip(without_time(metrics(one)), without_time(metrics(two)), strict=True):
            for key, value in row.items():
                rel, absolute = (
                    (1e-2, 0.01 if "clipfrac" in key else 1e-3) if stage == "ppo" else (1e-3, 2e-4)
                )
                assert other[key] == pytest.approx(value, rel=rel, abs=absolute), (stage, key)
        first, second = weights(one), weights(two)
        assert first.keys() == second.keys()
        assert all(
            torch.allclose(first[k], second[k], atol=1e-3 if stage == "ppo" else 2e-4)
            for k in first
        )


def test_metrics_and_summary_have_the_promised_names(alone: Path) -> None:
    runs = {stage: paths[0] for stage, paths in runs_in(alone).items()}
    promised = {
        "sft": (
            {"eval/perplexity", "eval/eos_rate", "eval/gold"},
            {"loss", "perplexity", "grad_norm", "learning_rate", "num_tokens"},
        ),
        "rm": (
            {"eval/accuracy", "eval/accuracy_gold", "eval/accuracy_bayes", "eval/accuracy_prompt"},
            {"loss", "accuracy", "margin", "mean_reward", "chosen_reward", "rejected_reward"},
        ),
        "ppo": (
            {
                f"eval/{k}"
                for k in (
                    "score_before",
                    "score",
                    "kl",
                    "eos_rate",
                    "gold_before",
                    "gold",
                    "gold_best",
                )
            },
            {
                "objective/kl",
                "objective/scores",
                "objective/entropy",
                "policy/approxkl_avg",
                "policy/clipfrac_avg",
                "loss/policy_avg",
            }
            | {
                "loss/value_avg",
                "val/ratio",
                "val/num_eos_tokens",
                "val/explained_variance",
                "lr",
                "responses_per_second",
                "episode",
                "reward/gold/mean",
            }
            | {
                "lr_critic",
                "objective/kl_coef",
                "policy/epochs",
                "val/sampler_logp_diff",
                "reward/model/mean",
                "reward/model/std",
            },
        ),
    }
    for stage, (final, per_step) in promised.items():
        info, rows = summary(runs[stage]), metrics(runs[stage])
        assert info["stage"] == stage and info["status"] == "finished" and info["id"]
        assert final <= set(info["metrics"])
        assert per_step <= set(rows[0])
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert summary(runs["ppo"])["parents"] == {
        "sft": summary(runs["sft"])["id"],
        "rm": summary(runs["rm"])["id"],
    }


def test_every_run_says_what_it_read(alone: Path) -> None:
    """At its start, and in its summary."""
    for stage, runs in runs_in(alone).items():
        (report,) = summary(runs[0])["data"]
        assert (report["source"], report["sft"], report["rm"], report["eval"]) == (
            "sandbox",
            64,
            64,
            256,  # held out; data.eval_rows of them are looked at
        )
        assert "sandbox/train: " in (runs[0] / "train.log").read_text(), stage


def test_ppo_starts_on_policy_at_its_reference(alone: Path) -> None:
    rows = metrics(runs_in(alone)["ppo"][0])
    first = rows[0]
    assert [row["policy/ratio_first_minibatch"] for row in rows] == pytest.approx(
        [1.0] * len(rows), abs=1e-5
    )
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert first["policy/grad_norm"] > 0 and first["val/grad_norm"] > 0


def test_answers_are_kept_token_by_token(alone: Path) -> None:
    (run,) = runs_in(alone)["ppo"]
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [
        1,
        1,
        2,
        2,
    ]  # rollout.log_responses of each of rl.max_steps rollouts
    for row in rows:
        lists = [
            row[key] for key in ("tokens", "logp", "kl", "value", "reward", "advantage", "return")
        ]
        assert {len(values) for values in lists} == {len(row["tokens"])} and 0 < len(
            row["tokens"]
        ) <= 16
        assert row["finished"] == (row["tokens"][-1] == "</s>") and row["score"] == pytest.approx(
            row["score_model"], abs=1e-6
        )
        paid = 1.0 * (not row["finished"]) + 0.05 * sum(
            row["kl"]
        )  # rl.missing_eos_penalty, rl.kl.coef
        assert sum(row["reward"]) == pytest.approx(row["score"] - paid, abs=1e-3)
        # undiscounted: with the value before the last token as baseline, only the last reward is
        # left to get
        assert row["return"][-1] == pytest.approx(row["reward"][-1], abs=1e-4)
    assert all(row["kl"] == pytest.approx([0.0] * len(row["kl"]), abs=1e-4) for row in rows[:2])


@pytest.mark.full
def test_preference_files_train_all_stages(tmp_path: Path) -> None:
    """A local file in the schema of Dahoas/rm-static, through the whole pipeline."""
    words = ["tea", "rice", "soup", "bread", "salt", "milk", "corn", "fish", "plum", "leek"]
    rows = [
        {
            "prompt": f"\n\nHuman: May I have {a} and {b}?\n\nAssistant:",
            "chosen": f" Yes, {a} and {b}.",
            "rejected": " No.",
        }
        for a in words
        for b in words
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = [
        "sft.max_steps=1",
        "rm.max_steps=1",
        "rl.max_steps=1",
        "rl.batch_size=8",
        "rollout.max_new_tokens=8",
        "wandb.mode=disabled",
    ]
    sizes += ["deploy.threads=1"]  # other tests run beside it
    source = [
        "data=rm_static",
        f"data.sources.rm_static.path={file}",
        "data.sources.rm_static.eval_split=null",
        "data.eval_share=0.2",
        "sft.batch_size=4",
        "rm.batch_size=4",
    ]
    done = train(*source, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "eval/gold" not in summary(runs_in(tmp_path)["ppo"][0])["metrics"]
    dialogues = [
        f"data.sources.rm_static.path={file}",
        "data.sources.rm_static.eval_split=null",
        "data.sources.rm_static.format=chosen_rejected",
    ]
    done = train("stage=rm", "data=rm_static", *dialogues, cwd=tmp_path)
    assert done.returncode == 2  # the answers of this file are not dialogues
    assert (
        f"data.sources.rm_static: line 1 of {file}: chosen is not a dialogue: "
        "it does not begin with Human:" in done.stderr
    )
    done = train(
        "stage=rm", "data=rm_static", "data.sources.rm_static.path=./missing.jsonl", cwd=tmp_path
    )
    assert done.returncode == 2 and "missing.jsonl: no such file" in done.stderr

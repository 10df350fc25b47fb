"""RLOO, GRPO and DPO in short runs with real engines, and on other deployments."""

from __future__ import annotations

import json
import math
import statistics
import types
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from comparisons import SMOOTH, compare, last_bits
from helpers import lines, metrics, undocumented
from safetensors.torch import load_file
from transformers import OPTConfig
from worker_runs import kill_when, prepare, same, work

from rlhf.config.choices import KlAppliedTo, Precision
from rlhf.config.loading import load_config
from rlhf.data import encoding, load, tokenized
from rlhf.models.loading import load_policy
from rlhf.training.likelihood import response_logprobs

ALL = "rollout.log_responses=-1"
CASES: dict[str, tuple[str, list[str]]] = {
    "rloo": ("rloo", ["rl.batch_size=16", ALL]),
    "rloo_two": (
        "rloo",
        [
            "rl.batch_size=16",
            "rl.responses_per_prompt=2",
            "rl.kl.coef=0.5",
            "rl.ema=0.5",
            ALL,
        ],
    ),
    "grpo": ("grpo", ["rl.batch_size=16", "rl.responses_per_prompt=4", ALL]),
    "dr_grpo": (
        "grpo",
        [
            "rl.batch_size=16",
            "rl.responses_per_prompt=4",
            "rl.normalize=none",
            "rl.loss_aggregation=constant",
            ALL,
        ],
    ),
    "clip_higher": (
        "grpo",
        ["rl.batch_size=16", "rl.responses_per_prompt=4", "rl.clip_low=0.01", "rl.clip_high=5"],
    ),
    "dpo": ("dpo", ["dpo.batch_size=8", "dpo.max_steps=3", "dpo.eval_every=2"]),
    "dpo_again": ("dpo", ["dpo.batch_size=8", "dpo.max_steps=3", "dpo.beta=1.0"]),
    "ipo": ("dpo", ["dpo.batch_size=8", "dpo.max_steps=3", "dpo.loss=ipo"]),
    "lora": ("dpo", ["dpo.batch_size=8", "dpo.max_steps=2", "actor.lora.rank=4"]),
}


@pytest.fixture(scope="module")
def runs(
    parents: dict[str, Path], inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("algorithms")
    done = {}
    for name, (stage, overrides) in CASES.items():
        given = {"sft": inputs["sft"]} if stage == "dpo" else inputs
        done[name] = prepare(root, name, stage, given, overrides)
    work(list(done.values()), 1)
    return done | parents


def answers(run: Path) -> pandas.DataFrame:
    return pandas.read_json(run / "rollouts.jsonl", lines=True)


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_trains_and_leaves_what_belongs_to_it(
    runs: dict[str, Path], name: str
) -> None:
    rows = metrics(runs[name])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    before, after = (
        load_file(run / "model" / "model.safetensors") for run in (runs["sft"], runs[name])
    )
    assert before.keys() == after.keys() and any(
        not torch.equal(before[key], after[key]) for key in before
    )
    assert not (runs[name] / "critic").exists() and not (runs[name] / "ds_critic.json").exists()
    stage = CASES[name][0]
    assert (runs[name] / "ds_reward.json").exists() == (stage != "dpo"), "DPO loads no reward model"
    if stage != "dpo":
        for row in rows:
            assert row["policy/ratio_first_minibatch"] == pytest.approx(1.0, abs=1e-5)
        assert not [
            key
            for row in rows
            for key in row
            if key.startswith(("val/value", "val/return", "loss/value")) or "critic" in key
        ]
    assert (runs[name] / "model_ema").exists() == (name == "rloo_two")


@pytest.mark.parametrize("name", ["rloo", "rloo_two", "grpo", "dr_grpo"])
def test_logged_advantages_compare_the_answers_to_a_prompt(
    runs: dict[str, Path], name: str
) -> None:
    cfg = load_config(runs[name] / "config.yaml")
    node = cfg.rl
    log, k = answers(runs[name]), node.responses_per_prompt
    in_reward = node.kl.coef if node.kl.applied_to == KlAppliedTo.reward else 0.0
    for _, rollout in log.groupby("step"):
        assert len(rollout) == node.batch_size
        rows = rollout.to_dict("records")
        for start in range(0, len(rows), k):
            group = rows[start : start + k]
            assert len({row["prompt"] for row in group}) == 1
            earned = [row["score_used"] - in_reward * sum(row["kl"]) for row in group]
            for i, row in enumerate(group):
                assert sum(row["reward"]) == pytest.approx(earned[i], abs=1e-3)
                if name.startswith("rloo"):
                    expected = earned[i] - statistics.fmean(earned[:i] + earned[i + 1 :])
                else:
                    expected = earned[i] - statistics.fmean(earned)
                    expected /= statistics.stdev(earned) + 1e-4 if name == "grpo" else 1.0
                assert row["advantage"] == pytest.approx(
                    [expected] * len(row["tokens"]), abs=2e-3 + 2e-3 * abs(expected)
                )
                assert "value" not in row and "return" not in row
    prompts = log[log.step == 1].prompt.nunique()
    assert prompts == node.batch_size // k, "each prompt has all its answers in one rollout"


def test_every_logged_metric_is_documented(runs: dict[str, Path]) -> None:
    for name in ("rloo", "grpo", "dpo"):
        final = json.loads((runs[name] / "result.json").read_text())["metrics"]
        assert undocumented({key for row in metrics(runs[name]) for key in row} | set(final)) == []


def test_grpo_has_its_kl_in_the_loss_and_rloo_in_the_reward(runs: dict[str, Path]) -> None:
    grpo, rloo = metrics(runs["grpo"])[1], metrics(runs["rloo"])[1]
    assert grpo["loss/kl_avg"] > 0 and grpo["objective/non_score_reward"] == 0
    assert "loss/kl_avg" not in rloo and rloo["objective/non_score_reward"] != 0


def test_each_side_has_its_own_clip(runs: dict[str, Path]) -> None:
    row = metrics(runs["clip_higher"])[0]
    assert row["policy/clipfrac_low_avg"] > 0 and row["policy/clipfrac_avg"] == pytest.approx(
        row["policy/clipfrac_low_avg"]
    )


# ---------------------------------------------------------------------------------------------- DPO


def test_dpo_starts_at_ln_2_with_zero_margins(runs: dict[str, Path]) -> None:
    for name in ("dpo", "dpo_again", "lora"):
        first = metrics(runs[name])[0]
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert [
            first[f"rewards/{key}"] for key in ("margins", "chosen", "rejected")
        ] == pytest.approx([0, 0, 0], abs=1e-4)
    assert metrics(runs["ipo"])[0]["loss"] == pytest.approx(1 / (4 * 0.3**2), rel=1e-4)
    assert metrics(runs["dpo"])[2]["rewards/margins"] != 0


def test_dpo_learns_from_the_reward_models_pairs_and_is_evaluated_as_a_policy(
    runs: dict[str, Path],
) -> None:
    report = json.loads((runs["dpo"] / "data.json").read_text())
    assert report == json.loads((runs["rm"] / "data.json").read_text())
    result = json.loads((runs["dpo"] / "result.json").read_text())["metrics"]
    assert {
        "eval/accuracy",
        "eval/loss",
        "eval/gold",
        "eval/gold_before",
        "eval/kl",
        "eval/eos_rate",
    } <= result.keys()
    assert "eval/score" not in result and result["eval/kl"] > -1
    rows = metrics(runs["dpo"])
    assert "eval/gold" in rows[1] and "eval/gold" not in rows[0], "every second step"


def test_the_logged_log_probabilities_are_those_of_the_pairs(
    runs: dict[str, Path], tokenizer: Any
) -> None:
    """The first step, whose policy is the SFT policy, against all 96 pairs one by one, without
    padding."""
    cfg = load_config(runs["dpo"] / "config.yaml")
    data = load.load_data(cfg.data)
    pairs = tokenized.pairs(
        tokenizer, data.rm, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    )
    policy = load_policy(str(runs["sft"] / "model"), tokenizer, Precision.fp32).eval()
    order = np.random.default_rng([cfg.seed, 0]).permutation(len(pairs))[:8]
    wanted = np.zeros(2)
    with torch.no_grad():
        for i in order:
            prompt, *both = pairs[int(i)]
            for column, answer in enumerate(both):
                logits = (
                    policy.hf(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
                )
                wanted[column] += sum(
                    float(logits[len(prompt) + t - 1, token]) for t, token in enumerate(answer)
                )
        together = response_logprobs(
            policy, [(pairs[int(i)][0], pairs[int(i)][1]) for i in order], tokenizer.pad_token_id
        )
    first = metrics(runs["dpo"])[0]
    assert [first["logps/chosen"], first["logps/rejected"]] == pytest.approx(
        (wanted / 8).tolist(), rel=1e-4
    )
    assert float(together.sum()) == pytest.approx(wanted[0], rel=1e-4)


def test_the_reference_is_computed_once_for_the_same_weights_and_pairs(
    runs: dict[str, Path], tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is the content: other settings of DPO share it, other pairs or weights do not."""
    from rlhf.models.wrappers import TokenStats
    from rlhf.stages import dpo

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    calls: list[int] = []

    class Reference:
        device = torch.device("cpu")

        def __init__(self, shift: float):
            self.module = torch.nn.Linear(2, 2)
            torch.nn.init.constant_(self.module.weight, shift)
            torch.nn.init.constant_(self.module.bias, shift)
            self.module.hf = types.SimpleNamespace(config=OPTConfig())

        def __call__(
            self, ids: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor
        ) -> TokenStats:
            calls.append(len(ids))
            uniform = math.log(600) * wanted
            return TokenStats(-uniform, uniform, torch.zeros(ids.shape))

    pairs = [([5, 6], [7, 8], [9]), ([5], [6, 7, 8], [9, 10]), ([5], [6, 7], [9, 10])]
    file, device = tmp_path / "reference.safetensors", torch.device("cpu")
    compute = partial(dpo.pair_logprobs, Reference(0.0), pairs, [4, 4, 3], 0, 2)

    def known(*used: bool) -> list[float]:
        return dpo.cached_logprobs(compute, np.array(used), file, device).flatten().tolist()

    wanted = [-n * math.log(600) for n in (2, 1, 3, 2, 2, 2)]
    first = known(True, False, False)
    assert first[:2] == pytest.approx(wanted[:2], rel=1e-5) and len(calls) == 1
    assert all(map(math.isnan, first[2:])), "what no step uses is not computed"
    assert known(True, False, False)[:2] == first[:2] and len(calls) == 1, "read, not computed"
    assert known(True, True, True) == pytest.approx(wanted, rel=1e-5)
    assert len(calls) == 3, "only what was missing"
    assert known(True, False, True)[:2] == first[:2] and len(calls) == 3
    same, other, changed = Reference(0.0), Reference(0.5), Reference(0.0)
    changed.module.hf.config.rope_theta = 7
    assert (
        dpo.policy_hash(Reference(0.0)) == dpo.policy_hash(same)
        and len({dpo.policy_hash(r) for r in (same, other, changed)}) == 3
    )


def test_a_whole_template_is_learnt_by_dpo(tokenizer: Any) -> None:
    """The answer that DPO learns carries its EOS, as the reward model reads it."""
    from rlhf.data.records import Pair, Turn

    [(prompt, chosen, rejected)] = encoding.encode_pairs(
        tokenizer, [Pair([Turn("user", "Hi")], "Yes.", "No.")], 99, 99
    )
    assert (
        chosen[-1] == rejected[-1] == tokenizer.eos_token_id
        and prompt[-1] != tokenizer.eos_token_id
    )


# -------------------------------------------------------------------------------------- deployments


ONCE = ["rl.epochs=1", "rl.minibatches=1"]  # then the critic's step measures the values


def sizes(stage: str, steps: int) -> list[str]:
    """A run of `steps` optimizer steps or rollouts, of 16 responses or 4 pairs each."""
    if stage == "dpo":
        return ["dpo.batch_size=4", f"dpo.max_steps={steps}"]
    return ["rl.batch_size=16", f"rl.max_steps={steps}"]


@pytest.mark.full
@pytest.mark.parametrize("stage, more", [("rloo", []), ("grpo", []), ("dpo", []), ("ppo", ONCE)])
def test_two_processes_and_zero_3_change_nothing(
    runs: dict[str, Path], tmp_path: Path, stage: str, more: list[str]
) -> None:
    given = {"sft": str(runs["sft"] / "model"), "rm": str(runs["rm"] / "model")}
    inputs = given if stage != "dpo" else {"sft": given["sft"]}
    more = [
        *more,
        *sizes(stage, steps=2),
        "dpo.adam_eps=1e-5",
        "rl.clip_low=5",
    ]
    one = prepare(tmp_path, "one", stage, inputs, more)
    two = prepare(
        tmp_path, "two", stage, inputs, more, processes_per_node=2, zero_stage=3, micro_batch=3
    )
    work([SMOOTH, one, *last_bits(one)], 1)
    work([SMOOTH, two], 2)
    compare(one, two, stage)


@pytest.mark.full
@pytest.mark.parametrize(
    "stage, at, more", [("rloo", 3, []), ("grpo", 3, []), ("dpo", 3, []), ("ppo", 3, ONCE)]
)
def test_a_killed_run_goes_on_bit_for_bit(
    runs: dict[str, Path], tmp_path: Path, stage: str, at: int, more: list[str]
) -> None:
    given = {"sft": str(runs["sft"] / "model"), "rm": str(runs["rm"] / "model")}
    more = [*more, *sizes(stage, steps=4), "checkpoint.every_steps=2"]
    whole, killed = (
        prepare(tmp_path, name, stage, given, more, zero_stage=2) for name in ("whole", "killed")
    )
    work([whole], 1)
    kill_when(killed, 1, lambda: lines(killed / "metrics.jsonl") >= at)
    work([killed], 1)
    same(whole, killed)

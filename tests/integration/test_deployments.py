"""Processes, ZeRO stage, micro-batches and offload must not change what a run computes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from comparisons import SMOOTH, compare, last_bits
from helpers import metrics
from safetensors.torch import load_file
from worker_runs import prepare, work

from rlhf.config.choices import Precision

# what PPO can do besides, and would do otherwise on another deployment if it were wrong
MORE = [
    "rl.ema=0.5",
    "rl.ptx.coef=0.1",
    "rl.entropy_coef=0.01",
    "rl.evaluation.every=1",
    "rl.batch_size=16",
    "rl.responses_per_prompt=2",
    "rollout.log_responses=-1",
]
NO, OPTIMIZER, FROZEN, ALL = (
    {},
    {"optimizer": True},
    {"frozen": True},
    {"optimizer": True, "parameters": True, "frozen": True},
)
PARTITIONED = {"gather_for_rollout": False, "activation_checkpointing": True}
# processes, ZeRO, micro-batch, offload: every pair of values of two columns that is allowed occurs.
# A micro-batch is given in sequences of full length. The sequences here are short, so a micro-batch
# of 16 holds nearly a full step.
PAIRWISE = [
    (1, 0, 16, FROZEN),
    (2, 0, 1, NO),
    (1, 1, 1, OPTIMIZER),
    (2, 1, 16, FROZEN),
    (1, 2, 16, NO),
    (2, 2, 1, OPTIMIZER),
    (1, 3, 1, FROZEN),
    (2, 3, 16, OPTIMIZER),
    (1, 3, 16, ALL),
    (2, 3, 1, ALL),
    (2, 3, 2, NO),
    (2, 3, 2, PARTITIONED),
    (1, 1, 2, NO),
    (1, 0, 2, {"activation_checkpointing": True}),
    (2, 2, 2, FROZEN),
    (1, 3, 2, OPTIMIZER),
]
DIAGONAL = [(2, 3, 2, PARTITIONED), (1, 2, 16, NO)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three stages in one process, ZeRO 0, each with its `last_bits`."""
    root = tmp_path_factory.mktemp("plain")
    sft, rm = prepare(root, "plain", "sft", {}, []), prepare(root, "plain", "rm", {}, [])
    ppo = prepare(root, "plain", "ppo", {"sft": str(sft / "model"), "rm": str(rm / "model")}, MORE)
    work([SMOOTH, sft, rm, ppo, *last_bits(sft), *last_bits(rm), *last_bits(ppo)], 1)
    saved = [
        load_file(ppo / part / "model.safetensors") for part in ("model", "model_ema", "model_best")
    ]
    assert not all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0]), (
        "the average lags behind"
    )
    return {"sft": sft, "rm": rm, "ppo": ppo}


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.full), 2])
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(DIAGONAL, id="diagonal"),
        pytest.param(PAIRWISE, id="pairwise", marks=pytest.mark.full),
    ],
)
def test_a_deployment_changes_no_result(
    plain: dict[str, Path], tmp_path: Path, processes: int, cases: list
) -> None:
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    runs = {}
    for n, zero, micro, offload in cases:
        for stage in ("sft", "rm", "ppo") if n == processes else ():
            name = f"zero{zero}-micro{micro}-{'+'.join(offload) or 'none'}"
            placed = {
                "processes_per_node": n,
                "zero_stage": zero,
                "micro_batch": micro,
                "eval_micro_batch": 2 * micro + 1,
                **offload,
            }
            given, more = (inputs, MORE) if stage == "ppo" else ({}, [])
            runs[name, stage] = prepare(tmp_path, name, stage, given, more, **placed)
    work([SMOOTH, *runs.values()], processes)
    for (name, stage), run in runs.items():
        compare(plain[stage], run, f"{name} x {processes}, {stage}")


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_transformers_loop_changes_no_result(
    plain: dict[str, Path], tmp_path: Path, processes: int
) -> None:
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    placed = {
        "processes_per_node": processes,
        "zero_stage": 3 * (processes - 1),
        "gather_for_rollout": False,
    }
    run = prepare(tmp_path, "hf", "ppo", inputs, [*MORE, "rollout.engine=hf"], **placed)
    work([SMOOTH, run], processes)
    compare(plain["ppo"], run, f"rollout.engine=hf x {processes}")


@pytest.mark.full
@pytest.mark.parametrize("precision", [Precision.bf16, Precision.autocast])
def test_low_precision_learns_about_the_same(
    plain: dict[str, Path], tmp_path: Path, precision: Precision
) -> None:
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    given = {stage: (inputs, MORE) if stage == "ppo" else ({}, []) for stage in plain}
    runs = {
        stage: prepare(tmp_path, "low", stage, *given[stage], precision=precision)
        for stage in plain
    }
    work([SMOOTH, *runs.values()], 1)
    for stage, run in runs.items():
        if stage == "ppo":
            compare_first_answers(plain[stage], run)
        else:
            assert [row["loss"] for row in metrics(run)] == pytest.approx(
                [row["loss"] for row in metrics(plain[stage])], rel=0.02, abs=0.02
            )
        saved = load_file(run / "model" / "model.safetensors")
        assert {w.dtype for w in saved.values()} == {
            torch.bfloat16 if precision == Precision.bf16 else torch.float32
        }


@pytest.mark.full
def test_the_first_update_in_bf16_is_as_long_as_in_fp32(tmp_path: Path) -> None:
    """Adam's first update is the learning rate wherever a gradient is well above eps. Below ZeRO 2
    DeepSpeed would step once before training; ours builds 2."""
    lr = 1e-3
    first = ["rm.max_steps=1", "rm.warmup_steps=0", f"rm.lr={lr}"]
    run = prepare(tmp_path, "low", "rm", {}, first, precision=Precision.bf16)
    work([SMOOTH, run], 1)
    saved = load_file(run / "model" / "model.safetensors")
    bias = saved["model.decoder.layers.0.self_attn.q_proj.bias"].float().abs()  # starts at zero
    assert bias.median().item() == pytest.approx(lr, rel=0.05)
    assert bias.max().item() == pytest.approx(lr, rel=0.02)


def compare_first_answers(one: Path, two: Path) -> None:
    """Compare the responses of PPO's first rollout up to the first token that differs.

    Their probabilities differ slightly: sooner or later a draw gives another token, and from there
    the response is another one. Before that token both runs log the same about it.
    """
    answers, others = (
        [row for row in map(json.loads, (run / "rollouts.jsonl").open()) if row["step"] == 1]
        for run in (one, two)
    )
    assert len(answers) == len(others) == 16 and [row["prompt"] for row in answers] == [
        row["prompt"] for row in others
    ]
    gaps, gaps_of_scores = [], []
    for row, other in zip(answers, others):
        pairs = list(zip(row["tokens"], other["tokens"]))
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        gaps += [abs(a - b) for a, b in zip(row["logp"][:alike], other["logp"][:alike])]
        if row["tokens"] == other["tokens"]:
            gaps_of_scores.append(abs(row["score"] - other["score"]))
    assert len(gaps) > 32 and sum(gaps) / len(gaps) < 0.01 and max(gaps) < 0.05  # of 160 tokens
    assert gaps_of_scores and max(gaps_of_scores) < 0.1
    for row, other in zip(
        metrics(one), metrics(two)
    ):  # means of 16 answers, most of which are others
        error = math.hypot(row["objective/scores_std"], other["objective/scores_std"]) / 4
        assert abs(row["objective/scores"] - other["objective/scores"]) < 3 * error


# stage, fault (several_runs.py), what shows it first; 5 and 8 are the last optimizer steps
FAULTS = [
    ("sft", "unscaled_1", "first_gradient_Policy"),
    ("sft", "dropped_5", "step 5 grad_norm"),
    ("rm", "dropped_1", "first_gradient_Scorer"),
    ("rm", "unscaled_5", "step 5 grad_norm"),
    ("ppo", "dropped_8", "step 2 val/grad_norm"),
]


@pytest.mark.full
def test_a_wrong_gradient_is_found(plain: dict[str, Path], tmp_path: Path) -> None:
    """One wrong micro-batch is outside the bounds, also when only the last step has it."""
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    placed = {"processes_per_node": 2, "zero_stage": 2, "micro_batch": 2}
    given = {stage: (inputs, MORE) if stage == "ppo" else ({}, []) for stage in plain}
    runs = [prepare(tmp_path, fault, stage, *given[stage], **placed) for stage, fault, _ in FAULTS]
    work([SMOOTH, *(f"{run}={fault}" for run, (_, fault, _) in zip(runs, FAULTS))], 2)
    for run, (stage, fault, where) in zip(runs, FAULTS):
        with pytest.raises(AssertionError, match=where):
            compare(plain[stage], run, fault)

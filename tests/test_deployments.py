"""Processes, ZeRO stage, micro-batches and offload must not change what a run computes.

A deployment adds the same numbers in another order. Results then differ by rounding, and training
amplifies that, on each processor by another factor. Hence three comparisons (`compare`):

- The first rollout has the same tokens.
- The gradient of the first optimizer step agrees closely: nothing has amplified rounding yet.
- Everything later may differ by a fixed bound, or by ten times what rounding alone changes: that is
  measured with runs whose initial weights are moved to the next float32 number (`last_bits`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import REPO, metrics
from safetensors.torch import load_file
from test_config import composed

from rlhf import checks, comm, config, engines, launch, layout
from rlhf.data.batches import micro_batches
from rlhf.objectives import policy_loss, token_weights, value_loss

FIVE_STEPS = [
    "data.sandbox.demonstrations=96",
    "data.sandbox.pairs=96",
    "data.eval_rows=9",  # two processes cannot share them evenly
    "sft.max_steps=5",
    "rm.max_steps=5",
    "ppo.max_steps=2",
    "ppo.epochs=2",
    "ppo.minibatches=2",
    "ppo.batch_size=16",
    "rollout.max_new_tokens=12",
    "wandb.mode=disabled",
    "deploy.threads=1",
    "deploy.bucket_mb=1",
    # the gradient of a key's bias is rounding, which Adam blows up unless its epsilon is above that
    "sft.adam_eps=1e-5",
    "rm.adam_eps=1e-5",
    # a token on the very edge of a clip is cut in one order of additions and not in another
    "ppo.clip=5",
    "ppo.value_clip=5",
]
# what PPO can do besides, and would do otherwise on another deployment if it were wrong
MORE = [
    "ppo.ema=0.5",
    "ppo.ptx.coef=0.1",
    "ppo.entropy_coef=0.01",
    "ppo.evaluation.every=1",
    "ppo.batch_size=8",
    "ppo.responses_per_prompt=2",
    "rollout.log_answers=-1",
]
SMOOTH = "--smooth"  # GELU for ReLU: as with the clips above, rounding must not switch anything
LAST_BITS = ("last_bit_1", "last_bit_2")  # two, because one may come out close by chance
AMPLIFIED = 10  # times the larger of the two: the effect of rounding varies by a small factor
NO, OPTIMIZER, FROZEN, ALL = (
    {},
    {"optimizer": True},
    {"frozen": True},
    {"optimizer": True, "parameters": True, "frozen": True},
)
PARTITIONED = {"gather_for_rollout": False, "activation_checkpointing": True}
# processes, ZeRO, micro-batch, offload: every pair of values of two columns that can go together occurs. A micro-batch is so many
# sequences of full length; ours are short, and 16 such hold nearly a whole step.
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


def prepare(root: Path, name: str, stage: str, inputs: dict[str, str], overrides: Sequence[str], **deploy: object) -> Path:
    """A run directory with its configuration, as train.py makes it."""
    cfg = composed(f"stage={stage}", *FIVE_STEPS, *overrides)
    for key, value in deploy.items():
        target = cfg.deploy.offload if key in ("optimizer", "parameters", "frozen") else cfg.deploy
        setattr(target, key, value)
    assert checks.check(cfg) == []
    run = root / f"{name}-{stage}"
    run.mkdir()
    config.save(layout.config_of_stage(cfg, config.Stage[stage], inputs), run / "config.yaml")
    return run


def begin(command: Sequence[object], processes: int, stderr: int = subprocess.DEVNULL) -> list[subprocess.Popen]:
    """Start a python command in so many processes that are to meet."""
    place = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": launch.free_port(), "PYTHONPATH": REPO}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {k: str(v) for k, v in {**place, "DS_ACCELERATOR": "cpu", "RANK": rank, "LOCAL_RANK": rank}.items()},
            stderr=stderr,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(processes)
    ]


def work(runs: Sequence[Path | str], processes: int) -> None:
    """Do the runs, one after the other, in so many processes. Arguments as in several_runs.py."""
    workers = begin([REPO / "tests" / "several_runs.py", *runs], processes, subprocess.PIPE)
    errors = [worker.communicate(timeout=1500)[1] for worker in workers]
    assert not any(worker.returncode for worker in workers), errors[0][-3000:]


def last_bits(run: Path) -> list[str]:
    """Runs that repeat one from weights that differ in the last bit, as arguments of `work`. They
    lie beside the run, where `compare` finds them."""
    copies = [run.with_name(f"{run.name}-{change}") for change in LAST_BITS]
    for copy in copies:
        shutil.copytree(run, copy)
    return [f"{copy}={change}" for copy, change in zip(copies, LAST_BITS)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three stages in one process, ZeRO 0, each with its `last_bits`."""
    root = tmp_path_factory.mktemp("plain")
    sft, rm = prepare(root, "plain", "sft", {}, []), prepare(root, "plain", "rm", {}, [])
    ppo = prepare(root, "plain", "ppo", {"sft": str(sft / "model"), "rm": str(rm / "model")}, MORE)
    work([SMOOTH, sft, rm, ppo, *last_bits(sft), *last_bits(rm), *last_bits(ppo)], 1)
    saved = [load_file(ppo / part / "model.safetensors") for part in ("model", "model_ema", "model_best")]
    assert not all(torch.equal(saved[0][key], saved[1][key]) for key in saved[0]), "the average lags behind"
    return {"sft": sft, "rm": rm, "ppo": ppo}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("cases", [pytest.param(DIAGONAL, id="diagonal"), pytest.param(PAIRWISE, id="pairwise", marks=pytest.mark.full)])
def test_a_deployment_changes_no_result(plain: dict[str, Path], tmp_path: Path, processes: int, cases: list) -> None:
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    runs = {}
    for n, zero, micro, offload in cases:
        for stage in ("sft", "rm", "ppo") if n == processes else ():
            name = f"zero{zero}-micro{micro}-{'+'.join(offload) or 'none'}"
            placed = {"gpus": n, "zero_stage": zero, "micro_batch": micro, "eval_micro_batch": 2 * micro + 1, **offload}
            given, more = (inputs, MORE) if stage == "ppo" else ({}, [])
            runs[name, stage] = prepare(tmp_path, name, stage, given, more, **placed)
    work([SMOOTH, *runs.values()], processes)
    for (name, stage), run in runs.items():
        compare(plain[stage], run, f"{name} x {processes}, {stage}")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_transformers_loop_changes_no_result(plain: dict[str, Path], tmp_path: Path, processes: int) -> None:
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    placed = {"gpus": processes, "zero_stage": 3 * (processes - 1), "gather_for_rollout": False}
    run = prepare(tmp_path, "hf", "ppo", inputs, [*MORE, "rollout.engine=hf"], **placed)
    work([SMOOTH, run], processes)
    compare(plain["ppo"], run, f"rollout.engine=hf x {processes}")


@pytest.mark.parametrize("precision", [config.Precision.bf16, pytest.param(config.Precision.autocast, marks=pytest.mark.full)])
def test_low_precision_learns_about_the_same(plain: dict[str, Path], tmp_path: Path, precision: config.Precision) -> None:
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    given = {stage: (inputs, MORE) if stage == "ppo" else ({}, []) for stage in plain}
    runs = {stage: prepare(tmp_path, "low", stage, *given[stage], precision=precision) for stage in plain}
    work([SMOOTH, *runs.values()], 1)
    for stage, run in runs.items():
        if stage == "ppo":
            compare_first_answers(plain[stage], run)
        else:
            assert [row["loss"] for row in metrics(run)] == pytest.approx(
                [row["loss"] for row in metrics(plain[stage])], rel=0.02, abs=0.02
            )
        saved = load_file(run / "model" / "model.safetensors")
        assert {w.dtype for w in saved.values()} == {torch.bfloat16 if precision == config.Precision.bf16 else torch.float32}


def compare_first_answers(one: Path, two: Path) -> None:
    """Those of PPO's first rollout are drawn from slightly other probabilities: sooner or later a draw falls on another token, and an
    answer is another one from there on. Up to there both say the same of it."""
    answers, others = ([row for row in map(json.loads, (run / "rollouts.jsonl").open()) if row["step"] == 1] for run in (one, two))
    assert len(answers) == len(others) == 16 and [row["prompt"] for row in answers] == [row["prompt"] for row in others]
    gaps, gaps_of_scores = [], []
    for row, other in zip(answers, others):
        pairs = list(zip(row["tokens"], other["tokens"]))
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
        gaps += [abs(a - b) for a, b in zip(row["logp"][:alike], other["logp"][:alike])]
        if row["tokens"] == other["tokens"]:
            gaps_of_scores.append(abs(row["score"] - other["score"]))
    assert len(gaps) > 32 and sum(gaps) / len(gaps) < 0.01 and max(gaps) < 0.05  # of 160 tokens
    assert gaps_of_scores and max(gaps_of_scores) < 0.1
    for row, other in zip(metrics(one), metrics(two)):  # means of 16 answers, most of which are others
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


def test_a_wrong_gradient_is_found(plain: dict[str, Path], tmp_path: Path) -> None:
    """One wrong micro-batch is outside the bounds, also when only the last step has it."""
    inputs = {"sft": str(plain["sft"] / "model"), "rm": str(plain["rm"] / "model")}
    placed = {"gpus": 2, "zero_stage": 2, "micro_batch": 2}
    given = {stage: (inputs, MORE) if stage == "ppo" else ({}, []) for stage in plain}
    runs = [prepare(tmp_path, fault, stage, *given[stage], **placed) for stage, fault, _ in FAULTS]
    work([SMOOTH, *(f"{run}={fault}" for run, (_, fault, _) in zip(runs, FAULTS))], 2)
    for run, (stage, fault, where) in zip(runs, FAULTS):
        with pytest.raises(AssertionError, match=where):
            compare(plain[stage], run, fault)


class OneOfMany:
    """What optimizer_step needs of an engine in one of many processes, in float64. The processes
    take turns: each adds its part of their average to the gradients of a shared module."""

    def __init__(self, module: torch.nn.Module, world: int):
        self.module, self.world = module, world
        self.gradient_notes: dict[str, torch.Tensor] = {}
        self.optimizer = types.SimpleNamespace(param_groups=[], _global_grad_norm=0.0)

    def set_gradient_accumulation_boundary(self, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        (loss / self.world).backward()

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> float:
        return 0.0


CUTS = [(1, 1), (1, 5), (2, 1), (2, 3), (3, 2), (4, 1), (4, 16)]


@pytest.mark.parametrize("over", config.LossOver)
@pytest.mark.parametrize(("world", "micro"), CUTS)
def test_in_float64_a_step_has_the_same_gradient_however_it_is_cut(
    monkeypatch: pytest.MonkeyPatch, over: config.LossOver, world: int, micro: int
) -> None:
    """Without rounding: micro-batches, weights of tokens and the factor of the world size."""
    generator = torch.Generator().manual_seed(0)
    n, r = 12, 6
    x = torch.randn(n, r, 4, generator=generator, dtype=torch.float64)
    given = torch.randn(3, n, r, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, r + 1, (n,), generator=generator).tolist()
    mask = (torch.arange(r) < torch.tensor(lengths)[:, None]).double()
    module = torch.nn.Linear(4, 2, dtype=torch.float64)

    def loss_of(rows: Sequence[int]) -> torch.Tensor:
        longest = max(1, *(lengths[i] for i in rows))  # as Experience.rows cuts them
        old, advantages, returns = given[:, list(rows), :longest]
        here = mask[list(rows), :longest]
        logp, values = module(x[list(rows), :longest]).tanh().unbind(-1)
        policy = policy_loss(logp, old, advantages, here, 0.2, 0.2)[0]
        value = value_loss(values, old, returns, here, 0.2)[0]
        return (token_weights(here, over, float(mask.sum()), n, r) * (policy + value)).sum()

    loss_of(range(n)).backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    monkeypatch.setattr(comm, "world_size", lambda: world)
    for rank in range(world):
        cut = micro_batches(range(n), lengths, micro, rank, world, r)
        engines.optimizer_step(OneOfMany(module, world), cut, loss_of, 0.0)
    for p, gradient in zip(module.parameters(), expected):
        assert torch.allclose(p.grad, gradient, rtol=1e-12, atol=1e-13)


def compare(one: Path, two: Path, what: str) -> None:
    """See the top of this file. Without `last_bits` of `one`, only the fixed bounds apply."""
    compare_first_tokens(one, two, what)
    compare_first_gradients(one, two, what)
    rounded = sorted(one.parent.glob(f"{one.name}-last_bit_*"))
    for numbers, rel, absolute in ((of_steps, 1e-4, 1e-5), (of_the_end, 1e-3, 1e-4)):
        expected, found, others = numbers(one), numbers(two), [numbers(run) for run in rounded]
        assert found.keys() == expected.keys(), what
        for key, value in expected.items():
            by_rounding = max((abs(other[key] - value) for other in others), default=0.0)
            allowed = max(rel * abs(value), absolute, AMPLIFIED * by_rounding)
            assert abs(found[key] - value) <= allowed, (what, key, found[key], value, allowed)
    for part in ("model", "critic", "model_ema", "model_best"):
        assert (one / part).exists() == (two / part).exists(), (what, part)
        if (one / part).exists():
            by_rounding = max((apart(one, run, part) for run in rounded), default=0.0)
            worst, allowed = apart(one, two, part), max(1e-4, AMPLIFIED * by_rounding)
            assert worst <= allowed, (what, part, worst, allowed)
            weights = load_file(two / part / "model.safetensors").values()
            assert not all(torch.equal(w, torch.zeros_like(w)) for w in weights)


def compare_first_tokens(one: Path, two: Path, what: str) -> None:
    """Before training: the same responses, and log-probabilities that differ in the last of their
    five decimals at most."""

    def rows_of(run: Path, name: str) -> list[dict]:
        return [json.loads(line) for line in (run / name).open()] if (run / name).exists() else []

    runs = (one, two)
    before, others = ([row.get("before") for row in rows_of(run, "samples.jsonl")] for run in runs)
    assert before == others, what
    first = [[row for row in rows_of(run, "rollouts.jsonl") if row["step"] == 1] for run in runs]
    for row, other in zip(*first, strict=True):
        assert other["tokens"] == row["tokens"], what
        assert other["logp"] == pytest.approx(row["logp"], abs=2e-5), what


def compare_first_gradients(one: Path, two: Path, what: str) -> None:
    """The whole gradient within 1e-5 of its norm, that of each weight within 1e-4 of its own norm.
    The true gradient of a key's bias is zero, all it has is rounding: hence 1e-7 of the whole."""
    files = sorted(file.name for file in one.glob("first_gradient_*"))
    assert files and files == sorted(file.name for file in two.glob("first_gradient_*")), what
    for file in files:
        gradient, other = load_file(one / file), load_file(two / file)
        assert gradient.keys() == other.keys(), what
        norms = {name: float(g.double().norm()) for name, g in gradient.items()}
        off = {k: float((other[k].double() - g.double()).norm()) for k, g in gradient.items()}
        whole, worst = math.hypot(*norms.values()), math.hypot(*off.values())
        assert worst <= 1e-5 * whole, (what, file, worst, whole)
        for name in gradient:
            assert off[name] <= 1e-4 * norms[name] + 1e-7 * whole, (what, file, name, off[name])


def of_steps(run: Path) -> dict[str, float]:
    """What `compare` looks at in the metrics of the steps."""

    def wanted(key: str) -> bool:
        few = ("objective/scores", "objective/kl", "tokens/response_mean")
        return key in few or "loss" in key or "grad_norm" in key

    rows = metrics(run)
    return {f"step {row['step']} {key}": row[key] for row in rows for key in row if wanted(key)}


def of_the_end(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())["metrics"]


def apart(one: Path, two: Path, part: str) -> float:
    """The largest difference between two weights at the same place."""
    weights, others = (load_file(run / part / "model.safetensors") for run in (one, two))
    assert weights.keys() == others.keys(), part
    return max(float((weights[k].float() - others[k].float()).abs().max()) for k in weights)

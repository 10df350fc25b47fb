"""The plan's memory against real tensors, DeepSpeed's own estimators and hand numbers."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from families import save_base
from helpers import composed

from rlhf.base.constants import SANDBOX_PROMPTS
from rlhf.config.schema import Config
from rlhf.config.validation import check_config
from rlhf.data.sandbox.ground_truth import all_prompts
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.planning import summary as plan_text
from rlhf.planning.formulas import activations, role_memory
from rlhf.planning.memory import make_plan, sampling_choices
from rlhf.planning.shapes import ACTIVATIONS, arch_of
from rlhf.planning.steps import rows_for_stage
from rlhf.planning.summary import cheapest_changes, one_line_summary
from rlhf.training.optimizer_step import optimizer_step

GIB = 2**30


# ------------------------------------------------------------------------------------------- memory


def storages() -> dict[int, int]:
    """All memory that tensors hold in this process: address -> bytes."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


STATES = [
    (zero, precision, adapter)
    for zero in range(4)
    for precision in ("fp32", "bf16")
    for adapter in (0, 8)
]
SOME = [(0, "fp32", 0), (3, "bf16", 0)]


@pytest.mark.parametrize(
    "zero, precision, adapter",
    [pytest.param(*c, marks=() if c in SOME else (pytest.mark.full,)) for c in STATES],
)
def test_model_states_are_the_measured_tensors(
    zero: int, precision: str, adapter: int, tmp_path: Path, one_process: None
) -> None:
    """After an optimizer step.

    The gradients are gone by then. Only stage 3 keeps its buffer for them.
    """
    overrides = [
        f"deploy.zero_stage={zero}",
        f"deploy.precision={precision}",
        f"actor.lora.rank={adapter}",
        "deploy.bucket_mb=0.01",
    ]
    cfg = composed("stage=sft", *overrides)
    tokenizer = load_tokenizer("builtin:tiny")
    before = storages()
    engine = build_engine(
        lambda: load_policy(
            "builtin:tiny", tokenizer, cfg.deploy.precision, adapter=cfg.actor.lora
        ),
        cfg,
        "actor",
        tmp_path,
    )
    ids = torch.randint(5, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    wanted = torch.arange(8).expand(2, 8) >= 4
    optimizer_step(engine, [lambda: -engine(ids, torch.ones_like(ids), wanted)[0].sum()], 1e-3)
    measured = sum(size for address, size in storages().items() if address not in before)
    (role,) = make_plan(cfg, "sft").roles
    expected = role.weights + role.optimizer + (role.gradients if zero == 3 else 0)
    spare = (
        0.16 if zero == 3 else 0.02
    )  # stage 3 keeps small weights whole, and the last one that it fetched
    assert expected <= measured * 1.001 and measured <= expected * (1 + spare) + 2**16, (
        measured / expected,
        role,
    )
    engine.destroy()


@pytest.mark.parametrize("world", [1, 8])
def test_model_states_are_those_of_deepspeeds_estimators(world: int) -> None:
    """Gradients are summed in fp32; at stage 2 the estimator counts them in bf16, too, of which the
    plan has a bucket, in another place."""
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    n = 10**9
    for zero in (2, 3):
        cfg = composed(
            "stage=sft",
            "actor=opt1.3b",
            "deploy=single_node",
            f"deploy.zero_stage={zero}",
            f"deploy.processes_per_node={world}",
        )
        ours = role_memory(cfg, "actor", "x", n, n).total
        if zero == 2:
            _, theirs = estimate_zero2_model_states_mem_needs(
                n, world, 1, cpu_offload=False, additional_buffer_factor=1
            )
            assert ours + 2 * n / world == theirs
        else:
            _, theirs, _ = estimate_zero3_model_states_mem_needs(
                n, 0, world, 1, False, False, False, additional_buffer_factor=1
            )
            assert ours == theirs


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("family", list(ACTIVATIONS))
def test_activations_are_the_tensors_saved_for_the_backward_pass(
    family: str, precision: str, tmp_path: Path
) -> None:
    """What two more blocks save; with checkpointing these are their inputs.

    Without padding it is less, but not much less.
    """
    rows, tokens = 3, 48
    for checkpointing in (False, True):
        measured, unpadded, expected = [], [], []
        for layers in (2, 4):
            more = (
                {"n_positions": 128}
                if family == "gpt2"
                else {"sliding_window": 64}
                if family == "gemma3_text"
                else {}
            )
            save_base(
                tmp_path / str(layers),
                family,
                **more,
                **{"n_layer" if family in ("gpt2", "bloom") else "num_hidden_layers": layers},
            )
            arch = arch_of(str(tmp_path / str(layers)), None)
            assert arch is not None and arch.layers == layers
            cfg = composed(
                "stage=sft",
                f"deploy.precision={precision}",
                f"deploy.activation_checkpointing={checkpointing}",
            )
            measured.append(saved(str(tmp_path / str(layers)), cfg, rows, tokens, padded=True))
            unpadded.append(saved(str(tmp_path / str(layers)), cfg, rows, tokens, padded=False))
            expected.append(activations(arch, cfg, rows, tokens))
        assert measured[1] - measured[0] == pytest.approx(
            expected[1] - expected[0], rel=0.001 if checkpointing else 0.2
        )
        assert 0.75 < (unpadded[1] - unpadded[0]) / (expected[1] - expected[0]) < 1.01


def saved(path: str, cfg: Config, rows: int, tokens: int, padded: bool) -> int:
    """Bytes that autograd keeps of a forward, without the weights."""
    policy = load_policy(path, load_tokenizer("builtin:tiny"), cfg.deploy.precision).train()
    hf = policy.hf
    if cfg.deploy.activation_checkpointing:
        hf.activation_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in hf.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(5, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        policy.hidden(ids, mask, padded)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_hand_numbers() -> None:
    """OPT-13B on 8 GPUs, ZeRO 3, LoRA 128, bf16."""
    cfg = composed("stage=ppo", "actor=opt13b", "deploy=single_node")
    p = make_plan(cfg, "ppo")
    actor = next(role for role in p.roles if role.name == "actor")
    adapter = 40 * (4 * 128 * (5120 + 5120) + 2 * 128 * (5120 + 20480))
    assert actor.trained == adapter and actor.parameters == 12_853_473_280 + adapter
    assert (
        actor.weights == 2 * actor.parameters / 8
        and actor.gradients == 4 * adapter / 8
        and actor.optimizer == 12 * adapter / 8
    )
    assert [role.name for role in p.roles] == ["actor", "reward", "critic"], (
        "the reference is the actor with its adapter off"
    )
    assert p.phases["sampling"]["kv cache"] == 2 * 40 * 5120 * 64 * 512 * 2
    # 4 rows of 256 response tokens are one chunk, whose probabilities are kept
    assert p.phases["actor's update"]["logits"] == 4 * 256 * 50272 * (4 + 4 + 4)


def test_the_plan_knows_the_size_of_the_sandbox() -> None:
    assert len(all_prompts()) == SANDBOX_PROMPTS


def test_partitioned_sampling_is_chosen_where_whole_weights_do_not_fit() -> None:
    whole = composed("stage=ppo", "actor=opt13b", "deploy=single_node")
    assert sampling_choices(whole)["gather"]
    large = composed("stage=ppo", "actor=opt66b", "deploy=multi_node")
    assert not sampling_choices(large)["gather"]
    (note,) = make_plan(large, "ppo").notes
    assert "sampling fetches all 124.9 GiB of the actor's weights" in note
    whole.deploy.gather_for_rollout = False
    assert not sampling_choices(whole)["gather"]
    assert sampling_choices(composed("stage=ppo"))["gather"]


def test_an_adapter_is_merged_for_sampling_where_a_copy_of_its_layers_fits() -> None:
    """A 7B model with LoRA: 14 GiB of weights, and the copy as much again."""
    overrides = ["stage=sft", "actor=qwen2.5-7b", "deploy=single_gpu", "actor.lora.rank=16"]
    overrides += ["deploy.micro_batch=1", "deploy.eval_micro_batch=16"]
    overrides += ["deploy.activation_checkpointing=true"]
    for memory, merges in ((24, False), (80, True)):
        cfg = composed(*overrides, f"deploy.gpu_memory_gb={memory}")
        plan = make_plan(cfg, "sft")
        assert plan.fits and plan.merges == merges == sampling_choices(cfg)["merge"]
        assert ("merged weights" in plan.phases["sampling"]) == merges
    evaluated = composed("stage=eval", "actor=opt125m", "actor.lora.rank=16")
    assert make_plan(evaluated, "eval").notes == [], "sft and ppo are known, and base is"
    assert "merged weights" not in make_plan(evaluated, "eval").phases["sampling"]


def test_the_length_penalty_of_dapo_belongs_to_a_length() -> None:
    assert not any("overlong" in note for note in make_plan(composed("stage=dapo"), "dapo").notes)
    longer = composed("stage=dapo", "rollout.max_new_tokens=256", "data.max_response_tokens=256")
    (note,) = [note for note in make_plan(longer, "dapo").notes if "overlong" in note]
    assert note == (
        "rl.overlong_penalty=12 is 5% of rollout.max_new_tokens=256; DAPO takes a fifth"
    )


def test_the_critic_is_planned_as_the_model_that_it_starts_from() -> None:
    own = make_plan(
        composed("stage=ppo", "actor=llama3.2-3b", "reward=llama3.2-1b", "deploy=single_gpu"),
        "ppo",
    )
    other = make_plan(
        composed("stage=ppo", "actor=llama3.2-3b", "reward=opt350m", "deploy=single_gpu"), "ppo"
    )
    counts = [
        {role.name: round(role.parameters / 1e6) for role in made.roles} for made in (own, other)
    ]
    assert (counts[0]["critic"], counts[1]["reward"], counts[1]["critic"]) == (
        counts[0]["reward"],
        331,
        counts[1]["actor"],
    )
    assert not own.notes and "the critic starts from the actor" in other.notes[0]


# ------------------------------------------------------------------------- changes and command line


TOO_LARGE = [
    ["actor=opt6.7b", "deploy=single_gpu", "actor.lora.rank=0"],
    ["actor=opt13b", "deploy=single_node", "actor.lora.rank=0", "deploy.processes_per_node=2"],
    ["actor=llama2-7b", "deploy=single_gpu"],
]


@pytest.mark.parametrize("overrides", TOO_LARGE, ids=lambda x: x[0])
def test_each_change_that_is_offered_makes_it_fit_and_is_needed_whole(overrides: list[str]) -> None:
    cfg = composed("stage=ppo", *overrides)
    assert not make_plan(cfg, "ppo").fits
    lines = cheapest_changes(cfg, "ppo")
    assert len(lines) == 3
    for line in lines:
        assert make_plan(composed("stage=ppo", *overrides, *line.split()), "ppo").fits, line
        assert len(line.split()) <= 6


def test_a_local_file_is_counted(tmp_path: Path) -> None:
    pair = json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"})
    (tmp_path / "pairs.jsonl").write_text(f"{pair}\n" * 1000)
    cfg = composed(
        "actor=opt125m",
        "data=jsonl",
        f"data.sources.mine.path={tmp_path}/pairs.jsonl",
        "data.eval_share=0.1",
    )
    assert [rows_for_stage(cfg, stage) for stage in ("sft", "rm", "ppo")] == [
        180,
        360,
        360,
    ]
    cfg.sft.batch_size, cfg.sft.epochs = 16, 1
    assert ", about 11 steps" in one_line_summary(make_plan(cfg, "sft"))
    cfg.sft.max_steps = 5
    assert ", at most 5 steps" in one_line_summary(make_plan(cfg, "sft"))
    cfg.sft.max_steps = None
    cfg.data.sources["mine"].path = "somebody/unknown"
    assert rows_for_stage(cfg, "sft") is None
    p = make_plan(cfg, "sft")
    assert p.steps.number is None and "known when the data are read" in one_line_summary(p)
    assert check_config(cfg) == []


def test_checkpoints_on_disk_are_counted_by_hand() -> None:
    """fp32: weights and Adam's two moments of actor and critic, 12 bytes a weight.

    The kept checkpoints count, and the one that is being written.
    """
    kept = make_plan(composed("stage=ppo", "checkpoint.keep=1"), "ppo")
    trained = sum(role.trained for role in kept.roles if role.name in ("actor", "critic"))
    assert kept.checkpoints == 2 * 12 * trained
    low = make_plan(composed("stage=ppo", "checkpoint.keep=3", "deploy.precision=bf16"), "ppo")
    assert low.checkpoints == 4 * 14 * trained


@pytest.mark.parametrize(
    "flags, overrides, expected",
    [
        ("fpu avx512_bf16 avx2", [], True),
        ("fpu amx_bf16", [], True),
        ("fpu avx512f", [], False),
        ("fpu avx512_bf16", ["deploy.precision=bf16"], False),
        ("fpu avx512_bf16", ["deploy=single_gpu", "deploy.precision=fp32"], False),
        (None, [], False),
    ],
)
def test_a_processor_that_multiplies_bf16_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str | None,
    overrides: list[str],
    expected: bool,
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"model name\t: some\nflags\t\t: {flags}\n")
    monkeypatch.setattr(plan_text, "CPU_INFO", file)
    notes = plan_text.faster_precision(composed(*overrides))
    assert bool(notes) == expected and all("deploy.precision=bf16" in note for note in notes)

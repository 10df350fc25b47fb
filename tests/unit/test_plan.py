"""The plan against built models, real tensors, DeepSpeed's own estimators and hand numbers."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_base
from helpers import CONF, composed
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.base.constants import SANDBOX_PROMPTS
from rlhf.config.schema import Arch, Config, Lora
from rlhf.config.validation import check_config
from rlhf.data.sandbox.ground_truth import all_prompts
from rlhf.distributed.engine import build_engine
from rlhf.models import lora
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.planning.formulas import activations, role_memory
from rlhf.planning.memory import gather_for_rollout, make_plan
from rlhf.planning.shapes import ACTIVATIONS, arch_of, linear_layers, lora_parameters, parameters
from rlhf.planning.steps import rows_for_stage
from rlhf.planning.summary import cheapest_changes, one_line_summary
from rlhf.training.optimizer_step import optimizer_step

MODELS = sorted(
    path.stem for path in (CONF / "model").glob("*.yaml") if path.stem not in ("tiny", "custom")
)
GIB = 2**30


def as_transformers(arch: Arch) -> Any:
    """A transformers configuration with the numbers of an `arch` block."""
    own: dict[str, Any] = {
        "opt": {
            "ffn_dim": arch.ffn,
            "word_embed_proj_dim": arch.embed or arch.hidden,
            "do_layer_norm_before": arch.embed is None,
        },
        "gpt2": {"n_positions": arch.positions, "n_inner": arch.ffn},
        "bloom": {},
    }.get(
        arch.family,
        {
            "intermediate_size": arch.ffn,
            "num_key_value_heads": arch.kv_heads,
            "head_dim": arch.head_dim,
        },
    )
    if arch.family == "gpt_neox":
        own = {"intermediate_size": arch.ffn}
    positions = (
        {} if arch.family in ("bloom", "gpt2") else {"max_position_embeddings": arch.positions}
    )
    shape = {
        "num_hidden_layers": arch.layers,
        "hidden_size": arch.hidden,
        "num_attention_heads": arch.heads,
        "vocab_size": arch.vocab,
    }
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(
        arch.family, **shape, **positions, **own, **special, tie_word_embeddings=arch.tied
    )


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --------------------------------------------------------------------------------- parameter counts

KNOWN = {  # as the papers and model cards have them
    "opt1.3b": 1_315_758_080,
    "opt6.7b": 6_658_473_984,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
    "smollm2-1.7b": 1_711_376_384,
    "pythia-160m": 162_322_944,
    "pythia-6.9b": 6_857_302_016,
    "gpt2": 124_439_808,
    "bloom-560m": 559_214_592,
}


@pytest.mark.parametrize(
    "name", [pytest.param(m, marks=() if m in KNOWN else pytest.mark.full) for m in MODELS]
)
def test_parameter_counts_are_exact(name: str) -> None:
    """Against the model that transformers builds, without memory for its weights."""
    arch = composed(f"actor={name}").actor.arch
    assert arch is not None
    shape = as_transformers(arch)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(shape)
        shape.num_labels = 1
        scorer = AutoModelForSequenceClassification.from_config(shape)
    assert parameters(arch) == count(policy) == KNOWN.get(name, count(policy))
    assert parameters(arch, scorer=True) == count(scorer)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in ACTIVATIONS])
def test_numbers_are_read_from_a_models_directory(tmp_path: Path, family: str) -> None:
    save_base(tmp_path, family)
    arch = arch_of(str(tmp_path), None)
    assert arch is not None and arch.family == family
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    assert parameters(arch) == count(policy)
    assert parameters(arch, scorer=True) == count(scorer)
    for targets in (None, [list(linear_layers(arch))[0]]):
        for embeddings in (False, True):
            settings = Lora(rank=3, alpha=1.0, dropout=0.0, targets=targets, embeddings=embeddings)
            scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
            for hf in (AutoModelForCausalLM.from_pretrained(tmp_path), scorer):
                lora.add_adapter(hf, settings, "actor.lora")
                trained = sum(p.numel() for p in hf.parameters() if p.requires_grad)
                assert lora_parameters(arch, settings, scorer=hasattr(hf, "score")) == trained, (
                    targets,
                    embeddings,
                )


def test_a_model_that_nobody_described() -> None:
    known = composed("actor=opt125m").actor.arch
    assert known is not None
    cfg = composed("stage=sft", "actor=opt125m", "actor.arch=null")
    with pytest.raises(
        ValueError,
        match="the shape of actor is not known before it is loaded: give its numbers as actor.arch",
    ):
        make_plan(cfg, "sft")
    with pytest.raises(ValueError, match="must be one of opt, gpt2"):
        linear_layers(dataclasses.replace(known, family="mamba"))


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
SOME = [(0, "fp32", 0), (1, "bf16", 8), (2, "fp32", 8), (3, "bf16", 0)]


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
    optimizer_step(engine, [0], lambda _: -engine(ids, torch.ones_like(ids), wanted)[0].sum(), 1e-3)
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
    """The estimators count an fp32 copy of the gradients, which the plan counts elsewhere.

    In the plan it belongs to the optimizer step: the whole copy (stage 2) or half of it (stage 3).
    """
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
            assert ours + 4 * n / world == theirs
        else:
            _, theirs, _ = estimate_zero3_model_states_mem_needs(
                n, 0, world, 1, False, False, False, additional_buffer_factor=1
            )
            assert ours + 2 * n / world == theirs


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
        and actor.gradients == 2 * adapter / 8
        and actor.optimizer == 12 * adapter / 8
    )
    assert [role.name for role in p.roles] == ["actor", "reward", "critic"], (
        "the reference is the actor with its adapter off"
    )
    assert p.phases["sampling"]["kv cache"] == 2 * 40 * 5120 * 32 * 512 * 2
    assert p.phases["actor's update"]["logits"] == 64 * 50272 * (4 + 4) + 4 * 2**22


def test_the_plan_knows_the_size_of_the_sandbox() -> None:
    assert len(all_prompts()) == SANDBOX_PROMPTS


def test_partitioned_sampling_is_chosen_where_whole_weights_do_not_fit() -> None:
    whole = composed("stage=ppo", "actor=opt13b", "deploy=single_node")
    assert gather_for_rollout(whole)
    large = composed("stage=ppo", "actor=opt66b", "deploy=multi_node")
    assert not gather_for_rollout(large)
    (note,) = make_plan(large, "ppo").notes
    assert "sampling fetches all 124.9 GiB of the actor's weights" in note
    whole.deploy.gather_for_rollout = False
    assert not gather_for_rollout(whole)
    assert gather_for_rollout(composed("stage=ppo"))


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
    (tmp_path / "pairs.jsonl").write_text("{}\n" * 1000)
    cfg = composed(
        "actor=opt125m",
        f"data.sources.rm_static.path={tmp_path}/pairs.jsonl",
        "data.eval_share=0.1",
    )
    assert [rows_for_stage(cfg, stage) for stage in ("sft", "rm", "ppo")] == [
        180,
        360,
        360,
    ]
    cfg.data.sources["rm_static"].path = "somebody/unknown"
    assert rows_for_stage(cfg, "sft") is None
    p = make_plan(cfg, "sft")
    assert p.steps is None and "known when the data are read" in one_line_summary(p)
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

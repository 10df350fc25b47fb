"""Adapters: what is trained, what is not, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import IDS, MASK, build, logits, output, said, update, with_adapter
from families import FAMILIES
from helpers import composed, metrics
from worker_runs import prepare, work

from rlhf.config.choices import Precision
from rlhf.config.stage_graph import adapter_only
from rlhf.models import lora
from rlhf.models.loading import (
    full_state_dict,
    load_policy,
    load_scorer,
    load_tokenizer,
    save_engine,
)

each_family = pytest.mark.parametrize("family", FAMILIES)


@each_family
@pytest.mark.parametrize("role", ["actor", "reward_trained"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_all_that_is_trained_has_a_gradient_under_checkpointing_and_nothing_else_moves(
    base: Any,
    tokenizer: Any,
    tmp_path: Path,
    one_process: None,
    family: str,
    role: str,
    embeddings: bool,
) -> None:
    stage, node = ("rm", "reward") if role == "reward_trained" else ("sft", "actor")
    cfg = with_adapter(
        stage, f"{node}.lora.embeddings={embeddings}", "deploy.activation_checkpointing=true"
    )
    engine = build(cfg, base(family), tokenizer, tmp_path, role)
    hf = engine.module.hf
    trained = {name for name, p in hf.named_parameters() if p.requires_grad}
    adapter = {name for name in trained if ".lora_A." in name or ".lora_B." in name}
    in_full = trained - adapter
    word_embeddings = {
        name for name, p in hf.named_parameters() if p is hf.get_input_embeddings().weight
    }
    assert len(adapter) == 2 * len(list(lora.lora_layers(hf))) > 0
    assert in_full == ({"score.weight"} if role == "reward_trained" else set()) | (
        word_embeddings if embeddings else set()
    )

    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    seen: dict[str, float] = {}
    for name, p in hf.named_parameters():
        if p.requires_grad:
            p.register_hook(lambda g, name=name: seen.__setitem__(name, float(g.abs().sum())))
    update(engine)
    assert set(seen) == trained and all(seen[name] > 0 for name in trained)
    moved = {name for name, p in hf.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved == trained


@each_family
def test_with_the_adapter_off_the_policy_is_its_reference(
    base: Any, tokenizer: Any, tmp_path: Path, one_process: None, family: str
) -> None:
    """The weights are the same bit for bit. The outputs need not be: the engine's weights lie at
    other addresses, and on some processors a matrix product then rounds differently."""
    cfg = with_adapter("sft")
    plain = load_policy(base(family), tokenizer, Precision.fp32).eval()
    engine = build(cfg, base(family), tokenizer, tmp_path, "actor")
    engine.eval()
    with torch.no_grad():
        assert torch.allclose(output(engine), said(plain), atol=1e-5), "B starts at zero"
    update(engine)
    reference = lora.AdapterOff(engine)
    with torch.no_grad():
        assert torch.allclose(said(reference), said(plain), atol=1e-5)
        assert not torch.allclose(output(engine), said(plain), atol=1e-3), "and is on again"
    own, merged = dict(plain.hf.named_parameters()), lora.merged_name
    for name, p in engine.module.hf.named_parameters():
        assert p.requires_grad if ".lora_" in name else torch.equal(p, own[merged(name)]), name


def test_the_update_is_alpha_over_rank_times_b_a(
    base: Any, tokenizer: Any, tmp_path: Path, one_process: None
) -> None:
    engine = build(with_adapter("sft"), base("llama"), tokenizer, tmp_path, "actor")
    update(engine)
    weights, adapter = full_state_dict(engine.module.hf)
    plain = load_policy(base("llama"), tokenizer, Precision.fp32).hf.state_dict()
    assert set(weights) == set(plain)
    key = "model.layers.1.mlp.up_proj"
    a, b = adapter[f"{key}.lora_A.default.weight"], adapter[f"{key}.lora_B.default.weight"]
    assert a.shape == (3, 32) and b.shape == (64, 3)
    torch.testing.assert_close(weights[f"{key}.weight"], plain[f"{key}.weight"] + 6 / 3 * b @ a)


@each_family
@pytest.mark.parametrize("role", ["actor", "reward_trained"])
@pytest.mark.parametrize("embeddings", [False, True])
def test_merged_weights_and_adapter_say_the_same_as_the_trained_model(
    base: Any,
    tokenizer: Any,
    tmp_path: Path,
    one_process: None,
    family: str,
    role: str,
    embeddings: bool,
) -> None:
    stage, node = ("rm", "reward") if role == "reward_trained" else ("sft", "actor")
    cfg = with_adapter(stage, f"{node}.lora.embeddings={embeddings}")
    engine = build(cfg, base(family), tokenizer, tmp_path, role)
    update(engine)
    with torch.no_grad():
        expected, raw = output(engine), logits(engine.module)
    save_engine(engine, tokenizer, tmp_path / "model")
    load = load_scorer if stage == "rm" else load_policy
    merged = load(str(tmp_path / "model"), tokenizer, Precision.fp32).eval()
    assert not any("lora" in name for name in merged.state_dict())
    onto = load(base(family), tokenizer, Precision.fp32).eval()
    onto.hf = peft.PeftModel.from_pretrained(onto.hf, tmp_path / "model" / "adapter").eval()
    assert json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == base(family)
    for again in (merged, onto):
        if again is onto:
            again.hf = again.hf.merge_and_unload()
        with torch.no_grad():
            got = said(again) if stage == "sft" else again(IDS, MASK)
            assert float((logits(again) - raw).abs().max()) < 1e-4
        assert float(((got - expected) * (1 if stage == "sft" else MASK)).abs().max()) < 1e-4


def test_a_target_that_matches_nothing_is_named_with_what_there_is(
    base: Any, tokenizer: Any, tmp_path: Path, one_process: None
) -> None:
    with pytest.raises(
        ValueError,
        match=r"actor.lora.targets=query: llama has no linear layer of that name; "
        r"choose from .*q_proj",
    ):
        build(
            with_adapter("sft", "actor.lora.targets=[q_proj,query]"),
            base("llama"),
            tokenizer,
            tmp_path,
            "actor",
        )
    engine = build(
        with_adapter("sft", "actor.lora.targets=[q_proj,self_attn.v_proj]"),
        base("llama"),
        tokenizer,
        tmp_path,
        "actor",
    )
    assert {name.rsplit(".", 1)[-1] for name, _ in lora.lora_layers(engine.module.hf)} == {
        "q_proj",
        "v_proj",
    }


def test_the_same_seed_makes_the_same_adapter_whatever_was_drawn_before(
    base: Any, tokenizer: Any, tmp_path: Path, one_process: None
) -> None:
    adapters = []
    for draws in (0, 7):
        torch.manual_seed(5)
        torch.rand(draws)
        engine = build(with_adapter("sft"), base("opt"), tokenizer, tmp_path, "actor")
        adapters.append(
            {
                name: p.detach()
                for name, p in engine.module.hf.named_parameters()
                if ".lora_" in name
            }
        )
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


LORA = [
    "actor.lora.rank=4",
    "reward.lora.rank=4",
    "actor.lora.dropout=0.1",
    "sft.lr=1e-2",
    "rm.lr=1e-2",
    "rl.lr=1e-2",
]


@pytest.mark.parametrize("processes, zero", [(1, 0), pytest.param(2, 3, marks=pytest.mark.full)])
def test_all_stages_with_adapters(tmp_path: Path, processes: int, zero: int) -> None:
    """PPO starts from the merged SFT model and is its own reference; with trained embeddings it is
    not."""
    placed = {"processes_per_node": processes, "zero_stage": zero}
    sft, rm = (prepare(tmp_path, "lora", stage, {}, LORA, **placed) for stage in ("sft", "rm"))
    inputs = {"sft": str(sft / "model"), "rm": str(rm / "model")}
    ppo = prepare(tmp_path, "lora", "ppo", inputs, LORA, **placed)
    both = prepare(
        tmp_path, "embeddings", "ppo", inputs, [*LORA, "actor.lora.embeddings=true"], **placed
    )
    work([sft, rm, ppo, both], processes)
    assert (both / "ds_ref.json").exists() and not (ppo / "ds_ref.json").exists()
    for run in (ppo, both):
        rows = metrics(run)
        assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4), (
            "policy and reference start equal"
        )
        assert [row["policy/ratio_first_minibatch"] for row in rows] == pytest.approx(
            [1] * len(rows), abs=1e-5
        )
        assert (
            rows[1]["objective/kl"] != 0
            and rows[0]["policy/grad_norm"] > 0
            and rows[0]["val/grad_norm"] > 0
        )
        assert {"model", "critic"} == {path.parent.name for path in run.glob("*/adapter")}
    tokenizer = load_tokenizer(str(sft / "model"))
    random = load_policy("builtin:tiny", tokenizer, Precision.fp32).eval()
    tuned = load_policy(str(sft / "model"), tokenizer, Precision.fp32).eval()
    again = load_policy(str(ppo / "model"), tokenizer, Precision.fp32).eval()
    with torch.no_grad():
        logp = [said(policy)[0] for policy in (random, tuned, again)]
    assert not torch.allclose(logp[0], logp[1], atol=1e-3) and not torch.allclose(
        logp[1], logp[2], atol=1e-3
    )


def test_who_is_its_own_reference() -> None:
    assert not adapter_only(composed().actor)
    assert adapter_only(composed("actor.lora.rank=4").actor)
    assert not adapter_only(composed("actor.lora.rank=4", "actor.lora.embeddings=true").actor)

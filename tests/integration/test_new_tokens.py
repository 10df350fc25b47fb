"""LoRA with a template whose tokens are new to the model: chatml for models that never saw it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapters import IDS, MASK, build, logits, output, said, update, with_adapter
from families import FAMILIES, save_base
from helpers import metrics, some
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from worker_runs import kill_when, prepare, rows_of, same, work

from rlhf.config.choices import Precision, Template
from rlhf.models import lora
from rlhf.models.loading import load_policy, load_scorer, load_tokenizer, save_engine
from rlhf.models.token_rows import layers_with_rows
from rlhf.runs.directory import find_checkpoints

NEW = [732, 733]  # <|im_end|>, <|im_start|>
# a prompt and a response with new tokens, the end token at the end
WITH_NEW = IDS.clone()
WITH_NEW[:, -1], WITH_NEW[:, 3] = NEW
PEFT_MODELS = {False: AutoModelForCausalLM, True: AutoModelForSequenceClassification}
CASES = [
    (family, tied, is_scorer, embeddings)
    for family in FAMILIES
    for tied in (False, True)
    for is_scorer in (False, True)
    for embeddings in (False, True)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The directory of a random base model that has a tokenizer without chatml."""
    root = tmp_path_factory.mktemp("models")

    def directory(family: str, tied: bool) -> str:
        path = root / f"{family}-{tied}"
        if not path.exists():
            save_base(path, family, tie_word_embeddings=tied)
            load_tokenizer("builtin:tiny").save_pretrained(path)
        return str(path)

    return directory


def with_peft(base: str, adapter: Path, is_scorer: bool) -> Any:
    """The adapter on the base model, loaded as docs/deployment.md describes it."""
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    more = {"num_labels": 1} if is_scorer else {}
    plain = PEFT_MODELS[is_scorer].from_pretrained(base, **more)
    plain.resize_token_embeddings(max(len(tokenizer), plain.config.vocab_size))
    return peft.PeftModel.from_pretrained(plain, adapter).eval()


@pytest.mark.parametrize(("family", "tied", "is_scorer", "embeddings"), some(CASES, every=3))
def test_the_new_rows_are_trained_and_saved_and_nothing_else_moves(
    model: Callable[..., str],
    tmp_path: Path,
    one_process: None,
    family: str,
    tied: bool,
    is_scorer: bool,
    embeddings: bool,
) -> None:
    """Merged model = adapter loaded by peft = engine; the adapter off = the model before it."""
    base = model(family, tied)
    tokenizer = load_tokenizer(base, Template.chatml)
    stage, node, role = (
        ("rm", "reward", "reward_trained") if is_scorer else ("sft", "actor", "actor")
    )
    load = load_scorer if is_scorer else load_policy
    cfg = with_adapter(stage, f"{node}.lora.embeddings={embeddings}")
    torch.manual_seed(0)
    engine = build(cfg, base, tokenizer, tmp_path, role)
    hf = engine.module.hf
    rows = {name for name, p in hf.named_parameters() if name.endswith(".trained_rows")}
    expected_rows = 1 if is_scorer or tied else 2
    if embeddings:
        expected_rows = 0 if is_scorer or tied else 1
    assert len(rows) == expected_rows
    before = {name: p.detach().clone() for name, p in hf.named_parameters()}
    with torch.no_grad():
        started = output(engine, WITH_NEW)
    update(engine, 3, WITH_NEW)
    for name, p in hf.named_parameters():
        assert p.requires_grad != torch.equal(p.detach(), before[name]), name
    for name in rows:
        assert (dict(hf.named_parameters())[name] != before[name]).any(1).all(), "each row"

    with torch.no_grad():
        expected, raw = output(engine, WITH_NEW), logits(engine.module, WITH_NEW)
        if not is_scorer and not embeddings:
            off = said(lora.AdapterOff(engine), WITH_NEW)
            assert torch.allclose(off, started, atol=1e-5), (
                "the reference has the rows of the start"
            )
            assert torch.equal(said(engine, WITH_NEW), expected), "and then they are on again"
    save_engine(engine, tokenizer, tmp_path / "model")
    merged = load(str(tmp_path / "model"), tokenizer, Precision.fp32).eval()
    onto = with_peft(base, tmp_path / "model" / "adapter", is_scorer)
    settings = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert len(settings["trainable_token_indices"] or []) == expected_rows
    real = MASK.bool() if is_scorer else torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        got = output_of(merged, is_scorer)
        assert torch.allclose(got[..., real], expected[..., real], atol=1e-4)
        assert torch.allclose(logits(merged, WITH_NEW), raw, atol=1e-4)
        merged.hf = onto.get_base_model()  # with the adapter in it
        assert torch.allclose(logits(merged, WITH_NEW), raw, atol=1e-4)
        merged.hf = onto.merge_and_unload()
        assert torch.allclose(logits(merged, WITH_NEW), raw, atol=1e-4)


def output_of(module: Any, is_scorer: bool) -> torch.Tensor:
    return module(WITH_NEW, MASK) if is_scorer else said(module, WITH_NEW)


# --- whole stages


def sft_run(root: Path, name: str, path: object, *overrides: str, **deploy: object) -> Path:
    options = ["actor=custom", f"actor.path={path}", "sft.lr=1e-2", "sft.epochs=99", *overrides]
    return prepare(root, name, "sft", {}, options, **deploy)


def final(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())["metrics"]


@pytest.mark.full
@pytest.mark.parametrize("tied", [False, True])
def test_a_policy_with_new_rows_learns_to_end_its_responses(
    model: Callable[..., str], tmp_path: Path, tied: bool
) -> None:
    """Frozen rows would keep the end token's probability near 1 / V; full training is compared.

    The model has learned the same answers in the style hh before.
    """
    many = ["sft.batch_size=16", "sft.max_steps=150"]
    base = sft_run(tmp_path, "base", model("llama", tied), *many)
    work([base], 1)
    chatml = ["data.template=chatml", "sft.batch_size=16", "sft.max_steps=100"]
    full, low_rank = (
        sft_run(tmp_path, f"rank{rank}", base / "model", *chatml, f"actor.lora.rank={rank}")
        for rank in (0, 4)
    )
    work([full, low_rank], 1)
    ends = {run.name: final(run)["eval/eos_probability"] for run in (full, low_rank)}
    assert ends["rank4-sft"] > max(0.3, 0.6 * ends["rank0-sft"]), ends
    # the next stage starts from a model that knows the tokens: there is nothing new
    tokenizer = load_tokenizer(str(low_rank / "model"), Template.chatml)
    cfg = with_adapter("sft")
    again = load_policy(str(low_rank / "model"), tokenizer, Precision.fp32, cfg.actor.lora)
    assert not [*layers_with_rows(again.hf)]


FEW = ["data.template=chatml", "actor.lora.rank=4", "sft.batch_size=8"]
FULL = pytest.mark.full
PLACES = [
    pytest.param(*place, marks=FULL) for place in ((1, 0, False), (2, 3, False), (2, 3, True))
]


@pytest.mark.parametrize(("processes", "zero", "tied"), PLACES)
def test_a_run_with_new_rows_is_resumed_bit_for_bit(
    model: Callable[..., str], tmp_path: Path, processes: int, zero: int, tied: bool
) -> None:
    more = [*FEW, "sft.max_steps=10", "checkpoint.every_steps=5"]
    whole, killed = (
        sft_run(
            tmp_path,
            name,
            model("llama", tied),
            *more,
            processes_per_node=processes,
            zero_stage=zero,
        )
        for name in ("whole", "killed")
    )
    work([whole], processes)
    kill_when(killed, processes, lambda: len(rows_of(killed, "metrics.jsonl")) >= 7)
    assert [about["step"] for _, about in find_checkpoints(killed)[0]] == [5]
    work([killed], processes)
    same(whole, killed)
    adapters = [load_file(run / ADAPTER) for run in (whole, killed)]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


ADAPTER = Path("model") / "adapter" / "adapter_model.safetensors"


@pytest.mark.full
@pytest.mark.parametrize("tied", [False, True])
def test_zero3_in_two_processes_trains_the_same_rows(
    model: Callable[..., str], tmp_path: Path, tied: bool
) -> None:
    plain, sharded = (
        sft_run(
            tmp_path,
            f"zero{zero}",
            model("llama", tied),
            *FEW,
            processes_per_node=n,
            zero_stage=zero,
        )
        for n, zero in ((1, 0), (2, 3))
    )
    work([plain], 1)
    work([sharded], 2)
    one, other = (load_file(run / ADAPTER) for run in (plain, sharded))
    rows = [name for name in one if name.endswith("trainable_tokens_delta")]
    assert len(rows) == (1 if tied else 2) and one.keys() == other.keys()
    for name in rows:
        assert one[name].shape == (2, 32)
        assert torch.allclose(one[name], other[name], atol=1e-4), name
    one, other = (load_file(run / "model" / "model.safetensors") for run in (plain, sharded))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


@pytest.mark.full
def test_online_rl_and_dpo_from_a_model_that_does_not_know_the_tokens(
    model: Callable[..., str], tmp_path: Path
) -> None:
    """The reference is the actor with its adapter off and the rows of the start. A reward model and
    its critic have input rows."""
    path = model("llama", False)
    options = [
        "data.template=chatml",
        "actor.lora.rank=4",
        "reward.lora.rank=4",
        "actor=custom",
        "reward=custom",
        f"actor.path={path}",
        f"reward.path={path}",
        "rl.lr=1e-2",
        "dpo.lr=1e-2",
        "dpo.max_steps=3",
        "rm.lr=1e-2",
    ]
    rm = prepare(tmp_path, "new", "rm", {}, options)
    inputs = {"sft": path, "rm": str(rm / "model")}
    ppo, dpo = (prepare(tmp_path, "new", stage, inputs, options) for stage in ("ppo", "dpo"))
    work([rm, ppo, dpo], 1)
    assert not (ppo / "ds_ref.json").exists() and not (dpo / "ds_ref.json").exists()
    rows = metrics(ppo)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4), "policy and reference start equal"
    for row in rows:
        assert row["policy/ratio_first_minibatch"] == pytest.approx(1, abs=1e-5)
    assert rows[1]["objective/kl"] != 0
    ids = {}
    for run, part in ((rm, "model"), (ppo, "model"), (ppo, "critic"), (dpo, "model")):
        settings = json.loads((run / part / "adapter" / "adapter_config.json").read_text())
        ids[run.name, part] = settings["trainable_token_indices"]
    both = {"embed_tokens": NEW, "lm_head": NEW}
    assert ids == {
        ("new-rm", "model"): {"embed_tokens": NEW},
        ("new-ppo", "model"): both,
        ("new-ppo", "critic"): None,  # the reward model has learned them
        ("new-dpo", "model"): both,
    }

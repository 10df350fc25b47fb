"""New heads, grown vocabularies, saved and loaded models, and the sums that the stages train on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, PAD, VOCABULARY, save_base
from helpers import composed
from model_outputs import (
    FP32,
    ROWS,
    all_but_the_first,
    each_family,
    logits_of,
    logp_of,
    padded,
    score_of,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf.base.errors import UserError
from rlhf.config.choices import Precision, RmLoss
from rlhf.config.schema import Config
from rlhf.data.batches import pad_right
from rlhf.distributed.engine import build_engine
from rlhf.evaluation.reward_model import pairwise_accuracy
from rlhf.models.loading import load_policy, load_scorer, load_tokenizer, save_engine
from rlhf.models.logprobs import token_logprobs
from rlhf.models.wrappers import last_token_score, model_inputs
from rlhf.rl.rewards import score_rows
from rlhf.runs.checks import POLICY, SCORER, check_model
from rlhf.stages import rm
from rlhf.training.likelihood import end_probability, perplexity, response_nll_stats


@pytest.fixture(scope="module")
def cfg() -> Config:
    return composed("stage=ppo")


def in_own_memory(module: nn.Module) -> Any:
    """The same weights at new addresses, no longer where their file puts them.

    The rounding of a product depends on the addresses of its factors.
    """
    for p in module.parameters():
        p.data = p.data.clone()
    return module.eval()


# ---------------------------------------------------------------------------------------- new heads


def test_a_new_head_has_the_standard_deviation_1_over_the_root_of_d_plus_1(tokenizer: Any) -> None:
    heads = []
    for seed in range(8):
        torch.manual_seed(seed)
        heads.append(
            load_scorer("builtin:tiny", tokenizer, FP32).hf.score.weight.detach().flatten()
        )
    weights = torch.cat(heads)  # 8 x 128 numbers: their standard deviation is known to 2.2 %
    assert weights.std().item() == pytest.approx(1 / math.sqrt(128 + 1), rel=0.07)
    assert abs(weights.mean().item()) < 3 / math.sqrt(129 * len(weights))


def test_the_seed_decides_new_weights(tokenizer: Any) -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        modules: list[nn.Module] = [
            load_policy("builtin:tiny", tokenizer, FP32),
            load_scorer("builtin:tiny", tokenizer, FP32),
        ]
        return [p.detach() for module in modules for p in module.parameters() if p.ndim > 1]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1)))
    assert not any(torch.equal(a, b) for a, b in zip(weights(1), weights(2)))


def test_precision_is_that_of_the_weights_and_scores_and_log_probabilities_are_float32(
    tokenizer: Any,
) -> None:
    policy, scorer = (
        load("builtin:tiny", tokenizer, Precision.bf16) for load in (load_policy, load_scorer)
    )
    assert {p.dtype for module in (policy, scorer) for p in module.parameters()} == {torch.bfloat16}
    ids, mask = pad_right(ROWS, PAD)
    assert {x.dtype for x in (scorer(ids, mask), *policy(ids, mask, all_but_the_first(mask)))} == {
        torch.float32
    }


# --------------------------------------------------------------------------------------- vocabulary


@pytest.mark.parametrize("family", FAMILIES)
def test_a_directory_is_a_policy_whatever_its_class_is_called(tmp_path: Path, family: str) -> None:
    """GPT-2's is GPT2LMHeadModel."""
    save_base(tmp_path, family)
    assert list(check_model("actor.path", str(tmp_path), POLICY)) == []
    (line,) = check_model("rl.reward", str(tmp_path), SCORER)
    assert "not a reward model" in line


def test_spare_rows_of_the_embedding_are_kept(tmp_path: Path, tokenizer: Any) -> None:
    save_base(tmp_path, "opt", vocabulary=800)
    before = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    for loaded in (
        load_policy(str(tmp_path), tokenizer, FP32),
        load_scorer(str(tmp_path), tokenizer, FP32),
    ):
        assert torch.equal(loaded.hf.get_input_embeddings().weight, before)
        assert loaded.hf.config.vocab_size == 800


@pytest.mark.parametrize("family", ["opt", "llama"])  # tied and untied output weights
def test_a_tokenizer_with_more_tokens_grows_the_embedding_and_keeps_what_was_there(
    base: Any, family: str
) -> None:
    larger = load_tokenizer("builtin:tiny")
    larger.add_tokens([f"<new{i}>" for i in range(8)])
    before = AutoModelForCausalLM.from_pretrained(base(family))
    policy, scorer = (
        load_policy(base(family), larger, FP32),
        load_scorer(base(family), larger, FP32),
    )
    for loaded in (policy, scorer):
        weight = loaded.hf.get_input_embeddings().weight
        assert weight.shape[0] == loaded.hf.config.vocab_size == VOCABULARY + 8
        assert torch.equal(weight[:VOCABULARY], before.get_input_embeddings().weight)
    assert torch.equal(
        policy.hf.get_output_embeddings().weight[:VOCABULARY], before.get_output_embeddings().weight
    )
    logits = logits_of(policy.hf, [5, VOCABULARY + 7])
    assert logits.shape == (1, VOCABULARY + 8)
    assert torch.allclose(
        logp_of(policy, [5, VOCABULARY + 7]), logits.log_softmax(-1)[:, -1], atol=1e-5
    )


def test_a_grown_model_and_its_tokenizer_come_back_grown(
    tmp_path: Path, one_process: None, cfg: Config
) -> None:
    larger = load_tokenizer("builtin:tiny")
    larger.add_tokens(["<new>"])
    engine = build_engine(lambda: load_policy("builtin:tiny", larger, FP32), cfg, "ref", tmp_path)
    save_engine(engine, larger, tmp_path / "model")
    again = load_tokenizer(str(tmp_path / "model"))
    assert len(again) == VOCABULARY + 1 and again.convert_tokens_to_ids("<new>") == VOCABULARY
    assert (again.pad_token_id, again.eos_token_id) == (PAD, EOS)
    assert (
        load_policy(str(tmp_path / "model"), again, FP32).hf.get_input_embeddings().num_embeddings
        == VOCABULARY + 1
    )


# ------------------------------------------------------------------------------------ save and load


@each_family
def test_a_saved_reward_model_gives_the_same_scores_here_and_in_plain_transformers(
    tmp_path: Path, base: Any, tokenizer: Any, one_process: None, cfg: Config, family: str
) -> None:
    scorer = in_own_memory(load_scorer(base(family), tokenizer, FP32))
    ids, mask = pad_right(ROWS, PAD)
    raw = last_token_score(scorer(ids, mask), mask).detach()
    scorer.hf.config.score_mean, scorer.hf.config.score_std = 0.75, 2.5
    normalised = last_token_score(scorer(ids, mask), mask).detach()
    assert torch.allclose(normalised, (raw - 0.75) / 2.5)

    save_engine(
        build_engine(lambda: scorer, cfg, "reward", tmp_path), tokenizer, tmp_path / "model"
    )
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))] and not list(
        tmp_path.glob("*.tmp")
    )
    stored = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (stored["score_mean"], stored["score_std"], stored["pad_token_id"]) == (0.75, 2.5, PAD)

    torch.manual_seed(123)  # a head that were drawn anew would show
    again = in_own_memory(load_scorer(str(tmp_path / "model"), tokenizer, FP32))
    assert torch.equal(last_token_score(again(ids, mask), mask), normalised)
    everyday = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert torch.allclose(everyday(input_ids=ids, attention_mask=mask).logits[:, 0], raw, atol=1e-6)


@each_family
def test_a_saved_policy_gives_the_same_logits_here_and_in_plain_transformers(
    tmp_path: Path, base: Any, tokenizer: Any, one_process: None, cfg: Config, family: str
) -> None:
    policy = in_own_memory(load_policy(base(family), tokenizer, FP32))
    ids, mask = pad_right(ROWS, PAD)
    inputs, wanted = model_inputs(policy.hf, ids, mask), all_but_the_first(mask)
    with torch.no_grad():
        logits, (logp, entropy, correct) = policy.hf(**inputs).logits, policy(ids, mask, wanted)
        save_engine(
            build_engine(lambda: policy, cfg, "ref", tmp_path), tokenizer, tmp_path / "model"
        )
        again = in_own_memory(load_policy(str(tmp_path / "model"), tokenizer, FP32))
        assert torch.equal(again.hf(**inputs).logits, logits)
        assert all(
            torch.equal(one, other)
            for one, other in zip(again(ids, mask, wanted), (logp, entropy, correct))
        )
    everyday = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    for i, row in enumerate(ROWS):
        alone = logits_of(everyday, row)
        assert torch.allclose(alone, logits[i, : len(row) - 1], atol=1e-5)
        expected = token_logprobs(alone, torch.tensor(row[1:]))
        assert torch.allclose(expected[0], logp[i, 1 : len(row)], atol=1e-5)
        assert torch.allclose(expected[1], entropy[i, 1 : len(row)], atol=1e-5)


def test_a_saved_model_brings_its_tokenizer_and_template(
    tmp_path: Path, tokenizer: Any, one_process: None, cfg: Config
) -> None:
    engine = build_engine(
        lambda: load_policy("builtin:tiny", tokenizer, FP32), cfg, "ref", tmp_path
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("of an earlier save")
    save_engine(engine, tokenizer, tmp_path / "model")
    assert not (tmp_path / "model" / "old.txt").exists()
    plain = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "How is my cat?"}]
    text = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "\n\nHuman: How is my cat?\n\nAssistant:"
    assert plain(text).input_ids == tokenizer(text).input_ids
    assert (plain.pad_token, plain.bos_token, plain.eos_token) == ("<pad>", "<s>", "</s>")
    assert AutoConfig.from_pretrained(tmp_path / "model").architectures == ["OPTForCausalLM"]


# ---------------------------------------------------------------- the sums that the stages train on


@pytest.mark.parametrize("plain", [True, False])
def test_answer_sums_count_every_answer_token_with_its_eos_and_nothing_else(
    tmp_path: Path, tokenizer: Any, one_process: None, cfg: Config, plain: bool
) -> None:
    """T2, D10: padding, order and the other rows of the batch do not matter.

    Perplexity is the mean over tokens, not over batches.
    """
    engine = build_engine(
        lambda: load_policy("builtin:tiny", tokenizer, FP32), cfg, "actor", tmp_path
    )
    assert engine.module.supports_packing()
    engine.module.can_pack = plain
    rows = [
        ([5, 6, 7], [40, 41, EOS]),
        ([8], [42, 43, 44, 45, 46]),
        ([9, 10, 11, 12, 13], [EOS]),
        ([14, 15], []),
    ]
    nll, correct, entropy = response_nll_stats(engine, rows, PAD)
    expected_nll, expected_correct, expected_entropy = 0.0, 0, 0.0
    for prompt, answer in rows:
        for i, token in enumerate(answer):
            logits = (
                engine.module.hf(input_ids=torch.tensor([prompt + answer[:i]]))
                .logits[0, -1]
                .detach()
                .double()
            )
            logp = logits.log_softmax(-1)
            expected_nll -= float(logp[token])
            expected_correct += int(logits.argmax()) == token
            expected_entropy -= float((logp.exp() * logp).sum())
    nll = nll.detach()
    assert float(nll) == pytest.approx(expected_nll, rel=1e-5) and int(correct) == expected_correct
    assert float(entropy) == pytest.approx(expected_entropy, rel=1e-5)
    # rows one by one, in another order: the sum is the same
    assert sum(
        float(response_nll_stats(engine, [row], PAD)[0].detach()) for row in reversed(rows)
    ) == pytest.approx(float(nll), rel=1e-5)
    assert perplexity(engine, rows, PAD, cfg.deploy.eval_micro_batch) == pytest.approx(
        math.exp(expected_nll / 9), rel=1e-5
    )
    # the end token after the responses that have one, here EOS or, for the sake of the test, 14
    for end in (EOS, 14):
        whole = [(prompt, answer) for prompt, answer in rows if answer and answer[-1] == end]
        expected = [
            float(
                engine.module.hf(input_ids=torch.tensor([prompt + answer[:-1]]))
                .logits[0, -1]
                .softmax(-1)[end]
            )
            for prompt, answer in whole
        ]
        mean = sum(expected) / len(expected) if expected else 1.0
        found = end_probability(engine, rows, end, PAD, cfg.deploy.eval_micro_batch)
        assert found == pytest.approx(mean, rel=1e-5)


def test_scores_of_pairs_and_rows_are_those_of_each_alone(
    tmp_path: Path, tokenizer: Any, one_process: None, cfg: Config
) -> None:
    """T3: whatever the padding and the company; two equal answers cost log 2."""
    engine = build_engine(
        lambda: load_scorer("builtin:tiny", tokenizer, FP32), cfg, "reward", tmp_path
    )
    pairs = [(ROWS[0], ROWS[1]), (ROWS[2], ROWS[0]), (ROWS[1], ROWS[1])]
    triples = [([], one, other) for one, other in pairs]
    chosen, rejected, loss = rm.compare(engine, triples, tokenizer, RmLoss.sequence)
    assert chosen.tolist() == pytest.approx(
        [score_of(engine.module, row) for row, _ in pairs], abs=1e-5
    )
    assert rejected.tolist() == pytest.approx(
        [score_of(engine.module, row) for _, row in pairs], abs=1e-5
    )
    margins = [
        score_of(engine.module, one) - score_of(engine.module, other) for one, other in pairs
    ]
    assert loss.item() == pytest.approx(
        sum(math.log1p(math.exp(-margin)) for margin in margins), abs=1e-5
    )
    assert rm.compare(engine, triples[2:], tokenizer, RmLoss.sequence)[2].item() == pytest.approx(
        math.log(2), abs=1e-6
    )
    rows = [ROWS[i % 3] + list(range(20, 20 + i)) for i in range(7)]
    for size in (1, 3, 64):
        assert score_rows(engine, rows, tokenizer, size) == pytest.approx(
            [score_of(engine.module, row) for row in rows], abs=1e-5
        )
    with torch.no_grad():
        engine.module.hf.score.weight.fill_(math.inf)
    with pytest.raises(UserError, match="the reward model: 7 of 7 scores are not finite"):
        score_rows(engine, rows, tokenizer, 3)


def test_pairs_are_compared_token_by_token_as_deepspeed_chat_does(
    tmp_path: Path, tokenizer: Any, one_process: None, cfg: Config
) -> None:
    """Its loop over pairs (dschat/utils/model/reward_model.py), on the scores of the same rows.

    Its padding is EOS: where it finds padding, a response has ended.
    """
    engine = build_engine(
        lambda: load_scorer("builtin:tiny", tokenizer, FP32), cfg, "reward", tmp_path
    )
    prompt = [5, 6, 7]
    answers = [
        ([40, 41, 42, EOS], [40, 50, EOS]),  # differ at the second token; the longer one was chosen
        ([60, EOS], [61, 62, 63, 64, EOS]),
        ([40, 41, EOS], [40, 41, 42, EOS]),  # one goes on where the other ends
        ([40, 41, 42], [40, 41, 43, 44, EOS]),  # one was cut, and carries no EOS
        ([40, 41, EOS], [40, 41, EOS]),  # all the same
    ]
    pairs = [(prompt + chosen, prompt + rejected) for chosen, rejected in answers]
    chosen, rejected, loss = rm.compare(
        engine, [(prompt, *both) for both in answers], tokenizer, RmLoss.per_token
    )
    width = max(len(row) for pair in pairs for row in pair)
    expected = 0.0
    for i, (one, other) in enumerate(pairs):
        at_one, at_other = (
            engine(*padded(row, 0, width - len(row)), True)[0].tolist() for row in (one, other)
        )
        one, other = (row + [EOS] * (width - len(row)) for row in (one, other))
        ends = [row.index(EOS) if EOS in row else width for row in (one, other)]
        differ = [t for t in range(width) if one[t] != other[t]]
        start, end = (differ[0], max(ends)) if differ else (width - 1, width)
        if differ:
            expected += sum(
                math.log1p(math.exp(at_other[t] - at_one[t])) for t in range(start, end)
            ) / (end - start)
        else:
            expected += math.log(2)
        assert chosen[i].item() == pytest.approx(at_one[ends[0] - 1], abs=1e-5)
        assert rejected[i].item() == pytest.approx(at_other[ends[1] - 1], abs=1e-5)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    rows = [row for pair in pairs for row in pair]
    flat = [float(x) for both in zip(chosen, rejected) for x in both]
    engine.module.hf.config.score_before_eos = True  # as stage=rm stores it
    assert score_rows(engine, rows, tokenizer, 3) == pytest.approx(flat, abs=1e-5)


def test_accuracy_counts_a_tie_as_half() -> None:
    assert (
        pairwise_accuracy(torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 1.0, -1.0]))
        == 2.5 / 4
    )

"""Every architecture works in every stage, and a reward model may have another architecture and
tokenizer than the policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EOS, FAMILIES, PAD, save_base
from helpers import metrics
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from worker_runs import prepare, work

from rlhf.config.choices import Precision
from rlhf.data import encoding, template
from rlhf.data.batches import pad_left
from rlhf.data.records import Turn
from rlhf.models.loading import load_scorer, load_tokenizer, location
from rlhf.models.wrappers import last_token_score
from rlhf.rl.rewards import Source, retokenize

ONE_STEP = [
    "sft.max_steps=1",
    "rm.max_steps=1",
    "rl.max_steps=1",
    "sft.lr=1e-3",
    "rm.lr=1e-3",
    "rl.lr=1e-3",
]


def base_model(directory: Path, family: str) -> Path:
    """A random model with the built-in tokenizer, as from a hub; it has positions for the prompts
    and responses of these tests."""
    save_base(directory, family, n_positions=128) if family == "gpt2" else save_base(
        directory, family
    )
    AutoTokenizer.from_pretrained(location("builtin:tiny")).save_pretrained(directory)
    return directory


SOME = ["gpt2", "llama"]


@pytest.mark.full
@pytest.mark.parametrize("families", [SOME, [f for f in FAMILIES if f not in SOME]], ids="+".join)
def test_architectures_train_save_load_and_generate(tmp_path: Path, families: list[str]) -> None:
    runs: dict[str, dict[str, Path]] = {}
    for family in families:
        path = base_model(tmp_path / family, family)
        given = [
            f"actor.path={path}",
            f"reward.path={path}",
            *ONE_STEP,
            "deploy.activation_checkpointing=true",
        ]
        sft, rm = (prepare(tmp_path, family, stage, {}, given) for stage in ("sft", "rm"))
        ppo = prepare(
            tmp_path, family, "ppo", {"sft": str(sft / "model"), "rm": str(rm / "model")}, given
        )
        runs[family] = {"sft": sft, "rm": rm, "ppo": ppo}
    work([run for stages in runs.values() for run in stages.values()], 1)
    prompts = [[5, 6, 7, 8], [300, 301]]
    ids, mask = pad_left(prompts, PAD)
    for family, stages in runs.items():
        for stage, run in stages.items():
            row = metrics(run)[0]
            losses = [value for key, value in row.items() if "loss" in key or "grad_norm" in key]
            assert losses and all(value == value and abs(value) < 1e3 for value in losses), (
                family,
                stage,
            )
        assert metrics(stages["ppo"])[0]["policy/ratio_first_minibatch"] == pytest.approx(
            1, abs=1e-5
        ), family
        policy = AutoModelForCausalLM.from_pretrained(stages["ppo"] / "model").eval()
        assert (
            AutoModelForSequenceClassification.from_pretrained(
                stages["rm"] / "model"
            ).config.num_labels
            == 1
        )
        # generation by transformers from the saved model: the likeliest tokens, as plain forward
        # passes without padding give them
        made = policy.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        for prompt, row in zip(prompts, made[:, ids.shape[1] :].tolist()):
            text = list(prompt)
            for token in row[: row.index(EOS)] if EOS in row else row:
                with torch.no_grad():
                    text.append(int(policy(torch.tensor([text])).logits[0, -1].argmax()))
                assert text[-1] == token, family


# ------------------------------------------------------------ a reward model with another tokenizer


def other_tokenizer(directory: Path) -> Any:
    """A tokenizer of bytes: other ids and other lengths for the same text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0, "<nothing>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    bytes_only = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, eos_token="<end>", pad_token="<nothing>"
    )
    made.save_pretrained(directory)
    return load_tokenizer(str(directory))


def test_tokenizers_are_compared_by_content(tmp_path: Path) -> None:
    tiny = load_tokenizer("builtin:tiny")
    tiny.save_pretrained(tmp_path / "copy")
    assert encoding.same_tokens(tiny, load_tokenizer(str(tmp_path / "copy")))
    more = AutoTokenizer.from_pretrained(tmp_path / "copy")
    more.add_tokens(["<more>"])
    assert not encoding.same_tokens(tiny, more)
    assert not encoding.same_tokens(tiny, other_tokenizer(tmp_path / "bytes"))


def test_a_foreign_reward_model_reads_prompt_and_answer_as_text(tmp_path: Path) -> None:
    foreign = other_tokenizer(tmp_path)

    class Reward:
        class module:
            class hf:
                config = AutoConfig.for_model("llama", max_position_embeddings=40)

    short, long = (
        [Turn("user", "Hi")],
        [Turn("user", "A question that is longer than the context of that model")],
    )
    source = Source("other", engine=Reward, tokenizer=foreign, reads_text=True)
    assert (
        foreign.decode(retokenize(source, short, "Hello you", True))
        == "\n\nHuman: Hi\n\nAssistant: Hello you<end>"
    )
    assert (
        foreign.decode(retokenize(source, short, "Hello you", False))
        == "\n\nHuman: Hi\n\nAssistant: Hello you"
    )
    cut = retokenize(source, long, "Yes", True)
    assert len(cut) == 40 and foreign.decode(cut).endswith("of that model\n\nAssistant: Yes<end>")


@pytest.mark.full
def test_ppo_with_a_reward_model_of_another_tokenizer(tmp_path: Path) -> None:
    """Scores are those of the text. The critic starts from the SFT policy's trunk with a zero head,
    so its first values are zero."""
    save_base(tmp_path / "reward-base", "llama", vocabulary=300)
    foreign = other_tokenizer(tmp_path / "reward-base")
    given = [
        f"reward.path={tmp_path / 'reward-base'}",
        *ONE_STEP,
        "data.max_prompt_tokens=400",
        "data.max_response_tokens=100",
    ]
    sft, rm = (
        prepare(tmp_path, "other", "sft", {}, ONE_STEP),
        prepare(tmp_path, "other", "rm", {}, given),
    )
    ppo = prepare(
        tmp_path, "other", "ppo", {"sft": str(sft / "model"), "rm": str(rm / "model")}, ONE_STEP
    )
    work([sft, rm, ppo], 1)
    row = metrics(ppo)[0]
    assert (
        row["val/value_mean"] == 0 and row["val/grad_norm"] > 0 and row["objective/scores_std"] > 0
    )
    scorer = load_scorer(str(rm / "model"), foreign, Precision.fp32).eval()
    samples = [json.loads(line) for line in (ppo / "samples.jsonl").read_text().splitlines()]
    for sample in samples[:4]:
        text = (
            template.render_prompt(foreign, [Turn("user", sample["prompt"])])
            + " "
            + sample["before"]
        )
        ids = foreign(text, add_special_tokens=False).input_ids
        scores = []
        for ended in ([], [foreign.eos_token_id]):
            row_ids = torch.tensor([ids + ended])
            with torch.no_grad():
                scores.append(
                    float(
                        last_token_score(
                            scorer(row_ids, torch.ones_like(row_ids)), torch.ones_like(row_ids)
                        )
                    )
                )
        assert any(abs(score - sample["score_before"]) < 1e-4 for score in scores)

"""stage=eval: what it measures, computed again from its responses and from the models."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed, found
from transformers import AutoModelForCausalLM
from worker_runs import prepare, work

from rlhf.config.choices import Precision
from rlhf.config.loading import load_config
from rlhf.data import encoding, load
from rlhf.evaluation.statistics import wilson_interval
from rlhf.models.loading import load_policy, load_scorer, load_tokenizer
from rlhf.runs.checks import PROMPTS, prompt_file, read_prompt_lines
from rlhf.sampling.batches import PromptBatch
from rlhf.sampling.hf_generate import hf_generate
from rlhf.sampling.token_choice import Sampling

FEW = ["eval.best_of_prompts=4", "eval.best_of=4", "eval.prompts=[zh]"]
CASES: dict[str, list[str]] = {
    "plain": [],
    "greedy": ["eval.decoding=greedy", "eval.best_of=0", "eval.prompts=[]"],
    "beam": [
        "eval.decoding=beam",
        "eval.beams=3",
        "eval.best_of=0",
        "eval.prompts=[]",
        "eval.policies=[sft]",
        "eval.against=null",
    ],
    "functions": [
        "eval.rewards.model=null",
        "+eval.rewards={short: {function: 'short_rewards:length'}}",
        "eval.judge=short",
    ],
    "scorer_only": ["eval.policies=[]"],
    "weighted": ["eval.rewards.model.weight=-3", "eval.best_of=0", "eval.prompts=[]"],
    "several": [
        "eval.rewards.model.weight=0.5",
        "+eval.rewards={short: {function: 'short_rewards:length', weight: -0.1}}",
        "eval.best_of=0",
        "eval.prompts=[]",
    ],
    "truth": [
        "eval.rewards.model=null",
        "+eval.rewards={gold: {function: 'rlhf.data.sandbox:gold'}}",
        "eval.policies=[sft]",
        "eval.best_of=0",
    ],
}


@pytest.fixture(scope="module")
def runs(
    parents: dict[str, Path], inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("eval")
    dpo = prepare(
        root, "up", "dpo", {"sft": inputs["sft"]}, ["dpo.batch_size=8", "dpo.max_steps=4"]
    )
    (root / "short_rewards.py").write_text(
        "def length(completions):\n    return [len(c) for c in completions]\n"
    )
    inputs = inputs | {"dpo": str(dpo / "model"), "prompts/0": str(prompt_file("zh"))}
    done = {}
    for name, overrides in CASES.items():
        given = {
            key: path
            for key, path in inputs.items()
            if key != "rm" or name not in ("functions", "truth")
        }
        done[name] = prepare(root, name, "eval", given, ["pipeline=dpo", *FEW, *overrides])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        work([dpo, *done.values()], 1)
    return done | parents | {"dpo": dpo}


def result(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())["metrics"]


def test_policies_are_measured_side_by_side_in_the_order_asked_for(runs: dict[str, Path]) -> None:
    about = found(runs["plain"])
    assert (
        list(about["policies"]) == ["base", "sft", "dpo"]
        and about["against"] == "sft"
        and about["judge"] == "gold"
    )
    for name, numbers in about["policies"].items():
        wanted = {
            "perplexity",
            "score",
            "gold",
            "length",
            "eos_rate",
            "repetition",
            "gold_best",
        } | ({"kl"} if name != "sft" else set())
        assert numbers.keys() == wanted
        rows = [row["answers"][name] for row in about["answers"]]
        for key in ("score", "gold", "length", "eos_rate"):
            assert numbers[key] == pytest.approx(
                sum(row[key] for row in rows) / len(rows), abs=1e-6
            )
    trained = result(runs["sft"])
    assert about["policies"]["sft"]["perplexity"] == pytest.approx(
        trained["eval/perplexity"], rel=1e-5
    )
    assert about["policies"]["dpo"]["kl"] == pytest.approx(
        result(runs["dpo"])["eval/kl"], abs=1e-3
    ), "the same prompts and draws"
    assert about["policies"]["base"]["perplexity"] > about["policies"]["sft"]["perplexity"]


def test_win_rates_are_those_of_the_answers(runs: dict[str, Path]) -> None:
    about = found(runs["plain"])
    assert {(d["policy"], d["judge"]) for d in about["win_rates"]} == {
        (p, j) for p in ("base", "dpo") for j in ("gold", "model")
    }
    for duel in about["win_rates"]:
        key = "gold" if duel["judge"] == "gold" else "score"
        pairs = [
            (row["answers"][duel["policy"]][key], row["answers"]["sft"][key])
            for row in about["answers"]
        ]
        wins, ties = sum(a > b for a, b in pairs), sum(a == b for a, b in pairs)
        assert (duel["wins"], duel["ties"], duel["prompts"]) == (wins, ties, len(pairs))
        assert duel["rate"] == pytest.approx((wins + ties / 2) / len(pairs))
        assert (duel["low"], duel["high"]) == pytest.approx(
            wilson_interval(wins + ties / 2, len(pairs))
        )
    final = result(runs["plain"])
    (of_dpo,) = [d for d in about["win_rates"] if d["policy"] == "dpo" and d["judge"] == "gold"]
    assert [final["eval/win_rate"], final["eval/win_rate_low"], final["eval/win_rate_high"]] == [
        of_dpo[k] for k in ("rate", "low", "high")
    ]


def test_the_reward_model_is_measured_on_the_held_out_pairs(
    runs: dict[str, Path], tokenizer: Any
) -> None:
    about = found(runs["plain"])["reward_models"]["model"]
    trained = result(runs["rm"])
    assert about["accuracy"] == pytest.approx(trained["eval/accuracy"]) and about[
        "accuracy_gold"
    ] == pytest.approx(trained["eval/accuracy_gold"])
    for parts in (about["by_source"], about["by_length"]):
        assert sum(pairs for pairs, _ in parts.values()) == about["pairs"] == len(about["margins"])
        assert sum(pairs * accuracy for pairs, accuracy in parts.values()) / about[
            "pairs"
        ] == pytest.approx(about["accuracy"])
    assert sum(b["pairs"] for b in about["reliability"]) == about["pairs"] and list(
        about["by_source"]
    ) == ["sandbox"]
    # the margins are raw scores, as they were trained: those of the model by itself
    cfg = load_config(runs["plain"] / "config.yaml")
    pair = load.load_data(cfg.data).eval_rm[0]
    scorer = load_scorer(str(runs["rm"] / "model"), tokenizer, Precision.fp32).eval()
    [(prompt, chosen, rejected)] = encoding.encode_pairs(
        tokenizer, [pair], cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    )
    with torch.no_grad():
        raw = [
            float(scorer.hf(torch.tensor([prompt + answer])).logits[0, 0])
            for answer in (chosen, rejected)
        ]
    assert about["margins"][0] == pytest.approx(raw[0] - raw[1], abs=1e-3)
    assert result(runs["plain"])["eval/ece"] == about["ece"]


def test_the_best_of_more_answers_scores_higher(runs: dict[str, Path]) -> None:
    curve = found(runs["plain"])["best_of"]
    assert [c["n"] for c in curve] == [1, 2, 4] and [c["score"] for c in curve] == sorted(
        c["score"] for c in curve
    )
    assert [c["kl"] for c in curve] == pytest.approx([0.0, math.log(2) - 0.5, math.log(4) - 0.75])
    assert all("gold" in c for c in curve) and found(runs["greedy"])["best_of"] == []


def test_chinese_prompts_render_and_are_answered(runs: dict[str, Path]) -> None:
    rows = found(runs["plain"])["fixed"]
    assert [row["prompt"] for row in rows] == read_prompt_lines(PROMPTS / "zh.txt") and len(
        rows
    ) == 6
    assert all(
        set(row["answers"]) == {"base", "sft", "dpo"} and row["answers"]["sft"]["length"] > 0
        for row in rows
    )
    page = (runs["plain"] / "report.html").read_text()
    assert rows[0]["prompt"] in page and '<meta charset="utf-8">' in page


@pytest.mark.parametrize("language", ["en", "zh", "ja"])
def test_there_are_six_prompts_of_each_language_and_all_templates_keep_them(language: str) -> None:
    from rlhf.config.choices import Template
    from rlhf.data.records import Turn

    prompts = read_prompt_lines(PROMPTS / f"{language}.txt")
    assert len(prompts) == len(set(prompts)) == 6
    for style in (Template.hh, Template.chatml, Template.llama3):
        own = load_tokenizer("builtin:tiny", style)
        for prompt in prompts:
            (ids,) = encoding.encode_prompts(own, [[Turn("user", prompt)]], 512)
            assert ids and prompt in own.decode(ids)


def test_the_page_holds_all_of_it_and_needs_no_other_file(runs: dict[str, Path]) -> None:
    page = (runs["plain"] / "report.html").read_text()
    text = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for word in (
        "Policies",
        "Win rates against sft",
        "95 % interval",
        "Reward model: model",
        "The reward model has an accuracy of",
        "chosen longer",
        "Best of n responses of sft",
    ):
        assert word in text, word
    assert "https://" not in text and page.count("plotly.js v") == 1
    rows = [json.loads(line) for line in (runs["plain"] / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "base", "sft", "dpo"} <= rows[0].keys()


def test_greedy_and_beam_answers_have_no_kl(runs: dict[str, Path]) -> None:
    greedy = found(runs["greedy"])
    assert "kl" not in greedy["policies"]["dpo"] and greedy["decoding"] == "greedy"
    beam = found(runs["beam"])
    assert (
        list(beam["policies"]) == ["sft"]
        and "kl" not in beam["policies"]["sft"]
        and beam["win_rates"] == []
    )
    assert [row["prompt"] for row in beam["answers"]] == [
        row["prompt"] for row in greedy["answers"]
    ]


def test_a_function_judges_where_there_is_no_reward_model(runs: dict[str, Path]) -> None:
    about = found(runs["functions"])
    assert about["judge"] == "short" and about["reward_models"] == {}
    assert {d["judge"] for d in about["win_rates"]} == {"gold", "short"}
    row = about["answers"][0]["answers"]["dpo"]
    assert row["score"] == len(row["completion"])


def test_a_reward_model_alone(runs: dict[str, Path]) -> None:
    about = found(runs["scorer_only"])
    assert (
        about["policies"] == {}
        and about["answers"] == []
        and about["reward_models"]["model"]["pairs"] > 0
    )
    assert {"eval/accuracy", "eval/ece"} == result(runs["scorer_only"]).keys()


@pytest.mark.full
def test_two_processes_and_zero_3_measure_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    cfg = load_config(runs["plain"] / "config.yaml")
    two = prepare(
        tmp_path,
        "two",
        "eval",
        cfg.inputs,
        ["pipeline=dpo", *FEW],
        processes_per_node=2,
        zero_stage=3,
        micro_batch=3,
    )
    work([two], 2)
    one = result(runs["plain"])
    assert result(two).keys() == one.keys() and result(two) == pytest.approx(
        one, rel=1e-3, abs=1e-3
    )


def test_beam_search_is_that_of_each_row_alone(runs: dict[str, Path], tokenizer: Any) -> None:
    policy = load_policy(str(runs["sft"] / "model"), tokenizer, Precision.fp32).eval()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    ids = torch.tensor([[0, 0, *prompts[0]], prompts[1]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    eos = tokenizer.eos_token_id
    found, kept, logp = hf_generate(
        policy, PromptBatch(ids, mask), torch.zeros(2, 12), eos, Sampling(beams=3)
    )
    everyday = AutoModelForCausalLM.from_pretrained(runs["sft"] / "model").eval()
    for i, prompt in enumerate(prompts):
        alone = everyday.generate(
            torch.tensor([prompt]),
            num_beams=3,
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=eos,
            pad_token_id=0,
        )
        tokens = alone[0, len(prompt) :].tolist()
        tokens = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        assert found[i][kept[i] > 0].tolist() == tokens
    assert (
        found.shape == kept.shape == (2, 12) and (found[kept == 0] == eos).all() and not logp.any()
    )
    assert Sampling().beams == 1


def test_the_score_of_several_sources_has_their_weights(runs: dict[str, Path]) -> None:
    metrics = result(runs["several"])
    for policy in ("sft", "dpo"):
        model, short = (metrics[f"eval/{policy}/score/{name}"] for name in ("model", "short"))
        score = metrics[f"eval/{policy}/score"]
        assert score == pytest.approx(0.5 * model - 0.1 * short, rel=1e-4)


def test_a_single_source_judges_without_its_weight(runs: dict[str, Path]) -> None:
    assert (
        result(runs["weighted"])["eval/dpo/win_rate/model"]
        == result(runs["plain"])["eval/dpo/win_rate/model"]
    )


def test_at_zero_3_a_measured_policy_is_let_go(
    tmp_path: Path, tokenizer: Any, one_process: None
) -> None:
    """DeepSpeed keeps the modules of such engines in a list of its own."""
    from rlhf.distributed.engine import build_engine, release_engine

    cfg = composed("stage=eval", "deploy.zero_stage=3")
    engine = build_engine(
        lambda: load_policy("builtin:tiny", tokenizer, Precision.fp32), cfg, "policy", tmp_path
    )
    left = weakref.ref(engine.module)
    release_engine(engine)
    del engine
    gc.collect()
    assert left() is None

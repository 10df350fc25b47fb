"""Policies side by side and the reward model, measured: perplexity, scores, KL, answers, win rates; accuracy, calibration, best of n.
Nothing is trained. All of it lies in run_dir/eval.json, and as a page in run_dir/report.html."""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from rlhf.config.choices import Decoding
from rlhf.config.schema import Config
from rlhf.config.stage_graph import policy_labels
from rlhf.config.stage_nodes import Eval
from rlhf.data import template
from rlhf.data.batches import uniforms
from rlhf.data.load import open_data
from rlhf.data.records import Dataset, Turn
from rlhf.distributed import collectives
from rlhf.distributed.engine import build_engine, release_engine
from rlhf.evaluation.policy import evaluate_policy
from rlhf.evaluation.reward_model import (
    LENGTHS,
    accuracy_by,
    accuracy_gold,
    calibration,
    length_group,
    pairwise_accuracy,
    score_pairs,
)
from rlhf.evaluation.statistics import best_of_n, wilson_interval
from rlhf.models.loading import check_context, context_length, load_policy, load_tokenizer, location
from rlhf.planning.memory import gather_for_rollout
from rlhf.reporting import eval_page
from rlhf.reporting.eval_results import read_results
from rlhf.rl.experience import Models, Prompts, make_experience
from rlhf.rl.rewards import Rewards, Source, build_rewards, check_reward_models, load_functions
from rlhf.runs.directory import write_json
from rlhf.runs.inputs import read_prompt_lines
from rlhf.runs.log import log
from rlhf.sampling.token_choice import Sampling
from rlhf.training.likelihood import perplexity
from rlhf.training.tracker import Tracker

Answers = list[dict[str, Any]]  # a row for each prompt, as evaluate_policy gives them


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Measure; write run_dir/eval.json and report.html. Returns the metrics."""
    # ---- data
    node, max_prompt, max_new = cfg.eval, cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    functions = load_functions(cfg)
    check_reward_models(cfg)
    labels = policy_labels(node.policies)
    where = {name: location_of(cfg, policy) for name, policy in labels.items()}
    against = next((name for name, policy in labels.items() if policy == node.against), None)
    scorers = [
        path for name, path in cfg.inputs.items() if name == "rm" or name.startswith("rewards/")
    ]
    for path in (*where.values(), *scorers):
        check_context(path, max_prompt, cfg.data.max_response_tokens)
        check_context(path, max_prompt, max_new, "rollout.max_new_tokens")
    tokenizers = {name: load_tokenizer(path, cfg.data.template) for name, path in where.items()}
    for name, path in where.items():
        warn_of_template(name, path, tokenizers[name], cfg)
    data = open_data(cfg, run_dir)
    files = [Path(cfg.inputs[f"prompts/{i}"]) for i in range(len(node.prompts))]
    fixed = [[Turn("user", line)] for file in files for line in read_prompt_lines(file)]
    room = (
        min(
            [context for path in (*where.values(), *scorers) if (context := context_length(path))],
            default=10**6,
        )
        - max_new
    )
    held_out = fitting(data.eval_prompts, tokenizers.values(), max_prompt)
    asked = fitting(fixed, tokenizers.values(), room)
    log.info(
        f"{len(held_out)} of {len(data.eval_prompts)} held-out prompts and {len(asked)} of {len(fixed)} fixed ones are short enough"
    )
    if where and not held_out:
        raise ValueError(f"data.max_prompt_tokens={max_prompt}: all held-out prompts are longer")
    data = dataclasses.replace(data, eval_prompts=held_out)
    sampling = Sampling(node.temperature, node.top_p, node.top_k, node.decoding == Decoding.greedy)
    sampling = dataclasses.replace(
        sampling, beams=node.beams if node.decoding == Decoding.beam else 1
    )
    has_kl = (
        node.decoding == Decoding.sample and node.top_p == 1 and node.top_k == 0
    )  # else answers are not those of the policy itself

    first = against or next(iter(where), None)
    rewards = None
    if node.rewards:
        tokenizer = tokenizers[first] if first else load_tokenizer(scorers[0], cfg.data.template)
        rewards = build_rewards(cfg, data, functions, tokenizer, run_dir)
        for source in rewards.sources:
            source.weight = 1.0  # each judges for itself
    tracker = Tracker(cfg, run_dir, len(where) + 1, ["score", "gold", "win_rate"])

    # ---- policies one after the other, that which the others are compared with first and beside them
    measured: dict[str, dict[str, float]] = {}
    answers: dict[str, Answers] = {}
    answers_to_fixed: dict[str, Answers] = {}
    curve: list[dict[str, float]] = []
    models: Models | None = None
    other: Models | None = None  # of the policy that they are compared with
    for number, name in enumerate(sorted(where, key=lambda name: name != first)):
        tokenizer = tokenizers[name]
        log.info(f"{name}: {where[name]}")
        free(models, keep=other)
        load = functools.partial(load_policy, where[name], tokenizer, cfg.deploy.precision)
        models = Models(
            tokenizer,
            build_engine(load, cfg, "policy", run_dir),
            gather=gather_for_rollout(cfg),
            engine=cfg.rollout.engine,
        )
        models.rewards = rewards.for_policy(tokenizer) if rewards else None
        if other and has_kl and template.same_tokens(tokenizer, other.tokenizer):
            models.ref = other.actor
        measured[name], answers[name] = evaluate_policy(
            models, data, max_prompt, max_new, sampling, cfg.deploy.eval_micro_batch
        )
        known = template.encode_demonstrations(
            tokenizer, data.eval_sft, max_prompt, cfg.data.max_response_tokens
        )
        if known:
            measured[name]["perplexity"] = perplexity(
                models.actor, known, tokenizer.pad_token_id, cfg.deploy.eval_micro_batch
            )
        if asked:
            to_these = dataclasses.replace(data, eval_prompts=asked, gold=None, best_gold=None)
            by_models = (
                [source for source in models.rewards.sources if source.engine]
                if models.rewards
                else []
            )
            # without python functions, which may know the data's prompts only
            plain = dataclasses.replace(
                models, rewards=Rewards(by_models, tokenizer) if by_models else None
            )
            _, answers_to_fixed[name] = evaluate_policy(
                plain, to_these, room, max_new, sampling, cfg.deploy.eval_micro_batch
            )
        if name == first:
            curve = best_of(models, data, node, max_prompt, max_new, cfg.deploy.eval_micro_batch)
        if name == against:
            other = models
        tracker.log(
            number + 1,
            {f"{name}/{key}": value for key, value in measured[name].items()} | measured[name],
        )
    judges = judges_of(node, data)
    judge = node.judge or next(iter(judges), None)
    duels = win_rates(answers, against, judges) if against else []

    # ---- reward models
    free(models, other)
    engines = [source for source in rewards.sources if source.engine] if rewards else []
    judged = {
        source.name: about for source in engines if (about := measure_scorer(source, data, cfg))
    }

    # ---- results
    measured = {name: measured[name] for name in where}  # in the order that was asked for
    last = next((name for name in reversed(where) if name != against), None)
    metrics = {
        f"eval/{name}/{key}": value
        for name, numbers in measured.items()
        for key, value in numbers.items()
    }
    for duel in duels:
        metrics[f"eval/{duel['policy']}/win_rate/{duel['judge']}"] = duel["rate"]
        if duel["policy"] == last and duel["judge"] == judge:
            metrics |= {
                "eval/win_rate": duel["rate"],
                "eval/win_rate_low": duel["low"],
                "eval/win_rate_high": duel["high"],
            }
    for name, about in judged.items():
        place = "eval" if len(judged) == 1 else f"eval/{name}"
        metrics |= {f"{place}/accuracy": about["accuracy"], f"{place}/ece": about["ece"]}
    found: dict[str, Any] = {
        "policies": measured,
        "against": against,
        "judge": judge,
        "win_rates": duels,
    }
    found |= {
        "best_of": curve,
        "best_of_policy": first,
        "reward_models": judged,
        "decoding": node.decoding.name,
    }
    found |= {
        "where": where,
        "answers": side_by_side(answers, where),
        "fixed": side_by_side(answers_to_fixed, where),
    }
    tracker.log(
        len(where) + 1, {key.removeprefix("eval/"): value for key, value in metrics.items()}
    )
    tracker.samples(len(where) + 1, texts_of(found["fixed"] + found["answers"]))
    if collectives.rank() == 0:
        write_json(run_dir / "eval.json", found)
        eval_page.write_page(
            read_results(run_dir / "eval.json"),
            run_dir / "report.html",
            f"Evaluation: {', '.join(where or node.rewards)}",
        )
    tracker.close(metrics)
    return metrics


# ---------------------------------------------------------------------------------------------------------------------- policies


def location_of(cfg: Config, policy: str) -> str:
    """The model that one of eval.policies means."""
    if policy == "base":
        return cfg.actor.path
    key = f"policies/{cfg.eval.policies.index(policy)}"  # given by path; else a stage's name
    return cfg.inputs.get(key) or cfg.inputs[policy]


def free(*several: Models | None, keep: Models | None = None) -> None:
    """Let go of policies that have been measured, but one."""
    for models in several:
        if models is not None and models is not keep:
            release_engine(models.actor)
            del models.actor
            models.ref = models.rewards = None
    gc.collect()


def warn_of_template(name: str, path: str, tokenizer: Any, cfg: Config) -> None:
    """All policies are asked in one template; say where that is not the one a model was saved with."""
    own = AutoTokenizer.from_pretrained(location(path), trust_remote_code=False).chat_template
    if own and own != tokenizer.chat_template:
        log.warning(
            f"{name}: asked in data.template={cfg.data.template.name}; it was saved with another chat template"
        )


def fitting(
    prompts: Sequence[list[Turn]], tokenizers: Iterable[Any], max_prompt: int
) -> list[list[Turn]]:
    """The prompts that are not too long for any of the policies: all are asked the same ones."""
    encoded = [template.encode_prompts(tokenizer, prompts, max_prompt) for tokenizer in tokenizers]
    return [prompt for prompt, *ids in zip(prompts, *encoded) if None not in ids]


def judges_of(node: Eval, data: Dataset) -> list[str]:
    """Who can say which answer is better: the truth first, where it is known."""
    return ["gold"] * bool(data.gold and "gold" not in node.rewards) + list(node.rewards)


def mark(row: dict[str, Any], judge: str) -> float:
    """What a judge gives an answer."""
    return float(
        row["gold"]
        if judge == "gold" and "gold" in row
        else row.get(f"score/{judge}", row["score"])
    )


def win_rates(
    answers: dict[str, Answers], against: str, judges: Sequence[str]
) -> list[dict[str, Any]]:
    """How often each policy's answer is better than that of `against` to the same prompt, with its 95 % interval; a tie counts half."""
    duels = []
    for policy in (name for name in answers if name != against):
        for judge in judges:
            apart = [
                mark(a, judge) - mark(b, judge) for a, b in zip(answers[policy], answers[against])
            ]
            wins, ties, n = sum(x > 0 for x in apart), sum(x == 0 for x in apart), len(apart)
            low, high = wilson_interval(wins + ties / 2, n)
            share = {
                "rate": (wins + ties / 2) / n,
                "low": low,
                "high": high,
                "wins": wins,
                "ties": ties,
                "prompts": n,
            }
            duels.append({"policy": policy, "against": against, "judge": judge, **share})
    return duels


def best_of(
    models: Models, data: Dataset, node: Eval, max_prompt: int, max_new: int, micro_batch: int
) -> list[dict[str, float]]:
    """What choosing the best of n answers by the first source of the score would reach: its score and, where it is known, the gold score,
    and the KL of that policy at most, log n - (n - 1) / n (Stiennon 2020, arXiv:2009.01325, appendix G.3)."""
    if not node.best_of or models.rewards is None:
        return []
    prompts = data.eval_prompts[: node.best_of_prompts]
    encoded = template.encode_prompts(models.tokenizer, prompts, max_prompt)
    asked = [turns for turns in prompts for _ in range(node.best_of)]
    ids = [row for row in encoded if row is not None for _ in range(node.best_of)]
    draws = uniforms("best of n", range(len(ids)), 0, 0, max_new)
    only = dataclasses.replace(models, ref=None)
    sampling = Sampling(node.temperature, node.top_p, node.top_k)
    e = make_experience(only, Prompts(asked, ids, draws), sampling, micro_batch)
    shape = (len(prompts), node.best_of)
    scores = e.scores[:, 0].view(shape).cpu()
    gold = data.gold
    truth = (
        torch.tensor(
            [gold(turns, e.text(i, models.tokenizer)) for i, turns in enumerate(asked)]
        ).view(shape)
        if gold
        else None
    )
    sizes = [n for n in (2**k for k in range(20)) if n <= node.best_of]
    sizes += [node.best_of] * (node.best_of not in sizes)
    return [
        {"n": n, "score": best_of_n(scores, scores, n), "kl": math.log(n) - (n - 1) / n}
        | ({} if truth is None else {"gold": best_of_n(scores, truth, n)})
        for n in sizes
    ]


# ------------------------------------------------------------------------------------------------------------------ reward models


def measure_scorer(source: Source, data: Dataset, cfg: Config) -> dict[str, Any]:
    """A reward model on the held-out pairs: accuracy, as a whole, by source and by how much longer the chosen answer is; calibration; the
    margins, in the unit it was trained in. Empty without any pair."""
    limits = (cfg.data.max_prompt_tokens, cfg.data.max_response_tokens)
    fits = template.encode_prompts(
        source.tokenizer, [pair.prompt for pair in data.eval_rm], limits[0]
    )
    pairs = [pair for pair, ids in zip(data.eval_rm, fits) if ids is not None]
    if not pairs:
        log.warning(
            f"{source.name}: not measured, there are no held-out pairs that it can read (data.max_prompt_tokens={limits[0]})"
        )
        return {}
    chosen, rejected = score_pairs(
        source.engine, source.tokenizer, pairs, *limits, cfg.deploy.eval_micro_batch
    )
    assert source.engine is not None
    margins = (chosen - rejected) * getattr(source.engine.module.hf.config, "score_std", 1.0)
    lengths = [
        length_group(len(c), len(r))
        for _, c, r in template.encode_pairs(source.tokenizer, pairs, *limits)
    ]
    error, bins = calibration(margins)
    found: dict[str, Any] = {
        "pairs": len(pairs),
        "accuracy": pairwise_accuracy(chosen, rejected),
        "ece": error,
        "reliability": bins,
    }
    found["by_source"] = accuracy_by([pair.source for pair in pairs], chosen, rejected)
    by_length = accuracy_by(lengths, chosen, rejected)
    found["by_length"] = {name: by_length[name] for name, *_ in LENGTHS if name in by_length}
    found["margins"] = [round(x, 4) for x in margins.tolist()]
    if (truth := accuracy_gold(pairs, chosen, rejected)) is not None:
        found["accuracy_gold"] = truth
    return found


# ----------------------------------------------------------------------------------------------------------------------- answers


def side_by_side(answers: dict[str, Answers], order: Iterable[str]) -> list[dict[str, Any]]:
    """A row for each prompt with what each policy answered, and what was measured of that."""
    columns = {name: answers[name] for name in order if name in answers}
    rows = []
    for of_prompt in zip(*columns.values()):
        about = {
            name: {key: value for key, value in row.items() if key != "prompt"}
            for name, row in zip(columns, of_prompt)
        }
        rows.append({"prompt": of_prompt[0]["prompt"], "answers": about})
    return rows


def texts_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same as plain columns, for samples.jsonl."""
    return [
        {"prompt": row["prompt"]}
        | {name: about["completion"] for name, about in row["answers"].items()}
        for row in rows
    ]

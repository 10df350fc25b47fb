"""Reward model: preference pairs -> a score for a response.

Bradley-Terry on the score at the last token of each response.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.base.log import log
from rlhf.config.choices import RmLoss
from rlhf.config.schema import Config
from rlhf.data import encoding, template, tokenized
from rlhf.data.batches import global_batches, micro_batches, pad_right, upload
from rlhf.data.records import Demonstration, Pair
from rlhf.data.template_check import check_template
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, build_engine
from rlhf.evaluation.reward_model import accuracy_gold, pairwise_accuracy, score_pairs
from rlhf.models.loading import load_scorer, save_engine
from rlhf.models.wrappers import Scorer, last_token_score, without_eos
from rlhf.rl.rewards import score_mean_std, store_unit
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.losses import pairwise_loss, pairwise_loss_per_token
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.setup import check_held_out, count_steps, open_inputs
from rlhf.training.stats import Stats
from rlhf.training.tracker import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PairIds = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen, rejected


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluate, measure the scale of the scores, save run_dir/model.

    Returns: the final metrics.
    """
    # 1. data
    rm, max_prompt, max_response = cfg.rm, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    tokenizer, data = open_inputs(cfg, run_dir, cfg.reward.path)
    template.end_at_eos(tokenizer)  # where scores are read
    check_template(tokenizer, data.rm, data.report, "rm", ["chosen", "rejected"])
    pairs = tokenized.pairs(tokenizer, data.rm, max_prompt, max_response, cfg.data.workers)
    encoded = encoding.encode_prompts(tokenizer, [pair.prompt for pair in data.eval_rm], max_prompt)
    held_out = [pair for pair, ids in zip(data.eval_rm, encoded) if ids is not None]
    log.info(f"reward model: {pairs}, {len(held_out)} held out")
    steps = count_steps(pairs, rm.batch_size, rm.epochs, rm.max_steps, "rm.batch_size")
    check_held_out(held_out, max_prompt)

    # 2. model
    engine = build_engine(
        lambda: load_scorer(
            cfg.reward.path, tokenizer, cfg.deploy.precision, adapter=cfg.reward.lora
        ),
        cfg,
        "reward_trained",
        run_dir,
    )
    # stored with the model, for those who read its scores
    engine.module.hf.config.score_before_eos = rm.loss == RmLoss.per_token
    # raw scores, until they are measured: a reward model that it starts from has another unit
    engine.module.hf.config.score_mean, engine.module.hf.config.score_std = 0.0, 1.0
    engine.train()

    # 3. training
    tracker = Tracker(cfg, run_dir, steps, ["loss", "accuracy", "margin"])
    seen = {"tokens": 0}
    checkpoints = Checkpoints(
        cfg, run_dir, steps, {"reward_trained": engine}, {"tracker": tracker, "seen": seen}
    )
    batches = enumerate(global_batches(len(pairs), rm.batch_size, rm.epochs, cfg.seed))
    for step, batch in islice(batches, checkpoints.resume(), steps):
        lr = learning_rate(step, steps, rm)
        metrics = train_step(cfg, engine, tokenizer, pairs, batch, lr)
        seen["tokens"] += int(metrics["num_tokens"])
        tracker.log(step + 1, metrics | {"num_tokens": seen["tokens"]})
        checkpoints.after(step + 1)

    # 4. evaluation
    engine.eval()
    log.info(f"evaluation: scores of {len(held_out):,} held-out pairs")
    metrics, samples = evaluate(engine, held_out, data.eval_probe, tokenizer, cfg)
    tracker.samples(steps, samples)
    metrics |= set_score_unit(engine, data.score_unit, tokenizer, cfg)
    save_engine(engine, tokenizer, run_dir / "model")
    tracker.close(metrics)
    return metrics


def train_step(
    cfg: Config,
    engine: Engine[Scorer],
    tokenizer: PreTrainedTokenizerBase,
    pairs: tokenized.Rows[PairIds],
    batch: Sequence[int],
    lr: float,
) -> dict[str, float]:
    """One optimizer step. Args: batch: numbers of its pairs, over all ranks.

    Returns: its metrics; `num_tokens` is the number of tokens read.
    """
    examples = {i: pairs[i] for i in batch}
    micros = micro_batches(
        batch,
        pairs.lengths,
        cfg.deploy.micro_batch,
        collectives.rank(),
        collectives.world_size(),
        cfg.data.max_prompt_tokens + cfg.data.max_response_tokens,
    )
    stats, n = Stats(), len(batch)
    loss_fn = partial(
        rm_loss, engine=engine, tokenizer=tokenizer, loss=cfg.rm.loss, step_pairs=n, stats=stats
    )
    losses = [partial(loss_fn, [examples[i] for i in micro]) for micro in micros]
    grad_norm = optimizer_step(engine, losses, lr)
    scores = stats.gather("scores")
    chosen, rejected = scores[:, 0], scores[:, 1]
    return {
        "loss": stats.reduce(engine.device)["loss"] / n,
        "accuracy": pairwise_accuracy(chosen, rejected),
        "margin": float((chosen - rejected).mean()),
        "mean_reward": float(scores.mean()),
        "min_reward": float(scores.min()),
        "max_reward": float(scores.max()),
        "chosen_reward": float(chosen.mean()),
        "rejected_reward": float(rejected.mean()),
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "num_tokens": sum(
            2 * len(prompt) + len(chosen_ids) + len(rejected_ids)
            for prompt, chosen_ids, rejected_ids in examples.values()
        ),
    }


def rm_loss(
    pairs: Sequence[PairIds],
    engine: Engine[Scorer],
    tokenizer: PreTrainedTokenizerBase,
    loss: RmLoss,
    step_pairs: int,
    stats: Stats,
) -> Tensor:
    """Mean loss of the pairs, the share of one micro-batch.

    Args: step_pairs: pairs of the whole step, over all ranks.
    """
    chosen, rejected, total = compare(engine, pairs, tokenizer, loss)
    stats.add(loss=total)
    stats.append(scores=torch.stack([chosen, rejected], 1))
    return total / step_pairs


def compare(
    scorer: Engine[Scorer],
    pairs: Sequence[PairIds],
    tokenizer: PreTrainedTokenizerBase,
    loss: RmLoss,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of chosen and rejected responses in one forward pass, and their loss.

    With RmLoss.per_token all is as in DeepSpeed-Chat, whose padding is EOS: scores are read before
    the EOS, and where one response has ended, its EOS and padding are compared with the other.

    Returns: scores (B,) of chosen and of rejected; the loss, summed over the pairs.
    """
    rows = [prompt + chosen for prompt, chosen, _ in pairs]
    rows += [prompt + rejected for prompt, _, rejected in pairs]
    ids, mask = pad_right(rows, tokenizer.pad_token_id)
    at_tokens = scorer(ids, mask, loss == RmLoss.per_token)
    if loss == RmLoss.sequence:
        chosen, rejected = last_token_score(at_tokens, mask).chunk(2)
        return chosen, rejected, pairwise_loss(chosen, rejected)
    mask = without_eos(ids, mask, tokenizer.eos_token_id)
    chosen, rejected = last_token_score(at_tokens, mask).chunk(2)
    starts, ends = upload(scorer.device, *compared_span(ids, mask))
    chosen_at_tokens, rejected_at_tokens = at_tokens.chunk(2)
    total = pairwise_loss_per_token(chosen_at_tokens, rejected_at_tokens, starts, ends)
    return chosen, rejected, total


def compared_span(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The positions at which RmLoss.per_token compares two responses.

    Args: ids, mask (2 B, T): rows of the chosen, then of the rejected responses, without EOS.
    Returns: (B,) first position where the two differ, or the last one where they do not; and
        (B,) the position behind the last token of the longer one.
    """
    position = torch.arange(1, ids.shape[1] + 1)
    ends = torch.stack((position * mask).amax(1).chunk(2)).amax(0)
    ids_chosen, ids_rejected = ids.chunk(2)
    differs = ids_chosen != ids_rejected
    first = torch.where(differs.any(1), differs.int().argmax(1), ends - 1)
    return torch.minimum(first, ends - 1), ends


def evaluate(
    engine: Engine[Scorer],
    pairs: list[Pair],
    probe: list[Pair],
    tokenizer: PreTrainedTokenizerBase,
    cfg: Config,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Held-out accuracy, and where the gold reward is known, the accuracy against it.

    Returns: metrics, and a row for each of the first pairs. `eval/accuracy`: agreement with the
        labels; `eval/accuracy_gold`: with the order of the gold reward; `eval/accuracy_bayes`: of
        that order with the labels, an upper bound where labels are noisy; `eval/accuracy_prompt`:
        on pairs that differ only in whether the response fits its prompt.
    """
    limits = (cfg.data.max_prompt_tokens, cfg.data.max_response_tokens, cfg.deploy.eval_micro_batch)
    chosen, rejected = score_pairs(engine, tokenizer, pairs, *limits)
    metrics = {"eval/accuracy": pairwise_accuracy(chosen, rejected)}
    if (gold := accuracy_gold(pairs, chosen, rejected)) is not None:
        metrics["eval/accuracy_gold"] = gold
        margins = torch.tensor([pair.gold_margin for pair in pairs])
        metrics["eval/accuracy_bayes"] = pairwise_accuracy(margins, torch.zeros(len(pairs)))
    if probe:
        probe_scores = score_pairs(engine, tokenizer, probe, *limits)
        metrics["eval/accuracy_prompt"] = pairwise_accuracy(*probe_scores)
    samples = [
        {
            "prompt": pair.prompt[-1].text,
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "chosen_score": float(c),
            "rejected_score": float(r),
        }
        for pair, c, r in zip(pairs[:64], chosen, rejected)
    ]
    return metrics, samples


def set_score_unit(
    engine: Engine[Scorer],
    demonstrations: list[Demonstration],
    tokenizer: PreTrainedTokenizerBase,
    cfg: Config,
) -> dict[str, float]:
    """Normalise the scores: mean 0 and standard deviation 1 over held-out demonstrations.

    Returns: the metrics `eval/score_mean` and `eval/score_std`, of the scores before.
    """
    encoded = encoding.encode_demonstrations(
        tokenizer, demonstrations, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    )
    rows = [prompt + answer for prompt, answer in encoded]
    mean, std = score_mean_std(engine, rows, tokenizer, cfg.deploy.eval_micro_batch)
    store_unit(engine, mean, std, "the reward model")
    return {"eval/score_mean": mean, "eval/score_std": std}

"""Reward model: preference pairs -> a score for a whole answer. Sequence-level Bradley-Terry on the score at the last token."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from rlhf.config.choices import RmLoss
from rlhf.config.schema import Config
from rlhf.data import template, tokenized
from rlhf.data.batches import global_batches, micro_batches, pad_right
from rlhf.data.load import open_data
from rlhf.data.records import Pair
from rlhf.distributed import collectives
from rlhf.distributed.engine import build_engine
from rlhf.evaluation.reward_model import accuracy_gold, pairwise_accuracy, score_pairs
from rlhf.models.loading import check_context, load_scorer, load_tokenizer, save_engine
from rlhf.models.wrappers import last_token_score, without_eos
from rlhf.rl.rewards import score_mean_std
from rlhf.runs.log import log
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.losses import pairwise_loss, pairwise_loss_per_token
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.tracker import Tracker


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluate, measure the scale of the scores, save run_dir/model. Returns the final metrics."""
    # ---- data
    max_prompt, max_response = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    check_context(cfg.reward.path, max_prompt, max_response)
    tokenizer = load_tokenizer(cfg.reward.path, cfg.data.template)
    data = open_data(cfg, run_dir)
    held_out = [
        pair
        for pair in data.eval_rm
        if template.encode_prompts(tokenizer, [pair.prompt], max_prompt)[0] is not None
    ]
    pairs = tokenized.pairs(tokenizer, data.rm, max_prompt, max_response, cfg.data.workers)
    log.info(f"reward model: {pairs}, {len(held_out)} held out")
    steps = len(pairs) // cfg.rm.batch_size * cfg.rm.epochs
    if not steps:
        raise ValueError(f"rm.batch_size={cfg.rm.batch_size}: there are only {len(pairs)} pairs")
    if not held_out:
        raise ValueError(f"data.max_prompt_tokens={max_prompt}: all held-out prompts are longer")
    steps = min(steps, cfg.rm.max_steps or steps)

    # ---- model
    engine = build_engine(
        lambda: load_scorer(cfg.reward.path, tokenizer, cfg.deploy.precision),
        cfg,
        "reward_trained",
        run_dir,
    )
    engine.module.hf.config.score_before_eos = (
        cfg.rm.loss == RmLoss.per_token
    )  # whoever reads the scores later finds it there
    engine.train()
    tracker = Tracker(cfg, run_dir, steps, ["loss", "accuracy", "margin"])

    # ---- training
    seen = {"tokens": 0}
    checkpoints = Checkpoints(
        cfg, run_dir, steps, {"reward_trained": engine}, {"tracker": tracker, "seen": seen}
    )
    batches = enumerate(global_batches(len(pairs), cfg.rm.batch_size, cfg.rm.epochs, cfg.seed))
    for step, batch in islice(batches, checkpoints.resume(), steps):
        n = len(batch)
        taken = {i: pairs[i] for i in batch}
        seen["tokens"] += sum(
            2 * len(prompt) + len(chosen) + len(rejected)
            for prompt, chosen, rejected in taken.values()
        )
        losses: list[
            torch.Tensor
        ] = []  # of the micro-batches: the summed loss, and the scores (pairs, 2)
        scores: list[torch.Tensor] = []

        def loss_of(
            micro: Sequence[int],
            n: int = n,
            losses: list = losses,
            scores: list = scores,
            taken: dict = taken,
        ) -> torch.Tensor:
            chosen, rejected, loss = compare(
                engine, [taken[i] for i in micro], tokenizer, cfg.rm.loss
            )
            losses.append(loss.detach())
            scores.append(torch.stack([chosen.detach(), rejected.detach()], 1))
            return loss / n

        lr = learning_rate(step, steps, cfg.rm)
        micros = micro_batches(
            batch,
            pairs.lengths,
            cfg.deploy.micro_batch,
            collectives.rank(),
            collectives.world_size(),
            max_prompt + max_response,
        )
        grad_norm = optimizer_step(engine, micros, loss_of, lr)
        both = collectives.all_gather_rows(torch.cat(scores)).double()
        chosen, rejected = both[:, 0], both[:, 1]
        tracker.log(
            step + 1,
            {
                "loss": collectives.all_reduce_sum([float(sum(losses))], engine.device)[0] / n,
                "accuracy": pairwise_accuracy(chosen, rejected),
                "margin": float((chosen - rejected).mean()),
                "mean_reward": float(both.mean()),
                "min_reward": float(both.min()),
                "max_reward": float(both.max()),
                "chosen_reward": float(chosen.mean()),
                "rejected_reward": float(rejected.mean()),
                "grad_norm": grad_norm,
                "learning_rate": lr,
                "num_tokens": seen["tokens"],
            },
        )
        checkpoints.after(step + 1)

    # ---- evaluation
    engine.eval()
    metrics, samples = evaluate(engine, held_out, data.eval_probe, tokenizer, cfg)
    tracker.samples(steps, samples)

    # ---- the unit of the scores: mean 0 and standard deviation 1 over held-out demonstrations
    demonstrations = template.encode_demonstrations(
        tokenizer, data.eval_sft, max_prompt, max_response
    )
    rows = [prompt + answer for prompt, answer in demonstrations]
    mean, std = score_mean_std(engine, rows, tokenizer, cfg.deploy.eval_micro_batch)
    metrics |= {"eval/score_mean": mean, "eval/score_std": std}
    engine.module.hf.config.score_mean, engine.module.hf.config.score_std = mean, max(std, 1e-6)
    save_engine(engine, tokenizer, run_dir / "model")
    tracker.close(metrics)
    return metrics


def compare(
    scorer: Any,
    pairs: Sequence[tuple[list[int], list[int], list[int]]],
    tokenizer: Any,
    over: RmLoss,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected answers, (B,) each, in one forward; and their loss, summed over the pairs.

    Args: pairs: token ids of prompt, chosen and rejected.

    With RmLoss.per_token all is as in DeepSpeed-Chat, whose padding is EOS: scores are read before it, and where one answer has
    ended, the comparison with the other goes on over its EOS and padding.
    """
    rows = [prompt + chosen for prompt, chosen, _ in pairs] + [
        prompt + rejected for prompt, _, rejected in pairs
    ]
    ids, mask = pad_right(rows, tokenizer.pad_token_id, scorer.device)
    at_tokens = scorer(ids, mask, over == RmLoss.per_token)
    if over == RmLoss.sequence:
        chosen, rejected = last_token_score(at_tokens, mask).chunk(2)
        return chosen, rejected, pairwise_loss(chosen, rejected)
    mask = without_eos(ids, mask, tokenizer.eos_token_id)
    chosen, rejected = last_token_score(at_tokens, mask).chunk(2)
    place = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    ends = torch.stack((place * mask).amax(1).chunk(2)).amax(0)
    (of_chosen, of_rejected), (ids_chosen, ids_rejected) = at_tokens.chunk(2), ids.chunk(2)
    differs = ids_chosen != ids_rejected
    starts = torch.minimum(torch.where(differs.any(1), differs.int().argmax(1), ends - 1), ends - 1)
    return chosen, rejected, pairwise_loss_per_token(of_chosen, of_rejected, starts, ends)


def evaluate(
    engine: Any, pairs: list[Pair], probe: list[Pair], tokenizer: Any, cfg: Config
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Held-out accuracy, and where the truth is known, that against it.

    Returns: `eval/accuracy` agreement with the recorded labels; `eval/accuracy_gold` with the true order; `eval/accuracy_bayes`
        of a perfect judge with the labels; `eval/accuracy_prompt` on pairs that differ only in whether the answer fits its prompt.
    """

    limits = (cfg.data.max_prompt_tokens, cfg.data.max_response_tokens, cfg.deploy.eval_micro_batch)
    chosen, rejected = score_pairs(engine, tokenizer, pairs, *limits)
    metrics = {"eval/accuracy": pairwise_accuracy(chosen, rejected)}
    if (truth := accuracy_gold(pairs, chosen, rejected)) is not None:
        metrics["eval/accuracy_gold"] = truth
        metrics["eval/accuracy_bayes"] = pairwise_accuracy(
            torch.tensor([pair.gold_margin for pair in pairs]), torch.zeros(len(pairs))
        )
    if probe:
        metrics["eval/accuracy_prompt"] = pairwise_accuracy(
            *score_pairs(engine, tokenizer, probe, *limits)
        )
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

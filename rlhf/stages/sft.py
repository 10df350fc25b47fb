"""Supervised fine-tuning: demonstrations -> policy. The loss is on the answer and its EOS only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from rlhf.config.schema import Config
from rlhf.data import template, tokenized
from rlhf.data.batches import first_loss_token, global_batches, micro_batches
from rlhf.data.load import open_data
from rlhf.distributed import collectives
from rlhf.distributed.engine import build_engine
from rlhf.evaluation.policy import evaluate_policy
from rlhf.models.loading import check_context, load_policy, load_tokenizer, save_engine
from rlhf.planning.memory import gather_for_rollout
from rlhf.rl.experience import Models
from rlhf.runs.log import log
from rlhf.sampling.token_choice import Sampling
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.likelihood import perplexity, response_nll_stats
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.tracker import Tracker

Taken = dict[int, tuple[list[int], list[int]]]  # rows by their number: ids of prompt and answer


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluate, save run_dir/model. Returns the final metrics."""
    # ---- data
    max_prompt, max_response = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    check_context(cfg.actor.path, max_prompt, max_response)
    tokenizer = load_tokenizer(cfg.actor.path, cfg.data.template)
    data = open_data(cfg, run_dir)
    rows = tokenized.demonstrations(tokenizer, data.sft, max_prompt, max_response, cfg.data.workers)
    held_out = template.encode_demonstrations(tokenizer, data.eval_sft, max_prompt, max_response)
    log.info(f"SFT: {rows}, {len(held_out)} held out")
    steps = len(rows) // cfg.sft.batch_size * cfg.sft.epochs
    if not steps:
        raise ValueError(
            f"sft.batch_size={cfg.sft.batch_size}: there are only {len(rows)} demonstrations"
        )
    if not held_out:
        raise ValueError(f"data.max_prompt_tokens={max_prompt}: all held-out prompts are longer")
    steps = min(steps, cfg.sft.max_steps or steps)

    # ---- model
    engine = build_engine(
        lambda: load_policy(cfg.actor.path, tokenizer, cfg.deploy.precision), cfg, "actor", run_dir
    )
    engine.train()
    tracker = Tracker(cfg, run_dir, steps, ["loss", "mean_token_accuracy"])

    # ---- training
    rank, world = collectives.rank(), collectives.world_size()
    seen = {"tokens": 0}
    checkpoints = Checkpoints(
        cfg, run_dir, steps, {"actor": engine}, {"tracker": tracker, "seen": seen}
    )
    batches = enumerate(global_batches(len(rows), cfg.sft.batch_size, cfg.sft.epochs, cfg.seed))
    for step, batch in islice(batches, checkpoints.resume(), steps):
        taken = {i: rows[i] for i in batch}
        learnt = {
            i: len(prompt) + len(answer) - first_loss_token(prompt, cfg.sft.train_on_prompt)
            for i, (prompt, answer) in taken.items()
        }
        tokens = sum(learnt.values())  # of the whole step, over all processes
        seen["tokens"] += tokens
        longest = max_prompt + max_response
        micros = micro_batches(batch, rows.lengths, cfg.deploy.micro_batch, rank, world, longest)
        parts = [(m, tokens) for m in micros]
        sums = torch.zeros(3, dtype=torch.float64)  # -log p, correct, entropy

        def loss_of(
            part: tuple[Sequence[int], int], sums: torch.Tensor = sums, taken: Taken = taken
        ) -> torch.Tensor:
            micro, count = part
            some = [taken[i] for i in micro]
            nll, correct, entropy = response_nll_stats(
                engine, some, tokenizer.pad_token_id, cfg.sft.train_on_prompt
            )
            sums += torch.stack([nll.detach(), correct, entropy]).double().cpu()
            return nll / count

        lr = learning_rate(step, steps, cfg.sft)
        grad_norm = optimizer_step(engine, parts, loss_of, lr)
        nll, correct, entropy = (
            x / tokens for x in collectives.all_reduce_sum(sums.tolist(), engine.device)
        )
        tracker.log(
            step + 1,
            {
                "loss": nll,
                "perplexity": math.exp(min(nll, 50.0)),
                "mean_token_accuracy": correct,
                "entropy": entropy,
                "grad_norm": grad_norm,
                "learning_rate": lr,
                "num_tokens": seen["tokens"],
            },
        )
        checkpoints.after(step + 1)

    # ---- evaluation
    engine.eval()
    metrics = {
        "eval/perplexity": perplexity(
            engine, held_out, tokenizer.pad_token_id, cfg.deploy.eval_micro_batch
        )
    }
    models = Models(tokenizer, engine, gather=gather_for_rollout(cfg), engine=cfg.rollout.engine)
    measured, samples = evaluate_policy(
        models, data, max_prompt, max_response, Sampling(1.0), cfg.deploy.eval_micro_batch
    )
    metrics |= {f"eval/{key}": value for key, value in measured.items()}
    tracker.samples(steps, samples)
    save_engine(engine, tokenizer, run_dir / "model")
    tracker.close(metrics)
    return metrics

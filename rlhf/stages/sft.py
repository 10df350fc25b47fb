"""Supervised fine-tuning: demonstrations -> policy. The loss is on the answers and their EOS."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from torch import Tensor

from rlhf.base.log import log
from rlhf.config.choices import TrainOn
from rlhf.config.schema import Config
from rlhf.data import encoding, tokenized
from rlhf.data.batches import first_loss_token, global_batches, micro_batches
from rlhf.data.template_check import check_template
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, build_engine
from rlhf.evaluation.policy import evaluate_policy
from rlhf.models.loading import load_policy, save_engine
from rlhf.models.wrappers import Policy
from rlhf.planning.memory import sampling_choices
from rlhf.rl.experience import Models
from rlhf.sampling.token_choice import Sampling
from rlhf.sampling.vllm import engine_without_server
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.likelihood import Row, end_probability, perplexity, response_nll_stats
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.setup import check_held_out, count_steps, open_inputs
from rlhf.training.stats import Stats
from rlhf.training.tracker import Tracker

ENDS_TOO_SELDOM = 0.5  # probability of the end token after a whole response
ENDS_OFTEN = 0.9  # share of sampled responses with an EOS


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluate, save run_dir/model. Returns the final metrics."""
    # 1. data
    sft = cfg.sft
    max_prompt, max_response = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    tokenizer, data = open_inputs(cfg, run_dir, cfg.actor.path)
    pad_id = tokenizer.pad_token_id
    every_answer = sft.train_on is TrainOn.all
    rows = tokenized.demonstrations(
        tokenizer, data.sft, max_prompt, max_response, cfg.data.workers, every_answer
    )
    check_template(tokenizer, data.sft, data.report, "sft")
    held_out = encoding.encode_demonstrations(tokenizer, data.eval_sft, max_prompt, max_response)
    log.info(f"SFT: {rows}, {len(held_out)} held out")
    steps = count_steps(rows, sft.batch_size, sft.epochs, sft.max_steps, "sft.batch_size")
    check_held_out(held_out, max_prompt)

    # 2. model
    engine = build_engine(
        lambda: load_policy(
            cfg.actor.path, tokenizer, cfg.deploy.precision, adapter=cfg.actor.lora
        ),
        cfg,
        "actor",
        run_dir,
    )
    engine.train()

    # 3. training
    tracker = Tracker(cfg, run_dir, steps, ["loss", "mean_token_accuracy"])
    seen = {"tokens": 0}
    checkpoints = Checkpoints(
        cfg, run_dir, steps, {"actor": engine}, {"tracker": tracker, "seen": seen}
    )
    batches = enumerate(global_batches(len(rows), sft.batch_size, sft.epochs, cfg.seed))
    for step, batch in islice(batches, checkpoints.resume(), steps):
        lr = learning_rate(step, steps, sft)
        metrics = train_step(cfg, engine, rows, batch, pad_id, lr)
        seen["tokens"] += int(metrics["num_tokens"])
        tracker.log(step + 1, metrics | {"num_tokens": seen["tokens"]})
        checkpoints.after(step + 1)

    # 4. evaluation
    engine.eval()
    micro_batch = cfg.deploy.eval_micro_batch
    log.info(f"evaluation: perplexity of {len(held_out):,} held-out demonstrations")
    metrics = {"eval/perplexity": perplexity(engine, held_out, pad_id, micro_batch)}
    ends = end_probability(engine, held_out, tokenizer.eos_token_id, pad_id, micro_batch)
    metrics["eval/eos_probability"] = ends
    models = Models(tokenizer, engine, engine=engine_without_server(cfg), **sampling_choices(cfg))
    measured, samples = evaluate_policy(
        models, data, max_prompt, max_response, Sampling(1.0), micro_batch
    )
    metrics |= {f"eval/{key}": value for key, value in measured.items()}
    warn_of_ends(tracker, tokenizer.eos_token, ends, measured["eos_rate"])
    tracker.samples(steps, samples)
    save_engine(engine, tokenizer, run_dir / "model")
    tracker.close(metrics)
    return metrics


def warn_of_ends(tracker: Tracker, eos_token: str, probability: float, eos_rate: float) -> None:
    """Warn where the end token has a low probability after whole answers, and sampled responses
    have no EOS either."""
    if probability < ENDS_TOO_SELDOM and eos_rate < ENDS_OFTEN:
        tracker.alert(
            "the policy may not end its responses",
            f"after whole held-out answers it gives {eos_token} a probability of only "
            f"{probability:.2f}, and {eos_rate:.0%} of its responses have an EOS; train longer, or "
            "use a template whose end token the model knows (data.template)",
        )


def train_step(
    cfg: Config,
    engine: Engine[Policy],
    rows: tokenized.Rows[Row],
    batch: Sequence[int],
    pad_id: int,
    lr: float,
) -> dict[str, float]:
    """One optimizer step. Args: batch: numbers of its rows, over all ranks.

    Returns: its metrics; `num_tokens` is the number of tokens in the loss.
    """
    examples = {i: rows[i] for i in batch}
    on_prompt = cfg.sft.train_on is TrainOn.everything
    tokens = sum(
        len(prompt) + len(answer) - first_loss_token(prompt, on_prompt)
        for prompt, answer in examples.values()
    )
    micros = micro_batches(
        batch,
        rows.lengths,
        cfg.deploy.micro_batch,
        collectives.rank(),
        collectives.world_size(),
        cfg.data.max_prompt_tokens + cfg.data.max_response_tokens,
    )
    stats = Stats()
    loss_fn = partial(
        sft_loss,
        engine=engine,
        pad_id=pad_id,
        train_on_prompt=on_prompt,
        step_tokens=tokens,
        stats=stats,
    )
    losses = [partial(loss_fn, [examples[i] for i in micro]) for micro in micros]
    grad_norm = optimizer_step(engine, losses, lr)
    sums = stats.reduce(engine.device)
    nll = sums["nll"] / tokens
    return {
        "loss": nll,
        "perplexity": math.exp(min(nll, 50.0)),
        "mean_token_accuracy": sums["correct"] / tokens,
        "entropy": sums["entropy"] / tokens,
        "grad_norm": grad_norm,
        "learning_rate": lr,
        "num_tokens": tokens,
    }


def sft_loss(
    rows: Sequence[Row],
    engine: Engine[Policy],
    pad_id: int,
    train_on_prompt: bool,
    step_tokens: int,
    stats: Stats,
) -> Tensor:
    """Mean -log p of the demonstrations' tokens, the share of one micro-batch.

    Args: step_tokens: tokens in the loss of the whole step, over all ranks.
    """
    nll, correct, entropy = response_nll_stats(engine, rows, pad_id, train_on_prompt)
    stats.add(nll=nll.double(), correct=correct.double(), entropy=entropy.double())
    return nll / step_tokens

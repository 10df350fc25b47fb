"""DPO: preference pairs -> policy, without a reward model and without sampling. It learns from the pairs that a reward model would."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.config.schema import Config
from rlhf.config.stage_graph import adapter_only
from rlhf.data import template, tokenized
from rlhf.data.batches import global_batches, map_across_ranks, micro_batches
from rlhf.data.cache import cache_folder, digest
from rlhf.data.load import open_data
from rlhf.distributed import collectives
from rlhf.distributed.engine import build_engine, gather_parameters
from rlhf.evaluation.policy import Found, before_and_after, evaluate_policy
from rlhf.evaluation.reward_model import pairwise_accuracy
from rlhf.models import loading, logprobs, packing
from rlhf.models.loading import check_context, load_policy, load_tokenizer, save_engine
from rlhf.models.lora import AdapterOff
from rlhf.planning.memory import gather_for_rollout
from rlhf.rl import losses
from rlhf.rl.experience import Models
from rlhf.runs.log import log
from rlhf.sampling.token_choice import Sampling
from rlhf.training import likelihood
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.likelihood import response_logprobs
from rlhf.training.losses import preference_loss
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.tracker import Tracker

Rows = Sequence[tuple[list[int], list[int], list[int]]]  # token ids of prompt, chosen, rejected


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluate before, meanwhile and after; save run_dir/model. Returns the final metrics."""
    # ---- data
    dpo, max_prompt, max_response = (
        cfg.dpo,
        cfg.data.max_prompt_tokens,
        cfg.data.max_response_tokens,
    )
    check_context(cfg.inputs["sft"], max_prompt, max_response)
    check_context(
        cfg.inputs["sft"], max_prompt, cfg.rollout.max_new_tokens, "rollout.max_new_tokens"
    )
    tokenizer = load_tokenizer(cfg.inputs["sft"], cfg.data.template)
    data = open_data(cfg, run_dir)
    pairs = tokenized.pairs(tokenizer, data.rm, max_prompt, max_response, cfg.data.workers)
    held_out = template.encode_pairs(tokenizer, data.eval_rm, max_prompt, max_response)
    log.info(f"DPO: {pairs}, {len(held_out)} held out")
    steps = len(pairs) // dpo.batch_size * dpo.epochs
    if not steps:
        raise ValueError(f"dpo.batch_size={dpo.batch_size}: there are only {len(pairs)} pairs")
    if not held_out:
        raise ValueError(f"data.max_prompt_tokens={max_prompt}: all held-out prompts are longer")
    steps = min(steps, dpo.max_steps or steps)

    # ---- models: the policy and its frozen start
    precision, pad_id, micro = (
        cfg.deploy.precision,
        tokenizer.pad_token_id,
        cfg.deploy.eval_micro_batch,
    )
    cfg.actor.lora.dropout = 0.0  # at the start the policy is its reference
    actor = build_engine(
        lambda: load_policy(cfg.inputs["sft"], tokenizer, precision), cfg, "actor", run_dir
    )
    actor.eval()
    if adapter_only(cfg.actor):
        log.info("reference: the actor with its adapter off, one model less in memory")
        ref: Any = AdapterOff(actor)
    else:
        ref = build_engine(
            lambda: load_policy(cfg.inputs["sft"], tokenizer, precision), cfg, "ref", run_dir
        )
    key = digest(
        content_of(actor if isinstance(ref, AdapterOff) else ref),
        pairs.table._fingerprint,
        f"{len(pairs)} {precision.name} {cfg.deploy.device.name}",
    )
    reference = cached_logp(
        ref, pairs, pairs.lengths, pad_id, micro, cache_folder() / f"reference-{key}.safetensors"
    )
    together = Models(
        tokenizer, actor, ref, gather=gather_for_rollout(cfg), engine=cfg.rollout.engine
    )
    lengths = [len(prompt) + max(len(c), len(r)) for prompt, c, r in held_out]
    held_out_reference = pair_logp(ref, held_out, lengths, pad_id, micro)

    tracker = Tracker(cfg, run_dir, steps, ["loss", "rewards/accuracies", "rewards/margins"])
    seen: dict[str, Any] = {"tokens": 0, "before": [{}, []]}
    checkpoints = Checkpoints(
        cfg, run_dir, steps, {"actor": actor}, {"tracker": tracker, "seen": seen}
    )

    def evaluate() -> Found:
        """Held-out pairs by the implicit reward; and answers to the held-out prompts, where the truth is known with their gold score."""
        found, rows = evaluate_policy(
            together,
            data,
            max_prompt,
            cfg.rollout.max_new_tokens,
            Sampling(cfg.rollout.temperature),
            micro,
        )
        logp = pair_logp(actor, held_out, lengths, pad_id, micro)
        chosen, rejected = (logp - held_out_reference).unbind(1)
        found["accuracy"] = pairwise_accuracy(chosen, rejected)
        found["loss"] = float(
            preference_loss(chosen, rejected, dpo.beta, dpo.loss, dpo.label_smoothing).mean()
        )
        return found, rows

    done = checkpoints.resume()
    if not done:
        seen["before"] = list(evaluate())

    # ---- training
    rank, world = collectives.rank(), collectives.world_size()
    for step, batch in islice(
        enumerate(global_batches(len(pairs), dpo.batch_size, dpo.epochs, cfg.seed)), done, steps
    ):
        actor.train()  # nothing drops out; activation checkpointing works only so
        taken = {i: pairs[i] for i in batch}
        seen["tokens"] += sum(
            2 * len(prompt) + len(chosen) + len(rejected)
            for prompt, chosen, rejected in taken.values()
        )
        columns: list[
            Tensor
        ] = []  # of the micro-batches: loss, log pi and log pi/ref of chosen and rejected

        def loss_of(
            rows: Sequence[int], columns: list[Tensor] = columns, taken: dict = taken
        ) -> Tensor:
            logp = both_logp(actor, [taken[i] for i in rows], pad_id)
            ratio = logp - reference[list(rows)].to(logp.device)
            losses = preference_loss(
                ratio[:, 0], ratio[:, 1], dpo.beta, dpo.loss, dpo.label_smoothing
            )
            columns.append(torch.cat([losses[:, None], logp, ratio], 1).detach())
            return losses.sum() / dpo.batch_size

        lr = learning_rate(step, steps, dpo)
        micros = micro_batches(
            batch, pairs.lengths, cfg.deploy.micro_batch, rank, world, max_prompt + max_response
        )
        grad_norm = optimizer_step(actor, micros, loss_of, lr)
        losses, chosen, rejected, of_chosen, of_rejected = (
            collectives.all_gather_rows(torch.cat(columns)).double().unbind(1)
        )
        metrics = {
            "loss": float(losses.mean()),
            "rewards/chosen": dpo.beta * float(of_chosen.mean()),
            "rewards/rejected": dpo.beta * float(of_rejected.mean()),
            "rewards/margins": dpo.beta * float((of_chosen - of_rejected).mean()),
            "rewards/accuracies": pairwise_accuracy(of_chosen, of_rejected),
            "logps/chosen": float(chosen.mean()),
            "logps/rejected": float(rejected.mean()),
            "grad_norm": grad_norm,
            "learning_rate": lr,
            "num_tokens": seen["tokens"],
        }
        actor.eval()
        if dpo.eval_every and (step + 1) % dpo.eval_every == 0 and step + 1 < steps:
            found, rows = evaluate()
            metrics |= {f"eval/{name}": value for name, value in found.items()}
            tracker.samples(step + 1, rows)
        tracker.log(step + 1, metrics)
        checkpoints.after(step + 1)

    # ---- evaluation
    before, rows_before = seen["before"]
    metrics, compared = before_and_after((before, rows_before), evaluate())
    tracker.samples(steps, compared)
    save_engine(actor, tokenizer, run_dir / "model")
    tracker.close(metrics)
    return metrics


def both_logp(policy: Any, pairs: Rows, pad_id: int) -> Tensor:
    """log pi of the chosen and of the rejected answers in one forward, (B, 2), nats."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs] + [
        (prompt, rejected) for prompt, _, rejected in pairs
    ]
    return torch.stack(response_logprobs(policy, rows, pad_id).chunk(2), 1)


@torch.no_grad()
def pair_logp(
    policy: Any, pairs: Rows, lengths: Sequence[int], pad_id: int, micro_batch: int
) -> Tensor:
    """log pi of both answers of all pairs, (N, 2) on the CPU, nats; the work is shared by all processes."""
    return map_across_ranks(
        lengths,
        max(1, micro_batch // 2),
        lambda some: both_logp(policy, [pairs[i] for i in some], pad_id),
    ).cpu()


def cached_logp(
    ref: Any, pairs: Rows, lengths: Sequence[int], pad_id: int, micro_batch: int, file: Path
) -> Tensor:
    """The reference's log-probabilities of all pairs, (N, 2): from `file` where an earlier run with the same reference and pairs has left
    them, else computed and left there."""
    known = collectives.rank() == 0 and file.exists()
    if collectives.all_reduce_max(float(known), ref.device):
        found = load_file(file)["logp"] if known else torch.zeros(len(pairs), 2)
        if collectives.world_size() > 1:  # the others may not see the first one's disk
            found = torch.tensor(
                collectives.all_reduce_sum(found.flatten().tolist(), ref.device),
                dtype=torch.float32,
            ).view(-1, 2)
        log.info(f"reference: log-probabilities of {len(pairs):,} pairs from {file}")
        return found
    log.info(f"reference: computing the log-probabilities of {len(pairs):,} pairs")
    found = pair_logp(ref, pairs, lengths, pad_id, micro_batch)
    if collectives.rank() == 0:
        temporary = file.with_suffix(f".{os.getpid()}.tmp")
        save_file({"logp": found}, temporary)
        os.replace(temporary, file)
    return found


def content_of(policy: Any) -> str:
    """A hash of a policy: configuration, weights, gathered one by one where ZeRO-3 partitions them, and the code that reads them. The
    same on every process."""
    code = "".join(
        Path(module.__file__ or "").read_text()
        for module in (likelihood, logprobs, loading, losses, packing)
    )
    sha = hashlib.sha256(f"{policy.module.hf.config.to_json_string()}{code}".encode())
    for name, weight in policy.module.named_parameters():
        if ".lora_" in name:  # the adapter, which is off
            continue
        with gather_parameters([weight]):
            if collectives.rank() == 0:
                sha.update(weight.detach().contiguous().view(torch.uint8).cpu().numpy())
    number = float(int(sha.hexdigest()[:12], 16)) if collectives.rank() == 0 else 0.0
    return str(collectives.all_reduce_sum([number], policy.device))

"""DPO: preference pairs -> policy, without a reward model and without sampling.

It trains on the pairs that a reward model would train on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.base.files import atomic_path
from rlhf.base.log import log
from rlhf.config.schema import Config, Dpo
from rlhf.data import encoding, tokenized
from rlhf.data.batches import global_batches, map_across_ranks, micro_batches, upload
from rlhf.data.cache import cache_folder, digest
from rlhf.data.records import Dataset
from rlhf.data.template_check import check_template
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, gather_parameters
from rlhf.evaluation.policy import PolicyEvaluation, before_and_after, evaluate_policy
from rlhf.evaluation.reward_model import pairwise_accuracy
from rlhf.models import loading, logprobs, packing, varlen, wrappers
from rlhf.models.loading import save_engine
from rlhf.models.lora import is_adapter_weight
from rlhf.models.wrappers import LogProbModel, Policy
from rlhf.planning.memory import sampling_choices
from rlhf.rl.experience import Models
from rlhf.sampling.token_choice import Sampling
from rlhf.sampling.vllm import engine_without_server
from rlhf.training import likelihood
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.likelihood import response_logprobs
from rlhf.training.losses import preference_loss
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.setup import (
    build_actor_and_reference,
    check_held_out,
    count_steps,
    open_inputs,
)
from rlhf.training.stats import Stats
from rlhf.training.tracker import Tracker

PairIds = tuple[list[int], list[int], list[int]]  # token ids of prompt, chosen, rejected


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluating before, meanwhile and after; save run_dir/model.

    Returns: the final metrics.
    """
    # 1. data
    dpo = cfg.dpo
    max_prompt, max_response = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    tokenizer, data = open_inputs(cfg, run_dir, cfg.inputs["sft"], samples=True)
    check_template(tokenizer, data.rm, data.report, "rm", ["chosen", "rejected"])
    pairs = tokenized.pairs(tokenizer, data.rm, max_prompt, max_response, cfg.data.workers)
    held_out = encoding.encode_pairs(tokenizer, data.eval_rm, max_prompt, max_response)
    log.info(f"DPO: {pairs}, {len(held_out)} held out")
    steps = count_steps(pairs, dpo.batch_size, dpo.epochs, dpo.max_steps, "dpo.batch_size")
    check_held_out(held_out, max_prompt)

    # 2. models: the policy; and its frozen start, whose log-probabilities are computed once
    actor, ref = build_actor_and_reference(cfg, tokenizer, run_dir)
    pad_id, micro_batch = tokenizer.pad_token_id, cfg.deploy.eval_micro_batch
    compute = partial(pair_logprobs, ref, pairs, pairs.lengths, pad_id, micro_batch)
    used = used_pairs(dpo, len(pairs), steps, cfg.seed)
    reference = cached_logprobs(compute, used, cache_file(cfg, ref, pairs), ref.device)
    lengths = [len(prompt) + max(len(c), len(r)) for prompt, c, r in held_out]
    held_out_reference = pair_logprobs(ref, held_out, lengths, pad_id, micro_batch)
    engine = engine_without_server(cfg)
    models = Models(tokenizer, actor, ref, engine=engine, **sampling_choices(cfg))
    evaluation = Evaluation(cfg, models, data, held_out, held_out_reference)

    # 3. training
    tracker = Tracker(cfg, run_dir, steps, ["loss", "rewards/accuracies", "rewards/margins"])
    progress: dict[str, Any] = {"tokens": 0, "before": [{}, []]}
    checkpoints = Checkpoints(
        cfg, run_dir, steps, {"actor": actor}, {"tracker": tracker, "progress": progress}
    )
    done = checkpoints.resume()
    if not done:
        progress["before"] = list(evaluation.measure())
    tracker.start_clock()
    batches = enumerate(global_batches(len(pairs), dpo.batch_size, dpo.epochs, cfg.seed))
    for step, batch in islice(batches, done, steps):
        lr = learning_rate(step, steps, dpo)
        examples = {i: pairs[i] for i in batch}
        micros = cut_batch(cfg, examples, pairs.lengths, reference)
        metrics = train_step(dpo, actor, micros, pad_id, lr)
        progress["tokens"] += sum(2 * len(p) + len(c) + len(r) for p, c, r in examples.values())
        metrics["num_tokens"] = progress["tokens"]
        if dpo.eval_every and (step + 1) % dpo.eval_every == 0 and step + 1 < steps:
            measured, samples = evaluation.measure()
            metrics |= {f"eval/{name}": value for name, value in measured.items()}
            tracker.samples(step + 1, samples)
        tracker.log(step + 1, metrics)
        checkpoints.after(step + 1)

    # 4. evaluation
    before, samples_before = progress["before"]
    metrics, compared = before_and_after((before, samples_before), evaluation.measure())
    tracker.samples(steps, compared)
    save_engine(actor, tokenizer, run_dir / "model")
    tracker.close(metrics)
    return metrics


# ------------------------------------------------------------------------------- one optimizer step


class MicroBatch(NamedTuple):
    pairs: list[PairIds]
    reference: Tensor  # (B, 2) log pi_ref of chosen and rejected, nats


def cut_batch(
    cfg: Config, examples: dict[int, PairIds], lengths: Sequence[int], reference: Tensor
) -> list[MicroBatch]:
    """This rank's micro-batches of a step. Args: examples: by their numbers; lengths, reference."""
    micros = micro_batches(
        list(examples),
        lengths,
        cfg.deploy.micro_batch,
        collectives.rank(),
        collectives.world_size(),
        cfg.data.max_prompt_tokens + cfg.data.max_response_tokens,
    )
    return [MicroBatch([examples[i] for i in rows], reference[list(rows)]) for rows in micros]


def train_step(
    dpo: Dpo, actor: Engine[Policy], micros: list[MicroBatch], pad_id: int, lr: float
) -> dict[str, float]:
    """One optimizer step. Returns: its metrics. Rewards are the implicit ones, beta log pi/ref."""
    actor.train()  # nothing drops out, but activation checkpointing works in this mode only
    stats = Stats()
    loss_fn = partial(dpo_loss, actor=actor, dpo=dpo, pad_id=pad_id, stats=stats)
    grad_norm = optimizer_step(actor, [partial(loss_fn, micro) for micro in micros], lr)
    actor.eval()
    losses, chosen, rejected, chosen_ratio, rejected_ratio = stats.gather("pairs").unbind(1)
    return {
        "loss": float(losses.mean()),
        "rewards/chosen": dpo.beta * float(chosen_ratio.mean()),
        "rewards/rejected": dpo.beta * float(rejected_ratio.mean()),
        "rewards/margins": dpo.beta * float((chosen_ratio - rejected_ratio).mean()),
        "rewards/accuracies": pairwise_accuracy(chosen_ratio, rejected_ratio),
        "logps/chosen": float(chosen.mean()),
        "logps/rejected": float(rejected.mean()),
        "grad_norm": grad_norm,
        "learning_rate": lr,
    }


def dpo_loss(
    micro: MicroBatch, actor: Engine[Policy], dpo: Dpo, pad_id: int, stats: Stats
) -> Tensor:
    """Mean loss of the pairs, the share of one micro-batch."""
    logp = chosen_rejected_logprobs(actor, micro.pairs, pad_id)
    (reference,) = upload(actor.device, micro.reference)
    ratio = logp - reference
    losses = preference_loss(ratio[:, 0], ratio[:, 1], dpo.beta, dpo.loss, dpo.label_smoothing)
    stats.append(pairs=torch.cat([losses[:, None], logp, ratio], 1))
    return losses.sum() / dpo.batch_size


# --------------------------------------------------------------------------------------- evaluation


@dataclass
class Evaluation:
    """Held-out pairs by the implicit reward, and sampled responses to the held-out prompts."""

    cfg: Config
    models: Models
    data: Dataset
    pairs: list[PairIds]
    reference: Tensor  # (pairs, 2) log pi_ref of chosen and rejected, nats

    def measure(self) -> PolicyEvaluation:
        """As evaluate_policy, with `accuracy` and `loss` of the pairs."""
        cfg, dpo, micro_batch = self.cfg, self.cfg.dpo, self.cfg.deploy.eval_micro_batch
        metrics, samples = evaluate_policy(
            self.models,
            self.data,
            cfg.data.max_prompt_tokens,
            cfg.rollout.max_new_tokens,
            Sampling(cfg.rollout.temperature),
            micro_batch,
        )
        lengths = [len(prompt) + max(len(c), len(r)) for prompt, c, r in self.pairs]
        pad_id = self.models.tokenizer.pad_token_id
        logp = pair_logprobs(self.models.actor, self.pairs, lengths, pad_id, micro_batch)
        chosen, rejected = (logp - self.reference).unbind(1)
        metrics["accuracy"] = pairwise_accuracy(chosen, rejected)
        losses = preference_loss(chosen, rejected, dpo.beta, dpo.loss, dpo.label_smoothing)
        metrics["loss"] = float(losses.mean())
        return metrics, samples


# -------------------------------------------------------------------------------- log-probabilities


def chosen_rejected_logprobs(policy: LogProbModel, pairs: Sequence[PairIds], pad_id: int) -> Tensor:
    """log pi of chosen and rejected responses in one forward pass, (B, 2), nats."""
    rows = [(prompt, chosen) for prompt, chosen, _ in pairs]
    rows += [(prompt, rejected) for prompt, _, rejected in pairs]
    return torch.stack(response_logprobs(policy, rows, pad_id).chunk(2), 1)


@torch.no_grad()
def pair_logprobs(
    policy: LogProbModel,
    pairs: Sequence[PairIds],
    lengths: Sequence[int],
    pad_id: int,
    micro_batch: int,
    used: np.ndarray | None = None,
) -> Tensor:
    """log pi of both responses of all pairs, which ranks share out, (N, 2) on the CPU, nats.

    Args: used: as in `map_across_ranks`; None: all pairs.
    """

    def work(rows: Sequence[int]) -> Tensor:
        return chosen_rejected_logprobs(policy, [pairs[i] for i in rows], pad_id)

    return map_across_ranks(lengths, max(1, micro_batch // 2), work, used)


def used_pairs(dpo: Dpo, pairs: int, steps: int, seed: int) -> np.ndarray:
    """Which pairs a run of `steps` optimizer steps uses (bool, one per pair)."""
    used = np.zeros(pairs, dtype=bool)
    for batch in islice(global_batches(pairs, dpo.batch_size, dpo.epochs, seed), steps):
        used[batch] = True
    return used


def cached_logprobs(
    compute: Callable[[np.ndarray], Tensor], used: np.ndarray, file: Path, device: torch.device
) -> Tensor:
    """Log-probabilities of the pairs, (N, 2) on the CPU: NaN where neither used nor known.

    They are read from `file`; those that it lacks are computed, and written there too.

    Args: compute: from the pairs that are needed to the log-probabilities, NaN where not computed.
        used (N,): bool.  device: of the collectives.
    """
    is_main = collectives.rank() == 0
    known = torch.full((len(used), 2), math.nan if is_main else 0.0)
    if is_main and file.exists():
        known = load_file(file)["logp"]
    if collectives.world_size() > 1:  # other ranks may not see the disk of rank 0
        flat = collectives.all_reduce_sum(known.flatten().tolist(), device)
        known = torch.tensor(flat, dtype=torch.float32).view(-1, 2)
    missing = used & known.isnan().any(1).numpy()
    if not missing.any():
        log.info(f"reference: log-probabilities of {used.sum():,} pairs from {file}")
        return known
    log.info(
        f"reference: computing the log-probabilities of {missing.sum():,} of {len(used):,} pairs"
    )
    computed = compute(missing)
    known = torch.where(known.isnan(), computed, known)
    if is_main:
        with atomic_path(file) as temporary:
            save_file({"logp": known}, temporary)
    return known


def cache_file(cfg: Config, ref: LogProbModel, pairs: tokenized.Rows[PairIds]) -> Path:
    """Where the reference's log-probabilities are kept: named by what they depend on."""
    deploy = cfg.deploy
    # the last two decide which pairs are computed together, and so the last bits of the results
    settings = (
        f"{len(pairs)} {deploy.precision.name} {deploy.device.name} {collectives.world_size()}"
        f" {deploy.eval_micro_batch}"
    )
    key = digest(policy_hash(ref), pairs.table._fingerprint, settings)
    return cache_folder() / f"reference-{key}.safetensors"


def policy_hash(policy: LogProbModel) -> str:
    """A hash of a policy's configuration and weights, and of the code that reads them.

    The weights of an adapter, which is off in a reference, are not part of it. The same on every
    rank.
    """
    modules = (likelihood, loading, logprobs, packing, varlen, wrappers)
    code = "".join(Path(module.__file__ or "").read_text(encoding="utf-8") for module in modules)
    sha = hashlib.sha256(f"{policy.module.hf.config.to_json_string()}{code}".encode())
    for name, weight in policy.module.named_parameters():
        if is_adapter_weight(name):
            continue
        with gather_parameters([weight]):
            if collectives.rank() == 0:
                sha.update(weight.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    number = float(int(sha.hexdigest()[:12], 16)) if collectives.rank() == 0 else 0.0
    return str(collectives.all_reduce_sum([number], policy.device))

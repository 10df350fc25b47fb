"""The measurements of bench/gpu.py with all models of PPO; tests/gpu/ uses them too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import accelerator
import torch
from accelerator import peak_bytes, reset_peak, seconds_of
from gpu_works import Table, generate, gib
from random_models import Bench
from torch import Tensor

from rlhf.config.choices import RolloutEngine
from rlhf.config.schema import Config
from rlhf.planning.memory import make_plan
from rlhf.rl.experience import Experience, measure, sample_responses, score
from rlhf.rl.learner import Learner
from rlhf.rl.update import actor_loss, critic_loss, minibatches_of_pass, update_policy
from rlhf.sampling.token_choice import Sampling
from rlhf.training.optimizer_step import optimizer_step

# -------------------------------------------------------------------------- synchronisations


def synchronisations(bench: Bench) -> Table:
    """How often the host waits for the GPU: per micro-batch of an update, and per sampled token."""
    counts = {
        "micro-batch of actor and critic": syncs_per_micro_batch(bench, bench.learner()),
        "sampled token": syncs_per_token(bench),
    }
    rows = [
        [name, f"{sum(each.values()):.2f}", ", ".join(f"{at} {n:.2g}" for at, n in each.items())]
        for name, each in counts.items()
    ]
    note = "They depend on the code only, not on the GPU. torch may miss some."
    return Table(["per", "synchronisations", "where"], rows, note)


def difference(
    device: torch.device, less: Callable[[], Any], more: Callable[[], Any]
) -> Counter[str]:
    """What `more` waits for and `less` does not, by place; both run once before they count."""
    counts = []
    for work in (less, more):
        work()
        with accelerator.synchronisations(device) as found:
            work()
        counts.append(Counter(found))
    counts[1].subtract(counts[0])
    return counts[1]


def per_unit(counts: Counter[str], units: int) -> dict[str, float]:
    return {place: count / units for place, count in counts.most_common() if count}


def syncs_per_token(bench: Bench) -> dict[str, float]:
    """Synchronisations of a sampled token, by place: of 32 tokens more."""
    few, many = 8, 40
    policy = bench.policy().to(bench.device).eval()
    if bench.is_tiny:  # the CPU's compiled step reads numbers that no GPU's step reads
        policy.can_pack = False
    works = [partial(generate, bench, policy, RolloutEngine.native, 4, n) for n in (few, many)]
    return per_unit(difference(bench.device, *works), many - few)


def syncs_per_micro_batch(bench: Bench, learner: Learner) -> dict[str, float]:
    """Synchronisations of one micro-batch of actor and critic, by place: the same rows in more."""
    minibatches = learner.cfg.rl.minibatches
    experience = bench.experience(learner, 4 * minibatches)
    works, pieces = [], []
    for size in (4, 1):
        cut = Learner(in_micro_batches(learner.cfg, size), learner.models, learner.guards, 100)
        works.append(partial(update_policy, cut, experience, cut.cfg.rl.kl.coef, 1))
        pieces.append(len(minibatches_of_pass(cut, experience, 0.0, 1, 0)[0].micro_batches))
    return per_unit(difference(bench.device, *works), (pieces[1] - pieces[0]) * minibatches)


def in_micro_batches(cfg: Config, size: int) -> Config:
    """A configuration with other micro-batches."""
    return replace(cfg, deploy=replace(cfg.deploy, micro_batch=size))


# ------------------------------------------------------------------------ PPO, and its memory


def ppo(bench: Bench) -> Table:
    """Where the time of a PPO iteration goes."""
    cfg, learner = bench.cfg, bench.learner()
    experience = bench.experience(learner, cfg.rl.batch_size)
    works = phases(bench, learner, experience, cfg.rl.batch_size)
    works["update"] = partial(update_policy, learner, experience, cfg.rl.kl.coef, 1)
    names = ("sampling", "scoring", "update")
    taken = {name: seconds_of(bench.device, works[name], repeats=2) for name in names}
    total = sum(taken.values())
    rows = [[name, f"{s:.2f}", f"{s / total:.0%}"] for name, s in taken.items()]
    rows.append(["iteration", f"{total:.2f}", f"{cfg.rl.batch_size / total:.1f} responses/s"])
    note = (
        f"{cfg.rl.batch_size} responses of {cfg.rollout.max_new_tokens} tokens, one pass of "
        f"{cfg.rl.minibatches} minibatches, LoRA {cfg.actor.lora.rank}, the rest as in the recipe. "
        "A larger deploy.eval_micro_batch (--set) makes sampling faster, until the memory is full."
    )
    return Table(["phase", "seconds", "share"], rows, note)


def phases(
    bench: Bench, learner: Learner, experience: Experience, rows: int
) -> dict[str, Callable[[], Any]]:
    """The phases of the plan of the memory, as work on `rows` responses."""
    cfg, models, rewards = bench.cfg, learner.models, learner.rewards
    prompts, size = bench.prompts(rows), cfg.deploy.eval_micro_batch

    def sampling() -> None:
        sample_responses(models, prompts, range(rows), Sampling(), size)

    def scoring() -> None:
        measure(models, experience, size, cfg.rollout.temperature, True)
        score(rewards, experience, prompts.rows, size)

    def updated(engine: Any, loss: Callable[..., Tensor]) -> None:
        engine.train()
        for batch in minibatches_of_pass(learner, experience, 0.0, 1, 0):
            pieces = [partial(loss, learner, batch, piece) for piece in batch.micro_batches]
            optimizer_step(engine, pieces, 0.0)
        engine.eval()

    return {
        "sampling": sampling,
        "scoring": scoring,
        "actor's update": partial(updated, models.actor, actor_loss),
        "critic's update": partial(updated, models.critic, critic_loss),
    }


def memory(bench: Bench) -> Table:
    """The plan of the memory against the measured peak, phase by phase."""
    measured = peaks(bench)
    rows = [
        [name, gib(planned), gib(found), f"{planned / found:.2f}" if found else ""]
        for name, (planned, found) in measured.items()
    ]
    note = (
        "GiB of tensors, without the CUDA context and what the allocator keeps unused. A ratio "
        "below 1 means that the plan promises too much room. It depends on the versions of torch "
        "and DeepSpeed, and on the attention kernel that torch chooses on this GPU."
    )
    return Table(["phase", "planned GiB", "measured GiB", "ratio"], rows, note)


def peaks(bench: Bench) -> dict[str, tuple[float, int]]:
    """Planned and measured bytes of tensors at the peak of each phase; measured is 0 on a CPU."""
    cfg = replace(bench.cfg, rl=replace(bench.cfg.rl, minibatches=1))
    bench = replace(bench, cfg=cfg)
    plan = make_plan(cfg, "ppo")
    learner = bench.learner()
    # a full batch of the sampler, and two full micro-batches of the update
    rows = max(cfg.deploy.eval_micro_batch, 2 * cfg.deploy.micro_batch)
    experience = bench.experience(learner, rows)
    works = phases(bench, learner, experience, rows)
    for work in works.values():
        work()  # Adam's moments exist from the first step on
    found = {}
    for name, work in works.items():
        reset_peak(bench.device)
        work()
        planned = plan.states - plan.libraries + sum(plan.phases[name].values())
        found[name] = planned, peak_bytes(bench.device)
    return found

"""PPO, RLOO, GRPO: prompts -> answers -> scores -> a better policy, kept near the SFT policy by a KL penalty. docs/ppo.md explains
every step, docs/algorithms.md how the three differ: in where an answer's advantage comes from.

One rollout per step: sample answers, score them, then `epochs` passes of `minibatches` optimizer steps for the actor, and for PPO's
critic. Every process holds the whole rollout's experience and trains on its rows of each minibatch, so minibatches, whitening and
metrics do not depend on the number of processes.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.config.schema import BestBy, Config, DsChat, Grpo, KlPlace, Ppo, Ptx
from rlhf.config.stage_graph import adapter_only, stage_config
from rlhf.data import tokenized
from rlhf.data.batches import global_batches, micro_batches, uniforms
from rlhf.data.load import open_data
from rlhf.data.records import Dataset
from rlhf.distributed import collectives
from rlhf.distributed.engine import build_engine
from rlhf.evaluation.policy import Found, before_and_after, evaluate_policy
from rlhf.models.loading import check_context, load_policy, load_scorer, load_tokenizer, save_engine
from rlhf.models.lora import AdapterOff
from rlhf.planning.memory import gather_for_rollout
from rlhf.rl.advantages import gae, group_relative, leave_one_out, token_rewards, whiten
from rlhf.rl.controllers import KlCoefficient, MovingAverage, RunningScale
from rlhf.rl.experience import Experience, Models, make_experience, values_before
from rlhf.rl.guards import Guards
from rlhf.rl.losses import kl_estimate, policy_loss, token_weights, value_loss
from rlhf.rl.metrics import response_rows, rollout_metrics
from rlhf.rl.monitor import Monitor
from rlhf.rl.rewards import Rewards, build_rewards, check_reward_models, load_functions
from rlhf.runs.log import log
from rlhf.sampling.token_choice import Sampling
from rlhf.training.checkpoint import Checkpoints
from rlhf.training.likelihood import response_nll_stats
from rlhf.training.optimizer_step import optimizer_step
from rlhf.training.schedule import learning_rate
from rlhf.training.tracker import Tracker

Texts = tokenized.Rows[tuple[list[int], list[int]]]


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train, evaluate before, meanwhile and after; save run_dir/model, PPO's run_dir/critic and, where they are wanted,
    run_dir/model_ema and run_dir/model_best. Returns the final metrics."""
    # ---- data
    name, algo = cfg.stage.name, stage_config(cfg)
    ppo = algo if isinstance(algo, Ppo) else None  # what only a stage with a critic has
    max_prompt, max_new, switches = (
        cfg.data.max_prompt_tokens,
        cfg.rollout.max_new_tokens,
        ppo.dschat if ppo else DsChat(),
    )
    functions = load_functions(cfg)
    check_context(cfg.inputs["sft"], max_prompt, max_new, "rollout.max_new_tokens")
    check_reward_models(cfg)
    tokenizer = load_tokenizer(cfg.inputs["sft"], cfg.data.template)
    data = open_data(cfg, run_dir)
    if algo.evaluation.every and algo.evaluation.best_by == BestBy.gold and not data.gold:
        raise ValueError(
            f"{name}.evaluation.best_by=gold: these data do not know the truth; choose score or objective"
        )
    prompts = tokenized.prompts(tokenizer, data.ppo, max_prompt, cfg.data.workers)
    texts = pretraining_texts(cfg, data, tokenizer) if algo.ptx.coef else None
    log.info(f"{name.upper()}: {prompts}, {len(data.eval_prompts)} held out")
    steps = len(prompts) // algo.batch_size * algo.prompt_epochs
    if not steps:
        raise ValueError(
            f"{name}.batch_size={algo.batch_size}: there are only {len(prompts)} prompts"
        )
    steps = min(steps, algo.max_steps or steps)
    warmup = ppo.critic_warmup if ppo else 0
    if ppo and warmup >= steps:
        raise ValueError(
            f"ppo.critic_warmup={warmup}: there are only {steps} rollouts, the policy would never learn"
        )

    # ---- models: the policy and its frozen start, what scores answers, and PPO's critic
    precision, dropout = cfg.deploy.precision, switches.dropout
    cfg.actor.lora.dropout = cfg.reward.lora.dropout = (
        0.0  # the ratio of the first update must be 1
    )
    actor = build_engine(
        lambda: load_policy(
            cfg.inputs["sft"], tokenizer, precision, dropout, adapter=cfg.actor.lora
        ),
        cfg,
        "actor",
        run_dir,
    )
    if adapter_only(cfg.actor):
        log.info("reference: the actor with its adapter off, one model less in memory")
        ref: Any = AdapterOff(actor)
    else:
        ref = build_engine(
            lambda: load_policy(cfg.inputs["sft"], tokenizer, precision), cfg, "ref", run_dir
        )
    rewards = build_rewards(cfg, data, functions, tokenizer, run_dir)
    critic = build_critic(cfg, ppo, rewards, tokenizer, run_dir) if ppo else None
    trained: dict[str, Any] = {"actor": actor} | ({"critic": critic} if ppo else {})
    for engine in trained.values():
        engine.eval()
    models = Models(
        tokenizer, actor, ref, rewards, critic, gather_for_rollout(cfg), cfg.rollout.engine
    )
    guards = Guards(precision, switches, cfg.rollout.temperature)
    guards.check_models(**trained, **({} if isinstance(ref, AdapterOff) else {"reference": ref}))
    ema = MovingAverage(actor, algo.ema) if algo.ema else None
    beta, scale = KlCoefficient(algo.kl, steps - warmup), RunningScale()
    sampling = Sampling(cfg.rollout.temperature, greedy=switches.greedy)
    tracker = Tracker(
        cfg,
        run_dir,
        steps,
        ["objective/scores", "objective/kl", "reward/gold/mean", "tokens/response_mean"],
    )
    watch = Monitor(tracker.alert, name)
    so_far: dict[str, Any] = {"best": -float("inf"), "before": {}, "samples_before": []}
    memory = {
        "beta": beta,
        "scale": scale,
        "tracker": tracker,
        "watch": watch,
        "so_far": so_far,
    } | ({"ema": ema} if ema else {})
    checkpoints = Checkpoints(cfg, run_dir, steps, trained, memory)

    def evaluate(step: int) -> Found:
        """On the held-out prompts; keeps the policy in model_best where it is the best so far."""
        e, micro_batch = algo.evaluation, cfg.deploy.eval_micro_batch
        how = Sampling(e.temperature, e.top_p, e.top_k)
        found, rows = evaluate_policy(models, data, max_prompt, max_new, how, micro_batch)
        found["objective"] = (
            found["score"] - algo.kl.coef * found["kl"]
        )  # not by the present beta: evaluations are compared
        if e.every and found[e.best_by.name] > so_far["best"]:
            so_far["best"] = found[e.best_by.name]
            log.info(f"step {step}: best {e.best_by.name} so far, {so_far['best']:.3f}")
            save_engine(actor, tokenizer, run_dir / "model_best")
        return found, rows

    done = checkpoints.resume()
    if not done:
        so_far["before"], so_far["samples_before"] = evaluate(0)

    # ---- training
    answers = algo.responses_per_prompt
    for step, batch in islice(
        enumerate(global_batches(len(prompts), algo.batch_size, algo.prompt_epochs, cfg.seed)),
        done,
        steps,
    ):
        started = time.time()
        draws = uniforms(
            "rollout",
            [i + k * len(prompts) for i in batch for k in range(answers)],
            cfg.seed,
            step,
            max_new,
        )
        asked, ids = zip(*(row for row in (prompts[i] for i in batch) for _ in range(answers)))
        masks = {"masks_from_ids": switches.pad_is_eos, "train_mode": switches.train_mode_logp}
        e = make_experience(
            models,
            ids,
            asked,
            draws,
            sampling,
            cfg.deploy.eval_micro_batch,
            **masks,
            rescore=step == 0,
        )
        made = time.time()
        guards.check_rollout(e, tokenizer.eos_token_id, first=step == 0)
        if step == 0:
            guards.check_start(e)
            guards.check_padding(actor, e, cfg.rollout.temperature, tokenizer.pad_token_id)

        # from scores to the reward of each token, and on to advantages
        raw_score = rewards.total(e.scores)
        score = (
            raw_score
            - algo.missing_eos_penalty * (1 - e.ended)
            - algo.length_penalty * e.mask.sum(1)
        )
        if algo.scale_score:
            score = scale(score)
        if algo.score_clip:
            score = score.clamp(-algo.score_clip, algo.score_clip)
        in_reward = beta.value if algo.kl.place == KlPlace.reward else 0.0
        penalty = in_reward * kl_estimate(e.old_logp, e.ref_logp, algo.kl.estimator)
        token_reward = token_rewards(score, penalty, e.mask)
        returns = None
        if ppo:  # each token by itself, against what the critic expected
            if ppo.whiten_rewards:
                token_reward = whiten(token_reward, e.mask, shift_mean=False)
            advantages, returns = gae(token_reward, e.old_values, e.mask, ppo.gamma, ppo.lam)
            if ppo.whiten_advantages:
                advantages = whiten(advantages, e.mask)
        else:  # all tokens of an answer alike, against the other answers to its prompt
            groups = token_reward.sum(1).view(-1, answers)
            grouped = (
                group_relative(groups, algo.normalize_std)
                if isinstance(algo, Grpo)
                else leave_one_out(groups)
            )
            advantages = grouped.view(-1, 1) * e.mask

        update = train_on(
            models, e, advantages, returns, beta.value, ema, texts, guards, step, steps, cfg
        )
        updated = time.time()

        if step == warmup:
            guards.report()
        metrics = rollout_metrics(e, raw_score, score, penalty, returns, beta.value)
        if data.gold:
            gold = [data.gold(turns, e.text(row, tokenizer)) for row, turns in enumerate(asked)]
            metrics |= {
                "reward/gold/mean": float(np.mean(gold)),
                "reward/gold/std": float(np.std(gold)),
            }
        for source, column in zip(rewards.names, e.scores.unbind(1)):
            metrics |= {
                f"reward/{source}/mean": float(column.mean()),
                f"reward/{source}/std": float(column.std(correction=0)),
            }
        tracker.answers(
            step + 1,
            response_rows(
                e, score, token_reward, advantages, returns, rewards, cfg.rollout.log_answers
            ),
        )
        if step >= warmup:  # before, there is no KL to steer
            beta.update(metrics["objective/kl"], len(asked))
        if algo.evaluation.every and (step + 1) % algo.evaluation.every == 0 and step + 1 < steps:
            found, rows = evaluate(step + 1)
            metrics |= {f"eval/{key}": value for key, value in found.items()}
            tracker.samples(step + 1, rows)
        metrics |= update
        metrics |= {
            "episode": (step + 1) * len(asked),
            "eps": len(asked) / (updated - started),
            "timing_s/rollout": made - started,
            "timing_s/update": updated - made,
            "timing_s/step": updated - started,
        }
        tracker.log(step + 1, metrics)
        watch.look(metrics)
        checkpoints.after(step + 1)

    # ---- evaluation
    metrics, compared = before_and_after(
        (so_far["before"], so_far["samples_before"]), evaluate(steps)
    )
    tracker.samples(steps, compared)
    save_engine(actor, tokenizer, run_dir / "model")
    if critic:
        save_engine(critic, tokenizer, run_dir / "critic")
    if ema:
        with ema.in_place():
            save_engine(actor, tokenizer, run_dir / "model_ema")
    tracker.close(metrics)
    return metrics


def build_critic(cfg: Config, ppo: Ppo, rewards: Rewards, tokenizer: Any, run_dir: Path) -> Any:
    """The critic, which starts from the reward model of this configuration where that reads the same tokens, else from SFT."""
    own = (
        s
        for s in rewards.sources
        if s.engine and not s.as_text and not ppo.rewards[s.name].path and s.weight
    )
    teacher = next(own, None)
    if teacher is None:
        log.info(
            "critic: no reward model of this configuration shares the policy's tokenizer, so it starts from the SFT policy"
        )
    path, precision, dropout = (
        cfg.inputs["rm" if teacher else "sft"],
        cfg.deploy.precision,
        ppo.dschat.dropout,
    )

    def load_critic() -> Any:
        critic = load_scorer(
            path,
            tokenizer,
            precision,
            zero_head=not teacher,
            dropout=dropout,
            adapter=cfg.reward.lora,
        )
        if teacher:  # values have the unit of the scores, as they count in the sum
            unit = teacher.engine.module.hf.config
            critic.hf.config.score_mean, critic.hf.config.score_std = (
                unit.score_mean,
                unit.score_std / teacher.weight,
            )
        return critic

    return build_engine(load_critic, cfg, "critic", run_dir)


def train_on(
    models: Models,
    e: Experience,
    advantages: Tensor,
    returns: Tensor | None,
    beta: float,
    ema: MovingAverage | None,
    texts: Texts | None,
    guards: Guards,
    step: int,
    steps: int,
    cfg: Config,
) -> dict[str, float]:
    """`epochs` passes over one rollout in `minibatches` optimizer steps each, for the actor and, where there is one, the critic.

    Args: advantages, returns (B, R), rows as in `e`; returns for the critic.  beta: weight of the KL, where it is part of the loss.
        texts: of the pretraining loss.
    Returns: means over all tokens of all minibatches and processes, of losses over the optimizer steps (`_max`: maxima).
    """
    actor, critic, pad_id = models.actor, models.critic, models.tokenizer.pad_token_id
    algo, rank, world, temperature = (
        stage_config(cfg),
        collectives.rank(),
        collectives.world_size(),
        cfg.rollout.temperature,
    )
    ppo = algo if isinstance(algo, Ppo) else None
    warmup = ppo.critic_warmup if ppo else 0
    actor_learns = step >= warmup
    in_loss = beta if algo.kl.place == KlPlace.loss else 0.0
    actor_lr = learning_rate(
        step - warmup, steps - warmup, algo
    )  # its warm-up begins when it begins
    critic_lr = learning_rate(step, steps, ppo.critic_optim) if ppo else 0.0
    for engine in filter(None, (actor, critic)):
        engine.train()  # nothing drops out; activation checkpointing works only so
    n, lengths = len(e.mask), e.full_mask.sum(1).tolist()
    of_tokens: dict[str, float] = defaultdict(float)  # sums over tokens of the whole rollout
    of_losses: dict[str, float] = defaultdict(float)  # sums over optimizer steps
    actor_norms, critic_norms, first_ratio, ratio_max, tokens_seen, passes = (
        [],
        [],
        0.0,
        0.0,
        0.0,
        0,
    )

    for epoch in range(algo.epochs):
        order = np.random.default_rng([cfg.seed, step, epoch]).permutation(n)
        approxkl, epoch_tokens = 0.0, 0.0
        for number, minibatch in enumerate(np.split(order, algo.minibatches)):
            longest = (
                None
                if ppo and ppo.dschat.micro_batch_means
                else cfg.data.max_prompt_tokens + cfg.rollout.max_new_tokens
            )
            micros = micro_batches(
                minibatch.tolist(), lengths, cfg.deploy.micro_batch, rank, world, longest
            )
            tokens = float(e.learnt[minibatch].sum())  # of this optimizer step, over all processes
            sums: dict[str, float] = defaultdict(float)
            losses: dict[str, float] = defaultdict(float)
            guarded = epoch == number == 0 and actor_learns  # before the policy moves

            def weights(
                part: Experience,
                tokens: float = tokens,
                size: int = len(minibatch),
                parts: int = len(micros) * world,
            ) -> Tensor:
                if ppo and ppo.dschat.micro_batch_means:
                    tokens, size = float(part.learnt.sum()) * parts, len(part.learnt) * parts
                return token_weights(
                    part.learnt, algo.loss_over, tokens, size, cfg.rollout.max_new_tokens
                )

            def actor_loss(
                rows: Sequence[int],
                sums: dict[str, float] = sums,
                losses: dict[str, float] = losses,
                guarded: bool = guarded,
            ) -> Tensor:
                part = e.rows(rows)
                r, weight = part.mask.shape[1], weights(part)
                logp, entropy = (
                    x[:, -r:] for x in actor(part.ids, part.full_mask, part.wanted, temperature)[:2]
                )
                if guarded:
                    guards.check_ratio(
                        logp.detach(), part.old_logp, part.mask, first=step == warmup
                    )
                loss, counts = policy_loss(
                    logp,
                    part.old_logp,
                    advantages[rows, :r],
                    part.learnt,
                    algo.clip,
                    algo.clip_high,
                )
                for key, value in counts.items():
                    sums[key] = (
                        max(sums[key], float(value))
                        if key == "ratio_max"
                        else sums[key] + float(value)
                    )
                sums["entropy"] += float((entropy.detach() * part.learnt).sum())
                terms = {"policy": (weight * loss).sum()}
                if algo.entropy_coef:
                    terms["entropy"] = -algo.entropy_coef * (weight * entropy).sum()
                if in_loss:
                    terms["kl"] = (
                        in_loss
                        * (
                            weight * kl_estimate(logp * part.mask, part.ref_logp, algo.kl.estimator)
                        ).sum()
                    )
                for key, term in terms.items():
                    losses[key] += float(term.detach())
                return sum(terms.values(), torch.zeros((), device=logp.device))

            def critic_loss(
                rows: Sequence[int],
                sums: dict[str, float] = sums,
                losses: dict[str, float] = losses,
            ) -> Tensor:
                assert ppo and returns is not None
                part = e.rows(rows)
                r = part.mask.shape[1]
                values = values_before(critic(part.ids, part.full_mask), r)
                loss, clipped = value_loss(
                    values, part.old_values, returns[rows, :r], part.learnt, ppo.value_clip
                )
                loss = (weights(part) * loss).sum()
                losses["value"] += float(loss.detach())
                sums["value_clipfrac"] += float(clipped)
                return loss

            work: list[tuple[Callable[[Any], Tensor], Any]] = [
                (actor_loss, rows) for rows in micros
            ]
            if texts is not None:  # as many texts as answers, in the same optimizer step
                draw = np.random.default_rng([cfg.seed, step, epoch, number])
                chosen = draw.choice(
                    len(texts), len(minibatch), replace=len(texts) < len(minibatch)
                )
                taken = {int(i): texts[int(i)] for i in chosen}
                count = sum(len(taken[int(i)][1]) for i in chosen)

                def ptx_loss(
                    rows: Sequence[int],
                    taken: dict = taken,
                    count: int = count,
                    losses: dict[str, float] = losses,
                ) -> Tensor:
                    loss = (
                        algo.ptx.coef
                        * response_nll_stats(actor, [taken[i] for i in rows], pad_id)[0]
                        / count
                    )
                    losses["ptx"] += float(loss.detach())
                    return loss

                cut = micro_batches(
                    chosen.tolist(),
                    texts.lengths,
                    cfg.deploy.micro_batch,
                    rank,
                    world,
                    max(texts.lengths),
                )
                work += [(ptx_loss, rows) for rows in cut]
            if actor_learns:
                actor_norms.append(
                    optimizer_step(actor, work, lambda item: item[0](item[1]), actor_lr)
                )
                if ema:
                    ema.update()
            if critic:
                critic_norms.append(optimizer_step(critic, micros, critic_loss, critic_lr))

            ratio_max = max(ratio_max, sums.pop("ratio_max", 0.0))
            for total, part in ((of_tokens, sums), (of_losses, losses)):
                keys = sorted(part)
                for key, value in zip(
                    keys, collectives.all_reduce_sum([part[key] for key in keys], actor.device)
                ):
                    part[key] = value
                    total[key] += value
            if guarded:
                first_ratio = sums["ratio"] / max(tokens, 1.0)
            approxkl += sums["approxkl"]
            epoch_tokens += tokens
        tokens_seen += epoch_tokens
        passes += 1
        if algo.target_kl and approxkl > algo.target_kl * epoch_tokens:
            break
    for engine in filter(None, (actor, critic)):
        engine.eval()

    updates = passes * algo.minibatches
    mean = {
        key: value / max(tokens_seen, 1.0) for key, value in of_tokens.items()
    }  # DeepSpeed-Chat's masks may leave no token
    loss_of = {key: value / updates for key, value in of_losses.items()}
    metrics = {"lr": actor_lr if actor_learns else 0.0, "policy/epochs": passes}
    if critic:
        metrics |= {"lr_critic": critic_lr, "loss/value_avg": loss_of["value"]}
        metrics |= {
            "val/clipfrac_avg": mean["value_clipfrac"],
            "val/grad_norm": float(np.mean(critic_norms)),
        }
    if actor_learns:
        metrics |= {
            f"loss/{key}_avg": loss_of[key]
            for key in ("policy", "entropy", "kl", "ptx")
            if key in loss_of
        }
        metrics |= {
            "loss/total_avg": sum(
                loss_of.get(key, 0.0) for key in ("policy", "entropy", "kl", "ptx")
            ),
            "policy/approxkl_avg": mean["approxkl"],
            "policy/clipfrac_avg": mean["clipfrac_low"] + mean["clipfrac_high"],
            "policy/clipfrac_low_avg": mean["clipfrac_low"],
            "policy/entropy_avg": mean["entropy"],
            "policy/ratio_max": collectives.all_reduce_max(ratio_max, actor.device),
            "policy/grad_norm": float(np.mean(actor_norms)),
            "val/ratio": mean["ratio"],
            "val/ratio_var": max(0.0, mean["ratio_sq"] - mean["ratio"] ** 2),
        }
        if first_ratio:
            metrics["policy/ratio_first_minibatch"] = first_ratio
    return metrics


def pretraining_texts(cfg: Config, data: Dataset, tokenizer: Any) -> Texts:
    """What the pretraining loss reads: the sources of plain text, or without any, the SFT demonstrations (their answers)."""
    ptx: Ptx = stage_config(cfg).ptx
    if data.texts is not None:
        check_context(cfg.inputs["sft"], 0, ptx.max_tokens, f"{cfg.stage.name}.ptx.max_tokens")
        texts = tokenized.texts(tokenizer, data.texts, ptx.max_tokens, cfg.data.workers)
    else:
        longest = min(ptx.max_tokens, cfg.data.max_response_tokens)  # which SFT has had room for
        texts = tokenized.demonstrations(
            tokenizer, data.sft, cfg.data.max_prompt_tokens, longest, cfg.data.workers
        )
    if not len(texts):
        raise ValueError(
            f"{cfg.stage.name}.ptx.coef={ptx.coef}: there are neither texts (a source of format text) nor demonstrations"
        )
    origin = "" if data.texts is not None else " of SFT, as no source has plain text"
    log.info(f"pretraining loss: {texts}{origin}")
    return texts

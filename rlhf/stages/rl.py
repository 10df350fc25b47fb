"""Online RL (PPO, RLOO, GRPO and their variants): sample, score, estimate advantages, update, log.

The presets in conf/rl differ in where a response's advantage comes from and in the loss.
docs/ppo.md explains every step, docs/algorithms.md the differences.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.base.log import log, plural
from rlhf.config import stage_graph
from rlhf.config.choices import BestBy, KlAppliedTo
from rlhf.config.schema import Config
from rlhf.data import tokenized
from rlhf.data.batches import global_batches, uniforms
from rlhf.data.records import Dataset, Prompt
from rlhf.distributed.engine import Engine, build_engine
from rlhf.evaluation.during_training import Evaluations
from rlhf.models.loading import check_context, load_scorer, save_engine
from rlhf.models.wrappers import Scorer
from rlhf.planning.memory import gather_for_rollout
from rlhf.rewards.process import RewardProcess
from rlhf.rewards.trial import start_functions, try_functions
from rlhf.rl.advantages import estimate_advantages, shape_scores, token_rewards
from rlhf.rl.controllers import KlCoefficient, MovingAverage, RunningScale
from rlhf.rl.experience import Experience, Models, Prompts, make_experience
from rlhf.rl.guards import Guards
from rlhf.rl.losses import kl_estimate
from rlhf.rl.metrics import Scored, response_rows, rollout_metrics, source_metrics
from rlhf.rl.monitor import Monitor
from rlhf.rl.rewards import (
    Rewards,
    build_rewards,
    check_reward_models,
)
from rlhf.rl.update import Learner, Texts, update_policy
from rlhf.sampling.token_choice import Sampling
from rlhf.training.checkpoint import Checkpoints, Stateful
from rlhf.training.setup import build_actor_and_reference, check_rows_left, open_inputs
from rlhf.training.tracker import Tracker

PromptRows = tokenized.Rows[tuple[Prompt, list[int]]]
SHOWN = ["objective/scores", "reward/gold/mean", "objective/kl", "tokens/response_mean"]


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train the policy; evaluate it before, during and after training.

    Saves run_dir/model, with a critic run_dir/critic, and where configured run_dir/model_ema and
    run_dir/model_best.

    Returns: the final metrics.
    """
    # 1. data
    functions = start_functions(cfg)
    check_reward_models(cfg)
    path = cfg.inputs["sft"]
    tokenizer, data = open_inputs(cfg, run_dir, path, samples=True, references=False)
    try_functions(functions, data)
    prompts = tokenized.prompts(tokenizer, data.ppo, cfg.data.max_prompt_tokens, cfg.data.workers)
    texts = pretraining_texts(cfg, data, tokenizer) if cfg.rl.ptx.coef else None
    log.info(f"{cfg.rl.name}: {prompts}, {len(data.eval_prompts)} held out")
    check_rows_left(prompts)
    rollouts = count_rollouts(cfg, data, len(prompts))

    # 2. models: policy and reference, what scores responses, and the critic
    models = load_models(cfg, data, tokenizer, functions, run_dir)
    guards = Guards(cfg.deploy.precision, cfg.rl.dschat, cfg.rollout.temperature)
    guards.check_models(models)

    # 3. what is remembered from rollout to rollout, and resumed
    ema = MovingAverage(models.actor, cfg.rl.ema) if cfg.rl.ema else None
    learner = Learner(cfg, models, guards, rollouts, ema, texts)
    tracker = Tracker(cfg, run_dir, rollouts, SHOWN)
    state = State(
        kl=KlCoefficient(cfg.rl.kl, rollouts - learner.warmup),
        scale=RunningScale(),
        tracker=tracker,
        monitor=Monitor(tracker.alert),
        evaluations=Evaluations(cfg, data, models, run_dir),
    )
    engines = {"actor": models.actor} | ({"critic": models.critic} if models.critic else {})
    remembered = state.parts() | ({"ema": ema} if ema else {})
    checkpoints = Checkpoints(cfg, run_dir, rollouts, engines, remembered)
    done = checkpoints.resume()
    if not done:
        state.evaluations.remember_start()
    tracker.start_clock()

    # 4. rollouts
    per_rollout = stage_graph.prompts_per_rollout(cfg.rl)
    batches = global_batches(len(prompts), per_rollout, cfg.rl.prompt_epochs, cfg.seed)
    for rollout, batch in islice(enumerate(batches), done, rollouts):
        metrics = train_on_rollout(learner, state, prompts, batch, rollout)
        tracker.log(rollout + 1, metrics)
        state.monitor.check(metrics)
        checkpoints.after(rollout + 1)

    # 5. evaluation, and the models that the run leaves
    metrics, compared = state.evaluations.compare(rollouts)
    tracker.samples(rollouts, compared)
    save_models(learner, run_dir)
    if functions:
        functions.close()
    tracker.close(metrics)
    return metrics


def save_models(learner: Learner, run_dir: Path) -> None:
    """The policy, and where they exist the critic and the average policy."""
    models = learner.models
    save_engine(models.actor, models.tokenizer, run_dir / "model")
    if models.critic:
        save_engine(models.critic, models.tokenizer, run_dir / "critic")
    if learner.ema:
        with learner.ema.in_place():
            save_engine(models.actor, models.tokenizer, run_dir / "model_ema")


@dataclass
class State:
    """What is remembered from rollout to rollout. Every field is part of a checkpoint."""

    kl: KlCoefficient
    scale: RunningScale
    tracker: Tracker
    monitor: Monitor
    evaluations: Evaluations

    def parts(self) -> dict[str, Stateful]:
        """The fields by name, as a checkpoint stores them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


# ----------------------------------------------------------------------------------- one rollout


def train_on_rollout(
    learner: Learner, state: State, prompts: PromptRows, batch: Sequence[int], rollout: int
) -> dict[str, float]:
    """One rollout and the update on it.

    Args:
        batch: row numbers of its prompts.
        rollout: its number, from 0.
    Returns: metrics.
    """
    cfg, models, guards = learner.cfg, learner.models, learner.guards
    # 1. sample responses, and measure them
    started = time.time()
    asked = prompts_of_rollout(cfg, prompts, batch, rollout)
    learner.rewards.progress = (rollout, learner.rollouts)
    sampling = Sampling(cfg.rollout.temperature, greedy=cfg.rl.dschat.greedy)
    experience = make_experience(
        models,
        asked,
        sampling,
        cfg.deploy.eval_micro_batch,
        rescore=rollout == 0,
        pad_is_eos=cfg.rl.dschat.pad_is_eos,
    )
    sampled = time.time()
    guards.check_rollout(experience, models.tokenizer.eos_token_id, first=rollout == 0)
    if rollout == 0:
        guards.check_start(experience)
        pad_id = models.tokenizer.pad_token_id
        guards.check_padding(models.actor, experience, cfg.rollout.temperature, pad_id)

    # 2. from scores to the reward of each token
    scored = score_rollout(learner, state, experience)

    # 3. advantages
    advantages, returns = estimate_advantages(scored.token_rewards, experience, cfg.rl)
    experience.advantages = advantages
    if returns is not None:
        experience.returns = returns

    # 4. update
    updated = update_policy(learner, experience, state.kl.value, rollout)
    seconds = time.time() - started
    if rollout == learner.warmup:
        guards.report()

    # 5. metrics, and the controller that reads them
    metrics = log_rollout(learner, state, experience, scored, asked, rollout)
    size = len(asked.ids)
    if learner.actor_trains(rollout):  # before, the policy is the reference and has no KL
        state.kl.update(metrics["objective/kl"], size)
    metrics |= evaluate_when_due(state, rollout + 1, learner.rollouts)
    progress = {
        "episode": (rollout + 1) * size,
        "responses_per_second": size / seconds,
        "timing_s/rollout": sampled - started,
        "timing_s/update": started + seconds - sampled,
        "timing_s/step": seconds,
    }
    return metrics | updated | progress


def log_rollout(
    learner: Learner,
    state: State,
    experience: Experience,
    scored: Scored,
    asked: Prompts,
    rollout: int,
) -> dict[str, float]:
    """Metrics of a rollout; some of its responses go to rollouts.jsonl, token by token."""
    rewards = learner.rewards
    metrics = rollout_metrics(experience, scored, state.kl.value)
    metrics |= state.evaluations.gold_metrics(experience, asked.rows)
    metrics |= source_metrics(rewards.names, experience)
    count = learner.cfg.rollout.log_responses
    state.tracker.responses(rollout + 1, response_rows(experience, scored, rewards, count))
    return metrics


def evaluate_when_due(state: State, done: int, rollouts: int) -> dict[str, float]:
    """Metrics of an evaluation after `done` of all `rollouts`, where one is due."""
    if not state.evaluations.is_due(done, rollouts):
        return {}
    measured, samples = state.evaluations.evaluate(done)
    state.tracker.samples(done, samples)
    return {f"eval/{name}": value for name, value in measured.items()}


def prompts_of_rollout(
    cfg: Config, prompts: PromptRows, batch: Sequence[int], rollout: int
) -> Prompts:
    """The prompts of a rollout, each as often as it gets a response, with their random numbers."""
    k = cfg.rl.responses_per_prompt
    # response j to prompt i has a number of its own, whatever else is in the rollout
    numbers = [i + j * len(prompts) for i in batch for j in range(k)]
    random = uniforms("rollout", numbers, cfg.seed, rollout, cfg.rollout.max_new_tokens)
    rows, ids = zip(*(row for row in (prompts[i] for i in batch) for _ in range(k)))
    return Prompts(rows, ids, random, k)


def score_rollout(learner: Learner, state: State, experience: Experience) -> Scored:
    """Scores as they are, as they count, and as the reward of each token."""
    rl, kl = learner.cfg.rl, learner.cfg.rl.kl
    raw = learner.rewards.total(experience.scores)
    score = shape_scores(raw, experience, rl, state.scale)
    coef = state.kl.value if kl.applied_to == KlAppliedTo.reward else 0.0
    estimate = kl_estimate(experience.old_logprobs, experience.ref_logprobs, kl.estimator)
    penalty: Tensor = coef * estimate
    rewards_per_token = token_rewards(score, penalty, experience.response_mask)
    return Scored(raw, score, penalty, rewards_per_token)


# ---------------------------------------------------------------------------------------- set-up


def count_rollouts(cfg: Config, data: Dataset, prompts: int) -> int:
    """Number of rollouts. Raises: UserError where the data are too few or have no ground truth."""
    rl = cfg.rl
    if rl.evaluation.every and rl.evaluation.best_by == BestBy.gold and not data.gold:
        raise UserError(
            "rl.evaluation.best_by=gold: these data have no ground truth; use score or objective"
        )
    per_rollout = stage_graph.prompts_per_rollout(rl)
    rollouts = prompts // per_rollout * rl.prompt_epochs
    if not rollouts:
        raise UserError(
            f"rl.batch_size={rl.batch_size}: a rollout needs {per_rollout} prompts, there are "
            f"{prompts}; lower it, or add data"
        )
    if rl.max_steps and rollouts < rl.max_steps:
        log.info(
            f"{plural(rollouts, 'rollout')}, fewer than rl.max_steps={rl.max_steps}: {prompts} "
            f"prompts make {prompts // per_rollout} of {per_rollout}, in each of "
            f"rl.prompt_epochs={rl.prompt_epochs} passes"
        )
    rollouts = min(rollouts, rl.max_steps or rollouts)
    if stage_graph.has_critic(rl) and rl.critic.warmup_rollouts >= rollouts:
        raise UserError(
            f"rl.critic.warmup_rollouts={rl.critic.warmup_rollouts}: there are only {rollouts} "
            "rollouts, so the policy would not be trained; lower it"
        )
    return rollouts


def load_models(
    cfg: Config,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    functions: RewardProcess | None,
    run_dir: Path,
) -> Models:
    """The policy and its reference, what scores responses, and with rl.advantage=gae the critic."""
    actor, ref = build_actor_and_reference(cfg, tokenizer, run_dir)
    rewards = build_rewards(cfg, data, functions, tokenizer, run_dir)
    critic = None
    if stage_graph.has_critic(cfg.rl):
        critic = build_critic(cfg, rewards, tokenizer, run_dir)
        critic.eval()
    gather = gather_for_rollout(cfg)
    return Models(tokenizer, actor, ref, rewards, critic, gather, cfg.rollout.engine)


def build_critic(
    cfg: Config, rewards: Rewards, tokenizer: PreTrainedTokenizerBase, run_dir: Path
) -> Engine[Scorer]:
    """The critic. It starts from the reward model of this configuration where that reads the same
    tokens, else from the policy at its start with a new head."""
    reward_models = [
        source
        for source in rewards.sources
        if source.engine
        and not source.reads_text
        and not stage_graph.score_sources(cfg, cfg.rl.name)[source.name].path
        and source.weight
    ]
    start = reward_models[0] if reward_models else None
    if start is None:
        given = "rl.actor" if cfg.rl.actor else "the SFT policy"
        log.info(
            "critic: it starts from the weights of the policy at its start "
            f"({given}: {cfg.inputs['sft']}), as no reward model of this configuration reads the "
            "policy's tokens"
        )
    path = cfg.inputs["rm" if start else "sft"]
    precision, adapter = cfg.deploy.precision, replace(cfg.reward.lora, dropout=0.0)

    def load_critic() -> Scorer:
        is_new = start is None
        critic = load_scorer(path, tokenizer, precision, zero_head=is_new, adapter=adapter)
        if start and start.engine:  # values have the unit of the scores as they count
            unit = start.engine.module.hf.config
            critic.hf.config.score_mean = unit.score_mean
            critic.hf.config.score_std = unit.score_std / start.weight
        return critic

    return build_engine(load_critic, cfg, "critic", run_dir)


def pretraining_texts(cfg: Config, data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """What the pretraining loss reads: sources of plain text, else the SFT demonstrations.

    Raises: UserError where there are neither.
    """
    longest = cfg.rl.ptx.max_tokens
    if data.texts is not None:
        note = ""
        check_context(cfg.inputs["sft"], 0, longest, "rl.ptx.max_tokens")
        texts = tokenized.texts(tokenizer, data.texts, longest, cfg.data.workers)
    else:
        note = ", as no source has plain text"
        longest = min(longest, cfg.data.max_response_tokens)  # what SFT had room for
        max_prompt, workers = cfg.data.max_prompt_tokens, cfg.data.workers
        texts = tokenized.demonstrations(tokenizer, data.sft, max_prompt, longest, workers)
    if not len(texts):
        raise UserError(
            f"rl.ptx.coef={cfg.rl.ptx.coef}: there are neither texts (a source of format text) nor "
            "demonstrations; add data, or set it to 0"
        )
    log.info(f"pretraining loss: {texts}{note}")
    return texts

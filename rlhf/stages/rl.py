"""Online RL (PPO, RLOO, GRPO and their variants): sample, score, estimate advantages, update, log.

The presets in conf/rl differ in where a response's advantage comes from and in the loss.
docs/ppo.md explains every step, docs/algorithms.md the differences.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.base.log import log, plural
from rlhf.config import stage_graph
from rlhf.config.choices import BestBy, KlAppliedTo
from rlhf.config.schema import Config
from rlhf.data import tokenized
from rlhf.data.batches import PromptOrder, uniforms
from rlhf.data.records import Dataset, Prompt
from rlhf.distributed import collectives
from rlhf.evaluation.during_training import Evaluations
from rlhf.models.loading import save_engine
from rlhf.planning.memory import sampling_choices
from rlhf.rewards.process import RewardProcess
from rlhf.rewards.trial import running_functions, try_functions
from rlhf.rl.advantages import differ, estimate_advantages, loss_mask, shape_scores, token_rewards
from rlhf.rl.controllers import KlCoefficient, MovingAverage, RunningScale
from rlhf.rl.critic import build_critic
from rlhf.rl.experience import (
    Experience,
    Models,
    Prompts,
    concatenate,
    correct_for_sampler,
    make_experience,
    pick_prompts,
)
from rlhf.rl.guards import Guards
from rlhf.rl.learner import Learner
from rlhf.rl.losses import kl_estimate
from rlhf.rl.metrics import Scored, drawn_metrics, response_rows, rollout_metrics, source_metrics
from rlhf.rl.monitor import Monitor
from rlhf.rl.rewards import build_rewards, check_reward_models
from rlhf.rl.update import pretraining_texts, step_critic_first, update_policy
from rlhf.runs.directory import write_json
from rlhf.runs.run_files import WARNINGS
from rlhf.sampling.token_choice import Sampling
from rlhf.sampling.vllm import VllmSampler, running_sampler
from rlhf.training.checkpoint import Checkpoints, Stateful
from rlhf.training.setup import (
    build_actor_and_reference,
    check_rows_left,
    open_inputs,
    say_left_over,
)
from rlhf.training.tracker import Tracker

PromptRows = tokenized.Rows[tuple[Prompt, list[int]]]
SHOWN = ["objective/scores", "reward/gold/mean", "objective/kl", "tokens/response_mean"]


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Train the policy; evaluate it before, during and after training.

    Saves run_dir/model, with a critic run_dir/critic, and where configured run_dir/model_ema and
    run_dir/model_best.

    Returns: the final metrics.
    """
    with running_functions(cfg) as functions, running_sampler(cfg, run_dir) as sampler:
        return train(cfg, run_dir, functions, sampler)


def train(
    cfg: Config, run_dir: Path, functions: RewardProcess | None, sampler: VllmSampler | None
) -> dict[str, float]:
    """As `run`. Args: functions, sampler: reward functions and vLLM, in processes of their own."""
    # 1. data
    check_reward_models(cfg)
    tokenizer, data = open_inputs(cfg, run_dir, cfg.inputs["sft"], samples=True, references=False)
    try_functions(functions, data, tokenizer)
    prompts = tokenized.prompts(tokenizer, data.ppo, cfg.data.max_prompt_tokens, cfg.data.workers)
    texts = pretraining_texts(cfg, data, tokenizer) if cfg.rl.ptx.coef else None
    log.info(f"{cfg.rl.name}: {prompts}, {len(data.eval_prompts)} held out")
    check_rows_left(prompts)
    rollouts = count_rollouts(cfg, data, len(prompts))

    # 2. models: policy and reference, what scores responses, and the critic
    models = load_models(cfg, data, tokenizer, functions, run_dir)
    models.vllm = sampler
    is_foreign = cfg.rollout.engine.is_foreign
    guards = Guards(cfg.deploy.precision, cfg.rl.dschat, cfg.rollout.temperature, is_foreign)
    guards.check_models(models)

    # 3. what is remembered from rollout to rollout, and resumed
    ema = MovingAverage(models.actor, cfg.rl.ema) if cfg.rl.ema else None
    learner = Learner(cfg, models, guards, rollouts, ema, texts)
    tracker = Tracker(cfg, run_dir, rollouts, SHOWN)
    state = State(
        kl=KlCoefficient(cfg.rl.kl, rollouts - learner.warmup),
        scale=RunningScale(),
        order=PromptOrder(len(prompts), stage_graph.prompts_per_rollout(cfg.rl), cfg.seed),
        tracker=tracker,
        monitor=Monitor(tracker.alert),
        evaluations=Evaluations(cfg, data, models, run_dir),
        ema=ema,
    )
    checkpoints = Checkpoints(cfg, run_dir, rollouts, models.trained(), state.parts())
    done = checkpoints.resume()
    learner.rewards.progress = (done, rollouts)
    if not done:
        state.evaluations.remember_start()
    tracker.start_clock()

    # 4. rollouts
    for rollout in range(done, rollouts):
        metrics = train_on_rollout(learner, state, prompts, rollout)
        tracker.log(rollout + 1, metrics)
        if state.monitor.check(metrics):
            write_warnings(state.monitor, run_dir)
        checkpoints.after(rollout + 1)

    # 5. evaluation, and the models that the run leaves
    metrics, compared = state.evaluations.compare(rollouts)
    tracker.samples(rollouts, compared)
    save_models(learner, run_dir)
    write_warnings(state.monitor, run_dir)
    tracker.close(metrics)
    return metrics


def write_warnings(monitor: Monitor, run_dir: Path) -> None:
    """What the run has warned of so far."""
    if collectives.rank() == 0:
        write_json(run_dir / WARNINGS, list(monitor.alerted.values()))


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
    order: PromptOrder
    tracker: Tracker
    monitor: Monitor
    evaluations: Evaluations
    ema: MovingAverage | None  # of the policy's weights

    def parts(self) -> dict[str, Stateful]:
        """The fields that the run has, by name, as a checkpoint stores them."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: part for name, part in parts.items() if part is not None}


# ----------------------------------------------------------------------------------- one rollout


def train_on_rollout(
    learner: Learner, state: State, prompts: PromptRows, rollout: int
) -> dict[str, float]:
    """One rollout and the update on it.

    Args: rollout: its number, from 0.
    Returns: metrics.
    """
    cfg, models, guards = learner.cfg, learner.models, learner.guards
    # 1. sample responses, and measure them (values: see 3)
    started = time.time()
    asked, experience, drawn = sample_rollout(learner, state.order, prompts, rollout)
    sampled = time.time()
    functions = [k for k, source in enumerate(learner.rewards.sources) if source.engine is None]
    guards.check_rollout(experience, models.tokenizer.eos_token_id, rollout == 0, functions)
    if rollout == 0:
        guards.check_start(experience)
        pad_id = models.tokenizer.pad_token_id
        guards.check_padding(models.actor, experience, cfg.rollout.temperature, pad_id)

    # 2. from scores to the reward of each token, and which tokens are in the loss
    scored = score_rollout(learner, state, experience)
    experience.loss_mask = loss_mask(experience, scored.raw, cfg.rl.mask_truncated)
    corrected = correct_for_sampler(cfg, experience)

    # 3. advantages; the values of responses that are used once come with the critic's step
    rewards, critic_done = scored.token_rewards, None
    if learner.steps_critic_first:
        critic_done = step_critic_first(learner, experience, rewards, state.kl.value, rollout)
    advantages, returns = estimate_advantages(rewards, experience, cfg.rl)
    experience.advantages = advantages
    if returns is not None:
        experience.returns = returns

    # 4. update
    updated = update_policy(learner, experience, state.kl.value, rollout, critic_done)
    learner.rewards.progress = (rollout + 1, learner.rollouts)
    seconds = time.time() - started
    if rollout == learner.warmup:
        guards.report()

    # 5. metrics, and the controller that reads them
    metrics = drawn | log_rollout(learner, state, experience, scored, asked, rollout)
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
    return metrics | corrected | updated | progress


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
    rows = response_rows(experience, scored, rewards, count)
    for row, prompt in zip(rows, asked.rows):
        if columns := prompt.short_columns():
            row["columns"] = columns
    state.tracker.responses(rollout + 1, rows)
    return metrics


def evaluate_when_due(state: State, done: int, rollouts: int) -> dict[str, float]:
    """Metrics of an evaluation after `done` of all `rollouts`, where one is due."""
    if not state.evaluations.is_due(done, rollouts):
        return {}
    measured, samples = state.evaluations.evaluate(done)
    state.tracker.samples(done, samples)
    return {f"eval/{name}": value for name, value in measured.items()}


def sample_rollout(
    learner: Learner, order: PromptOrder, prompts: PromptRows, rollout: int
) -> tuple[Prompts, Experience, dict[str, float]]:
    """Sample responses to the next prompts; measure and score them.

    With rl.dynamic_sampling the groups whose rewards are all equal are replaced by responses to the
    prompts that follow, as many draws as it allows. Where too few groups differ even then, the
    first ones that do not fill the rollout.

    Returns: prompts and responses of the rollout, and metrics of all that were drawn.
    """
    cfg, rl, models = learner.cfg, learner.cfg.rl, learner.models
    pad_id = models.tokenizer.pad_token_id
    measuring = replace(models, critic=None) if learner.steps_critic_first else models
    k, wanted = rl.responses_per_prompt, stage_graph.prompts_per_rollout(rl)
    sampling = Sampling(cfg.rollout.temperature, greedy=rl.dschat.greedy)
    numbers: list[int] = []  # row numbers of the prompts that were drawn
    batches, parts = [], []
    useful: list[bool] = []  # of each prompt: whether its rewards differ
    for _ in range(rl.dynamic_sampling or 1):
        batch = order.take(wanted - sum(useful))
        batches.append(prompts_of_rollout(cfg, prompts, batch, rollout, numbers))
        part = make_experience(
            measuring,
            batches[-1],
            sampling,
            cfg.deploy.eval_micro_batch,
            rescore=rollout == 0,
            pad_is_eos=rl.dschat.pad_is_eos,
        )
        numbers += batch
        parts.append(part)
        useful += differ(learner.rewards.total(part.scores), k).tolist()
        if sum(useful) == wanted:
            break
    everything = concatenate(parts, pad_id)
    metrics = drawn_metrics(batches, learner.rewards.total(everything.scores), k)
    if len(parts) == 1:
        return batches[0], everything, metrics
    best = sorted(range(len(useful)), key=lambda group: not useful[group])  # keeps their order
    rows = [group * k + j for group in sorted(best[:wanted]) for j in range(k)]
    return pick_prompts(batches, rows), everything.rows(rows), metrics


def prompts_of_rollout(
    cfg: Config, prompts: PromptRows, batch: Sequence[int], rollout: int, before: Sequence[int]
) -> Prompts:
    """Some prompts of a rollout, each as often as it gets a response, with their random numbers.

    Args: batch: their row numbers.  before: those that were drawn for this rollout already.
    """
    k, times = cfg.rl.responses_per_prompt, Counter(before)
    numbers = []
    for i in batch:
        # response j to prompt i has a number of its own, whatever else is in the rollout
        numbers += [i + (times[i] * k + j) * len(prompts) for j in range(k)]
        times[i] += 1
    random = uniforms("rollout", numbers, cfg.seed, rollout, cfg.rollout.max_new_tokens)
    rows, ids = zip(*(row for row in (prompts[i] for i in batch) for _ in range(k)))
    return Prompts(rows, ids, random, k)


def score_rollout(learner: Learner, state: State, experience: Experience) -> Scored:
    """Scores as they are, as they count, and as the reward of each token."""
    rl, kl = learner.cfg.rl, learner.cfg.rl.kl
    raw = learner.rewards.total(experience.scores)
    score = shape_scores(raw, experience, rl, learner.cfg.rollout.max_new_tokens, state.scale)
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
    say_left_over(prompts, per_rollout, rl.prompt_epochs, rl.max_steps, "prompts")
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
    engine = cfg.rollout.engine
    return Models(tokenizer, actor, ref, rewards, critic, engine=engine, **sampling_choices(cfg))

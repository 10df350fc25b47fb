"""stage=eval: policies side by side, and reward models. Nothing is trained.

Policies: perplexity, scores, KL, responses, win rates, best of n. Reward models: accuracy,
calibration. Everything is in run_dir/eval.json, and as a page in run_dir/report.html.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.base.adapter_files import tokenizer_of
from rlhf.base.errors import UserError
from rlhf.base.log import log
from rlhf.config.choices import Decoding
from rlhf.config.schema import Config
from rlhf.config.stage_graph import policy_labels, verifiers
from rlhf.data import encoding
from rlhf.data.load import open_data
from rlhf.data.records import Dataset, Prompt, Turn
from rlhf.data.template import warn_of_date
from rlhf.distributed import collectives
from rlhf.distributed.engine import build_engine, release_engine
from rlhf.evaluation.best_of import best_of
from rlhf.evaluation.during_training import is_full_distribution
from rlhf.evaluation.judges import judges_of, say_who_does_not_judge
from rlhf.evaluation.pass_rates import check_columns, pass_rates
from rlhf.evaluation.policy import evaluate_policy
from rlhf.evaluation.reward_model import evaluate_reward_model
from rlhf.evaluation.saved_responses import response_lines, write_responses
from rlhf.evaluation.win_rates import Responses, comparing_judges, win_rates
from rlhf.models.loading import check_context, context_length, load_policy, load_tokenizer, location
from rlhf.planning.memory import sampling_choices
from rlhf.reporting import eval_page
from rlhf.reporting.eval_results import (
    BestOfPoint,
    EvalResults,
    PassRate,
    ScorerResults,
    WinRate,
    sample_rows,
    side_by_side,
    summary_metrics,
)
from rlhf.rewards.process import RewardProcess
from rlhf.rewards.trial import running_functions, try_functions
from rlhf.rl.experience import Models
from rlhf.rl.rewards import (
    Rewards,
    build_rewards,
    check_reward_models,
)
from rlhf.runs.checks import read_prompt_lines
from rlhf.sampling.token_choice import Sampling
from rlhf.sampling.vllm import engine_without_server
from rlhf.training.likelihood import perplexity
from rlhf.training.tracker import Tracker

NO_LIMIT = 10**6  # tokens of a prompt


@dataclass
class Setup:
    """What is evaluated, and on what."""

    functions: RewardProcess | None
    paths: dict[str, str]  # the model of each policy, by its label
    against: str | None  # label of the policy that the others are compared with
    scorers: list[str]  # paths of the reward models
    tokenizers: dict[str, PreTrainedTokenizerBase]  # of each policy
    data: Dataset  # its eval_prompts fit all policies
    fixed_prompts: list[Prompt]  # of eval.prompts; they fit all models
    max_fixed_prompt: int  # tokens

    @property
    def first(self) -> str | None:
        """The policy that is evaluated first."""
        return self.against or next(iter(self.paths), None)


@dataclass
class PolicyResults:
    """What was measured of the policies, by their labels."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    responses: dict[str, Responses] = field(default_factory=dict)  # the first one to each prompt
    fixed_responses: dict[str, Responses] = field(default_factory=dict)
    pass_rates: dict[str, list[PassRate]] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)  # for eval.save_responses
    best_of: list[BestOfPoint] = field(default_factory=list)


def run(cfg: Config, run_dir: Path) -> dict[str, float]:
    """Evaluate; write run_dir/eval.json and report.html. Returns the metrics."""
    with running_functions(cfg) as functions:
        return evaluate(cfg, run_dir, functions)


def evaluate(cfg: Config, run_dir: Path, functions: RewardProcess | None) -> dict[str, float]:
    """As `run`. Args: functions: reward functions, which run in a process of their own."""
    # 1. check models and tokenizers; keep the prompts that fit all of them
    setup = prepare(cfg, run_dir, functions)
    say_who_does_not_judge(cfg)
    # 2. load what scores the responses
    rewards = load_judges(cfg, setup, run_dir)
    tracker = Tracker(cfg, run_dir, len(setup.paths) + 1, ["score", "gold", "win_rate"])
    # 3. evaluate the policies one after the other
    policies = evaluate_policies(cfg, setup, rewards, tracker, run_dir)
    # 4. evaluate the reward models
    scorers = evaluate_scorers(cfg, setup, rewards)
    # 5. compare the policies' responses
    judges = judges_of(cfg.eval, setup.data)
    rates: list[WinRate] = []
    if setup.against:
        prompts, comparing = setup.data.eval_prompts, comparing_judges(cfg)
        rates = win_rates(policies.responses, setup.against, judges, prompts, comparing)
    # 6. write everything
    results = EvalResults(
        policies={name: policies.metrics[name] for name in setup.paths},
        against=setup.against,
        judge=cfg.eval.judge or next(iter(judges), None),
        win_rates=rates,
        best_of=policies.best_of,
        best_of_policy=setup.first,
        reward_models=scorers,
        decoding=cfg.eval.decoding.name,
        where=setup.paths,
        answers=side_by_side(policies.responses, list(setup.paths)),
        fixed=side_by_side(policies.fixed_responses, list(setup.paths)),
        samples=cfg.eval.samples,
        pass_rates=[rate for name in setup.paths for rate in policies.pass_rates[name]],
    )
    metrics = summary_metrics(results)
    last_step = len(setup.paths) + 1
    tracker.log(last_step, {key.removeprefix("eval/"): value for key, value in metrics.items()})
    tracker.samples(last_step, sample_rows(results.fixed + results.answers))
    if collectives.rank() == 0:
        if cfg.eval.save_responses:
            lines = [line for name in setup.paths for line in policies.lines[name]]
            write_responses(Path(cfg.eval.save_responses), lines)
        results.write(run_dir / "eval.json")
        title = f"Evaluation: {', '.join(setup.paths or cfg.eval.rewards)}"
        eval_page.write_page(results, run_dir / "report.html", title)
    tracker.close(metrics)
    return metrics


# ---- 1. models, tokenizers, prompts


def prepare(cfg: Config, run_dir: Path, functions: RewardProcess | None) -> Setup:
    """Check all models, and find the prompts that fit all of them. Loads no weights."""
    node, max_prompt, max_new = cfg.eval, cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    check_reward_models(cfg)
    labels = policy_labels(node.policies)
    paths = {name: location_of(cfg, policy) for name, policy in labels.items()}
    scorers = [
        path for name, path in cfg.inputs.items() if name == "rm" or name.startswith("rewards/")
    ]
    models = [*paths.values(), *scorers]
    for path in models:
        check_context(path, max_prompt, cfg.data.max_response_tokens)
        check_context(path, max_prompt, max_new, "rollout.max_new_tokens")
    tokenizers = {name: load_tokenizer(path, cfg.data.template) for name, path in paths.items()}
    for name, path in paths.items():
        warn_of_template(name, path, tokenizers[name], cfg)
    warn_of_date(tokenizers.values())
    data = open_data(cfg, run_dir)
    try_functions(functions, data, next(iter(tokenizers.values()), None))
    check_columns(data.eval_prompts, node.by)
    if node.samples > 1 and not verifiers(cfg):
        log.warning(
            f"eval.samples={node.samples}: no function among eval.rewards checks responses, so "
            "there is no pass@k; the other numbers are means over all responses"
        )
    files = [Path(cfg.inputs[f"prompts/{i}"]) for i in range(len(node.prompts))]
    fixed = [Prompt([Turn("user", line)]) for file in files for line in read_prompt_lines(file)]
    contexts = [context for path in models if (context := context_length(path))]
    max_fixed_prompt = min(contexts, default=NO_LIMIT) - max_new
    held_out = fitting(data.eval_prompts, tokenizers.values(), max_prompt)
    fixed_prompts = fitting(fixed, tokenizers.values(), max_fixed_prompt)
    log.info(
        f"{len(held_out)} of {len(data.eval_prompts)} held-out prompts and {len(fixed_prompts)} of "
        f"{len(fixed)} fixed ones are short enough"
    )
    if paths and not held_out:
        raise UserError(
            f"all held-out prompts are too long (data.max_prompt_tokens={max_prompt}): raise it"
        )
    return Setup(
        functions,
        paths,
        next((name for name, policy in labels.items() if policy == node.against), None),
        scorers,
        tokenizers,
        dataclasses.replace(data, eval_prompts=held_out),
        fixed_prompts,
        max_fixed_prompt,
    )


def location_of(cfg: Config, policy: str) -> str:
    """The path or hub id of the model that an entry of eval.policies names."""
    if policy == "base":
        return cfg.actor.path
    key = f"policies/{cfg.eval.policies.index(policy)}"  # given by path; else a stage's name
    return cfg.inputs.get(key) or cfg.inputs[policy]


def warn_of_template(name: str, path: str, tokenizer: PreTrainedTokenizerBase, cfg: Config) -> None:
    """Warn where the template of all prompts is not the one that a model was saved with."""
    where = location(tokenizer_of(path))
    saved = AutoTokenizer.from_pretrained(where, trust_remote_code=False).chat_template
    if saved and saved != tokenizer.chat_template:
        log.warning(
            f"{name}: prompted with data.template={cfg.data.template.name}; "
            "it was saved with another chat template"
        )


def fitting(
    prompts: Sequence[Prompt], tokenizers: Iterable[PreTrainedTokenizerBase], max_prompt: int
) -> list[Prompt]:
    """The prompts of at most `max_prompt` tokens for all policies: all get the same prompts."""
    turns = [prompt.turns for prompt in prompts]
    encoded = [encoding.encode_prompts(tokenizer, turns, max_prompt) for tokenizer in tokenizers]
    return [prompt for prompt, *ids in zip(prompts, *encoded) if None not in ids]


# ---- 2. judges


def load_judges(cfg: Config, setup: Setup, run_dir: Path) -> Rewards | None:
    """The sources of the score, each of which is a judge, whatever its weight; None without any."""
    if not cfg.eval.rewards:
        return None
    tokenizer = (
        setup.tokenizers[setup.first]
        if setup.first
        else load_tokenizer(setup.scorers[0], cfg.data.template)
    )
    rewards = build_rewards(cfg, setup.data, setup.functions, tokenizer, run_dir)
    if len(rewards.sources) == 1:  # the score is this judge's
        rewards.sources[0].weight = 1.0
    return rewards


# ---- 3. policies


def evaluate_policies(
    cfg: Config, setup: Setup, rewards: Rewards | None, tracker: Tracker, run_dir: Path
) -> PolicyResults:
    """Evaluate one policy after the other.

    The one that the others are compared with comes first and stays loaded, as their reference.
    """
    results = PolicyResults()
    models: Models | None = None
    reference: Models | None = None
    order = sorted(setup.paths, key=lambda name: name != setup.first)
    for step, name in enumerate(order, 1):
        log.info(f"{name}: {setup.paths[name]}")
        if models is not reference:
            release(models)
        models = load_models(cfg, setup, name, rewards, run_dir)
        samples_policy = cfg.eval.decoding == Decoding.sample and is_full_distribution(cfg.eval)
        if reference and samples_policy:  # else responses have no KL
            same_tokens = encoding.same_tokens(models.tokenizer, reference.tokenizer)
            models.ref = reference.actor if same_tokens else None
        evaluate_one(cfg, setup, models, name, results)
        if name == setup.first:
            results.best_of = best_of(models, setup.data, cfg)
        if name == setup.against:
            reference = models
        metrics = results.metrics[name]
        tracker.log(step, {f"{name}/{key}": value for key, value in metrics.items()} | metrics)
    release(models)
    if reference is not models:
        release(reference)
    return results


def load_models(
    cfg: Config, setup: Setup, name: str, rewards: Rewards | None, run_dir: Path
) -> Models:
    """A policy, and what scores its responses."""
    tokenizer = setup.tokenizers[name]
    load = functools.partial(load_policy, setup.paths[name], tokenizer, cfg.deploy.precision)
    return Models(
        tokenizer,
        build_engine(load, cfg, "policy", run_dir),
        rewards=rewards.for_policy(tokenizer) if rewards else None,
        **sampling_choices(cfg),
        engine=engine_without_server(cfg),
    )


def release(models: Models | None) -> None:
    """Release a policy that has been evaluated."""
    if models is not None:
        release_engine(models.actor)
        del models.actor
        models.ref = models.rewards = None
    gc.collect()


def evaluate_one(
    cfg: Config, setup: Setup, models: Models, name: str, results: PolicyResults
) -> None:
    """Metrics and responses of one policy: held-out prompts, perplexity, fixed prompts."""
    node, tokenizer, micro_batch = cfg.eval, models.tokenizer, cfg.deploy.eval_micro_batch
    max_prompt, max_new = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
    sampling = Sampling(
        node.temperature,
        node.top_p,
        node.top_k,
        greedy=node.decoding == Decoding.greedy,
        beams=node.beams if node.decoding == Decoding.beam else 1,
        n=node.samples,
    )
    metrics, responses = evaluate_policy(
        models, setup.data, max_prompt, max_new, sampling, micro_batch
    )
    results.metrics[name], results.responses[name] = metrics, responses[:: node.samples]
    prompts, sources = setup.data.eval_prompts, models.rewards.names if models.rewards else []
    results.pass_rates[name] = pass_rates(name, prompts, responses, verifiers(cfg), node.by)
    if node.save_responses:
        results.lines[name] = response_lines(name, prompts, responses, sources, "held-out")
    demonstrations = encoding.encode_demonstrations(
        tokenizer, setup.data.eval_sft, max_prompt, cfg.data.max_response_tokens
    )
    if demonstrations:
        metrics["perplexity"] = perplexity(
            models.actor, demonstrations, tokenizer.pad_token_id, micro_batch
        )
    if setup.fixed_prompts:
        fixed = dataclasses.replace(
            setup.data, eval_prompts=setup.fixed_prompts, gold=None, best_gold=None
        )
        one_each = dataclasses.replace(sampling, n=1)
        scored = scored_by_models(models)
        _, responses = evaluate_policy(
            scored, fixed, setup.max_fixed_prompt, max_new, one_each, micro_batch
        )
        results.fixed_responses[name] = responses
        if node.save_responses:
            sources = scored.rewards.names if scored.rewards else []
            results.lines[name] += response_lines(
                name, setup.fixed_prompts, responses, sources, "fixed"
            )


def scored_by_models(models: Models) -> Models:
    """The same without python functions, which may know only the prompts of the data."""
    sources = (
        [source for source in models.rewards.sources if source.engine] if models.rewards else []
    )
    rewards = Rewards(sources, models.tokenizer) if sources else None
    return dataclasses.replace(models, rewards=rewards)


# ---- 4. reward models


def evaluate_scorers(
    cfg: Config, setup: Setup, rewards: Rewards | None
) -> dict[str, ScorerResults]:
    """The reward models among the sources, on held-out pairs; those that can read any."""
    results = {}
    for source in rewards.sources if rewards else []:
        if source.engine and (scorer := evaluate_reward_model(source, setup.data, cfg)):
            results[source.name] = scorer
    return results

"""The score of a response: a weighted sum of reward models and reward functions.

Reward models are loaded and asked here; functions run in a process of their own (rlhf/rewards).
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.errors import UserError
from rlhf.base.log import log, plural
from rlhf.config.choices import Template
from rlhf.config.schema import Config
from rlhf.config.stage_graph import is_rl, node_name, parent_stages, score_sources
from rlhf.data import encoding, template
from rlhf.data.batches import map_across_ranks, pad_right
from rlhf.data.records import Dataset, Prompt, Turn
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, build_engine
from rlhf.models.loading import (
    check_context,
    context_length,
    is_reward_model,
    load_scorer,
    load_tokenizer,
)
from rlhf.models.wrappers import Scorer, sequence_scores
from rlhf.rewards.batch import make_batch
from rlhf.rewards.process import RewardProcess
from rlhf.rl.experience import Experience, Prompts

NO_LIMIT = 10**9  # tokens
SMALLEST_UNIT = 1e-6  # a smaller deviation of scores is their rounding


@dataclass
class Source:
    """One part of the score: a reward model, or a function of Rewards.functions."""

    name: str
    weight: float = 1.0
    engine: Engine[Scorer] | None = None  # None for a function
    tokenizer: PreTrainedTokenizerBase | None = None  # the reward model's own
    # its tokenizer or template is not the policy's, so responses are tokenized again
    reads_text: bool = False


@dataclass
class Rewards:
    """All sources. Each one's scores are logged; the policy is trained on their weighted sum."""

    sources: list[Source]
    tokenizer: PreTrainedTokenizerBase  # the policy's
    functions: RewardProcess | None = None
    progress: tuple[int, int] = (0, 1)  # rollouts that are done, and of all; functions may ask

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum over the sources that apply.

        Args: scores (..., sources), NaN where a source does not apply.
        Returns: (...), NaN where no source with a weight applies.
        """
        weights = torch.tensor([source.weight for source in self.sources], device=scores.device)
        missing = scores.isnan()
        total = scores.masked_fill(missing, 0.0) @ weights
        counts = weights != 0 if weights.any() else torch.ones_like(weights, dtype=torch.bool)
        return total.masked_fill((missing | ~counts).all(-1), math.nan)

    def for_policy(self, tokenizer: PreTrainedTokenizerBase) -> Rewards:
        """The same sources for the responses of a policy with this tokenizer."""
        sources = [
            replace(s, reads_text=needs_text(tokenizer, s.tokenizer)) if s.tokenizer else s
            for s in self.sources
        ]
        return replace(self, sources=sources, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(self, part: Experience, prompts: Sequence[Prompt]) -> Tensor:
        """Scores of the reward models for the responses of some rows, (b, sources).

        Args: prompts: of these rows.
        Returns: NaN in the columns of functions, which `add_functions` fills in.
        """
        texts = []
        if any(source.reads_text for source in self.sources):
            texts = [part.text(i, self.tokenizer) for i in range(len(prompts))]
        turns = [prompt.turns for prompt in prompts]
        unknown = part.response_mask.new_full((len(prompts),), math.nan)
        scores = [
            self.model_scores(source, part, turns, texts) if source.engine else unknown
            for source in self.sources
        ]
        return torch.stack(scores, 1)

    def add_functions(self, experience: Experience, prompts: Prompts) -> None:
        """Fill in the scores of functions, (B, sources), and which of them are errors.

        Each rank calls them on some of the prompts; all responses to a prompt are in one call. A
        score is NaN where the function gave None.

        Raises: UserError as `RewardProcess.score`.
        """
        if self.functions is None:
            return
        rank, world = collectives.rank(), collectives.world_size()
        k = prompts.per_prompt
        groups = [range(i, i + k) for i in range(0, len(prompts.rows), k)]
        rows = [row for group in groups[rank::world] for row in group]
        scores = torch.zeros(2, len(prompts.rows), len(self.sources), dtype=torch.float64)
        if rows:
            done, of_all = self.progress
            batch = make_batch(
                [prompts.rows[row] for row in rows],
                [experience.text(row, self.tokenizer) for row in rows],
                [experience.tokens(row) for row in rows],
                {"global_step": done, "max_steps": of_all},
                k,
                self.functions.columns,
            )
            for name, result in self.functions.score(batch).items():
                column = self.names.index(name)
                values = [math.nan if value is None else value for value in result.scores]
                scores[0, rows, column] = torch.tensor(values, dtype=torch.float64)
                scores[1, rows, column] = torch.tensor(result.failed, dtype=torch.float64)
        device = experience.scores.device
        collectives.barrier()  # functions of one rank may take longer than a collective waits
        total = collectives.all_reduce_sum(scores.flatten().tolist(), device)
        values, errors = torch.tensor(total, device=device).view(scores.shape).float()
        columns = [i for i, source in enumerate(self.sources) if source.engine is None]
        experience.scores[:, columns] = values[:, columns]
        experience.reward_errors = errors

    def model_scores(
        self, source: Source, part: Experience, turns: Sequence[list[Turn]], texts: Sequence[str]
    ) -> Tensor:
        """Scores of a reward model, (b,), in host memory."""
        assert source.engine is not None
        if not source.reads_text:
            eos_id = self.tokenizer.eos_token_id
            return sequence_scores(source.engine, part.ids, part.full_mask, eos_id).cpu()
        assert source.tokenizer is not None
        finished = [bool(value) for value in part.finished]
        rows = [retokenize(source, *row) for row in zip(turns, texts, finished)]
        # any id will do behind the mask; the policy's pad id may not exist here
        ids, mask = pad_right(rows, 0)
        return sequence_scores(source.engine, ids, mask, source.tokenizer.eos_token_id).cpu()


def needs_text(policy_tokenizer: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase) -> bool:
    """Whether a reward model must read text: its tokenizer differs from the policy's, or its
    template writes something after the EOS, where its score is read."""
    return bool(template.after_eos(own)) or not encoding.same_tokens(policy_tokenizer, own)


def retokenize(source: Source, turns: list[Turn], response: str, finished: bool) -> list[int]:
    """Prompt and response as token ids of a reward model with a tokenizer and template of its own.

    What is too long for it loses its beginning. Raises: UserError for a prompt that its template
    cannot write.
    """
    assert source.engine is not None
    try:
        prompt = encoding.encode_prompts(source.tokenizer, [turns], NO_LIMIT)[0]
    except UserError as problem:
        raise UserError(
            f"the reward model {source.name} is asked in its own chat template: {problem}"
        ) from None
    if prompt is None:
        raise UserError(
            f"the reward model {source.name} is asked in its own chat template, which cannot write "
            "the tools of a prompt: leave such rows out, or take another reward model"
        )
    ids = encoding.encode_response(source.tokenizer, response, finished)
    return encoding.to_end(source.tokenizer, prompt, ids)[-readable_tokens(source.engine) :]


def readable_tokens(engine: Engine[Scorer]) -> int:
    """Tokens that a reward model can read at once."""
    return context_length(engine.module.hf.config) or NO_LIMIT


# ------------------------------------------------------------------------------------ building


def check_reward_models(cfg: Config) -> None:
    """Check that every model among the sources has a head that gives scores. Loads no weights.

    Raises: UserError naming the key.
    """
    for name, path in cfg.inputs.items():
        if (name == "rm" or name.startswith("rewards/")) and not is_reward_model(path):
            part = "reward" if name == "rm" else f"{name.replace('/', '.')}.path"
            node = node_name(cfg.stage.name)
            raise UserError(
                f"{node}.{part}={path}: no reward model (*ForSequenceClassification), it "
                "has no head that gives scores; give one that has"
            )


def build_rewards(
    cfg: Config,
    data: Dataset,
    functions: RewardProcess | None,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: Path,
) -> Rewards:
    """Load the reward models of all sources, with the unit of their scores.

    With normalize_score the unit is the one that stage=rm has stored in a model; where a model
    comes from elsewhere, it is measured here on held-out demonstrations. Else scores are raw.

    Raises: UserError for a model that cannot read the responses, or without demonstrations to
        measure on.
    """
    sources = []
    for name, source in score_sources(cfg, cfg.stage.name).items():
        if functions and name in functions.specs:
            sources.append(Source(name, source.weight))
            continue
        path = cfg.inputs[f"rewards/{name}" if source.path else "rm"]
        key = f"{node_name(cfg.stage.name)}.rewards.{name}"
        given = source.path or parent_stages(cfg, cfg.stage.name).get("rm")
        own = reward_tokenizer(path, cfg.data.template, key) if given else None
        own = own or load_tokenizer(path, cfg.data.template)
        foreign = needs_text(tokenizer, own)
        if foreign:
            log.info(
                f"{key}: the reward model has another tokenizer or template than the policy, so it "
                "reads responses as text"
            )
        else:
            max_prompt, max_new = cfg.data.max_prompt_tokens, cfg.rollout.max_new_tokens
            check_context(path, max_prompt, max_new, "rollout.max_new_tokens")
        load = functools.partial(load_scorer, path, own, cfg.deploy.precision)
        engine = build_engine(load, cfg, "reward", run_dir)
        set_unit(engine, cfg, data, own, key)
        sources.append(Source(name, source.weight, engine, own, foreign))
        if foreign:  # what its template cannot write is said before training
            for prompt in data.eval_prompts:
                retokenize(sources[-1], prompt.turns, "", True)
    return Rewards(sources, tokenizer, functions)


def reward_tokenizer(path: str, style: Template, key: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a reward model from elsewhere, with its own chat template.

    Returns: None where it has none, or one that cannot be used; the run says so.
    """
    try:
        tokenizer = load_tokenizer(path, Template.tokenizer)
    except UserError as problem:
        log.info(f"{key}: asked in data.template={style.name}, not in its own ({problem})")
        return None
    log.info(f"{key}: the reward model is asked in its own chat template")
    return tokenizer


def set_unit(
    engine: Engine[Scorer],
    cfg: Config,
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
) -> None:
    """Set the unit of a reward model's scores. Raises: UserError without rows to measure on."""
    node = cfg.rl if is_rl(cfg.stage.name) else cfg.eval
    settings = engine.module.hf.config
    if not node.normalize_score:
        settings.score_mean, settings.score_std = 0.0, 1.0
        return
    if hasattr(settings, "score_std"):
        return
    limits = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    encoded = encoding.encode_demonstrations(tokenizer, data.score_unit, *limits)
    if not encoded:
        name = node_name(cfg.stage.name)
        raise UserError(
            f"{name}.normalize_score=true: there are no held-out demonstrations to measure {key} "
            "on; set it to false"
        )
    whole = [encoding.to_end(tokenizer, *row) for row in encoded]
    rows = [ids[-readable_tokens(engine) :] for ids in whole]
    mean, std = score_mean_std(engine, rows, tokenizer, cfg.deploy.eval_micro_batch)
    store_unit(engine, mean, std, key)
    unit = f"mean {mean:.3g}, standard deviation {std:.3g}"
    log.info(f"{key}: raw scores of {plural(len(rows), 'held-out demonstration')}: {unit}")


def store_unit(engine: Engine[Scorer], mean: float, std: float, name: str) -> None:
    """Normalise the scores of a reward model from now on: (raw - mean) / std.

    Where all measured scores are equal, as that of one response is, there is no such unit.
    """
    if std < SMALLEST_UNIT:
        log.warning(
            f"{name}: the scores of the responses that their unit is measured on are all equal, so "
            "they stay in the model's own unit: hold out more responses (data.eval_share)"
        )
        mean, std = 0.0, 1.0
    settings = engine.module.hf.config
    settings.score_mean, settings.score_std = mean, std


@torch.no_grad()
def score_rows(
    engine: Engine[Scorer],
    rows: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    micro_batch: int,
) -> list[float]:
    """The score of each sequence of token ids, in order; the ranks share the work.

    Raises: UserError where one is not finite.
    """

    def scores_of(index: Sequence[int]) -> Tensor:
        ids, mask = pad_right([rows[i] for i in index], tokenizer.pad_token_id)
        return sequence_scores(engine, ids, mask, tokenizer.eos_token_id)

    scores = map_across_ranks([len(row) for row in rows], micro_batch, scores_of)
    check_finite("the reward model", scores)
    return scores.tolist()


def check_finite(name: str, scores: Tensor) -> None:
    """Raises: UserError where a reward model gives scores that are not finite."""
    if broken := int((~scores.isfinite()).sum()):
        raise UserError(
            f"{name}: {broken:,} of {scores.numel():,} scores are not finite: its weights are "
            "damaged, or deploy.precision has too small a range for it: use fp32 or bf16"
        )


def score_mean_std(
    engine: Engine[Scorer],
    rows: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    micro_batch: int,
) -> tuple[float, float]:
    """Mean and standard deviation of a reward model's raw scores over given responses.

    In this unit they have mean 0 and deviation 1 (Stiennon 2020, arXiv:2009.01325; InstructGPT,
    arXiv:2203.02155, section 3.5).
    """
    scores = score_rows(engine, rows, tokenizer, micro_batch)
    return statistics.fmean(scores), statistics.pstdev(scores)

"""The score of an answer: a weighted sum of reward models and python functions."""

from __future__ import annotations

import functools
import importlib
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import Config
from rlhf.config.stage_graph import stage_config
from rlhf.data import template
from rlhf.data.batches import map_across_ranks, pad_right
from rlhf.data.records import Dataset, Turn
from rlhf.distributed.engine import build_engine
from rlhf.models.loading import (
    check_context,
    context_length,
    is_reward_model,
    load_scorer,
    load_tokenizer,
)
from rlhf.models.wrappers import answer_scores
from rlhf.rl.experience import Experience
from rlhf.runs.log import log

Function = Callable[[list[Turn], str], float]


@dataclass
class Source:
    """One part of the score: a reward model or a function of the prompt's turns and the answer's text."""

    name: str
    weight: float = 1.0
    engine: Any = None
    tokenizer: Any = None  # the reward model's own
    as_text: bool = False  # it has another tokenizer than the policy, and reads the answer as text
    function: Function | None = None


@dataclass
class Rewards:
    """All sources. Their scores are logged one by one; what is learnt is their weighted sum."""

    sources: list[Source]
    tokenizer: Any  # the policy's

    @property
    def names(self) -> list[str]:
        return [source.name for source in self.sources]

    def total(self, scores: Tensor) -> Tensor:
        """The weighted sum. Args: scores (..., sources). Returns: (...)."""
        return scores @ torch.tensor(
            [source.weight for source in self.sources], device=scores.device
        )

    def for_policy(self, tokenizer: Any) -> Rewards:
        """The same sources for the answers of a policy with this tokenizer."""
        return Rewards(
            [
                replace(
                    s, as_text=bool(s.engine) and not template.same_tokens(tokenizer, s.tokenizer)
                )
                for s in self.sources
            ],
            tokenizer,
        )

    @torch.no_grad()
    def __call__(self, part: Experience, turns: Sequence[list[Turn]]) -> Tensor:
        """Scores of the answers of some rows, (B, sources). Args: turns: the prompts of these rows.
        Raises: RuntimeError where a function fails, or returns no finite number."""
        in_text = any(source.function or source.as_text for source in self.sources)
        answers = [part.text(i, self.tokenizer) for i in range(len(turns))] if in_text else []
        columns = []
        for source in self.sources:
            if source.function:
                scores = [self.ask(source, *row) for row in zip(turns, answers)]
                columns.append(torch.tensor(scores, dtype=torch.float32, device=part.mask.device))
                continue
            ids, mask = part.ids, part.full_mask
            if source.as_text:
                rows = [retokenize(source, *row) for row in zip(turns, answers, part.ended)]
                ids, mask = pad_right(
                    rows, 0, source.engine.device
                )  # any id will do behind a mask; the policy's may not exist here
            eos_id = (source.tokenizer if source.as_text else self.tokenizer).eos_token_id
            columns.append(answer_scores(source.engine, ids, mask, eos_id))
        return torch.stack(columns, 1)

    def ask(self, source: Source, turns: list[Turn], answer: str) -> float:
        assert source.function
        try:
            value = float(source.function(turns, answer))
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"rewards.{source.name}: the function failed on the answer {answer[:80]!r}: {what}"
            ) from error
        if not math.isfinite(value):
            raise RuntimeError(
                f"rewards.{source.name}: the function returned {value} for the answer {answer[:80]!r}"
            )
        return value


def retokenize(source: Source, turns: list[Turn], answer: str, ended: Any) -> list[int]:
    """What a reward model with a tokenizer of its own reads: prompt and answer in its own template. What is too long for it loses
    its beginning."""
    ids = template.encode_prompts(source.tokenizer, [turns], 10**9)[0] or []
    ids = ids + template.encode_response(source.tokenizer, answer, bool(ended))
    return ids[-(context_length(source.engine.module.hf.config) or len(ids)) :]


# --------------------------------------------------------------------------------------------------------------------- building


def check_reward_models(cfg: Config) -> None:
    """Raises: ValueError naming the key where a source of the score is no reward model. Loads no weights."""
    for name, path in cfg.inputs.items():
        if (name == "rm" or name.startswith("rewards/")) and not is_reward_model(path):
            key = (
                f"{cfg.stage.name}.reward"
                if name == "rm"
                else f"{cfg.stage.name}.{name.replace('/', '.')}.path"
            )
            raise ValueError(
                f"{key}: {path} is no reward model (*ForSequenceClassification): it has no head that gives scores"
            )


def load_functions(cfg: Config) -> dict[str, Function]:
    """The python functions among the sources, by the sources' names; before a model is loaded. Raises: ValueError naming the key."""
    sys.path.insert(0, os.getcwd())  # where the command is run; a function may lie there
    found: dict[str, Any] = {}
    for name, source in stage_config(cfg).rewards.items():
        if source.function:
            key = f"{cfg.stage.name}.rewards.{name}.function={source.function}"
            module, function = source.function.split(":")
            try:
                found[name] = getattr(importlib.import_module(module), function, None)
            except Exception as error:
                raise ValueError(
                    f"{key}: cannot import {module}: {type(error).__name__}: {error}"
                ) from error
            if found[name] is None:
                raise ValueError(f"{key}: there is no {function} in {module}")
            if not callable(found[name]):
                raise ValueError(f"{key}: {function} is no function")
    return found


def build_rewards(
    cfg: Config, data: Dataset, functions: dict[str, Function], tokenizer: Any, run_dir: Path
) -> Rewards:
    """Load the reward models of all sources, and settle the unit of their scores: with `normalize_score` that which stage=rm
    has stored in a model, or, where a model comes from elsewhere, the one measured here on SFT answers; else raw.
    Raises: ValueError for a model that cannot read the answers, or without SFT answers to measure on."""
    sources = []
    node = stage_config(cfg)
    for name, source in node.rewards.items():
        key = f"{cfg.stage.name}.rewards.{name}"
        if source.function:
            sources.append(Source(name, source.weight, function=functions[name]))
            continue
        path = cfg.inputs[f"rewards/{name}" if source.path else "rm"]
        own = load_tokenizer(path, cfg.data.template)
        foreign = not template.same_tokens(tokenizer, own)
        if foreign:
            log.info(f"{key}: the reward model has another tokenizer, it reads the answers as text")
        else:
            check_context(
                path,
                cfg.data.max_prompt_tokens,
                cfg.rollout.max_new_tokens,
                "rollout.max_new_tokens",
            )
        engine = build_engine(
            functools.partial(load_scorer, path, own, cfg.deploy.precision), cfg, "reward", run_dir
        )
        settings = engine.module.hf.config
        if not node.normalize_score:
            settings.score_mean, settings.score_std = 0.0, 1.0
        elif not hasattr(settings, "score_std"):
            rows = template.encode_demonstrations(
                own, data.eval_sft, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
            )
            if not rows:
                switch = f"{cfg.stage.name}.normalize_score"
                raise ValueError(
                    f"{switch}=true: there are no SFT answers to measure {key} on; set it to false"
                )
            mean, std = score_mean_std(
                engine,
                [(p + a)[-(context_length(settings) or 10**9) :] for p, a in rows],
                own,
                cfg.deploy.eval_micro_batch,
            )
            settings.score_mean, settings.score_std = mean, max(std, 1e-6)
            log.info(
                f"{key}: raw scores of {len(rows)} SFT answers: mean {mean:.3g}, standard deviation {std:.3g}"
            )
        sources.append(Source(name, source.weight, engine, own, foreign))
    return Rewards(sources, tokenizer)


@torch.no_grad()
def score_rows(
    engine: Any, rows: Sequence[list[int]], tokenizer: Any, micro_batch: int
) -> list[float]:
    """The score of each whole sequence of token ids, in order; the work is shared by all processes."""

    def work(some: Sequence[int]) -> Tensor:
        ids, mask = pad_right([rows[i] for i in some], tokenizer.pad_token_id, engine.device)
        return answer_scores(engine, ids, mask, tokenizer.eos_token_id)

    return map_across_ranks([len(row) for row in rows], micro_batch, work).tolist()


def score_mean_std(
    engine: Any, rows: Sequence[list[int]], tokenizer: Any, micro_batch: int
) -> tuple[float, float]:
    """Mean and standard deviation of a reward model's raw scores over given answers: with them as unit those have mean 0 and
    deviation 1 (Stiennon 2020, arXiv:2009.01325; InstructGPT, arXiv:2203.02155, section 3.5)."""
    scores = score_rows(engine, rows, tokenizer, micro_batch)
    return statistics.fmean(scores), statistics.pstdev(scores)

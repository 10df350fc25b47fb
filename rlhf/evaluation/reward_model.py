"""Evaluate a reward model on preference pairs: accuracy, by source and length, and calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.base.log import log
from rlhf.config.schema import Config
from rlhf.data import encoding
from rlhf.data.records import Dataset, Pair
from rlhf.distributed.engine import Engine
from rlhf.models.wrappers import Scorer
from rlhf.reporting.eval_results import CalibrationBin, ScorerResults
from rlhf.rl.rewards import Source, score_rows

# by how much chosen is longer than rejected, as a share of the longer one, in tokens
LENGTHS = [
    ("chosen much shorter", -1.0, -0.5),
    ("chosen shorter", -0.5, -0.1),
    ("alike (within 10 %)", -0.1, 0.1),
    ("chosen longer", 0.1, 0.5),
    ("chosen much longer", 0.5, 1.0),
]
BINS = 10  # of the reliability table


def evaluate_reward_model(source: Source, data: Dataset, cfg: Config) -> ScorerResults | None:
    """A reward model on the held-out pairs whose prompts it can read; None without any pair.

    Margins are in the unit that the model was trained in.
    """
    assert source.engine is not None and source.tokenizer is not None
    tokenizer = source.tokenizer
    max_prompt, max_response = cfg.data.max_prompt_tokens, cfg.data.max_response_tokens
    fits = encoding.encode_prompts(tokenizer, [pair.prompt for pair in data.eval_rm], max_prompt)
    pairs = [pair for pair, ids in zip(data.eval_rm, fits) if ids is not None]
    if not pairs:
        log.warning(
            f"{source.name}: not evaluated, no held-out pair has a prompt that is short enough "
            f"(data.max_prompt_tokens={max_prompt})"
        )
        return None
    chosen, rejected = score_pairs(
        source.engine, tokenizer, pairs, max_prompt, max_response, cfg.deploy.eval_micro_batch
    )
    margins = (chosen - rejected) * getattr(source.engine.module.hf.config, "score_std", 1.0)
    lengths = [
        length_group(len(c), len(r))
        for _, c, r in encoding.encode_pairs(tokenizer, pairs, max_prompt, max_response)
    ]
    by_length = accuracy_by(lengths, chosen, rejected)
    ece, bins = calibration(margins)
    return ScorerResults(
        pairs=len(pairs),
        accuracy=pairwise_accuracy(chosen, rejected),
        ece=ece,
        reliability=bins,
        by_source=accuracy_by([pair.source for pair in pairs], chosen, rejected),
        by_length={name: by_length[name] for name, *_ in LENGTHS if name in by_length},
        margins=[round(x, 4) for x in margins.tolist()],
        accuracy_gold=accuracy_gold(pairs, chosen, rejected),
    )


def score_pairs(
    scorer: Engine[Scorer],
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    max_prompt: int,
    max_response: int,
    micro_batch: int,
) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected responses, (B,) each, float64; the ranks share the work.

    Args: scorer: its scores are in its own unit.  pairs: none with too long a prompt.
        max_prompt, max_response: tokens.
    """
    encoded = encoding.encode_pairs(tokenizer, pairs, max_prompt, max_response)
    sequences = [
        encoding.to_end(tokenizer, prompt, response)
        for prompt, *both in encoded
        for response in both
    ]
    scores = score_rows(scorer, sequences, tokenizer, micro_batch)
    chosen, rejected = scores[::2], scores[1::2]
    return torch.tensor(chosen, dtype=torch.float64), torch.tensor(rejected, dtype=torch.float64)


def pairwise_accuracy(chosen: Tensor, rejected: Tensor) -> float:
    """Share of pairs whose chosen response scores higher; a tie counts half. Shapes (B,)."""
    return float(((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean())


def accuracy_gold(pairs: Sequence[Pair], chosen: Tensor, rejected: Tensor) -> float | None:
    """Share of pairs in the order of the gold reward, whatever their labels are. Shapes (B,).

    None where the gold reward of a pair is not known.
    """
    if any(pair.gold_margin is None for pair in pairs):
        return None
    signs = torch.tensor([pair.gold_margin or 0.0 for pair in pairs]).sign()
    return pairwise_accuracy((chosen - rejected) * signs, torch.zeros(len(pairs)))


def accuracy_by(
    groups: Sequence[str], chosen: Tensor, rejected: Tensor
) -> dict[str, tuple[int, float]]:
    """Number of pairs and accuracy of each group, in order of appearance.

    Args: groups: one name per pair.  chosen, rejected (B,): scores.
    """
    members = {
        name: torch.tensor([i for i, group in enumerate(groups) if group == name])
        for name in dict.fromkeys(groups)
    }
    return {
        name: (len(index), pairwise_accuracy(chosen[index], rejected[index]))
        for name, index in members.items()
    }


def length_group(chosen: int, rejected: int) -> str:
    """The group in LENGTHS of two responses. Args: their numbers of tokens."""
    longer_by = (chosen - rejected) / max(chosen, rejected, 1)
    return next(
        name for name, low, high in LENGTHS if low <= longer_by < high or longer_by == high == 1.0
    )


def calibration(margins: Tensor) -> tuple[float, list[CalibrationBin]]:
    """Whether the accuracy of a reward model equals its confidence.

    Its confidence is the Bradley-Terry probability of the response that it prefers,
    sigmoid(|margin|).

    Args: margins (B,): raw score of chosen minus that of rejected, in the unit of training.
    Returns: the expected calibration error, the sum over bins of (share of the pairs) x |accuracy -
    mean confidence| (Guo 2017, arXiv:1706.04599, eq. 3); and the bins of equal width from 0.5 to 1
    that are not empty.
    """
    confidence = torch.sigmoid(margins.double().abs())
    correct = (margins > 0).double() + 0.5 * (margins == 0).double()
    bin_of = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    bins, error = [], 0.0
    for i in range(BINS):
        members = bin_of == i
        if members.any():
            pairs = int(members.sum())
            mean, accuracy = float(confidence[members].mean()), float(correct[members].mean())
            error += pairs / len(margins) * abs(accuracy - mean)
            low, high = 0.5 + i / (2 * BINS), 0.5 + (i + 1) / (2 * BINS)
            bins.append(CalibrationBin(low, high, pairs, mean, accuracy))
    return error, bins

"""What the tests of chat.py share: saved models, conversations, and models that say given words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.chat.conversation import Conversation
from rlhf.chat.models import load_model
from rlhf.chat.policy import Params, Policy
from rlhf.config.choices import Precision, Template
from rlhf.models.loading import load_policy, load_scorer, load_tokenizer

UNIT = (0.25, 2.0)  # mean and deviation of the reward model's scores


def save_policy(directory: Path, seed: int, style: Template = Template.hh) -> Path:
    """A policy with random weights, as a run saves it."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("builtin:tiny", style)
    load_policy("builtin:tiny", tokenizer, Precision.fp32).hf.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_reward(
    directory: Path, tokenizer: PreTrainedTokenizerBase, **settings: float | bool
) -> Path:
    """A reward model with random weights and a tokenizer."""
    torch.manual_seed(5)
    hf = load_scorer("builtin:tiny", tokenizer, Precision.fp32).hf
    hf.config.update(settings)
    hf.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


Chat = Callable[..., tuple[str, str]]


def policy(path: Path) -> Policy:
    return Policy(*load_model(str(path), "cpu"), str(path))


def conversation(*paths: Path, max_new_tokens: int = 8) -> Conversation:
    return Conversation(
        [policy(path) for path in paths], Params(max_new_tokens=max_new_tokens, seed=7)
    )


def quiet(i: int, piece: str) -> None:
    pass


def generates(sampled: list[int], interrupt: bool = False) -> Callable[..., None]:
    """A model's generate that samples given tokens."""

    def generate(prompt: Any, stopping_criteria: list[Any], **_: Any) -> None:
        for n in range(len(sampled)):
            sequence = torch.cat([prompt, torch.tensor([sampled[: n + 1]])], 1)
            if stopping_criteria[0](sequence, None).item():
                return
        if interrupt:
            raise KeyboardInterrupt

    return generate

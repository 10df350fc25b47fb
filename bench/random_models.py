"""Engines with random weights of a model's shape, and rollouts of them, for bench/gpu.py.

No weights are read or written. Prompts and responses are random too; no response ends early.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config.schema import Arch, Config
from rlhf.data.batches import pad_left
from rlhf.data.records import Prompt, Turn
from rlhf.distributed.engine import build_engine
from rlhf.models import lora
from rlhf.models.loading import DTYPES, load_tokenizer
from rlhf.models.wrappers import Policy, Scorer
from rlhf.planning.shapes import arch_of
from rlhf.rl.experience import Experience, Models, Prompts, make_experience
from rlhf.rl.guards import Guards
from rlhf.rl.learner import Learner
from rlhf.rl.rewards import Rewards, Source
from rlhf.sampling.batches import PromptBatch
from rlhf.sampling.token_choice import Sampling

# the sizes that are tried on a CPU, for the code's sake
TINY = [
    "deploy=cpu",
    "deploy.threads=1",
    "deploy.micro_batch=2",
    "deploy.eval_micro_batch=4",
    "data.max_prompt_tokens=8",
    "data.max_response_tokens=6",
    "rollout.max_new_tokens=6",
    "rl.batch_size=8",
    "rl.minibatches=1",
    "actor.lora.rank=2",
]
FIRST = 0.02  # of the probabilities; EOS, one of the first ids, is within it and never drawn


def settings(device: str, overrides: Sequence[str]) -> Config:
    """PPO on one GPU with OPT-1.3B and its recipe; on a CPU tiny. Args: overrides: KEY=VALUE."""
    from rlhf import compose

    base = TINY if device == "cpu" else ["actor=opt1.3b", "deploy=single_gpu"]
    compose.register()
    given = ["stage=ppo", *base, "rl.epochs=1", *overrides]
    cfg = compose.typed_config(compose.compose_alone(given, []))
    cfg.rl.lr = cfg.rl.critic.lr = 0.0  # the same update can be measured again
    return cfg


@dataclass
class Bench:
    """What all measurements share."""

    cfg: Config
    device: torch.device
    folder: Path  # for DeepSpeed's configurations

    @property
    def is_tiny(self) -> bool:
        return self.device.type == "cpu"

    @cached_property
    def tokenizer(self) -> Any:
        """That of the built-in model, of which only the special tokens are used."""
        return load_tokenizer("builtin:tiny")

    @cached_property
    def arch(self) -> Arch:
        return self.shape_of("actor")

    def shape_of(self, name: str) -> Arch:
        """The shape of cfg.actor or cfg.reward; it is one of OPT's."""
        model = getattr(self.cfg, name)
        arch = arch_of(model.path, model.arch)
        if arch is None or arch.family != "opt":
            raise SystemExit(f"{name}: only shapes of OPT are measured")
        return arch

    def hf(self, arch: Arch, is_scorer: bool = False) -> Any:
        """A model of transformers on the device, in the precision of the configuration."""
        from transformers import (
            AutoModelForCausalLM,
            AutoModelForSequenceClassification,
            OPTConfig,
        )

        config = OPTConfig(
            hidden_size=arch.hidden,
            word_embed_proj_dim=arch.embed or arch.hidden,
            do_layer_norm_before=arch.embed is None,
            num_hidden_layers=arch.layers,
            num_attention_heads=arch.heads,
            ffn_dim=arch.ffn,
            vocab_size=arch.vocab,
            max_position_embeddings=arch.positions,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            num_labels=1,
        )
        kind = AutoModelForSequenceClassification if is_scorer else AutoModelForCausalLM
        with torch.device(self.device):
            return kind.from_config(config, dtype=DTYPES[self.cfg.deploy.precision])

    def policy(self, with_adapter: bool = False) -> Policy:
        policy = Policy(self.hf(self.arch))
        if with_adapter and self.cfg.actor.lora.rank:
            lora.add_adapter(policy.hf, self.cfg.actor.lora, "actor.lora")
        return policy

    def scorer(self, with_adapter: bool = False) -> Scorer:
        scorer = Scorer(self.hf(self.shape_of("reward"), is_scorer=True))
        if with_adapter and self.cfg.reward.lora.rank:
            lora.add_adapter(scorer.hf, self.cfg.reward.lora, "reward.lora")
        return scorer

    def actor_engine(self, with_adapter: bool = True) -> Any:
        """The actor, ready to be trained."""
        return build_engine(partial(self.policy, with_adapter), self.cfg, "actor", self.folder)

    def learner(self) -> Learner:
        """All models of PPO, as rlhf/stages/rl.py builds them from files."""
        cfg = self.cfg
        actor = self.actor_engine()
        if cfg.actor.lora.rank and not cfg.actor.lora.embeddings:
            ref: Any = lora.AdapterOff(actor)
        else:
            ref = build_engine(self.policy, cfg, "ref", self.folder)
        reward = build_engine(self.scorer, cfg, "reward", self.folder)
        critic = build_engine(lambda: self.scorer(True), cfg, "critic", self.folder)
        for engine in (actor, critic):
            engine.eval()
        rewards = Rewards([Source("model", 1.0, reward)], self.tokenizer)
        models = Models(self.tokenizer, actor, ref, rewards, critic)
        guards = Guards(cfg.deploy.precision, cfg.rl.dschat, cfg.rollout.temperature)
        return Learner(cfg, models, guards, rollouts=100)

    # ------------------------------------------------------------------------------- inputs

    def prompts(self, rows: int, new: int | None = None, shortest: float = 1.0) -> Prompts:
        """Random prompts with the random numbers for their responses.

        Args: new: tokens of a response; default: rollout.max_new_tokens.  shortest: length of the
            shortest prompt, as a share of data.max_prompt_tokens.
        """
        generator = torch.Generator().manual_seed(0)
        longest = self.cfg.data.max_prompt_tokens
        least = max(1, int(shortest * longest))
        lengths = torch.randint(least, longest + 1, (rows,), generator=generator).tolist()
        ids = [
            torch.randint(5, self.arch.vocab, (length,), generator=generator).tolist()
            for length in lengths
        ]
        noise = torch.rand(
            rows,
            new or self.cfg.rollout.max_new_tokens,
            dtype=torch.float64,
            generator=generator,
        )
        return Prompts([Prompt([Turn("user", "")])] * rows, ids, FIRST + (1 - FIRST) * noise)

    def batch(self, prompts: Prompts) -> PromptBatch:
        return PromptBatch(*pad_left(prompts.ids, self.tokenizer.pad_token_id))

    def experience(self, learner: Learner, rows: int) -> Experience:
        """A rollout with random advantages and returns."""
        micro_batch = self.cfg.deploy.eval_micro_batch
        made = make_experience(learner.models, self.prompts(rows), Sampling(), micro_batch, True)
        made.advantages = torch.randn_like(made.old_logprobs) * made.response_mask
        made.returns = torch.randn_like(made.old_logprobs) * made.response_mask
        return made

    def ragged(self, rows: int, padding: float) -> tuple[Tensor, Tensor]:
        """ids and mask (rows, T), right-padded: this share of the places is padding."""
        width = self.cfg.data.max_prompt_tokens + self.cfg.rollout.max_new_tokens
        lengths = torch.full((rows,), max(2, int(width * (1 - padding * rows / (rows - 1)))))
        lengths[0] = width
        ids = torch.randint(5, self.arch.vocab, (rows, width))
        mask = (torch.arange(width) < lengths[:, None]).long()
        return ids, mask


def write_random_pairs(file: Path, rows: int = 200) -> None:
    """Dialogues of random words, chosen and rejected, for bench/run.py."""
    draw = random.Random(0)
    # EOS must be one of many tokens
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(5000)]
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            prompt, chosen, rejected = (" ".join(draw.choices(words, k=30)) for _ in range(3))
            texts = {
                name: f"\n\nHuman: {prompt}\n\nAssistant: {answer}"
                for name, answer in (("chosen", chosen), ("rejected", rejected))
            }
            lines.write(json.dumps(texts) + "\n")

"""From prompts to the experience that PPO learns from: sampled answers, and what the models say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.config.schema import RolloutEngine
from rlhf.data import template
from rlhf.data.batches import chunks, pad_left
from rlhf.data.records import Turn
from rlhf.distributed import collectives
from rlhf.distributed.engine import autocast, computes_in_fp32, gather_parameters
from rlhf.models.wrappers import without_eos
from rlhf.sampling.hf_generate import hf_generate
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling


@dataclass
class Experience:
    """Sampled answers and what is known about them. B answers, P prompt tokens (left-padded), R response tokens (right-padded)."""

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P) 1 on real tokens
    response_ids: Tensor  # (B, R)
    mask: Tensor  # (B, R) 1 on response tokens up to and including EOS
    learnt: Tensor  # (B, R) where losses count: `mask`, and with DeepSpeed-Chat's masks not the EOS
    sampler_logp: Tensor  # (B, R) log pi as the sampling loop saw it
    old_logp: Tensor  # (B, R) log pi of the policy that sampled, temperature applied
    ref_logp: Tensor  # (B, R) log pi of the reference
    old_values: Tensor  # (B, R) V(s_t) before token t
    scores: Tensor  # (B, sources) of each source for the whole answer
    ended: Tensor  # (B,) 1 where the answer ends with EOS

    def rows(self, index: Sequence[int]) -> Experience:
        """Some of the rows, without the columns that only pad them."""
        picked = Experience(*(getattr(self, f.name)[list(index)] for f in fields(self)))
        p = int(
            (picked.prompt_mask.cumsum(1) > 0).sum(1).max()
        )  # a mask guessed from ids may have holes
        r = max(1, int(picked.mask.sum(1).max()))
        for name in ("prompt_ids", "prompt_mask"):
            setattr(picked, name, getattr(picked, name)[:, -p:])
        for name in (
            "response_ids",
            "mask",
            "learnt",
            "sampler_logp",
            "old_logp",
            "ref_logp",
            "old_values",
        ):
            setattr(picked, name, getattr(picked, name)[:, :r])
        return picked

    def text(self, row: int, tokenizer: Any) -> str:
        """The answer of a row."""
        return template.decode_response(
            tokenizer, self.response_ids[row][self.mask[row] > 0].tolist()
        )

    @property
    def ids(self) -> Tensor:  # (B, P + R)
        return torch.cat([self.prompt_ids, self.response_ids], 1)

    @property
    def full_mask(self) -> Tensor:  # (B, P + R)
        return torch.cat([self.prompt_mask, self.mask.long()], 1)

    @property
    def wanted(self) -> Tensor:  # (B, P + R) bool: the response tokens
        return torch.cat([torch.zeros_like(self.prompt_mask), self.mask], 1) > 0


@torch.no_grad()
def policy_logprobs(policy: Any, experience: Experience, temperature: float) -> Tensor:
    """Log-probabilities of the sampled tokens under a policy (module or engine), (B, R)."""
    return policy(experience.ids, experience.full_mask, experience.wanted, temperature)[0][
        :, -experience.mask.shape[1] :
    ]


def values_before(scores: Tensor, r: int) -> Tensor:
    """From scores at all tokens (B, P + R) to the value of the state before each of the last `r` tokens, (B, r)."""
    return scores[:, -r - 1 : -1]


@dataclass
class Models:
    """The policy that samples, and whatever measures its answers."""

    tokenizer: Any
    actor: Any
    ref: Any = None
    rewards: Any = (
        None  # from some rows and their prompts to scores (rows, sources): rlhf.rewards.Rewards
    )
    critic: Any = None
    gather: bool = True  # where ZeRO-3 partitions the actor's weights, hold all of them while sampling; else fetch them for every token
    engine: RolloutEngine = RolloutEngine.native


def make_experience(
    models: Models,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[list[Turn]],
    draws: Tensor,
    sampling: Sampling,
    micro_batch: int,
    masks_from_ids: bool = False,
    train_mode: bool = False,
    rescore: bool = False,
) -> Experience:
    """Sample an answer to each prompt, and measure the answers with whatever is given; what is not given stays zero.

    Args:
        prompts, asked: token ids and turns of each prompt.  draws (B, R): random numbers of each answer.
        masks_from_ids, train_mode: as DeepSpeed-Chat (config.DsChat): EOS counts as padding once the answers are sampled; dropout is on
            while log-probabilities and values are measured.
        rescore: measure the answers' log-probabilities anew also where those of the sampling loop are exact, which they are in float32.

    Every process gets all prompts and all `draws`, works on its part of the rows, and returns the experience of all of them in the
    order of `prompts`: what follows does not depend on the number of processes.
    """
    tokenizer, actor, ref, rewards, critic = (
        models.tokenizer,
        models.actor,
        models.ref,
        models.rewards,
        models.critic,
    )
    rank, world = collectives.rank(), collectives.world_size()
    order = sorted(
        range(len(prompts)), key=lambda i: len(prompts[i])
    )  # similar lengths together: less padding
    order += order[:1] * (
        -len(order) % world
    )  # every process has the same number of rows; copies are dropped below
    mine = order[rank::world]
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    parts = []
    rescore = (
        rescore or train_mode or masks_from_ids or sampling.beams > 1 or not computes_in_fp32(actor)
    )
    synced = any(hasattr(p, "ds_id") for p in actor.module.parameters())
    with gather_parameters(actor.module.parameters() if models.gather else []), autocast(actor):
        for chunk in chunks(mine, micro_batch):
            ids, mask = pad_left([prompts[i] for i in chunk], pad_id, actor.device)
            through = (
                hf_generate if models.engine == RolloutEngine.hf or sampling.beams > 1 else sample
            )
            response, response_mask, logp = through(
                actor.module, ids, mask, draws[chunk], eos_id, sampling, synced
            )
            ended = ((response == eos_id) * response_mask).amax(1)
            learnt = response_mask
            if masks_from_ids:
                mask, learnt = (
                    without_eos(ids, mask, eos_id),
                    without_eos(response, response_mask, eos_id),
                )
            pad = max(map(len, prompts)) - ids.shape[1]
            ids, mask = F.pad(ids, (pad, 0), value=pad_id), F.pad(mask, (pad, 0))
            old_logp, ref_logp, old_values = (
                logp.clone(),
                *(torch.zeros_like(logp) for _ in range(2)),
            )
            none = logp.new_zeros(len(chunk), 0)
            parts.append(
                Experience(
                    ids,
                    mask,
                    response,
                    response_mask,
                    learnt,
                    logp,
                    old_logp,
                    ref_logp,
                    old_values,
                    none,
                    ended,
                )
            )
    experience = Experience(
        *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Experience))
    )

    scores: list[tuple[Sequence[int], Tensor]] = []
    for chunk in chunks(experience.full_mask.sum(1).argsort(stable=True).tolist(), micro_batch):
        part = experience.rows(chunk)
        n = part.mask.shape[1]
        with torch.no_grad():
            for engine in (actor, critic) if train_mode else ():
                engine.train()
            if rescore:
                experience.old_logp[chunk, :n] = policy_logprobs(actor, part, sampling.temperature)
            if critic is not None:
                experience.old_values[chunk, :n] = (
                    values_before(critic(part.ids, part.full_mask), n) * part.mask
                )
            for engine in (actor, critic) if train_mode else ():
                engine.eval()
            if ref is not None:
                experience.ref_logp[chunk, :n] = policy_logprobs(ref, part, sampling.temperature)
            if rewards is not None:
                scores.append((chunk, rewards(part, [asked[mine[row]] for row in chunk])))
    if scores:
        experience.scores = torch.cat([s for _, s in scores])[
            torch.tensor([row for chunk, _ in scores for row in chunk]).argsort()
        ]

    experience = Experience(
        *(collectives.all_gather_rows(getattr(experience, f.name)) for f in fields(Experience))
    )
    place = {row: i for i, row in enumerate(row for r in range(world) for row in order[r::world])}
    return experience.rows([place[i] for i in range(len(prompts))])

"""From prompts to answers: the sampling loop, and the experience that PPO learns from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf import comm
from rlhf.data import template
from rlhf.data.batches import chunks, pad_left
from rlhf.data.records import Turn
from rlhf.engines import autocast, whole
from rlhf.models import model_inputs, without_eos
from rlhf.objectives import token_logp


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Only the first is for training: the others change the distribution that the log-probabilities are of."""

    temperature: float = 1.0  # divides the logits, > 0
    top_p: float = 1.0  # from the likeliest tokens that together have this probability
    top_k: int = 0  # from so many of the likeliest; 0 = all
    greedy: bool = False  # the likeliest
    beams: int = 1  # more: the likeliest answer that a beam search of this width finds


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
        p = int((picked.prompt_mask.cumsum(1) > 0).sum(1).max())  # a mask guessed from ids may have holes
        r = max(1, int(picked.mask.sum(1).max()))
        for name in ("prompt_ids", "prompt_mask"):
            setattr(picked, name, getattr(picked, name)[:, -p:])
        for name in ("response_ids", "mask", "learnt", "sampler_logp", "old_logp", "ref_logp", "old_values"):
            setattr(picked, name, getattr(picked, name)[:, :r])
        return picked

    def text(self, row: int, tokenizer: Any) -> str:
        """The answer of a row."""
        return template.decode_response(tokenizer, self.response_ids[row][self.mask[row] > 0].tolist())

    @property
    def ids(self) -> Tensor:  # (B, P + R)
        return torch.cat([self.prompt_ids, self.response_ids], 1)

    @property
    def full_mask(self) -> Tensor:  # (B, P + R)
        return torch.cat([self.prompt_mask, self.mask.long()], 1)


@torch.no_grad()
def sample(
    hf: Any, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor, eos_id: int, sampling: Sampling, synced: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample answers, by inverting the cumulative sum of the distribution at given random numbers.

    Args:
        hf: causal language model.  prompt_ids, prompt_mask (B, P), left-padded.
        draws: (B, R) uniform in [0, 1), one per token that may be sampled.
        synced: every process takes as many forwards as the slowest: DeepSpeed talks to all of them in a forward of ZeRO-3, where
            weights are fetched, and where it compares its notes even if nothing is to be fetched.
    Returns: response ids (B, R); mask (B, R), float, 1 up to and including EOS; and the log-probabilities (B, R) of the sampled
        tokens under the full distribution at this temperature. Ids behind EOS are EOS and masked.
    """
    from transformers import DynamicCache

    n, width = draws.shape
    ids = torch.full((n, width), eos_id, device=prompt_ids.device)
    mask, logp = (torch.zeros((n, width), device=prompt_ids.device) for _ in range(2))
    alive = torch.arange(n, device=prompt_ids.device)
    draws = draws.to(prompt_ids.device)
    cache = DynamicCache(config=hf.config)
    step_ids, attention = prompt_ids, prompt_mask
    done = False
    for t in range(width):
        inputs = {key: x[:, -step_ids.shape[1] :] for key, x in model_inputs(hf, attention, attention).items() if key == "position_ids"}
        out = hf(input_ids=step_ids, attention_mask=attention, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
        probabilities = (out.logits[:, -1].double() / sampling.temperature).softmax(-1)
        token = choose(probabilities, draws[alive, t : t + 1], sampling)
        if not done:
            ids[alive, t], mask[alive, t] = token[:, 0], 1.0
            logp[alive, t] = probabilities.gather(1, token)[:, 0].log().float()
        going = (token[:, 0] != eos_id) & (not done)
        done = not going.any()
        if comm.all_max(float(not done), token.device) == 0 if synced else done:
            break
        if not going.all():  # finished rows cost nothing more; a process that only waits for others keeps one
            keep = going.nonzero()[:, 0] if not done else torch.zeros(1, dtype=torch.long, device=token.device)
            alive, token, attention = alive[keep], token[keep], attention[keep]
            cache.batch_select_indices(keep)
        step_ids, attention = token, torch.cat([attention, attention.new_ones(len(token), 1)], 1)
    return ids, mask, logp


@torch.no_grad()
def search(
    hf: Any, prompt_ids: Tensor, prompt_mask: Tensor, width: int, eos_id: int, beams: int, synced: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest answers that transformers' beam search finds. Arguments and result as of `sample`; log-probabilities are not
    measured here, and zero."""
    from transformers import GenerationConfig

    settings = GenerationConfig(max_new_tokens=width, num_beams=beams, do_sample=False, eos_token_id=eos_id, pad_token_id=eos_id)
    own, hf.generation_config = hf.generation_config, settings  # else a model's own penalties would be mixed in
    try:
        found = hf.generate(prompt_ids, attention_mask=prompt_mask, synced_gpus=synced)[:, prompt_ids.shape[1] :]
    finally:
        hf.generation_config = own
    ids = F.pad(found, (0, width - found.shape[1]), value=eos_id)
    ended_before = ((ids == eos_id).cumsum(1) - (ids == eos_id).long()) > 0
    here = torch.arange(width, device=ids.device) < found.shape[1]
    return ids, (~ended_before & here).float(), torch.zeros(ids.shape, device=ids.device)


def choose(probabilities: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """One token (B, 1) from each row of probabilities (B, V), by a number in [0, 1) each, draws (B, 1)."""
    last: Any = probabilities.shape[1] - 1  # which rounding must not lead past
    if sampling.greedy:
        return probabilities.argmax(-1, keepdim=True)
    if sampling.top_k or sampling.top_p < 1:
        falling, order = probabilities.sort(descending=True, stable=True)
        kept = falling.cumsum(-1) - falling < sampling.top_p * falling.sum(-1, keepdim=True)  # the one that reaches top_p is in
        if sampling.top_k:
            kept &= torch.arange(kept.shape[1], device=kept.device) < sampling.top_k
        probabilities = torch.zeros_like(probabilities).scatter(1, order, falling * kept)
        last = (probabilities > 0).cumsum(-1).argmax(-1, keepdim=True)
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True).clamp(max=last)


@torch.no_grad()
def response_logp(policy: Any, experience: Experience, temperature: float) -> Tensor:
    """Log-probabilities of the sampled tokens under a policy (module or engine), (B, R)."""
    logits = policy(experience.ids, experience.full_mask, experience.mask.shape[1])
    return token_logp(logits, experience.response_ids, temperature)[0] * experience.mask


def values_before(scores: Tensor, r: int) -> Tensor:
    """From scores at all tokens (B, P + R) to the value of the state before each of the last `r` tokens, (B, r)."""
    return scores[:, -r - 1 : -1]


@dataclass
class Models:
    """The policy that samples, and whatever measures its answers."""

    tokenizer: Any
    actor: Any
    ref: Any = None
    rewards: Any = None  # from some rows and their prompts to scores (rows, sources): rlhf.rewards.Rewards
    critic: Any = None
    gather: bool = True  # where ZeRO-3 partitions the actor's weights, hold all of them while sampling; else fetch them for every token


def make_experience(
    models: Models,
    prompts: Sequence[Sequence[int]],
    asked: Sequence[list[Turn]],
    draws: Tensor,
    sampling: Sampling,
    micro_batch: int,
    masks_from_ids: bool = False,
    train_mode: bool = False,
) -> Experience:
    """Sample an answer to each prompt, and measure the answers with whatever is given; what is not given stays zero.

    Args:
        prompts, asked: token ids and turns of each prompt.  draws (B, R): random numbers of each answer.
        masks_from_ids, train_mode: as DeepSpeed-Chat (config.DsChat): EOS counts as padding once the answers are sampled; dropout is on
            while log-probabilities and values are measured.

    Every process gets all prompts and all `draws`, works on its part of the rows, and returns the experience of all of them in the
    order of `prompts`: what follows does not depend on the number of processes.
    """
    tokenizer, actor, ref, rewards, critic = models.tokenizer, models.actor, models.ref, models.rewards, models.critic
    rank, world = comm.rank(), comm.world_size()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    order += order[:1] * (-len(order) % world)  # every process has the same number of rows; copies are dropped below
    mine = order[rank::world]
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    parts = []
    synced = any(hasattr(p, "ds_id") for p in actor.module.parameters())
    with whole(actor.module.parameters() if models.gather else []), autocast(actor):
        for chunk in chunks(mine, micro_batch):
            ids, mask = pad_left([prompts[i] for i in chunk], pad_id, actor.device)
            if sampling.beams > 1:
                response, response_mask, logp = search(actor.module.hf, ids, mask, draws.shape[1], eos_id, sampling.beams, synced)
            else:
                response, response_mask, logp = sample(actor.module.hf, ids, mask, draws[chunk], eos_id, sampling, synced)
            ended = ((response == eos_id) * response_mask).amax(1)
            learnt = response_mask
            if masks_from_ids:
                mask, learnt = without_eos(ids, mask, eos_id), without_eos(response, response_mask, eos_id)
            pad = max(map(len, prompts)) - ids.shape[1]
            ids, mask = F.pad(ids, (pad, 0), value=pad_id), F.pad(mask, (pad, 0))
            old_logp, ref_logp, old_values = (torch.zeros_like(logp) for _ in range(3))
            none = logp.new_zeros(len(chunk), 0)
            parts.append(Experience(ids, mask, response, response_mask, learnt, logp, old_logp, ref_logp, old_values, none, ended))
    experience = Experience(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Experience)))

    scores: list[tuple[Sequence[int], Tensor]] = []
    for chunk in chunks(experience.full_mask.sum(1).argsort(stable=True).tolist(), micro_batch):
        part = experience.rows(chunk)
        n = part.mask.shape[1]
        with torch.no_grad():
            for engine in (actor, critic) if train_mode else ():
                engine.train()
            experience.old_logp[chunk, :n] = response_logp(actor, part, sampling.temperature)
            if critic is not None:
                experience.old_values[chunk, :n] = values_before(critic(part.ids, part.full_mask), n) * part.mask
            for engine in (actor, critic) if train_mode else ():
                engine.eval()
            if ref is not None:
                experience.ref_logp[chunk, :n] = response_logp(ref, part, sampling.temperature)
            if rewards is not None:
                scores.append((chunk, rewards(part, [asked[mine[row]] for row in chunk])))
    if scores:
        experience.scores = torch.cat([s for _, s in scores])[torch.tensor([row for chunk, _ in scores for row in chunk]).argsort()]

    experience = Experience(*(comm.all_rows(getattr(experience, f.name)) for f in fields(Experience)))
    place = {row: i for i, row in enumerate(row for r in range(world) for row in order[r::world])}
    return experience.rows([place[i] for i in range(len(prompts))])

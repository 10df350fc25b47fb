"""From prompts to answers: the sampling loop, the experience that PPO learns from, and the evaluation of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf import comm
from rlhf.data import template
from rlhf.data.batches import chunks, pad_left, uniforms
from rlhf.data.records import Dataset
from rlhf.engines import gathered
from rlhf.models import last_token_score, model_inputs
from rlhf.objectives import token_logp


@dataclass
class Experience:
    """Sampled answers and what is known about them. B answers, P prompt tokens (left-padded), R response tokens (right-padded)."""

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P) 1 on real tokens
    response_ids: Tensor  # (B, R)
    mask: Tensor  # (B, R) 1 on response tokens up to and including EOS
    old_logp: Tensor  # (B, R) log pi of the policy that sampled, temperature applied
    ref_logp: Tensor  # (B, R) log pi of the reference
    old_values: Tensor  # (B, R) V(s_t) before token t
    score: Tensor  # (B,) reward model's score of the whole answer, normalised units
    ended: Tensor  # (B,) 1 where the answer ends with EOS

    def rows(self, index: Sequence[int]) -> Experience:
        """Some of the rows, without the columns that only pad them."""
        picked = Experience(*(getattr(self, f.name)[list(index)] for f in fields(self)))
        p, r = int(picked.prompt_mask.sum(1).max()), max(1, int(picked.mask.sum(1).max()))
        for name in ("prompt_ids", "prompt_mask"):
            setattr(picked, name, getattr(picked, name)[:, -p:])
        for name in ("response_ids", "mask", "old_logp", "ref_logp", "old_values"):
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
def sample(hf: Any, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor, eos_id: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample answers from the full distribution (no top-k, no top-p), by inverting its cumulative sum at given random numbers.

    Args:
        hf: causal language model.  prompt_ids, prompt_mask (B, P), left-padded.
        draws: (B, R) uniform in [0, 1), one per token that may be sampled.
        temperature: divides the logits, > 0.
    Returns: response ids (B, R) and mask (B, R), float, 1 up to and including EOS. Ids behind EOS are EOS and masked.
    """
    from transformers import DynamicCache

    n, width = draws.shape
    ids = torch.full((n, width), eos_id, device=prompt_ids.device)
    mask = torch.zeros((n, width), device=prompt_ids.device)
    alive = torch.arange(n, device=prompt_ids.device)
    draws = draws.to(prompt_ids.device)
    cache = DynamicCache(config=hf.config)
    step_ids, attention = prompt_ids, prompt_mask
    for t in range(width):
        inputs = {key: x[:, -step_ids.shape[1] :] for key, x in model_inputs(hf, attention, attention).items() if key == "position_ids"}
        out = hf(input_ids=step_ids, attention_mask=attention, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
        cumulative = (out.logits[:, -1].double() / temperature).softmax(-1).cumsum(-1)
        target = draws[alive, t : t + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
        ids[alive, t], mask[alive, t] = token[:, 0], 1.0
        going = token[:, 0] != eos_id
        if not going.any():
            break
        if not going.all():  # finished rows cost nothing more
            keep = going.nonzero()[:, 0]
            alive, token, attention = alive[keep], token[keep], attention[keep]
            cache.batch_select_indices(keep)
        step_ids, attention = token, torch.cat([attention, attention.new_ones(len(token), 1)], 1)
    return ids, mask


@torch.no_grad()
def response_logp(policy: Any, experience: Experience, temperature: float) -> Tensor:
    """Log-probabilities of the sampled tokens under a policy (module or engine), (B, R)."""
    logits = policy(experience.ids, experience.full_mask, experience.mask.shape[1])
    return token_logp(logits / temperature, experience.response_ids)[0] * experience.mask


def values_before(scores: Tensor, r: int) -> Tensor:
    """From scores at all tokens (B, P + R) to the value of the state before each of the last `r` tokens, (B, r)."""
    return scores[:, -r - 1 : -1]


def make_experience(
    prompts: Sequence[Sequence[int]],
    draws: Tensor,
    temperature: float,
    micro_batch: int,
    tokenizer: Any,
    actor: Any,
    ref: Any = None,
    reward: Any = None,
    critic: Any = None,
) -> Experience:
    """Sample an answer to each prompt, and score the answers with whatever engines are given; what has none stays zero.

    Every process gets all prompts and all `draws` (B, R), works on its part of the rows, and returns the experience of all of
    them in the order of `prompts`: what follows does not depend on the number of processes.
    """
    rank, world = comm.rank(), comm.world_size()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    order += order[:1] * (-len(order) % world)  # every process has the same number of rows; copies are dropped below
    parts = []
    with gathered(actor):
        for chunk in chunks(order[rank::world], micro_batch):
            ids, mask = pad_left([prompts[i] for i in chunk], tokenizer.pad_token_id, actor.device)
            response, response_mask = sample(actor.module.hf, ids, mask, draws[chunk], tokenizer.eos_token_id, temperature)
            ended = ((response == tokenizer.eos_token_id) * response_mask).amax(1)
            pad = max(map(len, prompts)) - ids.shape[1]
            ids, mask = F.pad(ids, (pad, 0), value=tokenizer.pad_token_id), F.pad(mask, (pad, 0))
            zeros = torch.zeros_like(response_mask)
            parts.append(Experience(ids, mask, response, response_mask, zeros, zeros, zeros, zeros[:, 0], ended))
    experience = Experience(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Experience)))

    for chunk in chunks(experience.full_mask.sum(1).argsort(stable=True).tolist(), micro_batch):
        part = experience.rows(chunk)
        n = part.mask.shape[1]
        experience.old_logp[chunk, :n] = response_logp(actor, part, temperature)
        if ref is not None:
            experience.ref_logp[chunk, :n] = response_logp(ref, part, temperature)
        with torch.no_grad():
            if reward is not None:
                experience.score[chunk] = last_token_score(reward(part.ids, part.full_mask), part.full_mask)
            if critic is not None:
                experience.old_values[chunk, :n] = values_before(critic(part.ids, part.full_mask), n) * part.mask

    experience = Experience(*(comm.all_rows(getattr(experience, f.name)) for f in fields(Experience)))
    place = {row: i for i, row in enumerate(row for r in range(world) for row in order[r::world])}
    return experience.rows([place[i] for i in range(len(prompts))])


def evaluate_policy(
    data: Dataset,
    max_prompt_tokens: int,
    max_new_tokens: int,
    temperature: float,
    micro_batch: int,
    tokenizer: Any,
    actor: Any,
    ref: Any = None,
    reward: Any = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample one answer to each held-out prompt, with a fixed random stream per prompt, and measure.

    Returns: means over the answers, `eos_rate`, `length` (tokens), and where they are known `gold`, `gold_best`, `score`
        (normalised units), `kl` (nats per sequence, the sum over tokens of log pi - log ref); and one row per answer for the tables.
    """
    encoded = template.encode_prompts(tokenizer, data.eval_prompts, max_prompt_tokens)
    kept = [(turns, ids) for turns, ids in zip(data.eval_prompts, encoded) if ids is not None]
    draws = uniforms("evaluation", range(len(kept)), 0, 0, max_new_tokens)
    e = make_experience([ids for _, ids in kept], draws, temperature, micro_batch, tokenizer, actor, ref, reward)
    kl = (e.old_logp - e.ref_logp).sum(1)
    rows: list[dict[str, Any]] = []
    for i, (turns, _) in enumerate(kept):
        answer = e.text(i, tokenizer)
        row: dict[str, Any] = {"prompt": turns[-1].text, "completion": answer}
        row |= {"length": int(e.mask[i].sum()), "eos_rate": float(e.ended[i])}
        row |= {"score": float(e.score[i])} if reward is not None else {}
        row |= {"kl": float(kl[i])} if ref is not None else {}
        row |= {"gold": data.gold(turns, answer)} if data.gold else {}
        row |= {"gold_best": data.best_gold(turns)} if data.best_gold else {}
        rows.append(row)
    numbers = [key for key in rows[0] if key not in ("prompt", "completion")]
    return {key: sum(row[key] for row in rows) / len(rows) for key in numbers}, rows

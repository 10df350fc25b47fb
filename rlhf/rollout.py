"""From prompts to answers: the sampling loop, the experience that PPO learns from, and the evaluation of a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf import comm
from rlhf.data import template
from rlhf.data.batches import chunks, pad_left, pad_right, uniforms
from rlhf.data.records import Dataset, Turn
from rlhf.engines import autocast, whole
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
def sample(
    hf: Any, prompt_ids: Tensor, prompt_mask: Tensor, draws: Tensor, eos_id: int, temperature: float, synced: bool = False
) -> tuple[Tensor, Tensor]:
    """Sample answers from the full distribution (no top-k, no top-p), by inverting its cumulative sum at given random numbers.

    Args:
        hf: causal language model.  prompt_ids, prompt_mask (B, P), left-padded.
        draws: (B, R) uniform in [0, 1), one per token that may be sampled.
        temperature: divides the logits, > 0.
        synced: every process takes as many forwards as the slowest: DeepSpeed talks to all of them in a forward of ZeRO-3, where
            weights are fetched, and where it compares its notes even if nothing is to be fetched.
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
    done = False
    for t in range(width):
        inputs = {key: x[:, -step_ids.shape[1] :] for key, x in model_inputs(hf, attention, attention).items() if key == "position_ids"}
        out = hf(input_ids=step_ids, attention_mask=attention, past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs)
        cumulative = (out.logits[:, -1].double() / temperature).softmax(-1).cumsum(-1)
        target = draws[alive, t : t + 1] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
        if not done:
            ids[alive, t], mask[alive, t] = token[:, 0], 1.0
        going = (token[:, 0] != eos_id) & (not done)
        done = not going.any()
        if comm.all_max(float(not done), token.device) == 0 if synced else done:
            break
        if not going.all():  # finished rows cost nothing more; a process that only waits for others keeps one
            keep = going.nonzero()[:, 0] if not done else torch.zeros(1, dtype=torch.long, device=token.device)
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
    gather: bool = True,
    for_reward: Callable[[int, str, bool], list[int]] | None = None,
) -> Experience:
    """Sample an answer to each prompt, and score the answers with whatever engines are given; what has none stays zero.

    Args:
        gather: where ZeRO-3 partitions the actor's weights, hold all of them while sampling; else they are fetched for every token.
        for_reward: from the number of a prompt, its answer and whether that ended, the token ids that a reward model with another
            tokenizer reads; None where policy and reward model share one.

    Every process gets all prompts and all `draws` (B, R), works on its part of the rows, and returns the experience of all of
    them in the order of `prompts`: what follows does not depend on the number of processes.
    """
    rank, world = comm.rank(), comm.world_size()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: less padding
    order += order[:1] * (-len(order) % world)  # every process has the same number of rows; copies are dropped below
    mine = order[rank::world]
    parts = []
    synced = any(hasattr(p, "ds_id") for p in actor.module.parameters())
    with whole(actor.module.parameters() if gather else []), autocast(actor):
        for chunk in chunks(mine, micro_batch):
            ids, mask = pad_left([prompts[i] for i in chunk], tokenizer.pad_token_id, actor.device)
            response, response_mask = sample(actor.module.hf, ids, mask, draws[chunk], tokenizer.eos_token_id, temperature, synced)
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
            if reward is not None and for_reward is not None:
                texts = [for_reward(mine[row], experience.text(row, tokenizer), bool(experience.ended[row])) for row in chunk]
                ids, mask = pad_right(texts, 0, reward.device)  # any id will do behind a mask; the actor's may not exist here
                experience.score[chunk] = last_token_score(reward(ids, mask), mask)
            elif reward is not None:
                experience.score[chunk] = last_token_score(reward(part.ids, part.full_mask), part.full_mask)
            if critic is not None:
                experience.old_values[chunk, :n] = values_before(critic(part.ids, part.full_mask), n) * part.mask

    experience = Experience(*(comm.all_rows(getattr(experience, f.name)) for f in fields(Experience)))
    place = {row: i for i, row in enumerate(row for r in range(world) for row in order[r::world])}
    return experience.rows([place[i] for i in range(len(prompts))])


def reads_text(reward: Any, tokenizer: Any, prompts: Sequence[list[Turn]]) -> Callable[[int, str, bool], list[int]]:
    """make_experience's `for_reward`, for a reward model with a tokenizer of its own: prompt and answer in its own template. What
    is too long for it loses its beginning."""
    context = getattr(reward.module.hf.config, "max_position_embeddings", None) or 10**9

    def ids_of(prompt: int, answer: str, ended: bool) -> list[int]:
        ids = template.encode_prompts(tokenizer, [prompts[prompt]], 10**9)[0] or []
        return (ids + template.encode_response(tokenizer, answer, ended))[-context:]

    return ids_of


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
    gather: bool = True,
    reward_tokenizer: Any = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Sample one answer to each held-out prompt, with a fixed random stream per prompt, and measure.

    Args: reward_tokenizer: of a reward model that has another one than the actor.  gather: see make_experience.
    Returns: means over the answers, `eos_rate`, `length` (tokens), and where they are known `gold`, `gold_best`, `score`
        (normalised units), `kl` (nats per sequence, the sum over tokens of log pi - log ref); and one row per answer for the tables.
    """
    encoded = template.encode_prompts(tokenizer, data.eval_prompts, max_prompt_tokens)
    kept = [(turns, ids) for turns, ids in zip(data.eval_prompts, encoded) if ids is not None]
    draws = uniforms("evaluation", range(len(kept)), 0, 0, max_new_tokens)
    for_reward = reads_text(reward, reward_tokenizer, [turns for turns, _ in kept]) if reward_tokenizer else None
    e = make_experience(
        [ids for _, ids in kept], draws, temperature, micro_batch, tokenizer, actor, ref, reward, gather=gather, for_reward=for_reward
    )
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

"""Turn prompts into Experience: sampled responses with log-probs, values and scores.

Shapes: B responses, P prompt tokens (left-padded), R response tokens (right-padded).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.choices import CorrectionMode, RolloutEngine
from rlhf.config.schema import Config
from rlhf.data import encoding
from rlhf.data.batches import chunks, pad_left
from rlhf.data.records import Prompt
from rlhf.distributed import collectives
from rlhf.distributed.engine import Engine, autocast, computes_in_fp32, gathered_model
from rlhf.models.lora import merged_adapter
from rlhf.models.wrappers import LogProbModel, Policy, Scorer
from rlhf.rl import dschat
from rlhf.rl.losses import sampler_weights
from rlhf.sampling.batches import PromptBatch, SampledResponses
from rlhf.sampling.continuous import continuous_generate
from rlhf.sampling.hf_generate import hf_generate
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling

if TYPE_CHECKING:
    from rlhf.rl.rewards import Rewards
    from rlhf.sampling.vllm import VllmSampler

GENERATE = {
    RolloutEngine.native: sample,
    RolloutEngine.hf: hf_generate,
    RolloutEngine.continuous: continuous_generate,
}
PROMPT_FIELDS = ("prompt_ids", "prompt_mask")
# every other field has a column for each response token
PER_RESPONSE = ("scores", "finished", "reward_errors")


@dataclass
class Experience:
    """Sampled responses and what is known about them, in host memory.

    Rows can so be picked, measured and compared without waiting for a GPU; models upload what they
    read.
    """

    prompt_ids: Tensor  # (B, P)
    prompt_mask: Tensor  # (B, P) 1 on real tokens
    response_ids: Tensor  # (B, R)
    response_mask: Tensor  # (B, R) 1 on response tokens up to and including EOS
    loss_mask: Tensor  # (B, R) tokens in the loss: those of response_mask, or fewer (loss_mask)
    sampler_logprobs: Tensor  # (B, R) log pi as the sampling loop computed it
    old_logprobs: Tensor  # (B, R) log pi of the policy that sampled, temperature applied
    ref_logprobs: Tensor  # (B, R) log pi of the reference
    values: Tensor  # (B, R) V(s_t) before token t, by the critic before the update
    scores: Tensor  # (B, sources) of each source for the whole response; NaN: does not apply
    finished: Tensor  # (B,) 1 where the response ends with EOS
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, R), once estimated
    returns: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, R), with a critic
    # (B, R) of the policy loss; empty: 1 (losses.sampler_weights)
    sampler_weights: Tensor = field(default_factory=lambda: torch.empty(0))
    # (B, sources), 1 where a reward function failed and that is skipped; empty without functions
    reward_errors: Tensor = field(default_factory=lambda: torch.empty(0))

    def rows(self, index: Sequence[int]) -> Experience:
        """Some of the rows, without the columns that only pad them."""
        picked = Experience(
            *(
                t[list(index)] if len(t) else t
                for t in (getattr(self, f.name) for f in fields(self))
            )
        )
        # a guessed mask may have holes, so count from its first real token
        p = int((picked.prompt_mask.cumsum(1) > 0).sum(1).max())
        r = max(1, int(picked.response_mask.sum(1).max()))
        for f in fields(picked):
            value = getattr(picked, f.name)
            if f.name in PROMPT_FIELDS:
                setattr(picked, f.name, value[:, -p:])
            elif f.name not in PER_RESPONSE and len(value):
                setattr(picked, f.name, value[:, :r])
        return picked

    def text(self, row: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """The response of a row as text."""
        return encoding.decode_response(tokenizer, self.tokens(row))

    def tokens(self, row: int) -> list[int]:
        """The token ids of the response of a row."""
        ids: list[int] = self.response_ids[row][self.response_mask[row] > 0].tolist()
        return ids

    @property
    def ids(self) -> Tensor:
        """Prompts and responses, (B, P + R)."""
        return torch.cat([self.prompt_ids, self.response_ids], 1)

    @property
    def full_mask(self) -> Tensor:
        """1 on real tokens of prompts and responses, (B, P + R)."""
        return torch.cat([self.prompt_mask, self.response_mask.long()], 1)

    @property
    def target_mask(self) -> Tensor:
        """The response tokens, (B, P + R) bool."""
        return torch.cat([torch.zeros_like(self.prompt_mask), self.response_mask], 1) > 0


@dataclass
class Prompts:
    """What to respond to. Several entries may be the same prompt."""

    rows: Sequence[Prompt]
    ids: Sequence[Sequence[int]]  # the same as token ids
    random: Tensor  # (B, R) in [0, 1), a number for each token of each response
    per_prompt: int = 1  # so many responses to a prompt lie side by side


def pick_prompts(parts: Sequence[Prompts], index: Sequence[int]) -> Prompts:
    """Some entries of several Prompts, counted through all of them."""
    rows = [row for part in parts for row in part.rows]
    ids = [row for part in parts for row in part.ids]
    random = torch.cat([part.random for part in parts])
    return replace(
        parts[0],
        rows=[rows[i] for i in index],
        ids=[ids[i] for i in index],
        random=random[list(index)],
    )


def concatenate(parts: Sequence[Experience], pad_id: int) -> Experience:
    """The rows of several experiences as one, padded to the longest prompt and response."""
    if len(parts) == 1:
        return parts[0]
    wide_p = max(part.prompt_ids.shape[1] for part in parts)
    wide_r = max(part.response_ids.shape[1] for part in parts)
    joined = {}
    for name in [*sampled_fields(), "reward_errors"]:
        fill = pad_id if name.endswith("_ids") else 0
        rows = []
        for part in parts:
            value = getattr(part, name)
            if name in PROMPT_FIELDS:
                value = F.pad(value, (wide_p - value.shape[1], 0), value=fill)
            elif name not in PER_RESPONSE:
                value = F.pad(value, (0, wide_r - value.shape[1]), value=fill)
            rows.append(value)
        joined[name] = torch.cat(rows)
    return Experience(**joined)


@dataclass
class Models:
    """The policy that samples, and whatever measures its responses; None is skipped."""

    tokenizer: PreTrainedTokenizerBase
    actor: Engine[Policy]
    ref: LogProbModel | None = None
    rewards: Rewards | None = None
    critic: Engine[Scorer] | None = None
    gather: bool = True  # ZeRO-3: gather the actor's weights while sampling, else for every token
    merge: bool = True  # merge an adapter into the weights while sampling
    engine: RolloutEngine = RolloutEngine.native
    vllm: VllmSampler | None = None  # with RolloutEngine.vllm

    def trained(self) -> dict[str, Engine[Policy] | Engine[Scorer]]:
        """The engines that are trained, by role."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.critic else {})


def make_experience(
    models: Models,
    prompts: Prompts,
    sampling: Sampling,
    micro_batch: int,
    rescore: bool = False,
    pad_is_eos: bool = False,
) -> Experience:
    """Sample a response to each prompt, and measure it with the models that are given.

    Every rank gets all prompts, works on its part, and returns the experience of all of them in
    the order of `prompts`, so that nothing after this depends on the number of ranks.

    Args:
        micro_batch: responses per forward pass.
        rescore: measure log-probs again also where those of the sampler are exact (float32).
        pad_is_eos: rl.dschat.pad_is_eos.
    Returns: fields of models that are not given are zero; advantages and returns are empty.
    """
    rank, world = collectives.rank(), collectives.world_size()
    order = sorted(range(len(prompts.ids)), key=lambda i: len(prompts.ids[i]))  # less padding
    order += order[:1] * (-len(order) % world)  # as many rows on every rank; copies go below
    mine = order[rank::world]
    experience = sample_responses(models, prompts, mine, sampling, micro_batch)
    own = sampling.beams == 1 and not models.engine.is_foreign
    exact = computes_in_fp32(models.actor) and own
    if pad_is_eos:
        dschat.guess_masks(experience, models.tokenizer.eos_token_id)
    measure(
        models, experience, micro_batch, sampling.temperature, rescore or pad_is_eos or not exact
    )
    if models.rewards is not None:
        asked = [prompts.rows[i] for i in mine]
        experience.scores = score(models.rewards, experience, asked, micro_batch)
    gathered = [collectives.all_gather_rows(getattr(experience, name)) for name in sampled_fields()]
    place = {row: i for i, row in enumerate(row for r in range(world) for row in order[r::world])}
    whole = Experience(*gathered).rows([place[i] for i in range(len(prompts.ids))])
    if models.rewards is not None:
        models.rewards.add_functions(whole, prompts)
    return whole


def sampled_fields() -> list[str]:
    """The fields that every response has as soon as it is sampled."""
    later = ("advantages", "returns", "sampler_weights", "reward_errors")
    return [f.name for f in fields(Experience) if f.name not in later]


def sample_responses(
    models: Models, prompts: Prompts, mine: Sequence[int], sampling: Sampling, micro_batch: int
) -> Experience:
    """Responses to some of the prompts, with the sampler's log-probs; all else is zero."""
    actor, tokenizer = models.actor, models.tokenizer
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    width = max(map(len, prompts.ids))
    if models.vllm is not None and sampling.beams == 1:
        batch = PromptBatch(*pad_left([prompts.ids[i] for i in mine], pad_id))
        sampled = models.vllm.sample(actor, tokenizer, batch, prompts.random[mine], sampling)
        return unscored(batch, sampled, width, tokenizer)
    is_partitioned = any(hasattr(p, "ds_id") for p in actor.module.parameters())
    generate = GENERATE[models.engine if sampling.beams == 1 else RolloutEngine.hf]
    if generate is continuous_generate:
        micro_batch = len(mine)  # it divides them itself
    parts = []
    whole = gathered_model(actor.module) if models.gather else contextlib.nullcontext(False)
    with contextlib.ExitStack() as while_sampling:
        is_whole = while_sampling.enter_context(whole)
        while_sampling.enter_context(autocast(actor))
        if models.merge and (is_whole or not is_partitioned):
            is_copy = is_whole and collectives.world_size() > 1
            while_sampling.enter_context(merged_adapter(actor.module.hf, in_place=is_copy))
        for chunk in chunks(mine, micro_batch):
            batch = PromptBatch(*pad_left([prompts.ids[i] for i in chunk], pad_id))
            sampled = generate(
                actor.module,
                batch,
                prompts.random[chunk],
                eos_id,
                sampling,
                synced=is_partitioned and not is_whole,
            )
            parts.append(unscored(batch, sampled, width, tokenizer))
    return Experience(*(torch.cat([getattr(p, name) for p in parts]) for name in sampled_fields()))


def unscored(
    prompts: PromptBatch,
    sampled: SampledResponses,
    width: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Experience:
    """Responses with the sampler's log-probs. Args: width: of the padded prompts, tokens."""
    response, response_mask, logprobs = (x.cpu() for x in sampled)
    eos_id, pad = tokenizer.eos_token_id, width - prompts.ids.shape[1]
    zeros = torch.zeros_like(logprobs)
    return Experience(
        prompt_ids=F.pad(prompts.ids, (pad, 0), value=tokenizer.pad_token_id),
        prompt_mask=F.pad(prompts.mask, (pad, 0)),
        response_ids=response,
        response_mask=response_mask,
        loss_mask=response_mask,
        sampler_logprobs=logprobs,
        old_logprobs=logprobs.clone(),
        ref_logprobs=zeros,
        values=zeros.clone(),
        scores=logprobs.new_zeros(len(response), 0),
        finished=((response == eos_id) * response_mask).amax(1),
    )


def correct_for_sampler(cfg: Config, experience: Experience) -> dict[str, float]:
    """Weigh the tokens that another program has sampled by pi / pi of that program.

    Returns: metrics of the ratio; none where there is nothing to correct.
    """
    correction, e = cfg.rl.importance_correction, experience
    default = CorrectionMode.token if cfg.rollout.engine.is_foreign else CorrectionMode.none
    mode = correction.mode or default
    if mode == CorrectionMode.none:
        return {}
    e.sampler_weights, ratio = sampler_weights(
        e.old_logprobs, e.sampler_logprobs, e.response_mask, mode, correction.cap
    )
    tokens = e.response_mask.sum()
    return {
        "sampler/ratio_mean": float((ratio * e.response_mask).sum() / tokens),
        "sampler/ratio_max": float((ratio * e.response_mask).max()),
        "sampler/capped": float(((ratio > correction.cap) * e.response_mask).sum() / tokens),
    }


@torch.no_grad()
def measure(
    models: Models, experience: Experience, micro_batch: int, temperature: float, rescore: bool
) -> None:
    """Fill in log-probs and values of this rank's responses, similar lengths together."""
    for chunk in by_length(experience, micro_batch):
        part = experience.rows(chunk)
        r = part.response_mask.shape[1]
        if rescore:
            experience.old_logprobs[chunk, :r] = policy_logprobs(models.actor, part, temperature)
        if models.critic is not None:
            at_tokens = models.critic(part.ids, part.full_mask).cpu()
            experience.values[chunk, :r] = values_before(at_tokens, r) * part.response_mask
        if models.ref is not None:
            experience.ref_logprobs[chunk, :r] = policy_logprobs(models.ref, part, temperature)


@torch.no_grad()
def score(
    rewards: Rewards, experience: Experience, prompts: Sequence[Prompt], micro_batch: int
) -> Tensor:
    """Scores of this rank's responses, (b, sources)."""
    index: list[int] = []
    parts = []
    for chunk in by_length(experience, micro_batch):
        parts.append(rewards(experience.rows(chunk), [prompts[row] for row in chunk]))
        index += chunk
    return torch.cat(parts)[torch.tensor(index).argsort()]


def by_length(experience: Experience, micro_batch: int) -> list[Sequence[int]]:
    """Row numbers in chunks of similar length."""
    order = experience.full_mask.sum(1).argsort(stable=True).tolist()
    return chunks(order, micro_batch)


@torch.no_grad()
def policy_logprobs(policy: LogProbModel, experience: Experience, temperature: float) -> Tensor:
    """Log-probs of the sampled tokens under a policy, (B, R), in host memory."""
    stats = policy(experience.ids, experience.full_mask, experience.target_mask, temperature)
    return stats.logprobs[:, -experience.response_mask.shape[1] :].cpu()


def values_before(scores: Tensor, r: int) -> Tensor:
    """The value of the state before each of the last `r` tokens, (B, r), of scores (B, P + R)."""
    return scores[:, -r - 1 : -1]

"""Policy and Scorer: the two thin modules that the engines train."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlhf.base.log import log
from rlhf.data.batches import upload
from rlhf.distributed.engine import Engine, HfModule
from rlhf.models import logprobs, packing
from rlhf.models.logprobs import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TokenStats(NamedTuple):
    """What a policy gives for tokens, (B, T) each, float32, zero where no token was asked for.

    They are on the model's device.
    """

    logprobs: Tensor  # given the tokens before it in its row, nats, with gradient
    entropy: Tensor  # of the whole distribution, nats, with gradient
    is_argmax: Tensor  # 1 where the token is the likeliest


class LogProbModel(Protocol):
    """What gives log-probabilities of tokens: an engine, or lora.AdapterOff. See Policy.forward."""

    @property
    def device(self) -> torch.device: ...
    @property
    def module(self) -> Policy: ...
    def __call__(
        self, ids: Tensor, mask: Tensor, target_mask: Tensor, temperature: float = 1.0
    ) -> TokenStats: ...


class Model(HfModule):
    """What policy and scorer share: hidden states of a batch, packed where the model allows it."""

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf
        # None: verified on the first forward pass
        self.can_pack: bool | None = None if packing.use_packed_attention(hf) else False

    @property
    def device(self) -> torch.device:
        """Where the model computes. Its inputs are in host memory; it uploads them."""
        return device_of(self.hf)

    # of a batch, ids and mask (B, T), by the model's own forward pass: (B, T, V or d), float32
    outputs: Callable[[Tensor, Tensor], Tensor]
    # the same from hidden states (T, d)
    head: Callable[[Tensor], Tensor]

    def hidden(
        self, ids: Tensor, mask: Tensor, with_padding: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the tokens of a batch.

        Args: ids, mask (B, T).  with_padding: compute the states of padding tokens too.
        Returns: states (N, d); and in host memory gather_index (B, T), the row among them of each
            token, at padding that of the last real token before it.
        """
        base = self.hf.base_model
        if not with_padding and self.supports_packing():
            packed = packing.pack(ids, mask)
            inputs = packing.packed_inputs(packed.to(self.device), self.hf.dtype)
            output = base(**inputs, use_cache=False)
            return output.last_hidden_state[0], packed.gather_index
        output = base(**model_inputs(base, ids, mask), use_cache=False)
        index = torch.arange(ids.numel()).view_as(ids)
        if not with_padding:
            index = torch.where(mask > 0, index, -1).cummax(1).values.clamp(min=0)
        return output.last_hidden_state.flatten(0, 1), index

    def supports_packing(self) -> bool:
        """Whether batches are packed, and a policy's logits are hidden states x output layer."""
        if self.can_pack is None:
            self.can_pack = self.packing_matches_unpacked()
            if not self.can_pack:
                log.info(
                    f"{type(self.hf).__name__}: packed batches give other results than single "
                    "sequences, so batches are padded, which is slower"
                )
        return self.can_pack

    @torch.no_grad()
    def packing_matches_unpacked(self) -> bool:
        """Compare packed outputs with the model's own outputs of each sequence alone.

        The test batch has three random sequences, two of them with a common prefix. A model with
        another kind of attention, or one that scales its logits, fails and is used unpacked.
        """
        vocabulary = self.hf.get_input_embeddings().num_embeddings
        random = torch.randint(vocabulary, (3, 32), generator=torch.Generator().manual_seed(0))
        random[1, :20] = random[0, :20]
        lengths = [32, 27, 24]
        ids, changed = random, random.clone()
        mask = (torch.arange(32) < torch.tensor(lengths)[:, None]).long()
        changed[:, :3] = (changed[:, :3] + 1) % vocabulary
        training = self.training
        self.eval()  # without the dropout of an adapter
        alone, moved = self.outputs_alone(ids, lengths), self.outputs_alone(changed, lengths)
        padded = [row[:n] for row, n in zip(self.outputs(ids, mask), lengths)]
        packed = packing.pack(ids, mask).to(self.device)
        inputs = packing.packed_inputs(packed, self.hf.dtype)
        states = self.hf.base_model(**inputs, use_cache=False).last_hidden_state[0]
        together = [
            self.head(states[packed.gather_index[i, :n]]).float() for i, n in enumerate(lengths)
        ]
        self.train(training)
        # The scale of a difference: how far outputs move when a sequence begins with other tokens.
        effect = min(float((a - b).abs().mean(-1)[6:].mean()) for a, b in zip(moved, alone))
        # Rounding of float32 moves them by less than 1e-4 of that. In low precision it depends on
        # the weights (0.05 random ones, 0.4 some trained ones), so it is measured: a padded batch
        # rounds unlike single sequences too.
        exact = self.hf.dtype == torch.float32 and not torch.is_autocast_enabled(self.device.type)
        if exact:
            return largest_difference(together, alone) < 1e-3 * effect
        rounding = largest_difference(padded, alone)
        bound = min(0.1 * effect + 2 * rounding, 0.8 * effect)
        return largest_difference(together, alone) < bound

    def outputs_alone(self, ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """`outputs` of each sequence of a batch alone, (T, V or d) each."""
        rows = [ids[i : i + 1, :n] for i, n in enumerate(lengths)]
        return [self.outputs(row, torch.ones_like(row))[0] for row in rows]


def largest_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest mean difference of a token's outputs, (T, V or d) each."""
    return max(float((a - b).abs().mean(-1).max()) for a, b in zip(found, expected))


class Policy(Model):
    """A causal language model that gives the log-probabilities of tokens."""

    def __init__(self, hf: PreTrainedModel):
        super().__init__(hf)
        head = hf.get_output_embeddings()
        if type(head) is nn.Linear:
            logprobs.attach_chunked_logprobs(head)
        else:
            self.can_pack = False

    def outputs(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.hf(**model_inputs(self.hf, ids, mask), use_cache=False).logits.float()

    def head(self, states: Tensor) -> Tensor:
        return self.hf.get_output_embeddings()(states)

    def forward(
        self, ids: Tensor, mask: Tensor, target_mask: Tensor, temperature: float = 1.0
    ) -> TokenStats:
        """Log-probabilities of tokens, given the tokens before them in their rows.

        Args:
            ids, mask: (B, T), padded on either side, in host memory.
            target_mask: (B, T) bool, the tokens to score; not the first of a row; in host memory.
            temperature: divides the logits, in float32.
        """
        rows, columns = target_mask.nonzero(as_tuple=True)
        if self.supports_packing():
            states, index = self.hidden(ids, mask)
            picked = (ids[rows, columns], index[rows, columns - 1], rows, columns)
            targets, before, rows, columns = upload(self.device, *picked)
            stats = self.hf.get_output_embeddings()(states[before], targets, temperature)
        else:
            first = int(columns.min()) if len(columns) else ids.shape[1]
            inputs = model_inputs(self.hf, ids, mask)
            kept = ids.shape[1] - first + 1
            output = self.hf(**inputs, use_cache=False, logits_to_keep=kept)
            targets, rows, columns = upload(self.device, ids[rows, columns], rows, columns)
            logits = output.logits[rows, columns - first]
            is_argmax = (logits.argmax(-1) == targets).float()
            stats = (*token_logprobs(logits, targets, temperature), is_argmax)
        zeros = torch.zeros(ids.shape, device=self.device)
        return TokenStats(*(zeros.index_put((rows, columns), x) for x in stats))


class Scorer(Model):
    """A sequence-classification model with one label.

    It is a reward model, or a critic, whose score at each token is the value. Scores are normalised
    by `score_mean` and `score_std` in the model's configuration; the reward stage measures them on
    held-out demonstrations.
    """

    def outputs(self, ids: Tensor, mask: Tensor) -> Tensor:
        base = self.hf.base_model
        return base(**model_inputs(base, ids, mask), use_cache=False).last_hidden_state.float()

    def head(self, states: Tensor) -> Tensor:
        return states

    def forward(self, ids: Tensor, mask: Tensor, with_padding: bool = False) -> Tensor:
        """Score at each token.

        Args:
            ids, mask: (B, T), padded on either side, in host memory.
            with_padding: score the padding tokens too; otherwise padding has the score of the last
                real token before it.
        Returns: (B, T) float32, normalised units, on the model's device.
        """
        states, host_index = self.hidden(ids, mask, with_padding)
        (index,) = upload(self.device, host_index)
        raw = self.hf.score(states)[:, 0].float()[index]
        mean = getattr(self.hf.config, "score_mean", 0.0)
        return (raw - mean) / getattr(self.hf.config, "score_std", 1.0)


def last_token_score(scores: Tensor, mask: Tensor) -> Tensor:
    """The score of each sequence, (B,): that at its last real token.

    Args: scores (B, T) on any device.  mask (B, T) in host memory.
    """
    (last,) = upload(scores.device, (torch.arange(mask.shape[1]) * mask).argmax(1))
    return scores.gather(1, last[:, None])[:, 0]


def sequence_scores(
    scorer: Engine[Scorer] | Scorer, ids: Tensor, mask: Tensor, eos_id: int
) -> Tensor:
    """Scores of sequences, (B,), read at the position that the model was trained for.

    That is the last token, or with `score_before_eos` in its configuration (rm.loss=per_token) the
    one before the EOS. Args: ids, mask (B, T), in host memory.
    """
    at_tokens = scorer(ids, mask)
    read_mask = without_eos(ids, mask, eos_id) if reads_before_eos(scorer) else mask
    return last_token_score(at_tokens, read_mask)


def reads_before_eos(scorer: Engine[Scorer] | Scorer) -> bool:
    """Whether a reward model gives its score at the token before the EOS."""
    module = scorer if isinstance(scorer, Scorer) else scorer.module
    return bool(getattr(module.hf.config, "score_before_eos", False))


def without_eos(ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """A mask as DeepSpeed-Chat derives it from ids, where EOS is the padding. Shapes (B, T)."""
    return mask * (ids != eos_id)


def device_of(hf: PreTrainedModel) -> torch.device:
    """Where a model computes; a weight that ZeRO-3 has partitioned knows it too."""
    device: torch.device = hf.get_input_embeddings().weight.device
    return device


def model_inputs(hf: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Arguments of a padded forward pass, on the model's device; positions count real tokens only.

    Args: ids, mask (B, T), in host memory.
    """
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(hf.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return dict(zip(inputs, upload(device_of(hf), *inputs.values())))

"""Policy and Scorer: the two thin modules that the engines train."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.models import logprobs, packing
from rlhf.models.logprobs import token_logprobs


class Model(nn.Module):
    """What policy and scorer share: hidden states of the tokens of a batch, without its padding where the architecture allows that."""

    def __init__(self, hf: Any):
        super().__init__()
        self.hf = hf
        self.recorded: Any = None  # of the sampling loop (rlhf/decode.py)
        self.plain: bool | None = (
            None if packing.use_packed_attention(hf) else False
        )  # None: to be tried at the first forward

    outputs: Callable[
        [Tensor], Tensor
    ]  # of one sequence, ids (1, T), as the model itself gives them, (T, V or d)
    head: Callable[[Tensor], Tensor]  # the same from hidden states (T, d)

    def hidden(self, ids: Tensor, mask: Tensor, padded: bool = False) -> tuple[Tensor, Tensor]:
        """Hidden states of some tokens, (N, d), and the number among them of each place in the batch (B, T), at padding of the last real
        token before it. Args: ids, mask (B, T).  padded: states of the padding too."""
        if padded or not self.is_plain():
            states = self.hf.base_model(
                **model_inputs(self.hf.base_model, ids, mask), use_cache=False
            ).last_hidden_state
            place = torch.arange(ids.numel(), device=ids.device).view_as(ids)
            if not padded:
                place = torch.where(mask > 0, place, -1).cummax(1).values.clamp(min=0)
            return states.flatten(0, 1), place
        layout = packing.pack(ids, mask)
        return self.hf.base_model(
            **packing.packed_inputs(layout, self.hf.dtype), use_cache=False
        ).last_hidden_state[0], layout.place

    def is_plain(self) -> bool:
        """Whether it is computed without padding, and a policy's logits are the product of hidden states and output layer."""
        if self.plain is None:
            self.plain = self.agrees()
        return self.plain

    @torch.no_grad()
    def agrees(self) -> bool:
        """Whether what is computed without padding is what the model itself computes of each sequence alone. It is tried: three texts,
        two of which begin alike. A model with another attention, or one that scales its logits, is used as it is."""
        vocabulary = self.hf.get_input_embeddings().num_embeddings
        random = torch.randint(vocabulary, (3, 32), generator=torch.Generator().manual_seed(0))
        random[1, :20] = random[0, :20]
        lengths, device = [32, 27, 24], self.hf.get_input_embeddings().weight.device
        ids, mask = (
            random.to(device),
            (torch.arange(32) < torch.tensor(lengths)[:, None]).long().to(device),
        )
        changed = ids.clone()
        changed[:, :3] = (changed[:, :3] + 1) % vocabulary
        training = self.training
        self.eval()  # without the dropout of an adapter
        alone = [self.outputs(ids[i : i + 1, :n]) for i, n in enumerate(lengths)]
        moved = [self.outputs(changed[i : i + 1, :n]) for i, n in enumerate(lengths)]
        layout = packing.pack(ids, mask)
        states = self.hf.base_model(
            **packing.packed_inputs(layout, self.hf.dtype), use_cache=False
        ).last_hidden_state[0]
        together = [self.head(states[layout.place[i, :n]]).float() for i, n in enumerate(lengths)]
        self.train(training)
        # What counts as a difference: how far the outputs move when a text begins with other tokens. Rounding of float32 moves them less
        # than 1e-4 times as far, that of bf16 at most 0.05 times (7 families, random weights, 2 to 12 layers).
        error = max(float((a - b).abs().mean(-1).max()) for a, b in zip(together, alone))
        effect = min(float((a - b).abs().mean(-1)[6:].mean()) for a, b in zip(moved, alone))
        exact = self.hf.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
        return error < (1e-3 if exact else 0.25) * effect


class Policy(Model):
    """A causal language model that gives the log-probabilities of tokens."""

    def __init__(self, hf: Any):
        super().__init__(hf)
        head = hf.get_output_embeddings()
        if type(head) is nn.Linear:
            logprobs.attach_chunked_logprobs(head)
        else:
            self.plain = False

    def outputs(self, ids: Tensor) -> Tensor:
        return self.hf(input_ids=ids, use_cache=False).logits[0].float()

    def head(self, states: Tensor) -> Tensor:
        return self.hf.get_output_embeddings()(states)

    def forward(
        self, ids: Tensor, mask: Tensor, wanted: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of tokens, given those before them in their rows.

        Args: ids, mask (B, T), padded on either side.  wanted (B, T) bool: of which tokens; no row's first one.  temperature: divides
            the logits, in float32.
        Returns: three tensors (B, T), float32, zero where not wanted: log-probability, entropy of the whole distribution (both with
            gradient, nats), and 1 where the token is the likeliest.
        """
        rows, columns = wanted.nonzero(as_tuple=True)
        targets = ids[rows, columns]
        if self.is_plain():
            states, place = self.hidden(ids, mask)
            found = self.hf.get_output_embeddings()(
                states[place[rows, columns - 1]], targets, temperature
            )
        else:
            first = int(columns.min()) if len(columns) else ids.shape[1]
            kept = self.hf(
                **model_inputs(self.hf, ids, mask),
                use_cache=False,
                logits_to_keep=ids.shape[1] - first + 1,
            ).logits
            logits = kept[rows, columns - first]
            found = (
                *token_logprobs(logits, targets, temperature),
                (logits.argmax(-1) == targets).float(),
            )
        dense = (
            torch.zeros(ids.shape, device=ids.device).index_put((rows, columns), x) for x in found
        )
        return tuple(dense)  # type: ignore[return-value]


class Scorer(Model):
    """A sequence-classification model with one label: reward model, or critic (its score at each token is the value).

    Scores are normalised by the mean and standard deviation in the model's configuration (`score_mean`, `score_std`), which
    the reward stage measures on held-out demonstrations.
    """

    def outputs(self, ids: Tensor) -> Tensor:
        return self.hf.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].float()

    def head(self, states: Tensor) -> Tensor:
        return states

    def forward(self, ids: Tensor, mask: Tensor, padded: bool = False) -> Tensor:
        """Score at each token. Args: ids, mask (B, T), padded on either side.  padded: at padding too, as it would be read there; else
        padding has the score of the last real token before it.  Returns: (B, T) float32, normalised units."""
        states, place = self.hidden(ids, mask, padded)
        raw = self.hf.score(states)[:, 0].float()[place]
        return (raw - getattr(self.hf.config, "score_mean", 0.0)) / getattr(
            self.hf.config, "score_std", 1.0
        )


def last_token_score(scores: Tensor, mask: Tensor) -> Tensor:
    """The score of the whole sequence: that of its last real token. Args: scores, mask (B, T).  Returns: (B,)."""
    last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
    return scores.gather(1, last[:, None])[:, 0]


def answer_scores(scorer: Any, ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """Scores of whole sequences, (B,), read where the model has learnt to be read: at the last token, or with `score_before_eos` in its
    configuration (rm.loss=per_token) before the EOS. Args: scorer: module or engine.  ids, mask (B, T)."""
    at_tokens = scorer(ids, mask)
    return last_token_score(
        at_tokens, without_eos(ids, mask, eos_id) if reads_before_eos(scorer) else mask
    )


def reads_before_eos(scorer: Any) -> bool:
    """Whether a reward model (module or engine) gives its score at the token before the EOS."""
    return bool(getattr(getattr(scorer, "module", scorer).hf.config, "score_before_eos", False))


def without_eos(ids: Tensor, mask: Tensor, eos_id: int) -> Tensor:
    """A mask as DeepSpeed-Chat guesses it from ids, where EOS is the padding. Shapes (B, T)."""
    return mask * (ids != eos_id)


def model_inputs(hf: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward: positions count real tokens only, wherever the padding is."""
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(hf.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs

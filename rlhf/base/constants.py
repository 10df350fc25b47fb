"""Numbers that the code that trains and the plan of its memory share. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LogprobChunks:
    """How rlhf/models/logprobs.py divides tokens, whose logits it computes a chunk at a time."""

    max_tokens: int
    min_tokens: int  # with fewer the matrix product is slow
    max_logits: int  # elements of the logits of a chunk, within these bounds
    kept_probabilities: int  # for the backward pass; those of further chunks are recomputed


LOGPROB_CHUNKS = {
    # 8 MiB of logits, which stay in the cache; 64 MiB of probabilities
    "cpu": LogprobChunks(512, 64, 2**21, 2**24),
    # each chunk starts as many kernels whatever its size: 1 GiB of logits (not yet measured)
    "gpu": LogprobChunks(4096, 64, 2**28, 2**28),
}

# rlhf/data/sandbox/: prompts of the built-in world (24 things x 12 questions x 5 wishes about
# length x 5 about tone), and the shares of the training prompts at which the part of SFT and the
# part of the reward model end; the rest is for the online algorithms
SANDBOX_PROMPTS = 7200
SANDBOX_SPLIT = (0.4, 0.8)
# held-out prompts of a built-in world; data.eval_rows of them are looked at
WORLD_HELD_OUT = 256
# held-out demonstrations that the unit of reward scores is measured on, whatever data.eval_rows is
SCORE_UNIT_ROWS = 256

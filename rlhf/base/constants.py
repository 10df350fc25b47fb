"""Numbers that the code that trains and the plan of its memory share. No torch here."""

from __future__ import annotations

# rlhf/models/logprobs.py: tokens whose logits are computed at a time
MAX_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS = 64  # with fewer tokens the matrix product is slow
# Elements of the logits of a chunk, within these bounds: 8 MiB, which stay in the cache of a CPU.
CHUNK_LOGITS = 2**21
# Probabilities kept for the backward pass, 16 MiB; those of further chunks are computed again.
KEPT_PROBABILITIES = 2**22

# rlhf/data/sandbox/: prompts of the built-in world (24 things x 12 questions x 5 wishes about
# length x 5 about tone), and the shares of the training prompts at which the part of SFT and the
# part of the reward model end; the rest is for the online algorithms
SANDBOX_PROMPTS = 7200
SANDBOX_SPLIT = (0.4, 0.8)
# held-out prompts of a built-in world; data.eval_rows of them are looked at
WORLD_HELD_OUT = 256
# held-out demonstrations that the unit of reward scores is measured on, whatever data.eval_rows is
SCORE_UNIT_ROWS = 256

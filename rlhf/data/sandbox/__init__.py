"""The sandbox: a small preference world whose gold reward is known.

People ask for help with something they own, and may wish for a short or a detailed answer, a
friendly or a plain one. Writers of different care answer. `gold_reward` says how good an answer is
*for its prompt*, so whatever is trained here can be compared with the ground truth: a reward model
with noise-free labels, a policy with the best possible answer.

Everything is made by code from `data.seed`; no files, no torch. The same seed makes the same world
on every machine.
"""

from rlhf.data.sandbox.ground_truth import best_gold_of_turns, gold, gold_of_turns
from rlhf.data.sandbox.world import build_world

__all__ = ["best_gold_of_turns", "build_world", "gold", "gold_of_turns"]

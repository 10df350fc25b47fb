"""The arithmetic world: problems whose answer can be checked, for verifiable rewards (RLVR).

A prompt asks for a sum or a product. A response works it out digit by digit and ends with a number,
which is right or wrong. Many demonstrations make a mistake, so that a policy trained on them knows
how to calculate and has bad habits. The gold reward is 1 where the number at the end is right, else
0.

Everything is made by code from `data.seed`; no files, no torch. The same seed makes the same world
on every machine.
"""

from rlhf.data.arithmetic.problems import best_gold_of_turns, gold_of_turns
from rlhf.data.arithmetic.world import build_world

__all__ = ["best_gold_of_turns", "build_world", "gold_of_turns"]

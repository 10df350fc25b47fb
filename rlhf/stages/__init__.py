"""One readable file per stage: sft, rm, rl (PPO, RLOO, GRPO), dpo, evaluate, inspect.

Stages do not import each other.
"""

"""Online RL: experience, rewards, advantages, losses, guards and warnings.

The loop that uses them is rlhf/stages/rl.py.
"""

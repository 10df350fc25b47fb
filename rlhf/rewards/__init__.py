"""Reward functions in TRL's convention: the user's, a server's, a judge's.

Not here: the built-in ones (rlhf/verifiers.py), and how rewards become advantages (rlhf/rl).
"""

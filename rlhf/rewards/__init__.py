"""Reward functions: the user's and the built-in ones, and the process that they run in.

No torch and no models here: reward models are loaded and asked by rlhf/rl/rewards.py.
"""

"""Reward functions (the user's, built-in ones, servers, judges), and the process that they run in.

No torch and no models here: reward models are loaded and asked by rlhf/rl/rewards.py.
"""

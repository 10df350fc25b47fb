"""Conversations with a policy: models, turns, feedback.

Keyboard and screen are chat.py's.
"""

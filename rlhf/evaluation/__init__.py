"""Measure policies and reward models on held-out data, with statistics.

Nothing is trained here.
"""

"""DeepSpeed engines, their configuration, and collectives across ranks.

Models and losses live elsewhere.
"""

"""Hugging Face models as the engines train them: loading, saving, LoRA, packing, log-probabilities.

How they are trained or sampled is not decided here.
"""

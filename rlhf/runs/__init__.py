"""Run directories: identity, inputs, locks, worker processes, history, model card.

What is inside a model or a data set is not known here. Torch is never imported here.
"""

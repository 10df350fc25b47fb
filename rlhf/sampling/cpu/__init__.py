"""The optional fast path of the sampler on CPUs: compiled kernels and a traced decoding step.

GPUs never use it.
"""

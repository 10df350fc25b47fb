"""Turn prompts into responses: the sampler, token choice, KV cache, transformers' generate.

cpu/ has the optional fast path for CPUs; nothing here scores or trains.
"""

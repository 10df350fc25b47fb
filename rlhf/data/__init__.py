"""From files and the hub to batches of token ids: sources, formats, splits, templates, the sandbox.

No model is loaded here.
"""

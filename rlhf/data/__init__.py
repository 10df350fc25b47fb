"""From files and the hub to batches of token ids: sources, formats, splits, templates.

The built-in worlds, sandbox and arithmetic, are made by code. No model is loaded here.
"""

"""From files and hubs to token batches: formats, sources, splits, templates, the built-in world.

No model is loaded here.
"""

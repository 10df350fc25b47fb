"""What people look at: tables in the terminal, HTML pages, curves, the W&B workspace.

Numbers come from run directories; nothing is computed by a model here.
"""

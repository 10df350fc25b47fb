"""What a stage needs before it starts: model shapes, memory, steps, and the summary in words.

Formulas only: nothing is loaded. Torch is never imported here.
"""

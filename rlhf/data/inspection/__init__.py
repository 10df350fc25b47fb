"""Measurements of the data for stage=inspect: lengths, limits, length bias, leakage.

No verdicts here (rlhf/stages/inspect.py), and no page (rlhf/reporting/inspect_page.py).
"""

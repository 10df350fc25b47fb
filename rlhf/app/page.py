"""The page: one tab for each thing that can be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from rlhf.app import arena_tab, chat_tab, data_tab, runs_tab


def build(roots: Sequence[Path]) -> gr.Blocks:
    """Args: roots: folders with outputs/ and multirun/."""
    with gr.Blocks(title="rlhf") as page:
        with gr.Tab("Runs"):
            runs_tab.build(roots)
        with gr.Tab("Chat"):
            chat_tab.build(roots)
        with gr.Tab("Arena"):
            arena_tab.build(roots)
        with gr.Tab("Data"):
            data_tab.build(roots)
    return page

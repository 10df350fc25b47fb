"""Inputs that several tabs have."""

from __future__ import annotations

import gradio as gr

from rlhf.chat.policy import Params


def model_dropdown(label: str, info: str, elem_id: str) -> gr.Dropdown:
    """A choice of several models; what is typed counts as a directory or hub id."""
    return gr.Dropdown(
        [],
        value=[],
        label=label,
        info=info,
        multiselect=True,
        allow_custom_value=True,
        min_width=250,
        elem_id=elem_id,
    )


def sampling_inputs() -> list[gr.Number]:
    """Inputs of temperature, top_p, top_k and max_new_tokens, in this order."""
    return [
        gr.Number(Params.temperature, label="temperature", min_width=100, step=0.1),
        gr.Number(Params.top_p, label="top_p", min_width=100, step=0.05),
        gr.Number(Params.top_k, precision=0, label="top_k", min_width=100),
        gr.Number(Params.max_new_tokens, precision=0, label="max_new_tokens", min_width=100),
    ]

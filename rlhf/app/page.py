"""The page: one tab for each thing that can be looked at; and the server that shows it."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI

from rlhf.app import arena_tab, chat_tab, data_tab, pages, runs_tab
from rlhf.app.guard import Guard

FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # local
CSS = """
.gradio-container { max-width: min(1500px, 100vw) !important; min-width: 0;
  width: 100%; margin: auto; }
.run-details { overflow-wrap: anywhere; }
.run-details pre { white-space: pre-wrap; }
.run-details .scroll { overflow-x: auto; }
.run-details td { vertical-align: top; padding: .2em .6em; white-space: pre-wrap; }
.run-details th { text-align: left; padding: .2em .6em; }
.run-details dl { display: grid; grid-template-columns: minmax(6em, max-content) 1fr; gap: 0 1em; }
.run-details dd { margin: 0; } .run-details .warning { color: #c2410c; }
#runs-options .form { flex-wrap: wrap; } #runs-options .form > * { min-width: 140px !important; }
#data-log textarea { font: 12px ui-monospace, monospace; white-space: pre; overflow-x: auto; }
.run-details a { text-decoration: underline; }
"""


def build(roots: Sequence[Path]) -> gr.Blocks:
    """The page. Args: roots: folders with outputs/ and multirun/."""
    with gr.Blocks(title="rlhf", analytics_enabled=False) as page:
        with gr.Tab("Runs"):
            runs_tab.build(roots)
        with gr.Tab("Chat"):
            chat_tab.build(roots)
        with gr.Tab("Arena"):
            arena_tab.build(roots)
        with gr.Tab("Data"):
            data_tab.build(roots)
    return page


def application(roots: Sequence[Path], token: str = "") -> Guard:
    """The page as an ASGI application. Args: roots: as of `build`.  token: as of Guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)  # its pages load from a CDN
    app.routes.append(pages.route(roots))
    gr.mount_gradio_app(
        app,
        build(roots),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=gr.themes.Default(**FONTS),
        css=CSS,
    )
    return Guard(app, token)


def serve(application: Guard, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C. Args: listening: a bound socket."""
    config = uvicorn.Config(
        application, log_level="warning", ws="none", timeout_graceful_shutdown=1, access_log=False
    )
    server = uvicorn.Server(config)
    # browsers stay connected: that their requests are cut off at the end is no error
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    server.run(sockets=[listening])

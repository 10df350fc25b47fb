"""The tab of data: the page of stage=inspect for a source, made here or found in outputs/."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from markupsafe import Markup

from rlhf.app import pages
from rlhf.base.commands import CHECKOUT
from rlhf.base.log import printable, valid_text
from rlhf.base.own_processes import own_source
from rlhf.config import presets

FRAME = Markup(
    '<iframe src="{}" title="inspection" sandbox="allow-scripts"'
    ' style="width: 100%; height: 75vh; border: 1px solid #ccc; background: white"></iframe>'
)
MAX_LOG = 4000  # characters that are shown of what the command prints


def build(roots: Sequence[Path]) -> None:
    """Args: roots: folders with outputs/ and multirun/; new pages are made in the first one."""
    with gr.Row():
        data = gr.Dropdown(
            presets.options("data"), value="sandbox", label="Data", elem_id="data-source"
        )
        more = gr.Textbox(
            label="Other settings, as for train.py",
            placeholder="data.sources.mine.path=pairs.jsonl actor=tiny",
            max_lines=1,
            elem_id="data-settings",
        )
        start = gr.Button("Inspect", variant="primary", elem_id="data-start")
    log = gr.Textbox(label="What it prints", lines=4, max_lines=12, elem_id="data-log")
    found = gr.Dropdown(
        [], label="Pages in outputs/", allow_custom_value=True, elem_id="data-pages"
    )
    shown = gr.HTML(elem_id="data-page")

    options = {"api_visibility": "private", "show_progress": "hidden"}
    Context.root_block.load(
        lambda: gr.Dropdown(choices=page_choices(roots)), None, found, **options
    )
    start.click(inspector(roots), [data, more], [start, log, found, shown], **options)
    found.input(lambda page: frame_of(page, roots), found, shown, **options)


def inspect_pages(roots: Sequence[Path]) -> list[Path]:
    """The pages of stage=inspect in these folders, the newest first."""
    found = [file for root in roots for file in root.glob("outputs/inspect-*/report.html")]
    times = {}
    for file in found:
        if file.is_file() and pages.has_address(file):
            times[file.resolve()] = file.stat().st_mtime
    return sorted(times, key=lambda file: -times[file])


def page_choices(roots: Sequence[Path]) -> list[tuple[str, str]]:
    """The pages by the names of their directories."""
    return [(file.parent.name, str(file)) for file in inspect_pages(roots)]


def frame_of(page: str | None, roots: Sequence[Path]) -> str:
    """A frame with a page; a line where it is not there."""
    if not page:
        return ""
    file = pages.served_file(page, roots)
    if file is None:
        return Markup("<p>{}: no page there</p>").format(valid_text(page))
    # the time makes a browser load a page anew that was written again
    return FRAME.format(f"{pages.address(file)}?{file.stat().st_mtime_ns}")


def inspector(roots: Sequence[Path]) -> Callable[[str, str], Iterator[list[Any]]]:
    """The function that inspects and shows the page. Args: roots: as of `build`."""

    def inspect(data: str, more: str) -> Iterator[list[Any]]:
        try:
            arguments = [f"data={data}", *shlex.split(more or ""), "stage=inspect"]
        except ValueError as error:
            yield [gr.skip(), f"Other settings: {error}", gr.skip(), gr.skip()]
            return
        before = {page: page.stat().st_mtime_ns for page in inspect_pages(roots)}
        text = f"$ python train.py {shlex.join(arguments)}\n"
        busy = gr.Button("Inspecting ...", interactive=False)
        yield [busy, text, gr.skip(), gr.skip()]
        for line in run_command(arguments, roots[0]):
            text += printable(line)
            yield [busy, text[-MAX_LOG:], gr.skip(), gr.skip()]
        new = [p for p in inspect_pages(roots) if before.get(p) != p.stat().st_mtime_ns]
        value = str(new[0]) if new else None
        pages_now = gr.Dropdown(choices=page_choices(roots), value=value)
        ready = gr.Button("Inspect", interactive=True)
        yield [ready, text[-MAX_LOG:], pages_now, frame_of(value, roots)]

    return inspect


def run_command(arguments: Sequence[str], folder: Path) -> Iterator[str]:
    """The lines that `python train.py ARGUMENTS` prints."""
    process = subprocess.Popen(
        [sys.executable, str(CHECKOUT / "train.py"), *arguments],
        cwd=folder,
        env=os.environ | own_source() | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout
    with process, process.stdout as output:
        try:
            yield from output
        finally:  # also where the browser has gone
            process.terminate()

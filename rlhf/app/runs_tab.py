"""The tab of runs: a table, live curves of the chosen ones, and what each of them is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData
from gradio.context import Context

from rlhf.app import runs_view
from rlhf.app.runs_view import MAX_FIGURES, Listed
from rlhf.reporting.report_figures import Figure, plain

SECONDS = 3.0  # between two looks at the runs
BROWSERS = 4  # that are answered at once
CHART_HEIGHT = 260  # pixels
WINDOWS = [1, 3, 9, 27, 81]
CONFIG = {"displaylogo": False, "displayModeBar": False}  # of plotly


@dataclass
class Look:
    """The components of the tab, in the order of their updates."""

    table: gr.Dataframe
    chosen: gr.Dropdown
    group_by: gr.Dropdown
    note: gr.HTML
    legend: gr.HTML
    plots: list[gr.Plot]
    details: gr.HTML
    before: gr.State  # what this browser shows: only what changes is sent

    def outputs(self) -> list[Any]:
        """All of them, flat."""
        return [
            self.table,
            self.chosen,
            self.group_by,
            self.note,
            self.legend,
            *self.plots,
            self.details,
            self.before,
        ]


def build(roots: Sequence[Path]) -> None:
    """Args: roots: folders with outputs/ and multirun/."""
    with gr.Row():
        words = gr.Textbox(label="Filter", placeholder="ppo lr=1e-5 finished", max_lines=1)
        group_by = gr.Dropdown([], multiselect=True, label="Group by", allow_custom_value=True)
    table = gr.Dataframe(
        headers=runs_view.HEADER,
        datatype="str",
        type="array",
        interactive=False,
        max_height=330,
        max_chars=80,
        show_label=False,
        elem_id="runs-table",
    )
    note = gr.HTML(elem_id="runs-note")
    chosen = gr.Dropdown(
        [],
        multiselect=True,
        label="Runs to show (or click on rows of the table)",
        allow_custom_value=True,  # a run that is deleted meanwhile is no error
        elem_id="runs-chosen",
    )
    with gr.Row(elem_id="runs-options"):
        follow = gr.Checkbox(
            True, label="also what is running", elem_id="runs-follow", min_width=140
        )
        window = gr.Dropdown(WINDOWS, value=1, label="Running mean over steps", min_width=140)
        log_axis = gr.Checkbox(False, label="log axis", min_width=140)
        by_seed = gr.Checkbox(False, label="single runs, no bands", min_width=140)
    legend = gr.HTML(elem_id="runs-legend")
    with gr.Row(elem_id="runs-plots"):
        plots = [
            gr.Plot(visible=False, show_label=False, min_width=330) for _ in range(MAX_FIGURES)
        ]
    details = gr.HTML(elem_id="runs-details")
    look = Look(table, chosen, group_by, note, legend, plots, details, gr.State({}))
    settings = [words, group_by, chosen, follow, window, log_axis, by_seed]

    update = updater(roots)
    inputs = [look.before, *settings]
    options = {
        "show_progress": "hidden",
        "concurrency_limit": BROWSERS,
        "api_visibility": "private",
    }
    timer = gr.Timer(SECONDS)
    gr.on(
        [Context.root_block.load, timer.tick, *(one.change for one in settings)],
        update,
        inputs,
        look.outputs(),
        trigger_mode="always_last",
        **options,
    )
    table.select(choose, [chosen], [chosen], **options)


def choose(chosen: list[str], event: gr.SelectData) -> list[str]:
    """Add the run of a clicked row, or remove it where it is there."""
    name = event.row_value[runs_view.HEADER.index("run")]
    return [one for one in chosen if one != name] if name in chosen else [*chosen, name]


def updater(roots: Sequence[Path]) -> Callable[..., list[Any]]:
    """The function that brings a browser up to date. Args: roots: as of `build`."""

    def update(
        before: dict[str, Any], words: str, group_by: list[str], chosen: list[str], *how: Any
    ) -> list[Any]:
        listed = runs_view.list_runs(roots)
        # that a run is gone is said until another choice is made
        known = before.get("shown", [])
        if chosen == before.get("chosen", []):
            known = [*before.get("gone", []), *known]
        now = state_of(listed, words or "", group_by or [], chosen or [], *how, known=known)
        sent = {key: digest(value) for key, value in now.items()}
        changed = {key for key in now if before.get("sent", {}).get(key) != sent[key]}
        memory = {key: now[key] for key in ("chosen", "shown", "gone")}
        return [*updates(now, changed), memory | {"sent": sent}]

    return update


def state_of(
    listed: Listed,
    words: str,
    group_by: list[str],
    chosen: list[str],
    follow: bool,
    window: int,
    log_axis: bool,
    by_seed: bool,
    *,
    known: Sequence[str] = (),
) -> dict[str, Any]:
    """All that the tab shows, as JSON types, by the name of its component.

    Args: the components' values.  known: runs that were shown, or said to be gone, before.
    """
    there = set(listed.names)
    kept = [name for name in chosen if name in there]
    gone = [name for name in dict.fromkeys([*known, *chosen]) if name not in there]
    names = [*kept, *(listed.running() if follow else [])]
    shown = listed.named(names)
    drawing = runs_view.draw(shown, group_by, int(window or 1), log_axis, by_seed)
    notes = [*listed.problems]
    if not listed.runs:
        notes.append("No runs yet. Start one: python train.py")
    if gone:
        notes.append(f"no longer there: {', '.join(gone)}")
    if drawing.hidden:
        notes.append(f"{drawing.hidden} more figures are not shown: choose fewer runs")
    return {
        "table": runs_view.table(listed, words, group_by, names),
        "choices": listed.names,
        "chosen": kept,
        "is_cut": len(kept) < len(chosen),  # of what the browser has chosen, some is gone
        "shown": names,
        "gone": gone,
        "groups": runs_view.settings_that_differ(listed.runs),
        "note": "".join(map(runs_view.escaped, notes)),
        "legend": drawing.legend,
        "figures": [figure_json(title, figure) for title, figure in drawing.figures],
        "details": runs_view.details(shown),
    }


def digest(value: Any) -> str:
    """A short text that differs where JSON values differ."""
    return hashlib.sha1(json.dumps(value).encode(errors="replace")).hexdigest()


def updates(now: dict[str, Any], changed: set[str]) -> list[Any]:
    """The updates of all components but the state. Args: changed: names in `now`."""
    dropdown: dict[str, Any] = {}
    if "choices" in changed:
        dropdown["choices"] = now["choices"]
    if now["is_cut"]:
        dropdown |= {"value": now["chosen"], "multiselect": True}
    plots = [gr.skip()] * MAX_FIGURES
    if "figures" in changed:
        shown = now["figures"]
        plots = [
            gr.Plot(PlotData(type="plotly", plot=shown[i]), visible=True)
            if i < len(shown)
            else gr.Plot(visible=False)
            for i in range(MAX_FIGURES)
        ]

    def text(name: str) -> Any:
        return now[name] if name in changed else gr.skip()

    return [
        text("table"),
        gr.Dropdown(**dropdown) if dropdown else gr.skip(),
        gr.Dropdown(choices=now["groups"]) if "groups" in changed else gr.skip(),
        text("note"),
        text("legend"),
        *plots,
        text("details"),
    ]


def figure_json(title: str, figure: Figure) -> str:
    """A figure with its title, as plotly.js reads it."""
    layout = figure["layout"] | {
        "title": {"text": plain(title), "font": {"size": 13}},
        "height": CHART_HEIGHT,
        "margin": {"l": 8, "r": 8, "t": 34, "b": 8},
    }
    return json.dumps({"data": figure["data"], "layout": layout, "config": CONFIG})

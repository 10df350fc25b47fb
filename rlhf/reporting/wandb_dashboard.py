"""A W&B workspace with the panels of each stage: reward, KL, loss and length of runs side by side.

    pip install -e '.[dashboard]'
    python -m rlhf.dashboard [--project rlhf] [--entity ME]

Saves a view in the project and prints its address. It talks to the server, so it needs a key
(`wandb login`).
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from rlhf.base.log import first_line
from rlhf.runs.stage_views import DPO, ONLINE_RL, RM, SFT

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


def dashboard_sections() -> dict[str, dict[str, list[str]]]:
    """Metrics of each panel, by section and title; stages that share a section share its panels."""
    sections: dict[str, dict[str, list[str]]] = {}
    for view in (ONLINE_RL, DPO, SFT, RM):
        section = sections.setdefault(view.dashboard_section, {})
        for panel in view.dashboard or view.panels:
            metrics = section.setdefault(panel.title, [])
            metrics += [metric for metric in panel.metrics if metric not in metrics]
    return sections


def build_workspace(project: str, entity: str) -> Workspace:
    """The W&B view, not saved yet."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[
                panels.LinePlot(title=title, x="step", y=metrics)
                for title, metrics in section.items()
            ],
        )
        for name, section in dashboard_sections().items()
    ]
    sections.append(
        workspaces.Section(
            name="Responses", panels=[panels.WeavePanelSummaryTable(table_name="completions")]
        )
    )
    settings = workspaces.WorkspaceSettings(x_axis="step")
    return workspaces.Workspace(
        name="RLHF", entity=entity, project=project, sections=sections, settings=settings
    )


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.dashboard",
        description="Save a W&B dashboard for the runs of a project.",
    )
    parser.add_argument(
        "--project", default="rlhf", help="as wandb.project of the runs (default: rlhf)"
    )
    parser.add_argument("--entity", default=None, help="user or team (default: yours)")
    args = parser.parse_args()
    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        fix = "pip install -e '.[dashboard]'"
        print(f"error: wandb-workspaces is not installed: {fix}", file=sys.stderr)
        return 2
    import wandb

    try:
        view = build_workspace(args.project, args.entity or wandb.Api(timeout=15).default_entity)
        view.save()
    except Exception as error:  # the client raises many kinds
        text = f"{type(error).__name__}: {first_line(error)}; log in with `wandb login`"
        print(f"error: {text}", file=sys.stderr)
        return 1
    print(view.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())

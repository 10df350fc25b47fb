"""A ready W&B dashboard for these runs: reward, KL, loss and length of each, side by side.

    pip install 'rlhf[dashboard]'
    python -m rlhf.dashboard [--project rlhf] [--entity ME]

Saves a view into the project and prints its address. Needs a key (`wandb login`), as it talks to the server.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

PANELS = {  # section: title and metrics of each panel
    "PPO, RLOO, GRPO": [
        ("Score and gold reward", ["objective/scores", "reward/gold/mean"]),
        ("KL to the SFT policy, nats per answer", ["objective/kl"]),
        ("score - beta KL", ["objective/rlhf_reward"]),
        ("Policy and value loss", ["loss/policy_avg", "loss/value_avg"]),
        ("Length, tokens", ["tokens/response_mean"]),
        ("Explained variance of the critic", ["val/explained_variance"]),
    ],
    "DPO": [
        ("Loss", ["loss"]),
        ("Accuracy", ["rewards/accuracies"]),
        ("Implicit reward", ["rewards/chosen", "rewards/rejected"]),
    ],
    "SFT and reward model": [
        ("Loss", ["loss"]),
        ("Accuracy", ["accuracy", "mean_token_accuracy"]),
        ("Margin", ["margin"]),
    ],
}


def workspace(project: str, entity: str) -> Any:
    """The view, unsaved."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[panels.LinePlot(title=title, x="step", y=metrics) for title, metrics in some],
        )
        for name, some in PANELS.items()
    ]
    sections.append(
        workspaces.Section(
            name="Answers", panels=[panels.WeavePanelSummaryTable(table_name="completions")]
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
        print("error: this needs wandb-workspaces: pip install 'rlhf[dashboard]'", file=sys.stderr)
        return 2
    import wandb

    try:
        view = workspace(args.project, args.entity or wandb.Api(timeout=15).default_entity)
        view.save()
    except Exception as error:  # of the server's client, in many kinds
        print(
            f"error: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}; log in with `wandb login`",
            file=sys.stderr,
        )
        return 1
    print(view.url)
    return 0


if __name__ == "__main__":
    sys.exit(main())

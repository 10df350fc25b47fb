"""The model card: what a saved model is, where it comes from and what was measured. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config.schema import Config
from rlhf.config.stage_graph import parent_stages
from rlhf.runs.locations import BUILTIN, is_directory
from rlhf.runs.stage_views import view_of


def write_card(directory: Path, cfg: Config, summary: dict[str, Any]) -> None:
    """README.md in the model's directory. Args: directory: of the run.  summary: as in summary.json."""
    stage = summary["stage"]
    given = parent_stages(cfg, stage).get("sft")
    path = cfg.reward.path if stage == "rm" else given or cfg.actor.path
    base = (
        [] if path.startswith(BUILTIN) or is_directory(path) else [f"base_model: {path}"]
    )  # only a hub id says something elsewhere
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [rlhf, {stage}]",
        *base,
        "---",
        "",
        f"# {directory.name}",
        "",
        view_of(stage).card_text(stage),
        "",
    ]
    lines += [
        f"Base model: `{path}`. Template of the dialogues: `{cfg.data.template.name}`, saved with the tokenizer.",
        "",
    ]
    lines += ["## Measured", "", "| metric | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in summary["metrics"].items()]
    lines += ["", "## Data", "", "| source | split | rows |", "|---|---|---|"]
    lines += [
        f"| {entry['source']} | {entry['split']} | {entry['rows']} |" for entry in summary["data"]
    ]
    lines += ["", "## Stands on", ""]
    lines += [f"- {role}: run `{id}`" for role, id in summary["parents"].items()] or [
        "- nothing but the base model"
    ]
    lines += [
        "",
        "## Settings",
        "",
        "All that decides the result; with them the same run is made again.",
        "",
        "```yaml",
    ]
    lines += [f"{key}: {value}" for key, value in sorted(summary["settings"].items())]
    versions = ", ".join(
        f"{name} {version}" for name, version in summary["versions"].items() if version
    )
    lines += ["```", "", f"Run `{summary['id']}`. Made with {versions}.", ""]
    (directory / "model" / "README.md").write_text("\n".join(lines))

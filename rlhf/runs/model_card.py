"""The model card: what a saved model is, its parents, data and metrics. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.base.adapter_files import base_of, chain_of
from rlhf.base.locations import BUILTIN, is_directory, model_directory
from rlhf.config.schema import Config
from rlhf.config.stage_graph import parent_stages
from rlhf.runs.stage_views import view_of


def write_card(directory: Path, cfg: Config, summary: dict[str, Any]) -> None:
    """Write README.md into the model's directory.

    Args: directory: of the run.  summary: as in summary.json.
    """
    stage = summary["stage"]
    path = base_model(cfg, stage)
    parents = [parent_line(role, id, cfg) for role, id in summary["parents"].items()]
    settings = [f"{key}: {value}" for key, value in sorted(summary["settings"].items())]
    versions = ", ".join(f"{name} {v}" for name, v in summary["versions"].items() if v)
    template = f"Dialogue template: `{cfg.data.template.name}`, saved with the tokenizer."
    metrics = [f"| {name} | {value:.4g} |" for name, value in summary["metrics"].items()]
    data = [f"| {row['source']} | {row['split']} | {row['rows']} |" for row in summary["data"]]
    lines = [
        *front_matter(path, stage),
        *("", f"# {directory.name}", "", view_of(stage).card_text(stage), ""),
        *(f"Base model: {described(path)}. {template}", ""),
        *("## Metrics", "", "| metric | value |", "|---|---|", *metrics, ""),
        *("## Data", "", "| source | split | rows |", "|---|---|---|", *data, ""),
        *("## Parent runs", "", *(parents or ["- none, only the base model"]), ""),
        *("## Settings", "", "All values that decide the result.", ""),
        *("```yaml", *settings, "```", ""),
        *(f"Run `{summary['id']}`. Made with {versions}.", ""),
    ]
    (directory / "model" / "README.md").write_text("\n".join(lines), encoding="utf-8")


def parent_line(role: str, id: str, cfg: Config) -> str:
    """Where a parent is: a run, another directory, a hub id, or a function of the user."""
    where = cfg.inputs.get(role)
    if where is None:
        return f"- {role}: a python function, its file has the hash `{id}`"
    is_run = ":" not in id and is_directory(where)  # else it is a path and a hash, or a hub id
    return f"- {role}: " + (f"run `{id}` in `{where}`" if is_run else f"`{where}`")


def base_model(cfg: Config, stage: str) -> str:
    """The path of the model that training started from."""
    if stage == "rm":
        return cfg.reward.path
    return parent_stages(cfg, stage).get("sft") or cfg.actor.path


def described(path: str) -> str:
    """A base model for the text: the whole path of a directory; the base of an adapter too."""
    models = [str(model_directory(p).resolve()) if is_directory(p) else p for p in chain_of(path)]
    adapter = "the adapter " if len(models) > 1 else ""
    return adapter + ", merged into ".join(f"`{model}`" for model in models)


def front_matter(path: str, stage: str) -> list[str]:
    """The YAML head that the hub reads; it names the base model where that is a hub id."""
    path = base_of(path)
    is_local = path.startswith(BUILTIN) or is_directory(path)
    base = [] if is_local else [f"base_model: {path}"]
    return ["---", "library_name: transformers", f"tags: [rlhf, {stage}]", *base, "---"]

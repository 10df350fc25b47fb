"""Who may import whom: the parent process stays free of torch, stages do not know each other, Hydra stays in front."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rlhf"
LAYERS = [  # imports run downwards only; a module may import those of the lines above its own
    ["config"],
    ["ds", "layout", "checks", "launch", "curves", "html", "dashboard", "comm", "kernels"],
    ["objectives", "logprobs", "unpadded", "lora", "data.records", "data.batches"],
    ["runs", "card", "plan", "engines", "controllers", "track", "data.template", "data.formats"],
    ["report_page", "eval_page", "models", "likelihood", "checkpoint", "data.sandbox", "data.sources", "chat_models"],
    ["report", "data.load", "data.build_tiny", "decode", "data.page", "conversation"],
    ["rollout"],
    ["rewards", "guards", "feedback"],
    ["evaluation", "agreement"],
    ["stages.sft", "stages.rm", "stages.online", "stages.dpo", "stages.evaluate", "stages.inspect"],
    ["worker", "cli"],
]
LEVEL = {f"rlhf.{name}": level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        if path.read_text().strip():
            found[name] = path
    return found


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Modules that a file imports, anywhere or at its top level only."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_every_module_has_a_place() -> None:
    assert set(modules()) == set(LEVEL)


def test_imports_run_downwards() -> None:
    for name, path in modules().items():
        for used in imports(path) & set(LEVEL):
            assert used == name or LEVEL[used] < LEVEL[name], f"{name} imports {used}"


def test_hydra_stays_in_front() -> None:
    users = {name for name, path in modules().items() if any(used.split(".")[0] == "hydra" for used in imports(path))}
    assert users == {"rlhf.cli", "rlhf.config"}


def test_the_parent_process_never_imports_torch() -> None:
    code = "import sys, rlhf.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'deepspeed', 'wandb', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

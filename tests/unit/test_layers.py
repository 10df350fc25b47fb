"""Who may import whom.

The parent process stays free of torch. Stages do not know each other. Only rlhf.cli,
rlhf.arguments and rlhf.compose use Hydra.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from helpers import REPO

PACKAGE = REPO / "rlhf"
FLOORS = [  # from the ground up; imports run downwards only, or within a package without a circle
    ["base"],
    ["config", "verifiers"],
    ["distributed"],
    ["runs"],
    ["data"],
    ["planning"],
    ["reporting"],
    ["models"],
    ["sampling"],
    ["training"],
    ["rewards"],
    ["chat", "rl"],
    ["evaluation"],
    ["stages"],
    ["arguments"],
    ["compose", "rehearsal"],
    ["help", "run"],
    ["app", "sweep", "worker", "report", "dashboard"],
    ["cli"],
]
TORCH_FREE = ("base", "config", "runs", "planning")


def package_of(name: str) -> str:
    """`models` for rlhf.models.loading. A package that can be run (python -m) has a program in it,
    which stands where the other programs do."""
    return "cli" if name.endswith(".__main__") else name.split(".")[1]


FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        )
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
    assert {package_of(name) for name in modules() if name != "rlhf"} == set(FLOOR)


def test_imports_run_downwards() -> None:
    known = modules()
    for name, path in known.items():
        for used in imports(path) & set(known):
            if used.count(".") == 0 or package_of(used) == package_of(name):
                continue
            assert FLOOR[package_of(used)] < FLOOR[package_of(name)], f"{name} imports {used}"


def test_stages_do_not_know_each_other() -> None:
    for name, path in modules().items():
        if name.startswith("rlhf.stages."):
            others = {used for used in imports(path) if used.startswith("rlhf.stages.")}
            assert not others, f"{name} imports {others}"


def test_there_is_no_circle() -> None:
    known = modules()
    uses = {name: imports(path, top_only=True) & set(known) for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for used in sorted(uses[name] - {name}):
                visit(used, (*trail, name))
            done.add(name)

    for name in known:
        visit(name, ())


def test_configuration_runs_and_planning_never_import_torch() -> None:
    for name, path in modules().items():
        if name != "rlhf" and package_of(name) in TORCH_FREE:
            assert not {used.split(".")[0] for used in imports(path)} & {
                "torch",
                "deepspeed",
                "transformers",
            }, name


def test_hydra_stays_in_front() -> None:
    users = {
        name
        for name, path in modules().items()
        if any(used.split(".")[0] == "hydra" for used in imports(path))
    }
    assert users == {"rlhf.cli", "rlhf.compose", "rlhf.arguments"}


def test_the_parent_process_never_imports_torch() -> None:
    code = (
        "import sys, rlhf.cli; sys.exit(any(m in sys.modules for m in "
        "('torch', 'transformers', 'deepspeed', 'wandb', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""How often the host waits for a GPU, and how many kernels it launches, without a GPU.

    python bench/synchronisations.py [--lines]

All stages run with deploy.device=gpu on a pretended GPU (tests/pretend), which counts. The first
table has the synchronisations and kernels of each micro-batch and each sampled token; --lines adds
the source lines that wait. The second has the kernels per sampled token of models of 24 layers.
About a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PRETEND = ROOT / "tests" / "pretend"
LAYERS = 24  # of OPT-1.3B
FAMILIES = ("opt", "llama")


def run(script: str, *arguments: object) -> str:
    """The standard output of a script of tests/pretend."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PRETEND / script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-5000:])
    return done.stdout


def count_stages(folder: Path) -> list[dict[str, Any]]:
    """Run all stages in a folder. Returns: the phases of tests/pretend/stages.py."""
    run("stages.py", folder)
    phases: list[dict[str, Any]] = json.loads((folder / "counts.json").read_text())
    return phases


def kernels_per_token(family: str, layers: Sequence[int], lora_rank: int = 0) -> list[int]:
    """Kernels of one decoding step of random models of a family. Args: layers: of each of them."""
    return [int(line) for line in run("decoding.py", family, lora_rank, *layers).splitlines()]


def table_of_stages(phases: list[dict[str, Any]], lines: bool = False) -> str:
    """Synchronisations and kernels per unit, and with `lines` where the host waits."""
    rows = ["| case | part | unit | units | synchronisations per unit | kernels per unit |"]
    rows += ["|---|---|---|---:|---:|---:|"]
    for phase in phases:
        waits, kernels = (phase[name] / phase["units"] for name in ("synchronisations", "kernels"))
        names = f"{phase['case']} | {phase['part']} | {phase['unit']} | {phase['units']}"
        rows.append(f"| {names} | {waits:.2f} | {kernels:.0f} |")
        if lines:
            found = sorted(phase["lines"].items(), key=lambda item: -item[1])
            rows += [f"    {count:6d}  {line}" for line, count in found]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lines", action="store_true", help="the source lines that wait")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(table_of_stages(count_stages(Path(folder)), args.lines))
    print(f"\n| {LAYERS} layers | kernels per sampled token |\n|---|---:|")
    for family in FAMILIES:
        for rank, name in ((0, family), (4, f"{family} with LoRA")):
            print(f"| {name} | {kernels_per_token(family, [LAYERS], rank)[0]} |")


if __name__ == "__main__":
    main()

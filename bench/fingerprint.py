"""Bit-for-bit fingerprints of all stages: does a change of the code change a weight or a metric?

    python bench/fingerprint.py --run DIR --json FILE       run all stages in DIR and hash them
    python bench/fingerprint.py --collect DIR --json FILE   hash an existing folder only
    python bench/fingerprint.py --compare A.json B.json     a table: identical or different

Runs sft, rm, ppo, rloo, grpo, dpo and eval on the sandbox with one seed, in 1 and in 2 processes of
one thread, into DIR/1 and DIR/2: about 4 minutes on two cores. Hashed are all saved weights
(*.safetensors), each column of metrics.jsonl but the clocks, and eval.json. The stage of a run is
the first part of its directory's name. Compare runs of the same machine and library versions only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# two configuration keys that old versions call otherwise
RL_MAX_STEPS = ("rl.max_steps",)  # ppo.max_steps, rloo.max_steps, grpo.max_steps in old versions
PROCESSES = "deploy.processes_per_node"  # deploy.gpus in old versions

ALGORITHMS = ("ppo", "rloo", "grpo", "dpo")
PROCESS_COUNTS = (1, 2)
SETTINGS = [
    "deploy.threads=1",
    "wandb.mode=disabled",
    "sft.max_steps=60",
    "rm.max_steps=60",
    "dpo.max_steps=20",
    "data.eval_rows=64",
    *(f"{key}=4" for key in RL_MAX_STEPS),
]
EVALUATION = [
    "stage=eval",
    f"eval.policies=[sft,{','.join(ALGORITHMS)}]",
    "eval.best_of=4",
    "eval.best_of_prompts=16",
]
CLOCKS = ("time", "eps", "responses_per_second", "seconds")  # metrics that measure time
CLOCK_PARTS = ("timing", "throughput", "per_second")
PATHS = "where."  # of eval.json: run directories, whose names depend on the version

# "PROCESSES/STAGE" -> file -> hash; of metrics.jsonl and eval.json: "file: key" -> hash
Fingerprint = dict[str, dict[str, str]]


def run_all(folder: Path) -> None:
    """Run all stages in each number of processes. Finished runs in `folder` are reused."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for count in PROCESS_COUNTS:
        root = folder.resolve() / str(count)
        root.mkdir(parents=True, exist_ok=True)
        base = [f"root={root}", f"{PROCESSES}={count}", *SETTINGS]
        for choice in [*([f"pipeline={name}"] for name in ALGORITHMS), EVALUATION]:
            command = [sys.executable, str(ROOT / "train.py"), *base, *choice]
            subprocess.run(command, env=environment, cwd=root, check=True, stdout=sys.stderr)


def collect(folder: Path) -> Fingerprint:
    """The hashes of the finished runs in `folder`/PROCESSES/outputs."""
    fingerprint: Fingerprint = {}
    for summary in sorted(folder.glob("*/outputs/*/summary.json")):
        run = summary.parent
        key = f"{run.parents[1].name}/{run.name.split('-')[0]}"
        if key in fingerprint:
            raise SystemExit(f"{folder}: two runs of {key}; give a folder with one of each stage")
        hashes = {}
        for file in sorted(run.rglob("*.safetensors")):
            if not {"attempts", "checkpoints"} & set(file.relative_to(run).parts):
                name = str(file.relative_to(run))
                hashes[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        rows = [
            json.loads(line)
            for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        hashes |= hash_columns("metrics.jsonl", rows)
        if (run / "eval.json").exists():
            hashes |= hash_columns(
                "eval.json", [json.loads((run / "eval.json").read_text(encoding="utf-8"))]
            )
        fingerprint[key] = hashes
    if not fingerprint:
        raise SystemExit(f"{folder}: no finished run in {folder}/PROCESSES/outputs")
    return fingerprint


def hash_columns(file: str, rows: list[dict[str, Any]]) -> dict[str, str]:
    """A hash per key, of its values in all rows and the rows' numbers."""
    columns: dict[str, list[tuple[int, Any]]] = defaultdict(list)
    for number, row in enumerate(rows):
        for key, value in flatten(row).items():
            if not is_clock(key) and not key.startswith(PATHS):
                columns[key].append((number, value))
    return {
        f"{file}: {key}": hashlib.sha256(json.dumps(values).encode()).hexdigest()
        for key, values in columns.items()
    }


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else key)
    return flat


def is_clock(key: str) -> bool:
    """Whether a metric measures time, so that it differs from run to run."""
    return key.rsplit(".", 1)[-1] in CLOCKS or any(part in key for part in CLOCK_PARTS)


def compare(one: Fingerprint, other: Fingerprint) -> tuple[str, bool]:
    """A table with a row per process count and stage; and whether all is identical."""
    lines = ["| processes/stage | weights | metrics | different |", "|---|---|---|---|"]
    all_identical = True
    for key in sorted(one.keys() | other.keys()):
        before, after = one.get(key, {}), other.get(key, {})
        differ = [n for n in sorted(before.keys() | after.keys()) if before.get(n) != after.get(n)]
        names = [
            name + ("" if name in before else " (new)") + ("" if name in after else " (gone)")
            for name in differ
        ]
        weights = [name for name in differ if name.endswith(".safetensors")]
        has_weights = any(name.endswith(".safetensors") for name in before)
        verdict = ("different" if weights else "identical") if has_weights else "none"
        metrics = "different" if len(differ) > len(weights) else "identical"
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        lines.append(f"| {key} | {verdict} | {metrics} | {shown} |")
        all_identical = all_identical and not differ
    return "\n".join(lines), all_identical


def main() -> int:
    """Exit code 1 where two fingerprints differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--run", type=Path, metavar="DIR", help="run all stages there")
    action.add_argument("--collect", type=Path, metavar="DIR", help="hash the runs in this folder")
    action.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="two fingerprints")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the fingerprint goes")
    args = parser.parse_args()
    if args.compare:
        table, identical = compare(
            *(json.loads(file.read_text(encoding="utf-8")) for file in args.compare)
        )
        print(table)
        return 0 if identical else 1
    if args.run:
        run_all(args.run)
    text = json.dumps(collect(args.run or args.collect), indent=1, sort_keys=True) + "\n"
    if args.json:
        args.json.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

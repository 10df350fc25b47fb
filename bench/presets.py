"""How does each preset of online RL end, with nothing but its name, at its full default length?

    python bench/presets.py [--root DIR] [--presets NAME ...] [--seeds 1 2 3] [--world sandbox]
                            [--docs] [-- KEY=VALUE ...]

All runs start from one SFT run and one reward model of seed 1, which are trained first; what is
measured over the seeds is online RL alone. Finished runs are reused, so the script can be
interrupted and resumed. It prints a table; with --docs it also writes it to docs/algorithms.md.
KEY=VALUE changes the runs, to try other values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rlhf.config.presets import preset_names

REPO = Path(__file__).parents[1]
PRESETS = [name for name in preset_names() if name != "dschat"]  # that is for comparison only
ALWAYS = ["wandb.mode=disabled", "deploy.threads=1", "rollout.log_responses=0"]
START = "<!-- table: bench/presets.py --docs -->\n"
END = "<!-- end of table of presets -->\n"


def train(root: Path, *overrides: str) -> Path:
    """Run one stage of train.py with one thread. Returns: its run directory.

    Raises: SystemExit with what it wrote where it fails.
    """
    command = [sys.executable, str(REPO / "train.py"), f"root={root}", *ALWAYS, *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(overrides)}:\n{done.stderr}")
    (line,) = [line for line in done.stdout.splitlines() if "metrics.jsonl" in line]
    return Path(line.split("  (")[0])


def measure(run: Path) -> dict[str, Any]:
    """How a run ended: rollouts, share of the gold gap closed, gold reward, KL, seconds."""
    summary = json.loads((run / "summary.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    final = summary["metrics"]
    gold, before = final["eval/gold"], final["eval/gold_before"]
    return {
        "rollouts": len(rows),
        "closed": (gold - before) / (final["eval/gold_best"] - before),
        "gold": gold,
        "kl": final["eval/kl"],
        "worst_kl": max(row["objective/kl"] for row in rows),
        "score": final["eval/score"],
        "length": final["eval/length"],
        "eos_rate": final["eval/eos_rate"],
        "seconds": summary["seconds"],
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line per preset as Markdown: the seeds one by one."""
    lines = [
        "| preset | rollouts | share of the gold gap closed | gold reward | KL, nats per response "
        "| largest KL of a rollout | score | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for preset, seeds in results.items():
        cells = [
            f"`{preset}`",
            str(seeds[0]["rollouts"]),
            each(seeds, "closed", ".0%"),
            each(seeds, "gold", ".2f"),
            each(seeds, "kl", ".1f"),
            each(seeds, "worst_kl", ".1f"),
            each(seeds, "score", ".2f"),
            f"{statistics.fmean(one['seconds'] for one in seeds):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def each(seeds: list[dict[str, Any]], key: str, form: str) -> str:
    """A number of each seed, one after the other."""
    return ", ".join(format(one[key], form) for one in seeds)


def write_docs(text: str) -> None:
    """Put the table between its two marks in docs/algorithms.md."""
    page = REPO / "docs" / "algorithms.md"
    before, rest = page.read_text().split(START)
    page.write_text(f"{before}{START}\n{text}\n\n{END}{rest.split(END)[1]}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("presets"))
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--world", default="sandbox", help="a built-in world: data=NAME")
    parser.add_argument("--docs", action="store_true", help="write docs/algorithms.md")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs, after --")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    data = f"data={args.world}"
    sft = train(args.root, "stage=sft", data)
    given = [data, f"rl.actor={sft}"]
    if args.world == "sandbox":  # elsewhere a function is the reward
        given.append(f"rl.reward={train(args.root, 'stage=rm', data)}")
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in args.seeds:
        for preset in args.presets:
            run = train(args.root, f"stage={preset}", f"seed={seed}", *given, *args.overrides)
            found = measure(run)
            results.setdefault(preset, []).append(found)
            print(
                f"{preset}, seed {seed}: {found['rollouts']} rollouts, {found['closed']:.0%} of "
                f"the gap, gold {found['gold']:.2f}, KL {found['kl']:.1f} (at most "
                f"{found['worst_kl']:.1f}), {found['seconds']:.0f} s",
                flush=True,
            )
    print(table(results))
    if args.docs:
        write_docs(table(results))


if __name__ == "__main__":
    main()

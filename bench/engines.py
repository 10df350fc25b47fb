"""Does it matter what samples? GRPO with each rollout.engine, side by side.

    python bench/engines.py [--root DIR] [--seeds 1 2 3] [--docs]
                            [--engines native continuous vllm] [--vllm COMMAND] [-- KEY=VALUE ...]

All runs start from one SFT run and one reward model on the sandbox. The engines take turns, so
that what disturbs the machine meets all of them. Finished runs are reused. It prints a table, which
--docs writes to docs/engines.md. vLLM has to be installed before: make setup-vllm.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from presets import curve, measure, train, write_between_marks
from scipy import stats

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "engines.md"
ENGINES = ["native", "continuous", "vllm"]
VLLM = f"{REPO}/.venv-vllm/bin/vllm serve --enforce-eager"
PARENTS = {"actor": "sft", "reward": "rm"}
PARTS = ("timing_s/rollout", "timing_s/update", "timing_s/step")


def settings(engine: str, vllm: str) -> list[str]:
    """The overrides of an engine. Args: vllm: the command of its server."""
    found = [f"rollout.engine={engine}"]
    return [*found, f'rollout.vllm.command="{vllm}"'] if engine == "vllm" else found


def measured(run: Path) -> dict[str, Any]:
    """How a run ended, and the medians of its parts; the first rollout, which also starts a
    server, is left out."""
    found = measure(run)
    for part in PARTS:
        found[part] = statistics.median(curve(run, part)[1:])
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ratios = [json.loads(row).get("sampler/ratio_max", 1.0) for row in rows]
    found["ratio"] = max(abs(ratio - 1) for ratio in ratios)
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and 95 % interval of the mean over seeds (Student's t)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.2f}"
    t = float(stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:.2f} ± {t * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line per engine as Markdown."""
    heading = [
        *("engine", "gold reward", "KL, nats per response", "largest abs(ratio − 1) of a token"),
        *("seconds per iteration", "of them sampling", "iteration against native"),
    ]
    lines = [heading, ["---"] * len(heading)]
    for engine, seeds in results.items():
        rollout, _, step = (statistics.median(one[part] for one in seeds) for part in PARTS)
        against = [
            one["timing_s/step"] / other["timing_s/step"]
            for one, other in zip(seeds, next(iter(results.values())))
        ]
        lines.append(
            [
                f"`{engine}`",
                interval([one["gold"] for one in seeds]),
                interval([one["kl"] for one in seeds]),
                f"{max(one['ratio'] for one in seeds):.1g}",
                f"{step:.2f}",
                f"{rollout:.2f}",
                f"{statistics.median(against):.2f} x",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("engines"))
    parser.add_argument("--engines", nargs="+", default=ENGINES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--vllm", default=VLLM, help="the command of its server")
    parser.add_argument("--docs", action="store_true", help="write docs/engines.md")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs, after --")
    args = parser.parse_args()
    given = [f"rl.{role}={train(args.root, f'stage={stage}')}" for role, stage in PARENTS.items()]
    results: dict[str, list[dict[str, Any]]] = {engine: [] for engine in args.engines}
    for seed in args.seeds:
        for engine in args.engines:
            how = settings(engine, args.vllm)
            run = train(args.root, "stage=grpo", f"seed={seed}", *given, *how, *args.overrides)
            found = measured(run)
            results[engine].append(found)
            print(
                f"{engine}, seed {seed}: {found['rollouts']} rollouts, gold {found['gold']:.2f}, "
                f"KL {found['kl']:.1f}, {found['timing_s/step']:.2f} s per iteration",
                flush=True,
            )
    shown = table(results)
    print(shown)
    if args.docs:
        write_between_marks(PAGE, "engines", shown)


if __name__ == "__main__":
    main()

"""How does each preset of online RL end, with nothing but its name, at its full default length?

    python bench/presets.py [--world sandbox|arithmetic] [--root DIR] [--presets NAME ...]
                            [--seeds 1 2 3] [--docs] [-- KEY=VALUE ...]

All runs start from one SFT run and, on the sandbox, one reward model of seed 1, which are trained
first; what is measured over the seeds is online RL alone. On the arithmetic world the policies are
also measured on problems that are harder than those of online RL. Finished runs are reused, so the
script can be interrupted and resumed. It prints a table; with --docs it also writes it to
docs/algorithms.md, and docs/arithmetic.png. KEY=VALUE changes the runs, to try other values.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.config.presets import preset_names
from rlhf.reporting.curves import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPO = Path(__file__).parents[1]
PAGE = REPO / "docs" / "algorithms.md"
PRESETS = [name for name in preset_names() if name != "dschat"]  # that is for comparison only
ALWAYS = ["wandb.mode=disabled", "deploy.threads=1", "rollout.log_responses=0"]
ALONE = ["eval.against=null", "eval.best_of=0", "eval.prompts=[]"]  # policies and nothing else
HARDER = ["data.arithmetic.harder=true", "eval.samples=4"]
Curves = Sequence[Sequence[float]]  # a value per rollout, of each seed


def train(root: Path, *overrides: str) -> Path:
    """Run one stage of train.py with one thread. Returns: its run directory.

    Raises: SystemExit with what it wrote where it fails.
    """
    command = [sys.executable, str(REPO / "train.py"), f"root={root}", *ALWAYS, *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(overrides)}:\n{done.stderr}")
    (line,) = [line for line in done.stdout.splitlines() if "metrics.jsonl" in line]
    return Path(line.split("  (")[0])


def measure(run: Path) -> dict[str, Any]:
    """How a run ended: rollouts, gold reward at its start and end, KL, score, seconds."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    final, kl = summary["metrics"], curve(run, "objective/kl")
    gold, before = final["eval/gold"], final["eval/gold_before"]
    return {
        "run": run,
        "rollouts": len(kl),
        "before": before,
        "gold": gold,
        "closed": (gold - before) / (final["eval/gold_best"] - before),
        "kl": final["eval/kl"],
        "worst_kl": max(kl),
        "score": final["eval/score"],
        "seconds": summary["seconds"],
    }


def curve(run: Path, metric: str) -> list[float]:
    """A metric of each rollout."""
    rows = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(row)[metric] for row in rows]


def pass_at_1_on_harder(root: Path, given: Sequence[str], runs: Sequence[Path]) -> list[float]:
    """pass@1 of policies on held-out problems with 3 digits, from 4 responses to each."""
    policies = ",".join(f"'{run}'" for run in runs)
    found = train(root, "stage=eval", *given, *ALONE, *HARDER, f"eval.policies=[{policies}]")
    rates = json.loads((found / "eval.json").read_text(encoding="utf-8"))["pass_rates"]
    return [rate["rate"] for rate in rates if (rate["measure"], rate["k"]) == ("pass", 1)]


# ---- tables and picture


Columns = dict[str, tuple[str, str]]  # heading: key of `measure`, format
SANDBOX: Columns = {
    "share of the gold gap closed": ("closed", ".0%"),
    "gold reward": ("gold", ".2f"),
    "KL, nats per response": ("kl", ".1f"),
    "largest KL of a rollout": ("worst_kl", ".1f"),
    "score": ("score", ".2f"),
}
ARITHMETIC: Columns = {
    "held-out pass@1": ("gold", ".2f"),
    "on harder problems": ("harder", ".2f"),
    "KL, nats per response": ("kl", ".1f"),
    "largest KL of a rollout": ("worst_kl", ".1f"),
}


def table(first: str, columns: Columns, results: dict[str, list[dict[str, Any]]]) -> str:
    """A line per result as Markdown: the seeds one by one. Args: first: heading of the names."""
    rows = [
        [name, *(each(seeds, key, form) for key, form in columns.values())]
        for name, seeds in results.items()
    ]
    lines = [[first, *columns], ["---"] * (1 + len(columns)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def each(seeds: Sequence[dict[str, Any]], key: str, form: str) -> str:
    """A number of each seed, one after the other."""
    return ", ".join(format(one[key], form) for one in seeds)


def picture(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """pass@1 and KL of the rollouts, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for i, (preset, seeds) in enumerate(results.items()):
        style = {"color": COLORS[i % len(COLORS)], "linestyle": "-" if i < len(COLORS) else "--"}
        for axis, metric in zip(axes, ("reward/gold/mean", "objective/kl")):
            draw_mean(axis, [curve(one["run"], metric) for one in seeds], preset, **style)
    axes[0].set_ylabel("pass@1 of the rollouts")
    axes[1].set_ylabel("KL to the SFT policy, nats per response")
    axes[0].legend(ncols=2)
    finish(axes)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw_mean(axis: Axes, curves: Curves, label: str, width: int = 5, **style: Any) -> None:
    """The mean over seeds, and over `width` rollouts so that curves can be told apart."""
    means = [statistics.fmean(values) for values in zip(*curves)]
    smooth = [statistics.fmean(means[max(0, i - width + 1) : i + 1]) for i in range(len(means))]
    axis.plot(range(1, len(smooth) + 1), smooth, label=label, linewidth=1.6, **style)


def finish(axes: Sequence[Axes]) -> None:
    for axis in axes:
        axis.set_xlabel("rollout")
        axis.grid(alpha=0.3)


def write_between_marks(page: Path, mark: str, text: str) -> None:
    """Put a table between the two marks of its name in a page."""
    start, end = f"<!-- table: {mark} -->\n", f"<!-- end of table: {mark} -->\n"
    before, rest = page.read_text(encoding="utf-8").split(start)
    page.write_text(f"{before}{start}\n{text}\n\n{end}{rest.split(end)[1]}", encoding="utf-8")


# ---- the command


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=["sandbox", "arithmetic"], default="sandbox")
    parser.add_argument("--root", type=Path, default=Path("presets"))
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--docs", action="store_true", help="write docs/")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of all runs, after --")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    data = f"data={args.world}"
    sft = train(args.root, "stage=sft", data)
    given = [data, f"rl.actor={sft}"]
    if args.world == "sandbox":  # elsewhere a function is the reward
        given.append(f"rl.reward={train(args.root, 'stage=rm', data)}")
    results: dict[str, list[dict[str, Any]]] = {preset: [] for preset in args.presets}
    for seed in args.seeds:
        for preset in args.presets:
            run = train(args.root, f"stage={preset}", f"seed={seed}", *given, *args.overrides)
            found = measure(run)
            results[preset].append(found)
            print(
                f"{preset}, seed {seed}: {found['rollouts']} rollouts, {found['closed']:.0%} of "
                f"the gap, gold {found['gold']:.2f}, KL {found['kl']:.1f} (at most "
                f"{found['worst_kl']:.1f}), {found['seconds']:.0f} s",
                flush=True,
            )
    columns = SANDBOX
    if args.world == "arithmetic":
        columns = ARITHMETIC
        every = [one for seeds in results.values() for one in seeds]
        on_harder = pass_at_1_on_harder(args.root, [data], [sft, *(one["run"] for one in every)])
        for one, rate in zip(every, on_harder[1:]):
            one["harder"] = rate
        print(f"SFT: pass@1 {every[0]['before']:.2f}, on harder problems {on_harder[0]:.2f}")
    shown = table("preset", columns, {f"`{name}`": seeds for name, seeds in results.items()})
    print(shown)
    if args.docs:
        write_between_marks(PAGE, f"presets, {args.world}", shown)
        if args.world == "arithmetic":
            picture(results, PAGE.with_name("arithmetic.png"))


if __name__ == "__main__":
    main()

"""Which of DeepSpeed-Chat's design choices make PPO with several passes diverge, and which fix
cures it? On the sandbox, three seeds each.

    python bench/ablation.py [--root DIR] [--seeds 1 2 3] [--jobs 2] [--only NAME ...] [--docs]

Each arm is a run of train.py with 4 passes of 4 minibatches over each of 44 rollouts ("1 x 1": one
pass of one minibatch). Finished runs are reused, so the script can be interrupted and resumed. It
writes ablation.json below DIR and prints the table; with --docs it also writes table and picture to
docs/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REPO = Path(__file__).parents[1]
DSCHAT = ["rl=dschat", "rm=dschat", "sft=dschat"]
SEVERAL = ["rl.epochs=4", "rl.minibatches=4"]
ALWAYS = [
    "rl.prompt_epochs=2",
    "rl.evaluation.every=7",
    "data.eval_rows=128",
    "wandb.mode=disabled",
    "deploy.threads=1",
    "rollout.log_responses=0",
]
NORMALIZED_SCORE = ["rl.normalize_score=true", "rl.score_clip=null", "rl.missing_eos_penalty=1"]
RAW_SCORE = ["rl.normalize_score=false", "rl.score_clip=5", "rl.missing_eos_penalty=0"]
GREEDY, PAD_IS_EOS = "rl.dschat.greedy=true", "rl.dschat.pad_is_eos=true"
SAMPLED, OWN_PAD = "rl.dschat.greedy=false", "rl.dschat.pad_is_eos=false"

# group -> arm -> overrides
ARMS: dict[str, dict[str, list[str]]] = {
    "complete set-ups": {
        "this framework": SEVERAL,
        "DeepSpeed-Chat, 1 x 1": DSCHAT,
        "DeepSpeed-Chat, 4 x 4": DSCHAT + SEVERAL,
    },
    "this framework, one design choice added": {
        "+ greedy rollouts": [*SEVERAL, GREEDY],
        "+ pad = EOS": [*SEVERAL, PAD_IS_EOS],
        "+ no whitening": [*SEVERAL, "rl.normalize=none"],
        "+ raw scores, clipped at 5, no EOS penalty": [*SEVERAL, *RAW_SCORE],
        "+ per-token reward loss": [*SEVERAL, "rm=dschat"],
        "+ greedy, pad = EOS": [*SEVERAL, GREEDY, PAD_IS_EOS],
        "+ raw scores, no whitening": [*SEVERAL, *RAW_SCORE, "rl.normalize=none"],
    },
    "DeepSpeed-Chat 4 x 4, one design choice fixed": {
        "- greedy rollouts": [*DSCHAT, *SEVERAL, SAMPLED],
        "- pad = EOS": [*DSCHAT, *SEVERAL, OWN_PAD],
        "- no whitening": [*DSCHAT, *SEVERAL, "rl.normalize=batch"],
        "- raw scores, no EOS penalty": [*DSCHAT, *SEVERAL, *NORMALIZED_SCORE],
        "- per-token reward loss": ["rl=dschat", "sft=dschat", *SEVERAL],
        "target KL 0.05 per pass": [*DSCHAT, *SEVERAL, "rl.target_kl=0.05"],
        "- greedy, - pad = EOS": [*DSCHAT, *SEVERAL, SAMPLED, OWN_PAD],
    },
}
PARENTS = [["stage=sft"], ["stage=sft", "sft=dschat"], ["stage=rm"], ["stage=rm", "rm=dschat"]]
DIVERGED_KL = 50.0  # nats per response: the SFT policy gives no such response any more
TABLE_START, TABLE_END = "<!-- table: bench/ablation.py --docs -->\n", "<!-- end of table -->\n"


def train(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run train.py with one thread."""
    command = [sys.executable, str(REPO / "train.py"), f"root={root}", *ALWAYS, *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env)


def run_arm(root: Path, arm: str, overrides: list[str], seed: int) -> dict[str, Any]:
    """Run one arm with one seed. Returns: its measurements, or the line that it stopped with."""
    done = train(root, "stage=ppo", f"seed={seed}", *overrides)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1]
        print(f"{arm}, seed {seed}: stopped: {reason}", flush=True)
        return {"arm": arm, "seed": seed, "stopped": reason}
    (run_dir,) = [
        line.split("  (")[0]
        for line in done.stdout.splitlines()
        if "metrics.jsonl" in line and "ppo-" in line
    ]
    result = measurements(Path(run_dir))
    print(
        f"{arm}, seed {seed}: gold {result['gold_before']:.2f} -> {result['gold']:.2f}, "
        f"KL {result['kl']:.1f}",
        flush=True,
    )
    return {"arm": arm, "seed": seed, **result}


def measurements(run_dir: Path) -> dict[str, Any]:
    """Final metrics of a run, its curves as (rollout, value), and whether it diverged."""
    rows = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    final = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["metrics"]
    names = ("gold_before", "gold", "kl", "eos_rate", "length", "repetition")
    gold = [(row["step"], row["eval/gold"]) for row in rows if "eval/gold" in row]
    return {name: final[f"eval/{name}"] for name in names} | {
        "worst_kl": max(row["objective/kl"] for row in rows),
        "approxkl": statistics.fmean(row["policy/approxkl_avg"] for row in rows),
        "curve_gold": [(0, final["eval/gold_before"]), *gold, (len(rows), final["eval/gold"])],
        "curve_kl": [(row["step"], row["objective/kl"]) for row in rows],
        "diverged": final["eval/kl"] > DIVERGED_KL
        or final["eval/gold"] < final["eval/gold_before"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown, one line per arm."""
    lines = [
        "| arm | diverged | gold before → after | KL | worst KL | finished (EOS rate) | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, arms in ARMS.items():
        shown = [arm for arm in arms if any(r["arm"] == arm for r in results)]
        if shown:
            lines.append(f"| **{group}** | | | | | | |")
        lines += [table_line(arm, [r for r in results if r["arm"] == arm]) for arm in shown]
    return "\n".join(lines)


def table_line(arm: str, seeds: list[dict[str, Any]]) -> str:
    """The line of an arm. A run that stopped counts as diverged, and is not part of the means."""
    finished = [r for r in seeds if "stopped" not in r]
    diverged = len(seeds) - len(finished) + sum(r["diverged"] for r in finished)
    gold = f"{mean(finished, 'gold_before'):.2f} → {mean(finished, 'gold'):.2f}"
    if len(finished) > 1:
        values = [r["gold"] for r in finished]
        gold += f" ({min(values):.2f} … {max(values):.2f})"
    cells = [
        arm,
        f"{diverged} of {len(seeds)}",
        gold,
        f"{mean(finished, 'kl'):.1f}",
        f"{mean(finished, 'worst_kl'):.1f}",
        f"{mean(finished, 'eos_rate'):.0%}",
        f"{mean(finished, 'length'):.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def mean(rows: list[dict[str, Any]], key: str) -> float:
    """NaN where there is no row."""
    return statistics.fmean(r[key] for r in rows) if rows else math.nan


def picture(results: list[dict[str, Any]], file: Path) -> None:
    """Gold reward and KL over the rollouts, mean over seeds, single seeds faint: design choices
    added on the left, fixed on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    complete, added, fixed = ARMS
    figure, axes = plt.subplots(
        2, 2, figsize=(13, 8.5), sharex=True, sharey="row", layout="constrained"
    )
    for column, group in enumerate((added, fixed)):
        top, bottom = axes[:, column]
        for i, arm in enumerate([*ARMS[complete], *ARMS[group]]):
            seeds = [r for r in results if r["arm"] == arm and "stopped" not in r]
            style: dict[str, Any]
            if i < 3:
                style = {"color": ["black", "#7f7f7f", "#d62728"][i], "linestyle": "--"}
            else:
                style = {"color": plt.get_cmap("tab20")(2 * (i - 3) % 20), "linewidth": 1.5}
            if seeds:
                draw(top, [r["curve_gold"] for r in seeds], arm, style)
                draw(bottom, [r["curve_kl"] for r in seeds], arm, style, lowest=0.1)
        top.set_title(group)
        bottom.set_yscale("log")
        bottom.set_xlabel("rollout")
        top.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=3)
        for axis in (top, bottom):
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("gold reward on held-out prompts")
    axes[1][0].set_ylabel("KL to the SFT policy, nats per response")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def draw(
    axis: Axes,
    curves: list[list[tuple[int, float]]],
    label: str,
    style: dict[str, Any],
    lowest: float = -math.inf,
) -> None:
    """Curves of the seeds of one arm, and their mean; values below `lowest` are raised to it."""
    steps = [step for step, _ in curves[0]]
    values = [[max(value, lowest) for _, value in curve] for curve in curves]
    for line in values:
        axis.plot(steps, line, color=style["color"], alpha=0.15, linewidth=0.8)
    means = [statistics.fmean(at_step) for at_step in zip(*values)]
    axis.plot(steps, means, label=label, **({"linewidth": 2.5} | style))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 2, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=None, help="arms, by name")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write docs/ablation.png, and the table into docs/ablation.md",
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    parents = [(f"seed={seed}", *overrides) for seed in args.seeds for overrides in PARENTS]
    jobs = [
        (arm, overrides, seed)
        for seed in args.seeds
        for arms in ARMS.values()
        for arm, overrides in arms.items()
        if args.only is None or arm in args.only
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in pool.map(lambda overrides: train(args.root, *overrides), parents):
            if done.returncode:
                raise SystemExit(done.stderr)
        results = list(pool.map(lambda job: run_arm(args.root, *job), jobs))
    (args.root / "ablation.json").write_text(json.dumps(results), encoding="utf-8")
    print(table(results))
    if args.docs:
        write_docs(results)


def write_docs(results: list[dict[str, Any]]) -> None:
    """The picture, and the table between its two marks in the page."""
    picture(results, REPO / "docs" / "ablation.png")
    page = REPO / "docs" / "ablation.md"
    before, rest = page.read_text(encoding="utf-8").split(TABLE_START)
    after = rest.split(TABLE_END)[1]
    page.write_text(
        f"{before}{TABLE_START}\n{table(results)}\n\n{TABLE_END}{after}", encoding="utf-8"
    )


if __name__ == "__main__":
    main()

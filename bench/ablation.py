"""Which of DeepSpeed-Chat's habits make PPO with several epochs diverge, and which fix cures it? On the sandbox, three seeds each.

    python bench/ablation.py [--root DIR] [--seeds 1 2 3] [--jobs 2] [--only NAME ...] [--docs]

Each arm is a run of train.py with 4 passes of 4 minibatches over each of 44 rollouts (1 and 1 where said). Finished runs are reused, so
it can be interrupted. Writes ablation.json below DIR, the table to standard output, and with --docs the pictures and the table to docs/.
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
from typing import Any

REPO = Path(__file__).parents[1]
DSCHAT = ["rl=dschat", "rm=dschat", "sft=dschat"]
SEVERAL = ["rl.epochs=4", "rl.minibatches=4"]
ALWAYS = [
    "rl.prompt_epochs=2",
    "rl.evaluation.every=7",
    "data.eval_rows=128",
    "wandb.mode=disabled",
    "deploy.threads=1",
    "rollout.log_answers=0",
]
OURS_SCORE = ["rl.normalize_score=true", "rl.score_clip=null", "rl.missing_eos_penalty=1"]
NO_DROPOUT = ["rl.dschat.dropout=0", "rl.dschat.train_mode_logp=false"]
SAMPLED, EOS_KEPT = "rl.dschat.greedy=false", "rl.dschat.pad_is_eos=false"

# group -> arm -> overrides
ARMS: dict[str, dict[str, list[str]]] = {
    "whole": {
        "this framework": SEVERAL,
        "DeepSpeed-Chat, 1 x 1": DSCHAT,
        "DeepSpeed-Chat, 4 x 4": DSCHAT + SEVERAL,
    },
    "this framework, one habit added": {
        "+ greedy rollouts": [*SEVERAL, "rl.dschat.greedy=true"],
        "+ pad = EOS": [*SEVERAL, "rl.dschat.pad_is_eos=true"],
        "+ dropout, old log-probs without": [*SEVERAL, "rl.dschat.dropout=0.1"],
        "+ dropout, old log-probs with": [
            *SEVERAL,
            "rl.dschat.dropout=0.1",
            "rl.dschat.train_mode_logp=true",
        ],
        "+ no whitening": [*SEVERAL, "rl.normalize=none"],
        "+ raw scores, clipped at 5, no EOS penalty": [
            *SEVERAL,
            "rl.normalize_score=false",
            "rl.score_clip=5",
            "rl.missing_eos_penalty=0",
        ],
        "+ per-token reward loss": [*SEVERAL, "rm=dschat"],
        "+ micro-batch means": [*SEVERAL, "rl.dschat.micro_batch_means=true"],
        "+ greedy, pad = EOS": [*SEVERAL, "rl.dschat.greedy=true", "rl.dschat.pad_is_eos=true"],
        "+ raw scores, no whitening": [
            *SEVERAL,
            "rl.normalize_score=false",
            "rl.score_clip=5",
            "rl.missing_eos_penalty=0",
        ]
        + ["rl.normalize=none"],
    },
    "DeepSpeed-Chat 4 x 4, one habit mended": {
        "- greedy rollouts": [*DSCHAT, *SEVERAL, SAMPLED],
        "- pad = EOS": [*DSCHAT, *SEVERAL, EOS_KEPT],
        "- dropout": [*DSCHAT, *SEVERAL, *NO_DROPOUT],
        "- no whitening": [*DSCHAT, *SEVERAL, "rl.normalize=batch"],
        "- raw scores, no EOS penalty": [*DSCHAT, *SEVERAL, *OURS_SCORE],
        "- per-token reward loss": ["rl=dschat", "sft=dschat", *SEVERAL],
        "- micro-batch means": [*DSCHAT, *SEVERAL, "rl.dschat.micro_batch_means=false"],
        "target KL 0.05 per pass": [*DSCHAT, *SEVERAL, "rl.target_kl=0.05"],
        "- greedy, - pad = EOS": [*DSCHAT, *SEVERAL, SAMPLED, EOS_KEPT],
        "- greedy, - pad = EOS, - dropout": [*DSCHAT, *SEVERAL, SAMPLED, EOS_KEPT, *NO_DROPOUT],
    },
}
DIVERGED_KL = 50.0  # nats per answer: no answer of the SFT policy looks like that any more


def train(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "train.py"), f"root={root}", *ALWAYS, *overrides]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def run_arm(root: Path, arm: str, overrides: list[str], seed: int) -> dict[str, Any]:
    """One run; what it measured."""
    done = train(root, "stage=ppo", f"seed={seed}", *overrides)
    if done.returncode != 0:
        print(f"{arm}, seed {seed}: stopped: {done.stderr.strip().splitlines()[-1]}", flush=True)
        return {"arm": arm, "seed": seed, "stopped": done.stderr.strip().splitlines()[-1]}
    (where,) = [
        line.split("  (")[0]
        for line in done.stdout.splitlines()
        if "metrics.jsonl" in line and "ppo-" in line
    ]
    rows = [json.loads(line) for line in Path(where, "metrics.jsonl").read_text().splitlines()]
    final = json.loads(Path(where, "summary.json").read_text())["metrics"]
    result = {
        key: final[f"eval/{key}"]
        for key in ("gold_before", "gold", "kl", "eos_rate", "length", "repetition")
    }
    result["worst_kl"] = max(row["objective/kl"] for row in rows)
    result["approxkl"] = statistics.fmean(row["policy/approxkl_avg"] for row in rows)
    result["curve_gold"] = [(0, final["eval/gold_before"])] + [
        (row["step"], row["eval/gold"]) for row in rows if "eval/gold" in row
    ]
    result["curve_gold"] += [(len(rows), final["eval/gold"])]
    result["curve_kl"] = [(row["step"], row["objective/kl"]) for row in rows]
    result["diverged"] = (
        final["eval/kl"] > DIVERGED_KL or final["eval/gold"] < final["eval/gold_before"]
    )
    print(
        f"{arm}, seed {seed}: gold {result['gold_before']:.2f} -> {result['gold']:.2f}, KL {result['kl']:.1f}",
        flush=True,
    )
    return {"arm": arm, "seed": seed, **result}


def table(results: list[dict[str, Any]]) -> str:
    """Means over seeds as Markdown, an arm a line."""
    lines = [
        "| arm | diverged | gold before → after | KL | worst KL | answers that end | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for group, arms in ARMS.items():
        shown = [arm for arm in arms if any(r["arm"] == arm for r in results)]
        lines += [f"| **{group}** | | | | | | |"] if shown else []
        for arm in shown:
            some = [r for r in results if r["arm"] == arm]
            fine = [r for r in some if "stopped" not in r]
            bad = len(some) - len(fine) + sum(r["diverged"] for r in fine)

            def mean(key: str, fine: list = fine) -> float:
                return statistics.fmean(r[key] for r in fine) if fine else math.nan

            spread = (
                f" ({min(r['gold'] for r in fine):.2f} … {max(r['gold'] for r in fine):.2f})"
                if len(fine) > 1
                else ""
            )
            cells = [
                f"{bad} of {len(some)}",
                f"{mean('gold_before'):.2f} → {mean('gold'):.2f}{spread}",
                f"{mean('kl'):.1f}",
            ]
            cells += [f"{mean('worst_kl'):.1f}", f"{mean('eos_rate'):.0%}", f"{mean('length'):.1f}"]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(results: list[dict[str, Any]], file: Path) -> None:
    """Gold reward and KL over the rollouts: faults added on the left, mended on the right; mean over seeds, seeds faint."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    whole, added, mended = ARMS
    figure, axes = plt.subplots(
        2, 2, figsize=(13, 8.5), sharex=True, sharey="row", layout="constrained"
    )
    for column, group in enumerate((added, mended)):
        arms = [*ARMS[whole], *ARMS[group]]
        for i, arm in enumerate(arms):
            some = [r for r in results if r["arm"] == arm and "stopped" not in r]
            if not some:
                continue
            color = (
                ["black", "#7f7f7f", "#d62728"][i]
                if i < 3
                else plt.get_cmap("tab20")(2 * (i - 3) % 20 + (i > 12))
            )
            width = 2.5 if i < 3 else 1.5
            for axis, key in ((axes[0][column], "curve_gold"), (axes[1][column], "curve_kl")):
                steps = [step for step, _ in some[0][key]]
                values = [
                    [max(value, 0.1) if key == "curve_kl" else value for _, value in r[key]]
                    for r in some
                ]
                for line in values:
                    axis.plot(steps, line, color=color, alpha=0.15, linewidth=0.8)
                means = [statistics.fmean(column_values) for column_values in zip(*values)]
                axis.plot(
                    steps,
                    means,
                    color=color,
                    linewidth=width,
                    linestyle="--" if i < 3 else "-",
                    label=arm,
                )
        axes[0][column].set_title(group)
        axes[1][column].set_yscale("log")
        axes[1][column].set_xlabel("rollout")
        axes[0][column].legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=3)
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("gold reward on held-out prompts")
    axes[1][0].set_ylabel("KL to the SFT policy, nats per answer")
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("ablation"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2)))
    parser.add_argument("--only", nargs="+", default=None, help="arms, by name")
    parser.add_argument(
        "--docs",
        action="store_true",
        help="write docs/ablation.png, and the table into docs/ablation.md",
    )
    args = parser.parse_args()
    args.root.mkdir(parents=True, exist_ok=True)
    upstream = [
        (s, o)
        for s in args.seeds
        for o in (
            ["stage=sft"],
            ["stage=sft", "sft=dschat"],
            ["stage=rm"],
            ["stage=rm", "rm=dschat"],
        )
    ]
    jobs = [
        (arm, overrides, seed)
        for seed in args.seeds
        for group in ARMS.values()
        for arm, overrides in group.items()
    ]
    jobs = [job for job in jobs if args.only is None or job[0] in args.only]
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in pool.map(lambda job: train(args.root, f"seed={job[0]}", *job[1]), upstream):
            if done.returncode:
                raise SystemExit(done.stderr)
        results = list(pool.map(lambda job: run_arm(args.root, *job), jobs))
    (args.root / "ablation.json").write_text(json.dumps(results))
    print(table(results))
    if args.docs:
        picture(results, REPO / "docs" / "ablation.png")
        page = REPO / "docs" / "ablation.md"
        start, end = "<!-- table: bench/ablation.py --docs -->\n", "<!-- end of table -->\n"
        text = page.read_text()
        page.write_text(
            text.split(start)[0] + start + "\n" + table(results) + "\n\n" + end + text.split(end)[1]
        )


if __name__ == "__main__":
    main()

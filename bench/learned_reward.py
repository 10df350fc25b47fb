"""How much ground truth is lost when a learned reward model stands in for the verifier?

    python bench/learned_reward.py [--root DIR] [--seeds 1 2 3] [--docs]

PPO on the arithmetic world with the verifier, with a reward model and a KL penalty
(experiment=arithmetic_learned), and with the reward model alone. All runs start from one SFT run
and one reward model of seed 1. Finished runs are reused. It prints a table; with --docs it also
writes it to docs/algorithms.md, and docs/learned_reward.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from presets import PAGE, curve, draw_mean, finish, measure, table, train, write_between_marks

from rlhf.reporting.curves import COLORS

LEARNED = "experiment=arithmetic_learned"
COLUMNS = {
    "its score at the end": ("score", ".2f"),
    "held-out pass@1": ("gold", ".2f"),
    "KL, nats per response": ("kl", ".1f"),
}
# name -> overrides of stage=ppo; the last one takes the steps and the KL of the first
ARMS = {
    "the verifier": ["data=arithmetic"],
    "a reward model and a KL penalty": [LEARNED],
    "a reward model alone": [LEARNED, "rl.kl.coef=0", "rl.lr=7e-4"],
}


def picture(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Score and pass@1 of the rollouts, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for color, (arm, seeds) in zip(COLORS, results.items()):
        for axis, metric in zip(axes, ("objective/scores", "reward/gold/mean")):
            draw_mean(axis, [curve(one["run"], metric) for one in seeds], arm, color=color)
    axes[0].set_ylabel("score: what the reward says")
    axes[1].set_ylabel("pass@1: share of right answers")
    axes[0].legend(title="PPO, whose reward is")
    finish(axes)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=Path("presets"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--docs", action="store_true", help="write docs/")
    args = parser.parse_args()
    sft = train(args.root, "stage=sft", "data=arithmetic")
    rm = train(args.root, "stage=rm", "data=arithmetic")
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        for arm, overrides in ARMS.items():
            models = [f"rl.actor={sft}"] + ([f"rl.reward={rm}"] if LEARNED in overrides else [])
            run = train(args.root, "stage=ppo", f"seed={seed}", *models, *overrides)
            results[arm].append(found := measure(run))
            print(
                f"{arm}, seed {seed}: score {found['score']:.2f}, pass@1 {found['gold']:.2f}, "
                f"KL {found['kl']:.1f}",
                flush=True,
            )
    shown = table("the reward is", COLUMNS, results)
    print(shown)
    if args.docs:
        write_between_marks(PAGE, "learned_reward", shown)
        picture(results, PAGE.with_name("learned_reward.png"))


if __name__ == "__main__":
    main()

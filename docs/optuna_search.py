"""Search for a learning rate and a KL coefficient with Optuna: each trial is one call of train.py. pip install optuna

    python docs/optuna_search.py [--trials 20] [overrides of train.py ...]

The study lies in search.db, so the same command goes on where it stopped; `python -m rlhf.report` compares what it has tried.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import optuna

TRAIN = Path(__file__).parents[1] / "train.py"


def trial_of(overrides: list[str]):
    def objective(trial: optuna.Trial) -> float:
        """Held-out score minus what the KL costs; on the sandbox the truth could be taken instead: eval/gold."""
        chosen = {
            "ppo.lr": trial.suggest_float("ppo.lr", 1e-5, 1e-3, log=True),
            "ppo.kl.coef": trial.suggest_float("ppo.kl.coef", 0.01, 0.3, log=True),
        }
        command = [
            sys.executable,
            str(TRAIN),
            "exp=search",
            *(f"{key}={value:.3g}" for key, value in chosen.items()),
            *overrides,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise optuna.TrialPruned(
                done.stderr.strip().splitlines()[-1]
            )  # a run that fell apart is a bad one, not the end
        (run,) = [
            line.split("  (")[0] for line in done.stdout.splitlines() if "frontier.png" in line
        ]
        metrics = json.loads(Path(run, "summary.json").read_text())["metrics"]
        return metrics["eval/score"] - 0.05 * metrics["eval/kl"]

    return objective


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=20)
    args, overrides = parser.parse_known_args()
    study = optuna.create_study(
        direction="maximize", storage="sqlite:///search.db", study_name="ppo", load_if_exists=True
    )
    study.optimize(trial_of(overrides), n_trials=args.trials)
    print(study.best_value, study.best_params)

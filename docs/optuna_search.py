"""Search for a learning rate and a KL coefficient with Optuna; each trial is one call of train.py.

    pip install optuna
    python docs/optuna_search.py [--trials 20] [overrides of train.py ...]

The study is in search.db, so the same command resumes it. `python -m rlhf.report` compares the
runs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import optuna

TRAIN = Path(__file__).parents[1] / "train.py"
KL_COST = 0.05  # score units per nat


def run_trial(trial: optuna.Trial, overrides: list[str]) -> float:
    """Train with the trial's values.

    Returns: held-out score minus the cost of the KL; on the sandbox eval/gold works too.
    Raises: TrialPruned where the run fails: a bad choice, not the end of the search. SystemExit
        where the command is wrong, as it would be in each trial.
    """
    values = {
        "rl.lr": trial.suggest_float("rl.lr", 1e-5, 1e-3, log=True),
        "rl.kl.coef": trial.suggest_float("rl.kl.coef", 0.01, 0.3, log=True),
    }
    chosen = [f"{key}={value:.3g}" for key, value in values.items()]
    command = [sys.executable, str(TRAIN), "experiment_name=search", *chosen, *overrides]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        sys.exit(done.stderr.strip())
    if done.returncode:
        raise optuna.TrialPruned(done.stderr.strip().splitlines()[-1])
    (run,) = [line.split("  (")[0] for line in done.stdout.splitlines() if "frontier.png" in line]
    metrics = json.loads(Path(run, "summary.json").read_text(encoding="utf-8"))["metrics"]
    return metrics["eval/score"] - KL_COST * metrics["eval/kl"]


def count(text: str) -> int:
    """A number of trials from the command line."""
    if not text.isdecimal() or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text}: give a whole number from 1 to 100,000")
    return int(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=count, default=20)
    args, overrides = parser.parse_known_args()
    study = optuna.create_study(
        direction="maximize", storage="sqlite:///search.db", study_name="ppo", load_if_exists=True
    )
    study.optimize(lambda trial: run_trial(trial, overrides), n_trials=args.trials)
    if not any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials):
        sys.exit("no trial was completed: the reasons are in outputs/*/train.log")
    print(study.best_value, study.best_params)

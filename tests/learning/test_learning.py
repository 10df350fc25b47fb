"""PPO learns the task: to stop, to find the best arm, to hold a KL, and to raise the gold reward
with few and with many passes.

One seed each in the quick tests (8 passes: none), three in all of them; each takes less than a
minute in one thread.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from helpers import REPO, Demo, metrics, runs_in, summary, train

SEEDS = [1, pytest.param(2, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)]


def learn(demo: Demo, root: Path, *overrides: str) -> tuple[list[dict], dict[str, float]]:
    """PPO from the demo's SFT policy: its metrics by rollout, and the final ones."""
    given = [
        "stage=ppo",
        f"rl.actor={demo.sft}",
        "wandb.mode=disabled",
        "deploy.threads=1",
        "rollout.log_responses=0",
        "data.eval_rows=128",
    ]
    done = train(*given, f"root={root}", *overrides, cwd=REPO / "tests")  # where my_rewards.py lies
    assert done.returncode == 0, done.stderr
    (run,) = runs_in(root)["ppo"]
    return metrics(run), summary(run)["metrics"]


def own_reward(function: str) -> list[str]:
    return [
        "~rl.rewards.model",
        f"+rl.rewards={{mine: {{function: 'my_rewards:{function}'}}}}",
        "rl.missing_eos_penalty=0",
    ]


@pytest.mark.full
@pytest.mark.parametrize("seed", SEEDS)
def test_it_learns_to_stop(demo: Demo, tmp_path: Path, seed: int) -> None:
    """DeepSpeed-Chat cannot: its EOS is padding and is never learnt (T10).

    Half of the first responses do not end within 24 tokens.
    """
    settings = [
        *own_reward("minus_length"),
        "rollout.max_new_tokens=24",
        "rl.kl.coef=0.01",
        "rl.lr=1e-3",
        "rl.max_steps=14",
    ]
    _, final = learn(demo, tmp_path, f"seed={seed}", *settings)
    print(
        {
            key: round(final[f"eval/{key}"], 3)
            for key in ("length_before", "length", "eos_rate_before", "eos_rate")
        }
    )
    assert final["eval/eos_rate_before"] < 0.75 and final["eval/eos_rate"] >= 0.98
    assert final["eval/length"] < 0.4 * final["eval/length_before"]


@pytest.mark.full
@pytest.mark.parametrize("seed", SEEDS)
def test_it_finds_the_best_arm(demo: Demo, tmp_path: Path, seed: int) -> None:
    """4 passes of 4 minibatches on a bandit reach at least 95 % of the optimum (T9)."""
    settings = [
        *own_reward("thanks"),
        "rollout.max_new_tokens=4",
        "rl.kl.coef=0.1",
        "rl.lr=1e-4",  # 3e-4: one of six runs took a step too far, and its KL stayed at 8
        "rl.prompt_epochs=2",
    ]
    rows, final = learn(demo, tmp_path, f"seed={seed}", *settings)
    print(
        f"{final['eval/score_before']:.3f} -> {final['eval/score']:.3f} of 1, "
        f"KL {final['eval/kl']:.2f}"
    )
    assert rows[0]["objective/scores"] < 0.3 and final["eval/score"] >= 0.95
    assert final["eval/kl"] < 3  # to say it always costs ln 7 = 1.9


@pytest.mark.full
@pytest.mark.parametrize("seed", SEEDS)
def test_an_adaptive_coefficient_holds_its_target(demo: Demo, tmp_path: Path, seed: int) -> None:
    settings = [
        f"rl.reward={demo.rm}",
        "rl.kl.controller=adaptive",
        "rl.kl.target=2",
        "rl.kl.horizon=256",
        "rl.prompt_epochs=2",
    ]
    rows, _ = learn(demo, tmp_path, f"seed={seed}", *settings, "rl.epochs=2")
    held = statistics.fmean(row["objective/kl"] for row in rows[-len(rows) // 3 :])
    print(
        f"KL {held:.2f} of 2 nats per response, "
        f"beta {rows[0]['objective/kl_coef']} -> {rows[-1]['objective/kl_coef']:.3f}"
    )
    assert held == pytest.approx(2.0, rel=0.2)


@pytest.mark.full
@pytest.mark.parametrize(
    "passes, settings",
    [
        pytest.param(8, ["rl.epochs=8"], marks=pytest.mark.full),
        (1, ["rl.epochs=1", "rl.prompt_epochs=2", "rl.lr=5e-4"]),
    ],
    ids=["8 passes", "1 pass"],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_gold_target_with_few_and_with_many_passes(
    demo: Demo, tmp_path: Path, seed: int, passes: int, settings: list[str]
) -> None:
    """The same bounds as in test_gold.py with 4 passes: 60 % of the gap between the SFT policy and
    the best responses, at a KL of at most 8."""
    rows, final = learn(demo, tmp_path, f"seed={seed}", f"rl.reward={demo.rm}", *settings)
    gap = (final["eval/gold"] - final["eval/gold_before"]) / (
        final["eval/gold_best"] - final["eval/gold_before"]
    )
    print(
        f"passes {passes}, seed {seed}: gap {gap:.2f}, gold {final['eval/gold']:.2f}, "
        f"KL {final['eval/kl']:.2f}"
    )
    assert {row["policy/epochs"] for row in rows} == {passes}
    assert gap >= 0.60 and final["eval/kl"] <= 8

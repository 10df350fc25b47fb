"""Pipelines whose rewards are the user's functions, or a second reward model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data_files import jsonl
from helpers import Demo, runs_in, summary, train

SMALL_PPO = [
    "data.eval_rows=16",
    "rl.max_steps=1",
    "rl.batch_size=16",
    "rollout.max_new_tokens=8",
    "wandb.mode=disabled",
    "deploy.threads=1",
]


@pytest.mark.full
def test_a_pipeline_with_functions_only_trains_no_reward_model_and_a_new_function_is_a_new_run(
    tmp_path: Path,
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions):\n    return [-len(c) for c in completions]\n"
    )
    only = [
        "data.sandbox.demonstrations=64",
        "sft.max_steps=2",
        "~rl.rewards.model",
        "+rl.rewards={mine: {function: 'my_rewards:length'}}",
    ]
    done = train(*SMALL_PPO, *only, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rm:" not in done.stderr and runs_in(tmp_path)["rm"] == []
    (run,) = runs_in(tmp_path)["ppo"]
    assert summary(run)["parents"].keys() == {"sft", "rewards/mine"}
    again = train(*SMALL_PPO, *only, cwd=tmp_path)
    assert again.returncode == 0 and "ppo: finished" in again.stderr
    (tmp_path / "my_rewards.py").write_text(
        "def length(completions):\n    return [len(c) for c in completions]\n"
    )
    changed = train(*SMALL_PPO, *only, cwd=tmp_path)
    assert changed.returncode == 2 and "(changed: rewards/mine): add fresh=true" in changed.stderr


@pytest.mark.full
def test_a_second_reward_model_from_elsewhere_is_measured_and_weighed(
    demo: Demo, tmp_path: Path
) -> None:
    """The score has no unit of its own: it is measured on held-out demonstrations, and is the one
    that stage=rm stored in the original."""
    other = tmp_path / "other"
    shutil.copytree(demo.rm / "model", other)
    settings = json.loads((other / "config.json").read_text())
    unit = settings.pop("score_mean"), settings.pop("score_std")
    (other / "config.json").write_text(json.dumps(settings))
    (other / "SHA256SUMS").unlink()  # it is not the model that was saved any more
    given = [
        f"rl.actor={demo.sft}",
        f"rl.reward={demo.rm}",
        f"+rl.rewards={{other: {{path: '{other}', weight: 0.5}}}}",
    ]
    sizes = [size for size in SMALL_PPO if "eval_rows" not in size]
    done = train("stage=ppo", *given, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        f"rl.rewards.other: raw scores of 256 held-out demonstrations: mean {unit[0]:.3g}, "
        f"standard deviation {unit[1]:.3g}" in done.stderr
    )
    final = summary(runs_in(tmp_path)["ppo"][0])["metrics"]
    assert final["eval/score/other"] == pytest.approx(final["eval/score/model"], abs=1e-4)
    assert final["eval/score"] == pytest.approx(1.5 * final["eval/score/model"], abs=1e-4)
    wrong = train(
        "stage=ppo", *given[:2], f"+rl.rewards={{other: {{path: '{demo.sft}'}}}}", cwd=tmp_path
    )
    assert (
        wrong.returncode == 2
        and f"rl.rewards.other.path={demo.sft}: this is OPTForCausalLM, not a reward model"
        in wrong.stderr
    )
    untrained = train(
        "stage=ppo",
        *given[:2],
        "+rl.rewards={other: {path: 'builtin:tiny'}}",
        *sizes,
        cwd=tmp_path,
    )
    assert (
        untrained.returncode == 2
        and "rl.rewards.other.path=builtin:tiny: no reward model" in untrained.stderr
    )
    long = train("stage=ppo", *given, *sizes, "rollout.max_new_tokens=500", cwd=tmp_path)
    assert long.returncode == 2 and "rollout.max_new_tokens=500 is more than the" in long.stderr


def test_grpo_compares_with_a_column_of_the_data(tmp_path: Path) -> None:
    """GSM8K's layout, from random weights: no stage below, no reward model."""
    (tmp_path / "my_rewards.py").write_text(
        "def correct(prompts, completions, answer, trainer_state):\n"
        "    with open('states', 'a') as file:\n"
        "        print(trainer_state.global_step, trainer_state.max_steps, file=file)\n"
        "    scores = []\n"
        "    for prompt, completion, truth in zip(prompts, completions, answer):\n"
        "        first = prompt.split()[2]\n"
        "        assert truth == f'It is {first}. #### {first}', (prompt, truth)\n"
        "        scores.append(float(truth.split('####')[1].strip() in completion))\n"
        "    return scores\n\n"
        "def needs_truth(completions, truth):\n"
        "    return [0.0] * len(completions)\n"
    )
    rows = [
        {"question": f"What is {n} ?", "answer": f"It is {n}. #### {n}", "level": n}
        for n in range(60)
    ]
    file = jsonl(tmp_path / "sums.jsonl", rows)
    grpo = ["stage=grpo", "data=jsonl", f"data.sources.mine.path={file}", "data.shares=[0,0,1]"]
    grpo += ["rl.actor=builtin:tiny", "rl.rewards.model=null", "rl.batch_size=16"]
    grpo += ["rl.max_steps=1", *SMALL_PPO[3:]]
    done = train(*grpo, "+rl.rewards={mine: {function: 'my_rewards:correct'}}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "  columns not read, except by reward functions: level" in done.stderr
    # tried, evaluated, trained on, evaluated
    assert (tmp_path / "states").read_text().splitlines() == ["0 1", "0 1", "0 1", "1 1"]
    (run,) = runs_in(tmp_path)["grpo"]
    assert 0 <= summary(run)["metrics"]["eval/score"] <= 1
    wrong = train(*grpo, "+rl.rewards={mine: {function: 'my_rewards:needs_truth'}}", cwd=tmp_path)
    assert wrong.returncode == 2
    assert (
        "error: grpo: rl.rewards.mine.function=my_rewards:needs_truth: the function has a "
        "parameter truth, and no row of online RL or of the evaluation has such a column (they "
        "have answer, level): give it a "
        "default value, or add the column to the data"
    ) in wrong.stderr.splitlines()
    assert "sampling responses" not in wrong.stderr, "found before a model is loaded"

"""Pipelines of several algorithms: what they run, their report, and bad input."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import SMALL, TRAIN, runs_in, summary, train


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines one after the other in one place."""
    root = tmp_path_factory.mktemp("pipelines")
    for algorithm in ("dpo", "rloo"):
        done = train(*SMALL, f"pipeline={algorithm}", "dpo.max_steps=2", cwd=root)
        assert done.returncode == 0, done.stderr
        if algorithm == "dpo":
            assert runs_in(root)["rm"] == [] and "rm:" not in done.stderr, "no reward model for DPO"
    return root


@pytest.mark.full
def test_a_pipeline_runs_what_its_algorithm_needs_and_nothing_more(pipelines: Path) -> None:
    found = runs_in(pipelines)
    assert {stage: len(some) for stage, some in found.items()} == {
        "sft": 1,
        "rm": 1,
        "rloo": 1,
        "dpo": 1,
    }
    ids = {stage: summary(found[stage][0])["id"] for stage in ("sft", "rm")}
    assert (
        summary(found["dpo"][0])["parents"] == {"sft": ids["sft"]}
        and summary(found["rloo"][0])["parents"] == ids
    )
    for stage in ("dpo", "rloo"):
        run = found[stage][0]
        assert (run / "curves.png").exists() and (run / "frontier.png").exists() == (
            stage == "rloo"
        )
        assert f"trained by {stage.upper()}" in (run / "model" / "README.md").read_text()


@pytest.mark.full
def test_their_report_has_one_table_and_one_picture(pipelines: Path) -> None:
    from rlhf.reporting import report_page, tables
    from rlhf.reporting.comparison import primary_metric, seed_groups
    from rlhf.runs.finding import find_runs

    found = find_runs([pipelines])
    policies = [run for run in found if run.kind == "policy"]
    assert [cell.label for cell in seed_groups(policies)] in (["dpo", "rloo"], ["rloo", "dpo"])
    assert primary_metric(policies).name == "eval/gold"
    page = report_page.page(found, "two algorithms", pipelines)
    assert ">dpo, rloo on sandbox</h2>" in page and page.count("Reward against KL") == 1
    tables.print_comparison(found)


CALLS: dict[str, tuple[list[str], str]] = {
    "one answer": (
        ["stage=rloo", "rl.responses_per_prompt=1"],
        "rl.responses_per_prompt=1: rl.advantage=leave_one_out compares a response with the others",
    ),
    "one of a group": (
        ["stage=grpo", "rl.responses_per_prompt=1"],
        "rl.responses_per_prompt=1: rl.advantage=group compares a response with the others",
    ),
    "no such algorithm": (
        ["pipeline=sarsa"],
        "pipeline=sarsa: no such option; choose from cispo, dapo, dr_grpo, dschat, grpo, gspo, "
        "ppo, reinforce_pp, reinforce_pp_baseline, rloo, dpo",
    ),
    "no SFT": (["stage=dpo"], "dpo needs a trained policy: not in outputs/sft-tiny-"),
    "a key of an earlier version": (
        ["stage=rloo", "rloo.lam=0.9"],
        "unknown key rloo.lam (did you mean rl.gae_lambda",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_input_gets_one_clear_line(tmp_path: Path, name: str) -> None:
    overrides, said = CALLS[name]
    done = train(*overrides, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_advice_leaves_out_what_the_missing_stage_does_not_read(tmp_path: Path) -> None:
    done = train(
        "stage=dpo",
        "dpo.beta=0.2",
        "rollout.temperature=0.9",
        "sft.lr=1e-4",
        "seed=3",
        cwd=tmp_path,
    )
    assert f"{TRAIN} stage=sft sft.lr=1e-4 seed=3  or give dpo.actor=" in done.stderr


def test_the_advice_keeps_what_others_follow_ppo_in(tmp_path: Path) -> None:
    done = train(
        "stage=eval",
        "pipeline=rloo",
        "rl.lr=1e-4",
        "eval.policies=[rloo]",
        "eval.against=null",
        cwd=tmp_path,
    )
    assert f"{TRAIN} stage=rloo rl.lr=1e-4 " in done.stderr


def test_a_stage_that_is_not_needed_is_not_checked(tmp_path: Path) -> None:
    done = train(
        "pipeline=dpo",
        "rm.batch_size=7",
        "deploy.processes_per_node=2",
        "reward.path=/nowhere",
        "plan=true",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_runs_of_two_algorithms_that_differ_in_more_are_told_apart() -> None:
    from rlhf.reporting.comparison import seed_groups
    from rlhf.runs.history import Run

    def some(stage: str, epochs: int, seed: int) -> Run:
        return Run(
            Path(f"{stage}{seed}"),
            stage,
            "finished",
            {"sft.epochs": epochs, f"{stage}.lr": 1, "seed": seed},
            {"eval/gold": 1.0},
        )

    found = seed_groups(
        [some("ppo", 2, 1), some("ppo", 2, 2), some("dpo", 1, 1), some("dpo", 1, 2)]
    )
    assert sorted(cell.label for cell in found) == ["dpo sft.epochs=1", "ppo sft.epochs=2"]
    found = seed_groups([some("ppo", 2, 1), some("dpo", 2, 1)])
    assert sorted(cell.label for cell in found) == ["dpo", "ppo"]

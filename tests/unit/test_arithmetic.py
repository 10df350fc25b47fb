"""The arithmetic world, whose answers can be checked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from helpers import composed

from rlhf.config.schema import Arithmetic, Config
from rlhf.config.validation import check_config
from rlhf.data import encoding
from rlhf.data.arithmetic import problems, world
from rlhf.data.arithmetic.problems import MISTAKES, Problem, worked_solution
from rlhf.data.load import load_data
from rlhf.data.records import Prompt, Turn, World
from rlhf.models.loading import load_tokenizer
from rlhf.planning.steps import rows_for_stage
from rlhf.runs.command import Command
from rlhf.runs.identity import run_identity, run_name

SIZES = Arithmetic(demonstrations=1000, wrong=0.6, prompts=400, pairs=400, harder=False)


@functools.cache
def make(seed: int = 1, harder: bool = False) -> World:
    return world.build_world(dataclasses.replace(SIZES, harder=harder), seed, 256)


def plain(data: World) -> dict[str, Any]:
    """The records of a world, without its two functions."""
    return {name: value for name, value in data._asdict().items() if isinstance(value, list)}


def keys_of(rows: Sequence[Any]) -> set[str]:
    """The problems of some records; the order of their numbers does not count."""
    texts = [(row.turns if isinstance(row, Prompt) else row.prompt)[-1].text for row in rows]
    return {problems.problem_of(text).key for text in texts}


# --- solutions


@pytest.mark.parametrize(
    "problem, mistake, solution",
    [
        (Problem("+", (147, 592)), "", "7+2=9, 4+9=13, 1+5+1=7. So 739."),
        (Problem("+", (147, 592)), "carry", "7+2=9, 4+9=13, 1+5=6. So 639."),
        (Problem("+", (147, 592)), "order", "7+2=9, 4+9=13, 1+5+1=7. So 937."),
        (Problem("+", (58, 67)), "", "8+7=15, 5+6+1=12. So 125."),
        (Problem("+", (58, 67)), "carry", "8+7=15, 5+6=11. So 115."),
        (Problem("+", (58, 67)), "order", "8+7=15, 5+6+1=12. So 512."),
        (Problem("+", (99, 99, 99)), "", "9+9+9=27, 9+9+9+2=29. So 297."),
        (Problem("*", (47, 6)), "", "7*6=42, 4*6=24, 24+4=28. So 282."),
        (Problem("*", (47, 6)), "carry", "7*6=42, 4*6=24. So 242."),
        (Problem("*", (47, 6)), "order", "7*6=42, 4*6=24, 24+4=28. So 228."),
        (Problem("*", (12, 3)), "", "2*3=6, 1*3=3. So 36."),
    ],
)
def test_solutions_by_hand(problem: Problem, mistake: str, solution: str) -> None:
    assert worked_solution(problem, mistake) == solution


@pytest.mark.parametrize(
    "problem, columns",
    [
        (Problem("+", (12, 34)), ["46", "0 carries", "sum of two", "2"]),
        (Problem("+", (58, 67)), ["125", "1 carry", "sum of two", "2"]),
        (Problem("+", (950, 529)), ["1479", "0 carries", "sum of two", "3"]),
        (Problem("+", (999, 9, 9)), ["1017", "2 carries", "sum of three", "3"]),
        (Problem("*", (47, 6)), ["282", "1 carry", "product", "2"]),
        (Problem("*", (7, 6)), ["42", "0 carries", "product", "1"]),
    ],
)
def test_columns_by_hand(problem: Problem, columns: list[str]) -> None:
    names = ["answer", "difficulty", "kind", "digits"]
    assert problem.columns == dict(zip(names, columns))


def some_problems() -> list[Problem]:
    """Many sums of two numbers with two digits, many products, and other sums."""
    rng = random.Random(0)
    sums: list[tuple[int, ...]] = [*itertools.product(range(10, 100, 3), range(10, 100, 2))]
    sums += [tuple(rng.randrange(100, 1000) for _ in range(n)) for n in (2, 3) for _ in range(500)]
    sums += [tuple(rng.randrange(1000, 10000) for _ in range(3)) for _ in range(500)]
    products = itertools.product(range(10, 1000, 7), range(2, 10))
    every = [("+", numbers) for numbers in sums] + [("*", numbers) for numbers in products]
    return [Problem(operator, numbers) for operator, numbers in every]


def test_worked_solutions_are_right_and_mistaken_ones_wrong() -> None:
    """Against Python's own arithmetic, evaluated from the text of the prompt and of each step."""
    rng = random.Random(0)
    for problem in some_problems():
        expected = eval(problem.text.removeprefix("What is ").removesuffix("?"))
        turns, right = [Turn("user", problem.text)], worked_solution(problem)
        assert problem.answer == expected and problem.columns["answer"] == str(expected)
        steps, end = right.split(". So ")
        assert end == f"{expected}."
        for step in steps.split(", "):
            left, result = step.split("=")
            assert eval(left) == int(result), right
        assert problems.gold_of_turns(turns, right) == 1.0
        assert problems.gold_of_turns(turns, problems.mistaken_solution(problem, rng)) == 0.0
        assert problems.problem_of(problem.text) == problem


def test_every_mistake_is_made() -> None:
    rng = random.Random(0)
    problem = Problem("+", (147, 592))
    solutions = [problems.mistaken_solution(problem, rng) for _ in range(300)]
    known = {name: worked_solution(problem, name) for name in MISTAKES if name != "slip"}
    counts = {name: solutions.count(text) for name, text in known.items()}
    counts["slip"] = len(solutions) - sum(counts.values())
    for name, weight in MISTAKES.items():
        assert abs(counts[name] / 300 - weight / sum(MISTAKES.values())) < 0.1, counts
    without_carry = Problem("+", (12, 34))
    assert worked_solution(without_carry, "carry") == worked_solution(without_carry)


@pytest.mark.parametrize(
    "response, number",
    [
        ("7+2=9. So 739.", "739"),
        ("So 0739", "739"),
        ("So 0.", "0"),
        ("7+2=9, 4+9=1", "1"),
        ("no number", None),
        ("", None),
        ("So " + "1" * 5000, "1" * 5000),  # int() would refuse it
    ],
)
def test_the_number_at_the_end_of_a_response(response: str, number: str | None) -> None:
    assert problems.final_number(response) == number


def test_a_prompt_of_another_world_is_refused() -> None:
    for text in ("How do I look after my rose?", "What is 3?", "What is 3 - 4?", "What is 3 + 4"):
        with pytest.raises(ValueError, match="not a prompt of the arithmetic world"):
            problems.gold_of_turns([Turn("user", text)], "So 7.")


# --- records


def test_the_same_seed_makes_the_same_world_and_another_seed_another() -> None:
    assert plain(world.build_world(SIZES, 1, 256)) == plain(make())
    other = plain(make(2))
    assert all(other[name] != rows for name, rows in plain(make()).items())


def test_no_problem_is_in_two_parts_in_whatever_order_of_its_numbers() -> None:
    for data in (make(), make(harder=True)):
        held_out = [*data.eval_sft, *data.eval_rm, *data.eval_probe, *data.eval_prompts]
        parts = [keys_of(rows) for rows in (data.sft, data.rm, data.ppo, held_out)]
        assert all(parts) and len(set.union(*parts)) == sum(map(len, parts))
        assert len(parts[2]) == len(data.ppo) == 400  # each prompt once
        assert len(parts[3]) == len(data.eval_prompts) == 256
    assert keys_of(make().score_unit) == keys_of(make().eval_prompts)


def test_harder_problems_have_one_more_digit_and_change_nothing_that_is_trained_on() -> None:
    usual, harder = plain(make()), plain(make(harder=True))
    same = [name for name in usual if usual[name] == harder[name]]
    assert same == ["sft", "rm", "ppo", "score_unit"]
    columns = [json.loads(prompt.columns) for prompt in make().eval_prompts]
    assert {row["digits"] for row in columns} == {"1", "2"}
    assert {row["difficulty"] for row in columns} == {"0 carries", "1 carry"}
    for prompt in make(harder=True).eval_prompts:
        assert json.loads(prompt.columns)["digits"] == "3"


def test_the_size_of_one_part_does_not_change_another() -> None:
    base = plain(make())
    for key, part in (("demonstrations", "sft"), ("pairs", "rm"), ("prompts", "ppo")):
        size = getattr(SIZES, key)
        more = plain(world.build_world(dataclasses.replace(SIZES, **{key: size + 50}), 1, 256))
        assert len(more[part]) == size + 50 and more[part][:size] == base[part]
        assert {name: rows for name, rows in more.items() if name != part} == {
            name: rows for name, rows in base.items() if name != part
        }


def test_demonstrations_are_wrong_as_often_as_configured() -> None:
    data = make()
    right = sum(data.gold(d.prompt, d.response) for d in data.sft) / len(data.sft)
    assert abs((1 - right) - SIZES.wrong) < 0.05
    assert all(data.gold(d.prompt, d.response) == 1 for d in data.eval_sft)
    never = world.build_world(dataclasses.replace(SIZES, wrong=0.0), 1, 256)
    assert all(never.gold(d.prompt, d.response) == 1 for d in never.sft)


def test_pairs_are_of_a_right_and_a_wrong_solution() -> None:
    data = make()
    assert len(data.rm) == 400 and len(data.eval_rm) == 2 * 256 and len(data.eval_probe) == 256
    for pair in [*data.rm, *data.eval_rm, *data.eval_probe]:
        assert pair.rejected is not None and pair.gold_margin == 1.0
        assert data.gold(pair.prompt, pair.chosen) == 1.0 == data.best_gold(pair.prompt)
        assert data.gold(pair.prompt, pair.rejected) == 0.0
    # a judge of the steps alone cannot tell which solution of a probe belongs to the prompt
    for pair in data.eval_probe:
        for step in (pair.rejected or "").split(". So ")[0].split(", "):
            left, result = step.split("=")
            assert eval(left) == int(result)


# --- with the tokenizer, and as data


def test_digits_are_single_tokens_and_everything_fits_its_limit() -> None:
    tokenizer = load_tokenizer("builtin:tiny")
    assert tokenizer.convert_ids_to_tokens(tokenizer("739").input_ids)[-3:] == ["7", "3", "9"]
    limits = composed("data=arithmetic").data
    for data in (make(), make(harder=True)):
        rows = [*data.sft, *data.eval_sft]
        encoded = encoding.encode_demonstrations(tokenizer, rows, 10**9, 10**9)
        assert max(len(prompt) for prompt, _ in encoded) <= limits.max_prompt_tokens
        assert max(len(response) for _, response in encoded) <= limits.max_response_tokens
    # the longest that there can be
    longest = [Problem("+", (999,) * 3), Problem("*", (999, 9))]
    prompts = [[Turn("user", problem.text)] for problem in longest]
    responses = [worked_solution(problem) for problem in longest]
    ids = encoding.encode_responses(tokenizer, responses, 10**9, prompts)
    assert max(map(len, ids)) <= limits.max_response_tokens
    for prompt in encoding.encode_prompts(tokenizer, prompts, 10**9):
        assert prompt is not None and len(prompt) <= limits.max_prompt_tokens


def config(*overrides: str) -> Config:
    return composed("data=arithmetic", *overrides)


def test_columns_reach_the_prompts() -> None:
    data = load_data(config("data.arithmetic.prompts=50", "data.eval_rows=20").data)
    assert data.gold and len(data.ppo) == 50 and len(data.eval_prompts) == 20
    assert len(data.eval_rm) == 2 * 20 and len(data.score_unit) == 256
    for turns, columns in [(row["prompt"], row["columns"]) for row in data.ppo]:
        problem = problems.problem_of(turns[-1]["text"])
        assert json.loads(columns) == problem.columns
    for prompt in data.eval_prompts:
        assert json.loads(prompt.columns) == problems.problem_of(prompt.turns[-1].text).columns


@pytest.mark.parametrize(
    "overrides, runs",
    [
        (["pipeline=grpo"], ["sft", "grpo"]),  # its verifier is the reward
        (["pipeline=dpo"], ["sft", "dpo"]),
        (
            ["pipeline=ppo", "rl.rewards.verifier=null", "rl.rewards.model={weight: 1}"],
            ["sft", "rm", "ppo"],
        ),
        (["stage=inspect"], ["inspect"]),
        (["stage=eval", "pipeline=grpo"], ["eval"]),
    ],
)
def test_it_composes(overrides: list[str], runs: list[str]) -> None:
    cfg = config(*overrides)
    assert check_config(cfg) == [] and cfg.stage.runs == runs


def test_the_number_of_rows_is_known_before_the_data_are_made() -> None:
    cfg = config("pipeline=ppo")
    sizes, data = cfg.data.arithmetic, load_data(cfg.data)
    assert sizes is not None
    rows = {"sft": sizes.demonstrations, "rm": sizes.pairs, "ppo": sizes.prompts}
    for stage, expected in rows.items():
        assert rows_for_stage(cfg, stage) == expected == len(getattr(data, stage))


def test_harder_is_no_part_of_the_identity_of_training() -> None:
    usual, harder = (
        Command(cfg, cfg, [])
        for cfg in (config("pipeline=grpo"), config("pipeline=grpo", "data.arithmetic.harder=true"))
    )
    for stage in ("sft", "rm", "grpo"):
        assert run_identity(usual, stage) == run_identity(harder, stage)
        assert run_name(usual, stage) == run_name(harder, stage)
    assert run_identity(usual, "eval") != run_identity(harder, "eval")
    assert run_name(usual, "grpo").startswith("grpo-tiny-arithmetic-")

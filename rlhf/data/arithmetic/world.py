"""Make the world: which problems each stage gets, and the solutions of its writers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from itertools import islice

from rlhf.config.schema import Arithmetic
from rlhf.data.arithmetic.problems import (
    Problem,
    best_gold_of_turns,
    gold_of_turns,
    mistaken_solution,
    worked_solution,
)
from rlhf.data.records import Demonstration, Pair, Prompt, Turn, World

# Shares of the problems by the digits of their numbers, and by kind. The demonstrations show more
# of what is harder to learn, and some problems with 3 digits, which no other stage sees.
DIGITS = {1: 0.2, 2: 0.8}
DIGITS_FOR_SFT = {1: 0.15, 2: 0.6, 3: 0.25}
HARDER = {3: 1.0}  # data.arithmetic.harder: held out, of these digits only
KINDS = {"sum of two": 0.95, "sum of three": 0.02, "product": 0.03}
KINDS_FOR_SFT = {"sum of two": 0.7, "sum of three": 0.15, "product": 0.15}
PARTS = {"eval": 0.1, "sft": 0.2, "rm": 0.2, "ppo": 0.5}  # shares of all problems
PAIRS_PER_PROMPT = 2  # held-out pairs for each held-out prompt


def build_world(cfg: Arithmetic, seed: int, held_out_prompts: int) -> World:
    """Make the world of `data.seed`.

    Args:
        cfg: sizes, and the share of wrong demonstrations.
        seed: decides which problems belong to which part, and all solutions.
        held_out_prompts: distinct prompts that nothing is trained on.
    """
    streams = {part: random.Random(f"arithmetic-{seed}-{part}") for part in (*PARTS, "unit")}
    # drawn one by one, so that the first records of a part do not depend on their number
    for_sft = islice(problems("sft", seed, streams["sft"]), cfg.demonstrations)
    for_rm = islice(problems("rm", seed, streams["rm"]), cfg.pairs)
    for_ppo = islice(without_repeats(problems("ppo", seed, streams["ppo"])), cfg.prompts)
    usual = without_repeats(problems("eval", seed, streams["eval"]))
    held_out = list(islice(usual, held_out_prompts))
    unit = [demonstrate(one, cfg.wrong, streams["unit"]) for one in held_out]
    if cfg.harder:
        of_3_digits = problems("eval", seed, random.Random(f"arithmetic-{seed}-harder"), HARDER)
        held_out = list(islice(without_repeats(of_3_digits), held_out_prompts))
    rng = streams["eval"]
    return World(
        sft=[demonstrate(one, cfg.wrong, streams["sft"]) for one in for_sft],
        rm=[compare(one, streams["rm"]) for one in for_rm],
        ppo=[prompt_of(one) for one in for_ppo],
        eval_sft=[demonstrate(one, 0.0, rng) for one in held_out],
        eval_rm=[compare(one, rng) for one in held_out for _ in range(PAIRS_PER_PROMPT)],
        eval_probe=[probe(one, rng) for one in held_out],
        eval_prompts=[prompt_of(one) for one in held_out],
        score_unit=unit,
        gold=gold_of_turns,
        best_gold=best_gold_of_turns,
    )


# ---- problems


def draw_problem(rng: random.Random, digits: int, kinds: dict[str, float]) -> Problem:
    """A problem with numbers of this many digits. Args: kinds: KINDS or KINDS_FOR_SFT."""
    [kind] = rng.choices(list(kinds), list(kinds.values()))

    def number() -> int:
        return rng.randrange(10 ** (digits - 1), 10**digits)

    if kind == "product":
        return Problem("*", (number(), rng.randrange(2, 10)))
    return Problem("+", tuple(number() for _ in range(2 if kind == "sum of two" else 3)))


def part_of(problem: Problem, seed: int) -> str:
    """The part that a problem belongs to, by a hash: the order of its numbers does not count."""
    digest = hashlib.sha256(f"arithmetic-{seed}-{problem.key}".encode()).digest()
    place, end = int.from_bytes(digest[:8], "big") / 2**64, 0.0
    for part, share in PARTS.items():
        end += share
        if place < end:
            return part
    return part


def problems(
    part: str, seed: int, rng: random.Random, shares: dict[int, float] = DIGITS
) -> Iterator[Problem]:
    """Random problems of a part, without end. They may repeat. Args: shares: by digits."""
    kinds = KINDS
    if part == "sft":
        kinds, shares = KINDS_FOR_SFT, DIGITS_FOR_SFT
    while True:
        [digits] = rng.choices(list(shares), list(shares.values()))
        problem = draw_problem(rng, digits, kinds)
        if part_of(problem, seed) == part:
            yield problem


def without_repeats(rows: Iterator[Problem]) -> Iterator[Problem]:
    """Each problem once."""
    seen: set[str] = set()
    for problem in rows:
        if problem.key not in seen:
            seen.add(problem.key)
            yield problem


# ---- records


def prompt_of(problem: Problem) -> Prompt:
    return Prompt([Turn("user", problem.text)], json.dumps(problem.columns))


def demonstrate(problem: Problem, wrong: float, rng: random.Random) -> Demonstration:
    """A solution for SFT. Args: wrong: the probability of a mistake."""
    is_wrong = rng.random() < wrong
    solution = mistaken_solution(problem, rng) if is_wrong else worked_solution(problem)
    return Demonstration([Turn("user", problem.text)], solution)


def compare(problem: Problem, rng: random.Random) -> Pair:
    """The right solution as the chosen answer, one with a mistake as the rejected one."""
    rejected = mistaken_solution(problem, rng)
    return pair(problem, worked_solution(problem), rejected)


def probe(problem: Problem, rng: random.Random) -> Pair:
    """The right solution, and that of another problem which differs in one digit.

    A judge that does not read the prompt is right on half of these pairs.
    """
    first = str(problem.numbers[0])
    place = rng.randrange(len(first))
    digits = [d for d in "0123456789"[place == 0 :] if d != first[place]]
    changed = int(first[:place] + rng.choice(digits) + first[place + 1 :])
    other = Problem(problem.operator, (changed, *problem.numbers[1:]))
    return pair(problem, worked_solution(problem), worked_solution(other))


def pair(problem: Problem, chosen: str, rejected: str) -> Pair:
    turns = [Turn("user", problem.text)]
    columns = json.dumps(problem.columns)
    return Pair(turns, chosen, rejected, gold_margin=1.0, source="arithmetic", columns=columns)

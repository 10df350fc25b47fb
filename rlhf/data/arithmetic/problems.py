"""A problem of the arithmetic world: its text, its worked solution, and the mistakes in one."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from rlhf.base.errors import UserError
from rlhf.data.records import Turn
from rlhf.verifiers import number

COUNT_WORDS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Problem:
    """A sum of numbers, or the product of a number and a digit."""

    operator: str  # + or *
    numbers: tuple[int, ...]  # of a product the second one has one digit

    @property
    def text(self) -> str:
        """The prompt: What is 147 + 592?"""
        return f"What is {f' {self.operator} '.join(map(str, self.numbers))}?"

    @property
    def answer(self) -> int:
        if self.operator == "+":
            return sum(self.numbers)
        first, second = self.numbers
        return first * second

    @property
    def digits(self) -> int:
        """Digits of its longest number."""
        return max(len(str(number)) for number in self.numbers)

    @property
    def columns(self) -> dict[str, str]:
        """What a reward function gets besides the prompt, and evaluations group by."""
        kind = "product" if self.operator == "*" else f"sum of {COUNT_WORDS[len(self.numbers)]}"
        carries = "1 carry" if self.carries == 1 else f"{self.carries} carries"
        digits = str(self.digits)
        return {"answer": str(self.answer), "difficulty": carries, "kind": kind, "digits": digits}

    @property
    def carries(self) -> int:
        """How often something is carried to the next column."""
        carried, carry = 0, 0
        for place in range(self.digits - 1):
            _, result = _work_out_column(self, place, carry, slip=0)
            carry = result // 10
            carried += carry > 0
        return carried

    @property
    def key(self) -> str:
        """The same for problems that differ in the order of their numbers only."""
        return f"{self.operator}{sorted(self.numbers)}"


def problem_of(prompt: str) -> Problem:
    """The problem that a prompt asks for. Raises: UserError when it is not one of this world."""
    found = re.fullmatch(r"What is (\d{1,9}(?: ([+*]) \d{1,9})(?: \+ \d{1,9})*)\?", prompt)
    if found is None:
        raise UserError(f"not a prompt of the arithmetic world: {prompt!r}")
    return Problem(found[2], tuple(int(number) for number in re.findall(r"\d+", found[1])))


# ---- solutions

# how a writer goes wrong, and how often as a weight among those that change the answer
MISTAKES = {
    "carry": 2,  # never carries
    "order": 2,  # writes the digits of the answer in the order in which they were worked out
    "slip": 1,  # the result of one column is off by one
}


def worked_solution(problem: Problem, mistake: str = "", rng: random.Random | None = None) -> str:
    """A solution column by column from the right: "7+2=9, 4+9=13, 1+5+1=7. So 739."

    Args: mistake: one of MISTAKES, or "" for a right solution.  rng: decides where a slip is.
    """
    slip_at, slip = -1, 0
    if mistake == "slip":
        assert rng is not None
        slip_at, slip = rng.randrange(problem.digits), rng.choice([-1, 1])
    steps, results, carry = [], [], 0
    for place in range(problem.digits):
        text, result = _work_out_column(problem, place, carry, slip if place == slip_at else 0)
        steps.append(text)
        results.append(result)
        carry = 0 if mistake == "carry" else result // 10
    # the last column's result is written down whole
    written = [str(result % 10) for result in results[:-1]] + [str(results[-1])]
    if mistake != "order":
        written.reverse()
    return f"{', '.join(steps)}. So {''.join(written)}."


def _work_out_column(problem: Problem, place: int, carry: int, slip: int) -> tuple[str, int]:
    """What is written about a column, and its result.

    Args: place: 0 for the units.  slip: added to the result (from 0 it cannot go down).
    """
    digits = [number // 10**place % 10 for number in problem.numbers]
    if problem.operator == "+":
        terms = [*digits, carry] if carry else digits
        result = abs(sum(terms) + slip)
        return f"{'+'.join(map(str, terms))}={result}", result
    digit, factor = digits[0], problem.numbers[1]
    product = digit * factor
    result = abs(product + carry + slip)
    if not carry:
        return f"{digit}*{factor}={result}", result
    return f"{digit}*{factor}={product}, {product}+{carry}={result}", result


def mistaken_solution(problem: Problem, rng: random.Random) -> str:
    """A solution with one of MISTAKES, whose number at the end is wrong."""
    wrong = [name for name in MISTAKES if name == "slip" or _is_wrong(problem, name)]
    [mistake] = rng.choices(wrong, [MISTAKES[name] for name in wrong])
    return worked_solution(problem, mistake, rng)


def _is_wrong(problem: Problem, mistake: str) -> bool:
    return final_number(worked_solution(problem, mistake)) != str(problem.answer)


# ---- what is right


def final_number(response: str) -> str | None:
    """The last number of a text, without leading zeros; None where it has none."""
    numbers = re.findall(r"\d+", response)
    return (numbers[-1].lstrip("0") or "0") if numbers else None


def gold_of_turns(turns: list[Turn], response: str) -> float:
    """1 where the number at the end of a response is the answer of its prompt, else 0: what
    rlhf.verifiers:number says, the reward of conf/data/arithmetic.yaml.

    Raises: UserError when the prompt is not one of this world.
    """
    answer = problem_of(turns[-1].text).answer
    return number([response], answer=[answer])[0] or 0.0


def best_gold_of_turns(turns: list[Turn]) -> float:
    """The gold reward of the best response to a prompt."""
    return 1.0

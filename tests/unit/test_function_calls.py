"""Reward functions as users of TRL and verl write them, in the process that they run in: real
processes, real time limits."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.errors import UserError
from rlhf.data.records import Prompt, Turn
from rlhf.rewards.batch import Batch, make_batch
from rlhf.rewards.functions import load_function, verl_arguments
from rlhf.rewards.process import Result, RewardProcess, Spec

MODULE = """
import asyncio, os, sys, time

# as in TRL's documentation: columns by name, messages, async, None

def reward_len(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def format_reward(completions, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if content.startswith("<think>") else 0.0 for content in contents]

def correct(prompts, completions, answer, trainer_state=None, scale=1):
    assert trainer_state.global_step == 3 and trainer_state.max_steps == 9
    return [scale * float(a == c) for a, c in zip(answer, completions)]

def maths_only(completions, task, **kwargs):
    return [1.0 if t == "maths" else None for t in task]

async def remote(prompts, completions, **kwargs):
    await asyncio.sleep(0.7)
    return [float(len(c)) for c in completions]

async def another(completions):
    await asyncio.sleep(0.7)
    return [0.5] * len(completions)

def everything(**kwargs):
    return [sorted(kwargs).index("answer") + len(kwargs["completion_ids"][0])] * 4

# as in verl

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "from": data_source}

async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.3)
    return float(solution_str == ground_truth)

class Judge:
    async def __call__(self, completions, level="hard"):
        return [1.0 if level == "hard" else 0.0] * len(completions)

judge = Judge()

# what goes wrong

def raises(completions):
    return [1 / (len(c) - 2) for c in completions]

def leaves(completions):
    sys.exit("no key")

def hangs(completions):
    time.sleep(60)

async def hangs_async(completions):
    await asyncio.sleep(60)

async def gives_up(completions):
    await asyncio.wait_for(asyncio.sleep(60 if "no" in completions else 0), 0.2)
    return [1.0] * len(completions)

def dies(completions):
    os._exit(3)

def few(completions):
    return [1.0]

def one_number(completions):
    return 1.0

def nan(completions):
    return [float("nan") if c == "no" else 1.0 for c in completions]

def word(completions):
    return ["good"] * len(completions)

def on_the_second_prompt(completions):
    assert "no" not in completions
    return [1.0] * len(completions)

def prints(completions):
    print("to the terminal")
    return [0.0] * len(completions)

def old(turns, response):
    return 1.0

def first(completions, /):
    return [1.0] * len(completions)

number = 3
"""
ANSWERS = ["4", "no", "4", "no"]


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return file


def batch(is_messages: bool = False, **more: list[Any]) -> Batch:
    """Two prompts with two responses each; the right ones are 4 and 5."""
    prompts = [
        Prompt(
            [Turn("user", text)],
            json.dumps({"answer": answer, "task": task} | {k: v[i] for k, v in more.items()}),
            is_messages,
        )
        for i, (text, answer, task) in enumerate([("2 + 2?", "4", "maths"), ("Hi", "no", "talk")])
        for _ in range(2)
    ]
    ids = [[7, 8], [9], [7], [1, 2, 3]]
    return make_batch(prompts, ANSWERS, ids, {"global_step": 3, "max_steps": 9}, per_prompt=2)


def started(*names: str, skip: bool = False, timeout: float = 20, **kwargs: Any) -> RewardProcess:
    specs = {
        name: Spec(f"rl.rewards.{name}", f"mine:{name}", kwargs, timeout, skip) for name in names
    }
    return RewardProcess(specs)


def scores(*names: str, rows: Batch | None = None, **settings: Any) -> dict[str, Result]:
    process = started(*names, **settings)
    try:
        return process.score(rows or batch())
    finally:
        process.close()


def refused(*names: str, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        scores(*names, **settings)
    return str(raised.value)


def line_of(text: str) -> int:
    return MODULE[: MODULE.index(text)].count("\n") + 1


# --- what a function gets


def test_functions_of_trl_run_unchanged() -> None:
    found = scores("reward_len", "correct", "maths_only", "everything", "judge")
    values = {name: result.scores for name, result in found.items()}
    assert values == {
        "reward_len": [1.0, 2.0, 1.0, 2.0],
        "correct": [1.0, 0.0, 0.0, 1.0],
        "maths_only": [1.0, 1.0, None, None],
        "everything": [2.0] * 4,  # answer, completion_ids, completions, ...; two tokens
        "judge": [1.0] * 4,
    }
    assert not any(any(result.failed) for result in found.values())


def test_messages_where_the_data_hold_messages() -> None:
    rows = batch(is_messages=True)
    assert rows.prompts[0] == [{"role": "user", "content": "2 + 2?"}]
    assert rows.completions[1] == [{"role": "assistant", "content": "no"}]
    assert scores("format_reward", rows=rows)["format_reward"].scores == [0.0] * 4
    assert batch().prompts[0] == "2 + 2?" and batch().completions[1] == "no"


def test_several_turns_of_a_text_are_written_as_in_anthropics_data() -> None:
    turns = [Turn("user", "Hi"), Turn("assistant", "Hello."), Turn("user", "Why?")]
    rows = make_batch([Prompt(turns)], ["So."], [[]], {})
    assert rows.prompts == ["\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"]


def test_verls_functions_are_known_by_their_parameters() -> None:
    """The ground truth is a column, or inside reward_model, or the answer."""
    truths = [{"ground_truth": "4"}, {"ground_truth": "4"}, None, None]
    rows = batch()
    rows.columns["reward_model"] = truths
    found = scores("compute_score", "compute_score_async", rows=rows)
    assert found["compute_score"].scores == [1.0, 0.0, 0.0, 1.0]
    assert found["compute_score_async"].scores == [1.0, 0.0, 0.0, 1.0]


def test_verls_data_source_is_always_a_text() -> None:
    function = load_function("mine:compute_score", {}, "rl.rewards.mine")
    rows = batch(data_source=["sums", None])
    assert [verl_arguments(function, rows, i)["data_source"] for i in (0, 2)] == ["sums", ""]


def test_async_functions_run_at_the_same_time() -> None:
    process = started("remote", "another", "compute_score_async")
    begun = time.monotonic()
    found = process.score(batch())
    seconds = time.monotonic() - begun
    process.close()
    assert found["remote"].scores == [1.0, 2.0, 1.0, 2.0] and found["another"].scores == [0.5] * 4
    assert 0.7 <= seconds < 1.4, "one after the other: 0.7 + 0.7 + 4 x 0.3 s"


def test_a_client_that_a_function_keeps_works_in_every_call(module: Path) -> None:
    """It belongs to the event loop in which it was first used."""
    module.write_text("""
import asyncio
busy = asyncio.Semaphore(1)

async def one_at_a_time(solution_str, ground_truth):
    async with busy:
        await asyncio.sleep(0.01)
    return 1.0

def hidden(completions):
    return one_for_each(completions)

async def one_for_each(completions):
    return [await one_at_a_time(text, "") for text in completions]
""")
    process = started("one_at_a_time", "hidden")
    for _ in range(2):
        found = process.score(batch(ground_truth=["4", "5"]))
        assert [one.scores for one in found.values()] == [[1.0] * 4] * 2
    process.close()


def test_what_a_function_of_verls_kind_changes_is_its_own(module: Path) -> None:
    module.write_text("""
def takes(solution_str, ground_truth, extra_info):
    extra_info.pop("k")
    return 1.0

def reads(solution_str, ground_truth, extra_info):
    return float("k" in extra_info)
""")
    rows = batch(extra_info=[{"k": 1}, {"k": 2}], ground_truth=["4", "5"])
    found = scores("takes", "reads", rows=rows)
    assert found["takes"].scores == found["reads"].scores == [1.0] * 4


def test_kwargs_of_the_configuration_and_a_file_by_its_path(module: Path) -> None:
    for place in ("mine:correct", "./mine.py:correct", f"{module}:correct"):
        process = RewardProcess({"c": Spec("rl.rewards.c", place, {"scale": 3})})
        assert process.score(batch())["c"].scores == [3.0, 0.0, 0.0, 3.0]
        process.close()
    said = refused("correct", unit="m")
    assert said.startswith("rl.rewards.correct: correct has no parameter unit, which kwargs give")


def test_what_a_function_prints_does_not_disturb_the_answers(capfd: Any) -> None:
    assert scores("prints")["prints"].scores == [0.0] * 4
    assert "to the terminal" in capfd.readouterr().err


# --- what goes wrong


@pytest.mark.parametrize(
    "name, said",
    [
        (
            "raises",
            "prompt '2 + 2?': the function failed on the completion 'no': ZeroDivisionError: "
            "division by zero ({file}:{line})",
        ),
        (
            "leaves",
            "first prompt '2 + 2?': the function failed: SystemExit: no key",  # of every row
        ),
        ("hangs", "first prompt '2 + 2?': the function gave no answer within 1 s (timeout) for 4"),
        (
            "hangs_async",
            "first prompt '2 + 2?': the function gave no answer within 1 s (timeout) for 4",
        ),
        (
            "dies",
            "first prompt '2 + 2?': the function ended the process that it runs in (exit code 3)",
        ),
        (
            "few",
            "first prompt '2 + 2?': the function returned 1 scores for 4 completions ({file}:",
        ),
        ("one_number", "first prompt '2 + 2?': the function returned 1.0, not a list of 4 scores"),
        (
            "nan",
            "prompt '2 + 2?': the function returned nan for the completion 'no', not a finite "
            "number or None ({file}:",
        ),
        (
            "word",
            "prompt '2 + 2?': the function returned 'good' for the completion '4', not a finite "
            "number or None",
        ),
    ],
)
def test_an_error_is_one_line_with_function_row_and_completion(
    name: str, said: str, module: Path
) -> None:
    line = refused(name, timeout=1)
    expected = said.format(file=module, line=line_of("return [1 / (len(c)"))
    assert line.startswith(f"rl.rewards.{name}: {expected}") and "\n" not in line


def test_a_timeout_of_its_own_is_an_error_of_the_function() -> None:
    said = refused("gives_up")
    assert "TimeoutError" in said and "(timeout)" not in said
    rows = batch()
    rows.completions[1] = "4"
    found = scores("gives_up", skip=True, rows=rows)["gives_up"]
    assert found.scores == [1.0, 1.0, None, None], "the other prompt keeps its scores"


def test_with_skip_errors_are_no_score_and_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    """The other functions, and the other prompts, keep their scores."""
    names = ["on_the_second_prompt", "hangs", "dies", "nan", "reward_len"]
    rows = batch()
    rows.completions[1] = "4"
    with caplog.at_level("WARNING", "rlhf"):
        found = scores(*names, skip=True, timeout=1, rows=rows)
    assert found["on_the_second_prompt"].scores == [1.0, 1.0, None, None]
    assert found["on_the_second_prompt"].failed == [False, False, True, True]
    assert found["hangs"].scores == found["dies"].scores == [None] * 4
    assert found["hangs"].failed == [True] * 4
    assert found["nan"].scores == [1.0, 1.0, None, None]
    assert found["reward_len"].scores == [1.0, 1.0, 1.0, 2.0]
    assert len(caplog.messages) == 4, "once for each function"
    assert all(message.endswith("skipped (on_error=skip)") for message in caplog.messages)


def test_after_a_function_was_ended_the_next_batch_is_scored_again() -> None:
    process = started("hangs", "reward_len", skip=True, timeout=0.5)
    for _ in range(2):
        found = process.score(batch())
        assert found["hangs"].scores == [None] * 4
        assert found["reward_len"].scores == [1.0, 2.0, 1.0, 2.0]
    process.close()


@pytest.mark.parametrize(
    "name, said",
    [
        ("nowhere", "rl.rewards.nowhere: there is no nowhere in mine"),
        ("number", "rl.rewards.number: number is not a function"),
        (
            "old",
            "rl.rewards.old: old has the parameters (turns, response), and gets lists by name: "
            "write def f(prompts, completions, **columns) -> list[float | None]",
        ),
        ("first", "rl.rewards.first: first has the parameters (completions), and gets lists by"),
    ],
)
def test_what_cannot_be_called_is_told_when_it_is_imported(name: str, said: str) -> None:
    assert refused(name).startswith(said)


def test_a_module_that_cannot_be_imported_is_named_with_file_and_line(module: Path) -> None:
    module.write_text("\nimport nothing_of_this_name\n")
    said = refused("f")
    assert said.startswith("rl.rewards.f: cannot import mine: ModuleNotFoundError: No module named")
    assert said.endswith(f"({module}:2)")


def test_the_process_ends_with_what_functions_have_started(module: Path, tmp_path: Path) -> None:
    module.write_text(
        "import subprocess\n"
        "def f(completions):\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    return [float(child.pid)] * len(completions)\n"
    )
    process = started("f")
    pid = int(process.score(batch())["f"].scores[0] or 0)
    os.kill(pid, 0)
    process.close()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break  # it has ended; nobody has waited for it yet
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists()

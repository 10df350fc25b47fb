"""Reward functions that go wrong in odd ways: one line or the right scores, and nothing is left."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf.base.errors import UserError
from rlhf.data.records import Prompt, Turn
from rlhf.rewards.batch import Batch, make_batch
from rlhf.rewards.process import ENDLESS, RewardProcess, Spec

MODULE = """
import asyncio, functools, os, signal, statistics, subprocess, time

def huge(completions):
    return [1e39] * len(completions)

async def hangs_async(completions):
    await asyncio.sleep(60)

async def blocks(completions):
    time.sleep(60)  # no await: no other function gets on

async def quick(completions):
    return [1.0] * len(completions)

def verl(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    assert set(kwargs) == {"scale"}, kwargs  # as in verl: no columns
    return kwargs["scale"]

def starts_a_process(completions, path):
    child = subprocess.Popen(["sleep", "987"])
    open(path[0], "w").write(str(child.pid))
    return [1.0] * len(completions)

async def inner(completions):
    await asyncio.sleep(0)
    return [2.0] * len(completions)

@functools.wraps(inner)
def runs_it(completions):
    return asyncio.run(inner(completions))

@functools.wraps(inner)
def hides_it(completions):
    return inner(completions)

def compares(completions):  # a group: it fails alone for another reason
    values = [float(c) for c in completions]
    spread = statistics.stdev(values)
    return [v / (1 + spread) for v in values]

def setting(completions, max):
    return [float(len(c) <= max) for c in completions]

def interrupts(completions):
    raise KeyboardInterrupt

async def cancels(completions):
    raise asyncio.CancelledError

class Silent(Exception):
    def __str__(self):
        raise ValueError

def cannot_be_written(completions):
    raise Silent

class Odd:
    def __repr__(self):
        raise ValueError

def odd(completions):
    return Odd()

def killed(completions):
    os.kill(os.getpid(), signal.SIGRTMIN + 1)
    time.sleep(60)

def writes_anywhere(completions):
    for number in range(3, 20):
        try:
            os.write(number, b"not for you\\n")
        except OSError:
            pass
    return [1.0] * len(completions)

def spoils(completions, answer):
    completions.clear()
    answer[:] = []
    return [1.0] * 4

def counts(completions, answer):
    return [float(len(completions) + len(answer))] * len(completions)

calls = []

def remembers(completions):
    calls.append(1)
    return [float(len(calls))] * len(completions)

class Reward:
    def __call__(self, completions):
        return [1.0] * len(completions)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return file


def batch(*completions: str, **columns: str) -> Batch:
    """Two prompts with two responses each."""
    texts = completions or ("1", "2", "3", "4")
    row = json.dumps({"answer": "4"} | columns)
    prompts = [Prompt([Turn("user", f"prompt {i}")], row) for i in (0, 0, 1, 1)]
    return make_batch(prompts, texts, [[7]] * 4, {}, per_prompt=2)


def scores(name: str, rows: Batch | None = None, **settings: Any) -> list[float | None]:
    return all_scores({name: f"mine:{name}"}, rows, **settings)[name]


def all_scores(
    functions: dict[str, str], rows: Batch | None = None, **settings: Any
) -> dict[str, list[float | None]]:
    specs = {name: Spec(f"key.{name}", path, **settings) for name, path in functions.items()}
    process = RewardProcess(specs)
    try:
        return {name: result.scores for name, result in process.score(rows or batch()).items()}
    finally:
        process.close()


def refused(name: str, rows: Batch | None = None, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        scores(name, rows, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_score_that_fp32_cannot_hold_is_refused() -> None:
    assert "returned 1e+39 for the completion '1', not at most 1e+30" in refused("huge")


def test_an_async_function_that_hangs_costs_one_timeout_where_errors_are_skipped() -> None:
    started = time.time()
    assert scores("hangs_async", timeout=1, skip=True) == [None] * 4
    assert time.time() - started < 1 + 3 * 4  # not one timeout per prompt, and a slow start


def test_a_function_that_blocks_is_named_also_beside_a_server() -> None:
    """A server limits each of its requests itself, so its call as a whole has no limit."""
    specs = {
        "mine": Spec("key.mine", "mine:blocks", timeout=1),
        "server": Spec("key.server", "mine:quick", timeout=ENDLESS),
    }
    process = RewardProcess(specs)
    started = time.time()
    try:
        with pytest.raises(UserError, match="key.mine: .*no answer within 1 s"):
            process.score(batch())
    finally:
        process.close()
    assert time.time() - started < 30


def test_a_verl_function_with_kwargs_gets_those_of_the_configuration() -> None:
    assert scores("verl", kwargs={"scale": 5}) == [5.0] * 4


def test_what_a_function_started_ends_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    scores("starts_a_process", batch(path=str(file)))
    state = Path(f"/proc/{file.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.parametrize("name", ["runs_it", "hides_it"])
def test_a_plain_function_around_an_async_one(name: str) -> None:
    assert scores(name) == [2.0] * 4


def test_the_row_is_the_one_that_fails_in_the_same_way() -> None:
    line = refused("compares", batch("1", "2", "oops", "4"))
    assert "the function failed on the completion 'oops': ValueError: could not convert" in line
    assert line.startswith("key.compares: prompt 'prompt 1':")


def test_what_fails_on_every_row_is_no_fault_of_a_completion() -> None:
    line = refused("setting", kwargs={"max": "3"})
    assert "the function failed: TypeError: '<=' not supported" in line


@pytest.mark.parametrize(
    "name, said",
    [
        ("interrupts", "the function failed: KeyboardInterrupt"),
        ("cancels", "the function failed: CancelledError"),
        ("cannot_be_written", "the function failed: Silent: (it cannot be written)"),
        ("odd", "the function returned a Odd, not a list of 4 scores"),
        ("killed", f"ended the process that it runs in (signal {35}"),
        ("Reward", "key.Reward: Reward is a class: name a function, or an object of the class"),
    ],
)
def test_odd_ends_are_one_line(name: str, said: str) -> None:
    assert said in refused(name)


def test_what_a_function_writes_into_open_files_is_no_answer() -> None:
    assert scores("writes_anywhere") == [1.0] * 4


def test_a_function_cannot_change_what_others_get() -> None:
    both = all_scores({"spoils": "mine:spoils", "counts": "mine:counts"})
    assert both == {"spoils": [1.0] * 4, "counts": [8.0] * 4}


def test_a_file_for_two_sources_is_one_module() -> None:
    one, two = "mine.py:remembers", "./mine.py:remembers"
    assert all_scores({"a": one, "b": two}) == {"a": [1.0] * 4, "b": [2.0] * 4}


def test_a_file_may_be_named_like_a_library(tmp_path: Path) -> None:
    (tmp_path / "statistics.py").write_text("def own(completions):\n    return [3.0] * 4\n")
    found = all_scores({"own": "statistics.py:own", "counts": "mine.py:counts"})
    assert found == {"own": [3.0] * 4, "counts": [8.0] * 4}


@pytest.mark.parametrize("name", ["prompts", "completions", "trainer_state"])
def test_kwargs_cannot_replace_what_is_scored(name: str) -> None:
    line = refused("huge", kwargs={name: 3})
    assert f"kwargs have {name}, which is an argument of its own: drop it" in line


def test_a_module_that_ends_the_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(UserError) as raised:
        all_scores({"good": "mine:counts", "bad": "bad:f", "other": "mine:huge"})
    assert str(raised.value) == (
        "key.bad: importing the function ended the process that it runs in (exit code 3)"
    )


def test_the_system_prompt_of_a_source_is_not_in_a_text_prompt() -> None:
    prompt = Prompt([Turn("system", "Be brief."), Turn("user", "3 + 4?")], "")
    assert make_batch([prompt], ["7"], [[7]], {}).prompts == ["3 + 4?"]


def test_definitions_of_tools_are_not_in_a_prompt() -> None:
    tools, question = Turn("tools", '[{"name": "add"}]'), Turn("user", "3 + 4?")
    for before in ([tools], [tools, Turn("system", "Be brief.")]):
        prompt = Prompt([*before, question])
        assert make_batch([prompt], ["7"], [[7]], {}).prompts == ["3 + 4?"]
    messages = make_batch([Prompt([tools, question], "", True)], ["7"], [[7]], {}).prompts
    assert messages == [[{"role": "user", "content": "3 + 4?"}]]

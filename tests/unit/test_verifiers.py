"""The built-in verifiers, against a table worked out by hand and against random numbers."""

from __future__ import annotations

import doctest
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest

from rlhf import verifiers
from rlhf.verifiers import (
    equality,
    exact_match,
    final_answer,
    final_answers,
    json_valid,
    length,
    math,
    number,
    regex,
    think_format,
)

WITH_REFERENCE = [exact_match, number, math]


def test_the_examples_in_the_docstrings() -> None:
    """Each function has one. That of `math` imports SymPy, which takes a second."""
    assert doctest.testmod(verifiers).failed == 0
    assert doctest.testmod(final_answers).failed == 0
    for function in (*WITH_REFERENCE, final_answer, json_valid, length, regex, think_format):
        assert ">>>" in (function.__doc__ or ""), function.__name__


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, rlhf.verifiers; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'sympy', 'math_verify', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- the final answer


@pytest.mark.parametrize(
    "text, answer",
    [
        # the last number
        ("7+2=9, 4+9=13, 1+5+1=7. So 739.", "739"),
        ("147+592=739", "739"),
        # spaces of LaTeX
        (r"\boxed{12\,\text{cm}^2}", "12"),
        (r"\boxed{12\,\mathrm{cm}}", "12"),
        (r"\boxed{12~\text{cm}}", "12"),
        (r"\boxed{12\;\textrm{cm}}", "12"),
        (r"\boxed{12\, cm}", "12"),
        (r"\boxed{12\,\%}", "12"),
        (r"\boxed{10,\!080}", "10080"),
        (r"\boxed{10\,080}", "10080"),
        ("5-3", "3"),
        ("It is -5", "-5"),
        ("= \u22125", "-5"),
        ("(-3)", "-3"),
        ("$1,234.50", "2469/2"),
        ("-$5", "-5"),
        ("1,234, and so on", "1234"),
        ("1, 2, 3", "3"),
        ("12,34", "34"),
        ("so 1/2.", "1/2"),
        ("2/4", "1/2"),
        (".5", "1/2"),
        ("3.0", "3"),
        ("6e3", "6000"),
        (r"-\frac12", "-1/2"),
        (r"1\frac{1}{2}", "3/2"),
        (r"10{,}000 or 10\,001", "10001"),
        # GSM8K
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### -1,000\nThat was 3 steps.", "-1000"),
        ("#### 42.", "42"),
        ("#### $5", "5"),
        ("#### Step 2\nso 7", "7"),  # headings
        ("#### 12. Sum\nso 7", "7"),
        ("#### 12) Sum\nso 7", "7"),
        # boxed
        (r"\boxed{8}, not 9", "8"),
        (r"#### 7, or \boxed{8}", "8"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{7} and \boxed{", "7"),
        (r"\boxed{x = 1{,}234 \text{ cm}^2}", "1234"),
        (r"\boxed{90^{\circ}}", "90"),
        (r"\boxed{5 \text{ cm}^2}", "5"),
        (r"\boxed{\text{5}}", "5"),
        (r"\boxed{\mathbf{-5}}", "-5"),
        (r"\boxed{1 234}", "1234"),
        (r"\boxed{- 5}", "-5"),
        ("x = - 5", "-5"),
        ("7 - 5", "5"),
        ("\u20135", "-5"),
        ("pages 3\u20135", "5"),
        ("It is 3 1/2.", "7/2"),
        (r"\boxed{3 1/2}", "7/2"),
        ("step 3 5/2", "5/2"),
        (r"\boxed{x = 1{,}234 \text{ cm}}", "1234"),
        (r"\boxed{\$5}", "5"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{90^\circ}", "90"),
        (r"\boxed{5 apples}", "5"),
        (r"\boxed{\dfrac{3}{4}}", "3/4"),
        (r"\boxed{2x}", "2x"),
        (r"\boxed{3\pi}", r"3\pi"),
        (r"\boxed{(1,2)}", "(1,2)"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{}", ""),
        # none
        ("", None),
        ("I do not know.", None),
        ("3/0", None),
        ("1e99999999999", None),
        ("9" * 5000, None),
    ],
)
def test_the_final_answer_of_a_text(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_numbers_written_in_many_ways_are_read_exactly() -> None:
    draw = random.Random(1)
    for _ in range(300):
        cents = draw.randint(-(10**9), 10**9)
        sign, whole, rest = "-" if cents < 0 else "", abs(cents) // 100, abs(cents) % 100
        value = Fraction(cents, 100)
        written = [
            f"{sign}{whole}.{rest:02}",
            f"{sign}{whole:,}.{rest:02}",
            f"{sign}${whole:,}.{rest:02}",
            f"{sign}{whole}.{rest:02}0",
            f"{sign}{abs(cents)}/100",
            rf"{sign}\frac{{{abs(cents)}}}{{100}}",
            f"{cents}e-2",
        ]
        for text in written:
            for sentence in (f"12 and {text}.", f"#### {text}", rf"\boxed{{{text}}} 3"):
                assert final_answer(sentence) == str(value), sentence


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 9000,
        r"\frac{" * 9000,
        r"\boxed{" + r"\text{" * 9000 + "}" * 9001,
        "1" + " " * 60000,
        "1 / " * 15000,
        "1,234" * 12000,
        "9" * 60000,
        "#### " * 12000,
        r"\boxed{5" + " a." * 20000 + "}",
    ],
)
def test_no_text_takes_long(text: str) -> None:
    """A policy may write anything: the time grows with the length, not with its square."""
    started = time.process_time()
    final_answer(text)
    assert time.process_time() - started < 1.5


# --- references


@pytest.mark.parametrize("verifier", WITH_REFERENCE)
def test_where_the_reference_is_read(verifier: Callable[..., Any]) -> None:
    messages = [[{"role": "assistant", "content": "7"}]] * 4
    many = {"level": [1] * 4, "prompts": ["?"] * 4, "completion_ids": [[5]] * 4}
    for completions in (["7"] * 4, messages):
        # ground_truth before answer before reward_model, row by row
        assert verifier(
            completions=completions,
            ground_truth=["7", None, None, None],
            answer=["8", "8", None, None],
            reward_model=[{"ground_truth": "8"}, None, {"ground_truth": "7"}, None],
            **many,
        ) == [1.0, 0.0, 1.0, None]
        # a named column alone; numbers, lists, and an empty one
        assert verifier(
            completions=completions, column="goal", goal=[7, [8, 7], [], [8]], answer=["7"] * 4
        ) == [1.0, 1.0, None, 0.0]
        assert (
            verifier(
                completions=completions, column="answer", answer=["7"] * 4, ground_truth=["8"] * 4
            )
            == [1.0] * 4
        )
    assert verifier(completions=[], answer=[]) == []


@pytest.mark.parametrize("verifier", WITH_REFERENCE)
def test_a_column_that_is_not_there_is_named(verifier: Callable[..., Any]) -> None:
    fix = "name the one with the reference in kwargs: {column: NAME}"
    with pytest.raises(ValueError) as raised:
        verifier(["7"], prompts=["?"], completion_ids=[[5]], trainer_state=None, solution=["7"])
    assert str(raised.value) == (
        "the data have no column ground_truth or answer or reward_model (they have solution): "
        + fix
    )
    with pytest.raises(ValueError) as raised:
        verifier(["7"], column="goal")
    assert str(raised.value) == f"the data have no column goal (they have none): {fix}"
    with pytest.raises(ValueError) as raised:
        verifier(["7"], reward_model=[{"style": "rule"}])
    assert str(raised.value) == (
        "column reward_model holds an object without ground_truth (it has style): name the column "
        "with the reference in kwargs: {column: NAME}"
    )


def test_a_reference_without_a_number_is_none() -> None:
    assert number(["7", "7"], answer=["seven", r"\boxed{x}"]) == [None, None]
    assert math(["7"], answer=[""]) == [None]


def test_the_solutions_of_gsm8k_are_right_themselves() -> None:
    solution = "She sold 48/2 = <<48/2=24>>24 clips.\nAltogether $48+24 = $72.\n#### 72"
    for verifier in (number, math):
        assert verifier([solution, "So 72.", "24"], answer=[solution] * 3) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "completion, truth, score",
    [
        (r"\boxed{\frac{2}{4}}", "0.5", 1.0),
        (r"so $x^2 + 2x + 1$", r"(x+1)^2", 1.0),
        (r"so $x^2 + 2x + 2$", r"(x+1)^2", 0.0),
        (r"\boxed{\{2, 1\}}", r"\{1,2\}", 1.0),
        (r"\boxed{\sqrt{8}}", r"$2\sqrt{2}$", 1.0),
        (r"it is \boxed{[0, 1)}", r"\boxed{[0,1)}", 1.0),
        (r"it is \boxed{[0, 1]}", r"\boxed{[0,1)}", 0.0),
        ("no answer", "4", 0.0),
        ("", "4", 0.0),
        (r"\boxed{\frac{1}{", "4", 0.0),
    ],
)
def test_equal_formulas_are_equal(completion: str, truth: str, score: float) -> None:
    assert math([completion], ground_truth=[truth]) == [score]


ENDLESS = [
    r"\boxed{9^{9^9}}",
    r"\boxed{99!!}",
    "so $9999!!$",
    r"\boxed{9999!^{9999}}",
    r"\boxed{\binom{10^9}{10^8}}",
    r"\boxed{\prod_{i=1}^{9999} i^i}",
    r"\boxed{((9^{99})^{999})^{99}}",
    r"\boxed{(x+y+z+w)^{200}}",
    r"\boxed{\int_0^1 e^{x^2}\sin(x^3)dx}",
]


def test_what_takes_too_long_to_compute_is_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """SymPy takes minutes for most of these, and heeds no exception. The rows between are scored,
    in this batch and in the next, and there is one warning."""
    monkeypatch.setattr(equality, "SECONDS", 0.3)
    monkeypatch.setattr(equality, "_warned", False)
    texts = [text for endless in ENDLESS for text in (endless, "4", endless, "5")]
    assert math(texts, answer=["4"] * len(texts)) == [0.0, 1.0, 0.0, 0.0] * len(ENDLESS)
    assert math([ENDLESS[0], "4"], answer=["4"] * 2) == [0.0, 1.0]
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("math: cannot check within 0.3 s whether an answer is")


def test_many_of_them_do_not_use_up_the_time_of_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten have the whole limit each, further ones a tenth of it. Without that it is 6 s here."""
    monkeypatch.setattr(equality, "SECONDS", 0.1)
    texts = [rf"\boxed{{{n}^{{9^9}}}}" for n in range(2, 62)]
    started = time.perf_counter()
    assert math(texts, answer=["4"] * 60) == [0.0] * 60
    print(f"{time.perf_counter() - started:.1f} s")  # 1.5 s on an idle machine


def test_the_memory_of_an_answer_is_bounded() -> None:
    code = (
        "import sys; from rlhf.verifiers import equality; "
        "equality.compare = lambda _, text: str(int(len(bytearray(int(text))) > 0)); "
        "equality.answer([[[], '1000'], [[], str(3 << 30)], [[], '1000']], 5.0, sys.stdout)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["1", "late", "1"]


def test_the_process_that_compares_is_started_again() -> None:
    assert math(["4"], answer=["4"]) == [1.0]
    assert equality._process is not None
    equality._process.kill()
    equality._process.wait()
    assert math(["4"], answer=["4"]) == [1.0]


def test_large_powers_are_computed_and_loud_numbers_are_read() -> None:
    texts = [r"\boxed{2^{10}}", "$10^{100}$", r"\boxed{x^{2^3}}", r"\boxed{2^{x^2}}", "$5!$"]
    assert math(texts, answer=["1024", "10^{50} * 10^{50}", "x^8", "2^{x^2}", "120"]) == [1.0] * 5
    texts = ["It is **123456**.", "Step 2: **5** + **123451** = **123456**", "It is 123456!"]
    assert math(texts, answer=[123456] * 3) == [1.0] * 3


def test_math_runs_in_a_thread() -> None:
    """The library's own time limits are signals, which fail there."""
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.extend(math(["7", "8"], answer=["7", "7"])))
    thread.start()
    thread.join()
    assert got == [1.0, 0.0]


# --- without a reference


@pytest.mark.parametrize("verifier", WITH_REFERENCE)
def test_a_column_with_the_name_of_a_setting_is_ignored(verifier: Callable[..., Any]) -> None:
    assert verifier(["7", "8"], column=["a", "b"], answer=["7", "7"]) == [1.0, 0.0]


def test_a_column_in_place_of_the_pattern_is_named() -> None:
    column: Any = ["a"]
    with pytest.raises(ValueError, match="give the pattern in kwargs"):
        regex(["a"], pattern=column)


def test_a_wrong_pattern_is_named() -> None:
    with pytest.raises(ValueError, match=r"not a regular expression \(pattern=\(\): missing \)"):
        regex(["a"], pattern="(")


def test_json_is_read_strictly() -> None:
    for text in ("", "NaN", '{"a": Infinity}', "{'a': 1}", "```json\n{}\n```", "[" * 10**5):
        assert json_valid([text]) == [0.0], text[:20]
    for value in ({"a": [1, None]}, [], 1.5, "x", None, True):
        text = f" {json.dumps(value)}\n"
        assert json_valid([text]) == [1.0]
        assert json_valid([text], required_keys=["a"]) == [float(isinstance(value, dict))]


@pytest.mark.parametrize(
    "text, score",
    [
        ("\n<think>\nhm\n</think>\n\n7", 1.0),
        ("<think></think>7", 1.0),
        ("so <think>hm</think> 7", 0.0),
        ("<think>hm</think> ", 0.0),
        ("<think>hm</think><think>hm</think> 7", 0.0),
        ("<think>hm <think>hm</think> 7", 0.0),
        ("</think>hm<think> 7", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_with_thoughts(text: str, score: float) -> None:
    assert think_format([[{"role": "assistant", "content": text}]]) == [score]


def test_the_penalty_for_length() -> None:
    """By hand: 10 tokens wished, or at most 10."""
    ids = [[1] * n for n in (0, 5, 10, 15, 20, 30)]
    texts = [""] * 6
    assert length(texts, ids, target=10) == [-1.0, -0.5, 0.0, -0.5, -1.0, -1.0]
    assert length(texts, ids, max=10) == [0.0, 0.0, 0.0, -0.5, -1.0, -1.0]
    assert length(["a" * 6], target=4, unit="characters") == [-0.5]
    columns: dict[str, Any] = {"target": [3], "unit": ["cm"]}  # of the data
    assert length([""], [[1] * 15], max=10, **columns) == [-0.5]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, r"give either target or max above 0 \(target=None, max=None\)"),
        ({"target": 3, "max": 3}, r"give either target or max above 0 \(target=3, max=3\)"),
        ({"max": 0}, r"give either target or max above 0 \(target=None, max=0\)"),
        ({"max": 3}, "no completion_ids: unit=tokens needs them"),
        ({"max": 3, "unit": "words"}, r"no such unit \(unit=words\): it is tokens or characters"),
    ],
)
def test_wrong_settings_of_the_length(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        length(["a"], **settings)

r"""The final answer in a text: in \boxed{}, after GSM8K's "####", or its last number."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = (
    r"(?:(?<![\w.)\]}])[-+\u2212\u2013])?\$?"  # a sign, but not the minus in 5-3
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"  # 1,234.5 or .5
    r"(?:[eE][-+]?\d+(?!\w)|\s?/\s?\d+(?!\d|[./]\d))?"  # 1e-3, 1/2
)
# GSM8K's; "#### Step 2" and "#### 2. Sum" are headings
ANSWER = re.compile(rf"####[ \t]*(?>({NUMBER}))(?![.):][ \t]*\S)")
STYLED = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{\s*([-+]?[\d.,]+)\s*\}"
)  # \textbf{5}
UNITS = re.compile(
    r"\\(?:text|textrm|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?"  # \text{cm}^2
    r"|\^?\{?\\circ\}?|\\?%|[${}]"
)
MIXED = re.compile(r"(?<![\d./])(\d{1,9})\s+(\d{1,9})/(\d{1,9})(?![\d/])")  # 3 1/2
SIGN_ALONE = re.compile(r"(^|[=(\[{:,])(\s*)[-\u2212\u2013]\s+(?=[\d$.])")  # x = - 5
GROUPS = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")  # 1 234
LATEX_FRACTION = re.compile(  # 2\frac{1}{2}, \frac12
    r"(\d{1,9})? ?\\[dt]?frac ?(?:\{ ?(-?\d{1,9}) ?\} ?\{ ?(\d{1,9}) ?\}|(\d) ?(\d)(?!\d))"
)
THIN_COMMA = re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))")  # 10\,080
SPACES = re.compile(r"\\[,;: ]|(?<!\\)~")  # 12\,\text{cm}
LONGEST_NUMBER = 1000  # characters


def final_answer(text: str) -> str | None:
    r"""The final answer in a text: in the last \boxed{}, else the number after the last "####" (as
    in GSM8K), else the last number; None where there is none of these.

    Equal numbers give equal texts, so that answers can be counted (majority voting). In \boxed{}
    there may also be something else, which is returned as it is written.

    >>> final_answer("7+2=9, 4+9=13. So 739."), final_answer("#### $1,234.50, for 3 people")
    ('739', '2469/2')
    >>> final_answer(r"so \boxed{x^2 + 1}."), final_answer("I do not know.")
    ('x^2 + 1', None)
    """
    boxed = last_boxed(text)
    value = final_number(text)
    return str(value) if value is not None else boxed


def final_number(text: str) -> Fraction | None:
    """The final answer as a number; None where it is something else."""
    boxed = last_boxed(text)
    if boxed is not None:
        return _whole_number(boxed)
    text = _plain(text)
    marked = ANSWER.findall(text)
    return _value((marked or re.findall(NUMBER, text) or [""])[-1])


def _whole_number(text: str) -> Fraction | None:
    r"""The number that a text is as a whole: `x = 1{,}234 \text{ cm}`, but not `3\pi` or `2x`."""
    plain = UNITS.sub("", STYLED.sub(r"\1", _plain(GROUPS.sub("", text)))).strip()
    whole = re.fullmatch(
        rf"(?:[A-Za-z]\w*\s*=\s*)?({NUMBER})(?:\s+[A-Za-z]{{2,}}[A-Za-z .]*)?", plain
    )
    return _value(whole[1]) if whole else None


def _plain(text: str) -> str:
    r"""Formulas as plain text, as far as numbers need it: \frac{1}{2} as 1/2, 1{,}234 as 1,234."""
    text = text.replace(r"\!", "").replace("{,}", ",").replace(r"\$", "$")
    text = SPACES.sub(" ", THIN_COMMA.sub(",", text))
    text = SIGN_ALONE.sub(r"\1\2-", LATEX_FRACTION.sub(_slashed, text))
    return MIXED.sub(_improper, text)


def _improper(mixed: re.Match[str]) -> str:
    """7/2 for 3 1/2; as it is where the second part is no fraction below 1, as in "step 3 5/2"."""
    whole, above, below = map(int, mixed.groups())
    return f"{whole * below + above}/{below}" if above < below else mixed[0]


def _slashed(fraction: re.Match[str]) -> str:
    whole, above, below = fraction[1], fraction[2] or fraction[4], fraction[3] or fraction[5]
    return f"{int(whole or 0) * int(below) + int(above)}/{below}"


def _value(written: str) -> Fraction | None:
    """The value of a NUMBER; None for a division by zero and for what is too large to compute."""
    digits = re.sub(r"[\u2212\u2013]", "-", re.sub(r"[$,\s]", "", written))
    exponent = re.search(r"[eE][-+]?(\d+)$", digits)
    if len(digits) > LONGEST_NUMBER or (exponent and len(exponent[1]) > 3):
        return None
    try:
        return Fraction(digits)
    except (ValueError, ZeroDivisionError):  # 1.5/2, 1/0
        return None


def last_boxed(text: str) -> str | None:
    r"""What is inside the last \boxed{...}, braces in it included; None without a complete one."""
    open_braces: list[int | None] = []  # where each begins if it is that of a box
    last, content = -1, None
    for token in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if token[0].startswith(r"\boxed"):
            open_braces.append(token.end())
        elif token[0] == "{":
            open_braces.append(None)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > last:
                last, content = start, text[start : token.start()].strip()
    return content


def as_formula(text: str) -> str:
    r"""A reference as math-verify reads it best: GSM8K's number, or the whole text in \boxed{}."""
    marked = ANSWER.findall(text)
    if not marked and ("\\boxed" in text or re.search(r"(?<!\\)\$", text)):
        return text
    return rf"\boxed{{{marked[-1] if marked else text}}}"

"""Responses as HTML: rewards, and tokens coloured by what each adds to the KL.

Texts of models and data are escaped here; nothing else of the page makes HTML of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from rlhf.app.models import Answer
from rlhf.base.log import plural, printable

STRONG = 3.0  # nats from which on a token has the full colour
FAINT = 0.03  # share of the full colour below which there is none
RED, GREEN = "220,38,38", "22,163,74"  # likelier than under the reference; less likely
PART = "▯"  # for a token that is only a part of a character


def colour(difference: float) -> str:
    """The background of a token by log pi - log pi_ref in nats; "" where there is none."""
    strength = min(abs(difference) / STRONG, 1.0)
    if not strength >= FAINT:  # nothing to see; NaN neither
        return ""
    return f"background:rgba({RED if difference > 0 else GREEN},{0.65 * strength:.2f})"


def tokens_html(tokens: Sequence[tuple[str, float]]) -> Markup:
    """Coloured tokens, each with its number on hover."""
    span = '<span style="{}" title="{:+.3f} nats">{}</span>'
    spans = [
        Markup(span).format(colour(difference), difference, printable(text) or PART)
        for text, difference in tokens
    ]
    style = "white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.7"
    return Markup('<div class="tokens" style="{}">{}</div>').format(style, Markup("").join(spans))


def answer_html(number: int, answer: Answer) -> Markup:
    """What was measured of a response. Args: number: of the response, from 1."""
    facts = [f"reward {score:+.2f} ({name})" for name, score in answer.rewards]
    if answer.tokens:
        total = sum(difference for _, difference in answer.tokens)
        mean = total / len(answer.tokens)
        facts.append(
            f"KL {total:+.2f} nats over {plural(len(answer.tokens), 'token')}"
            f" ({mean:+.3f} per token) to {answer.reference}"
        )
    if answer.stopped:
        facts.append("stopped")
    elif not answer.finished:
        facts.append("truncated")
    head = Markup("<b>{}</b> {}").format(number, printable(" · ".join(facts)))
    body = tokens_html(answer.tokens) if answer.tokens else Markup("")
    notes = [Markup("<div><i>{}</i></div>").format(printable(note)) for note in answer.notes]
    style = "margin:6px 2px;font-size:0.9em;overflow-wrap:anywhere"
    block = '<div class="answer" style="{}">{}{}{}</div>'
    return Markup(block).format(style, head, body, Markup("").join(notes))


def note_html(text: str) -> str:
    """A line of the page for the user, escaped."""
    return f'<div style="overflow-wrap:anywhere;min-height:1.5em">{escape(printable(text))}</div>'

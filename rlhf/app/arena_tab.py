"""The tab of arena: which of two responses is better, without knowing whose they are.

The order of the policies is random for each prompt. Their names are shown after the vote.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from markupsafe import Markup

from rlhf.app import votes
from rlhf.app.inputs import sampling_inputs
from rlhf.app.match import Match, check_pair, next_prompt, take
from rlhf.app.models import SHARED, Models
from rlhf.app.policies import choices, name_of
from rlhf.app.talk import params_of
from rlhf.app.token_view import note_html
from rlhf.base.errors import UserError
from rlhf.base.log import first_line, plural, printable
from rlhf.chat.advice import Stage, advice

HELD_OUT, TYPED = "held-out prompts of the run's data", "typed"
BUTTONS = {"A": "arena-a", "B": "arena-b", "tie": "arena-tie", "both bad": "arena-bad"}
NEXT = "arena-next"
# clicks the button of a key; not where text is typed, and only while the tab is shown
KEYS = """
if (!window.arenaKeys) {
  window.arenaKeys = {1: 'arena-a', 2: 'arena-b', 3: 'arena-tie', 4: 'arena-bad', n: 'arena-next'};
  document.addEventListener('keydown', (event) => {
    const id = window.arenaKeys[event.key];
    if (!id || event.ctrlKey || event.altKey || event.metaKey || event.repeat) return;
    const typing = 'textarea, select, [contenteditable], input:not([type=radio])';
    if (event.target.closest(typing)) return;
    const button = document.getElementById(id);
    if (!button || !button.offsetParent || button.disabled) return;
    const now = Date.now();  // of keys that come at once the first one is the vote
    if (event.key !== 'n' && now - (window.arenaVoted ?? 0) < 500) return;
    window.arenaVoted = now;
    button.click();
  });
}
"""
HELP = "Keys: 1 = A, 2 = B, 3 = tie, 4 = both bad, n = next prompt. Names are shown after the vote."


def build(roots: Sequence[Path], models: Models = SHARED) -> None:
    """Args: roots: folders with outputs/ and multirun/; votes are written to the first one."""
    file = roots[0] / votes.FILE
    with gr.Row():
        first, second = (policy_dropdown(i) for i in (1, 2))
        annotator = gr.Textbox(
            label="Your name",
            info="written with each vote",
            max_length=80,
            min_width=250,
            elem_id="arena-name",
        )
    with gr.Row():
        source = gr.Radio(
            [HELD_OUT, TYPED],
            value=HELD_OUT,
            label="Prompts",
            min_width=250,
            elem_id="arena-source",
        )
        typed = gr.Textbox(label="Prompt to type", lines=1, min_width=250, elem_id="arena-typed")
    with gr.Accordion("Sampling", open=False), gr.Row():
        sampling = sampling_inputs()
    following = gr.Button("Next prompt", variant="primary", elem_id=NEXT)
    prompt, responses, buttons = match_part()
    note = gr.HTML(note_html(HELP), elem_id="arena-note", js_on_load=KEYS)
    standing = gr.HTML(elem_id="arena-standing")
    training_part(models, file, first)

    state = gr.State(Match())  # each browser gets a copy
    gr.on(fn=lambda: dropdowns(roots), inputs=None, outputs=[first, second])
    pair = [first, second]
    shown = [prompt, *responses, *buttons, note]

    def ask(match: Match, *values: Any) -> Iterator[list[Any]]:
        yield from next_match(models, file, match, *values)

    options: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
    chosen = [state, *pair, source, typed, *sampling]
    gr.on([following.click, typed.submit], ask, chosen, shown, **options)
    for choice, button in zip(BUTTONS, buttons):
        cast = voter(file, choice)
        button.click(cast, [state, *pair, annotator], [*buttons, note, standing], **options)
    gr.on([first.change, second.change], lambda a, b: ranking(file, a, b), pair, standing)


def match_part() -> tuple[gr.Textbox, list[gr.Textbox], list[gr.Button]]:
    """The prompt, the responses A and B, and the buttons for votes in the order of BUTTONS."""
    prompt = gr.Textbox(label="Prompt", interactive=False, max_lines=8, elem_id="arena-prompt")
    with gr.Row():
        responses = [
            gr.Textbox(
                label=f"Response {letter}",
                interactive=False,
                lines=8,
                max_lines=20,
                min_width=280,
                elem_id=f"arena-response-{letter.lower()}",
            )
            for letter in "AB"
        ]
    with gr.Row():
        labels = ("A is better (1)", "B is better (2)", "Tie (3)", "Both bad (4)")
        buttons = [
            gr.Button(label, interactive=False, min_width=120, elem_id=elem_id)
            for label, elem_id in zip(labels, BUTTONS.values())
        ]
    return prompt, responses, buttons


def training_part(models: Models, file: Path, policy: gr.Dropdown) -> None:
    """Where the command that trains on the votes is shown. Args: policy: that it starts from."""
    with gr.Accordion("Train on these", open=False):
        stage = gr.Radio(["rm", "dpo"], value="rm", label="Stage", elem_id="arena-stage")
        show = gr.Button("Show the command", elem_id="arena-train")
        command = gr.Textbox(label="Command", interactive=False, lines=4, elem_id="arena-command")
    show.click(lambda *values: training(models, file, *values), [policy, stage], command)


def policy_dropdown(number: int) -> gr.Dropdown:
    return gr.Dropdown(
        [],
        label=f"Policy {number}",
        info="a run, a directory or a hub id",
        allow_custom_value=True,
        min_width=250,
        elem_id=f"arena-policy-{number}",
    )


def dropdowns(roots: Sequence[Path]) -> list[gr.Dropdown]:
    """The choices when a browser opens the page; the two newest policies are chosen."""
    policies, _ = choices(roots)
    newest = [path for _, path in policies[:2]]
    chosen = [*newest, None, None][:2]
    return [gr.Dropdown(choices=policies, value=path) for path in chosen]


# ------------------------------------------------------------------------------------- the match


def next_match(
    models: Models,
    file: Path,
    match: Match,
    first: str,
    second: str,
    source: str,
    typed: str,
    *sampling: float,
) -> Iterator[list[Any]]:
    """Let both policies respond to the next prompt. Yields: the page, as `view`."""
    match.is_open, match.voted, match.round = False, "", match.round + 1
    this = match.round
    if match.request:
        match.request.stop()
    try:
        check_pair(first, second)
        names = ("temperature", "top_p", "top_k", "max_new_tokens")
        params = params_of(**dict(zip(names, sampling)), seed=0)
        yield view(match, note="looking for a prompt")
        text = typed if source == TYPED else None
        match.prompt = next_prompt(models, file, (first, second), text)
        a, b = random.sample([first.strip(), second.strip()], 2)
        match.policies, match.responses = (a, b), ["", ""]
        match.names = name_of(a), name_of(b)
        for i, policy in enumerate(match.policies):
            # others for each: similar policies would give the same response with the same numbers
            seeded = dataclasses.replace(params, seed=random.getrandbits(31))
            match.request = models.answer(policy, match.prompt, seeded)
            for kind, piece in match.request:
                match.responses[i] += piece if kind == "piece" else ""
                if match.round != this:  # the next prompt was asked for meanwhile
                    return
                # not the note itself, which names the policy
                yield view(match, note="writing" if kind == "piece" else "loading a model")
            match.responses[i] = match.request.answer.text
    except UserError as error:
        # a message may name the policy that failed: this prompt gets no vote
        yield view(match, note=str(error))
        return
    if match.round == this:
        match.is_open = True
        yield view(match, note=HELP)


def view(match: Match, note: str) -> list[Any]:
    """The page of a match. Args: note: the line below."""
    turns = match.prompt
    text = turns[0].text if len(turns) == 1 else "\n\n".join(f"{t.role}: {t.text}" for t in turns)
    responses = match.responses or ["", ""]
    buttons = [gr.Button(interactive=match.is_open) for _ in BUTTONS]
    return [printable(text), *map(printable, responses), *buttons, note_html(note)]


# -------------------------------------------------------------------------------------- the votes


def voter(file: Path, choice: str) -> Any:
    """What a button does. Args: file: of the votes."""

    def cast(match: Match, first: str, second: str, annotator: str) -> list[Any]:
        try:
            note = take(file, match, choice, annotator)
        except UserError as error:
            note = str(error)
        buttons = [gr.Button(interactive=match.is_open) for _ in BUTTONS]
        return [*buttons, note_html(note), ranking(file, first, second)]

    return cast


def ranking(file: Path, first: str | None, second: str | None) -> str:
    """The running win rate of two policies, as HTML."""
    with contextlib.suppress(UserError):
        check_pair(first, second)
        a, b = name_of(str(first).strip()), name_of(str(second).strip())
        count = votes.standing(list(votes.read(file)), a, b)
        if not count.votes:
            return note_html(f"no votes yet on {a} and {b}")
        rate, low, high = count.win_rate()
        line = Markup(
            "<b>{}</b> wins {:.0%} against <b>{}</b> (95 % interval {:.0%} to {:.0%}; "
            "{}, {}, {}, {} both bad; ties and both bad count half)"
        )
        names = printable(a), rate, printable(b), low, high
        counts = (
            plural(count.wins, "win"),
            plural(count.losses, "loss", "es"),
            plural(count.ties, "tie"),
            count.both_bad,
        )
        return str(
            Markup('<div style="overflow-wrap:anywhere">{}</div>').format(
                line.format(*names, *counts)
            )
        )
    return ""


def training(models: Models, file: Path, policy: str | None, stage: str) -> str:
    """The command that trains on the pairs, or what they lack."""
    if stage not in get_args(Stage) or not (policy or "").strip():
        return "choose policy 1: training starts from it"
    if not file.exists():
        return f"no votes for A or B yet ({file})"
    try:
        line = advice(file, stage, models.start_of(str(policy).strip()))  # type: ignore[arg-type]
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{file}: {first_line(error)}"
    return line.removeprefix("train on it:").strip()

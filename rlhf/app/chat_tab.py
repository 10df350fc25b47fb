"""The tab of chat: one policy, or up to four side by side.

The user chooses policies, reward models and a reference; responses are streamed, scored, and shown
with their tokens coloured by log pi - log pi_ref.
"""

from __future__ import annotations

import html
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from rlhf.app.inputs import model_dropdown, sampling_inputs
from rlhf.app.models import AUTO, SHARED, Models
from rlhf.app.policies import choices, name_of
from rlhf.app.talk import MOST, Settings, Talk, params_of, settings_of
from rlhf.app.token_view import answer_html, note_html
from rlhf.base.errors import UserError
from rlhf.base.log import printable

NONE = "none"
REFERENCES = [("SFT policy of the run", AUTO), ("none", NONE)]
LEGEND = (
    "Colours: log π − log π_ref of each token, in nats (the number is shown on hover). Red: "
    "likelier than under the reference; green: less likely; full colour at 3 nats."
)
WAITING = "…"  # before the first token


def build(roots: Sequence[Path], models: Models = SHARED) -> None:
    """Args: roots: folders with outputs/ and multirun/."""
    policies = model_dropdown(
        "Policies", "up to 4; a run, a directory or a hub id", "chat-policies"
    )
    policies.max_choices = MOST
    with gr.Accordion("Rewards, reference, system prompt, sampling", open=False):
        with gr.Row():
            rewards = model_dropdown("Reward models", "score each response", "chat-rewards")
            reference = gr.Dropdown(
                REFERENCES,
                value=AUTO,
                label="Reference",
                info="what the colours compare with",
                allow_custom_value=True,
                min_width=250,
                elem_id="chat-reference",
            )
        system = gr.Textbox(label="System prompt", lines=1, elem_id="chat-system")
        with gr.Row():
            sampling = sampling_inputs()
            seed = gr.Number(
                random.getrandbits(16),
                precision=0,
                label="seed",
                min_width=100,
                elem_id="chat-seed",
            )
    parts, chatbots, details = columns()
    note = gr.HTML(note_html(LEGEND), elem_id="chat-note")
    with gr.Row():
        message = gr.Textbox(
            show_label=False,
            placeholder="Message",
            scale=8,
            min_width=220,
            elem_id="chat-message",
        )
        send = gr.Button("Send", variant="primary", scale=1, min_width=80, elem_id="chat-send")
        stop = gr.Button("Stop", scale=1, min_width=80, elem_id="chat-stop")
        clear = gr.Button("Clear", scale=1, min_width=80, elem_id="chat-clear")
    state = gr.State(Talk())  # each browser gets a copy
    chosen = [policies, rewards, reference, system, *sampling, seed]
    shown = [*parts, *chatbots, *details, note, message]
    gr.on(fn=lambda: dropdowns(roots), inputs=None, outputs=[policies, rewards])
    stop.click(Talk.stop, state, None, queue=False)
    clear.click(forget, state, shown, show_progress="hidden")
    connect(models, state, chatbots, chosen, shown, [message.submit, send.click])


def connect(
    models: Models,
    state: gr.State,
    chatbots: Sequence[gr.Chatbot],
    chosen: Sequence[Any],
    shown: Sequence[Any],
    sent: Sequence[Any],
) -> None:
    """What happens when a message is sent, and by the buttons of the conversations.

    Args: chosen: the inputs of `read_settings`.  shown: the outputs of `view`.  sent: the events.
    """
    message = shown[-1]

    # gradio looks for the types of its events in the signatures of functions
    def ask(talk: Talk, text: str, *values: Any) -> Iterator[list[Any]]:
        yield from answer(models, talk, text, values)

    def retry(talk: Talk, event: gr.RetryData, *values: Any) -> Iterator[list[Any]]:
        yield from again(models, talk, event.index, None, values)

    def edit(talk: Talk, event: gr.EditData, *values: Any) -> Iterator[list[Any]]:
        yield from again(models, talk, event.index, html.unescape(str(event.value)), values)

    options: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}
    gr.on(list(sent), ask, [state, message, *chosen], list(shown), **options)
    for chatbot in chatbots:
        chatbot.retry(retry, [state, *chosen], list(shown), **options)
        chatbot.edit(edit, [state, *chosen], list(shown), **options)
        chatbot.clear(forget, state, list(shown), show_progress="hidden")
        chatbot.undo(undo, state, list(shown), show_progress="hidden")


def columns() -> tuple[list[gr.Column], list[gr.Chatbot], list[gr.HTML]]:
    """A column for each policy: the conversation, and what was measured. The first is visible."""
    parts, chatbots, details = [], [], []
    with gr.Row():
        for i in range(MOST):
            with gr.Column(min_width=300, visible=i == 0) as column:
                chatbots.append(
                    gr.Chatbot(
                        label=f"Policy {i + 1}",
                        height=320,
                        # no markdown, links and formulas; see also as_html
                        render_markdown=False,
                        sanitize_html=True,
                        allow_tags=False,
                        latex_delimiters=[],
                        editable="user",
                        buttons=["copy"],
                        elem_id=f"chat-policy-{i + 1}",
                    )
                )
                details.append(gr.HTML(elem_id=f"chat-details-{i + 1}"))
                parts.append(column)
    return parts, chatbots, details


def dropdowns(roots: Sequence[Path]) -> tuple[gr.Dropdown, gr.Dropdown]:
    """The choices when a browser opens the page; the newest policy is chosen."""
    policies, rewards = choices(roots)
    first = [path for _, path in policies[:1]]
    return gr.Dropdown(choices=policies, value=first), gr.Dropdown(choices=rewards)


# -------------------------------------------------------------------------------------- the events


def answer(models: Models, talk: Talk, message: str, chosen: Sequence[Any]) -> Iterator[list[Any]]:
    """Let the policies respond to a message. Yields: the page, as `view`."""
    try:
        settings = read_settings(*chosen)
    except UserError as error:
        yield view(talk, note=str(error), message=message)
        return
    yield from stream(models, talk, message, settings)


def stream(models: Models, talk: Talk, message: str, settings: Settings) -> Iterator[list[Any]]:
    """The page while responses are written, and after them."""
    note = ""
    try:
        for number, text in talk.ask(models, message, settings):
            note = text if number < 0 else "writing"
            # a column alone, unless all have a new message
            partial = (number, text) if number >= 0 and text else None
            yield view(talk, partial, note=note, message="")
    except UserError as error:
        failed = not talk.exchanges or talk.exchanges[-1].message != message.strip()
        yield view(talk, note=str(error), message=message if failed else "")
        return
    yield view(talk, note=LEGEND, message="")


def again(
    models: Models, talk: Talk, index: Any, message: str | None, chosen: Sequence[Any]
) -> Iterator[list[Any]]:
    """Ask an exchange again. Args: message: another one than before."""
    try:
        settings = read_settings(*chosen)
        before = talk.undo(exchange_of(index))
    except UserError as error:
        yield view(talk, note=str(error))
        return
    yield from stream(models, talk, before if message is None else message, settings)


def undo(talk: Talk, event: gr.UndoData) -> list[Any]:
    """Forget an exchange; its message can be changed and sent again."""
    try:
        return view(talk, message=talk.undo(exchange_of(event.index)), note=LEGEND)
    except UserError as error:
        return view(talk, note=str(error))


def forget(talk: Talk) -> list[Any]:
    """Begin anew."""
    talk.clear()
    return view(talk, note=LEGEND, message="")


def exchange_of(index: Any) -> int:
    """The exchange that a message of a Chatbot belongs to: each has two of them."""
    return int(index[0] if isinstance(index, (list, tuple)) else index) // 2


def read_settings(
    policies: list[str],
    rewards: list[str],
    reference: str,
    system: str,
    temperature: float,
    top_p: float,
    top_k: int,
    max_new_tokens: int,
    seed: int,
) -> Settings:
    """What the inputs of the tab hold. Raises: UserError."""
    params = params_of(
        temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens, seed=seed
    )
    return settings_of(
        policies or [], rewards or [], "" if reference == NONE else reference, system, params
    )


def view(
    talk: Talk,
    partial: tuple[int, str] | None = None,
    note: str | None = None,
    message: str | None = None,
) -> list[Any]:
    """The page of a conversation.

    Args: partial: the policy that is responding, and its response so far: only this column changes.
        note: the line below.  message: in the box for the next one.
    """
    parts, chatbots, details = ([gr.skip()] * MOST for _ in range(3))
    for i in range(MOST):
        if partial is None or partial[0] == i:
            parts[i] = gr.Column(visible=i < max(1, len(talk.policies)))
            text = partial[1] if partial else ""
            chatbots[i] = gr.Chatbot(messages(talk, i, text), label=label_of(talk, i))
            details[i] = measured(talk, i)
    line = gr.skip() if note is None else note_html(note)
    return [*parts, *chatbots, *details, line, gr.skip() if message is None else message]


def label_of(talk: Talk, i: int) -> str:
    """The heading of a column."""
    return printable(name_of(talk.policies[i])) if i < len(talk.policies) else f"Policy {i + 1}"


def messages(talk: Talk, i: int, partial: str) -> list[Any]:
    """The conversation with policy i. Args: partial: its response so far, of the last exchange."""
    shown = []
    for exchange in talk.exchanges if i < len(talk.policies) else []:
        answer = exchange.answers[i]
        text = answer.text or "(empty)" if answer else partial or WAITING
        shown.append({"role": "user", "content": as_html(exchange.message)})
        shown.append({"role": "assistant", "content": as_html(text)})
    return shown


def as_html(text: str) -> str:
    """A text as a Chatbot shows it: it takes everything for HTML, also with render_markdown=False,
    and drops the tags that it does not allow."""
    return html.escape(printable(text), quote=False)


def measured(talk: Talk, i: int) -> str:
    """Rewards and tokens of the responses of policy i, the newest first."""
    answers = [exchange.answers[i] for exchange in talk.exchanges if i < len(talk.policies)]
    blocks = [answer_html(n, answer) for n, answer in enumerate(answers, 1) if answer]
    return str(Markup("").join(reversed(blocks)))

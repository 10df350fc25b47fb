"""What a reward function is called with: some prompts, the responses to each, the rows' columns."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf.data.records import Prompt
from rlhf.data.template import message_of
from rlhf.verifiers import REFERENCES, Text, reference_texts, text_of

NOT_TRAINING = {"global_step": 0, "max_steps": 1}  # of trainer_state
SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}


@dataclass
class Batch:
    """Rows of one call, one for each response; responses to a prompt lie side by side."""

    prompts: list[Any]  # text, or messages where the data set's prompt column holds messages
    completions: list[Any]  # likewise
    completion_ids: list[list[int]] = field(default_factory=list)  # tokens of the responses
    columns: dict[str, list[Any]] = field(default_factory=dict)  # None where a row has none
    trainer_state: dict[str, int] = field(default_factory=dict)  # global_step, max_steps
    per_prompt: int = 1  # responses to each prompt

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, index: Sequence[int]) -> Batch:
        """Some of the rows, as a batch."""
        return Batch(
            [self.prompts[i] for i in index],
            [self.completions[i] for i in index],
            [self.completion_ids[i] for i in index] if self.completion_ids else [],
            {name: [values[i] for i in index] for name, values in self.columns.items()},
            self.trainer_state,
        )

    def groups(self) -> list[range]:
        """The rows of each prompt."""
        starts = range(0, len(self), self.per_prompt)
        return [range(start, min(start + self.per_prompt, len(self))) for start in starts]


def make_batch(
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    ids: Sequence[list[int]],
    trainer_state: dict[str, int],
    per_prompt: int = 1,
    columns: Collection[str] = (),
) -> Batch:
    """A batch of responses.

    Args:
        prompts, responses, ids: one for each response.
        columns: names of the columns of the data; the batch has all of them, whatever its own rows
            have.
    """
    rows = [columns_of(prompt) for prompt in prompts]
    names = sorted({*columns, *(name for row in rows for name in row)})
    return Batch(
        [as_given(prompt) for prompt in prompts],
        [
            [{"role": "assistant", "content": text}] if prompt.is_messages else text
            for prompt, text in zip(prompts, responses)
        ],
        [list(row) for row in ids],
        {name: [row.get(name) for row in rows] for name in names},
        trainer_state,
        per_prompt,
    )


def columns_of(prompt: Prompt) -> dict[str, Any]:
    """The further columns of a prompt's row."""
    columns: dict[str, Any] = json.loads(prompt.columns or "{}")
    return columns


def reference_in(prompt: Prompt, columns: Sequence[str] = REFERENCES) -> str:
    """The reference in one of the columns of a prompt's row, as text; "" without one.

    Of several references it is the first.
    """
    row = columns_of(prompt)
    for name in columns:
        with contextlib.suppress(ValueError):  # an object of another kind
            if texts := reference_texts(row.get(name), name):
                return texts[0]
    return ""


def as_given(prompt: Prompt) -> Any:
    """A prompt as its data set has it: messages, or text.

    Definitions of tools are not in it, nor is the system turn before a text. A text with several
    turns is written as in Anthropic's data, "\\n\\nHuman: ...\\n\\nAssistant:".
    """
    turns = [turn for turn in prompt.turns if turn.role != "tools"]
    if prompt.is_messages:
        return [message_of(turn) for turn in turns]
    turns = turns[turns[0].role == "system" :]
    if len(turns) == 1:
        return turns[0].text
    spoken = [f"\n\n{SPEAKERS.get(turn.role, turn.role)}: {turn.text}" for turn in turns]
    return "".join(spoken) + "\n\nAssistant:"


def last_text(value: Any) -> str:
    """A prompt or completion as text, for messages to the user: of messages the last one's."""
    return str(value[-1]["content"]) if isinstance(value, list) and value else str(value)


def prompt_text(prompt: Text) -> str:
    """A prompt as one text that a completion can follow.

    A single message is its content. Several are written one after the other with their roles, and
    then `assistant: `.
    """
    if isinstance(prompt, str) or len(prompt) == 1:
        return text_of(prompt)
    turns = [f"{message['role']}: {message['content'] or ''}" for message in prompt]
    return "\n\n".join([*turns, "assistant: "])


def question_text(prompt: Text) -> str:
    """A prompt as a judge reads it: as `prompt_text`, without the beginning of the answer."""
    return prompt_text(prompt).removesuffix("\n\nassistant: ")

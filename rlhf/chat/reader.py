"""From the turns of a conversation to token ids, so that no text can forge a turn."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rlhf.base.errors import UserError
from rlhf.data import template
from rlhf.data.records import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "Xyzzy"  # a text that no template contains


class Reader:
    """Turns as token ids, rendered as in training, except that a space breaks each mark in a text.

    Marks are the tokenizer's special tokens ("<|im_end|>" becomes "<|im_end| >"), and what its
    template writes around texts without special tokens, as hh its "\\n\\nHuman:" (which becomes
    "\\n\\nHuman :"). Other text is not changed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special = {mark for mark in (*special, *tokenizer.all_special_tokens) if mark.strip()}
        ids = set(tokenizer.convert_tokens_to_ids(sorted(special)))
        self.special = ids - {tokenizer.unk_token_id}  # unknown characters are no mark
        marks = sorted(special | written_marks(tokenizer, special), key=len, reverse=True)
        self.marks = re.compile("|".join(map(re.escape, marks)))

    def __call__(self, turns: list[Turn]) -> list[int]:
        """Token ids of a prompt.

        Raises: UserError when a turn has a special token that a space does not break, or when the
            template refuses the turns.
        """
        ids = self._encode([Turn(turn.role, self._break_marks(turn.text)) for turn in turns])
        plain = self._encode([Turn(turn.role, "x") for turn in turns])
        if [i for i in ids if i in self.special] != [i for i in plain if i in self.special]:
            raise UserError(
                "the text contains a special token of the model that cannot be read as text: "
                "remove it, or /clear"
            )
        return ids

    def _break_marks(self, text: str) -> str:
        return self.marks.sub(lambda mark: f"{mark[0][:-1]} {mark[0][-1]}", text)

    def _encode(self, turns: list[Turn]) -> list[int]:
        text = template.render_prompt(self.tokenizer, turns)
        return self.tokenizer(text, add_special_tokens=False).input_ids


def written_marks(tokenizer: PreTrainedTokenizerBase, special: set[str]) -> set[str]:
    """What the chat template writes around texts in plain letters."""
    turns = [Turn("user", PROBE), Turn("assistant", PROBE), Turn("user", PROBE)]
    rendered = template.render_prompt(tokenizer, turns)
    between = re.split("|".join(map(re.escape, [PROBE, *special])), rendered)
    # a bare word, the "user" behind <|im_start|>, is no mark
    marks = (part for part in between if part.strip() and not part.strip().isalpha())
    return {mark.strip(" ").rstrip() for mark in marks}

"""Feedback on a response: its score by a reward model, its trace against a reference, and the
user's preferences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.base.errors import UserError
from rlhf.base.log import plural
from rlhf.chat.advice import Stage, Start, advice
from rlhf.chat.conversation import reason
from rlhf.chat.models import context_of
from rlhf.chat.policy import Policy, Reply
from rlhf.chat.reader import Reader
from rlhf.config.choices import Template
from rlhf.data import encoding, template
from rlhf.data.records import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# -------------------------------------------------------------------------------------- the score


class Judge:
    """A reward model that scores responses.

    Raises: UserError for a model that cannot be read as those of stage=rm.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str = ""):
        from rlhf.models.wrappers import Scorer

        if model.config.num_labels != 1 or not hasattr(model, "score"):
            raise UserError(
                f"--reward {path}: no reward model that can be read: it must have one label, and a "
                "linear head `score`"
            )
        style = Template.tokenizer if tokenizer.chat_template else Template.hh
        template.install_chat_template(tokenizer, style)
        self.scorer, self.tokenizer, self.reader = Scorer(model), tokenizer, Reader(tokenizer)
        self.unit = "0 is the mean of held-out demonstrations, 1 their standard deviation"
        if not hasattr(model.config, "score_std"):
            self.unit = "raw, as its config has no score_mean and score_std"

    def score(self, policy: Policy, reply: Reply) -> float:
        """The score of a reply, as online RL uses it.

        Of its tokens, or where the reward model has another tokenizer of its text; with EOS if the
        response is finished. What is too long for the reward model loses its beginning.
        """
        import torch

        from rlhf.models.wrappers import sequence_scores

        eos_id = self.tokenizer.eos_token_id
        if encoding.same_tokens(policy.tokenizer, self.tokenizer):
            prompt, response = reply.prompt_ids, [i for i in reply.ids if i not in policy.ends]
            response += [eos_id] if reply.finished else []
        else:
            prompt = self.reader(reply.prompt)
            response = encoding.encode_response(self.tokenizer, reply.text, reply.finished)
        ids = encoding.to_end(self.tokenizer, prompt, response)
        row = torch.tensor([ids[-context_of(self.scorer.hf) :]])
        with torch.inference_mode():
            return float(sequence_scores(self.scorer, row, torch.ones_like(row), eos_id))


# -------------------------------------------------------------------------------------- the trace


def trace(
    policy: Policy,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reply: Reply,
) -> list[tuple[str, float]]:
    """The tokens of a reply as text, and log pi - log ref of each, in nats.

    Both are the plain distributions: temperature 1, all tokens.

    Args: reference, tokenizer: model and tokenizer of the reference.
    Returns: where several tokens make one character, the last of them has it and the others are
        empty.
    Raises: UserError when the reference has other tokens, or cannot read so many.
    """
    import torch

    from rlhf.models.logprobs import token_logprobs

    ids, n = reply.prompt_ids + reply.ids, len(reply.ids)
    # these tokens, not the whole vocabulary: training may have added a padding token
    own = policy.tokenizer.convert_ids_to_tokens(ids)
    if max(ids) >= len(tokenizer) or tokenizer.convert_ids_to_tokens(ids) != own:
        raise UserError(
            "the reference has another tokenizer than the policy: tokens cannot be compared"
        )
    context = context_of(reference)
    if len(ids) > context:
        raise UserError(f"the reference reads at most {context} tokens, this is {len(ids)}")
    row = torch.tensor([ids], device=policy.model.device)
    logprobs = []
    with torch.inference_mode():
        for model in (policy.model, reference):
            logits = model(row, use_cache=False, logits_to_keep=n + 1).logits[:, :-1]
            logprobs.append(token_logprobs(logits, row[:, -n:])[0][0])
    differences = (logprobs[0] - logprobs[1]).tolist()
    texts = [policy.tokenizer.decode(reply.ids[: i + 1]).rstrip("\ufffd") for i in range(n)]
    pairs = zip(["", *texts], texts, differences)
    return [(text[len(before) :], difference) for before, text, difference in pairs]


# ------------------------------------------------------------------------------------ preferences

Response = tuple[Turn | str, ...]  # the turns of a prompt, then the text of a response to it


class Preferences:
    """A .jsonl file of the user's preferences, which data=jsonl trains on.

    A line has prompt (messages), chosen and, unless only a good response is known, rejected. Each
    line is appended in one write; the lines of others stay.
    """

    def __init__(self, file: Path):
        self.file = file
        # of each prompt: of each marked response, whether it is good
        self.marks: dict[tuple[Turn, ...], dict[str, bool]] = {}
        self.written: set[Response] = set()  # responses that are in the file

    def mark(self, reply: Reply, good: bool, start: Start) -> str:
        """Mark a response, and write it with the last one to its prompt that has the other mark.

        A good response without such a partner is written alone.

        Args: start: the policy that responded.  Returns: lines for the user.
        Raises: UserError when it has been written, or cannot be.
        """
        prompt = tuple(reply.prompt)
        if (*prompt, reply.text) in self.written:
            known = "good" if self.marks[prompt][reply.text] else "bad"
            raise UserError(
                f"this response is in {self.file} already, as a {known} one; /retry gives another"
            )
        marks = self.marks.get(prompt, {})
        others = [text for text, mark in marks.items() if mark != good and text != reply.text]
        line = "marked as bad; not written yet: a good response is missing (/retry, then /good)"
        if others:
            chosen, rejected = (reply.text, others[-1]) if good else (others[-1], reply.text)
            line = self.append(reply, chosen, rejected, start)
        elif good:
            line = self.append(reply, reply.text, None, start)
        self.marks[prompt] = marks | {reply.text: good}
        return line

    def prefer(self, chosen: Reply, rejected: Reply, start: Start) -> str:
        """Write that one of two responses is better; the prompt is that of the chosen one.

        Args: start: the policy whose response was chosen.  Returns: lines for the user.
        Raises: UserError when they are the same, have been written, or cannot be.
        """
        if chosen.text == rejected.text:
            raise UserError("the two responses are the same: there is nothing to learn from")
        both = {(*reply.prompt, reply.text) for reply in (chosen, rejected)}
        if both & self.written:
            raise UserError(f"these responses are in {self.file} already; /retry gives others")
        return self.append(chosen, chosen.text, rejected.text, start)

    def append(self, reply: Reply, chosen: str, rejected: str | None, start: Start) -> str:
        """Append a record.

        Returns: what was written where; and the command that trains on the file, or what it lacks.
        Raises: UserError when it cannot be written; the file is then as it was.
        """
        record: dict[str, object] = {
            "prompt": [{"role": turn.role, "content": turn.text} for turn in reply.prompt],
            "chosen": chosen,
        }
        stage: Stage = "sft"
        kind = "a good response (only SFT trains on it)"
        if rejected is not None:
            record["rejected"] = rejected
            kind, stage = "a pair, chosen and rejected", "dpo"
        try:
            count = append_line(self.file, json.dumps(record))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write to {self.file}: {reason(error)}") from None
        texts = [text for text in (chosen, rejected) if text is not None]
        self.written |= {(*reply.prompt, text) for text in texts}
        written = f"{kind}: written to {self.file}, which has {plural(count, 'record')}"
        return f"{written}\n{advice(self.file, stage, start)}"


def append_line(file: Path, line: str) -> int:
    """Append a line to a file, in one write. Returns: the number of lines then.

    Raises: OSError, ValueError; the file is then as it was.
    """
    with open(file, "a+b", buffering=0) as stream:
        size = stream.seek(0, 2)
        stream.seek(max(size - 1, 0))
        unfinished = stream.read(1) not in (b"", b"\n")  # the last line of another program
        data = (b"\n" if unfinished else b"") + line.encode() + b"\n"
        if stream.write(data) != len(data):
            stream.truncate(size)
            raise OSError("no room on the disk")
        stream.seek(0)
        # not line by line: without a buffer that reads single bytes
        return sum(1 for line_of_file in stream.read().split(b"\n") if line_of_file.strip())

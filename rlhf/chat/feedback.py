"""What is said of an answer in a conversation: its score by a reward model, its trace against a reference, and what the user prefers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from rlhf.chat.conversation import Policy, Reply, reason
from rlhf.chat.models import Reader, context_of
from rlhf.config.choices import Template
from rlhf.data import template

# ----------------------------------------------------------------------------------------------------------------------- the score


class Judge:
    """A reward model. Raises: ValueError for one that scores otherwise than those of stage=rm."""

    def __init__(self, model: Any, tokenizer: Any, path: str = ""):
        from rlhf.models.wrappers import Scorer

        if model.config.num_labels != 1 or not hasattr(model, "score"):
            raise ValueError(
                f"--reward {path}: not a reward model that can be read: it must have one label, and a linear head `score`"
            )
        template.install_chat_template(
            tokenizer, Template.tokenizer if tokenizer.chat_template else Template.hh
        )
        self.scorer, self.tokenizer, self.reader = Scorer(model), tokenizer, Reader(tokenizer)
        self.unit = "0 is the mean of SFT answers, 1 their standard deviation"
        if not hasattr(model.config, "score_std"):
            self.unit = "raw, as its config has no score_mean and score_std"

    def score(self, policy: Policy, reply: Reply) -> float:
        """The score of a reply, as PPO takes it: of its tokens, or where the reward model has another tokenizer of its text; with EOS
        if the answer ended. What is too long for the reward model loses its beginning."""
        import torch

        from rlhf.models.wrappers import sequence_scores

        eos_id = self.tokenizer.eos_token_id
        if template.same_tokens(policy.tokenizer, self.tokenizer):
            ids = (
                reply.prompt_ids
                + [i for i in reply.ids if i not in policy.ends]
                + [eos_id] * reply.ended
            )
        else:
            ids = self.reader(reply.prompt) + template.encode_response(
                self.tokenizer, reply.text, reply.ended
            )
        row = torch.tensor([ids[-context_of(self.scorer.hf) :]], device=self.scorer.hf.device)
        with torch.inference_mode():
            return float(sequence_scores(self.scorer, row, torch.ones_like(row), eos_id))


# ----------------------------------------------------------------------------------------------------------------------- the trace


def trace(policy: Policy, reference: Any, tokenizer: Any, reply: Reply) -> list[tuple[str, float]]:
    """The tokens of a reply as text, and log pi - log ref of each, nats, of the plain distributions (temperature 1, all tokens).

    Args: reference, tokenizer: model and tokenizer of the reference.  Returns: of bytes that only together make a letter, the last
        has it and the others are empty.  Raises: ValueError when the reference has other tokens, or cannot read so many.
    """
    import torch

    from rlhf.models.logprobs import token_logprobs

    ids, n = reply.prompt_ids + reply.ids, len(reply.ids)
    # these tokens, not the whole vocabulary: training may have added a padding token
    if max(ids) >= len(tokenizer) or tokenizer.convert_ids_to_tokens(
        ids
    ) != policy.tokenizer.convert_ids_to_tokens(ids):
        raise ValueError(
            "the reference has another tokenizer than the policy: tokens cannot be compared one by one"
        )
    if len(ids) > context_of(reference):
        raise ValueError(
            f"the reference reads {context_of(reference)} tokens at most, this is {len(ids)}"
        )
    row = torch.tensor([ids], device=policy.model.device)
    with torch.inference_mode():
        pi, ref = (
            token_logprobs(
                model(row, use_cache=False, logits_to_keep=n + 1).logits[:, :-1], row[:, -n:]
            )[0][0]
            for model in (policy.model, reference)
        )
    texts = [policy.tokenizer.decode(reply.ids[: i + 1]).rstrip("\ufffd") for i in range(n)]
    return [
        (text[len(before) :], d)
        for before, text, d in zip(["", *texts], texts, (pi - ref).tolist())
    ]


# -------------------------------------------------------------------------------------------------------------------- preferences


class Preferences:
    """A .jsonl file of what the user prefers, that data=jsonl trains on. A line has prompt (messages), chosen and, unless only a good
    answer is known, rejected. Lines are appended, each in one write; what others have written there stays."""

    def __init__(self, file: Path):
        self.file = file
        self.marks: dict[
            tuple[Any, ...], dict[str, bool]
        ] = {}  # of each prompt: of each marked answer, whether it is good
        self.written: set[tuple[Any, ...]] = (
            set()
        )  # prompts with an answer that the file says so of

    def mark(self, reply: Reply, good: bool) -> str:
        """Mark an answer, and write it with the last answer to the same prompt that has the other mark; a good one without such an
        answer is written alone. Returns: a line for the user. Raises: ValueError when it has been written, or cannot be."""
        prompt = tuple(reply.prompt)
        if (*prompt, reply.text) in self.written:
            known = "good" if self.marks[prompt][reply.text] else "bad"
            raise ValueError(
                f"this answer stands in {self.file} as a {known} one; /retry gives another"
            )
        marks = self.marks.get(prompt, {})
        others = [answer for answer, mark in marks.items() if mark != good and answer != reply.text]
        line = "marked as bad; not written yet: a good answer is missing (/retry, then /good)"
        if others:
            chosen, rejected = (reply.text, others[-1]) if good else (others[-1], reply.text)
            line = self.append(reply, chosen, rejected)
        elif good:
            line = self.append(reply, reply.text, None)
        self.marks[prompt] = marks | {reply.text: good}
        return line

    def prefer(self, chosen: Reply, rejected: Reply) -> str:
        """Write that one of two answers is better; the prompt is that of the chosen one. Returns: a line for the user.
        Raises: ValueError when they are the same, have been written, or cannot be."""
        if chosen.text == rejected.text:
            raise ValueError("the two answers are the same: nothing to learn from")
        if (*chosen.prompt, chosen.text) in self.written or (
            *rejected.prompt,
            rejected.text,
        ) in self.written:
            raise ValueError(f"these answers stand in {self.file} already; /retry gives others")
        return self.append(chosen, chosen.text, rejected.text)

    def append(self, reply: Reply, chosen: str, rejected: str | None) -> str:
        """Append a record. Returns: what, where, how many there are now, and the command that trains on them.
        Raises: ValueError when it cannot be written; the file is then as it was."""
        prompt = [{"role": turn.role, "content": turn.text} for turn in reply.prompt]
        record = {"prompt": prompt, "chosen": chosen} | (
            {"rejected": rejected} if rejected is not None else {}
        )
        try:
            with open(self.file, "a+b", buffering=0) as file:
                size = file.seek(0, 2)
                file.seek(max(size - 1, 0))
                torn = file.read(1) not in (b"", b"\n")  # somebody's last line has no end
                line = b"\n" * torn + json.dumps(record).encode() + b"\n"
                if file.write(line) != len(line):
                    file.truncate(size)
                    raise OSError("no room on the disk")
                file.seek(0)
                count = sum(1 for line in file if line.strip())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot write to {self.file}: {reason(error)}") from None
        self.written |= {
            (*reply.prompt, answer) for answer in (chosen, rejected) if answer is not None
        }
        what, stage = (
            ("a good answer (only SFT learns from it)", "sft")
            if rejected is None
            else ("a pair, chosen and rejected", "rm")
        )
        path = (
            str(self.file)
            if re.fullmatch(r"[\w./~-]+", str(self.file))
            else json.dumps(str(self.file))
        )
        command = shlex.join(
            ["python", "train.py", f"stage={stage}", "data=jsonl", f"data.sources.mine.path={path}"]
        )
        return f"{what}: written to {self.file}, which has {count:,} record{'s' * (count != 1)}; train on it: {command}"

"""A conversation with one policy or two. What is said of an answer is in rlhf/feedback.py; the keyboard and the screen are chat.py's."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.chat.models import Reader, context_of
from rlhf.config.choices import Template
from rlhf.data import template
from rlhf.data.records import Turn
from rlhf.runs.directory import write_json

# -------------------------------------------------------------------------------------------------------------------- the policies


@dataclass
class Params:
    """How an answer is sampled."""

    temperature: float = 1.0  # divides the logits; 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    seed: int = 0


LIMITS: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {
    "temperature": (
        float,
        lambda x: x == 0 or 0.01 <= x <= 100,
        "0 (greedy), or between 0.01 and 100",
    ),
    "top_p": (float, lambda x: 0 < x <= 1, "above 0, at most 1"),
    "top_k": (int, lambda x: x >= 0, "a whole number, 0 or more"),
    "max_new_tokens": (int, lambda x: x > 0, "a whole number above 0"),
    "seed": (int, lambda x: 0 <= x < 2**63, "a whole number, 0 or more"),
}


def read_param(name: str, text: str) -> Any:
    """A value of Params from text. Raises: ValueError saying what it must be."""
    kind, fits, wanted = LIMITS[name]
    with contextlib.suppress(ValueError):
        if fits(value := kind(text)):
            return value
    raise ValueError(f"{text[:40]}: must be {wanted}")


def read_params(given: dict[str, str]) -> dict[str, Any]:
    """Values of Params by name, from text. Raises: ValueError naming the first that is wrong."""
    for name, text in given.items():
        if name not in LIMITS:
            raise ValueError(f"no parameter {name}; there are {', '.join(LIMITS)}")
        try:
            read_param(name, text)
        except ValueError as error:
            raise ValueError(f"{name}={error}") from None
    return {name: read_param(name, text) for name, text in given.items()}


@dataclass
class Reply:
    """One answer of a policy, and what it answers."""

    prompt: list[Turn]  # as far as the policy saw it
    prompt_ids: list[int]
    text: str = ""
    ids: list[int] = field(default_factory=list)  # as sampled, with EOS if it came
    ended: bool = False  # by EOS, or by the mark of a user's turn; else it was cut
    stopped: bool = False  # by Ctrl-C


def visible(text: str, stops: list[str]) -> str:
    """The part of a growing answer that is certain: without a stop string, a tail that could become one or is half a character,
    and the space around. For each longer text it begins with what it was before, so it can be streamed."""
    text = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)].rstrip(
        "\ufffd"
    )
    tails = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(tails, default=0)].strip()


class Policy:
    """A model that answers. A tokenizer without a chat template gets that of the style hh."""

    def __init__(self, model: Any, tokenizer: Any, path: str = ""):
        from transformers import GenerationConfig

        if not tokenizer.chat_template:
            template.install_chat_template(tokenizer, Template.hh)
        self.model, self.tokenizer, self.path = model, tokenizer, path
        self.reader = Reader(tokenizer)
        self.stops = template.stop_strings(tokenizer)
        ends = model.generation_config.eos_token_id  # chat models may have several
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        model.generation_config = (
            GenerationConfig()
        )  # else a checkpoint's own top_k, penalties and so on would be mixed in
        self.context = context_of(model)

    @property
    def name(self) -> str:
        """A run's or directory's own name, or the hub id."""
        path = Path(self.path)
        return (
            self.path
            if not path.is_dir()
            else path.parent.name
            if path.name == "model"
            else path.name
        )

    def fit(self, turns: list[Turn], max_new_tokens: int) -> tuple[list[Turn], list[int]]:
        """The turns that the next answer sees, and their token ids: the oldest are dropped, a user's turn stays in front, until
        there is room for the answer. Raises: ValueError when the last turn alone leaves none."""
        # an answer longer than half of the context gets what the prompt leaves, so that no length makes talking impossible
        room = self.context - min(max_new_tokens, self.context // 2)
        alone = len(
            self.reader(turns[-1:])
        )  # first, else a long text would be tokenised once for each turn before it
        if alone > room:
            raise ValueError(
                f"this message is too long: {alone} tokens, there is room for {room} "
                f"(context {self.context}, --max-new-tokens {max_new_tokens}); shorten it"
            )
        while len(ids := self.reader(turns)) > room:
            turns = turns[
                next(i for i, turn in enumerate(turns) if i > 0 and turn.role == "user") :
            ]
        return turns, ids

    def answer(
        self,
        turns: list[Turn],
        ids: list[int],
        params: Params,
        seed: int,
        show: Callable[[str], None],
    ) -> Reply:
        """Answer what `fit` returned, giving each certain piece of the answer to `show`. Ctrl-C ends the answer where it is."""
        import torch

        reply = Reply(turns, ids)

        def watch(
            sequence: Any, scores: Any, **_: Any
        ) -> Any:  # called after each token; answers whether to stop
            reply.ids = sequence[0, len(ids) :].tolist()
            text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
            shown, reply.text = len(reply.text), visible(text, self.stops)
            show(reply.text[shown:])
            over = any(stop in text for stop in self.stops)
            reply.ended = over or reply.ids[-1] in self.ends
            if over:  # the next turn's mark is no part of the answer
                reply.ids = template.encode_response(self.tokenizer, reply.text, False)
            return torch.full((1,), over, device=sequence.device)

        options: dict[str, Any] = {
            "do_sample": params.temperature > 0,
            "max_new_tokens": min(params.max_new_tokens, self.context - len(ids)),
        }
        if params.temperature > 0:
            options |= {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
            }
        options |= {
            "eos_token_id": sorted(self.ends) or None,
            "pad_token_id": self.tokenizer.pad_token_id or 0,
        }
        prompt = torch.tensor([ids], device=self.model.device)
        torch.manual_seed(seed)
        try:
            self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), stopping_criteria=[watch], **options
            )
        except KeyboardInterrupt:
            reply.stopped = True
        return reply


# ---------------------------------------------------------------------------------------------------------------- the conversation


class Conversation:
    """What was said, and one policy that answers, or two side by side: they share the user's turns, and each goes on from its own
    answers until one is preferred. What is answered is decided by the turns, the parameters and how many answers there were before:
    with the same seed both draw the same random numbers."""

    def __init__(self, policies: list[Policy], params: Params):
        self.policies, self.params = policies, params
        self.answered = 0  # since the seed was set
        self.clear()

    def clear(self) -> None:
        self.histories: list[list[Turn]] = [[] for _ in self.policies]
        self.replies: list[Reply] = []  # to the last message, one of each policy

    def ask(self, message: str, show: Callable[[int, str], None]) -> list[Reply]:
        """Let all policies answer, giving the number of the policy (from 0) and each certain piece of its answer to `show`.

        Returns: their replies, fewer after Ctrl-C. They become part of the conversation where each policy has said something; else
            the message is forgotten with them.
        Raises: ValueError for a message that is too long.
        """
        return self._answer(self.histories, Turn("user", as_text(message)), show)

    def retry(self, show: Callable[[int, str], None]) -> list[Reply]:
        """Other answers to the last message, with other draws; where there are none, the old ones stay.
        Raises: ValueError before the first message."""
        self.check_replies()
        return self._answer(
            [reply.prompt[:-1] for reply in self.replies], self.replies[0].prompt[-1], show
        )

    def _answer(
        self, histories: list[list[Turn]], message: Turn, show: Callable[[int, str], None]
    ) -> list[Reply]:
        prompts = [
            policy.fit([*turns, message], self.params.max_new_tokens)
            for policy, turns in zip(self.policies, histories)
        ]
        seed = self.params.seed + self.answered
        self.answered += 1
        replies: list[Reply] = []
        for i, (policy, (turns, ids)) in enumerate(zip(self.policies, prompts)):
            replies.append(policy.answer(turns, ids, self.params, seed, functools.partial(show, i)))
            if replies[-1].stopped:
                break
        if len(replies) == len(self.policies) and all(reply.text for reply in replies):
            self.replies = replies
            self.histories = [[*reply.prompt, Turn("assistant", reply.text)] for reply in replies]
        return replies

    def check_replies(self) -> None:
        if not self.replies:
            raise ValueError("there is no answer yet: say something first")

    def prefer(self, number: int) -> None:
        """Let both policies go on from the answer of one (from 0), with the turns that led to it."""
        reply = self.replies[number]
        self.histories = [[*reply.prompt, Turn("assistant", reply.text)] for _ in self.policies]

    def save(self, file: Path) -> None:
        """Write turns and parameters as JSON. Raises: ValueError when that fails, or another file is in the way."""
        turns = [
            [{"role": turn.role, "content": turn.text} for turn in turns]
            for turns in self.histories
        ]
        try:
            if file.exists():
                read_conversation(file)  # the name of something else may be a slip
            write_json(
                file,
                {"conversations": turns, "params": asdict(self.params), "answered": self.answered},
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot save to {file}: {reason(error)}") from None

    def load(self, file: Path) -> None:
        """Go on from a saved conversation; one with a single policy can go on with two.
        Raises: ValueError with the reason why not, and then nothing has changed."""
        try:
            histories, params, answered = read_conversation(file)
            if len(histories) == 1:
                histories *= len(self.policies)
            if len(histories) != len(self.policies):
                raise ValueError("two policies talked there: start with --compare")
            replies = []
            for policy, (*prompt, last) in zip(self.policies, filter(None, histories)):
                fitting = policy.fit(prompt, params.max_new_tokens)
                replies.append(
                    Reply(
                        *fitting,
                        last.text,
                        template.encode_response(policy.tokenizer, last.text, True),
                        True,
                    )
                )
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {file}: {reason(error)}") from None
        self.histories, self.replies, self.params, self.answered = (
            histories,
            replies,
            params,
            answered,
        )


def as_text(message: str) -> str:
    """Without space around; bytes that are no text reach us as lone surrogates, which no tokenizer and no file takes."""
    return message.strip().encode(errors="replace").decode()


def reason(error: Exception) -> str:
    """What went wrong with a file whose name is said already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def read_conversation(file: Path) -> tuple[list[list[Turn]], Params, int]:
    """A saved conversation: the turns with each policy, the parameters, the number of answers. Raises: OSError, ValueError."""
    try:
        saved = json.loads(file.read_text())
        params = Params(
            **read_params({name: str(value) for name, value in saved["params"].items()})
        )
        histories = [
            [Turn(turn["role"], as_text(turn["content"])) for turn in turns]
            for turns in saved["conversations"]
        ]
        answered = int(saved["answered"])
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
    ) as error:
        raise ValueError(
            f"this is no saved conversation ({type(error).__name__}: {error})"
        ) from None
    for turns in histories:
        roles = [turn.role for turn in turns if turn.text]
        if (
            roles != ["user", "assistant"] * (len(turns) // 2)
            or turns[-2:-1] != histories[0][-2:-1]
        ):
            raise ValueError(
                "this is no saved conversation (user and assistant take turns there, and say something)"
            )
    if not histories or not 0 <= answered < 2**32:
        raise ValueError("this is no saved conversation (no turns, or a wrong number of answers)")
    return histories, params, answered

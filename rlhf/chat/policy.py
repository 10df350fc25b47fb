"""A policy that responds in a conversation, streamed token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.errors import UserError
from rlhf.chat.models import context_of
from rlhf.chat.reader import Reader
from rlhf.config.choices import Template
from rlhf.data import encoding, template
from rlhf.data.records import Turn

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Params:
    """How a response is sampled."""

    temperature: float = 1.0  # divides the logits; 0: the likeliest token
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 128
    seed: int = 0


@dataclass
class Reply:
    """One response of a policy, with its prompt."""

    prompt: list[Turn]  # the turns that the policy saw
    prompt_ids: list[int]
    text: str = ""
    ids: list[int] = field(default_factory=list)  # as sampled, with EOS if it came
    finished: bool = False  # by EOS, or by the mark of a user's turn; else it was truncated
    stopped: bool = False  # by Ctrl-C


class Policy:
    """A model that responds. A tokenizer without a chat template gets that of the style hh."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str = ""):
        from transformers import GenerationConfig

        if not tokenizer.chat_template:
            template.install_chat_template(tokenizer, Template.hh)
        self.model, self.tokenizer, self.path = model, tokenizer, path
        self.reader = Reader(tokenizer)
        self.stops = template.stop_strings(tokenizer)
        ends = model.generation_config.eos_token_id  # chat models may have several
        self.ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # a checkpoint's own top_k, penalties and so on must not be mixed in
        model.generation_config = GenerationConfig()
        self.context = context_of(model)

    @property
    def name(self) -> str:
        """A run's or directory's own name, or the hub id."""
        path = Path(self.path)
        if not path.is_dir():
            return self.path
        return path.parent.name if path.name == "model" else path.name

    def fit(self, turns: list[Turn], max_new_tokens: int) -> tuple[list[Turn], list[int]]:
        """The turns that the next response sees, and their token ids.

        The oldest turns are dropped, with a user's turn first, until there is room for the
        response; a system turn at the beginning stays.
        Raises: UserError when the last turn alone leaves none.
        """
        # a response longer than half of the context gets what the prompt leaves
        room = self.context - min(max_new_tokens, self.context // 2)
        system = turns[:1] if turns[0].role == "system" else []
        # first, or a long text would be tokenized once for each turn before it
        alone = len(self.reader([*system, *turns[len(system) :][-1:]]))
        if alone > room:
            raise UserError(
                f"this message is too long: {alone} tokens, there is room for {room} "
                f"(context {self.context}, --max-new-tokens {max_new_tokens}); shorten it"
            )
        rest = turns[len(system) :]
        while len(ids := self.reader([*system, *rest])) > room:
            later = (i for i, turn in enumerate(rest) if i > 0 and turn.role == "user")
            rest = rest[next(later) :]
        return [*system, *rest], ids

    def respond(self, reply: Reply, params: Params, seed: int, show: Callable[[str], None]) -> None:
        """Sample a response and fill in the reply. Ctrl-C stops it and keeps what is there.

        Args: reply: with the prompt that `fit` returned.  show: gets each certain piece of text.
        """
        import torch

        def after_each_token(sequence: Tensor, scores: Tensor, **_: object) -> Tensor:
            reply.ids = sequence[0, len(reply.prompt_ids) :].tolist()
            stop = self.update(reply, show)
            return torch.full((1,), stop, device=sequence.device)

        prompt = torch.tensor([reply.prompt_ids], device=self.model.device)
        torch.manual_seed(seed)
        try:
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                stopping_criteria=[after_each_token],
                **self.options(params, len(reply.prompt_ids)),
            )
        except KeyboardInterrupt:
            reply.stopped = True

    def update(self, reply: Reply, show: Callable[[str], None]) -> bool:
        """Show what has become certain of a growing response. Returns: whether it is over."""
        text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
        shown, reply.text = len(reply.text), certain_text(text, self.stops)
        show(reply.text[shown:])
        is_over = any(stop in text for stop in self.stops)
        reply.finished = is_over or reply.ids[-1] in self.ends
        if is_over:  # the next turn's mark is no part of the response
            reply.ids = encoding.encode_response(self.tokenizer, reply.text, False)
        return is_over

    def options(self, params: Params, prompt_tokens: int) -> dict[str, Any]:
        """Arguments of transformers' generate."""
        options: dict[str, Any] = {
            "do_sample": params.temperature > 0,
            "max_new_tokens": min(params.max_new_tokens, self.context - prompt_tokens),
            "eos_token_id": sorted(self.ends) or None,
            "pad_token_id": self.tokenizer.pad_token_id or 0,
        }
        if params.temperature > 0:
            options |= {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k,
            }
        return options


def certain_text(text: str, stops: list[str]) -> str:
    """The part of a growing response that is certain.

    Without a stop string, without a tail that could become one or is half a character, and
    without space around it. The result for a longer text begins with that for a shorter one, so it
    can be streamed.
    """
    stop_at = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    text = text[:stop_at].rstrip("\ufffd")
    tails = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(tails, default=0)].strip()

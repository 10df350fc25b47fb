"""Talk to a policy in the terminal: python chat.py [--path RUN|DIRECTORY|HUB_ID] [--prompt TEXT]; --help lists the rest."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf import layout
from rlhf.config import Template
from rlhf.data import template
from rlhf.data.records import Turn

COMMANDS = "/clear forgets the conversation, /quit (or Ctrl-D) ends; Ctrl-C stops an answer"


def main() -> int:
    """Run the command line; returns the exit code: 0 done, 2 the command was wrong, 130 interrupted."""
    args = parse_arguments()
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # text that the terminal cannot show must not end us
    try:
        path = find_model(args.path) if args.path is not None else str(newest_policy() / "model")
        say(f"{path}: loading")
        talk = Conversation(*load(path, args.device), args.temperature, args.top_p, args.top_k, args.max_new_tokens, args.seed)
        if args.prompt is not None:
            talk.ask(args.prompt, show)
            show("\n")
        else:
            interact(talk)
    except (FileNotFoundError, ValueError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    def number(kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
        def read(text: str) -> Any:
            with contextlib.suppress(ValueError):
                if fits(value := kind(text)):
                    return value
            raise argparse.ArgumentTypeError(f"{text}: must be {what}")

        return read

    def message(text: str) -> str:
        if not text.strip():
            raise argparse.ArgumentTypeError("is empty: say something")
        return text

    temperature = number(float, lambda x: x == 0 or 0.01 <= x <= 100, "0 (greedy), or between 0.01 and 100")
    top_p = number(float, lambda x: 0 < x <= 1, "above 0, at most 1")
    top_k = number(int, lambda x: x >= 0, "a whole number, 0 or more")
    length = number(int, lambda x: x > 0, "a whole number above 0")
    seed = number(int, lambda x: 0 <= x < 2**63, "a whole number, 0 or more")

    parser = argparse.ArgumentParser(
        description="Talk to a policy in the terminal.", epilog=f"While you talk: {COMMANDS}.", allow_abbrev=False
    )
    parser.add_argument("--path", help="run, model directory or hub id; default: the newest finished policy in outputs/")
    parser.add_argument("--prompt", type=message, help="answer this once, with nothing but the answer on standard output, and exit")
    parser.add_argument("--temperature", type=temperature, default=1.0, help="divides the logits; 0 = the likeliest token (default: 1.0)")
    parser.add_argument(
        "--top-p", type=top_p, default=1.0, help="sample from the likeliest tokens of this total probability (default: 1.0, all)"
    )
    parser.add_argument("--top-k", type=top_k, default=0, help="sample from so many of the likeliest tokens (default: 0, all)")
    parser.add_argument(
        "--max-new-tokens", type=length, default=128, help="tokens per answer, at most, if the context has room (default: 128)"
    )
    parser.add_argument("--seed", type=seed, help="makes the answers repeatable (default: another one each time)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto = the GPU where there is one (default: auto)"
    )
    return parser.parse_args()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Print a piece of an answer. What a model says must not steer the terminal: escape codes and the like are replaced."""
    # no-break space and the joiner inside emoji do not count as printable, and are harmless
    print("".join(c if c.isprintable() or c in "\n\t\u00a0\u200d" else "\ufffd" for c in text), end="", flush=True)


# ------------------------------------------------------------------------------------------------------------------------ model


def newest_policy() -> Path:
    """The finished sft or ppo run that was finished last. Raises: FileNotFoundError saying where it looked, and how to make one."""
    outputs = Path(os.environ.get("RLHF_ROOT") or ".").expanduser().resolve() / "outputs"
    found = []
    for file in outputs.glob("*/summary.json"):
        with contextlib.suppress(OSError, ValueError):  # one broken run does not hide the others
            summary = layout.read_summary(file.parent) or {}
            if summary.get("stage") in ("sft", "ppo") and summary.get("status") == "finished":
                found.append((file.stat().st_mtime_ns, file.parent))
    if not found:
        raise FileNotFoundError(f"no finished policy (an sft or ppo run) in {outputs}: make one with  python train.py  or give --path")
    return max(found)[1]


def find_model(path: str) -> str:
    """The model directory that a path means, or the hub id as it is. Loads nothing.
    Raises: FileNotFoundError or ValueError when there is no policy."""
    if path.startswith(layout.BUILTIN):
        raise ValueError(f"--path {path}: a built-in model has random weights, nothing to talk to; train it first: python train.py")
    # a hub id is NAME or OWNER/NAME
    if not layout.is_directory(path) and path.count("/") < 2:
        return path
    directory = layout.model_directory(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"--path {path}: there is no such directory")
    try:
        architectures = json.loads((directory / "config.json").read_text()).get("architectures")
    except FileNotFoundError:
        raise FileNotFoundError(f"--path {path}: no model there (neither model/config.json nor config.json), or not finished yet") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"--path {path}: cannot read {directory / 'config.json'}: {error}") from None
    refuse_reward_model(path, architectures)
    return str(directory)


def refuse_reward_model(path: str, architectures: list[str] | None) -> None:
    if any("ForSequenceClassification" in name for name in architectures or []):
        raise ValueError(
            f"--path {path}: this is a reward model ({', '.join(architectures or [])}): it scores, it does not talk; give a policy"
        )


def load(path: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, in float32 on the CPU and as saved on the GPU. Raises: ValueError with one line that says what failed."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave --device out, or give --device cpu")
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    try:
        architectures = AutoConfig.from_pretrained(path, trust_remote_code=False).architectures
        refuse_reward_model(path, architectures)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        dtype = torch.float32 if device == "cpu" else "auto"
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False).to(device).eval()
    except Exception as error:  # transformers, the hub and safetensors raise many kinds; for the user they all mean the same
        where = "" if layout.is_directory(path) else "not a directory here, and as a hub id: "
        raise ValueError(f"cannot load {path}: {where}{' '.join(str(error).split())[:300] or repr(error)}") from error
    if not tokenizer.chat_template:
        example = f"{template.USER.strip()} ... {template.ASSISTANT.strip()}"
        say(f"{path}: its tokenizer has no chat template; using the one of this framework ({example})")
        template.install(tokenizer, Template.hh)
    return model, tokenizer


# ----------------------------------------------------------------------------------------------------------------- conversation


def visible(text: str, stops: list[str]) -> str:
    """The part of a growing answer that is certain: without a stop string, a tail that could become one or is half a character,
    and the space around. For each longer text it begins with what it was before, so it can be streamed."""
    text = text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)].rstrip("\ufffd")
    tails = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return text[: len(text) - max(tails, default=0)].strip()


class Conversation:
    """The turns so far, and a model that answers the next one. Sampling is decided by the arguments alone."""

    def __init__(self, model: Any, tokenizer: Any, temperature: float, top_p: float, top_k: int, max_new_tokens: int, seed: int | None):
        import torch
        from transformers import GenerationConfig

        self.model, self.tokenizer = model, tokenizer
        self.turns: list[Turn] = []
        self.stops = template.stop_strings(tokenizer)
        ends = model.generation_config.eos_token_id  # chat models may have several
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        model.generation_config = GenerationConfig()  # else a checkpoint's own top_k, penalties and so on would be mixed in
        self.options = {"do_sample": temperature > 0, "eos_token_id": sorted(ends) or None, "pad_token_id": tokenizer.pad_token_id or 0}
        if temperature > 0:
            self.options |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        self.max_new_tokens = max_new_tokens
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048
        torch.seed() if seed is None else torch.manual_seed(seed)

    def fit(self, message: str) -> tuple[list[Turn], list[int]]:
        """The turns that the next answer sees, and their token ids: the oldest are dropped, a user's turn stays in front, until
        there is room for the answer. Raises: ValueError when the message alone leaves none."""
        # an answer longer than half of the context gets what the prompt leaves, so that no length makes talking impossible
        room = self.context - min(self.max_new_tokens, self.context // 2)
        # bytes that are no text reach us as lone surrogates, which the tokenizer refuses
        turns = [*self.turns, Turn("user", message.strip().encode(errors="replace").decode())]
        while True:
            ids = self.tokenizer(template.render_prompt(self.tokenizer, turns), add_special_tokens=False).input_ids
            if len(ids) <= room:
                return turns, ids
            first = next((i for i, turn in enumerate(turns) if i > 0 and turn.role == "user"), None)
            if first is None:
                raise ValueError(
                    f"this message is too long: {len(ids)} tokens, there is room for {room} "
                    f"(context {self.context}, --max-new-tokens {self.max_new_tokens}); shorten it"
                )
            turns = turns[first:]

    def ask(self, message: str, show: Callable[[str], None]) -> str:
        """Answer a message, giving each certain piece of the answer to `show`; returns the whole of it.
        An answer that is interrupted is remembered as far as it was shown; an empty one is forgotten with its question."""
        import torch

        turns, ids = self.fit(message)
        answer = ""

        def watch(sequence: Any, scores: Any, **_: Any) -> Any:  # called after each token; answers whether to stop
            nonlocal answer
            text = self.tokenizer.decode(sequence[0, len(ids) :], skip_special_tokens=True)
            shown, answer = len(answer), visible(text, self.stops)
            show(answer[shown:])
            return torch.full((1,), any(stop in text for stop in self.stops), device=sequence.device)

        prompt = torch.tensor([ids], device=self.model.device)
        limit = min(self.max_new_tokens, self.context - len(ids))
        try:
            self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, stopping_criteria=[watch], **self.options
            )
        finally:
            if answer:
                self.turns = [*turns, Turn("assistant", answer)]
        return answer


def interact(talk: Conversation) -> None:
    """Read messages and commands until the user ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # its import gives input() a history and line editing
    terminal = sys.stdin.isatty()
    say(f"{COMMANDS}.")
    while True:
        try:
            message = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if message == "/quit":
            return
        if message == "/clear":
            talk.turns = []
            say("(forgotten)")
        elif message.startswith("/"):
            say(f"unknown command {message.split()[0]}: {COMMANDS}")
        elif message:
            try:
                answer = talk.ask(message, show)
                show("\n")
                if not answer:
                    say("(an empty answer: your message is forgotten)")
            except KeyboardInterrupt:
                show("\n")
                say("(stopped)")
            except ValueError as error:
                say(f"({error})")


if __name__ == "__main__":
    sys.exit(main())

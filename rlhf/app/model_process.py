"""The process that holds the models of the page.

The page and this process exchange lines of JSON: a request, then notes, pieces of a response, and
a last line with `done` or `error`. Requests are served one after the other. Libraries print to
stderr.

    python -m rlhf.app.model_process        (started by models.Models)
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from rlhf.app.models import AUTO, Answer
from rlhf.app.policies import config_of, name_of
from rlhf.base.errors import UserError
from rlhf.base.locations import is_directory
from rlhf.base.log import first_line, plural
from rlhf.chat.advice import start_of
from rlhf.chat.feedback import Judge, trace
from rlhf.chat.models import find_model, find_reference, load_model
from rlhf.chat.policy import Params, Policy, Reply
from rlhf.config.schema import Data
from rlhf.data.files import kind_of_source
from rlhf.data.records import Turn, uses_tools
from rlhf.rewards.process import send, take_channels
from rlhf.runs.history import UNREADABLE
from rlhf.runs.run_files import ENVIRONMENT, read_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NICE = 10  # a training run on this machine goes first
PAGE_WORDS = {  # in messages that are written for the command line of chat.py
    "--reward ": "reward model ",
    "--max-new-tokens": "max new tokens",
    "give --reference PATH": "choose one",
}

Say = Callable[[dict[str, Any]], None]  # sends a line about the request
Loaded = Any  # Judge, or (PreTrainedModel, PreTrainedTokenizerBase, Policy)


def main() -> None:
    """Serve the requests of the page until it ends."""
    requests, answers = take_channels()
    settings = json.loads(requests.readline())
    with contextlib.suppress(OSError):
        os.nice(NICE)
    waiting: queue.Queue[dict[str, Any]] = queue.Queue()
    stopped: set[int] = set()

    def read() -> None:
        for line in requests:
            message = json.loads(line)
            if "stop" in message:
                stopped.add(message["stop"])
            else:
                waiting.put(message)
        os._exit(0)  # the page has ended

    threading.Thread(target=read, daemon=True).start()
    import torch

    torch.set_num_threads(settings["threads"])
    shelf = Shelf(settings["device"], settings["idle"])
    while True:
        try:
            request = waiting.get(timeout=min(settings["idle"] / 4, 5.0))
        except queue.Empty:
            shelf.free_idle()
            continue

        def say(message: dict[str, Any], number: int = request["id"]) -> None:
            send(answers, {"id": number} | message)

        try:
            serve(request, shelf, say, stopped)
        except UserError as error:
            say({"error": for_page(str(error))})
        except Exception as error:
            traceback.print_exc()
            say({"error": f"{type(error).__name__}: {first_line(error)}"})
        stopped.discard(request["id"])


def serve(request: dict[str, Any], shelf: Shelf, say: Say, stopped: set[int]) -> None:
    """Do what a request asks. Raises: UserError."""
    match request["do"]:
        case "answer":
            params = Params(**request["params"])
            turns = [Turn(role, text) for role, text in request["turns"]]
            response = Response(request, shelf, say, lambda: request["id"] in stopped)
            say({"done": True, "answer": asdict(response.answer(turns, params))})
        case "held_out":
            say({"done": True, "prompts": held_out(request["run"])})
        case "start":
            start = start_of(shelf.policy(request["policy"], say))
            say({"done": True, "path": start.path, "template": start.template.name})
        case "loaded":
            say({"done": True, "loaded": [path for _, path, _ in shelf.models]})


def for_page(text: str) -> str:
    """A message of the command line as the page shows it."""
    for option, words in PAGE_WORDS.items():
        text = text.replace(option, words)
    return text


# ------------------------------------------------------------------------------------- the models


class Shelf:
    """The models that are loaded, each once. Args: idle: seconds after which one is freed."""

    def __init__(self, device: str, idle: float):
        self.device, self.idle = device, idle
        # by kind, path and the time when its files were written: when each was last used, and it
        self.models: dict[tuple[str, str, int], tuple[float, Loaded]] = {}

    def policy(self, path: str, say: Say) -> Policy:
        """Raises: UserError where it cannot be loaded."""
        policy: Policy = self._get("policy", find_model(path, "policy"), say)[2]
        return policy

    def reference(self, path: str, say: Say) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A reference has the weights of the policy with its path. Raises: UserError."""
        model, tokenizer, _ = self._get("policy", find_model(path, "reference"), say)
        return model, tokenizer

    def judge(self, path: str, say: Say) -> Judge:
        """Raises: UserError where it cannot be loaded."""
        judge: Judge = self._get("reward", find_model(path, "--reward"), say)
        return judge

    def _get(self, kind: str, path: str, say: Say) -> Loaded:
        where = str(Path(path).resolve()) if is_directory(path) else path
        key = kind, where, written(where)
        if key not in self.models:
            for old in [old for old in self.models if old[:2] == key[:2]]:  # trained again since
                del self.models[old]
            say({"note": f"loading {name_of(where)}"})
            self.models[key] = 0.0, self._load_with_room(kind, where)
        loaded = self.models[key][1]
        self.models[key] = time.monotonic(), loaded
        return loaded

    def _load_with_room(self, kind: str, path: str) -> Loaded:
        """Load a model; where the GPU's memory is full, after all others are freed."""
        import torch

        try:
            return self._load(kind, path)
        except (UserError, torch.OutOfMemoryError) as error:
            is_full = any(isinstance(e, torch.OutOfMemoryError) for e in (error, error.__cause__))
            if not is_full or not self.models:
                raise
        self.free(list(self.models))
        return self._load(kind, path)

    def _load(self, kind: str, path: str) -> Loaded:
        if kind == "reward":
            return Judge(*load_model(path, self.device, "--reward"), path)
        model, tokenizer = load_model(path, self.device, "policy")
        return model, tokenizer, Policy(model, tokenizer, path)

    def free_idle(self) -> None:
        """Free the models that nobody has used for `idle` seconds."""
        oldest = time.monotonic() - self.idle
        self.free([key for key, (used, _) in self.models.items() if used < oldest])

    def free(self, keys: list[tuple[str, str, int]]) -> None:
        """Free models and their memory."""
        import torch

        for key in keys:
            del self.models[key]
        if keys:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def written(path: str) -> int:
    """When the files of a model were written last; 0 for a hub id."""
    if not is_directory(path):
        return 0
    return max((file.stat().st_mtime_ns for file in Path(path).glob("*")), default=0)


# ------------------------------------------------------------------------------------ the answers


class Response:
    """A response of a policy, streamed, then measured."""

    def __init__(
        self, request: dict[str, Any], shelf: Shelf, say: Say, is_stopped: Callable[[], bool]
    ):
        self.request, self.shelf, self.say, self.is_stopped = request, shelf, say, is_stopped

    def answer(self, turns: list[Turn], params: Params) -> Answer:
        """Raises: UserError where the policy cannot respond. What else fails is a note."""
        policy = self.shelf.policy(self.request["policy"], self.say)
        kept, ids = policy.fit(turns, params.max_new_tokens)
        reply = Reply(kept, ids)
        if not self.is_stopped():
            policy.respond(reply, params, params.seed, self.show)
        answer = Answer(reply.text, reply.finished, reply.stopped or self.is_stopped())
        if dropped := len(turns) - len(kept):
            answer.notes.append(f"{plural(dropped, 'turn')} did not fit into the context")
        if reply.text:
            for path in self.request["rewards"]:
                self.measure(self.add_reward, answer, policy, reply, path)
        if reply.ids and self.request["reference"]:
            self.measure(self.add_tokens, answer, policy, reply, self.request["reference"])
        return answer

    def show(self, piece: str) -> None:
        """Send a piece. Raises: KeyboardInterrupt, which ends a response, where it is stopped."""
        if piece:
            self.say({"piece": piece})
        if self.is_stopped():
            raise KeyboardInterrupt

    def measure(
        self, add: Callable[..., None], answer: Answer, policy: Policy, reply: Reply, path: str
    ) -> None:
        """Add a measurement to an answer, or a note why it is missing."""
        try:
            add(answer, policy, reply, path)
        except UserError as error:
            answer.notes.append(for_page(str(error)).replace(policy.path, name_of(policy.path)))

    def add_reward(self, answer: Answer, policy: Policy, reply: Reply, path: str) -> None:
        judge = self.shelf.judge(path, self.say)
        answer.rewards.append((name_of(path), judge.score(policy, reply)))

    def add_tokens(self, answer: Answer, policy: Policy, reply: Reply, reference: str) -> None:
        path = find_reference(policy.path) if reference == AUTO else reference
        answer.tokens = trace(policy, *self.shelf.reference(path, self.say), reply)
        answer.reference = name_of(path)


# ---------------------------------------------------------------------------- the held-out prompts


def held_out(run: str) -> list[list[tuple[str, str]]]:
    """The held-out prompts of the data that a run was trained on, without those with tools.

    Raises: UserError where it is no run, or its data cannot be read.
    """
    from rlhf.data.load import load_data

    file = config_of(run)
    try:  # this node alone: others may be of an earlier version
        node = OmegaConf.merge(OmegaConf.structured(Data), OmegaConf.load(file).data)
        cfg: Any = OmegaConf.to_object(node)
    except UNREADABLE as error:
        raise UserError(f"{file}: its data cannot be read ({first_line(error)})") from None
    made = read_file(file.parent, ENVIRONMENT) or {}
    for source in cfg.sources.values():  # a path counts from where the run was started
        there = str(Path(made.get("folder", "")) / Path(source.path).expanduser())
        if kind_of_source(there):
            source.path = there
    data = load_data(dataclasses.replace(cfg, workers=1))
    prompts = [prompt.turns for prompt in data.eval_prompts if not uses_tools(prompt.turns)]
    return [[(turn.role, turn.text) for turn in turns] for turns in prompts]


if __name__ == "__main__":
    main()

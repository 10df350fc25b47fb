"""The models of a conversation: found by what the user typed, loaded, and given turns that no text can forge."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from rlhf.config.stage_graph import is_policy
from rlhf.data import template
from rlhf.data.records import Turn
from rlhf.runs.directory import read_summary
from rlhf.runs.locations import BUILTIN, is_directory, model_directory

# --------------------------------------------------------------------------------------------------------------------- the models


def newest_policy() -> Path:
    """The run of a policy that was finished last. Raises: FileNotFoundError saying where it looked, and how to make one."""
    outputs = Path(os.environ.get("RLHF_ROOT") or ".").expanduser().resolve() / "outputs"
    found = []
    for file in outputs.glob("*/summary.json"):
        with contextlib.suppress(OSError, ValueError):  # one broken run does not hide the others
            summary = read_summary(file.parent) or {}
            if is_policy(summary.get("stage", "eval")) and summary.get("status") == "finished":
                found.append((file.stat().st_mtime_ns, file.parent))
    if not found:
        raise FileNotFoundError(
            f"no finished policy (a run of sft, dpo or online RL) in {outputs}: make one with  python train.py  or give --path"
        )
    return max(found)[1]


def find_model(path: str, option: str) -> str:
    """The model directory that a path means, or the hub id as it is. Loads nothing.

    Args: option: of the command line, that gave the path; --reward wants a reward model, every other one a policy.
    Raises: FileNotFoundError or ValueError when there is no such model.
    """
    if path.startswith(BUILTIN):
        what = "nothing to ask for a score" if option == "--reward" else "nothing to talk to"
        raise ValueError(
            f"{option} {path}: a built-in model has random weights, {what}; train it first: python train.py"
        )
    # a hub id is NAME or OWNER/NAME
    if not is_directory(path) and path.count("/") < 2:
        return path
    directory = model_directory(path)
    if not directory.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no such directory")
    try:
        architectures = json.loads((directory / "config.json").read_text()).get("architectures")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{option} {path}: no model there (neither model/config.json nor config.json), or not finished yet"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{option} {path}: cannot read {directory / 'config.json'}: {error}"
        ) from None
    check_role(path, architectures, option)
    return str(directory)


def check_role(path: str, architectures: list[str] | None, option: str) -> None:
    """Raises: ValueError for a policy where a reward model is wanted, and the other way round."""
    names = (
        ", ".join(map(str, architectures if isinstance(architectures, list) else []))
        or "of unknown kind"
    )
    scores = "ForSequenceClassification" in names
    if option == "--reward" and not scores:
        raise ValueError(
            f"{option} {path}: this is {names}, not a reward model (*ForSequenceClassification): it does not score"
        )
    if option != "--reward" and scores:
        raise ValueError(
            f"{option} {path}: this is a reward model ({names}): it scores, it does not talk; give a policy"
        )


def find_reference(model: str) -> str:
    """The SFT policy that a policy's run stands on. Args: model: its model directory. Raises: ValueError when none is known."""
    directory = Path(model)
    file = (directory.parent if directory.name == "model" else directory) / "config.yaml"
    sft = None
    with contextlib.suppress(
        Exception
    ):  # a hub id, a directory of another program: whatever it is, it names no SFT policy
        sft = OmegaConf.select(OmegaConf.load(file), "inputs.sft")
    if not sft:
        raise ValueError(
            f"{model} is no run that stands on an SFT policy, so there is nothing to compare with: give --reference PATH"
        )
    if is_directory(sft) and not Path(sft).is_dir():
        raise ValueError(
            f"{model}: its SFT policy {sft} is not there any more: give --reference PATH"
        )
    return str(sft)


def load_model(path: str, device: str, option: str = "--path") -> tuple[Any, Any]:
    """Model and tokenizer, in float32 on the CPU and as saved on the GPU. Args: option: as in find_model.
    Raises: ValueError with one line that says what failed."""
    import torch
    import transformers
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch finds no GPU here; leave --device out, or give --device cpu"
        )
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    kind = AutoModelForSequenceClassification if option == "--reward" else AutoModelForCausalLM
    try:
        check_role(
            path, AutoConfig.from_pretrained(path, trust_remote_code=False).architectures, option
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        dtype = torch.float32 if device == "cpu" else "auto"
        model = (
            kind.from_pretrained(path, dtype=dtype, trust_remote_code=False, use_safetensors=True)
            .to(device)
            .eval()
        )
    except Exception as error:  # transformers, the hub and safetensors raise many kinds; for the user they all mean the same
        where = "" if is_directory(path) else "not a directory here, and as a hub id: "
        raise ValueError(
            f"cannot load {path}: {where}{' '.join(str(error).split())[:300] or repr(error)}"
        ) from error
    return model, tokenizer


def context_of(model: Any) -> int:
    """Tokens that a model can read at once; 2048 where nothing limits them."""
    from rlhf.models.loading import context_length

    return context_length(model.config) or 2048


# ------------------------------------------------------------------------------------------------------------- from turns to tokens


class Reader:
    """Turns as token ids, rendered as in training, except that no text can forge a turn: a space breaks each mark of a turn in it.

    Marks are the tokenizer's special tokens ("<|im_end|>" becomes "<|im_end| >"), and what its template writes around texts without
    special tokens, as hh its "\\n\\nHuman:" (which becomes "\\n\\nHuman :"). Other text is not touched.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        added = [
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        ]
        special = {mark for mark in (*added, *tokenizer.all_special_tokens) if mark.strip()}
        self.special = set(tokenizer.convert_tokens_to_ids(sorted(special))) - {
            tokenizer.unk_token_id
        }  # unknown letters are no mark
        probe = [Turn("user", "Xyzzy"), Turn("assistant", "Xyzzy"), Turn("user", "Xyzzy")]
        between = re.split(
            "|".join(map(re.escape, ["Xyzzy", *special])), template.render_prompt(tokenizer, probe)
        )
        # a bare word, the "user" behind <|im_start|>, is no mark
        written = {
            part.strip(" ").rstrip()
            for part in between
            if part.strip() and not part.strip().isalpha()
        }
        self.marks = re.compile(
            "|".join(re.escape(mark) for mark in sorted(special | written, key=len, reverse=True))
        )

    def __call__(self, turns: list[Turn]) -> list[int]:
        """Token ids of a prompt. Raises: ValueError when a turn has a special token that a space does not break, or the template
        refuses the turns."""
        ids = self._encode(
            [
                Turn(
                    turn.role,
                    self.marks.sub(lambda mark: f"{mark[0][:-1]} {mark[0][-1]}", turn.text),
                )
                for turn in turns
            ]
        )
        plain = self._encode([Turn(turn.role, "x") for turn in turns])
        if [i for i in ids if i in self.special] != [i for i in plain if i in self.special]:
            raise ValueError(
                "there is a special token of the model in the text, which cannot be taken for text: leave it out, or /clear"
            )
        return ids

    def _encode(self, turns: list[Turn]) -> list[int]:
        return self.tokenizer(
            template.render_prompt(self.tokenizer, turns), add_special_tokens=False
        ).input_ids

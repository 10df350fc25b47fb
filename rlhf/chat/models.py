"""Find the models of a conversation by what the user typed, and load them."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from rlhf.base.adapter_files import has_adapter, is_adapter, tokenizer_of
from rlhf.base.checksums import check_model
from rlhf.base.commands import command_line
from rlhf.base.errors import UserError
from rlhf.base.locations import BUILTIN, HUB_ID, is_directory, model_directory
from rlhf.base.log import hub_answers
from rlhf.base.model_files import broken_file, score_heads, weight_names
from rlhf.config.stage_graph import is_policy
from rlhf.runs.checks import POLICY, SCORER, check_adapter
from rlhf.runs.directory import read_summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_CONTEXT = 2048  # tokens, for a model whose configuration does not limit them


def newest_policy() -> Path:
    """The run of a policy that was finished last.

    Raises: UserError saying where it looked, and how to make one.
    """
    outputs = Path(os.environ.get("RLHF_ROOT") or ".").expanduser().resolve() / "outputs"
    finished = []
    for file in outputs.glob("*/summary.json"):
        with contextlib.suppress(OSError, UserError):  # one broken run does not hide the others
            summary: Any = read_summary(file.parent) or {}
            if is_policy(summary.get("stage", "eval")) and summary.get("status") == "finished":
                finished.append((file.stat().st_mtime_ns, file.parent))
    if not finished:
        raise UserError(
            f"no finished policy (a run of sft, dpo or online RL) in {outputs}: make one with  "
            f"{command_line('train.py')}  or give --path"
        )
    return max(finished)[1]


def find_model(path: str, option: str) -> str:
    """The model directory that a path means, or the hub id as it is. Loads nothing.

    Args: option: of the command line; --reward needs a reward model, every other one a policy.
    Raises: UserError when there is no such model.
    """
    if path.startswith(BUILTIN):
        use = "there is nothing to score with" if option == "--reward" else "it cannot talk"
        raise UserError(
            f"{option} {path}: a built-in model has random weights, so {use}; train it first: "
            f"{command_line('train.py')}"
        )
    if not is_directory(path) and path.count("/") < 2:  # a hub id is NAME or OWNER/NAME
        check_hub_id(path, option)
        return path
    directory = model_directory(path)
    if not directory.is_dir():
        raise UserError(f"{option} {path}: there is no such directory")
    if has_adapter(path):
        for problem in check_adapter(path, SCORER if option == "--reward" else POLICY):
            raise UserError(f"{option} {path}: {problem}")
        return str(directory)
    if broken := broken_file(directory):
        raise UserError(f"{option} {path}: {broken}")
    check_model(directory)
    config_file = directory / "config.json"
    try:
        architectures = json.loads(config_file.read_text(encoding="utf-8")).get("architectures")
    except FileNotFoundError:
        raise UserError(
            f"{option} {path}: no model there (neither model/config.json nor config.json), or the "
            "run is not finished"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{option} {path}: cannot read {config_file}: {error}") from None
    check_role(path, architectures, option)
    return str(directory)


def check_hub_id(name: str, option: str) -> None:
    """Refuse what would be looked for on the hub in vain, which takes half a minute.

    Raises: UserError.
    """
    from huggingface_hub import try_to_load_from_cache

    run = Path(os.environ.get("RLHF_ROOT") or ".").expanduser() / "outputs" / name
    if run.is_dir():
        raise UserError(f"{option} {name}: a run is given by its directory: {run}")
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{option} {name}: there is no such directory, and it is no hub id")
    files = ("config.json", "adapter_config.json")
    if any(isinstance(try_to_load_from_cache(name, file), str) for file in files):
        return
    if not hub_answers():
        raise UserError(
            f"{option} {name}: there is no such directory, and the hub does not answer: give a "
            "run or a directory, or connect to the network"
        )


def check_role(path: str, architectures: list[str] | None, option: str) -> None:
    """Raises: UserError for a policy where a reward model is needed, and the reverse."""
    known = architectures if isinstance(architectures, list) else []
    names = ", ".join(map(str, known)) or "of unknown kind"
    is_scorer = "ForSequenceClassification" in names
    if is_directory(path) and not is_scorer:  # its head may have another name
        is_scorer = option == "--reward" and bool(score_heads(weight_names(model_directory(path))))
    if option == "--reward" and not is_scorer:
        kind = "a reward model (*ForSequenceClassification)"
        raise UserError(f"{option} {path}: this is {names}, not {kind}, so it gives no scores")
    if option != "--reward" and is_scorer:
        raise UserError(f"{option} {path}: this is a reward model ({names}); give a policy")


def find_reference(model: str) -> str:
    """The SFT policy that a policy was trained from.

    Args: model: the policy's model directory.
    Raises: UserError when none is known.
    """
    directory = Path(model).parent if is_adapter(model) else Path(model)  # of a run: model/adapter
    file = (directory.parent if directory.name == "model" else directory) / "config.yaml"
    sft = None
    with contextlib.suppress(Exception):  # a hub id, or a directory of another program
        sft = OmegaConf.select(OmegaConf.load(file), "inputs.sft")
    if not sft:
        raise UserError(
            f"{model} is no run that was trained from an SFT policy, so there is no reference: "
            "give --reference PATH"
        )
    if is_directory(sft) and not Path(sft).is_dir():
        raise UserError(f"{model}: its SFT policy {sft} no longer exists: give --reference PATH")
    return str(sft)


def load_model(
    path: str, device: str, option: str = "--path"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, in float32 on the CPU and as saved on the GPU.

    An adapter is merged into its base.

    Args: device: auto, cpu or cuda.  option: as in find_model.
    Raises: UserError with one line that says what failed.
    """
    import torch
    import transformers
    from transformers import AutoTokenizer

    from rlhf.models import loading

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu or no --device")
    device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    kind = "SequenceClassification" if option == "--reward" else "CausalLM"
    auto_class = getattr(transformers, f"AutoModelFor{kind}")
    try:
        labels = {"num_labels": 1} if option == "--reward" else {}
        config = loading.load_config(path, **labels)
        if not is_adapter(path):
            check_role(path, config.architectures, option)
        where = loading.location(tokenizer_of(path))
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        dtype = torch.float32 if device == "cpu" else config.dtype or torch.float32
        model = loading.load_model(auto_class, path, config, dtype, use_safetensors=True)
    except UserError:
        raise
    except Exception as error:  # transformers, the hub and safetensors raise many kinds
        where = "" if is_directory(path) else "not a directory here, and as a hub id: "
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise UserError(f"cannot load {path}: {where}{reason}") from error
    return model.to(device).eval(), tokenizer


def context_of(model: PreTrainedModel) -> int:
    """Tokens that a model can read at once; DEFAULT_CONTEXT where nothing limits them."""
    from rlhf.models.loading import context_length

    return context_length(model.config) or DEFAULT_CONTEXT

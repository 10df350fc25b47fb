"""Merge an adapter of peft into its base, and refuse one that does not fit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rlhf.base.adapter_files import (
    BASE_KEY,
    SEED,
    adapter_settings,
    has_score_head,
    is_adapter,
    shapes_of_weights,
    tokenizer_of,
)
from rlhf.base.errors import UserError
from rlhf.base.locations import BUILTIN, model_directory
from rlhf.base.log import first_line, log, plural
from rlhf.models.lora import HEAD, SCORE_SETTINGS, SCORE_SETTINGS_FILE, output_layer
from rlhf.models.weights import some_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

OUTPUT = re.compile(r"base_model\.model\.(.*\.)?(lm_head|embed_out)\..*")
# matrices with a row per token, saved in full
MATRIX = re.compile(
    r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out)"
    r"(\.token_adapter)?(\.base_layer|\.modules_to_save)?\.weight"
)
IN_FULL = ".modules_to_save."
ROWS = re.compile(r".*\.token_adapter\.trainable_tokens_delta")  # those that are trained


@contextlib.contextmanager
def seed_of_base(path: str) -> Iterator[None]:
    """Draw the random weights of a built-in base from the seed that its adapter was made with."""
    settings = adapter_settings(path)
    base = settings[BASE_KEY]
    if not base.startswith(BUILTIN):
        yield
        return
    revision = str(settings.get("revision"))
    number = revision.removeprefix(SEED)
    known = revision.startswith(SEED) and number.isdigit()
    if not known:
        log.warning(
            f"{path}: its base {base} has random weights, and revision={revision} names no seed "
            f"({SEED}N): they are drawn from this run's"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(number) if known else torch.initial_seed())
        yield


def merge(hf: PreTrainedModel, path: str) -> PreTrainedModel:
    """Add an adapter to the weights of its base, as peft's merge_and_unload does.

    The base first gets as many rows of embeddings as the adapter was trained with. What a scorer
    cannot use of a policy's adapter, that of the output layer, is named in the log.

    Args: hf: the base.  path: of the adapter.
    Raises: UserError for weights that are missing, unknown to the base or of another shape.
    """
    import peft

    known = hf.get_input_embeddings().num_embeddings
    if (rows := rows_for(path, known)) != known:
        hf.resize_token_embeddings(rows)
    output = output_layer(hf)
    tied = hf.get_input_embeddings().weight
    is_tied = output is not None and output.weight is tied
    base = adapter_settings(path)[BASE_KEY]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # of tied matrices, which are handled here
            model = peft.PeftModel(hf, settings_for(hf, path))  # draws weights, then loads them
            found = model.load_adapter(model_directory(path), "default", torch_device="cpu")
            check_found(path, found, output, is_tied)
            if is_tied:
                separate(hf, tied)
            hf = model.merge_and_unload(safe_merge=True)
    except UserError:
        raise
    except KeyError as error:  # of a module that is saved in full
        raise UserError(f"{path} lacks a weight of its adapter: {error.args[0]}") from error
    except Exception as error:  # no such layer in the base, other shapes, NaN, ...
        lines = str(error).split("\n\t")
        reason = lines[1] if lines[1:] else first_line(error)
        raise UserError(f"{path}: the adapter does not fit its base {base}: {reason}") from error
    hf.requires_grad_(True)  # peft has frozen the base
    if is_tied:
        tie_again(hf)
    read_score_settings(hf, path)
    log.info(f"{path}: adapter merged into {base}")
    return hf


def rows_for(path: str, rows: int) -> int:
    """Rows of the embeddings that a model has with its adapter, if its base has `rows`.

    They are those of a matrix that is saved with the adapter, else at least one for each token of
    the adapter's own tokenizer, and for each token that it trains.
    """
    if not is_adapter(path):
        return rows
    settings = adapter_settings(path)
    rows = rows_for(settings[BASE_KEY], rows)
    for name, shape in shapes_of_weights(path).items():
        if MATRIX.fullmatch(name):
            return shape[0]
        if name.endswith(".lora_embedding_A"):
            return shape[1]
    trained = settings.get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    rows = max(rows, *(index + 1 for indices in lists for index in indices), 0)
    if tokenizer_of(path) == path:
        from transformers import AutoTokenizer

        where = model_directory(path)
        rows = max(rows, len(AutoTokenizer.from_pretrained(where, trust_remote_code=False)))
    return rows


def settings_for(hf: PreTrainedModel, path: str) -> LoraConfig:
    """An adapter's configuration without the modules that this model does not have."""
    import peft

    settings: LoraConfig = peft.LoraConfig.from_pretrained(model_directory(path))
    known = {field.name for field in dataclasses.fields(settings)}
    if unknown := sorted(adapter_settings(path).keys() - known):
        log.warning(f"{path}: peft {peft.__version__} does not know {', '.join(unknown)}: ignored")
    settings.inference_mode = True
    modules = {name.rsplit(".", 1)[-1] for name, _ in hf.named_modules()}
    in_full = set(settings.modules_to_save or [])
    if hasattr(hf, HEAD) and has_score_head(path):
        in_full.add(HEAD)
    settings.modules_to_save = sorted(in_full & modules) or None
    if isinstance(tokens := settings.trainable_token_indices, dict):
        kept = {name: indices for name, indices in tokens.items() if name in modules}
        settings.trainable_token_indices = kept or None
    return settings


def check_found(path: str, found: Any, output: nn.Module | None, is_tied: bool) -> None:
    """Check what peft reports of a loaded adapter. Raises: UserError.

    Args: found: missing_keys and unexpected_keys.  output: the output layer; without one the
        adapter's is not used.  is_tied: it is to the embeddings.
    """
    base, missing = adapter_settings(path)[BASE_KEY], found.missing_keys
    if missing:
        lacks = f"{path} lacks {plural(len(missing), 'weight')} of its adapter"
        raise UserError(f"{lacks}: {some_of(missing)}: fetch or save it again")
    # peft writes some weights twice: rows of tied matrices, and modules in full after a resize
    saved = shapes_of_weights(path)
    in_full = {name for name in saved if IN_FULL in name and name.replace(IN_FULL, ".") in saved}
    rows = {name for name in saved if is_tied and ROWS.fullmatch(name)}
    unexpected = set(found.unexpected_keys) - in_full - rows
    unused = {name for name in unexpected if output is None and OUTPUT.fullmatch(name)}
    if unknown := unexpected - unused:
        raise UserError(
            f"{path} has {plural(len(unknown), 'weight')} that its base {base} does not know: "
            f"{some_of(unknown)}; {BASE_KEY} is another model"
        )
    if unused:
        log.info(f"{path}: not used: {some_of(unused)}")


def separate(hf: PreTrainedModel, tied: nn.Parameter) -> None:
    """Give the output layer its own copy of the matrix that it shares with the embeddings.

    What an adapter adds to one of them must not be added to the other.
    """
    for module in list(hf.modules()):
        if isinstance(module, nn.Linear) and module.weight is tied:
            module.weight = nn.Parameter(tied.detach().clone())


def tie_again(hf: PreTrainedModel) -> None:
    """Tie the output layer to the embeddings where the adapter has left them equal."""
    embeddings, output = hf.get_input_embeddings(), hf.get_output_embeddings()
    text = hf.config.get_text_config()
    text.tie_word_embeddings = hf.config.tie_word_embeddings = torch.equal(
        embeddings.weight, output.weight
    )
    hf.all_tied_weights_keys = hf.get_expanded_tied_weights_keys(all_submodels=True)
    hf.tie_weights()


def read_score_settings(hf: PreTrainedModel, path: str) -> None:
    """Set how the scores of a reward model's adapter are read, as stage=rm has saved it."""
    file = model_directory(path) / SCORE_SETTINGS_FILE
    if hasattr(hf, HEAD) and file.exists():
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        for name in SCORE_SETTINGS:
            if name in settings:
                setattr(hf.config, name, settings[name])

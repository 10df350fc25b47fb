"""Load the weights of a checkpoint, and refuse one that would leave some of them random.

transformers gives a weight that a checkpoint lacks, or has under another name or in another shape,
random numbers, and says so in a table that nobody reads.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from rlhf.base.errors import UserError
from rlhf.base.locations import is_directory
from rlhf.base.log import first_few, first_line, log, plural
from rlhf.base.model_files import broken_file, files_of_weights, score_heads, weight_names
from rlhf.distributed.engine import without_zero3_init

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

HEAD = "score.weight"  # of transformers' sequence-classification models
SHOWN = 3  # names in a message
# Weights that a checkpoint may have and the model does not use: the head of a language model,
# buffers that are computed anew, and the towers of a model that reads more than text.
OUTPUT = re.compile(r"(.*\.)?(lm_head|embed_out)\.weight")
EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in|word_embeddings)\.weight")
UNUSED = re.compile(
    r"(.*\.)?(lm_head|embed_out)\.(weight|bias)"
    r"|.*(inv_freq|position_ids|\.attn\.(masked_)?bias|\.attention\.(masked_)?bias)"
    r"|(.*\.)?(vision\w*|visual|audio\w*|multi_modal_projector|mm_projector|mtp)\..*"
)


def load_weights(
    auto_class: type[_BaseAutoModelClass],
    directory: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    new_head: bool = False,
    use_safetensors: bool | None = None,
) -> PreTrainedModel:
    """A model with the weights of a checkpoint. It logs what of the checkpoint is not used.

    The head of a reward model may have another name, if it is the only head there.

    Args:
        directory: or a hub id.
        new_head: a missing `score.weight` stays random.
        use_safetensors: True: nothing else; None: pickles of tensors too, read as data only.
    Raises: UserError for a broken file; for weights that are missing, or have another shape; for
        weights that nothing uses.
    """
    options: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": False}
    options["use_safetensors"] = use_safetensors
    is_scorer = "SequenceClassification" in auto_class.__name__
    if is_directory(directory) and (problem := broken_file(Path(directory))):
        raise UserError(problem)
    if head := renamed_head(directory) if is_scorer and not new_head else None:
        log.info(f"{directory}: the reward model's head is {head}")
        options["key_mapping"] = {f"^{re.escape(head)}$": HEAD}
    if is_directory(directory) and output_layer_differs(Path(directory), config):
        log.info(f"{directory}: its output layer is not its embedding, so they are not tied")
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    partitioned = is_deepspeed_zero3_enabled()
    try:
        if partitioned:  # transformers then reports missing weights only: read the names first
            with without_zero3_init():
                _, found = auto_class.from_pretrained(directory, device_map="meta", **options)
            check_found(directory, found, head, new_head)
        hf, found = auto_class.from_pretrained(directory, **options)
        if not partitioned:
            check_found(directory, found, head, new_head)
    except UserError:
        raise
    except Exception as error:  # no weights, a torn pickle, an unknown quantization, the hub, ...
        raise UserError(f"cannot load {directory}: {first_line(error)}") from error
    return hf


def check_found(
    directory: str, found: Mapping[str, Collection[Any]], head: str | None, new_head: bool
) -> None:
    """Check what transformers reports of a loaded checkpoint. Raises: UserError."""
    missing = {name for name in found["missing_keys"] if not (new_head and name == HEAD)}
    unexpected = set(found["unexpected_keys"])
    if (bias := f"{(head or HEAD).removesuffix('.weight')}.bias") in unexpected:
        log.info(f"{directory}: {bias} is left out; it adds the same number to every score")
        unexpected.remove(bias)
    check_weights(directory, missing, found["mismatched_keys"], unexpected)


def output_layer_differs(directory: Path, config: PreTrainedConfig) -> bool:
    """Whether a checkpoint has an output layer of its own, though its configuration ties it."""
    if not config.get_text_config().tie_word_embeddings:
        return False
    names = weight_names(directory)
    output = [name for name in names if OUTPUT.fullmatch(name)]
    embedding = [name for name in names if EMBEDDING.fullmatch(name)]
    if len(output) != 1 or len(embedding) != 1:
        return False
    return not torch.equal(*(read_weight(directory, name) for name in (*output, *embedding)))


def read_weight(directory: Path, name: str) -> Tensor:
    """One weight of a directory's safetensors files."""
    from safetensors import safe_open

    with safe_open(directory / files_of_weights(directory)[name], "pt") as opened:
        return opened.get_tensor(name)


def renamed_head(directory: str) -> str | None:
    """The head of a reward model in a directory, where it is not called `score.weight`.

    Raises: UserError where there are several heads.
    """
    heads = score_heads(weight_names(Path(directory))) if is_directory(directory) else []
    if not heads or HEAD in heads:
        return None
    if len(heads) > 1:
        raise UserError(
            f"{directory}: which of {', '.join(heads)} gives the scores? Rename it to {HEAD}"
        )
    return heads[0]


def check_weights(
    directory: str,
    missing: Collection[str],
    mismatched: Collection[tuple[str, torch.Size, torch.Size]],
    unexpected: Collection[str],
) -> None:
    """Args: mismatched: names with the shape in the checkpoint and that in the model.

    Raises: UserError as `load_weights`.
    """
    if missing:
        problem = f"{directory} lacks {plural(len(missing), 'weight')} of the model: "
        problem += some_of(missing)
        if unexpected:
            problem += f"; it has {some_of(unexpected)} instead"
        if prefix := common_prefix(missing, unexpected):
            problem += f": remove {prefix!r} from its names"
        raise UserError(problem)
    if mismatched:
        name, there, wanted = min(mismatched)
        hint = ": a reward model has one label" if name == HEAD else ": config.json does not fit it"
        raise UserError(
            f"{directory}: {name} has the shape {tuple(there)}, not {tuple(wanted)}{hint} "
            f"({plural(len(mismatched), 'weight')} of another shape)"
        )
    unused = {name for name in unexpected if UNUSED.fullmatch(name)}
    if unknown := set(unexpected) - unused:
        raise UserError(
            f"{directory} has {plural(len(unknown), 'weight')} that the model does not know: "
            f"{some_of(unknown)}; config.json is that of another model"
        )
    if unused:
        log.info(f"{directory}: not used: {some_of(unused)}")


def some_of(names: Collection[str]) -> str:
    """The first few names, in order, and how many others there are."""
    return first_few(sorted(names), SHOWN)


def common_prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What the checkpoint's names begin with in front of the model's own, if that is all."""
    for name in sorted(missing):
        for other in unexpected:
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                return prefix if all(prefix + m in unexpected for m in missing) else ""
    return ""

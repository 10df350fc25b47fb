"""The files by which a vLLM server gets the policy's weights: rollout.engine=vllm."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rlhf.base.errors import UserError
from rlhf.base.files import private_folder, remove
from rlhf.config.schema import Config
from rlhf.models.token_rows import output_layer
from rlhf.runs.locks import try_lock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHARED_MEMORY = Path("/dev/shm")
LOCK = "lock"  # in a run's folder of weights, held until the run ends
LOCK_GRACE = 60.0  # seconds in which a folder's lock may not be there yet


def write_model(
    hf: PreTrainedModel,
    weights: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    untie: bool,
) -> None:
    """Write a model as vLLM loads it.

    Args:
        weights: all of them, an adapter merged (loading.full_state_dict).
        untie: give the output layer weights of its own: on a CPU vLLM packs a layer's weights, and
            packs those of a tied one only when it starts.
    """
    remove(folder)
    config = hf.config.get_text_config()
    tied, embeddings, output = (
        config.tie_word_embeddings,
        hf.get_input_embeddings(),
        output_layer(hf),
    )
    try:
        if untie and tied and output is not None:
            names = {id(module): name for name, module in hf.named_modules()}
            copied = weights[f"{names[id(embeddings)]}.weight"].clone()
            weights = weights | {f"{names[id(output)]}.weight": copied}
            config.tie_word_embeddings = False
        hf.save_pretrained(folder, state_dict=weights)
    finally:
        config.tie_word_embeddings = tied
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def weights_folder(cfg: Config, run_dir: Path, size: int) -> Iterator[Path]:
    """A new folder for a run's weights, which is deleted at the end of this context.

    What killed runs have left beside it is deleted, too: it would fill the memory.

    Args: size: of the weights, bytes; there are two versions for a moment.
    """
    given = cfg.rollout.vllm.weights_dir
    everyone = f"rlhf-vllm-{os.getuid()}"
    remove_left_folders(SHARED_MEMORY / everyone)
    has_room = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 2.5 * size
    base = Path(given or (SHARED_MEMORY if has_room else run_dir)).absolute()
    try:
        if given:  # the server may be another user's
            (base / everyone).mkdir(parents=True, exist_ok=True)
        else:
            private_folder(base / everyone)
        remove_left_folders(base / everyone)
        folder = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}-", dir=base / everyone))
        if given:
            folder.chmod(0o755)
    except OSError as error:
        raise UserError(
            f"rollout.vllm.weights_dir={given or 'null'}: no weights can be written to {base} "
            f"({error.strerror or error}): give another folder that both can use"
        ) from None
    with try_lock(folder / LOCK):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # others use it
                folder.parent.rmdir()


def remove_left_folders(everyone: Path) -> None:
    """Delete the folders of runs that have ended without doing so."""
    for other in everyone.glob("*"):
        with contextlib.suppress(OSError):  # another run deletes it, too
            if other.is_dir() and time.time() - other.stat().st_mtime > LOCK_GRACE:
                with try_lock(other / LOCK) as is_free:
                    if is_free:
                        shutil.rmtree(other, ignore_errors=True)

"""What training stages prepare before their loop: data, steps, policy and reference."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rlhf.base import watchdog
from rlhf.base.errors import UserError
from rlhf.base.log import announced, log
from rlhf.config.schema import Config, Lora
from rlhf.config.stage_graph import adapter_only
from rlhf.data.load import open_data
from rlhf.data.records import Dataset
from rlhf.data.template import warn_of_date
from rlhf.distributed.engine import Engine, build_engine
from rlhf.models.loading import check_context, load_policy, load_tokenizer
from rlhf.models.lora import AdapterOff
from rlhf.models.wrappers import LogProbModel, Policy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_inputs(
    cfg: Config, run_dir: Path, path: str, *, samples: bool = False, references: bool = True
) -> tuple[PreTrainedTokenizerBase, Dataset]:
    """The tokenizer of the model at `path`, and the records of all stages.

    Args:
        samples: the stage samples responses of up to rollout.max_new_tokens.
        references: it reads answers of the data, of up to data.max_response_tokens.
    Raises: UserError when the model's context is too short for them, or there is no data.
    """
    if references:
        check_context(path, cfg.data.max_prompt_tokens, cfg.data.max_response_tokens)
    if samples:
        key, longest = "rollout.max_new_tokens", cfg.rollout.max_new_tokens
        check_context(path, cfg.data.max_prompt_tokens, longest, key)
    tokenizer = load_tokenizer(path, cfg.data.template)
    warn_of_date([tokenizer])
    with announced("reading the data"), watchdog.while_files_move():
        return tokenizer, open_data(cfg, run_dir)


def count_steps(rows: Sized, per_step: int, epochs: int, max_steps: int | None, key: str) -> int:
    """Steps of a run: whole batches in all epochs, at most `max_steps`.

    Args: rows: of the training data.  per_step: rows in a batch.  key: the setting of `per_step`.
    Raises: UserError when there is not one whole batch.
    """
    check_rows_left(rows)
    steps = len(rows) // per_step * epochs
    if not steps:
        raise UserError(
            f"{key}={per_step}: there are only {len(rows)} rows to train on, which make no batch; "
            f"lower it to at most {len(rows)}, or add data"
        )
    if max_steps and steps < max_steps:
        node = key.partition(".")[0]
        log.info(
            f"{steps} steps, fewer than {node}.max_steps={max_steps}: {len(rows)} rows make "
            f"{len(rows) // per_step} batches of {per_step}, {node}.epochs={epochs} times"
        )
    say_left_over(len(rows), per_step, epochs, max_steps, "rows")
    return min(steps, max_steps or steps)


def say_left_over(rows: int, per_step: int, epochs: int, max_steps: int | None, what: str) -> None:
    """Name the rows at the end of an epoch that make no whole batch, where they are over 1% and
    max_steps does not leave out more."""
    left = rows % per_step
    all_steps = rows // per_step * epochs
    if left > rows / 100 and all_steps <= (max_steps or all_steps):
        which = "they are not trained on" if epochs == 1 else "each epoch leaves out others"
        log.info(f"{left} of {rows} {what} make no whole batch of {per_step}: {which}")


def check_rows_left(rows: Sized) -> None:
    """Refuse tokenized rows of which none is left. Raises: UserError with the reasons."""
    if not len(rows):
        fix = "raise data.max_prompt_tokens"
        if "too long" not in str(rows):
            fix = "choose a model whose chat template writes them (actor.path)"
        raise UserError(f"no rows to train on: {rows}: {fix}")


def check_held_out(rows: Sized, max_prompt: int) -> None:
    """Refuse an empty evaluation set. Args: rows: held-out rows with a prompt that is short enough.

    Raises: UserError.
    """
    if not len(rows):
        raise UserError(
            f"data.max_prompt_tokens={max_prompt}: all held-out prompts are longer; raise it"
        )


def build_actor_and_reference(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, run_dir: Path
) -> tuple[Engine[Policy], LogProbModel]:
    """The policy to train, from the SFT run, and its frozen start as the reference.

    Where only an adapter is trained, the reference is the policy without it.
    """
    path, precision = cfg.inputs["sft"], cfg.deploy.precision
    cfg.actor.lora.dropout = 0.0  # at the start the policy equals its reference

    def load(adapter: Lora | None = None) -> Policy:
        # both draw the same random weights: those of a built-in model, and of new tokens
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            return load_policy(path, tokenizer, precision, adapter)

    actor = build_engine(lambda: load(cfg.actor.lora), cfg, "actor", run_dir)
    actor.eval()
    if adapter_only(cfg.actor):
        log.info("reference: the actor without its adapter, which needs no memory of its own")
        return actor, AdapterOff(actor)
    ref = build_engine(load, cfg, "ref", run_dir)
    return actor, ref

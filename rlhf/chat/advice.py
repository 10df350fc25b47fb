"""What to do with a file of preferences: the command that trains on it, or what it still lacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from rlhf.base.commands import command_line, override_text
from rlhf.base.log import plural
from rlhf.chat.policy import Policy
from rlhf.config.choices import Format, Template
from rlhf.config.presets import CONF
from rlhf.config.schema import Data, Source
from rlhf.data.reading import read_rows
from rlhf.data.splits import RowFacts, split_rows
from rlhf.data.template import TEMPLATES

Stage = Literal["sft", "rm", "dpo"]
ENOUGH = 10  # distinct prompts: some to train on, some held out
HELD_OUT = (0.05, 0.1, 0.2, 0.35, 0.5)  # values of data.eval_share, of which the first fit is taken
SMALL = 256  # rows: with the default batches of the stages they would make only a few steps
SHARES = {
    "sft": [1, 0, 0],
    "rm": [0, 1, 0],
    "dpo": [0, 1, 0],
}  # data.shares: all rows for this stage


class Start(NamedTuple):
    """The policy that training on its responses starts from."""

    path: str  # run, model directory or hub id
    template: Template


def start_of(policy: Policy) -> Start:
    """Where a policy of the conversation is, and which data.template is its own."""
    path = Path(policy.path)
    if path.name == "model" and (path.parent / "summary.json").exists():
        path = path.parent
    here = Path.cwd()
    where = str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)
    return Start(where if path.exists() else policy.path, template_of(policy))


def template_of(policy: Policy) -> Template:
    """The data.template that is a policy's chat template; `tokenizer` where it is another one."""
    own = str(policy.tokenizer.chat_template).removeprefix("{{ bos_token }}")
    return next((style for style, text in TEMPLATES.items() if text == own), Template.tokenizer)


def advice(file: Path, stage: Stage, start: Start) -> str:
    """The command that trains `start` on a file of preferences, or what the file still lacks.

    Args: stage: sft needs responses, rm and dpo pairs; the reward model starts from the policy.
    Raises: OSError.
    """
    if start.template is Template.none:
        return f"no stage can train {start.path} on it: its template is none, which has no messages"
    data = _default_data()
    rows = _facts(file, data)
    usable = rows.has_answer if stage == "sft" else rows.is_pair
    prompts = len(np.unique(rows.prompt_hash[usable]))
    noun = "good response" if stage == "sft" else "pair"
    if prompts < ENOUGH:
        missing = plural(ENOUGH - prompts, "more prompt")
        return (
            f"to train on it, {noun}s to {missing} are needed: so far {prompts} of at least"
            f" {ENOUGH}"
        )
    data.shares = SHARES[stage]
    for share in HELD_OUT:
        data.eval_share = share
        parts, _ = split_rows(rows, data)
        trained, held_out = len(parts["sft" if stage == "sft" else "rm"]), parts["eval"]
        if trained and usable[held_out].any():
            overrides = _overrides(file, stage, start, data, trained)
            return f"train on it:  {command_line('train.py', *overrides)}"
    return f"to train on it, {noun}s to some more prompts are needed, so that some can be held out"


def _overrides(file: Path, stage: Stage, start: Start, data: Data, rows: int) -> Iterator[str]:
    """The overrides that train a stage on a file. Args: rows: that it trains on."""
    yield f"stage={stage}"
    if stage == "dpo":
        yield f"dpo.actor={override_text(start.path)}"
    model = "reward" if stage == "rm" else "actor"
    yield from (f"{model}=custom", f"{model}.path={override_text(start.path)}")
    yield from ("data=jsonl", f"data.sources.mine.path={override_text(str(file))}")
    if start.template is not Template.hh:
        yield f"data.template={start.template.name}"
    yield f"data.shares=[{','.join(map(str, data.shares))}]"
    yield f"data.eval_share={data.eval_share:g}"
    if rows < SMALL:
        yield f"{stage}.batch_size={min(16, 2 ** (rows.bit_length() - 1))}"


def _default_data() -> Data:
    """The data node as a command has it that sets nothing but the file."""
    values = OmegaConf.to_container(OmegaConf.load(CONF / "config.yaml").data)
    return Data(**values, sources={})  # type: ignore[arg-type]


def _facts(file: Path, data: Data) -> RowFacts:
    """What decides where the rows of a file of preferences go; without those that are skipped."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    source = Source(path=str(file), format=Format.prompt_chosen_rejected)
    rows = read_rows({"text": lines}, source, by_line=True, seed=data.seed, style=Template.hh)
    read = np.array([not problem for problem in rows["problem"]], dtype=bool)
    rejected = np.array([text is not None for text in rows["rejected"]], dtype=bool)
    count = int(read.sum())
    no, one = np.zeros(count, dtype=bool), np.ones(count)
    return RowFacts(
        prompt_hash=rows["prompt_hash"][read],
        row_hash=rows["row_hash"][read],
        is_pair=rejected[read],
        has_answer=~no,
        is_further=no,
        sft_only=no,
        has_eval_split=no,
        held_out=no,
        weight=one,
        table=np.zeros(count, dtype=np.int64),
    )

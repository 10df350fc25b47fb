"""What bench/run.py starts, each in a process of its own: it sets up, then works one sample at a time when it is told to.

A contestant's side of the talk, a line of JSON each way: "ready"; the driver answers "go", it works, and says the seconds and what it has
counted; and so on, until the driver says "stop" and it says its peak of memory. What libraries print goes to its log.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from materials import assets, limits
from peers import transformers_generate, trl_ppo, trl_trainer
from protocol import Spec, forced_lengths, read_batches, turns


def main(name: str, file: str) -> None:
    """Be the contestant `name` with the settings in `file`."""
    spec: Spec = json.loads(Path(file).read_text())
    spec["voice"] = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ROLES[name](spec)


class Rows(list):
    """Rows of token ids as rlhf.data.tokenized gives them; counts the tokens of those that were taken."""

    def __init__(self, rows: list[Any], tokens: Callable[[Any], int], lengths: list[int]):
        super().__init__(rows)
        self.tokens, self.lengths, self.taken = tokens, lengths, 0

    def __getitem__(self, i: Any) -> Any:
        row = super().__getitem__(i)
        self.taken += self.tokens(row)
        return row

    def __str__(self) -> str:
        return f"{len(self)} rows"


def product(spec: Spec) -> None:
    """A stage of the product as its worker runs it, with the batches of this benchmark. What is replaced: the rows, the end of a step,
    and the random numbers of the answers' lengths. EOS is the last id, and the sampler inverts the cumulative distribution: so the
    largest number below 1 gives EOS, and no number below 0.999 does, as EOS is not that likely."""
    from rlhf import worker

    worker.prepare_environment()
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        OPTForCausalLM,
    )

    from rlhf.config.loading import load_config
    from rlhf.data import tokenized
    from rlhf.data.batches import global_batches
    from rlhf.data.records import Turn as Said
    from rlhf.stages import (
        rl,
        sft,  # noqa: F401
    )
    from rlhf.training import checkpoint

    run_dir = Path(spec["run_dir"])
    cfg = load_config(run_dir / "config.yaml")
    flat = list(itertools.chain(*read_batches(spec)))
    if cfg.stage.name == "ppo":
        flat = [([Said("user", "")], prompt) for prompt in flat]
    order = list(
        itertools.chain(*global_batches(len(flat), spec["batch"], 1, cfg.seed))
    )  # the stage takes rows in this one
    placed = [row for _, row in sorted(zip(order, flat), key=lambda pair: pair[0])]
    tokens: dict[str, Callable[[Any], int]] = {
        "ppo": lambda row: len(row[1]),
        "sft": lambda row: len(row[0]) + len(row[1]),
        "rm": lambda row: 2 * len(row[0]) + len(row[1]) + len(row[2]),
    }
    longest = [
        len(row[1]) if cfg.stage.name == "ppo" else len(row[0]) + max(map(len, row[1:]))
        for row in placed
    ]
    rows = Rows(placed, tokens[cfg.stage.name], longest)
    for name in ("prompts", "pairs", "demonstrations"):
        setattr(tokenized, name, lambda *_, **__: rows)

    drawn = rl.uniforms

    def draws(stream: str, keys: Any, seed: int, step: int, n: int) -> Any:
        numbers = drawn(stream, keys, seed, step, n) * 0.999
        if spec["work"] == "ppo-eos":
            numbers[
                torch.arange(len(keys)), torch.from_numpy(forced_lengths(step, len(keys), n)) - 1
            ] = float(np.nextafter(1.0, 0.0))
        return numbers

    rl.uniforms = draws
    turn = turns(spec, "product")

    def counted() -> dict[str, Any]:
        logged = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        found = {"tokens": rows.taken}
        rows.taken = 0
        if cfg.stage.name == "ppo":
            found["tokens"] += round(logged["tokens/response_mean"] * spec["batch"])
            found |= {"rollout": logged["timing_s/rollout"], "update": logged["timing_s/update"]}
        return found

    def after(_: Any, step: int) -> None:
        turn(counted)

    checkpoint.Checkpoints.after = after  # type: ignore[method-assign, assignment]
    worker.main(run_dir)


def product_generate(spec: Spec) -> None:
    """The product's sampling loop alone."""
    from rlhf import worker

    worker.prepare_environment()
    import torch
    from transformers import AutoModelForCausalLM, OPTForCausalLM  # noqa: F401

    from rlhf.config.choices import Precision
    from rlhf.data.batches import pad_left, uniforms
    from rlhf.models.loading import load_policy, load_tokenizer
    from rlhf.sampling.batches import PromptBatch
    from rlhf.sampling.sampler import sample
    from rlhf.sampling.token_choice import Sampling

    torch.set_num_threads(spec["threads"])
    turn = turns(spec, "product")
    tokenizer = load_tokenizer(spec["policy"])
    policy = load_policy(spec["policy"], tokenizer, Precision[spec["precision"]]).eval()
    for step, prompts in enumerate(read_batches(spec)):
        noise = uniforms("rollout", range(len(prompts)), 1, step, spec["new"])
        batch = PromptBatch(*pad_left(prompts, tokenizer.pad_token_id, torch.device("cpu")))
        # below 1 - p(EOS), so that no response ends, as in `product`
        responses = sample(policy, batch, noise * 0.999, tokenizer.eos_token_id, Sampling())
        tokens = int(batch.mask.sum() + responses.mask.sum())
        turn(lambda tokens=tokens: {"tokens": tokens})  # type: ignore[misc]


ROLES: dict[str, Callable[[Spec], None]] = {
    role.__name__: role
    for role in (
        assets,
        limits,
        product,
        product_generate,
        transformers_generate,
        trl_ppo,
        trl_trainer,
    )
}

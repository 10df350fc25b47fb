"""The contestants that bench/run.py starts, each in its own process.

A contestant sets up and reports "ready" as a line of JSON. For each "go" from the driver it works
one sample, and reports the seconds and its counts. At "stop" it reports its peak of memory. What
libraries print goes to its log.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from materials import assets, limits
from peers import transformers_generate, trl_ppo, trl_trainer
from protocol import Spec, forced_lengths, read_batches, turns

if TYPE_CHECKING:
    import torch


def main(name: str, file: str) -> None:
    """Run the contestant `name` with the settings in `file`."""
    spec: Spec = json.loads(Path(file).read_text(encoding="utf-8"))
    spec["voice"] = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    ROLES[name](spec)


class Rows(list):
    """Rows of token ids as rlhf.data.tokenized gives them; counts the tokens of those taken."""

    def __init__(self, rows: list[tuple], tokens: Callable[[tuple], int], lengths: list[int]):
        super().__init__(rows)
        self.tokens, self.lengths, self.taken = tokens, lengths, 0

    def __getitem__(self, i: Any) -> Any:
        row = super().__getitem__(i)
        self.taken += self.tokens(row)
        return row

    def __str__(self) -> str:
        return f"{len(self)} rows"


def product(spec: Spec) -> None:
    """A stage of the product as its worker runs it, with the batches of this benchmark.

    Replaced are the rows, the end of a step, and the random numbers of sampling.
    """
    from rlhf import worker

    worker.prepare_environment()
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        OPTForCausalLM,
    )

    from rlhf.config.loading import load_config
    from rlhf.data import tokenized
    from rlhf.stages import sft  # noqa: F401
    from rlhf.training import checkpoint, curves_on_the_way

    run_dir = Path(spec["run_dir"])
    cfg = load_config(run_dir / "config.yaml")
    stage = cfg.stage.name
    rows = product_rows(spec, stage, cfg.seed)
    for name in ("prompts", "pairs", "demonstrations"):
        setattr(tokenized, name, lambda *_, **__: rows)
    force_response_lengths(spec)
    curves_on_the_way.EVERY = float("inf")  # another process would draw them in the peer's turn
    turn = turns(spec, "product")

    def counted() -> dict[str, Any]:
        logged = json.loads(
            (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        )
        counts = {"tokens": rows.taken}
        rows.taken = 0
        if stage == "ppo":
            counts["tokens"] += round(logged["tokens/response_mean"] * spec["batch"])
            counts |= {"rollout": logged["timing_s/rollout"], "update": logged["timing_s/update"]}
        return counts

    def after(_: checkpoint.Checkpoints, step: int) -> None:
        turn(counted)

    checkpoint.Checkpoints.after = after  # type: ignore[method-assign, assignment]
    worker.main(run_dir)


def product_rows(spec: Spec, stage: str, seed: int) -> Rows:
    """The benchmark's rows, placed so that the stage's shuffled order is that of the batches."""
    from rlhf.data.batches import global_batches
    from rlhf.data.records import Prompt, Turn

    rows = list(itertools.chain(*read_batches(spec)))
    if stage == "ppo":
        rows = [(Prompt([Turn("user", "")]), prompt) for prompt in rows]
    order = itertools.chain(*global_batches(len(rows), spec["batch"], 1, seed))
    placed = [row for _, row in sorted(zip(order, rows), key=lambda pair: pair[0])]
    if stage == "ppo":
        return Rows(placed, lambda row: len(row[1]), [len(row[1]) for row in placed])
    longest = [len(row[0]) + max(map(len, row[1:])) for row in placed]
    if stage == "rm":
        return Rows(placed, lambda row: 2 * len(row[0]) + len(row[1]) + len(row[2]), longest)
    return Rows(placed, lambda row: len(row[0]) + len(row[1]), longest)


def force_response_lengths(spec: Spec) -> None:
    """Replace the random numbers of sampling, so that no response ends before its forced length.

    EOS is the last id, and the sampler inverts the cumulative distribution. So the largest number
    below 1 gives EOS, and no number below 0.999 does, as EOS is less likely than that.
    """
    import torch

    from rlhf.stages import rl

    drawn = rl.uniforms

    def draws(stream: str, keys: Sequence[int], seed: int, step: int, n: int) -> torch.Tensor:
        numbers = drawn(stream, keys, seed, step, n) * 0.999
        if spec["work"] == "ppo-eos":
            last = torch.from_numpy(forced_lengths(step, len(keys), n)) - 1
            numbers[torch.arange(len(keys)), last] = float(np.nextafter(1.0, 0.0))
        return numbers

    rl.uniforms = draws


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
    policy.to(spec["device"])
    for step, prompts in enumerate(read_batches(spec)):
        noise = uniforms("rollout", range(len(prompts)), 1, step, spec["new"])
        batch = PromptBatch(*pad_left(prompts, tokenizer.pad_token_id))
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

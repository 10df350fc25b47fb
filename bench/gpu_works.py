"""The measurements of bench/gpu.py; tests/gpu/ uses some of them. Each returns a table."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerator import (
    matmul_rate,
    peak_bytes,
    reset_peak,
    seconds_of,
)
from materials import shape_of
from random_models import Bench
from table import needed_flops
from torch import Tensor

from rlhf.base.constants import LOGPROB_CHUNKS
from rlhf.config.choices import RolloutEngine
from rlhf.models import logprobs
from rlhf.models.loading import DTYPES
from rlhf.models.wrappers import Policy
from rlhf.planning.formulas import GIB
from rlhf.sampling.continuous import continuous_generate
from rlhf.sampling.hf_generate import hf_generate
from rlhf.sampling.sampler import sample
from rlhf.sampling.token_choice import Sampling
from rlhf.training.optimizer_step import optimizer_step

GENERATE = {
    RolloutEngine.native: sample,
    RolloutEngine.hf: hf_generate,
    RolloutEngine.continuous: continuous_generate,
}
TOO_LARGE = "out of memory"


@dataclass
class Table:
    columns: list[str]
    rows: list[list[str]]
    note: str  # what the numbers depend on

    def __str__(self) -> str:
        lines = [self.columns, ["---"] + ["---:"] * (len(self.columns) - 1), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.note}"


@contextlib.contextmanager
def out_of_memory(row: list[str], cells: int) -> Iterator[None]:
    """A row whose work does not fit gets cells that say so."""
    try:
        yield
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        row += [TOO_LARGE, *[""] * (cells - 1)]


def gib(size: float) -> str:
    """Bytes as a cell; nothing where they were not measured."""
    return f"{size / GIB:.2f}" if size else ""


# ---------------------------------------------------------------------------------- sampling


def sampling(bench: Bench) -> Table:
    """Sampling alone, by engine and batch; with the adapter, and without one."""
    rows = []
    new = bench.cfg.rollout.max_new_tokens
    for with_adapter in (True, False):
        policy = bench.policy(with_adapter).to(bench.device).eval()
        name = f"LoRA {bench.cfg.actor.lora.rank}" if with_adapter else "no LoRA"
        engines = GENERATE if not with_adapter else {RolloutEngine.native: sample}
        if with_adapter and not bench.cfg.actor.lora.rank:
            continue
        for engine, batch in itertools.product(
            engines, (2, 4) if bench.is_tiny else (32, 128, 512)
        ):
            row = [f"{engine.name}, {name}", str(batch)]
            rows.append(row)
            with out_of_memory(row, 3):
                reset_peak(bench.device)
                work = partial(generate, bench, policy, engine, batch)
                seconds = seconds_of(bench.device, work, repeats=1)
                row += [f"{batch * new / seconds:,.0f}", f"{1e3 * seconds / new:.1f}"]
                row.append(gib(peak_bytes(bench.device)))
    columns = ["engine", "batch", "tokens/s", "ms per step", "peak GiB"]
    note = (
        f"Responses of {new} tokens, none ends early, to prompts of at most "
        f"{bench.cfg.data.max_prompt_tokens}. A step that takes as long with 32 rows as with 128 "
        "is bound by the launch of kernels: it then depends on the host's processor and the driver."
    )
    return Table(columns, rows, note)


def generate(
    bench: Bench, policy: Policy, engine: RolloutEngine, batch: int, new: int | None = None
) -> None:
    """Sample a batch. Args: new: tokens of a response."""
    prompts = bench.prompts(batch, new, shortest=0.5)
    eos_id = bench.tokenizer.eos_token_id
    GENERATE[engine](policy, bench.batch(prompts), prompts.random, eos_id, Sampling())


# ------------------------------------------------------------------------------------ update


def update(bench: Bench) -> Table:
    """Optimizer steps of all weights, without an adapter: tokens/s, and share of the peak."""
    dtype = DTYPES[bench.cfg.deploy.precision]
    peak = matmul_rate(bench.device, dtype)
    engine = bench.actor_engine(with_adapter=False)
    engine.train()
    shape = shape_of(engine.module.hf)
    rows = []
    for micro_batch in (1, 2) if bench.is_tiny else (4, 8, 16, 32):
        row = [str(micro_batch)]
        rows.append(row)
        ids, mask = bench.ragged(micro_batch, 0.0) if micro_batch > 1 else one_row(bench)
        with out_of_memory(row, 4):
            reset_peak(bench.device)
            work = partial(optimizer_step, engine, 4 * [partial(sft_loss, engine, ids, mask)], 0.0)
            seconds = seconds_of(bench.device, work)
            new = ids.shape[1] // 2
            lengths = 4 * micro_batch * [(ids.shape[1] - new, new)]
            rate = needed_flops(shape, "sft", lengths)["all"] / seconds
            tokens = 4 * ids.numel() / seconds
            row += [f"{tokens:,.0f}", f"{rate / 1e12:.1f}", f"{rate / peak:.0%}"]
            row.append(gib(peak_bytes(bench.device)))
    engine.destroy()
    columns = ["micro-batch", "tokens/s", "model TFLOP/s", "share of the peak", "peak GiB"]
    checkpointing = bench.cfg.deploy.activation_checkpointing
    note = (
        f"Steps of 4 micro-batches of full rows, all weights trained, gradient checkpointing "
        f"{'on: its second forward pass does not count' if checkpointing else 'off'}. The peak is "
        f"measured: {peak / 1e12:.1f} TFLOP/s in a large product of matrices ({dtype})."
    )
    return Table(columns, rows, note)


def one_row(bench: Bench) -> tuple[Tensor, Tensor]:
    ids, mask = bench.ragged(2, 0.0)
    return ids[:1], mask[:1]


def sft_loss(engine: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The mean negative log-probability of the second half of the rows."""
    wanted = mask > 0
    wanted[:, : ids.shape[1] - ids.shape[1] // 2] = False
    return -engine(ids, mask, wanted).logprobs.sum() / wanted.sum()


# --------------------------------------------------------------------------- chunks, packing


def chunks(bench: Bench) -> Table:
    """Forward and backward pass of the log-probabilities of tokens, by the size of a chunk."""
    tokens, cases = (64, [(2**12, 16), (2**14, 64)]) if bench.is_tiny else (8192, GPU_CHUNKS)
    arch, dtype = bench.arch, DTYPES[bench.cfg.deploy.precision]
    hidden = torch.randn(tokens, arch.hidden, device=bench.device, dtype=dtype, requires_grad=True)
    weight = torch.randn(arch.vocab, arch.hidden, device=bench.device, dtype=dtype)
    weight = (weight * arch.hidden**-0.5).requires_grad_()
    targets = torch.randint(arch.vocab, (tokens,), device=bench.device)

    def work() -> None:
        logprobs.target_logp(hidden, weight, None, targets)[0].sum().backward()
        hidden.grad = weight.grad = None

    rows = []
    row = ["as it is", ""]
    for case in [None, *cases]:
        if case:
            row = [f"2^{case[0].bit_length() - 1}", str(case[1])]
        rows.append(row)
        with out_of_memory(row, 2), chunk_sizes(*(case or ())):
            reset_peak(bench.device)
            row.append(f"{1e3 * seconds_of(bench.device, work):.2f}")
            row.append(gib(peak_bytes(bench.device)))
    columns = ["logits of a chunk", "tokens at most", "ms", "peak GiB"]
    note = (
        f"{tokens:,} tokens, vocabulary {arch.vocab:,}, width {arch.hidden}, {dtype}. Few large "
        "chunks launch fewer kernels; many small ones take less memory. rlhf/base/constants.py has "
        "the sizes, and the plan of the memory reads them."
    )
    return Table(columns, rows, note)


GPU_CHUNKS = [(2**21, 512), (2**24, 4096), (2**26, 4096), (2**28, 4096), (2**29, 8192)]


@contextlib.contextmanager
def chunk_sizes(logits: int | None = None, most: int | None = None) -> Iterator[None]:
    """Other chunks of rlhf/models/logprobs.py. Args: elements of the logits; tokens."""
    before = dict(LOGPROB_CHUNKS)
    if logits is not None and most is not None:
        for device, chunks in before.items():
            LOGPROB_CHUNKS[device] = replace(
                chunks, max_logits=logits, kept_probabilities=logits, max_tokens=most
            )
    try:
        yield
    finally:
        LOGPROB_CHUNKS.update(before)


def packing(bench: Bench) -> Table:
    """Forward and backward pass of a batch, padding-free and padded."""
    policy = bench.policy().to(bench.device).train()
    batch = 4 if bench.is_tiny else 16
    if not policy.supports_packing():
        raise SystemExit("packing: this model is always padded")

    def work(ids: Tensor, mask: Tensor) -> None:
        sft_loss(policy, ids, mask).backward()
        policy.zero_grad()

    rows = []
    for padding in (0.0, 0.35, 0.7):
        ids, mask = bench.ragged(batch, padding)
        row = [f"{padding:.0%}", f"{int(mask.sum()):,}"]
        rows.append(row)
        with out_of_memory(row, 3):
            seconds = []
            for packed in (True, False):
                policy.can_pack = packed
                seconds.append(seconds_of(bench.device, partial(work, ids, mask)))
                row.append(f"{1e3 * seconds[-1]:.1f}")
            row.append(f"{seconds[1] / seconds[0]:.2f}")
    columns = ["padding", "real tokens", "padding-free, ms", "padded, ms", "ratio"]
    note = f"{batch} rows. Padding-free time should fall with the number of real tokens."
    return Table(columns, rows, note)

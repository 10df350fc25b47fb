"""Padding-free batches in bfloat16 on weights that are not random: are they used, and what for?

    python bench/unpadded.py WORK [--model DIR]

Rounding of bfloat16 is larger on trained weights than on random ones, so a check that only looks at
the size of a difference turns the padding-free path off there. Small models of the shapes Qwen2 and
Gemma 3 are trained for 200 steps, until each token gives the next one; with --model, a model of
yours is measured too. For each: the path that the check chooses in float32 and bfloat16, and the
CPU seconds of a forward and backward pass over sequences of 20 to 250 tokens, which fill a quarter
of the padded batch, padding-free and padded in turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from rlhf.models.wrappers import Policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 200
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
LENGTHS = [250, 40, 30, 20, 60, 35, 25, 45]


def trained(config: PreTrainedConfig) -> PreTrainedModel:
    """A model after 200 steps on sequences in which each token follows from the one before it."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(hf.parameters(), lr=2e-3)
    successor = torch.randperm(SHAPE["vocab_size"])
    for _ in range(STEPS):
        ids = torch.randint(SHAPE["vocab_size"], (16, 1))
        while ids.shape[1] < 32:
            ids = torch.cat([ids, successor[ids[:, -1:]]], 1)
        loss = hf(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{config.model_type}: loss after {STEPS} steps {float(loss):.3f}", flush=True)
    return hf


def measure(name: str, hf: PreTrainedModel, repeats: int) -> str:
    """A row of the table."""
    policy = Policy(hf.eval())
    policy.device = torch.device("cpu")
    chosen = "padding-free" if policy.supports_packing() else "padded"
    generator = torch.Generator().manual_seed(1)
    vocabulary = hf.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        for packed in (True, False):
            policy.can_pack = packed
            start = time.process_time()
            (-policy(ids, mask, mask > 0).logprobs.sum()).backward()
            seconds[packed].append(time.process_time() - start)
            hf.zero_grad()
    fast, slow = (statistics.median(seconds[packed]) for packed in (True, False))
    dtype = str(hf.dtype).removeprefix("torch.")
    return f"| {name} | {dtype} | {chosen} | {fast:.2f} | {slow:.2f} | {slow / fast:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="where the small models are kept")
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    paths = {"Qwen2": options.work / "qwen2", "Gemma 3": options.work / "gemma3"}
    shapes = {"Qwen2": Qwen2Config(**SHAPE), "Gemma 3": Gemma3TextConfig(**SHAPE)}
    for name, path in paths.items():
        if not (path / "config.json").exists():
            trained(shapes[name]).save_pretrained(path)
    if options.model:
        paths[options.model.name] = options.model
    rows = ["| model | weights | path | CPU seconds, padding-free | padded | ratio |"]
    rows.append("|---|---|---|---:|---:|---:|")
    for name, path in paths.items():
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        for dtype in (torch.float32, torch.bfloat16):
            hf = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
            rows.append(measure(name, hf, options.repeats))
            print(rows[-1], flush=True)
    print("\n" + "\n".join(rows))


if __name__ == "__main__":
    main()

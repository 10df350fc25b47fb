"""Kernels of one decoding step of random models on the pretended GPU.

    python tests/pretend/decoding.py FAMILY LORA_RANK LAYERS [LAYERS ...]

Prints one number per line, for each number of layers.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from device import COUNTS, move_module, pretended_gpu

sys.path.append(str(Path(__file__).resolve().parents[1]))

from families import save_base

EOS = 2
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


def kernels(family: str, layers: int, lora_rank: int) -> int:
    """Those of a sampling loop with one more token, less those without it."""
    from helpers import composed

    from rlhf.config.choices import Precision
    from rlhf.data import batches
    from rlhf.models.loading import load_policy, load_tokenizer
    from rlhf.models.lora import merged_adapter
    from rlhf.sampling.batches import PromptBatch
    from rlhf.sampling.sampler import sample
    from rlhf.sampling.token_choice import Sampling

    tokenizer = load_tokenizer("builtin:tiny")
    lora = composed("stage=sft", f"actor.lora.rank={lora_rank}").actor.lora
    with tempfile.TemporaryDirectory() as folder:
        save_base(Path(folder), family, num_hidden_layers=layers)
        policy = load_policy(folder, tokenizer, Precision.bf16, lora)
    policy.requires_grad_(False).eval()
    prompts = PromptBatch(*batches.pad_left(PROMPTS, 0))
    counted = []
    with pretended_gpu():
        move_module(policy)
        with merged_adapter(policy.hf):  # as the stages do
            for tokens in (1, 2, 3):  # the first loop also finds out how the model reads prompts
                before = COUNTS.copy()
                # random numbers of 0 choose token 0, never the end
                sample(policy, prompts, torch.zeros(len(PROMPTS), tokens), EOS, Sampling())
                counted.append(COUNTS.since(before).kernels.total())
    return counted[2] - counted[1]


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore")
    for number in sys.argv[3:]:
        print(kernels(sys.argv[1], int(number), int(sys.argv[2])))

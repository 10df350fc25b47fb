"""Log-probabilities do not need the memory of the whole logits."""

from __future__ import annotations

import subprocess
import sys

PEAK = """
import sys, torch
from rlhf.models.logprobs import target_logp
torch.set_num_threads(1)
vocabulary = int(sys.argv[1])
hidden = torch.randn(1024, 4, requires_grad=True)
weight = torch.randn(vocabulary, 4, requires_grad=True)
def memory(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
before = memory("VmRSS")
target_logp(hidden, weight, None, torch.randint(0, vocabulary, (1024,)))[0].sum().backward()
print(memory("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """Of 1,024 positions, the full logits would take 32 MiB with a vocabulary of 8 thousand tokens
    and 512 MiB with 128 thousand, several times over."""
    small, large = (
        float(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(v)], capture_output=True, text=True, check=True
            ).stdout
        )
        for v in (2**13, 2**17)
    )
    assert large < small + 150

"""Log-probabilities do not need the memory of the whole logits."""

from __future__ import annotations

import subprocess
import sys

PEAK = """
import sys, torch
from rlhf.models.logprobs import target_logp
torch.set_num_threads(1)
vocabulary = int(sys.argv[1])
hidden, weight = torch.randn(1024, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
before = memory("VmRSS")
target_logp(hidden, weight, None, torch.randint(0, vocabulary, (1024,)))[0].sum().backward()
print(memory("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """1,024 tokens: the whole logits would be 32 MiB with 8 thousand tokens, and 512 MiB with 128 thousand, several times."""
    small, large = (
        float(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(v)], capture_output=True, text=True, check=True
            ).stdout
        )
        for v in (2**13, 2**17)
    )
    assert large < small + 150

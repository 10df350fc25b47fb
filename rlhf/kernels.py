"""Our own kernels for CPUs (kernels.cpp): compiled once per machine, and only where there is a compiler; without, torch's are used."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import torch
from torch import Tensor

from rlhf.track import first_line, log

SOURCE = Path(__file__).with_name("kernels.cpp")


@functools.cache
def load() -> bool:
    """Make torch.ops.rlhf known to torch, from a file in the user's cache folder, or else by compiling it. Returns: whether it is."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        log.info("no C++ compiler (c++, or what CXX names): sampling uses torch's kernels, which are slower on CPU")
        return False
    try:
        torch.ops.load_library(compiled(compiler))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or ""
        wrong = next((line for line in said.splitlines() if "error" in line), first_line(error))
        log.info(f"the kernels for CPU could not be built ({wrong}): sampling uses torch's, which are slower")
        return False
    return True


def compiled(compiler: str) -> Path:
    """The library for this source, torch and processor; other processes of this user that want it too wait for the first."""
    from filelock import FileLock

    simd = ["-mavx2", "-mfma"] if torch.backends.cpu.get_cpu_capability().startswith("AVX") else []
    root = Path(torch.__file__).parent
    flags = ["-O3", *simd, "-std=c++20", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch's stable ABI, as of 2.10
    flags += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include", f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    what = "\n".join([SOURCE.read_text(), torch.__version__, compiler, *flags])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"kernels-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    with FileLock(library.with_suffix(".lock")):
        if not library.exists():
            started, unfinished = time.monotonic(), library.with_suffix(f".{os.getpid()}.tmp")
            command = [compiler, str(SOURCE), "-o", str(unfinished), *flags]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            unfinished.rename(library)
            log.info(f"kernels for sampling on this machine's CPU compiled in {time.monotonic() - started:.0f} s, kept in {folder}")
    return library


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (..., k) -> (..., n), in float32 on CPU, without gradient; weight (n, k) and bias contiguous. Needs load()."""
    found: Tensor = torch.ops.rlhf.linear(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    return found.view(*x.shape[:-1], weight.shape[0])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token, (B, heads, 1, d) -> (B, 1, heads, d), to T keys and values (B, groups, T, d), in float32 on CPU, without
    gradient. mask (B, 1, 1, T) is added to the scores times scale; it leaves at least one token of each row. Needs load()."""
    found: Tensor = torch.ops.rlhf.attend(q, k, v, mask, scale)
    return found

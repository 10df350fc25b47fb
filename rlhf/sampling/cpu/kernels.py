"""Our own kernels for CPUs (kernels.cpp): compiled once per machine, and only where there is a compiler; without, torch's are used."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("rlhf")
SOURCE = Path(__file__).with_name("kernels.cpp")
STABLE_ABI = (2, 10)  # the first torch that has all of the interface that SOURCE uses
loaded: bool | None = None  # whether our kernels are in use; None until somebody wants them


def load() -> bool:
    """Make torch.ops.rlhf known to torch, from a file in the user's cache folder, or else by compiling it; at the first call. Returns:
    whether it is known."""
    global loaded
    if loaded is None:
        loaded = False
        try:
            find_or_compile()
            loaded = True
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None)
            lines = said.splitlines() if isinstance(said, str) else []
            wrong = next(
                (line for line in lines if "error" in line),
                str(error.__cause__ or error).split("\n")[0],
            )
            log.info(f"sampling uses torch's kernels for CPU, which are slower than ours: {wrong}")
    return loaded


def find_or_compile() -> None:
    """Load the library for this source, torch and machine. Other processes of this user that want it too wait for the first."""
    from filelock import FileLock

    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < STABLE_ABI:
        raise RuntimeError(
            f"ours need torch {STABLE_ABI[0]}.{STABLE_ABI[1]}, this is {torch.__version__}"
        )
    simd = ["-mavx2", "-mfma"] if torch.backends.cpu.get_cpu_capability().startswith("AVX") else []
    root, target = Path(torch.__file__).parent, f"0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}{0:012x}"
    flags = ["-O3", *simd, "-std=c++20", "-fPIC", "-shared", f"-DTORCH_TARGET_VERSION={target}"]
    flags += [
        f"-I{root}/include",
        f"-I{root}/include/torch/csrc/api/include",
        f"-L{root}/lib",
        "-ltorch_cpu",
        "-lc10",
    ]
    machine = [platform.machine(), *platform.libc_ver(), torch.__version__]
    name = hashlib.sha256("\n".join([SOURCE.read_text(), *machine, *flags]).encode()).hexdigest()[
        :16
    ]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(
            f"{folder} is not yours alone to write (chmod go-w): code is loaded from there"
        )
    library = folder / f"kernels-{name}.so"
    with FileLock(library.with_suffix(".lock")):
        if library.exists():
            with contextlib.suppress(OSError):  # not whole: made anew
                torch.ops.load_library(library)
                return
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        if not shutil.which(compiler[0]):
            raise OSError(f"there is no C++ compiler ({compiler[0]}; CXX names another)")
        log.info(f"compiling kernels for sampling on CPU, once on this machine: {library}")
        unfinished = library.with_suffix(".tmp")
        subprocess.run(
            [*compiler, str(SOURCE), "-o", str(unfinished), *flags],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        )
        unfinished.rename(library)
        torch.ops.load_library(library)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (..., k) -> (..., n), in float32 on CPU, without gradient; weight (n, k) and bias contiguous. Needs load()."""
    found: Tensor = torch.ops.rlhf.linear(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias)
    return found.view(*x.shape[:-1], weight.shape[0])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token, (B, heads, 1, d) -> (B, 1, heads, d), to T keys and values (B, groups, T, d), in float32 on CPU, without
    gradient. mask (B, 1, 1, T) is added to the scores times scale; it leaves at least one token of each row. Needs load()."""
    found: Tensor = torch.ops.rlhf.attend(q, k, v, mask, scale)
    return found

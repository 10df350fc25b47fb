"""Our kernels for CPUs (kernels.cpp), compiled once per machine.

Where there is no compiler, or the kernels do not compile, sampling uses torch's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from rlhf.base.checksums import hash_file
from rlhf.base.files import private_folder

log = logging.getLogger("rlhf")
SOURCE = Path(__file__).with_name("kernels.cpp")
STABLE_ABI = (2, 10)  # the first version of torch with all of the interface that SOURCE uses
loaded: bool | None = None  # whether our kernels are in use; None before the first load()


def load() -> bool:
    """Register the kernels as torch.ops.rlhf, at the first call; compile them where needed.

    Returns: whether they are registered. If not, the log says why.
    """
    global loaded
    if loaded is None:
        loaded = False
        try:
            load_or_compile()
            loaded = True
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            log.info(
                "sampling uses torch's kernels for CPU, which are slower than ours: "
                f"{reason_in_one_line(error)}"
            )
    return loaded


def reason_in_one_line(error: Exception) -> str:
    """The first error line of the compiler's output, or else the first line of the exception."""
    output = getattr(error, "stderr", None)
    lines = output.splitlines() if isinstance(output, str) else []
    first_line = str(error.__cause__ or error).split("\n")[0]
    return next((line for line in lines if "error" in line), first_line)


def load_or_compile() -> None:
    """Load the library for this source, torch and machine from the user's cache folder.

    The first of several processes that need the library compiles it while the others wait.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError: it cannot be compiled or loaded.
    """
    from filelock import FileLock

    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < STABLE_ABI:
        needed = ".".join(map(str, STABLE_ABI))
        raise RuntimeError(f"ours need torch {needed}, this is {torch.__version__}")
    flags = compiler_flags()
    machine = [platform.machine(), *platform.libc_ver(), torch.__version__]
    content = "\n".join([SOURCE.read_text(encoding="utf-8"), *machine, *flags])
    name = hashlib.sha256(content.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # code is loaded from there: nobody else may write to it
    library = private_folder(cache / "rlhf") / f"kernels-{name}.so"
    with FileLock(library.with_suffix(".lock")):
        if not is_as_compiled(library):
            compile_library(library, flags)
        torch.ops.load_library(library)


def is_as_compiled(library: Path) -> bool:
    """Whether a library is there as the compiler left it: a damaged one would end the process."""
    sums = library.with_suffix(".sha256")
    return (
        library.exists()
        and sums.exists()
        and sums.read_text(encoding="utf-8") == hash_file(library)
    )


def compiler_flags() -> list[str]:
    """The flags of the C++ compiler for this machine and torch."""
    simd = ["-mavx2", "-mfma"] if torch.backends.cpu.get_cpu_capability().startswith("AVX") else []
    root, target = Path(torch.__file__).parent, f"0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}{0:012x}"
    includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    libraries = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    language = ["-std=c++20", "-fPIC", "-shared", f"-DTORCH_TARGET_VERSION={target}"]
    return ["-O3", *simd, *language, *includes, *libraries]


def compile_library(library: Path, flags: list[str]) -> None:
    """Compile SOURCE; `library` appears only when it is complete."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if not shutil.which(compiler[0]):
        raise OSError(f"there is no C++ compiler ({compiler[0]}; CXX names another)")
    log.info(f"compiling kernels for sampling on CPU, once on this machine: {library}")
    unfinished = library.with_suffix(".tmp")
    command = [*compiler, str(SOURCE), "-o", str(unfinished), *flags]
    subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=300
    )
    library.with_suffix(".sha256").write_text(hash_file(unfinished), encoding="utf-8")
    unfinished.rename(library)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, (..., k) -> (..., n), in float32 on CPU, without gradient. Needs load().

    Args:
        weight, bias: (n, k) and (n,), contiguous.
    """
    y: Tensor = torch.ops.rlhf.linear(x.contiguous(), weight, bias)
    return y


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token to T tokens in float32 on CPU, without gradient. Needs load().

    Args:
        q: (B, heads, 1, d).
        k, v: (B, kv_heads, T, d).
        mask: (B, 1, 1, T), added to the scores after `scale`; at least one token of each row must
            stay visible.

    Returns: (B, 1, heads, d).
    """
    y: Tensor = torch.ops.rlhf.attend(q, k, v, mask, scale)
    return y

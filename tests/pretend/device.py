"""A pretended GPU: torch's device for other hardware, whose tensors have their data on the CPU.

Results are real, and what the host and a GPU do to each other is seen:

- an operation on tensors of both raises, but for scalars and index tensors, as on CUDA
- `.numpy()` raises
- `COUNTS` has the kernels that are launched, and the synchronisations: where the host waits for the
  device. Both by the line of rlhf/ that causes them.

A copy to the device is a synchronisation unless it is non_blocking and from pinned memory. Indexing
with a mask is one, because the host needs the number of rows. An operation is one kernel, attention
too; views and empty tensors are none.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
PACKAGE = f"{Path(__file__).resolve().parents[2] / 'rlhf'}/"
# the result or its size is read by the host
WAITING = {
    "_local_scalar_dense": "item",
    "equal": "equal",
    "masked_select": "masked_select",
    "nonzero": "nonzero",
    "unique_dim": "unique",
    "_unique2": "unique",
    "repeat_interleave": "repeat_interleave",
}
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
COPYING = ("copy_", "_to_copy")
NO_KERNEL = ("_local_scalar_dense", "_unsafe_view", "_reshape_alias", "lift_fresh")


@dataclass
class Counts:
    """What has happened on the device, by the line of rlhf/ that caused it."""

    kernels: Counter[str] = field(default_factory=Counter)
    # by "LINE: what it was"
    synchronisations: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Counts:
        return Counts(self.kernels.copy(), self.synchronisations.copy())

    def since(self, before: Counts) -> Counts:
        """What has happened after `before`, a copy of an earlier moment."""
        return Counts(
            self.kernels - before.kernels, self.synchronisations - before.synchronisations
        )

    def reset(self, before: Counts) -> None:
        """Forget what has happened after `before`."""
        self.kernels, self.synchronisations = before.kernels, before.synchronisations


COUNTS = Counts()
counts_kernels = True  # False inside attention


def current_line() -> str:
    """The innermost line of rlhf/ that is running, as models/packing.py:64."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"  # as in a backward pass


def wait(what: str) -> None:
    COUNTS.synchronisations[f"{current_line()}: {what}"] += 1


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended GPU. Its data are in `data_on_host`."""

    data_on_host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: Tensor) -> DeviceTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.data_on_host = data
        return tensor

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        return f"{type(self).__name__}({self.data_on_host!r})"

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a tensor on a GPU has no numpy array: copy it to the host with .cpu()")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()


def dispatch(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation of torch, on the tensors' data."""
    name = function.overloadpacket.__name__
    tensors: list[Tensor] = []
    host_args = on_host(args, tensors)
    host_kwargs = {key: on_host(value, tensors) for key, value in kwargs.items()}
    inputs = any(isinstance(x, DeviceTensor) for x in tensors)
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    to_device = device.type == NAME if device is not None else inputs
    if name == "is_pinned":
        return not inputs and getattr(args[0], "is_in_pinned_memory", False)
    if name == "_pin_memory" and not inputs:
        pinned = args[0].clone()
        pinned.is_in_pinned_memory = True
        return pinned
    if not inputs and not to_device:
        return function(*args, **kwargs)
    if name == "copy_":
        to_device = isinstance(args[0], DeviceTensor)
    if inputs:
        check_devices(name, args, tensors)
    note_waiting(name, args, kwargs, to_device)
    if counts_kernels and not function.is_view and name not in NO_KERNEL and "empty" not in name:
        COUNTS.kernels[current_line()] += 1
    if device is not None:
        host_kwargs["device"] = "cpu"
    result = function(*host_args, **host_kwargs)
    if function._schema.is_mutable:  # the very tensors that were changed
        changed = {id(on_host(x, [])): x for x in tensors}
        return change_tensors(result, lambda x: changed.get(id(x), x))
    return change_tensors(result, DeviceTensor) if to_device else result


def on_host(x: Any, tensors: list[Tensor]) -> Any:
    """An argument with the data of tensors in their place. Args: tensors: gets those it has."""

    def data(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor.data_on_host if isinstance(tensor, DeviceTensor) else tensor

    return change_tensors(x, data)


def change_tensors(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument or a result of an operation with each tensor changed."""
    if isinstance(x, Tensor):
        return change(x)
    if type(x) in (list, tuple):
        return type(x)(change_tensors(part, change) for part in x)
    return x


def check_devices(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    """Raises: RuntimeError where an operation mixes tensors of host and device."""
    if name in COPYING:
        return
    if name in INDEXING:  # the host may have the indices, but not the rest
        tensors = [args[0], *(x for x in args[2:] if isinstance(x, Tensor))]
    on_host = [x for x in tensors if not isinstance(x, DeviceTensor) and x.dim() > 0]
    if on_host:
        shapes = ", ".join(f"{x.device.type}{tuple(x.shape)}" for x in tensors)
        raise RuntimeError(f"{name}: all tensors must be on the same device: {shapes}")


def note_waiting(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], to_device: bool) -> None:
    """Count what makes the host wait."""
    if name in WAITING:
        wait(WAITING[name])
    elif name in COPYING:
        source = args[1] if name == "copy_" else args[0]
        non_blocking = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        if isinstance(source, DeviceTensor) and not to_device:
            wait("download")
        elif not isinstance(source, DeviceTensor) and to_device and source.numel():
            pinned = getattr(source, "is_in_pinned_memory", False)
            if not (non_blocking and pinned) and (name == "_to_copy" or source.dim()):
                wait("upload")
    elif name in INDEXING:
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                wait("mask as an index")
            elif isinstance(index, Tensor) and not isinstance(index, DeviceTensor):
                wait("upload of an index")


class Dispatch(TorchDispatchMode):
    """Passes on operations without a tensor of the device, which may make one."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(function, args, kwargs or {})


class Backend(backend_registration._DummyBackendModule):
    """What torch asks a device's module for: `torch.pretended`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, *args: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, *args: Any) -> None:
        torch.set_rng_state(state)


attention, inference_mode = F.scaled_dot_product_attention, torch.inference_mode


def counted_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention, which is one kernel on a GPU; here torch has only its formula for it."""
    global counts_kernels
    if isinstance(args[0], DeviceTensor):
        COUNTS.kernels[current_line()] += 1
    counts_kernels = False
    try:
        return attention(*args, **kwargs)
    finally:
        counts_kernels = True


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Inside the context the device can be used.

    Torch cannot forget it afterwards: use it in a process of its own.
    """
    if not hasattr(torch, NAME):
        backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    only_lift = torch._C._only_lift_cpu_tensors()
    # torch.tensor(..., device=...) makes a CPU tensor and uploads it, where we see it
    torch._C._set_only_lift_cpu_tensors(True)
    F.scaled_dot_product_attention = counted_attention
    torch.inference_mode = torch.no_grad  # torch refuses our tensors there
    try:
        with Dispatch():
            yield torch.device(NAME, 0)
    finally:
        F.scaled_dot_product_attention, torch.inference_mode = attention, inference_mode
        torch._C._set_only_lift_cpu_tensors(only_lift)


def move_module(module: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Move a module to the device, in place; tied weights stay tied.

    Returns: the new parameter of each old one.
    """
    moved: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None and p not in moved:
                data = DeviceTensor(p.detach().clone())
                moved[p] = nn.Parameter(data, requires_grad=p.requires_grad)
            if p is not None:
                owner._parameters[name] = moved[p]
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = DeviceTensor(buffer.detach().clone())
    return moved

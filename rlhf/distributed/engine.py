"""DeepSpeed engines: building, gathering ZeRO-3 parameters, joining the process group."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rlhf.config.schema import Config
from rlhf.distributed import collectives
from rlhf.distributed.deepspeed_config import build_ds_config, optim_of
from rlhf.models import lora
from rlhf.training.optimizer_step import track_nonfinite_grads

Module = TypeVar("Module", bound=nn.Module, covariant=True)


class Engine(Protocol[Module]):
    """What this package uses of DeepSpeed's engine, which gives no types of its own."""

    optimizer: torch.optim.Optimizer
    gradient_notes: dict[str, Tensor]  # ours: see training.optimizer_step
    enable_backward_allreduce: bool

    @property
    def module(self) -> Module: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, *args: object, **kwargs: object) -> Any: ...  # the module's forward
    def train(self, mode: bool = True) -> Engine[Module]: ...
    def eval(self) -> None: ...  # DeepSpeed's returns nothing
    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> Tensor: ...
    def step(self) -> None: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def get_global_grad_norm(self) -> float: ...
    def fp16_enabled(self) -> bool: ...
    def torch_autocast_enabled(self) -> bool: ...
    def torch_autocast_dtype(self) -> torch.dtype: ...
    def save_checkpoint(self, save_dir: str, tag: str | None = None) -> bool: ...
    def load_checkpoint(
        self, load_dir: str, tag: str | None = None
    ) -> tuple[str | None, object]: ...


def build_engine(load: Callable[[], Any], cfg: Config, role: str, run_dir: Path) -> Any:
    """Load a module and wrap it in the DeepSpeed engine of its role; its configuration is written to run_dir/ds_<role>.json.

    A trained role gets its adapter, and its optimizer (no weight decay on vectors: biases and norms); a frozen one gets neither,
    and no gradients.

    Args: load: makes the module, a models.Policy or Scorer; where ZeRO-3 is to partition it, straight into its partitions.
    """
    import deepspeed

    ds_config = build_ds_config(cfg, role, collectives.world_size())
    if collectives.rank() == 0:
        (run_dir / f"ds_{role}.json").write_text(json.dumps(ds_config, indent=2))
    optim = optim_of(cfg, role)
    node, adapter = ("actor", cfg.actor.lora) if role == "actor" else ("reward", cfg.reward.lora)
    with zero3_init(ds_config):
        module = load()
        if optim and adapter.rank:
            lora.add_adapter(module.hf, adapter, f"{node}.lora")
    if optim is None:
        module.requires_grad_(False).eval()
        with contextlib.redirect_stdout(None):  # in bf16 it prints its memory
            return deepspeed.initialize(model=module, config=ds_config)[0]
    if cfg.deploy.activation_checkpointing:
        module.hf.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in module.parameters() if p.requires_grad]
    is_vector = [
        len(getattr(p, "ds_shape", p.shape)) <= 1 for p in trained
    ]  # a partitioned weight is always flat
    groups = [
        {
            "params": [p for p, vector in zip(trained, is_vector) if not vector],
            "weight_decay": optim.weight_decay,
        },
        {"params": [p for p, vector in zip(trained, is_vector) if vector], "weight_decay": 0.0},
    ]
    with contextlib.redirect_stdout(None):
        engine = deepspeed.initialize(
            model=module, config=ds_config, model_parameters=[g for g in groups if g["params"]]
        )[0]
    engine.gradient_notes = track_nonfinite_grads(module)
    if collectives.world_size() == 1 and cfg.deploy.zero_stage == 0:
        engine.enable_backward_allreduce = (
            False  # with itself: a copy of all gradients, there and back
        )
    return engine


def release_engine(engine: Any) -> None:
    """Let go of a frozen engine that nobody else holds: at ZeRO 3 DeepSpeed keeps its module in a list of its own."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK[:] = [
        module for module in parameter_offload.FWD_MODULE_STACK if module is not engine.module
    ]


@contextlib.contextmanager
def gather_parameters(parameters: Iterable[Tensor], modify: bool = False) -> Iterator[bool]:
    """Within this context the parameters are whole where ZeRO-3 partitions them; yields whether any is.

    Args: modify: what the first process then changes in them is kept.
    """
    import deepspeed

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=0 if modify else None, enabled=bool(partitioned)
    ):
        yield bool(partitioned)


def computes_in_fp32(engine: Any) -> bool:
    """Whether an engine computes in float32, so that two ways to the same number differ by its rounding only."""
    return (
        next(engine.module.parameters()).dtype == torch.float32
        and not engine.torch_autocast_enabled()
    )


def autocast(engine: Any) -> Any:
    """What an engine's own forward does about precision, for a forward that goes around it."""
    dtype = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
    return torch.autocast(engine.device.type, dtype=dtype, enabled=dtype is not None)


# transformers asks, while it loads, whether there is such an object alive; it holds no reference itself
_partitioned_loading: list[Any] = []


@contextlib.contextmanager
def zero3_init(ds_config: dict[str, Any]) -> Iterator[None]:
    """Within this context transformers loads each weight straight into its partition, where the configuration has ZeRO 3, so that no
    process ever holds a whole model."""
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if ds_config["zero_optimization"]["stage"] == 3:
        _partitioned_loading.append(HfDeepSpeedConfig(ds_config))
    try:
        yield
    finally:
        _partitioned_loading.clear()
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def without_zero3_init() -> Iterator[None]:
    """Within this context models are made whole on every process; their engines partition them."""
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        for config in _partitioned_loading:
            set_hf_deepspeed_config(config)


def init_distributed() -> torch.device:
    """Join the other processes; returns the device of this one. Skips DeepSpeed's compiled communication op, which saves
    a minute of compiling and is not needed: gloo and nccl do the same."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False
    )
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device

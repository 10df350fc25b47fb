"""DeepSpeed engines: building, gathering ZeRO-3 parameters, joining the process group."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from rlhf.base import watchdog
from rlhf.base.errors import UserError
from rlhf.base.log import announced
from rlhf.config.deployment import built_stage
from rlhf.config.schema import Config
from rlhf.config.stage_nodes import Optim
from rlhf.distributed import collectives
from rlhf.distributed.deepspeed_config import build_ds_config, optim_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.integrations import HfDeepSpeedConfig

# The others wait that long for a rank (at a barrier: collectives.BARRIER_TIMEOUT). DeepSpeed's 10
# minutes are too short where ranks prepare data; deploy.watchdog_minutes is longer.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
Module = TypeVar("Module", bound=nn.Module, covariant=True)


class HfModule(nn.Module):
    """A module around a transformers model; models.wrappers has the two kinds."""

    hf: PreTrainedModel


Wrapper = TypeVar("Wrapper", bound=HfModule)


class Engine(Protocol[Module]):
    """What this package uses of DeepSpeed's engine, which gives no types of its own."""

    optimizer: torch.optim.Optimizer
    gradient_notes: dict[str, list[Tensor]]  # ours: see track_nonfinite_grads
    enable_backward_allreduce: bool
    global_steps: int  # optimizer steps, also those before a resume
    checkpoint_engine: Any  # DeepSpeed's reader and writer of files

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
    def save_checkpoint(
        self,
        save_dir: Path,
        tag: str | None = None,
        *,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool: ...
    def load_checkpoint(
        self, load_dir: Path, tag: str | None = None, load_module_strict: bool = True
    ) -> tuple[str | None, object]: ...


def build_engine(
    load: Callable[[], Wrapper], cfg: Config, role: str, run_dir: Path
) -> Engine[Wrapper]:
    """Load a module and wrap it in the DeepSpeed engine of its role.

    A trained role gets an optimizer. A frozen one gets none, and its weights take no gradients.

    Args:
        load: makes the module; under ZeRO-3 its weights are loaded straight into their partitions.
        role: see deepspeed_config.build_ds_config.
        run_dir: the engine's configuration is written to ds_<role>.json there.
    """
    import deepspeed

    ds_config = build_ds_config(cfg, role, collectives.world_size())
    if collectives.rank() == 0:
        (run_dir / f"ds_{role}.json").write_text(json.dumps(ds_config, indent=2), encoding="utf-8")
    optim = optim_of(cfg, role)
    loading = announced(f"loading the {role.removesuffix('_trained')} model")
    with loading, watchdog.while_files_move(), zero3_init(ds_config):
        module = load()
    module.hf.base_model.register_forward_pre_hook(lambda *_: watchdog.progress())
    if optim is None:
        module.requires_grad_(False).eval()
        with contextlib.redirect_stdout(None):  # in bf16 DeepSpeed prints its memory
            return deepspeed.initialize(model=module, config=ds_config)[0]
    if cfg.deploy.activation_checkpointing:
        module.hf.activation_checkpointing_enable({"use_reentrant": False})
    groups = parameter_groups(module, optim)
    with contextlib.redirect_stdout(None):
        engine: Engine[Wrapper] = deepspeed.initialize(
            model=module, config=ds_config, model_parameters=groups
        )[0]
    engine.checkpoint_engine.load = read_data_only
    engine.gradient_notes = track_nonfinite_grads(module)
    if collectives.world_size() == 1 and built_stage(cfg.deploy) == 0:
        # with one rank it would only copy all gradients there and back
        engine.enable_backward_allreduce = False
    return engine


def read_data_only(path: str, map_location: Any = None) -> Any:
    """Read a file of a checkpoint; DeepSpeed's own reader would run the code in a foreign pickle.

    Raises: UserError where the file holds more than data.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def zero_stage(kind: Any, name: str) -> ZeroStageEnum:
        """Some versions of python 3.11 (that of Debian 12) save an Enum as getattr(kind, name)."""
        if kind is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"getattr of {kind} {name}")
        return ZeroStageEnum[name]

    # what DeepSpeed itself writes beside tensors, numbers and strings
    known: list[Any] = [
        LossScaler,
        DynamicLossScaler,
        ZeroStageEnum,
        fragment_address,
        (zero_stage, "builtins.getattr"),
    ]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: it is no file of tensors and numbers, and no code in it is run: delete this "
            "checkpoint to resume from the one before"
        ) from error


def parameter_groups(module: nn.Module, optim: Optim) -> list[dict[str, Any]]:
    """The trained parameters for AdamW. Vectors (biases and norms) have no weight decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    # a partitioned weight is always flat, so its own shape says nothing
    is_vector = [len(getattr(p, "ds_shape", p.shape)) <= 1 for p in trained]
    matrices = [p for p, vector in zip(trained, is_vector) if not vector]
    vectors = [p for p, vector in zip(trained, is_vector) if vector]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def track_nonfinite_grads(module: nn.Module) -> dict[str, list[Tensor]]:
    """Note in the backward pass which gradients are not finite, without waiting for a GPU.

    It costs a GPU one kernel per weight and micro-batch. DeepSpeed frees gradients before it knows
    their norm, so there is nothing to look at afterwards.

    Returns: for each trained weight, filled by hooks, the sum of each of its gradients.
    """
    notes: dict[str, list[Tensor]] = {}

    def note(gradient: Tensor, name: str) -> None:
        notes.setdefault(name, []).append(gradient.detach().sum(dtype=torch.float32))

    for name, p in module.named_parameters():
        if p.requires_grad:
            p.register_hook(functools.partial(note, name=name))
    return notes


def release_engine(engine: Engine[nn.Module]) -> None:
    """Release a frozen engine; under ZeRO-3 DeepSpeed keeps a global reference to its module."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK[:] = [
        module for module in parameter_offload.FWD_MODULE_STACK if module is not engine.module
    ]


@contextlib.contextmanager
def gather_parameters(parameters: Iterable[Tensor], modify: bool = False) -> Iterator[bool]:
    """Gather ZeRO-3 parameters inside the context; yields whether any of them is partitioned.

    Args: modify: keep what rank 0 changes in them.
    """
    import deepspeed

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(
        partitioned, modifier_rank=0 if modify else None, enabled=bool(partitioned)
    ):
        yield bool(partitioned)


@contextlib.contextmanager
def gathered_model(module: nn.Module) -> Iterator[bool]:
    """Gather all ZeRO-3 parameters of a module for many forward passes; yields whether it has any.

    DeepSpeed's hooks are off inside the context: they would release each weight after its layer,
    and every pass would fetch it again. Other hooks stay.
    """
    with gather_parameters(module.parameters()) as is_partitioned:
        hooked = [*module.modules()] if is_partitioned else []
        hooks = [(one, one._forward_pre_hooks, one._forward_hooks) for one in hooked]
        for one, before, after in hooks:
            one._forward_pre_hooks = without_deepspeed(before)
            one._forward_hooks = without_deepspeed(after)
        try:
            yield is_partitioned
        finally:
            for one, before, after in hooks:
                one._forward_pre_hooks, one._forward_hooks = before, after


def without_deepspeed(
    hooks: Mapping[int, Callable[..., Any]],
) -> OrderedDict[int, Callable[..., Any]]:
    """Those of a module's hooks that are not DeepSpeed's."""
    return OrderedDict(
        (number, hook)
        for number, hook in hooks.items()
        if not str(getattr(hook, "__module__", "")).startswith("deepspeed")
    )


def computes_in_fp32(engine: Engine[nn.Module]) -> bool:
    """Whether an engine computes in float32: two ways to one number differ by its rounding only."""
    is_fp32 = next(engine.module.parameters()).dtype == torch.float32
    return is_fp32 and not engine.torch_autocast_enabled()


def autocast(engine: Engine[nn.Module]) -> torch.autocast:
    """The autocast of an engine's own forward pass, for one that calls the module directly."""
    dtype = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
    return torch.autocast(engine.device.type, dtype=dtype, enabled=dtype is not None)


# While it loads a model, transformers looks for a live object of this kind; it holds no reference
_zero3_configs: list[HfDeepSpeedConfig] = []


@contextlib.contextmanager
def zero3_init(ds_config: dict[str, Any]) -> Iterator[None]:
    """With ZeRO-3, transformers loads each weight into its partition inside this context.

    No rank ever holds a whole model then. At other stages the context does nothing.
    """
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    if ds_config["zero_optimization"]["stage"] == 3:
        _zero3_configs.append(HfDeepSpeedConfig(ds_config))
    try:
        yield
    finally:
        _zero3_configs.clear()
        unset_hf_deepspeed_config()


@contextlib.contextmanager
def without_zero3_init() -> Iterator[None]:
    """Make models unpartitioned on every rank inside this context; their engines partition them."""
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        for config in _zero3_configs:
            set_hf_deepspeed_config(config)


def init_distributed() -> torch.device:
    """Join the process group; returns the device of this rank.

    On CPU DeepSpeed's compiled communication op is skipped: it takes a minute to compile, and gloo
    does the same.
    """
    import deepspeed

    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if not on_gpu:  # on a GPU this would look for a compiler, with a warning per op
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if on_gpu else "gloo",
        auto_mpi_discovery=False,
        timeout=COLLECTIVE_TIMEOUT,
        verbose=False,
    )
    if torch.distributed.get_world_size() > 1:
        # DeepSpeed's collectives are in a group of its own, which has not got the time limit
        group = deepspeed.utils.groups._get_data_parallel_group()
        torch.distributed.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, group)
    collectives.make_barrier_group()
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device

"""DeepSpeed engines, and the one optimizer step that all stages use."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf import comm, lora
from rlhf.config import Config
from rlhf.ds import build_ds_config, optim_of

Batch = TypeVar("Batch")


def build_engine(load: Callable[[], Any], cfg: Config, role: str, run_dir: Path) -> Any:
    """Load a module and wrap it in the DeepSpeed engine of its role; its configuration is written to run_dir/ds_<role>.json.

    A trained role gets its adapter, and its optimizer (no weight decay on vectors: biases and norms); a frozen one gets neither,
    and no gradients.

    Args: load: makes the module, a models.Policy or Scorer; where ZeRO-3 is to partition it, straight into its partitions.
    """
    import deepspeed

    ds_config = build_ds_config(cfg, role, comm.world_size())
    if comm.rank() == 0:
        (run_dir / f"ds_{role}.json").write_text(json.dumps(ds_config, indent=2))
    optim = optim_of(cfg, role)
    node, adapter = ("actor", cfg.actor.lora) if role == "actor" else ("reward", cfg.reward.lora)
    with loading_partitioned(ds_config):
        module = load()
        if optim and adapter.rank:
            lora.add(module.hf, adapter, f"{node}.lora")
    if optim is None:
        module.requires_grad_(False).eval()
        with contextlib.redirect_stdout(None):  # in bf16 it prints its memory
            return deepspeed.initialize(model=module, config=ds_config)[0]
    if cfg.deploy.activation_checkpointing:
        module.hf.activation_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in module.parameters() if p.requires_grad]
    is_vector = [len(getattr(p, "ds_shape", p.shape)) <= 1 for p in trained]  # a partitioned weight is always flat
    groups = [
        {"params": [p for p, vector in zip(trained, is_vector) if not vector], "weight_decay": optim.weight_decay},
        {"params": [p for p, vector in zip(trained, is_vector) if vector], "weight_decay": 0.0},
    ]
    with contextlib.redirect_stdout(None):
        engine = deepspeed.initialize(model=module, config=ds_config, model_parameters=[g for g in groups if g["params"]])[0]
    engine.gradient_notes = note_gradients(module)
    if comm.world_size() == 1 and cfg.deploy.zero_stage == 0:
        engine.enable_backward_allreduce = False  # with itself: a copy of all gradients, there and back
    return engine


def release(engine: Any) -> None:
    """Let go of a frozen engine that nobody else holds: at ZeRO 3 DeepSpeed keeps its module in a list of its own."""
    from deepspeed.runtime.zero import parameter_offload

    parameter_offload.FWD_MODULE_STACK[:] = [module for module in parameter_offload.FWD_MODULE_STACK if module is not engine.module]


def optimizer_step(engine: Any, micro_batches: Sequence[Batch], loss_of: Callable[[Batch], Tensor], lr: float) -> float:
    """One optimizer step over all micro-batches of this process; every process must have the same number of them.

    Args: loss_of: the micro-batch's summed loss, already divided by the count over the whole step and all processes.
    Returns: the gradient norm before clipping.
    Raises: RuntimeError when the loss or the gradient is not finite, with the first tensor that is not.
    """
    engine.gradient_notes.clear()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    for i, batch in enumerate(micro_batches):
        engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
        loss = loss_of(batch)
        if not torch.isfinite(loss):
            where = first_bad_output(engine, functools.partial(loss_of, batch))
            raise RuntimeError(f"the loss is {loss.item()}{where}: lower the learning rate, or look at the last samples in samples.jsonl")
        # DeepSpeed averages gradients over processes; ours must be summed
        engine.backward(loss * comm.world_size(), scale_wrt_gas=False)
    # DeepSpeed's optimizers measure the norm themselves; with plain AdamW (ZeRO 0, fp32) the gradients lie open
    gradients = [] if hasattr(engine.optimizer, "_global_grad_norm") else [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
    engine.step()
    value = float(engine.get_global_grad_norm() if norm is None else norm)
    if not math.isfinite(value) and not engine.fp16_enabled():  # whose loss scaling leaves such steps out by itself
        bad = [name for name, note in engine.gradient_notes.items() if not torch.isfinite(note)]
        first = next((name for name, _ in engine.module.named_parameters() if name in bad), "")
        where = f"; the first gradient that is not finite is that of {first}" if first else ""
        raise RuntimeError(f"the norm of the gradient is {value}, though the loss is finite{where}: lower the learning rate")
    return value


def note_gradients(module: Any) -> dict[str, Tensor]:
    """A note for each trained weight, made in the backward pass: 0, or NaN where its gradient was not finite. Nobody waits for it."""
    notes: dict[str, Tensor] = {}

    def note(gradient: Tensor, name: str) -> None:
        notes[name] = notes.get(name, 0) + gradient.detach().sum(dtype=torch.float32) * 0

    for name, p in module.named_parameters():
        if p.requires_grad:
            p.register_hook(functools.partial(note, name=name))
    return notes


def first_bad_output(engine: Any, again: Callable[[], Any]) -> str:
    """Where a forward that is computed again first gives something that is not finite, as a part of a sentence."""
    if comm.world_size() > 1 and any(hasattr(p, "ds_id") for p in engine.module.parameters()):
        return ""  # a forward of one process alone would wait for the others' weights
    found: list[str] = []

    def look(module: Any, inputs: Any, output: Any, name: str) -> None:
        outputs = [x for x in (output if isinstance(output, tuple) else (output,)) if isinstance(x, Tensor) and x.is_floating_point()]
        if not found and not all(bool(torch.isfinite(x).all()) for x in outputs):
            found.append(name)

    weights = (name for name, p in engine.module.named_parameters() if not torch.isfinite(p).all())
    if weight := next(weights, ""):
        return f"; the first weight that is not finite is {weight}"
    leaves = [(name, module) for name, module in engine.module.named_modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(functools.partial(look, name=name)) for name, module in leaves]
    try:
        again()
    finally:
        for hook in hooks:
            hook.remove()
    return f"; the first output that is not finite is that of {found[0]}" if found else ""


@contextlib.contextmanager
def whole(parameters: Iterable[Tensor], modify: bool = False) -> Iterator[bool]:
    """Within this context the parameters are whole where ZeRO-3 partitions them; yields whether any is.

    Args: modify: what the first process then changes in them is kept.
    """
    import deepspeed

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if modify else None, enabled=bool(partitioned)):
        yield bool(partitioned)


def exact(engine: Any) -> bool:
    """Whether an engine computes in float32, so that two ways to the same number differ by its rounding only."""
    return next(engine.module.parameters()).dtype == torch.float32 and not engine.torch_autocast_enabled()


def autocast(engine: Any) -> Any:
    """What an engine's own forward does about precision, for a forward that goes around it."""
    dtype = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
    return torch.autocast(engine.device.type, dtype=dtype, enabled=dtype is not None)


# transformers asks, while it loads, whether there is such an object alive; it holds no reference itself
_partitioned_loading: list[Any] = []


@contextlib.contextmanager
def loading_partitioned(ds_config: dict[str, Any]) -> Iterator[None]:
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
def loading_whole() -> Iterator[None]:
    """Within this context models are made whole on every process; their engines partition them."""
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

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
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device

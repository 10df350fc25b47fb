"""The plan as text, and the cheapest changes that would make it fit."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.base.log import plural
from rlhf.config.choices import Device, Precision
from rlhf.config.deployment import BYTES, built_stage, world_size
from rlhf.config.keys import lookup
from rlhf.config.schema import Config
from rlhf.config.stage_graph import is_rl, node_name, trains_critic
from rlhf.config.validation import check_config
from rlhf.planning.formulas import GIB
from rlhf.planning.memory import Plan, make_plan
from rlhf.runs.timing import measure_step

if TYPE_CHECKING:
    from rich.table import Table

TIGHT = "it fits, but keep a tenth of the memory free"
UNKNOWN = "known when the data are read"
CPU_INFO = Path("/proc/cpuinfo")  # Linux on x86
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
Changes = dict[str, Any]  # key -> new value


# ------------------------------------------------------------ changes that make it fit


def cheapest_changes(cfg: Config, stage: str, count: int = 3) -> list[str]:
    """The `count` cheapest sets of changes that make a stage fit, each as overrides in one line.

    Cheap is what costs little speed: few changes before many, and in the order of
    `possible_changes`. No set contains another one.
    """
    changes = possible_changes(cfg, stage)
    accepted: list[tuple[int, ...]] = []
    lines: list[str] = []
    for chosen in sets_in_order(len(changes)):
        together: Changes = {}
        for i in chosen:
            together |= changes[i]
        repeats = len(together) < sum(len(changes[i]) for i in chosen)  # two values for one key
        contains = any(set(smaller) <= set(chosen) for smaller in accepted)
        if repeats or contains or not fits_with(cfg, stage, together):
            continue
        accepted.append(chosen)
        lines.append(as_overrides(enlarge_batches(cfg, stage, together)))
        if len(lines) == count:
            break
    return lines


def sets_in_order(size: int) -> list[tuple[int, ...]]:
    """Sets of one to four indices below `size`: small sets first, then those of early indices."""
    sets: Iterator[tuple[int, ...]] = itertools.chain.from_iterable(
        itertools.combinations(range(size), n) for n in (1, 2, 3, 4)
    )
    return sorted(sets, key=lambda chosen: (len(chosen), sum(chosen)))


def possible_changes(cfg: Config, stage: str) -> list[Changes]:
    """Changes that save memory in this configuration, from cheap to expensive."""
    deploy, several = cfg.deploy, world_size(cfg) > 1
    single_gpu = deploy.device == Device.gpu and deploy.processes_per_node < 8
    # stage 0 cannot offload; one GPU may have stage 2
    offload_optimizer: Changes = {"deploy.zero_stage": 2} if built_stage(deploy) == 0 else {}
    offload_optimizer |= {"deploy.offload.optimizer": True}
    keep_partitions = {"deploy.gather_for_rollout": False}
    offers: list[tuple[Changes, bool]] = [
        ({"deploy.eval_micro_batch": 1}, deploy.eval_micro_batch > 1),
        ({"deploy.micro_batch": 1}, deploy.micro_batch > 1),
        ({"deploy.zero_stage": 2}, several and built_stage(deploy) < 2),
        ({"deploy.precision": Precision.bf16}, BYTES[deploy.precision] == 4),
        ({"deploy.activation_checkpointing": True}, not deploy.activation_checkpointing),
        ({"deploy.zero_stage": 3}, several and deploy.zero_stage < 3),
        (keep_partitions, deploy.zero_stage == 3 and deploy.gather_for_rollout is True),
        (
            {"deploy.offload.frozen": True},
            not deploy.offload.frozen and stage not in ("sft", "rm"),
        ),
        (offload_optimizer, not deploy.offload.optimizer),
        ({"actor.lora.rank": 16}, stage not in ("rm", "eval") and not cfg.actor.lora.rank),
        (
            {"reward.lora.rank": 16},
            (stage == "rm" or trains_critic(cfg, stage)) and not cfg.reward.lora.rank,
        ),
        ({"rl.ema": None}, is_rl(stage) and cfg.rl.ema is not None),
        # these cost no speed, but the GPUs have to be there
        ({"deploy.processes_per_node": 8, "deploy.zero_stage": 2}, single_gpu),
        ({"deploy.processes_per_node": 8, "deploy.zero_stage": 3}, single_gpu),
    ]
    return [change for change, possible in offers if possible]


def fits_with(cfg: Config, stage: str, changes: Changes) -> bool:
    """Whether a stage is valid and fits when `changes` are made to the configuration."""
    other = deepcopy(cfg)
    for key, value in changes.items():
        node, name = key.rsplit(".", 1)
        setattr(lookup(other, node), name, value)
    return not check_config(other) and make_plan(other, stage).fits


def enlarge_batches(cfg: Config, stage: str, changes: Changes) -> Changes:
    """The same changes, with micro-batches as large as they may be."""
    for key in ("deploy.eval_micro_batch", "deploy.micro_batch"):
        while (
            key in changes
            and 2 * changes[key] < lookup(cfg, key)
            and fits_with(cfg, stage, changes | {key: 2 * changes[key]})
        ):
            changes = changes | {key: 2 * changes[key]}
    return changes


def as_overrides(changes: Changes) -> str:
    """The changes as a user types them."""
    texts = {
        key: "null" if value is None else getattr(value, "name", str(value).lower())
        for key, value in changes.items()
    }
    return " ".join(f"{key}={text}" for key, text in texts.items())


# ------------------------------------------------------------ the text


def one_line_summary(plan: Plan) -> str:
    """Memory, steps and notes of a plan in one line."""
    unit = unit_of(plan.stage)
    steps = f"{unit}s {UNKNOWN}"
    if plan.steps.number is not None:
        ending = "" if plan.steps.number == 1 else "s"
        steps = f"{plan.steps.certainty}{plan.steps.number:,} {unit}{ending}"
    if plan.stage == "eval":
        steps = "nothing is trained"
    notes = "".join(f"; {note}" for note in plan.notes)
    warning = "" if plan.fits else "; may not fit, see plan=true"
    warning = f"; {TIGHT}, see plan=true" if plan.is_tight else warning
    memory = f"{plan.peak / GIB:.1f} of {plan.limit / GIB:g} GiB per process ({plan.fullest})"
    return f"{plan.stage}: plan {memory}, {steps}{notes}{warning}"


def unit_of(stage: str) -> str:
    """What the steps of a stage are called."""
    return "rollout" if is_rl(stage) else "step"


def print_plan(plan: Plan, cfg: Config) -> None:
    """The whole plan as tables; where it does not fit, with changes that make it fit."""
    from rich.console import Console

    console = Console(width=130, highlight=False)
    console.print(table_of_roles(plan, cfg))
    console.print(table_of_phases(plan))
    console.print(f"  batch    {plan.steps.batch}")
    if plan.stage != "eval":  # which trains and saves no model
        steps, tokens = plan.steps.number, plan.steps.tokens
        about = "about " if plan.steps.certainty == "about " else ""
        count = UNKNOWN if steps is None else f"{plan.steps.certainty}{steps:,}"
        console.print(f"  {unit_of(plan.stage) + 's':<8} {count}")
        console.print(f"  tokens   {UNKNOWN if tokens is None else f'at most {about}{tokens:,}'}")
        console.print(f"  time     {time_text(plan, cfg)}", soft_wrap=True)
        checkpoints = f"{gib(plan.checkpoints)} of checkpoints during training"
        console.print(f"  on disk  {gib(plan.files)} GiB of models, {checkpoints}")
    for note in [*plan.notes, *faster_precision(cfg)]:
        console.print(f"  note     {note}")
    size = f"{gib(plan.peak)} of {plan.limit / GIB:g} GiB (deploy.gpu_memory_gb)"
    if plan.fits:
        console.print(f"  fits     {size}")
        if plan.is_tight:
            console.print(f"  warning  {TIGHT}: allocators waste some of it")
        return
    console.print(f"  does not fit: {size}. Cheapest changes that make it fit:")
    lines = cheapest_changes(cfg, plan.stage)
    for line in lines or ["none is known: take a smaller model, or more machines"]:
        console.print(f"    {line}")


def faster_precision(cfg: Config) -> list[str]:
    """A note where a run in float32 on the CPU would be faster in bfloat16."""
    deploy = cfg.deploy
    if deploy.device != Device.cpu or deploy.precision != Precision.fp32 or not multiplies_bf16():
        return []
    return [
        "this processor multiplies bf16 itself: deploy.precision=bf16 takes two thirds of the time"
    ]


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for products of bfloat16; False where it is unknown.

    Without them such products are emulated, and slower than those of float32.
    """
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return not BF16_FLAGS.isdisjoint(flags.split())


def time_text(plan: Plan, cfg: Config) -> str:
    """How long a stage takes, by the time of a step in an earlier run of the same size."""
    measured = measure_step(cfg, plan.stage)
    if measured is None:
        key = f"{node_name(plan.stage)}.max_steps"
        return f"unknown before a run of this size; a short one measures it: {key}=5"
    unit = "rollout" if is_rl(plan.stage) else "step"
    each = f"{measured.seconds:.3g} s per {unit} in {measured.run}"
    if plan.steps.number is None:
        return each
    total = datetime.timedelta(seconds=round(measured.seconds * plan.steps.number))
    return f"{plan.steps.certainty}{total} (h:mm:ss), at {each}"


def table_of_roles(plan: Plan, cfg: Config) -> Table:
    """A row per model, in GiB."""
    from rich import box
    from rich.table import Table

    deploy = cfg.deploy
    where = plural(world_size(cfg), "process", "es")
    where += f", ZeRO {built_stage(deploy)}, {deploy.precision.name}"
    each = "GPU" if deploy.device == Device.gpu else "process"
    table = Table(title=f"{plan.stage}: GiB on each {each} of {where}", box=box.SIMPLE)
    for column in ("role", "model"):
        table.add_column(column)
    counts = ("weights, M", "trained, M")
    for column in (*counts, "weights", "gradients", "optimizer", "in host memory", "on device"):
        table.add_column(column, justify="right")
    for role in plan.roles:
        trained = f"{role.trained / 1e6:,.1f}" if role.trained else ""
        states = (role.weights, role.gradients, role.optimizer, role.host, role.total)
        count = f"{role.parameters / 1e6:,.1f}"
        table.add_row(role.name, role.model, count, trained, *map(gib, states))
    table.add_row("libraries", *[""] * 7, gib(plan.libraries))
    table.add_row("total", *[""] * 6, gib(plan.host), gib(plan.states), style="bold")
    return table


def table_of_phases(plan: Plan) -> Table:
    """A row per phase: what it adds to the model states, and its peak, in GiB."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    table.add_column("phase")
    table.add_column("adds")
    table.add_column("peak", justify="right")
    for name, parts in plan.phases.items():
        large = {part: value for part, value in parts.items() if value / GIB >= 0.005}
        text = ", ".join(f"{part} {gib(value)}" for part, value in large.items())
        peak = gib(plan.states + sum(parts.values()))
        table.add_row(name, text, peak, style="bold" if name == plan.fullest else "")
    return table


def gib(size: float) -> str:
    """Bytes in GiB, as a cell of a table; nothing for 0."""
    return f"{size / GIB:.2f}" if size else ""

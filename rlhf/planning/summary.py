"""The plan as text, and the cheapest changes that would make it fit."""

from __future__ import annotations

import itertools
from copy import deepcopy
from typing import Any

from rlhf.config.choices import Device, Precision
from rlhf.config.deployment import world_size
from rlhf.config.keys import lookup
from rlhf.config.schema import Config
from rlhf.config.stage_graph import is_rl, trains_critic
from rlhf.config.validation import check_config
from rlhf.distributed.deepspeed_config import BYTES
from rlhf.planning.memory import GIB, Plan, make_plan


def cheapest_changes(cfg: Config, stage: str, count: int = 3) -> list[str]:
    """The `count` cheapest changes that make a stage fit, each as overrides in one line. Cheap is what costs little speed: few
    changes before many, and in the order below; none contains another."""
    deploy, several = cfg.deploy, world_size(cfg) > 1
    single_gpu = deploy.device == Device.gpu and deploy.processes_per_node < 8
    to_host: dict[str, Any] = (
        {"deploy.zero_stage": 2} if deploy.zero_stage == 0 else {}
    )  # stage 0 cannot offload; one GPU may have 2
    offers: list[tuple[dict[str, Any], bool]] = [
        ({"deploy.eval_micro_batch": 1}, deploy.eval_micro_batch > 1),
        ({"deploy.micro_batch": 1}, deploy.micro_batch > 1),
        ({"deploy.zero_stage": 2}, several and deploy.zero_stage < 2),
        ({"deploy.precision": Precision.bf16}, BYTES[deploy.precision] == 4),
        ({"deploy.activation_checkpointing": True}, not deploy.activation_checkpointing),
        ({"deploy.zero_stage": 3}, several and deploy.zero_stage < 3),
        (
            {"deploy.gather_for_rollout": False},
            deploy.zero_stage == 3 and deploy.gather_for_rollout is True,
        ),
        (
            {"deploy.offload.frozen": True},
            not deploy.offload.frozen and stage not in ("sft", "rm"),
        ),
        (to_host | {"deploy.offload.optimizer": True}, not deploy.offload.optimizer),
        ({"actor.lora.rank": 16}, stage not in ("rm", "eval") and not cfg.actor.lora.rank),
        (
            {"reward.lora.rank": 16},
            (stage == "rm" or trains_critic(cfg, stage)) and not cfg.reward.lora.rank,
        ),
        ({"rl.ema": None}, is_rl(stage) and cfg.rl.ema is not None),
        (
            {"deploy.processes_per_node": 8, "deploy.zero_stage": 2},
            single_gpu,
        ),  # costs no speed, but has to be there
        ({"deploy.processes_per_node": 8, "deploy.zero_stage": 3}, single_gpu),
    ]
    changes = [change for change, possible in offers if possible]

    def changed(overrides: dict[str, Any]) -> Config:
        other = deepcopy(cfg)
        for key, value in overrides.items():
            node, name = key.rsplit(".", 1)
            setattr(lookup(other, node), name, value)
        return other

    def fits(overrides: dict[str, Any]) -> bool:
        other = changed(overrides)
        return not check_config(other) and make_plan(other, stage).fits

    sets = [
        chosen for n in (1, 2, 3, 4) for chosen in itertools.combinations(range(len(changes)), n)
    ]
    found: list[tuple[int, ...]] = []
    lines: list[str] = []
    for chosen in sorted(sets, key=lambda s: (len(s), sum(s))):
        together: dict[str, Any] = {}
        for i in chosen:
            together |= changes[i]
        repeats = len(together) < sum(len(changes[i]) for i in chosen)  # two values for one key
        if repeats or any(set(smaller) <= set(chosen) for smaller in found) or not fits(together):
            continue
        for key in ("deploy.eval_micro_batch", "deploy.micro_batch"):  # no smaller than it need be
            while (
                key in together
                and 2 * together[key] < lookup(cfg, key)
                and fits(together | {key: 2 * together[key]})
            ):
                together[key] *= 2
        found.append(chosen)
        shown = {
            k: "null" if v is None else getattr(v, "name", str(v).lower())
            for k, v in together.items()
        }
        lines.append(" ".join(f"{key}={value}" for key, value in shown.items()))
        if len(lines) == count:
            break
    return lines


def one_line_summary(plan: Plan) -> str:
    """One line."""
    unit = "rollouts" if is_rl(plan.stage) else "steps"
    steps = f"{plan.steps:,} {unit}" if plan.steps else "nothing is trained"
    if plan.steps is None:
        steps = f"{unit} known when the data are read"
    fit = "".join(f"; {note}" for note in plan.notes) + (
        "" if plan.fits else "; may not fit, see plan=true"
    )
    return f"{plan.stage}: plan {plan.peak / GIB:.1f} of {plan.limit / GIB:g} GiB per process ({plan.fullest}), {steps}{fit}"


def print_plan(plan: Plan, cfg: Config) -> None:
    """The whole of it, as tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def gib(value: float) -> str:
        return f"{value / GIB:.2f}" if value else ""

    where = (
        f"{world_size(cfg)} process(es), ZeRO {cfg.deploy.zero_stage}, {cfg.deploy.precision.name}"
    )
    table = Table(
        title=f"{plan.stage}: GiB on each {'GPU' if cfg.deploy.device == Device.gpu else 'process'} of {where}",
        box=box.SIMPLE,
    )
    for column in (
        "role",
        "model",
        "weights, M",
        "trained, M",
        "weights",
        "gradients",
        "optimizer",
        "in host memory",
        "here",
    ):
        table.add_column(column, justify="left" if column in ("role", "model") else "right")
    for r in plan.roles:
        counts = [f"{r.parameters / 1e6:,.1f}", f"{r.trained / 1e6:,.1f}" if r.trained else ""]
        table.add_row(
            r.name,
            r.model,
            *counts,
            *map(gib, (r.weights, r.gradients, r.optimizer, r.host, r.total)),
        )
    table.add_row("libraries", "", "", "", "", "", "", "", gib(plan.libraries))
    table.add_row(
        "together", "", "", "", "", "", "", gib(plan.host), gib(plan.states), style="bold"
    )
    phases = Table(box=box.SIMPLE)
    for column in ("phase", "comes to that", "peak"):
        phases.add_column(column, justify="right" if column == "peak" else "left")
    for name, parts in plan.phases.items():
        text = ", ".join(
            f"{part} {gib(value)}" for part, value in parts.items() if value / GIB >= 0.005
        )
        phases.add_row(
            name,
            text,
            gib(plan.states + sum(parts.values())),
            style="bold" if name == plan.fullest else "",
        )
    console = Console(width=130, highlight=False)
    console.print(table)
    console.print(phases)
    unknown = "known when the data are read"
    console.print(f"  batch    {plan.batch}")
    console.print(f"  steps    {unknown if plan.steps is None else format(plan.steps, ',')}")
    console.print(f"  tokens   {unknown if plan.tokens is None else f'at most {plan.tokens:,}'}")
    console.print(
        f"  on disk  {gib(plan.files)} GiB of models, {gib(plan.checkpoints)} of checkpoints while it trains"
    )
    for note in plan.notes:
        console.print(f"  note     {note}")
    size = f"{gib(plan.peak)} of {plan.limit / GIB:g} GiB (deploy.gpu_memory_gb)"
    if plan.fits:
        console.print(f"  fits     {size}")
    else:
        console.print(f"  does not fit: {size}. Cheapest changes that make it fit:")
        for line in cheapest_changes(cfg, plan.stage) or [
            "none of those known here: a smaller model, or more machines"
        ]:
            console.print(f"    {line}")

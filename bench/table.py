"""From samples to rows of a table: needed operations, medians, markdown."""

from __future__ import annotations

import statistics
from typing import Any

from protocol import forced_lengths, read_batches
from quiet import WARM_UP, quiet_samples

Spec = dict[str, Any]


def needed_flops(shape: dict[str, int], work: str, rows: list[tuple[int, int]]) -> dict[str, float]:
    """Floating-point operations that a piece of work cannot do without, by its parts.

    Args: rows: tokens of prompt and answer of each sequence (rm: of both answers of a pair).

    A forward pass multiplies each real token with each weight of the body, and in attention each
    token with those before it (twice, for scores and for values). The head is needed only where a
    log-probability is. A backward pass is two forward passes. Padding and recomputation do not
    count. PPO: a forward pass each to sample, and for reference and reward (the sampler has the old
    log-probabilities); then three passes each of actor and critic, of which the critic's first one
    gives the old values, as each response is used once.
    """
    body = sum(
        2.0 * shape["body"] * (p + a) + 2.0 * shape["attention"] * (p + a) ** 2 for p, a in rows
    )
    head = sum(2.0 * shape["head"] * a for _, a in rows)
    if work == "generate":
        return {"all": body + head}
    if work == "rm":
        return {"all": 3 * body}
    if work.startswith("ppo"):
        parts = {"rollout": 3 * body + 2 * head, "update": 6 * body + 3 * head}
        return parts | {"all": sum(parts.values())}
    return {"all": 3 * (body + head)}


def lengths(spec: Spec, batch: list[Any], number: int) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of each sequence of batch `number`."""
    if spec["work"] == "rm":
        return [(len(prompt), len(answer)) for prompt, *answers in batch for answer in answers]
    if spec["work"] in ("generate", "ppo"):
        return [(len(prompt), spec["new"]) for prompt in batch]
    if spec["work"] == "ppo-eos":
        return list(zip(map(len, batch), forced_lengths(number, len(batch), spec["new"]).tolist()))
    return [(len(prompt), len(answer)) for prompt, answer in batch]


def middle(values: list[float]) -> dict[str, float]:
    """Median, half the range as a share of it, and the inter-quartile range."""
    quarters = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    median = statistics.median(values)
    return {
        "median": median,
        "spread": (max(values) - min(values)) / 2 / median,
        "iqr": quarters[2] - quarters[0],
    }


def results(
    contestant: dict[str, Any], shape: dict[str, int], limits: dict[str, float]
) -> list[dict[str, Any]]:
    """Rows of the table: the contestant's samples, and the parts that it measures itself."""
    spec, kept = contestant["spec"], quiet_samples(contestant)
    disturbed = not kept
    kept = kept or list(range(len(contestant["samples"])))  # better than nothing, and said so
    batches = read_batches(spec)
    found = []
    for part in ("seconds", "rollout", "update"):
        taken = [contestant["samples"][i] for i in kept]
        if part not in taken[0]:
            continue
        seconds = [sample[part] for sample in taken]
        # batch 0 was for getting ready
        flops = [
            needed_flops(shape, spec["work"], lengths(spec, batches[i + 1], i + 1)) for i in kept
        ]
        row = middle(seconds) | {
            "name": contestant["label"] if part == "seconds" else f"{contestant['label']}: {part}"
        }
        row |= {"n": 0 if disturbed else len(kept), "tries": len(contestant["samples"]) - WARM_UP}
        computed_in = "bf16" if spec["precision"] == "autocast" else spec["precision"]
        gemm = limits[computed_in] * 1e9
        row["share"] = statistics.median(
            f["all" if part == "seconds" else part] / s / gemm for f, s in zip(flops, seconds)
        )
        if part == "seconds":
            row["tokens_s"] = statistics.median(
                sample["tokens"] / sample["seconds"] for sample in taken
            )
            row["peak_mib"] = contestant["peak_mib"]
        found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown; columns that none of them has are left out."""
    columns = {
        "": lambda r: r["name"],
        "seconds": lambda r: f"{r['median']:.3f}",
        "± %": lambda r: f"{100 * r['spread']:.0f}",
        "quartiles apart, s": lambda r: f"{r['iqr']:.3f}",
        "samples": lambda r: f"{r['n']} of {r['tries']}" + ("" if r["n"] else ", disturbed"),
        "real tokens/s": lambda r: f"{r['tokens_s']:,.0f}",
        "% of GEMM": lambda r: f"{100 * r['share']:.0f}",
        "peak MiB above imports": lambda r: f"{r['peak_mib']:,.0f}",
        "of it states, MiB": lambda r: f"{r['states_mib']:,.0f}",
    }
    lines: list[list[str]] = [list(columns), *([] for _ in rows)]
    for cell in columns.values():
        for line, row in zip(lines[1:], rows):
            try:
                line.append(cell(row))
            except KeyError:
                line.append("")
    kept = [i for i in range(len(columns)) if any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in kept] for line in lines]
    lines.insert(1, ["---"] + ["---:"] * (len(kept) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

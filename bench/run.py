"""The product's own code against its peers, in one run: seconds per step, real tokens per second, memory.

    python bench/run.py WORK --pairs FILE [--trl DIR] [--trl-ppo DIR] [--model DIR] [--precision bf16] [--out DIR] ...

WORK is one of
    generate    sampling alone, against transformers' generate
    ppo         a PPO iteration, against TRL's PPOTrainer (--trl-ppo); ppo-eos: answers of different lengths, which are forced
    sft, rm     an optimizer step, against TRL's SFTTrainer and RewardTrainer (--trl)
    padding     the product's SFT on batches of the same number of tokens, of which more and more would be padding
    vocabulary  memory of the product's SFT with vocabularies of 8, 32 and 128 thousand
    processes   the product's PPO in one process and in two, of a thread each
    startup     seconds from `python train.py` to the first optimizer step
    data        bench/data.py, small

Contestants (bench/contestants.py, bench/peers.py) are processes that work in turns, so that only one computes at a time, on the same token ids. The first
samples are warm-up. A sample counts if others used less than FOREIGN processors meanwhile, and the contestant had one. All numbers are
medians.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import contestants
from driver import ROOT, TRIES, ask, enter, last_lines, product_overrides, side_by_side
from protocol import MiB, read_batches
from quiet import FOREIGN, WARM_UP, clocks, used_since, wait_for_quiet
from table import lengths, middle, results, table

BATCH = {"sft": 8, "rm": 8, "padding": 8, "vocabulary": 8}  # else 16
PADDING = (0, 35, 70)  # %, of a batch padded to its longest row
VOCABULARIES = (8_192, 32_768, 131_072)
Spec = dict[str, Any]


def compare(spec: Spec) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """The product against a peer, on one work: rows of the table, what they say, and all else that was measured."""
    work, out = spec["work"], spec["out"]
    limits = ask("limits", spec)
    shapes = ask("assets", spec | {"policies": {"policy": None}})["shapes"]
    entrants: dict[str, list[tuple[str, str]]] = {
        "generate": [("product", "product_generate"), ("transformers", "transformers_generate")]
    }
    entrants |= {name: [("product", "product"), ("trl", "trl_ppo")] for name in ("ppo", "ppo-eos")}
    entrants |= {name: [("product", "product"), ("trl", "trl_trainer")] for name in ("sft", "rm")}
    contenders = [
        enter(label, role, spec | {"batches": f"{out}/batches.json"})
        for label, role in entrants[work]
    ]
    side_by_side(contenders, spec["samples"])
    rows = [row for each in contenders for row in results(each, shapes["policy"], limits)]
    ours, theirs = rows[0], rows[-1]
    speed, size = (ours[key] / theirs[key] for key in ("tokens_s", "peak_mib"))
    said = [
        f"product / {contenders[1]['peer']}: {speed:.2f} times the real tokens per second, {size:.2f} times the memory above the imports"
    ]
    return (
        rows,
        said,
        {"limits": limits, "shapes": shapes, "contestants": [told(each) for each in contenders]},
    )


def told(contestant: dict[str, Any]) -> dict[str, Any]:
    return {key: contestant[key] for key in ("label", "peer", "samples", "peak_mib", "imports_mib")}


def padding(spec: Spec) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """SFT steps of the same number of tokens, half of them learnt, in rows of which one is ever longer than the others."""
    import random

    limits = ask("limits", spec)
    shapes = ask("assets", spec | {"policies": {"policy": None}})["shapes"]
    size, made = spec["batch"], random.Random(0)
    total = int(size * spec["max_length"] * (1 - PADDING[-1] / 100)) // (2 * size) * 2 * size
    contenders = []
    for percent in PADDING:
        longest = int(total / size / (1 - percent / 100)) // 2 * 2
        others = [(total - longest) // 2 // (size - 1) * 2] * (size - 1)
        others[0] += total - longest - sum(others)
        halves = [n // 2 for n in (longest, *others)]
        batches = [
            [[[made.randrange(100, 4000) for _ in range(n)] for _ in "pa"] for n in halves]
            for _ in range(spec["batches_needed"])
        ]
        file = Path(spec["out"]) / f"batches-{percent}.json"
        file.write_text(json.dumps(batches))
        contenders.append(enter(f"padding-{percent}", "product", spec | {"batches": str(file)}))
    side_by_side(contenders, spec["samples"])
    rows = [row for each in contenders for row in results(each, shapes["policy"], limits)]
    per_token = [1 / row["tokens_s"] for row in rows]
    worst = max(per_token) / min(per_token) - 1
    ratios = ", ".join(
        f"{x / per_token[0]:.2f} at {percent} %" for x, percent in zip(per_token, PADDING)
    )
    said = [
        f"time per real token: {ratios}; {'flat' if worst < 0.15 else 'NOT flat'} within 15 % (they differ by {100 * worst:.0f} %)"
    ]
    return (
        rows,
        said,
        {"limits": limits, "shapes": shapes, "contestants": [told(each) for each in contenders]},
    )


def vocabulary(spec: Spec) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """One process after the other: they are compared in memory only."""
    limits = ask("limits", spec)
    names = {f"policy-{size}": size for size in VOCABULARIES}
    shapes = ask("assets", spec | {"policies": names})["shapes"]
    rows: list[dict[str, Any]] = []
    more = []
    for name in names:
        policy = f"{spec['out']}/{name}"
        contestant = enter(
            name,
            "product",
            spec | {"batches": f"{spec['out']}/batches.json", "policy": policy, "reward": policy},
        )
        side_by_side([contestant], spec["samples"])
        # a weight, its gradient and AdamW's two moments: 16 bytes in fp32; in bf16 2 + 2, and the fp32 weight beside the moments: 16 too.
        # The embedding is the output layer too, and has a gradient of each use before they are added
        states = (16 * shapes[name]["parameters"] + 4 * shapes[name]["head"]) / MiB
        rows += [row | {"states_mib": states} for row in results(contestant, shapes[name], limits)]
        more.append(told(contestant))
    beyond = [row["peak_mib"] - row["states_mib"] for row in rows]
    said = [
        "above imports and states: "
        + ", ".join(f"{x:,.0f} MiB at {size:,}" for x, size in zip(beyond, VOCABULARIES))
    ]
    batches = read_batches({"batches": f"{spec['out']}/batches.json"})
    tokens = max(sum(map(sum, lengths(spec, batch, 0))) for batch in batches)
    logits = ", ".join(f"{4 * tokens * size / MiB:,.0f} MiB" for size in VOCABULARIES)
    said += [f"logits of all {tokens:,} real tokens of the largest batch, in fp32: {logits}"]
    return rows, said, {"limits": limits, "shapes": shapes, "contestants": more}


def train(root: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Run train.py in a fresh directory. Returns the steps that it logs, each with `since_start`, s, and `foreign` processors since the
    step before; and as the last one, its end."""
    root.mkdir()
    begin, started, before = time.time(), time.perf_counter(), clocks()
    steps: list[dict[str, Any]] = []
    with (root / "train.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *overrides, f"root={root}"],
            cwd=root,
            stdout=log,
            stderr=log,
        )
    ended = False
    while not ended:
        time.sleep(0.02)
        ended = process.poll() is not None
        logged = [
            line
            for file in root.glob("outputs/*/metrics.jsonl")
            for line in file.read_text().split("\n")[:-1]
        ]
        for line in logged[len(steps) :]:
            step = json.loads(line)
            steps.append(step | {"since_start": step["time"] - begin, **used_since(before)})
            before = clocks()
    if process.returncode:
        raise SystemExit(
            f"{last_lines(root / 'train.log')}\ntrain.py has ended with {process.returncode}"
        )
    return [*steps, {"since_start": time.perf_counter() - started, **used_since(before)}]


def row_of(name: str, key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    kept = [step[key] for step in steps if step["foreign"] < FOREIGN]
    return middle(kept or [step[key] for step in steps]) | {
        "name": name,
        "n": len(kept),
        "tries": len(steps),
    }


def processes(spec: Spec) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Whole runs in turns, two of each; their first steps are warm-up."""
    ask("assets", spec | {"policies": {"policy": None}})
    steps: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    each = WARM_UP + -(-spec["samples"] // 2)
    for number in range(2):
        for count in steps:
            wait_for_quiet(spec["wait"])
            given = [
                *product_overrides(spec | {"threads": 1}),
                f"deploy.processes_per_node={count}",
                f"rl.max_steps={each}",
            ]
            steps[count] += train(Path(spec["out"]) / f"processes-{count}-{number}", given)[
                WARM_UP:-1
            ]
    rows = [
        row_of(f"{count} of a thread each", "timing_s/step", found)
        for count, found in steps.items()
    ]
    return (
        rows,
        [f"two processes: {rows[0]['median'] / rows[1]['median']:.2f} times as fast as one"],
        {"steps": steps},
    )


def startup(spec: Spec) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """Whole runs; the first one finds no prepared data."""
    small = [
        "stage=sft",
        "data.sandbox.demonstrations=64",
        "data.sandbox.pairs=64",
        "data.eval_rows=16",
        "sft.max_steps=1",
    ]
    small += ["wandb.mode=disabled", f"deploy.threads={spec['threads']}", *spec["set"]]
    runs = []
    for number in range(1 + spec["samples"]):
        wait_for_quiet(spec["wait"])
        steps = train(Path(spec["out"]) / f"startup-{number}", small)
        runs.append(
            {
                "first": steps[0]["since_start"],
                "end": steps[-1]["since_start"],
                "foreign": max(s["foreign"] for s in steps),
            }
        )
    rows = [
        row_of("to the first optimizer step", "first", runs[1:]),
        row_of("to the end of the run", "end", runs[1:]),
    ]
    return (
        rows,
        [f"with nothing prepared, to the first optimizer step: {runs[0]['first']:.1f} s"],
        {"runs": runs},
    )


WORKS = {name: compare for name in ("generate", "ppo", "ppo-eos", "sft", "rm")} | {
    "padding": padding,
    "vocabulary": vocabulary,
    "processes": processes,
    "startup": startup,
}


def machine() -> dict[str, Any]:
    from rlhf.runs.directory import describe_environment

    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": names[0] if names else "", "memory_gib": round(gib, 1), **describe_environment()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="More at the head of this file."
    )
    parser.add_argument("work", choices=[*WORKS, "data"])
    parser.add_argument(
        "--pairs",
        help=".jsonl or .jsonl.gz with whole dialogues, chosen and rejected; all but startup and data need it",
    )
    parser.add_argument(
        "--trl",
        help="a directory of `pip install --no-deps --target DIR trl==1.16.0`, for sft and rm",
    )
    parser.add_argument("--trl-ppo", help="likewise with trl==1.12.0, the last one with PPO")
    parser.add_argument(
        "--model",
        help="a causal language model's directory; default: a random OPT of 5 million weights",
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--samples", type=int, default=7, help="that count, of each contestant; startup: runs"
    )
    parser.add_argument("--batch", type=int, help="rows; default 16, sft and rm 8")
    parser.add_argument(
        "--prompt", type=int, help="tokens of a prompt, its last ones; default 64, ppo-eos 256"
    )
    parser.add_argument(
        "--new", type=int, default=128, help="tokens of an answer, ppo-eos: at most"
    )
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row in sft and rm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--wait",
        type=float,
        default=60.0,
        help="s, at most, for other processes to be quiet before each sample",
    )
    parser.add_argument("--rows", type=int, default=40_000, help="of data")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of the product; may be repeated",
    )
    parser.add_argument(
        "--same-malloc",
        action="store_true",
        help="the peers get the malloc settings of the product's workers, too",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="a directory for all that is written; default: a temporary one, which stays",
    )
    given = parser.parse_args()
    if given.work == "data":
        raise SystemExit(
            subprocess.call(
                [sys.executable, str(ROOT / "bench" / "data.py"), "--rows", str(given.rows)]
            )
        )
    needed = {"sft": ["trl"], "rm": ["trl"], "ppo": ["trl_ppo"], "ppo-eos": ["trl_ppo"]}.get(
        given.work, []
    )
    for name in ["pairs"] * (given.work != "startup") + needed:
        if not getattr(given, name):
            parser.error(f"{given.work} needs --{name.replace('_', '-')}")
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    out = Path(tempfile.mkdtemp(prefix=f"bench-{given.work}-", dir=given.out)).resolve()
    spec: Spec = dict(vars(given))
    spec |= {
        name: str(Path(spec[name]).resolve())
        for name in ("pairs", "trl", "trl_ppo", "model")
        if spec[name]
    }
    spec |= {"out": str(out), "policy": f"{out}/policy", "reward": f"{out}/reward"}
    spec["batch"] = given.batch or BATCH.get(given.work, 16)
    spec["prompt"] = given.prompt or (256 if given.work == "ppo-eos" else 64)
    spec["batches_needed"] = 1 + WARM_UP + TRIES * given.samples + 1
    os.environ |= {
        "HF_DATASETS_CACHE": f"{out}/cache",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    sys.path.insert(0, str(ROOT))

    about = machine()
    rows, said, more = WORKS[given.work](spec)
    about["packages"] |= {
        name: importlib.metadata.version(name) for name in ("accelerate", "tokenizers")
    }
    file = out / "result.json"
    file.write_text(
        json.dumps({"spec": spec, "machine": about, "rows": rows, "said": said, **more}, indent=1)
        + "\n"
    )
    print(
        f"{given.work}: {spec['precision']}, {spec['threads']} threads, batch {spec['batch']}; {about['cpu']}, {about['cores']} cores"
    )
    versions = about["packages"] | {
        each["peer"].split()[0]: each["peer"].split()[-1] for each in more.get("contestants", [])
    }
    print(
        ", ".join(
            f"{name} {versions[name]}"
            for name in ("torch", "deepspeed", "transformers", "trl")
            if name in versions
        )
    )
    print(f"product at {about['git'][:12]}{', with changes' * about['git_dirty']}")
    if "limits" in more:
        found = more["limits"]
        print(
            f"this machine: GEMM {found['fp32']:.0f} GFLOP/s in fp32, {found['bf16']:.0f} in bf16; reads {found['read']:.0f} GB/s"
        )
    print("\n" + table(rows) + "\n\n" + "\n".join(said) + f"\n\nall of it: {file}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        contestants.main(*sys.argv[2:])
    else:
        main()

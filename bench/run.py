"""The product against its peers, in one run: seconds per step, real tokens per second, memory.

    python bench/run.py WORK --pairs FILE [--trl DIR] [--trl-ppo DIR] [--model DIR]
                        [--precision bf16] [--out DIR] ...

WORK is one of
    generate    sampling alone, against transformers' generate
    ppo         a PPO iteration, against TRL's PPOTrainer (--trl-ppo)
    ppo-eos     the same with responses of different lengths, which are forced
    sft, rm     an optimizer step, against TRL's SFTTrainer and RewardTrainer (--trl)
    padding     the product's SFT on batches of equal token counts with more and more padding
    vocabulary  memory of the product's SFT with vocabularies of 8, 32 and 128 thousand
    processes   the product's PPO in one process and in two, each with one thread
    data        bench/data.py, small

Contestants (bench/contestants.py, bench/peers.py) are processes that work in turns on the same
token ids, so that only one computes at a time. The first samples are warm-up. A sample counts if
other programs used less than FOREIGN processors meanwhile, and the contestant had one. All numbers
are medians.
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
PRECISIONS = ("fp32", "bf16", "autocast")
Spec = dict[str, Any]


def compare(spec: Spec) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """The product against a peer, on one work.

    Returns: rows of the table, conclusions in words, and everything else that was measured.
    """
    work, out = spec["work"], spec["out"]
    limits = ask("limits", spec)
    shapes = ask("assets", spec | {"policies": {"policy": None}})["shapes"]
    entrants: dict[str, list[tuple[str, str]]] = {
        "generate": [("product", "product_generate"), ("transformers", "transformers_generate")]
    }
    entrants |= {name: [("product", "product"), ("trl", "trl_ppo")] for name in ("ppo", "ppo-eos")}
    entrants |= {name: [("product", "product"), ("trl", "trl_trainer")] for name in ("sft", "rm")}
    spec |= {"batches": f"{out}/batches.json"}
    if spec["precisions"]:
        contenders = [enter(one, "product", spec | {"precision": one}) for one in PRECISIONS]
    else:
        contenders = [enter(label, role, spec) for label, role in entrants[work]]
    side_by_side(contenders, spec["samples"])
    rows = [row for each in contenders for row in results(each, shapes["policy"], limits)]
    more = {"limits": limits, "shapes": shapes}
    more |= {"contestants": [summary_of(each) for each in contenders]}
    if spec["precisions"]:
        wholes = {row["name"]: row["median"] for row in rows if row["name"] in PRECISIONS}
        first = PRECISIONS[0]
        conclusions = [
            f"{name} / {first}: {wholes[first] / seconds:.2f} times as fast"
            for name, seconds in wholes.items()
            if name != first
        ]
        return rows, conclusions, more
    ours, theirs = rows[0], rows[-1]
    speed, size = (ours[key] / theirs[key] for key in ("tokens_s", "peak_mib"))
    conclusions = [
        f"product / {contenders[1]['peer']}: {speed:.2f} times the real tokens per second, "
        f"{size:.2f} times the memory above the imports"
    ]
    return rows, conclusions, more


def summary_of(contestant: dict[str, Any]) -> dict[str, Any]:
    """What result.json keeps of a contestant."""
    return {key: contestant[key] for key in ("label", "peer", "samples", "peak_mib", "imports_mib")}


def padding(spec: Spec) -> tuple[list[dict[str, Any]], list[str], dict[str, Any]]:
    """SFT steps of the same number of tokens, half of them in the loss.

    From one contestant to the next, one row gets longer and the others get shorter.
    """
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
        file.write_text(json.dumps(batches), encoding="utf-8")
        contenders.append(enter(f"padding-{percent}", "product", spec | {"batches": str(file)}))
    side_by_side(contenders, spec["samples"])
    rows = [row for each in contenders for row in results(each, shapes["policy"], limits)]
    per_token = [1 / row["tokens_s"] for row in rows]
    worst = max(per_token) / min(per_token) - 1
    ratios = ", ".join(
        f"{x / per_token[0]:.2f} at {percent} %" for x, percent in zip(per_token, PADDING)
    )
    verdict = "flat" if worst < 0.15 else "NOT flat"
    conclusions = [
        f"time per real token: {ratios}; {verdict} within 15 % (they differ by {100 * worst:.0f} %)"
    ]
    more = {"limits": limits, "shapes": shapes}
    return rows, conclusions, more | {"contestants": [summary_of(each) for each in contenders]}


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
        # A weight, its gradient and AdamW's two moments are 16 bytes in fp32. In bf16 they are 16,
        # too: 2 + 2, and 12 for the fp32 weight and the moments. The embedding is the output layer
        # as well, and has one gradient for each use before they are added.
        states = (16 * shapes[name]["parameters"] + 4 * shapes[name]["head"]) / MiB
        rows += [row | {"states_mib": states} for row in results(contestant, shapes[name], limits)]
        more.append(summary_of(contestant))
    beyond = [row["peak_mib"] - row["states_mib"] for row in rows]
    conclusions = [
        "above imports and states: "
        + ", ".join(f"{x:,.0f} MiB at {size:,}" for x, size in zip(beyond, VOCABULARIES))
    ]
    batches = read_batches({"batches": f"{spec['out']}/batches.json"})
    tokens = max(sum(map(sum, lengths(spec, batch, 0))) for batch in batches)
    logits = ", ".join(f"{4 * tokens * size / MiB:,.0f} MiB" for size in VOCABULARIES)
    conclusions += [f"logits of all {tokens:,} real tokens of the largest batch, in fp32: {logits}"]
    return rows, conclusions, {"limits": limits, "shapes": shapes, "contestants": more}


def train(root: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Run train.py in a new directory.

    Returns: the steps that it logs, each with `since_start` in seconds and the `foreign` processors
        since the step before; the last element is the end of the run.
    """
    root.mkdir()
    begin, started, before = time.time(), time.perf_counter(), clocks()
    steps: list[dict[str, Any]] = []
    with (root / "train.log").open("w", encoding="utf-8") as log:
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
            for line in file.read_text(encoding="utf-8").split("\n")[:-1]
        ]
        for line in logged[len(steps) :]:
            step = json.loads(line)
            steps.append(step | {"since_start": step["time"] - begin, **used_since(before)})
            before = clocks()
    if process.returncode:
        raise SystemExit(
            f"{last_lines(root / 'train.log')}\ntrain.py ended with exit code {process.returncode}"
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
        row_of(f"{count} of a thread each", "timing_s/step", logged)
        for count, logged in steps.items()
    ]
    return (
        rows,
        [f"two processes: {rows[0]['median'] / rows[1]['median']:.2f} times as fast as one"],
        {"steps": steps},
    )


WORKS = {name: compare for name in ("generate", "ppo", "ppo-eos", "sft", "rm")} | {
    "padding": padding,
    "vocabulary": vocabulary,
    "processes": processes,
}


def machine() -> dict[str, Any]:
    from rlhf.runs.directory import describe_environment

    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": names[0] if names else "", "memory_gib": round(gib, 1), **describe_environment()}


def main() -> None:
    """Run one benchmark, print its table and write result.json."""
    parser = make_parser()
    args = parser.parse_args()
    if args.work == "data":
        script = str(ROOT / "bench" / "data.py")
        raise SystemExit(subprocess.call([sys.executable, script, "--rows", str(args.rows)]))
    check_required(parser, args)
    spec = make_spec(args)
    set_environment(spec["out"])
    about = machine()
    rows, conclusions, more = WORKS[args.work](spec)
    packages = ("accelerate", "tokenizers")
    about["packages"] |= {name: importlib.metadata.version(name) for name in packages}
    file = Path(spec["out"]) / "result.json"
    result = {"spec": spec, "machine": about, "rows": rows, "said": conclusions, **more}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("\n".join(describe(spec, about, more)))
    print("\n" + table(rows) + "\n\n" + "\n".join(conclusions) + f"\n\nall results: {file}")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], epilog="More at the head of this file."
    )
    add = parser.add_argument
    add("work", choices=[*WORKS, "data"])
    pairs = ".jsonl or .jsonl.gz of dialogues, chosen and rejected; not for data"
    add("--pairs", help=pairs)
    target = "a directory of `pip install --no-deps --target DIR trl==1.16.0`, for sft and rm"
    add("--trl", help=target)
    add("--trl-ppo", help="the same with trl==1.12.0, the last version with PPO")
    model = "directory of a causal language model; default: a random OPT of 5 million weights"
    add("--model", help=model)
    add("--shape", choices=["small", "large"], default="small", help="of it: 4 or 24 layers")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: generate, ppo, sft, rm")
    add("--precision", choices=["fp32", "bf16"], default="fp32")
    itself = "the product in fp32, bf16 and autocast instead of a peer; for ppo, sft and rm"
    add("--precisions", action="store_true", help=itself)
    samples = "undisturbed samples of each contestant"
    add("--samples", type=int, default=7, help=samples)
    add("--batch", type=int, help="rows; default 16, sft and rm 8")
    add("--prompt", type=int, help="last tokens of a prompt that are kept; default 64, ppo-eos 256")
    add("--new", type=int, default=128, help="tokens of a response, ppo-eos: at most")
    add("--max-length", type=int, default=512, help="tokens of a row in sft and rm")
    turn = "samples in a row of a contestant; of several the first one does not count"
    add("--turn", type=int, default=1, help=turn)
    add("--threads", type=int, default=2)
    wait = "seconds to wait at most, before each sample, until other processes are idle"
    add("--wait", type=float, default=60.0, help=wait)
    add("--rows", type=int, default=40_000, help="of data")
    setting = "a setting of the product; may be repeated"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=setting)
    malloc = "give the peers the malloc settings of the product's workers, too"
    add("--same-malloc", action="store_true", help=malloc)
    out = "a directory for all files; default: a temporary one, which is kept"
    add("--out", type=Path, help=out)
    return parser


def check_required(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if an option that this benchmark needs is missing."""
    peers = {"sft": ["trl"], "rm": ["trl"], "ppo": ["trl_ppo"], "ppo-eos": ["trl_ppo"]}
    against = [] if args.precisions else peers.get(args.work, [])
    for name in ["pairs", *against]:
        if not getattr(args, name):
            parser.error(f"{args.work} needs --{name.replace('_', '-')}")


def make_spec(args: argparse.Namespace) -> Spec:
    """The settings that every contestant reads, with absolute paths; makes the output directory."""
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    out = Path(tempfile.mkdtemp(prefix=f"bench-{args.work}-", dir=args.out)).resolve()
    spec: Spec = dict(vars(args))
    for name in ("pairs", "trl", "trl_ppo", "model"):
        if spec[name]:
            spec[name] = str(Path(spec[name]).resolve())
    spec |= {"out": str(out), "policy": f"{out}/policy", "reward": f"{out}/reward"}
    spec["batch"] = args.batch or BATCH.get(args.work, 16)
    spec["prompt"] = args.prompt or (256 if args.work == "ppo-eos" else 64)
    spec["batches_needed"] = 1 + WARM_UP + TRIES * args.samples + args.turn
    return spec


def set_environment(out: str) -> None:
    """What this process and all that it starts need: no network, and the product's modules."""
    os.environ["HF_DATASETS_CACHE"] = f"{out}/cache"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.path.insert(0, str(ROOT))


def describe(spec: Spec, about: dict[str, Any], more: dict[str, Any]) -> list[str]:
    """Lines above the table: settings, machine, versions and what the machine can do."""
    settings = f"{spec['device']}, {spec['precision']}, {spec['threads']} threads, "
    settings += f"batch {spec['batch']}"
    lines = [f"{spec['work']}: {settings}; {about['cpu']}, {about['cores']} cores"]
    peers = (each["peer"].split() for each in more.get("contestants", []))
    versions = about["packages"] | {words[0]: words[-1] for words in peers}
    shown = ("torch", "deepspeed", "transformers", "trl")
    lines += [", ".join(f"{name} {versions[name]}" for name in shown if name in versions)]
    changes = ", with changes" if about["git_dirty"] else ""
    lines += [f"product at {about['git'][:12]}{changes}"]
    if "limits" in more:
        limits = more["limits"]
        gemm = f"GEMM {limits['fp32']:.0f} GFLOP/s in fp32, {limits['bf16']:.0f} in bf16"
        lines += [f"this machine: {gemm}; reads {limits['read']:.0f} GB/s"]
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        contestants.main(*sys.argv[2:])
    else:
        main()

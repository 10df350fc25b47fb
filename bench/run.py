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

Contestants (bench/contestants.py) are processes that work in turns, so that only one computes at a time, on the same token ids. The first
samples are warm-up. A sample counts if others used less than FOREIGN processors meanwhile, and the contestant had one. All numbers are
medians.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import contestants
from contestants import MiB, forced_lengths

ROOT = Path(__file__).resolve().parents[1]
FOREIGN = 0.12  # processors that others may use during a sample
OWN = 0.85  # and that a contestant must have had
WARM_UP = 2  # samples
TRIES = 3  # times the wanted number of samples, at most
BATCH = {"sft": 8, "rm": 8, "padding": 8, "vocabulary": 8}  # else 16
PADDING = (0, 35, 70)  # %, of a batch padded to its longest row
VOCABULARIES = (8_192, 32_768, 131_072)
Spec = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------------ the processors


def clocks() -> tuple[float, float, float]:
    """Seconds now; of processors that this machine has worked; and that this process and all that it has started have."""
    import psutil  # type: ignore[import-untyped]

    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(ticks[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf(
        "SC_CLK_TCK"
    )  # user, nice, system, irq, softirq, steal
    own = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):  # it has ended
            own += sum(process.cpu_times()[:4])  # children that have ended are in their parent's
    return time.perf_counter(), busy, own


def used_since(before: tuple[float, float, float]) -> dict[str, float]:
    """Processors used since then, by us (`own`) and by others (`foreign`; what the clocks' ticks cannot tell, 20 ms, is left out)."""
    wall, busy, own = (now - then for now, then in zip(clocks(), before))
    return {"own": own / max(wall, 1e-9), "foreign": max(0.0, busy - own - 0.02) / max(wall, 1e-9)}


def wait_for_quiet(at_most: float) -> None:
    end = time.monotonic() + at_most
    while time.monotonic() < end:
        before = clocks()
        time.sleep(0.4)
        if used_since(before)["foreign"] < FOREIGN / 2:
            return


# --------------------------------------------------------------------------------------------------------------------- contestants


def write_spec(spec: Spec, label: str) -> Path:
    file = Path(spec["out"]) / f"{label}.json"
    file.write_text(json.dumps(spec))
    return file


def command(role: str, file: Path) -> list[str]:
    return [sys.executable, str(Path(__file__)), "--contestant", role, str(file)]


def ask(role: str, spec: Spec) -> dict[str, Any]:
    """What a role that takes no turns says."""
    with (Path(spec["out"]) / f"{role}.log").open("w") as log:
        done = subprocess.run(
            command(role, write_spec(spec, role)), stdout=subprocess.PIPE, stderr=log, text=True
        )
    if done.returncode:
        raise SystemExit(f"{last_lines(Path(log.name))}\n{role} has ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def enter(label: str, role: str, spec: Spec) -> dict[str, Any]:
    """Start a contestant and wait until it is ready."""
    from rlhf.runs import launch

    environment: dict[str, str] = os.environ | {"OMP_NUM_THREADS": str(spec["threads"])}
    if role == "product":
        spec, environment = product_run(label, spec)
    elif role == "product_generate" or spec["same_malloc"]:
        environment |= launch.memory_settings()
    log = Path(spec["out"]) / f"{label}.log"
    with log.open("w") as errors:
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": errors,
            "text": True,
        }
        process = subprocess.Popen(command(role, write_spec(spec, label)), env=environment, **pipes)
    contestant = {"label": label, "process": process, "log": log, "samples": [], "spec": spec}
    contestant["peer"] = hear(contestant)["ready"]
    return contestant


def tell(contestant: dict[str, Any], word: str) -> dict[str, Any]:
    contestant["process"].stdin.write(word + "\n")
    contestant["process"].stdin.flush()
    return hear(contestant)


def hear(contestant: dict[str, Any]) -> dict[str, Any]:
    line = contestant["process"].stdout.readline()
    if not line:
        code = contestant["process"].wait()
        causes = [
            file.read_text()
            for file in Path(contestant["spec"].get("run_dir", "/nowhere")).glob("error-rank*.txt")
        ]
        why = causes[0] if causes else last_lines(contestant["log"])
        raise SystemExit(
            f"{why}\n{contestant['label']} has ended with {code}; all of it: {contestant['log']}"
        )
    return json.loads(line)


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-25:])


def product_run(label: str, spec: Spec) -> tuple[Spec, dict[str, str]]:
    """A run directory of the product, as its command line makes one, and the environment that its launcher gives a worker."""
    from hydra import compose, initialize_config_dir

    from rlhf import cli
    from rlhf.config.loading import register_schema, save_config
    from rlhf.config.validation import check_config
    from rlhf.runs import launch
    from rlhf.runs.directory import config_for_stage
    from rlhf.runs.inputs import check_models, find_inputs

    register_schema()
    overrides = product_overrides(spec)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = cli.typed(compose("config", overrides))
    if problems := check_config(cfg) + check_models(cfg):
        raise SystemExit("\n".join(problems))
    stage = cfg.stage.runs[-1]
    cfg = config_for_stage(cfg, stage, find_inputs(cfg, stage, cfg, overrides)[0])
    run_dir = Path(spec["out"]) / f"run-{label}"
    run_dir.mkdir()
    save_config(cfg, run_dir / "config.yaml")
    return spec | {"run_dir": str(run_dir)}, os.environ | launch.worker_environments(cfg)[
        0
    ]  # the one place that knows how it starts a worker


def product_overrides(spec: Spec) -> list[str]:
    """The command line of the product for this work."""
    stage = {"ppo-eos": "ppo", "processes": "ppo", "padding": "sft", "vocabulary": "sft"}.get(
        spec["work"], spec["work"]
    )
    batch, out, half = spec["batch"], spec["out"], spec["max_length"] // 2
    size = (
        {"prompt": spec["prompt"], "answer": spec["new"]}
        if stage == "ppo"
        else {"prompt": half, "answer": half}
    )
    given = [
        f"stage={stage}",
        "data=jsonl",
        f"data.sources.mine.path={out}/pairs.jsonl",
        "data.workers=1",
        "data.eval_rows=16",
    ]
    given += [
        f"data.max_prompt_tokens={size['prompt']}",
        f"data.max_response_tokens={size['answer']}",
        f"root={out}",
    ]
    given += [
        f"actor.path={spec['policy']}",
        f"reward.path={spec['reward']}",
        "wandb.mode=disabled",
        "checkpoint.every_minutes=null",
    ]
    given += [f"deploy.threads={spec['threads']}", f"deploy.precision={spec['precision']}"]
    given += [f"deploy.micro_batch={batch}", f"deploy.eval_micro_batch={batch}"]
    given += [
        f"{stage}.{key}"
        for key in (
            f"batch_size={batch}",
            "epochs=1",
            "lr=1e-6",
            "schedule=constant",
            "warmup_ratio=0",
        )
    ]
    if stage == "ppo":
        given += [
            f"rl.actor={spec['policy']}",
            f"rl.reward={spec['reward']}",
            "rl.minibatches=1",
            "rl.kl.coef=0.1",
        ]
        given += [
            "rl.critic.lr=1e-6",
            "rl.normalize_score=false",
            "rl.missing_eos_penalty=0",
        ]
    return given + spec["set"]


def side_by_side(contenders: list[dict[str, Any]], samples: int) -> None:
    """Let all work in turns until each has so many quiet samples, or there were TRIES times as many; then end them."""
    for number in range(WARM_UP + TRIES * samples):
        for each in contenders:
            wait_for_quiet(each["spec"]["wait"])
            before = clocks()
            sample = tell(each, "go")
            each["samples"].append(sample | used_since(before))
        tokens = {each["label"]: each["samples"][-1]["tokens"] for each in contenders}
        if len(set(tokens.values())) > 1:
            raise SystemExit(f"sample {number} is not the same work for all, real tokens: {tokens}")
        if all(len(quiet(each)) >= samples for each in contenders):
            break
    for each in contenders:
        each |= tell(each, "stop")
        each["process"].wait()


def quiet(contestant: dict[str, Any]) -> list[int]:
    """Numbers of the samples that count. A contestant always computes: one that had less than a processor was kept from it, by a host
    beneath this machine that /proc/stat may know nothing of."""
    samples = contestant["samples"]
    return [
        i
        for i in range(WARM_UP, len(samples))
        if samples[i]["foreign"] < FOREIGN and samples[i]["own"] > OWN
    ]


# ------------------------------------------------------------------------------------------------------------------------- results


def needed_flops(shape: dict[str, int], work: str, rows: list[tuple[int, int]]) -> dict[str, float]:
    """Floating-point operations that a piece of work cannot do without, by its parts.

    Args: rows: tokens of prompt and answer of each sequence (rm: of both answers to a pair).

    A forward multiplies each real token with each weight of the body, and in attention each token with those before it (twice, for
    scores and for values); the head is needed only where a log-probability is. A backward is two forwards. Nothing counts for padding,
    or for computing something again. PPO: a forward each to sample, and for reference, reward and old values (the sampler has seen the
    old log-probabilities); then actor and critic three times.
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
        parts = {"rollout": 4 * body + 2 * head, "update": 6 * body + 3 * head}
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
    """Rows of the table: of the contestant's samples, and of the parts of them that it measures itself."""
    spec, kept = contestant["spec"], quiet(contestant)
    disturbed = not kept
    kept = kept or list(range(len(contestant["samples"])))  # better than nothing, and said so
    batches = contestants.read_batches(spec)
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
        gemm = limits[spec["precision"]] * 1e9
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


# --------------------------------------------------------------------------------------------------------------------------- works


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
    batches = contestants.read_batches({"batches": f"{spec['out']}/batches.json"})
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

"""How long the data preparation takes, and how much memory, for preference pairs of three sizes.

    python bench/data.py [--rows 2000000] [--out DIR] [--workers N]

The pairs are a .jsonl file. Each size is prepared in a process of its own, first with an empty
cache and then from the cache, as a training run does it: the records of all stages, and the token
ids for SFT, reward model and PPO with the tokenizer of builtin:tiny. DIR (a temporary one by
default) gets the file and the caches, about 6 kB per row of --rows; they are deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMISED = 2.0  # GB, the peak of any one process at 2,000,000 rows
LIBRARIES = "libraries loaded"
SELF_AND_WORKERS = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


# --- the file


def write_pairs(file: Path, rows: int) -> None:
    """Write preference pairs, the same ones each time.

    Of a thousand lines, 20 repeat an earlier line, 10 have an earlier prompt and new answers, and
    one is not JSON.
    """
    rng = random.Random(1)
    words = _words(rng, 5_000)

    def text() -> str:
        return " ".join(rng.choices(words, k=rng.randint(10, 60)))

    earlier: list[tuple[str, str]] = []  # prompts and lines to repeat
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(rows):
            chance = rng.random()
            if chance < 0.001:
                line = '{"prompt": "' + text()
            elif chance < 0.021 and earlier:
                line = rng.choice(earlier)[1]
            else:
                prompt = rng.choice(earlier)[0] if chance < 0.031 and earlier else text()
                line = json.dumps({"prompt": prompt, "chosen": text(), "rejected": text()})
                if len(earlier) < 1_000:
                    earlier.append((prompt, line))
                else:
                    earlier[rng.randrange(1_000)] = (prompt, line)
            lines.write(line + "\n")


def _words(rng: random.Random, n: int) -> list[str]:
    return [
        "".join(rng.choices("eeeetttaaooiinnsshhrrdlucmfwypvbgk", k=rng.randint(2, 9)))
        for _ in range(n)
    ]


# --- one process


def prepare(file: str, workers: int | None) -> dict[str, Any]:
    """What a training run does before its first step.

    Returns: rows of each stage; seconds since the libraries are loaded: wall time, CPU time, and by
        phase; peak RSS in bytes of the largest of this process and its workers.
    """
    from hydra import compose, initialize_config_dir

    from rlhf.compose import register
    from rlhf.config.loading import to_typed
    from rlhf.data import load, tokenized
    from rlhf.models.loading import load_tokenizer

    register()
    overrides = [
        "data=jsonl",
        f"data.sources.mine.path={file}",
        f"data.workers={'null' if workers is None else workers}",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        data = to_typed(compose("config", overrides)).data
    tokenizer = load_tokenizer("builtin:tiny", data.template)
    import datasets  # noqa: F401

    print(LIBRARIES, flush=True)
    prompt, response = data.max_prompt_tokens, data.max_response_tokens
    begin, used = time.perf_counter(), cpu_seconds()
    phases: dict[str, float] = {}

    def done(phase: str) -> None:
        phases[phase] = time.perf_counter() - begin - sum(phases.values())

    records = load.load_data(data)
    done("records")
    sft = tokenized.demonstrations(tokenizer, records.sft, prompt, response, data.workers)
    done("sft")
    rm = tokenized.pairs(tokenizer, records.rm, prompt, response, data.workers)
    done("rm")
    ppo = tokenized.prompts(tokenizer, records.ppo, prompt, data.workers)
    done("ppo")
    for rows in (sft, rm, ppo):
        assert len(rows) and rows[len(rows) - 1]
    return {
        "seconds": time.perf_counter() - begin,
        "cpu": cpu_seconds() - used,
        "phases": phases,
        "rows": [len(sft), len(rm), len(ppo)],
        "peak": max(resource.getrusage(who).ru_maxrss for who in SELF_AND_WORKERS)
        * 1024,  # Linux counts kB
    }


def cpu_seconds() -> float:
    """CPU time of this process and of its workers that have ended."""
    usages = [resource.getrusage(who) for who in SELF_AND_WORKERS]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(file: Path, cache: Path, workers: int | None) -> dict[str, Any]:
    """Run `prepare` in a fresh process.

    Returns: its results, and GB of RSS, sampled 20 times a second: `libraries`, when the libraries
        are loaded; `largest`, the peak of the largest of it and its workers; `not_files`, the same
        without pages of files (the cache, the libraries' code), which the kernel may drop;
        `together`, the peak of their sum, in which shared pages count once per process.
    """
    import psutil

    environment = os.environ | {
        "HF_DATASETS_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, __file__, "--child", str(file)]
    command += ["--workers", str(workers)] if workers else []
    errors = cache.with_suffix(".log")
    with errors.open("w", encoding="utf-8") as log:  # the progress bars too
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    peak = {"largest": 0, "together": 0, "not_files": 0}
    ended = threading.Event()

    def watch() -> None:
        top = psutil.Process(child.pid)
        while not ended.wait(0.05):
            sizes, anonymous = [], []
            for process in [top, *_children(top)]:
                try:
                    info = process.memory_info()
                except psutil.Error:  # it has ended
                    continue
                sizes.append(info.rss)
                anonymous.append(info.rss - getattr(info, "shared", 0))
            if sizes:
                peak["largest"] = max(peak["largest"], *sizes)
                peak["not_files"] = max(peak["not_files"], *anonymous)
                peak["together"] = max(peak["together"], sum(sizes))

    assert child.stdout is not None
    watcher = threading.Thread(target=watch)
    watcher.start()
    libraries, answer = 0, ""
    for line in child.stdout:
        if line.strip() == LIBRARIES:
            libraries = psutil.Process(child.pid).memory_info().rss
        answer = line
    code = child.wait()
    ended.set()
    watcher.join()
    if code:
        raise SystemExit(
            f"{errors.read_text(encoding='utf-8')[-4000:]}\n"
            f"the preparation failed with exit code {code}"
        )
    result = json.loads(answer)
    peak["largest"] = max(peak["largest"], result["peak"])
    return result | {key: value / 1e9 for key, value in {**peak, "libraries": libraries}.items()}


def _children(top: Any) -> list[Any]:
    import psutil

    try:
        return top.children(recursive=True)
    except psutil.Error:
        return []


# --- all sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--rows",
        type=int,
        default=2_000_000,
        help="of the largest size; the others are a half and a quarter",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="a directory for the file and the caches, which are deleted; default: a temporary one",
    )
    parser.add_argument(
        "--workers", type=int, help="data.workers; default: one per core, at most 8"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(prepare(given.child, given.workers)))
        return
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    out = Path(tempfile.mkdtemp(prefix="bench-data-", dir=given.out))
    workers = given.workers or min(os.cpu_count() or 1, 8)
    print(f"{os.cpu_count()} cores, {workers} workers; seconds without loading the libraries")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + " ---: |" * len(COLUMNS), flush=True)
    worst, before = 0.0, None
    try:
        write_pairs(out / "all.jsonl", given.rows)
        for rows in (given.rows // 4, given.rows // 2, given.rows):
            file, cache = out / f"pairs-{rows}.jsonl", out / f"cache-{rows}"
            with (
                (out / "all.jsonl").open(encoding="utf-8") as lines,
                file.open("w", encoding="utf-8") as some,
            ):
                some.writelines(islice(lines, rows))
            first = measured(file, cache, given.workers)
            again = measured(file, cache, given.workers)
            worst = max(worst, first["largest"], again["largest"])
            print(line_of(rows, first, again, before), flush=True)
            before = first
            shutil.rmtree(cache)
            file.unlink()
    finally:
        shutil.rmtree(out, ignore_errors=True)
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in first["phases"].items())
    print(f"\nof the last one: {phases}; {given.rows / first['seconds']:,.0f} rows per second")
    print(f"with the libraries loaded a process has {first['libraries']:.2f} GB")
    verdict = "as" if worst < PROMISED else "NOT as"
    print(f"largest process {worst:.2f} GB, {verdict} promised (< {PROMISED:g} GB)")


COLUMNS = ["rows", "seconds", "ratio", "CPU seconds", "ratio", "seconds, cached"]
COLUMNS += ["peak GB, largest one", "not of files", "all together", "cached"]


def line_of(
    rows: int, first: dict[str, Any], again: dict[str, Any], before: dict[str, Any] | None
) -> str:
    """A row of the table. Args: before: `first` of half the size."""
    ratios = [f"{first[key] / before[key]:.2f}" if before else "" for key in ("seconds", "cpu")]
    cells = [f"{rows:,}", f"{first['seconds']:.1f}", ratios[0], f"{first['cpu']:.1f}", ratios[1]]
    cells += [f"{again['seconds']:.1f}"]
    cells += [f"{first[key]:.2f}" for key in ("largest", "not_files", "together")]
    cells += [f"{again['largest']:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

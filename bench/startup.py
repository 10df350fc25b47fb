"""How long a user waits: this code against another revision, in turns.

    python bench/startup.py REVISION [--works first stages demo] [--samples 5] [--wait 60]

Works, each a command of its own in a new folder:

    first     python train.py stage=sft, one step: from Enter to the first optimizer step
    stages    a short pipeline sft, rm, ppo: from the end of a stage to the first step of the next.
              A rollout of ppo is a step; before the first one the policy is evaluated
    demo      python train.py: the whole pipeline, and the same waits in it

Both contestants run one after the other, the first of a pair by turns, each sample in a quiet
moment. Their first runs, which fill the cache of the data, do not count. A sample during which
other programs used more than 0.12 processors is repeated, three times as often at most. Where too
few are left, all count, and the table says so: then only the CPU seconds of whole runs mean
something. Times are in seconds, of the files that a run writes; a ratio below 1 is a gain.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from quiet import FOREIGN, clocks, used_since, wait_for_quiet

ROOT = Path(__file__).resolve().parents[1]
TRIES = 3  # runs for each sample that is wanted, at most
SMALL = ["data.sandbox.demonstrations=64", "data.sandbox.pairs=64", "data.eval_rows=16"]
WORKS = {
    "first": ["stage=sft", "sft.max_steps=1"],
    "stages": [*SMALL, "sft.max_steps=20", "rm.max_steps=20", "rl.max_steps=1"],
    "demo": [],
}
Sample = dict[str, float]  # seconds by what was measured; foreign: processors of other programs


@contextlib.contextmanager
def checked_out(revision: str, folder: Path) -> Iterator[Path]:
    """Another revision of this repository, in a folder that is removed in the end."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def run(code: Path, work: str, root: Path, wait: float) -> Sample:
    """One command, in a quiet moment. Returns: what its files say of the time."""
    root.mkdir()
    wait_for_quiet(wait)
    command = [sys.executable, str(code / "train.py"), *WORKS[work], "wandb.mode=disabled"]
    before, entered = clocks(), time.time()
    with (root / "log").open("w") as log:
        code_ended = subprocess.call(
            command, cwd=root, env=os.environ | {"PYTHONPATH": str(code)}, stdout=log, stderr=log
        )
    ended, used = time.time(), used_since(before)
    if code_ended:
        raise SystemExit(f"{' '.join(command)} failed:\n{(root / 'log').read_text()[-2000:]}")
    runs = {
        path.parent.name.split("-")[0]: path.parent for path in root.glob("outputs/*/summary.json")
    }
    first = {
        stage: json.loads(where.joinpath("metrics.jsonl").read_text().splitlines()[0])["time"]
        for stage, where in runs.items()
    }
    done = {stage: (where / "summary.json").stat().st_mtime for stage, where in runs.items()}
    sample = {f"{work}: Enter to the first step": first["sft"] - entered}
    for stage, after in (("rm", "sft"), ("ppo", "rm")):
        if stage in first:
            sample[f"{work}: end of {after} to the first step of {stage}"] = (
                first[stage] - done[after]
            )
    return sample | {
        f"{work}: the whole command": ended - entered,
        f"{work}: CPU seconds of it": used["own"] * (ended - entered),
        "foreign": used["foreign"],
    }


def measure(codes: dict[str, Path], work: str, out: Path, given: argparse.Namespace) -> str:
    """Samples of one work. Returns: the rows of its table."""
    samples: dict[str, list[Sample]] = {name: [] for name in codes}
    for number in range(1 + TRIES * given.samples):
        names = list(codes) if number % 2 else list(codes)[::-1]
        pair = {}
        for name in names:
            pair[name] = run(codes[name], work, out / f"{work}-{number}-{name}", given.wait)
            shown = ", ".join(f"{key} {value:.2f}" for key, value in pair[name].items())
            print(f"{number} {name}: {shown}", file=sys.stderr, flush=True)
        if number:  # the first pair fills the cache
            for name in codes:
                samples[name].append(pair[name])
        if all(len(quiet(rows)) >= given.samples for rows in samples.values()):
            break
        if number >= given.samples and not given.repeat:
            break
    (out / f"{work}.json").write_text(json.dumps(samples, indent=1) + "\n")
    return rows_of(samples, given.samples)


def quiet(samples: list[Sample]) -> list[Sample]:
    """The samples that no other program disturbed."""
    return [sample for sample in samples if sample["foreign"] < FOREIGN]


def rows_of(samples: dict[str, list[Sample]], wanted: int) -> str:
    """A row for each measured time: median and range of both contestants, and their ratio."""
    is_quiet = all(len(quiet(rows)) >= wanted for rows in samples.values())
    kept = {name: quiet(rows) if is_quiet else rows for name, rows in samples.items()}
    lines = []
    for key in next(iter(kept.values()))[0]:
        if key == "foreign":
            continue
        values = {name: [sample[key] for sample in rows] for name, rows in kept.items()}
        middle = {name: statistics.median(each) for name, each in values.items()}
        cells = [
            f"{middle[name]:.2f} ({min(each):.2f} to {max(each):.2f})"
            for name, each in values.items()
        ]
        other, here = middle.values()
        note = "" if is_quiet else ", busy machine"
        count = f"{min(map(len, values.values()))}{note}"
        lines.append("| " + " | ".join([key, *cells, f"{here / other:.2f}", count]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revision", help="what this code is compared with: a commit, branch or tag")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--samples", type=int, default=5, help="of each contestant")
    wait = "seconds to wait at most, before each run, until other programs are idle"
    parser.add_argument("--wait", type=float, default=60.0, help=wait)
    once = "do not repeat samples that other programs disturbed"
    parser.add_argument("--no-repeat", dest="repeat", action="store_false", help=once)
    given = parser.parse_args()
    out = Path(tempfile.mkdtemp(prefix="bench-startup-"))
    with checked_out(given.revision, out / "other") as other:
        codes = {given.revision: other, "this code": ROOT}
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_CACHE"] = str(out / "cache")
        tables = [measure(codes, work, out, given) for work in given.works]
    print(f"| seconds, median (range) | {given.revision} | this code | ratio | samples |")
    print("|---|---:|---:|---:|---|")
    print("\n".join(tables) + f"\n\nall samples: {out}")


if __name__ == "__main__":
    main()

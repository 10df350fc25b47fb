"""SFT steps with two threads on an idle and on a busy machine, for several settings of OpenMP.

    python bench/busy.py [--spin 300 5000] [--rounds 5]

A thread that waits for another one first spins, then sleeps. Spinning is fast on an idle machine
and wastes the processors of a busy one. Each sample is a training run of the tiny model, a process
of its own; the settings take turns. The rows of the table are

    default            libgomp's own setting
    passive            OMP_WAIT_POLICY=passive: no spinning
    spin N             GOMP_SPINCOUNT=N
    chosen             what `rlhf/runs/environment.py::thread_settings` chooses at the start

All of them are measured on the machine as it is, and beside --busy processes that never sleep. The
losses of all runs must be equal, bit for bit.
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
from collections.abc import Iterator
from pathlib import Path

from driver import ROOT, prepare_run

sys.path.insert(0, str(ROOT))
WARM_UP = 5  # optimizer steps that are not counted
Setting = dict[str, str] | None  # None: chosen by the product
Seconds = dict[str, list[float]]  # per 100 optimizer steps, by setting


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Run `number` processes that never sleep."""
    from rlhf.base.own_processes import end_with_parent

    command = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(command, preexec_fn=end_with_parent) for _ in range(number)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def sample(run_dir: Path, setting: Setting, steps: int) -> tuple[float, list[float]]:
    """Train once. Returns: seconds per 100 optimizer steps, and the loss of every step."""
    from rlhf.runs.environment import SPIN_NAMES

    overrides = ["stage=sft", "deploy.threads=2", "sft.epochs=1000", f"sft.max_steps={steps}"]
    overrides += [f"root={run_dir.parent}", "wandb.mode=disabled", "checkpoint.every_minutes=null"]
    environment = prepare_run(run_dir, overrides)
    if setting is not None:
        for name in SPIN_NAMES:
            environment.pop(name, None)
        environment |= setting
    command = [sys.executable, "-m", "rlhf.worker", str(run_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = [
        json.loads(line)
        for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    took = rows[-1]["time"] - rows[WARM_UP - 1]["time"]
    return 100 * took / (len(rows) - WARM_UP), [row["loss"] for row in rows]


def measure(
    folder: Path, settings: dict[str, Setting], rounds: int, steps: int
) -> tuple[Seconds, set[tuple[float, ...]]]:
    """Let the settings take turns. Returns: their samples, and all different lists of losses."""
    seconds: Seconds = {name: [] for name in settings}
    losses = set()
    for number in range(rounds):
        for name, setting in settings.items():
            run_dir = folder / f"{number}-{name.replace(' ', '-')}"
            took, all_losses = sample(run_dir, setting, steps)
            seconds[name].append(took)
            losses.add(tuple(all_losses))
            print(f"{folder.name} {number + 1}/{rounds} {name}: {took:.2f}", file=sys.stderr)
    return seconds, losses


def cells(samples: list[float], base: list[float]) -> list[str]:
    """Median with range, and the median over that of `base`."""
    middle = statistics.median(samples)
    ratio = middle / statistics.median(base)
    return [f"{middle:.2f} ({min(samples):.2f} to {max(samples):.2f})", f"{ratio:.2f}"]


def table(idle: Seconds, busy: Seconds, number: int) -> str:
    """One row per setting: seconds per 100 steps and the two ratios."""
    lines = [["setting", "idle, s", "/ default", f"{number} busy processes, s", "/ passive"]]
    lines += [["---", "---:", "---:", "---:", "---:"]]
    for name in idle:
        left, right = cells(idle[name], idle["default"]), cells(busy[name], busy["passive"])
        lines.append([name, *left, *right])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spin", type=int, nargs="*", default=[300, 5000], help="spin counts")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each setting")
    parser.add_argument("--steps", type=int, default=105, help="optimizer steps of a sample, idle")
    parser.add_argument("--busy-steps", type=int, default=25, help="the same, busy")
    parser.add_argument("--busy", type=int, default=2, help="processes that never sleep")
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    settings: dict[str, Setting] = {"default": {}, "passive": {"OMP_WAIT_POLICY": "passive"}}
    settings |= {f"spin {n}": {"GOMP_SPINCOUNT": str(n)} for n in given.spin} | {"chosen": None}
    out = Path(tempfile.mkdtemp(prefix="bench-busy-"))
    idle, losses = measure(out / "idle", settings, given.rounds, given.steps)
    with busy_processes(given.busy):
        busy, same = measure(out / "busy", settings, given.rounds, given.busy_steps)
    (out / "result.json").write_text(
        json.dumps({"idle": idle, "busy": busy}, indent=1) + "\n", encoding="utf-8"
    )
    print(f"seconds per 100 optimizer steps of the tiny model, {os.cpu_count()} processors\n")
    print(table(idle, busy, given.busy) + "\n")
    # the learning rate depends on the number of steps, so idle and busy runs are compared apart
    if len(losses) > 1 or len(same) > 1:
        raise SystemExit("the settings change the losses")
    print(f"all losses are equal for all settings; {out}/result.json")


if __name__ == "__main__":
    main()

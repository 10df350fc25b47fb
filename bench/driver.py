"""Starts the contestants and lets them work in turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from quiet import WARM_UP, clocks, quiet_samples, used_since, wait_for_quiet

ROOT = Path(__file__).resolve().parents[1]
TRIES = 3  # times the wanted number of samples, at most
Spec = dict[str, Any]


def write_spec(spec: Spec, label: str) -> Path:
    file = Path(spec["out"]) / f"{label}.json"
    file.write_text(json.dumps(spec), encoding="utf-8")
    return file


def command(role: str, file: Path) -> list[str]:
    return [sys.executable, str(ROOT / "bench" / "run.py"), "--contestant", role, str(file)]


def ask(role: str, spec: Spec) -> dict[str, Any]:
    """What a role that takes no turns says."""
    with (Path(spec["out"]) / f"{role}.log").open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command(role, write_spec(spec, role)), stdout=subprocess.PIPE, stderr=log, text=True
        )
    if done.returncode:
        raise SystemExit(f"{last_lines(Path(log.name))}\n{role} has ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def enter(label: str, role: str, spec: Spec) -> dict[str, Any]:
    """Start a contestant and wait until it is ready."""
    from rlhf.runs.environment import memory_settings, thread_settings

    environment: dict[str, str] = os.environ | {"OMP_NUM_THREADS": str(spec["threads"])}
    if role.startswith("product"):
        wait_for_quiet(spec["wait"])  # thread_settings looks at the load
    if role == "product":
        spec, environment = product_run(label, spec)
    elif role == "product_generate":
        environment |= memory_settings() | thread_settings(spec["threads"])
    elif spec["same_malloc"]:
        environment |= memory_settings()
    log = Path(spec["out"]) / f"{label}.log"
    with log.open("w", encoding="utf-8") as errors:
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
            file.read_text(encoding="utf-8")
            for file in Path(contestant["spec"].get("run_dir", "/nowhere")).glob("error-rank*.txt")
        ]
        why = causes[0] if causes else last_lines(contestant["log"])
        raise SystemExit(
            f"{why}\n{contestant['label']} has ended with {code}; all of it: {contestant['log']}"
        )
    return json.loads(line)


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8").splitlines()[-25:])


def product_run(label: str, spec: Spec) -> tuple[Spec, dict[str, str]]:
    """Prepare a run of the product.

    Returns: the spec with its directory, and the environment of its worker.
    """
    run_dir = Path(spec["out"]) / f"run-{label}"
    return spec | {"run_dir": str(run_dir)}, prepare_run(run_dir, product_overrides(spec))


def prepare_run(run_dir: Path, overrides: list[str]) -> dict[str, str]:
    """Make a run directory as the command line does.

    Returns: the environment that the product's launcher gives the worker.
    """
    from hydra import compose, initialize_config_dir

    from rlhf.base.errors import UserError
    from rlhf.compose import make_command, register
    from rlhf.config.loading import save_config
    from rlhf.runs.directory import config_for_stage
    from rlhf.runs.environment import worker_environments
    from rlhf.runs.inputs import find_inputs

    register()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            command = make_command(compose("config", overrides), overrides)
    except UserError as error:
        raise SystemExit(str(error)) from None
    stage = command.cfg.stage.runs[-1]
    cfg = config_for_stage(command.cfg, stage, find_inputs(command, stage).paths)
    run_dir.mkdir(parents=True)
    save_config(cfg, run_dir / "config.yaml")
    return os.environ | worker_environments(cfg)[0]


def product_overrides(spec: Spec) -> list[str]:
    """The command line of the product for this work."""
    stage = {"ppo-eos": "ppo", "processes": "ppo", "padding": "sft", "vocabulary": "sft"}.get(
        spec["work"], spec["work"]
    )
    node = "rl" if stage == "ppo" else stage
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
    if spec["device"] == "cuda":
        given += ["deploy=single_gpu"]
    given += [f"deploy.threads={spec['threads']}", f"deploy.precision={spec['precision']}"]
    given += [f"deploy.micro_batch={batch}", f"deploy.eval_micro_batch={batch}"]
    given += [
        f"{node}.{key}"
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
    """Let all contestants work in turns, then end them.

    They work until each has `samples` quiet samples, or at most TRIES times that number. In a turn
    of more than one sample the first one does not count: it follows the other's turn and a pause.
    """
    turn = contenders[0]["spec"]["turn"]
    for number in range(0, WARM_UP + TRIES * samples, turn):
        for each in contenders:
            wait_for_quiet(each["spec"]["wait"])
            for place in range(turn):
                before = clocks()
                sample = tell(each, "go")
                follows = place > 0 or turn == 1
                each["samples"].append(sample | used_since(before) | {"counts": follows})
        tokens = {each["label"]: [one["tokens"] for one in each["samples"]] for each in contenders}
        if len(set(map(tuple, tokens.values()))) > 1:
            raise SystemExit(
                f"after sample {number} the work is not the same for all, real tokens: {tokens}"
            )
        if all(len(quiet_samples(each)) >= samples for each in contenders):
            break
    for each in contenders:
        each |= tell(each, "stop")
        each["process"].wait()

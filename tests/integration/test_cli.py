"""The command line: quick answers, and one clear line for everything that is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO, SMALL, TRAIN, Demo, some, summary, train


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


WRONG = [
    (
        ["stage=pppo"],
        "stage=pppo: no such option (did you mean ppo?)",
    ),
    (
        ["data=jsonl", "data.sources.mine.path=x", "data.sandbox.pairs=3"],
        "data.sandbox.pairs=3: its node is null here and has no keys; remove it, or choose",
    ),
    (["data=jsonl"], "data.sources.mine.path has no value: give one"),
    (["actor=opt1b"], "actor=opt1b: no such option (did you mean opt"),
    (["-m", "actor=tiny,nope"], "actor=nope: no such option"),
    (["ppo.lrr=1"], "unknown key ppo.lrr (did you mean rl.lr?)"),
    (["+ppo.x=1"], "unknown key ppo.x"),
    (["stagee=ppo"], "unknown key stagee (did you mean stage?)"),
    (["kl.coef=0.1"], "unknown key kl.coef (did you mean rl.kl.coef?)"),
    (["rl.lr=abc"], "rl.lr=abc: must be a number"),
    (
        ["deploy.precision=fp8"],
        "deploy.precision=fp8: must be one of fp32, bf16, fp16, autocast",
    ),
    (["rl.lr=[1"], "cannot read 'rl.lr=[1'"),
    (["actor.path=/nowhere"], "actor.path=/nowhere: no model there"),
    (["actor.path=outputs/no/where"], "actor.path=outputs/no/where: no model there"),
    (["reward.path=./nowhere"], "reward.path=./nowhere: no model there"),
    (["rl.rewards.model.path=./nowhere"], "rl.rewards.model.path=./nowhere: no model there"),
    (
        ["+rl.rewards={mine: {function: 'nowhere:f'}}"],
        "rl.rewards.mine.function=nowhere:f: there is no module nowhere, neither here (",
    ),
    (
        ["+rl.rewards={mine: {weigth: 1}}"],
        "rl.rewards.mine.weigth (did you mean rl.rewards.mine.weight?)",
    ),
    (["rollout.top_p=0.9"], "rollout.top_p=0.9: must be 1 in training"),
    (
        ["actor.path=builtin:huge"],
        "actor.path=builtin:huge: no such built-in model; use builtin:tiny",
    ),
    (
        ["rl.batch_size=30"],
        "rl.batch_size=30 (responses): must be a multiple of rl.responses_per_prompt=1 and of "
        "rl.minibatches=4 x deploy.processes_per_node=1 = 4; try rl.batch_size=32",
    ),
    (
        ["deploy.processes_per_node=3"],
        "rm.batch_size=8: not divisible by deploy.processes_per_node=3; try 9",
    ),
    (["deploy=single_gpu"], "this machine shows 0 NVIDIA GPUs: use deploy=cpu"),
    (["-m", "rl.kl.coef=0.1,-1"], "rl.kl.coef=-1.0: must be at least 0"),
    (
        ["stage=ppo", "seed=77"],
        f"{TRAIN} stage=sft seed=77  or give rl.actor=",
    ),
    (
        ["stage=ppo", "seed=77"],
        f"{TRAIN} stage=rm seed=77  or give rl.reward=",
    ),
    (
        ["data.max_prompt_tokens=500"],
        "data.max_response_tokens=64 is more than the 512 positions of builtin:tiny",
    ),
    (["data.eval_rows=257"], "sandbox are held out; give at most 256"),
    (["sft.epochs=1,2"], "sft.epochs=1,2: several values are a sweep: add -m"),
    (
        ["data.sources.mine.path=pairs.jsonl"],
        "data=jsonl data.sources.mine.path=FILE",
    ),
]


@pytest.mark.parametrize("overrides, expected", some(WRONG, every=3))
def test_bad_input_gets_one_clear_line(overrides: list[str], expected: str, tmp_path: Path) -> None:
    done = train(*overrides, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode not in (0, None)
    assert any(expected in line for line in lines(done)), done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_reward_model_is_no_actor(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"architectures": ["OPTForSequenceClassification"]})
    )
    done = train(f"actor.path={model}", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "this is OPTForSequenceClassification, not a causal language model" in done.stderr
    )
    (model / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))
    done = train("stage=ppo", f"rl.reward={model}", f"rl.actor={model}", cwd=tmp_path)
    assert (
        done.returncode == 2 and "rl.reward" in done.stderr and "not a reward model" in done.stderr
    )


def test_gpus_are_asked_for_only_when_workers_start(tmp_path: Path) -> None:
    done = train(
        "stage=ppo",
        "actor=opt1.3b",
        "deploy=single_gpu",
        "--cfg",
        "job",
        cwd=tmp_path,
        CUDA_VISIBLE_DEVICES="",
    )
    assert (
        done.returncode == 0
        and "facebook/opt-1.3b" in done.stdout
        and "facebook/opt-350m" in done.stdout
    )


@pytest.mark.parametrize("args", [["--help"], ["ppo.lrr=1"], ["--cfg", "job"]])
def test_answers_come_at_once(args: list[str], tmp_path: Path) -> None:
    """Promised: under 1 s of computing; asserted: 3 s, as machines differ.

    Waiting does not count, as other tests run at the same time.
    """

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = used()
    done = train(*args, cwd=tmp_path)
    seconds = used() - before
    print(f"{args}: {seconds:.2f} s")
    assert done.stdout or done.stderr
    assert seconds < 3


def test_tab_completion(tmp_path: Path) -> None:
    def complete(line: str) -> str:
        env = os.environ | {"COMP_LINE": line, "COMP_POINT": str(len(line))}
        command = [sys.executable, str(REPO / "train.py"), "-sc", "query=bash"]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True).stdout

    started = time.time()
    assert {"stage=sft", "stage=rm", "stage=ppo", "stage=pipeline"} <= set(
        complete("python train.py stage=").split()
    )
    assert time.time() - started < 3
    assert "rl.kl.coef=" in complete("python train.py rl.kl.")
    assert complete("python train.py rl.kl.controller=a").split() == ["rl.kl.controller=adaptive"]


def test_help_shows_groups_and_keys(tmp_path: Path) -> None:
    done = train("--help", cwd=tmp_path)
    assert done.returncode == 0
    groups = dict(re.findall(r"^  (\w+) {2,}(.*)$", done.stdout, re.MULTILINE))
    assert {"bloom-1b1", "custom", "tiny"} <= set(groups["actor"].split(", "))
    assert {"dpo", "eval", "grpo", "inspect", "pipeline"} <= set(groups["stage"].split(", "))
    assert "python train.py -m" in done.stdout
    one = train("--help", "rl.missing_eos_penalty", cwd=tmp_path).stdout
    assert "rl.missing_eos_penalty" in one and "value: 1.0" in one


def test_a_python_without_the_dependencies_is_told_where_they_are(tmp_path: Path) -> None:
    """-S: no site-packages."""
    command = [sys.executable, "-S", str(REPO / "train.py"), "stage=inspect"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: No module named") and line.endswith(".venv/bin/activate")


def test_torchrun_is_sent_away(tmp_path: Path) -> None:
    done = train(cwd=tmp_path, RANK="0")
    assert done.returncode == 2 and "it starts its workers" in done.stderr


# ------------------------------------------------------------------------------------ the whole run


def test_the_table_and_where_things_lie(demo: Demo) -> None:
    for word in (
        "held-out perplexity",
        "held-out accuracy",
        "│ score ",
        "gold reward",
        "KL, nats per response",
        "length, tokens",
    ):
        assert word in demo.stdout
    for run in (demo.sft, demo.rm, demo.ppo):
        assert run.name in demo.stdout
        for file in (
            "config.yaml",
            "env.json",
            "train.log",
            "metrics.jsonl",
            "samples.jsonl",
            "summary.json",
            "curves.png",
            "model",
        ):
            assert (run / file).exists(), file
        log = (run / "train.log").read_text()
        assert " s left" in log and ("  loss " in log or "  score " in log)
    assert (demo.ppo / "critic" / "model.safetensors").exists()
    assert (demo.ppo / "rollouts.jsonl").exists() and (demo.ppo / "frontier.png").exists()
    assert not (demo.ppo / "model_ema").exists() and not (demo.ppo / "model_best").exists(), (
        "not asked for"
    )


def test_finished_stages_are_recognised_at_once(demo: Demo) -> None:
    before = (demo.ppo / "summary.json").read_text()
    started = time.time()
    done = train(cwd=demo.root)
    seconds = time.time() - started
    print(f"second run: {seconds:.1f} s")
    assert done.returncode == 0 and done.stderr.count("finished,") == 3
    assert (demo.ppo / "summary.json").read_text() == before
    assert seconds < 15  # promised: 5


def test_outputs_are_made_where_the_command_runs_or_where_it_is_told(
    demo: Demo, tmp_path: Path
) -> None:
    assert "finished," in train("stage=sft", cwd=tmp_path, RLHF_ROOT=str(demo.root)).stderr
    assert "finished," in train("stage=sft", f"root={demo.root}", cwd=tmp_path).stderr
    assert not list(tmp_path.iterdir())


def test_a_stage_whose_parent_runs_have_changed_is_refused(demo: Demo, tmp_path: Path) -> None:
    """Retraining SFT under a finished PPO run must not pass unseen."""
    shutil.copytree(demo.root / "outputs", tmp_path / "outputs", symlinks=True)
    sft = tmp_path / "outputs" / demo.sft.name
    changed = json.loads((sft / "summary.json").read_text()) | {"id": "another"}
    (sft / "summary.json").write_text(json.dumps(changed))
    done = train("stage=ppo", cwd=tmp_path)
    assert (
        done.returncode == 2
        and "was trained from other runs or files than there are now (changed: sft)" in done.stderr
        and "fresh=true" in done.stderr
    )


def test_given_inputs_are_used(demo: Demo, tmp_path: Path) -> None:
    """A run directory or a model directory in place of what the configuration would derive."""
    done = train(
        "stage=ppo",
        f"rl.actor={demo.sft}",
        f"rl.reward={demo.rm / 'model'}",
        *SMALL,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    parents = json.loads((run / "summary.json").read_text())["parents"]
    assert parents == {"sft": summary(demo.sft)["id"], "rm": summary(demo.rm)["id"]}


def test_texts_longer_than_the_context_are_refused_with_the_numbers(
    demo: Demo, tmp_path: Path
) -> None:
    """Those of PPO's pretraining loss; the built-in model has 512 positions."""
    words = [
        "tea",
        "rice",
        "soup",
        "bread",
        "salt",
        "milk",
        "corn",
        "fish",
        "plum",
        "leek",
        "oats",
        "beef",
    ]
    pairs = [
        {"prompt": f"May I have {a} and {b}?", "chosen": f"Yes, {a}.", "rejected": "No."}
        for a in words
        for b in words
    ]
    for name, rows in (
        ("pairs", pairs),
        ("texts", [{"text": f"{a}, {b}. " * 200} for a in words for b in words]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        "data=jsonl",
        "data.sources.mine.path=pairs.jsonl",
        "data.eval_share=0.2",
        "+data.sources={texts: {path: texts.jsonl}}",
    ]
    small = [o for o in SMALL if "sandbox" not in o]
    ptx = ["rl.ptx.coef=1", "rl.ptx.max_tokens=600"]
    done = train(
        "stage=ppo",
        f"rl.actor={demo.sft}",
        f"rl.reward={demo.rm}",
        *data,
        *small,
        *ptx,
        cwd=tmp_path,
    )
    assert done.returncode == 2 and any(
        "rl.ptx.max_tokens=600" in line and "512 positions" in line for line in lines(done)
    ), done.stderr

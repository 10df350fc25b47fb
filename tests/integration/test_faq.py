"""docs/faq.md: what it quotes is what is printed. `…` in a quoted line stands for any text."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import REPO, SLOW, command, composed, register, running, train

from rlhf import arguments, cli, run
from rlhf.base.errors import UserError
from rlhf.base.log import say
from rlhf.config import keys
from rlhf.data.load import open_data
from rlhf.models.loading import check_context
from rlhf.rewards import functions
from rlhf.rewards.process import RewardProcess, Spec
from rlhf.rewards.trial import try_functions
from rlhf.rl.monitor import warnings_of
from rlhf.runs.launch import first_failure

PAGE = (REPO / "docs" / "faq.md").read_text()
MINE = "data=jsonl data.sources.mine.path=docs/examples/pairs.jsonl"
REWARD = "rl.rewards.mine.function=my_rewards"
FUNCTIONS = """
def few(response): return [1.0]
def correct(completions, answer): return [float(a in c) for a, c in zip(answer, completions)]
def word(completions): return ["good"] * len(completions)
"""


def entries() -> dict[str, str]:
    """The quoted line of each entry that has one, by title."""
    found = re.findall(r"^### (.+)\n\n```text\n(.+)\n```$", PAGE, re.MULTILINE)
    assert len(found) == PAGE.count("```text")
    return dict(found)


def occurs(quoted: str, printed: str) -> bool:
    """Where the current folder is not the checkout, a command names the folder of the script."""
    printed = re.sub(rf"'?{re.escape(str(REPO))}/(\w+\.py)'?", r"\1", printed)
    return re.search(".*".join(map(re.escape, quoted.split("…"))), printed) is not None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user works, with files that are wrong in one way each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
    (tmp_path / "docs").symlink_to(REPO / "docs")
    (tmp_path / "my_rewards.py").write_text(FUNCTIONS)
    rows = {
        "other": [{"question": f"Q {i}?", "good": f"A {i}", "bad": "no"} for i in range(40)],
        "same": [
            {"prompt": "Write a joke.", "chosen": f"A {i}", "rejected": "no"} for i in range(40)
        ],
        "long": [{"prompt": "Q", "chosen": "A" * 2**20, "rejected": "no"}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "Q", "chosen": "A"}\n{"prompt"\n')
    return tmp_path


# ------------------------------------------------------------------------------- without a worker


def parent(overrides: str) -> str:
    """What `python train.py OVERRIDES` prints, where it ends before a worker starts."""
    args = shlex.split(overrides)
    register()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            if problems := [line for arg in args for line in arguments.explain(arg)]:
                raise UserError("\n".join(problems))
            run.run_command(command(*args))
        except UserError as error:
            for line in cli.lines_of(error):
                say(f"error: {line}")
    return printed.getvalue()


def refused(stage: str, what: Callable[[], object]) -> str:
    """The line for an error that a worker of this stage would report."""
    with pytest.raises(UserError) as error:
        what()
    return f"error: {stage}: {error.value}"


def reading(overrides: str) -> str:
    """The line for data that the worker of stage=sft cannot read."""
    cfg = composed("stage=sft", *shlex.split(overrides))
    return refused("sft", lambda: open_data(cfg, Path.cwd()))


def launched_by_torchrun() -> str:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        patch.setenv("RANK", "0")
        cli.dispatch(["stage=sft"])
    return f"error: {error.value}"


def without_gpus(overrides: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        return parent(overrides)


def few_prompts() -> str:
    from rlhf.stages.rl import count_rollouts

    cfg = composed("stage=ppo", "rl.batch_size=128", *MINE.split())
    data = open_data(cfg, Path.cwd())
    return refused("ppo", lambda: count_rollouts(cfg, data, 86))


def function_of(name: str) -> str:
    key = f"{REWARD}:{name}"
    return refused("ppo", lambda: functions.load_function(f"my_rewards:{name}", {}, key))


def scored_by(name: str) -> str:
    from rlhf.data.records import Dataset, Prompt, Turn

    process = RewardProcess({"mine": Spec(f"{REWARD}:{name}", f"my_rewards:{name}")})
    data = Dataset(None, None, None, [], [], [Prompt([Turn("user", "Why?")])])
    try:
        return refused("ppo", lambda: try_functions(process, data))
    finally:
        process.close()


def warned(**last: float) -> str:
    """The warnings of rollouts, all alike, with other values in the last ones."""
    usual = {
        "objective/kl": 3.0,
        "objective/kl_per_token": 0.1,
        "objective/eos_rate": 1.0,
        "objective/scores": 0.0,
        "objective/kl_coef": 0.1,
        "policy/entropy_avg": 2.0,
        "val/explained_variance": 0.5,
    }
    late = {key.replace("__", "/"): value for key, value in last.items()}
    number = {"val/explained_variance": 10, "objective/scores": 8}.get(next(iter(late)), 1)
    rows = [usual] * 8 + [usual | late] * number
    return "\n".join(f"{title}: {text}" for title, text in warnings_of(rows))


def program(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


QUICK: dict[str, Callable[[], str]] = {
    "Unknown key": lambda: parent("rl.kl.coeff=0.1"),
    "My option file is not found": lambda: parent("experiment=first"),
    "data=jsonl was forgotten": lambda: parent("data.sources.mine.path=pairs.jsonl"),
    "A stage needs another one first": lambda: parent(f"stage=ppo {MINE}"),
    "The batch does not fit the number of processes": lambda: parent("rl.batch_size=30"),
    "top_p in training": lambda: parent("rollout.top_p=0.9"),
    "Started with torchrun or deepspeed": launched_by_torchrun,
    "My data are not recognised": lambda: reading("data=jsonl data.sources.mine.path=other.jsonl"),
    "My file is not there": lambda: parent(
        "stage=sft data=jsonl data.sources.mine.path=nowhere.jsonl"
    ),
    "A line cannot be read": lambda: reading(
        "data=jsonl data.sources.mine.path=broken.jsonl data.on_bad_row=refuse"
    ),
    "A row is too long, or a file unpacks to too much": lambda: reading(
        "data=jsonl data.sources.mine.path=long.jsonl data.max_row_mb=1"
    ),
    "All rows have one prompt": lambda: reading("data=jsonl data.sources.mine.path=same.jsonl"),
    "Too few rows for a rollout": few_prompts,
    "The model directory is not found": lambda: parent(
        "stage=sft actor=custom actor.path=/models/mine"
    ),
    "The model has no chat template": lambda: parent("stage=sft data.template=tokenizer"),
    "Prompt and answer are longer than the model's context": lambda: refused(
        "sft", lambda: check_context("builtin:tiny", 600, 64)
    ),
    "The function does not exist": lambda: parent(f"stage=ppo {REWARD}:shrt"),
    "The function has the wrong parameters": lambda: function_of("few"),
    "The function wants a column that is not there": lambda: scored_by("correct"),
    "The function fails, or returns no number": lambda: scored_by("word"),
    "KL blow-up": lambda: warned(objective__kl=30.0),
    "Entropy collapse": lambda: warned(policy__entropy_avg=0.1),
    "The critic is broken: negative explained variance": lambda: warned(
        val__explained_variance=-0.2
    ),
    "Responses never end": lambda: warned(objective__eos_rate=0.0),
    "The score rises, the quality falls: reward hacking": lambda: warned(
        objective__scores=1.0, objective__kl=20.0
    ),
    "Where are my results?": lambda: program("-m", "rlhf.report", "nowhere"),
    "chat.py finds no policy": lambda: program(str(REPO / "chat.py")),
    "Out of memory, found before it starts": lambda: parent(
        "stage=ppo actor=opt13b deploy=single_gpu plan=true"
    ),
    "Out of memory, or killed, while it runs": lambda: (
        "error: sft failed, "
        + first_failure({"rank 0": -signal.SIGKILL}, Path.cwd())
        + "; the log is train.log"
    ),
    "No GPU is found": lambda: without_gpus("stage=sft actor=opt125m deploy=single_gpu"),
}


@pytest.mark.parametrize("title", QUICK)
def test_the_line_is_what_is_printed(title: str, folder: Path) -> None:
    printed = QUICK[title]()
    assert occurs(entries()[title], printed), printed


# ---------------------------------------------------------------------------------- with a worker


TINY = f"stage=sft {MINE} data.eval_share=0.2 sft.max_steps=2 deploy.threads=1 wandb.mode=disabled"
WORKERS = {  # the last command is the one that prints the line
    "All prompts are too long": [f"{TINY} data.max_prompt_tokens=3"],
    "The hub does not answer": [TINY.replace("docs/examples/pairs.jsonl", "Nobody/nothing")],
    "LoRA layers of another architecture": [
        f"{TINY} actor.lora.rank=4 'actor.lora.targets=[q]'",
    ],
    "Responses may not end": [TINY],
    "Online without a key": [TINY.replace("mode=disabled", "mode=online")],
    "The command only prints an old result": [TINY, TINY],
    "A run was trained from other runs": [
        TINY,
        DPO := TINY.replace("stage=sft", "stage=dpo dpo.max_steps=1"),
        f"{TINY} fresh=true",
        DPO,
    ],
    "A job of a sweep failed": [f"-m {TINY.replace('stage=sft', 'stage=ppo')} seed=7,8"],
    "Ports and NCCL": [f"{TINY} deploy.nodes=2 deploy.node_rank=0 deploy.master=127.0.0.1:PORT"],
}


@pytest.mark.full
@pytest.mark.parametrize("title", WORKERS)
def test_the_line_of_a_worker_is_what_is_printed(title: str, folder: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for line in WORKERS[title]:
            args = shlex.split(line.replace("PORT", str(taken.getsockname()[1])))
            offline = {"HF_HUB_OFFLINE": "1", "WANDB_API_KEY": "", "NETRC": str(folder / "none")}
            done = train(*args, cwd=folder, **offline)
    assert occurs(entries()[title], done.stdout + done.stderr), done.stderr


@pytest.mark.full
def test_the_lines_about_a_run_that_was_interrupted(folder: Path) -> None:
    first, _ = running(*SLOW, "sft.max_steps=400", cwd=folder)
    second = train(*SLOW, "sft.max_steps=400", cwd=folder)
    assert occurs(entries()["A run is locked"], second.stderr), second.stderr
    first.send_signal(signal.SIGINT)
    printed = first.communicate(timeout=60)[1]
    assert occurs(entries()["Interrupted: how to resume"], printed), printed
    other = train(*SLOW, "sft.max_steps=400", "deploy.processes_per_node=2", cwd=folder)
    title = "Another number of processes than the checkpoint"
    assert occurs(entries()[title], other.stderr), other.stderr


# what other tests provoke, with parts of the line that they check
ELSEWHERE = {
    "The disk is full": ("test_checkpoints.py", "is the disk full?"),
    "NaN": ("test_checkpoints.py", "that is not finite is"),
    "A checkpoint or a model is damaged": ("test_checkpoints.py", "the one before it is used"),
    "A run hangs": ("test_watchdog.py", "(deploy.watchdog_minutes"),
}


def test_every_quoted_line_is_provoked() -> None:
    of_a_run = re.findall(r'entries\(\)\["(.+?)"\]|^    title = "(.+)"$', SOURCE, re.MULTILINE)
    titles = {title for pair in of_a_run for title in pair if title}
    assert {*entries()} == titles | {*QUICK} | {*WORKERS} | {*ELSEWHERE}
    for title, (file, part) in ELSEWHERE.items():
        assert part in (REPO / "tests" / "integration" / file).read_text()
        assert part in entries()[title]
    assert PAGE.count("\n### ") >= 40


SOURCE = Path(__file__).read_text()
NODES = "actor|reward|data|sft|rm|rl|dpo|eval|rollout|deploy|checkpoint|wandb"
KEY = re.compile(rf"\b(?:{NODES})(?:\.[a-z_]+)+")


@pytest.mark.parametrize("page", ["tutorial.md", "faq.md", "scope.md"])
def test_the_keys_that_the_pages_name_exist(page: str) -> None:
    text = (REPO / "docs" / page).read_text()
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    files = {name for name in KEY.findall(code) if Path(name).suffix in (".md", ".json", ".jsonl")}
    named = {*KEY.findall(code)} - files
    assert [key for key in sorted(named) if not keys.find_key(key)] == []

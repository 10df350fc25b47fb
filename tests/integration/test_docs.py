"""Every command of README and docs runs; with a GPU or hub model it is planned (`plan=true`)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from helpers import (
    REPO,
    SMALL,
    SWEEP,
    VLLM,
    Demo,
    composed,
    page_commands,
    some,
    train,
    undocumented,
)

from rlhf.config.deployment import world_size
from rlhf.config.validation import check_config
from rlhf.planning.formulas import GIB
from rlhf.planning.memory import make_plan

SLURM = "sbatch docs/slurm.sh"

# but the tutorial, whose commands run in their order: test_tutorial.py
PAGES = [REPO / "README.md", *sorted({*(REPO / "docs").glob("*.md")} - {REPO / "docs/tutorial.md"})]
COMMANDS = list(dict.fromkeys(command for page in PAGES for command in page_commands(page)))
OF_README = page_commands(PAGES[0])
FAR = re.compile(
    r"opt\d|_gpu|_node|data='?\[|data=(?!jsonl|arithmetic)"
)  # needs a GPU, or a model from the hub


def test_the_readme_is_short_and_has_commands() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 250
    assert len(COMMANDS) >= 15 and SWEEP in COMMANDS
    known = (
        "python train.py",
        "python chat.py",
        "python -m rlhf.report",
        "python -m rlhf.app",
        "python -m rlhf.planning",  # test_what_fits.py
        "python docs/optuna_search.py",
        "make ",
        SLURM,
    )
    assert all(command.startswith(known) for command in COMMANDS)


RUN_BY_MAKE = {
    "make demo": "train.py",
    "make test": "pytest",
    "make app": "rlhf.app",
    "make setup-vllm": "",  # nothing where it is done
}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets(command: str) -> None:
    """What they run is what the other tests run; here, that they exist and are set up."""
    done = subprocess.run([*shlex.split(command), "-n"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and RUN_BY_MAKE[command] in done.stdout


LONG = re.compile(
    "experiment|deploy.processes_per_node|epochs|every_minutes|-m |pipeline=|stage=eval|dschat"
    "|evaluation.every"
)
TRAINING = [c for c in COMMANDS if c.startswith("python train.py") and c != SWEEP]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the commands' runs: commands with the same SFT and reward model share them."""
    return tmp_path_factory.mktemp("commands")


RARE = [c for c in TRAINING if LONG.search(c) or c not in OF_README]


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.full if c in RARE else []) for c in TRAINING]
)
def test_training_commands(command: str, tmp_path: Path, shared: Path) -> None:
    args = shlex.split(
        command.replace("/models/mine", shlex.quote(str(REPO / "rlhf/assets/tiny")))
    )[2:]
    args = [re.sub(r"max_steps=\d+$", "max_steps=2", arg) for arg in args]
    if "vllm" in command:
        if not VLLM.exists():
            pytest.skip(f"no {VLLM}: make setup-vllm installs it")
        args = [arg.replace(".venv-vllm/bin/vllm", str(VLLM)) for arg in args]
    rows = [
        {"prompt": f"May I have dishes {a} and {b}?", "chosen": f"Yes, {a}.", "rejected": "No."}
        for a in range(14)
        for b in range(14)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    others = [row | {"prompt": f"{row['prompt']} Please!"} for row in rows]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    (tmp_path / "docs").symlink_to(REPO / "docs")  # its examples
    own_model = tmp_path / "my_options" / "model" / "mine.yaml"
    own_model.parent.mkdir(parents=True)
    own_model.write_text(f"name: mine\npath: {REPO / 'rlhf/assets/tiny'}\n")
    if FAR.search(command) and "--cfg" not in args:
        done = train(*args, *[] if "plan=true" in args else ["plan=true"], cwd=tmp_path)
        assert "fits" in done.stdout
    elif "--help" in args or "--cfg" in args:
        done = train(*args, cwd=tmp_path)
    else:
        other_data, world = "data=jsonl" in args, "arithmetic" in command
        small = [o for o in SMALL if o.split("=")[0] not in command]
        if other_data or world:  # without the sizes of the sandbox
            small = [o for o in small if "sandbox" not in o]
        if world:
            small += ["data.arithmetic.demonstrations=64", "data.arithmetic.pairs=64"]
        root = tmp_path if other_data else shared
        if "stage=dpo" in args:
            assert train("stage=sft", *small, cwd=tmp_path, RLHF_ROOT=str(root)).returncode == 0
        if "stage=ppo" in args:  # with options of its parents, which no other command trains
            others = [arg for arg in args if not arg.startswith(("stage=", "rl="))]
            for parent in ("sft", "rm"):
                made = train(f"stage={parent}", *others, *small, cwd=tmp_path, RLHF_ROOT=str(root))
                assert made.returncode == 0, made.stderr
        if "stage=eval" in args:  # it needs the runs that it evaluates
            ends = [arg for arg in args if arg.startswith(("pipeline=", "data=arithmetic"))]
            assert train(*ends, *small, cwd=tmp_path, RLHF_ROOT=str(root)).returncode == 0
        done = train(
            *args, *small, *["data.eval_share=0.2"] * other_data, cwd=tmp_path, RLHF_ROOT=str(root)
        )
    assert done.returncode == 0, done.stderr


SRUN = """#!/bin/bash
# replaces SLURM's srun: two nodes, both this machine
shift
for SLURM_NODEID in 1 0; do export SLURM_NODEID SLURM_NNODES=2; "$@" & done
wait %1 && wait %2
"""


def test_a_slurm_job_that_is_queued_again_does_not_begin_anew(tmp_path: Path) -> None:
    for name, text in (("srun", 'shift 4; printf "%s|" "$@"'), ("hostname", "echo 127.0.0.1")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    job = ["bash", str(REPO / "docs" / "slurm.sh"), "stage=sft", "fresh=true", "a='b c'"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    first = subprocess.run(job, env=path, capture_output=True, text=True, check=True)
    assert first.stdout == "train|stage=sft|fresh=true|a='b c'|"
    again = path | {"SLURM_RESTART_COUNT": "1"}
    second = subprocess.run(job, env=again, capture_output=True, text=True, check=True)
    assert second.stdout == "train|stage=sft|a='b c'|"


@pytest.mark.full
def test_the_slurm_job(tmp_path: Path) -> None:
    assert [c for c in COMMANDS if c.startswith(SLURM)] == [
        f"{SLURM} stage=ppo actor=opt66b deploy=multi_node"
    ]
    (tmp_path / "train.py").symlink_to(REPO / "train.py")
    for name, text in (("srun", SRUN), ("hostname", "#!/bin/bash\necho 127.0.0.1\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = ["bash", str(REPO / "docs" / "slurm.sh"), "stage=sft", *SMALL]
    done = subprocess.run(
        job,
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "sft: node 1 of 2" in done.stderr
    (run,) = (tmp_path / "outputs").iterdir()
    assert "nodes: 2" in (run / "config.yaml").read_text() and (run / "summary.json").exists()


def test_the_plans_in_the_docs_are_those_of_the_code() -> None:
    page = (REPO / "docs" / "deployment.md").read_text()
    rows = re.findall(
        r"^\| (opt\S+), (\w+) \| (\d+) \| ([\d.]+) \| (\w+) \| ([\d.]+) \|$", page, re.MULTILINE
    )
    assert len(rows) == 3
    for actor, deploy, gpus, states, fullest, peak in rows:
        cfg = composed("stage=ppo", f"actor={actor}", f"deploy={deploy}")
        made = make_plan(cfg, "ppo")
        assert (world_size(cfg), made.fullest) == (int(gpus), fullest)
        assert (
            f"{(made.states - made.libraries) / GIB:.2f} {made.peak / GIB:.2f}"
            == f"{states} {peak}"
        )
        for note in made.notes:
            assert " ".join(re.findall(r"[\d.]+ GiB", note)) in page


@pytest.mark.parametrize(
    "command", some([c for c in COMMANDS if c.startswith("python chat.py")], every=3)
)
def test_chat_commands(command: str, demo: Demo) -> None:
    args = [sys.executable, str(REPO / "chat.py"), *shlex.split(command)[2:]]
    done = subprocess.run(
        args,
        cwd=demo.root,
        env=os.environ,
        input="Hello there\n/quit\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def link_demo(folder: Path, demo: Demo) -> None:
    """Make a folder with the demo's runs, and a sweep of one of them."""
    (folder / "outputs").symlink_to(demo.root / "outputs")
    job = folder / "multirun" / "kl_study" / "job"
    job.mkdir(parents=True)
    (job / "overrides.txt").write_text("")
    (job / "run").symlink_to(demo.ppo)


REPORTS = [c for c in COMMANDS if c.startswith("python -m rlhf.report")]


@pytest.mark.parametrize("command", [c for c in REPORTS if "--watch" not in c])
def test_report_commands(command: str, demo: Demo, tmp_path: Path) -> None:
    link_demo(tmp_path, demo)
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


@pytest.mark.parametrize("command", [c for c in REPORTS if "--watch" in c])
def test_commands_that_watch(command: str, demo: Demo, tmp_path: Path) -> None:
    link_demo(tmp_path, demo)
    watching = subprocess.Popen(
        [sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    page, deadline = tmp_path / "report.html", time.time() + 60
    while not page.exists() or not page.stat().st_size:
        assert time.time() < deadline and watching.poll() is None
        time.sleep(0.1)
    assert '<meta http-equiv="refresh" content="10">' in page.read_text()
    watching.send_signal(signal.SIGINT)
    _, stderr = watching.communicate(timeout=60)
    assert watching.returncode == 0 and "complete" in stderr, stderr
    assert 'http-equiv="refresh' not in page.read_text()


@pytest.mark.full
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python -m rlhf.app")])
def test_app_commands(command: str, demo: Demo, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the extra `app` is not installed")
    from app_browser import open_app

    folders = [tmp_path / name for name in ("here", "project", "other_project")]
    for folder in folders:
        folder.mkdir()
        link_demo(folder, demo)
    args = shlex.split(command)[3:]
    with open_app(folders[0], *args, "--port", "0") as address:
        port = address.partition("//")[2].partition("/")[0].rpartition(":")[2]
        path = address.partition("//")[2].partition("/")[2]
        answer = httpx.get(f"http://127.0.0.1:{port}/{path}", follow_redirects=True, timeout=60)
        assert answer.status_code == 200 and "gradio" in answer.text
        if "--host" in args:
            assert path.startswith("?token=") and "token=" not in str(answer.url)
            assert httpx.get(f"http://127.0.0.1:{port}/", timeout=60).status_code == 403


@pytest.mark.full
def test_the_search(tmp_path: Path) -> None:
    (command,) = [c for c in COMMANDS if "optuna" in c]
    script, *args = shlex.split(command.replace("20", "2"))[1:]
    search = [sys.executable, str(REPO / script), *args, *SMALL]
    done = subprocess.run(search, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "'rl.kl.coef'" in done.stdout, done.stderr
    assert (
        len([*(tmp_path / "outputs").glob("ppo-*")]) == 2
        and len([*(tmp_path / "outputs").glob("sft-*")]) == 1
    )


def test_the_chinese_readme_has_the_same_commands_links_and_numbers() -> None:
    english, chinese = ((REPO / name).read_text() for name in ("README.md", "README.zh.md"))
    for pattern in (r"```bash\n(.*?)```", r"```yaml\n(.*?)path:"):
        assert re.findall(pattern, chinese, re.DOTALL) == re.findall(pattern, english, re.DOTALL)
    links = [
        sorted(set(re.findall(r"\]\(([^)]+)\)", text)) - {"README.md", "README.zh.md"})
        for text in (english, chinese)
    ]
    assert links[0] == links[1] and "(README.zh.md)" in english and "(README.md)" in chinese
    for row in re.findall(r"│ (?:sft|rm|ppo) .*│ +(\S*) +│ (\S+) +│", english):
        assert row in re.findall(r"│ (?:sft|rm|ppo) .*│ +(\S*) +│ (\S+) +│", chinese)
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 2000 and len(chinese.splitlines()) <= 250


def test_links_and_named_files_exist() -> None:
    for page in (
        REPO / "README.md",
        REPO / "README.zh.md",
        REPO / "CONTRIBUTING.md",
        *(REPO / "docs").glob("*.md"),
    ):
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
        for path in re.findall(r"`((?:rlhf|conf|tests|docs)/[\w./*-]+)`", text):
            assert "NAME" in path or list(REPO.glob(path.rstrip("/"))), f"{page.name}: {path}"


def test_the_details_of_ppo_name_functions_and_tests_that_exist() -> None:
    """docs/ppo.md, section 3: `file.py::function` below rlhf/, and the test that checks it."""
    page = (REPO / "docs" / "ppo.md").read_text()
    rows = re.findall(r"^\| (\d+) \| .+ \| `(.+)::(.+)` \| `(.+)::(.+)` \|$", page, re.MULTILINE)
    assert [int(number) for number, *_ in rows] == list(range(1, len(rows) + 1)) and len(rows) > 40
    assert len(re.findall(r"^\| \d+ \|", page, re.MULTILINE)) == len(rows)
    for number, file, function, test_file, test in rows:
        code = (REPO / "rlhf" / file).read_text()
        assert re.search(rf"^(def|class) {function}\b", code, re.MULTILINE), f"{number}: {function}"
        tests = next((REPO / "tests").rglob(test_file)).read_text()
        assert f"def {test}(" in tests, f"{number}: {test_file}::{test}"


def test_the_page_of_reported_cases_names_tests_that_exist() -> None:
    page = (REPO / "docs" / "borders.md").read_text()
    named = re.findall(r"`((?:unit|integration|chaos)/\w+\.py)::(\w+)`", page)
    assert len(named) > 45 and page.count("::") == len(named)
    for file, test in named:
        assert f"def {test}(" in (REPO / "tests" / file).read_text(), f"{file}::{test}"
    for row in re.findall(r"^\|.*\| \|$", page, re.MULTILINE):  # without a test
        assert "not built" in row, row


@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_the_words_that_people_search_for_are_there(page: str) -> None:
    text = " ".join((REPO / page).read_text().lower().split())
    words = ["resume", "gradient accumulation", "packing", "ground truth", "rlvr", "reward hacking"]
    assert [word for word in [*words, "throughput", "prompts only"] if word not in text] == []


def test_the_architecture_page_names_functions_that_exist() -> None:
    page = (REPO / "docs" / "architecture.md").read_text()
    named = re.findall(r"`(?:rlhf/)?([\w/]+\.py)::(\w+)(?:\.(\w+))?`", page)
    assert len(named) > 40
    for file, name, method in named:
        code = (REPO / "rlhf" / file).read_text()
        assert re.search(rf"^(def|class) {name}\b", code, re.MULTILINE), f"{file}::{name}"
        assert not method or re.search(rf"^    def {method}\b", code, re.MULTILINE), method


def test_the_ablation_page_names_the_arms_of_its_script() -> None:
    spec = importlib.util.spec_from_file_location("ablation", REPO / "bench" / "ablation.py")
    assert spec and spec.loader
    ablation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablation)
    page, removed = (REPO / "docs" / "ablation.md").read_text().split("## Removed switches")
    named = re.findall(r"^\| ([^|*]+) \| \d of \d \|", page, re.MULTILINE)
    assert named == [arm for arms in ablation.ARMS.values() for arm in arms]
    former = re.findall(r"^\| ([^|*]+) \| [^|]+ \| \d of \d \|", removed, re.MULTILINE)
    assert len(former) == 6 and not {*former} & {*named}
    for arms in ablation.ARMS.values():
        for overrides in arms.values():
            assert check_config(composed("stage=ppo", *ablation.ALWAYS, *overrides)) == []


def test_every_logged_metric_is_documented(demo: Demo) -> None:
    for run in (demo.sft, demo.rm, demo.ppo):
        logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
        assert (
            undocumented({*logged, *json.loads((run / "summary.json").read_text())["metrics"]})
            == []
        )

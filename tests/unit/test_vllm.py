"""rollout.engine=vllm without a server: what it asks, how it starts one, and what is refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed

from rlhf.base.errors import UserError
from rlhf.base.kept_process import NOT_STARTED, KeptProcess
from rlhf.base.own_processes import own_source
from rlhf.config.choices import RolloutEngine
from rlhf.config.validation import check_config
from rlhf.models.loading import full_state_dict, load_policy
from rlhf.runs.environment import free_port
from rlhf.runs.identity import own_settings
from rlhf.sampling import vllm, vllm_server, vllm_weights
from rlhf.sampling.token_choice import Sampling
from rlhf.sampling.vllm_server import ServerError, VllmServer, hold_url, last_error_line

PROGRAM = f"{shlex.quote(sys.executable)} serve"  # a program that exists
OWN = ["stage=ppo", "rollout.engine=vllm", f'rollout.vllm.command="{PROGRAM} --enforce-eager"']


def problems(*overrides: str) -> str:
    return "\n".join(check_config(composed("stage=ppo", *overrides)))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["rollout.engine=vllm"], "rollout.engine=vllm: which server? Give rollout.vllm.url"),
        (
            [
                "rollout.engine=vllm",
                "rollout.vllm.url=http://h:1",
                f'rollout.vllm.command="{PROGRAM}"',
            ],
            "rollout.engine=vllm: both are given?",
        ),
        (["rollout.engine=vllm", "rollout.vllm.url=me:pw@h:1"], "rollout.vllm.url=h:1: give an"),
        (["rollout.engine=vllm", "rollout.vllm.command=vllm"], "give the program and serve"),
        (
            ["rollout.engine=vllm", 'rollout.vllm.command="nothing serve"'],
            "there is no program nothing; make setup-vllm",
        ),
        (["rollout.engine=vllm", 'rollout.vllm.command="a \'b"'], "not a command"),
        (["rollout.vllm.url=http://h:1"], "only with rollout.engine=vllm, not native"),
        (
            ["rollout.engine=vllm", f'rollout.vllm.command="{PROGRAM} --host=0.0.0.0"'],
            "leave out --host: the run chooses it",
        ),
        (["rollout.vllm.url=http://me:secret@h:1/"], "rollout.vllm.url=http://h:1/: only with"),
        ([*OWN[1:], "rl.dschat.greedy=true"], "with rl.dschat.greedy=true: use"),
        (
            [*OWN[1:], "deploy.nodes=2"],
            "with deploy.nodes=2: start a server, and give its address",
        ),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_loaded(overrides: list[str], line: str) -> None:
    assert line in problems(*overrides)


def test_sound_settings_have_no_problem() -> None:
    assert problems(*OWN[1:]) == ""
    assert problems("rollout.engine=vllm", "rollout.vllm.url=http://host:8000") == ""


def test_where_the_server_is_does_not_make_another_run() -> None:
    own, url = composed(*OWN), composed(*OWN[:2], "rollout.vllm.url=http://host:8000")
    assert own_settings(own, "ppo") == own_settings(url, "ppo")
    assert own_settings(own, "ppo") != own_settings(composed("stage=ppo"), "ppo")


def test_our_options_come_before_the_users(tmp_path: Path) -> None:
    """So that the user's count."""
    command = VllmServer(composed(*OWN), tmp_path / "log", 96).command(tmp_path / "model", 8123)
    assert command[:3] == [sys.executable, "serve", str(tmp_path / "model")]
    assert command[-1] == "--enforce-eager"
    given = dict(zip(command[3:-1:2], command[4:-1:2]))
    assert given == {
        "--host": "127.0.0.1",
        "--port": "8123",
        "--served-model-name": "policy",
        "--dtype": "float32",
        "--max-model-len": "96",
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }


def test_a_request_asks_for_the_whole_distribution() -> None:
    random = torch.tensor([0.25, 0.5, 0.75])
    asked = vllm.completion_request([5, 6], random, 2, Sampling(0.7))
    assert asked["seed"] == 2**29 and asked["max_tokens"] == 3
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.7, 1.0, -1)
    assert (asked["repetition_penalty"], asked["min_p"]) == (1.0, 0.0)
    assert asked["ignore_eos"] is True and asked["stop_token_ids"] == [2]
    narrow = vllm.completion_request([5], random, 2, Sampling(1.0, 0.9, 40))
    assert (narrow["top_p"], narrow["top_k"]) == (0.9, 40)
    assert vllm.completion_request([5], random, 2, Sampling(greedy=True))["temperature"] == 0


def test_answers_are_padded_with_the_end_token() -> None:
    choices = [
        {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, -0.25]}},
        {"token_ids": [7, 8, 9], "logprobs": {"token_logprobs": [-1, -2, -3]}},
    ]
    ids, mask, logprobs = vllm.as_tensors(choices, torch.Size([2, 3]), 2)
    assert ids.tolist() == [[7, 2, 2], [7, 8, 9]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert logprobs.tolist() == [[-0.5, -0.25, 0], [-1, -2, -3]]


def test_an_untied_copy_computes_the_same(tokenizer: Any, tmp_path: Path) -> None:
    """And the model that is trained stays tied."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    policy = load_policy("builtin:tiny", tokenizer, composed("stage=ppo").deploy.precision).eval()
    for untie in (False, True):
        weights, _ = full_state_dict(policy.hf)
        vllm_weights.write_model(policy.hf, weights, tokenizer, tmp_path / "model", untie)
        settings = json.loads((tmp_path / "model" / "config.json").read_text())
        assert settings["tie_word_embeddings"] is not untie
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        is_tied = again.lm_head.weight is again.get_input_embeddings().weight
        assert is_tied is not untie
        ids = torch.tensor([[5, 6, 7]])
        assert torch.equal(again(ids).logits, policy.hf(ids).logits)
    assert policy.hf.config.tie_word_embeddings
    assert policy.hf.lm_head.weight is policy.hf.get_input_embeddings().weight


def test_other_stages_sample_with_native(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rlhf"):
        assert vllm.engine_without_server(composed(*OWN)) == RolloutEngine.native
    assert "this stage samples with native" in caplog.text
    cfg = composed("rollout.engine=continuous")
    assert vllm.engine_without_server(cfg) == RolloutEngine.continuous


# --------------------------------------------------------------------------------- a server by URL


class Answers(BaseHTTPRequestHandler):
    """A server that is well, reads 64 tokens and cannot take weights."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self.answer(200, self.server.models)  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        server: Any = self.server
        if self.path.endswith("completions"):
            logprobs = {"token_logprobs": [server.logprob]}
            choice = {"logprobs": logprobs, "finish_reason": server.ends}
            self.answer(200, {"choices": [choice]})
        else:
            self.answer(200 if server.is_developer else 404, {"success": server.is_idle})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[tuple[str, Any]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        about: Any = server
        about.is_developer, about.is_idle, about.logprob, about.ends = False, True, -3.0, "length"
        about.models = {"data": [{"max_model_len": 64}]}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", server
        server.shutdown()


def by_url(url: str, tmp_path: Path, longest: int = 64) -> VllmServer:
    cfg = composed("stage=ppo", "rollout.engine=vllm", f"rollout.vllm.url={url}")
    return VllmServer(cfg, tmp_path / "log", longest)


def test_a_server_that_cannot_be_used_is_refused_with_what_is_missing(
    address: tuple[str, Any], tmp_path: Path
) -> None:
    url, server = address
    with pytest.raises(UserError, match="no server answers there"):
        by_url(f"http://127.0.0.1:{free_port()}", tmp_path).check()
    with pytest.raises(UserError, match="start it with VLLM_SERVER_DEV_MODE=1"):
        by_url(url, tmp_path).check()
    server.is_developer = True
    with pytest.raises(UserError, match="start it with --logprobs-mode processed_logprobs"):
        by_url(url, tmp_path).check()
    server.logprob = 0.0
    by_url(url, tmp_path).check()
    with pytest.raises(UserError, match="reads 64 tokens at most.* up to 65.*--max-model-len 65"):
        by_url(url, tmp_path, longest=65).check()
    server.models = {"models": []}
    with pytest.raises(UserError, match="this is no vLLM server"):
        by_url(url, tmp_path).check()
    with pytest.raises(UserError, match="rollout.vllm.url=.*not a URL"), hold_url("http://[::1/"):
        pass


def test_what_the_server_does_not_do_is_an_error(
    address: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, server = address
    asked = by_url(url, tmp_path)
    server.ends = "abort"  # it is being stopped
    with pytest.raises(ServerError, match=r"the server has ended a response \(abort\)"):
        asked.complete([{"prompt": [5]}])
    with pytest.raises(ServerError, match="cannot load .*rollout.vllm.weights_dir"):
        asked.load(tmp_path)
    server.is_developer, server.is_idle = True, False
    monkeypatch.setattr(vllm_server, "CACHE_WAITS", (0.0, 0.0))
    with pytest.raises(ServerError, match="cannot empty its prefix cache"):
        asked.load(tmp_path)


def test_the_error_of_a_log_is_the_cause(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "ValueError: of an earlier attempt\n"
        "(EngineCore pid=7) ValueError: Free memory on device is less than desired\n"
        "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert "Free memory" in last_error_line(log)
    assert last_error_line(log, start=34).startswith("(EngineCore")
    assert last_error_line(log, start=log.stat().st_size) == "it said nothing"


def test_a_server_that_one_run_holds_is_refused_to_another(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    hold = (
        "import sys, time\nfrom rlhf.sampling.vllm_server import hold_url\n"
        "with hold_url(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, f"{url}/"],
        stdout=subprocess.PIPE,
        env=os.environ | own_source(),
        text=True,
    )
    assert other.stdout and other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="another run uses this server"), hold_url(url):
        pass
    other.kill()
    other.wait()
    with hold_url(url):
        pass


# --------------------------------------------------------------------------- the folder of weights


def test_the_weights_of_killed_runs_are_deleted_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_weights, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    run_dir, cfg = tmp_path / "ppo-a", composed(*OWN)
    everyone = tmp_path / "shm" / f"rlhf-vllm-{os.getuid()}"
    with vllm_weights.weights_folder(cfg, tmp_path / "ppo-b", 10) as held:
        killed = everyone / "ppo-c-1"
        killed.mkdir()
        (killed / "model.safetensors").write_text("x")
        for folder in (held, killed):
            os.utime(folder, (1, 1))
        with vllm_weights.weights_folder(cfg, run_dir, 10) as folder:
            assert folder.parent == everyone
            assert sorted(everyone.iterdir()) == sorted([folder, held])
    assert not everyone.exists()


def test_the_run_directory_takes_what_memory_has_no_room_for(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with vllm_weights.weights_folder(composed(*OWN), run_dir, 2**60) as folder:
        assert run_dir in folder.parents
    given = composed(*OWN, f"rollout.vllm.weights_dir={tmp_path}/shared")
    with vllm_weights.weights_folder(given, run_dir, 10) as folder:
        assert tmp_path / "shared" in folder.parents
    (tmp_path / "file").touch()
    wrong = composed(*OWN, f"rollout.vllm.weights_dir={tmp_path}/file")
    with (
        pytest.raises(UserError, match=r"weights_dir=.*/file: no weights can be written"),
        vllm_weights.weights_folder(wrong, run_dir, 10),
    ):
        pass


# ------------------------------------------------------------------------------ a program of ours


def test_a_program_ends_with_what_it_has_started(tmp_path: Path) -> None:
    kept = KeptProcess(
        ["bash", "-c", "sleep 100 & echo $! $PYTHONPATH; wait"],
        {"PATH": os.environ["PATH"]},
        tmp_path / "log",
    )
    child = int(wait_for_text(tmp_path / "log"))  # alone: PYTHONPATH is not handed on
    assert is_running(child) and kept.exit_code() is None
    kept.close()
    assert not is_running(child)


@pytest.mark.parametrize("victim", ["parent", "keeper"])
def test_a_program_ends_where_another_is_killed(tmp_path: Path, victim: str) -> None:
    start = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from rlhf.base.kept_process import KeptProcess\n"
        "program = ['bash', '-c', 'echo $$; exec sleep 100']\n"
        "kept = KeptProcess(program, dict(os.environ), Path(sys.argv[1]))\n"
        "print(kept.keeper.pid, flush=True)\ntime.sleep(60)\n"
    )
    log = tmp_path / "log"
    parent = subprocess.Popen(
        [sys.executable, "-c", start, str(log)],
        stdout=subprocess.PIPE,
        env=os.environ | own_source(),
        text=True,
    )
    assert parent.stdout
    keeper, program = int(parent.stdout.readline()), int(wait_for_text(log))
    os.kill(parent.pid if victim == "parent" else keeper, signal.SIGKILL)
    wait_until(lambda: not is_running(program))
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_running(keeper))


def test_a_program_that_ends_gives_its_exit_code(tmp_path: Path) -> None:
    for command, code, said in (
        (["bash", "-c", "echo ValueError: no; exit 3"], 3, "ValueError: no"),
        (["/no/such/program"], NOT_STARTED, "/no/such/program: No such file or directory"),
        (["bash", "-c", "kill -9 $$"], 128 + 9, "it said nothing"),
    ):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        kept = KeptProcess(command, {"PATH": os.environ["PATH"]}, log)
        assert kept.keeper.wait(30) == code == kept.exit_code()
        kept.close()
        assert last_error_line(log) == said


def wait_for_text(file: Path) -> str:
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"))
    return file.read_text()


def wait_until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
